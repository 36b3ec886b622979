"""A plain Flax network through `filtered` is the same network written with Signals."""

import chex
import jax
import jax.numpy as jnp
import pytest

import kalman_flax as kf
from benchmarks.hlo import operations
from tests.filtered.models import resnet, signal_resnet

STATES = {1: kf.KalmanState(0.0, 1.0)}
IMAGES = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
LABELS = jnp.array([0, 2])
PLAIN = resnet.ResNet()


@pytest.fixture(scope="module")
def variables():
    """With scales, biases and statistics that are not those of the start."""
    tree = jax.jit(PLAIN.init, static_argnums=2)(jax.random.key(0), IMAGES, False)
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [
        leaf + 0.1 * jnp.abs(jax.random.normal(key, leaf.shape))
        for leaf, key in zip(leaves, keys)
    ]
    return jax.tree.unflatten(structure, leaves)


def step(apply, variables, images=IMAGES):
    """Loss, gradients and batch_stats of one micro-batch."""

    def loss(params):
        v = {**variables, "params": params}
        logits, updates = apply(v, images, train=True, mutable=["batch_stats"])
        log_probability = jax.nn.log_softmax(logits)
        return -jnp.mean(log_probability[jnp.arange(2), LABELS]), updates

    (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(
        variables["params"]
    )
    return value, grads, updates["batch_stats"]


def close(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"gain": 0.3, "rule": "paper", "propagate": "raw"}, {"outlier_ratio": 1.1}],
)
def test_step(variables, options):
    signals = signal_resnet.ResNet(options=tuple(options.items()))
    apply = kf.filtered(PLAIN.apply, input_states=STATES, **options)
    expected = jax.jit(lambda v: step(signals.apply, v))(variables)
    close(jax.jit(lambda v: step(apply, v))(variables), expected)
    if not options:
        plain = jax.jit(lambda v: step(PLAIN.apply, v))(variables)
        with pytest.raises(AssertionError):
            close(plain, expected)


@pytest.mark.parametrize("train", [False])
def test_inference_is_the_program_of_the_model(variables, train):
    apply = kf.filtered(PLAIN.apply, input_states=STATES)

    def text(apply):
        infer = jax.jit(lambda v, x: apply(v, x, train=train))
        return operations(infer.lower(variables, IMAGES).compile().as_text())

    assert text(apply) == text(PLAIN.apply)


@pytest.mark.slow
def test_kernel_map(variables):
    """In training and in inference; and exported, the model itself computes it."""
    signals = signal_resnet.ResNet(kernel_map=kf.centre_kernel)
    apply = kf.filtered(PLAIN.apply, input_states=STATES, kernel_map=kf.centre_kernel)
    close(
        jax.jit(lambda v: step(apply, v))(variables),
        jax.jit(lambda v: step(signals.apply, v))(variables),
    )
    expected = signals.apply(variables, IMAGES, train=False)
    close(apply(variables, IMAGES, train=False), expected)
    exported = apply.export_kernels(variables, IMAGES, train=False)
    close(PLAIN.apply(exported, IMAGES, train=False), expected)
    kept = exported["params"]["Dense_0"], variables["params"]["Dense_0"]
    chex.assert_trees_all_equal(*kept)
