"""Training and inference on micro-batches that show too little, or far too much."""

import functools
import inspect
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kalman_flax as kf
from tests.reference.slow import few_quick

KEY = jax.random.key(0)
CHANNELS, CLASSES, WIDTH = 3, 3, 8
NAMES = [
    *kf.NORMALIZERS, "kalman_wc", "kalman_ws", "group_ws", "group_kalman_wc",
]  # fmt: skip
#: For them to do from the start what else they do after thousands of steps.
WARM = {
    "batch_renorm": {"warmup_steps": 0, "r_steps": 1, "d_steps": 1},
    "moving_average": {"window": 2, "warmup_steps": 0, "renorm_warmup_steps": 0},
}


class MicroBatch(NamedTuple):
    """Images of ``scale * noise + offset``, some of the noise being all one value."""

    seed: int
    equal_images: bool
    constant: frozenset[int]  # channels without variance
    scale: float
    offset: float

    def images(self, size):
        x = np.random.default_rng(self.seed).normal(size=(*size, CHANNELS))
        if self.equal_images:
            x[:] = x[0]
        channels = list(self.constant)
        x[..., channels] = x[0, 0, 0, channels]
        return np.float32(self.scale * x + self.offset)


#: Images of zeros are those of scale and offset 0.
MICRO_BATCHES = st.builds(
    MicroBatch,
    seed=st.integers(0, 99),
    equal_images=st.booleans(),
    constant=st.frozensets(st.sampled_from(range(CHANNELS))),
    scale=st.sampled_from([1.0, 0.0, 1e-6, 1e4]),
    offset=st.sampled_from([0.0, 1.0, 1e4, -1e4]),
)
#: (Images, height, width) and the dtype to compute in. Each is compiled: few will do.
LAYOUTS = st.sampled_from(
    [((1, 3, 3), "float32"), ((2, 1, 1), "float32"), ((2, 3, 3), "bfloat16")]
)


class Net(nn.Module):
    """conv, norm, activation; conv, sum, norm in its two steps, activation; dense."""

    normalization: kf.Normalization
    dtype: str = "float32"

    @nn.compact
    def __call__(self, images, use_running_average):
        norm, conv, input_state, activation = self.normalization
        conv = functools.partial(conv, WIDTH, (3, 3), use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            norm, use_running_average=use_running_average, dtype=self.dtype
        )
        x = conv(name="conv1")(kf.Signal(images, input_state))
        x = activation(norm(name="norm1")(x))
        norm2 = norm(name="norm2")
        filtered = norm2.filter(conv(name="conv2")(x) + x)
        x = kf.global_avg_pool(activation(norm2.normalize(filtered)))
        return kf.Dense(CLASSES)(x).value.astype(jnp.float32)


@functools.cache
def network(name, dtype="float32"):
    return Net(kf.normalization(name, **WARM.get(name, {})), dtype)


@functools.cache
def initial(name):
    keys = {"params": KEY, "transition": KEY}
    images = jnp.zeros((1, 3, 3, CHANNELS))
    return jax.jit(lambda: network(name).init(keys, images, True))()


@functools.cache
def make_step(name, dtype):
    """A training step, followed by inference on the same images."""
    apply = functools.partial(network(name, dtype).apply, rngs={"transition": KEY})

    def loss_fn(learned, variables, images):
        logits, written = apply(
            variables | learned, images, False, mutable=["batch_stats"]
        )
        labels = jnp.eye(len(images), CLASSES)
        loss = optax.softmax_cross_entropy(logits, labels)
        return jnp.mean(loss), (logits, written)

    # Compiled as in training on a CPU, see `train/engine/step.py`.
    @functools.partial(
        jax.jit, compiler_options={"xla_disable_hlo_passes": "cse_barrier_expander"}
    )
    def step(variables, images):
        learned = {k: v for k, v in variables.items() if k != "batch_stats"}
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (logits, written)), grads = gradient(learned, variables, images)
        # Clipped, since at 1e4 an update in proportion to the gradient overflows where
        # values stay as large as they are (`weight`, `normalizer_free` and
        # `frozen_batch`), are made larger (`evonorm_b0`: without variance by
        # 1 / sqrt(epsilon) and not centred), or are taken for standardised
        # (`kalman_paper`).
        params = jax.tree.map(
            lambda p, g: p - 0.1 * jnp.clip(g, -1.0, 1.0),
            variables["params"],
            grads["params"],
        )
        # The gradient of `gradient_stats` is their next value.
        variables = variables | grads | written | {"params": params}
        return variables, {
            "loss": loss,
            "logits": logits,
            "grads": grads,
            "inferred": apply(variables, images, True),
        }

    return step


# Derandomised: the same cases in every run, 100 for each normaliser.
@pytest.mark.parametrize("name", few_quick(NAMES))
@settings(max_examples=100, deadline=None, derandomize=True)
@given(layout=LAYOUTS, micro_batches=st.lists(MICRO_BATCHES, min_size=1, max_size=3))
def test_all_stays_finite(name, layout, micro_batches):
    size, dtype = layout
    step = make_step(name, dtype)
    variables = initial(name)
    for micro_batch in micro_batches:
        variables, seen = step(variables, micro_batch.images(size))
        chex.assert_tree_all_finite(jax.device_get((variables, seen)))


# What follows is of one normaliser by itself.
SHAPE = (2, 3, 3, 4)
NOISE = np.float32(np.random.default_rng(0).normal(size=SHAPE))
each = pytest.mark.parametrize("name", few_quick(kf.NORMALIZERS))


def normaliser(name, **options):
    return kf.normalization(name, **options).norm(use_running_average=False)


@each
def test_values_that_overflow_leave_the_running_statistics_alone(name):
    norm = normaliser(name)
    variables = norm.init(KEY, NOISE)
    x = NOISE.copy()
    x[..., 0] *= 1e20
    _, written = norm.apply(variables, x, mutable=["batch_stats"])
    chex.assert_tree_all_finite(written)
    _, expected = norm.apply(variables, NOISE, mutable=["batch_stats"])
    for new, clean in zip(*map(jax.tree.leaves, (written, expected))):
        if new.ndim == 1 and new.shape[-1] == 4:  # the other channels move
            chex.assert_trees_all_close(new[1:], clean[1:], rtol=1e-5)


@each
def test_nan_behind_a_mask_gives_finite_gradients(name):
    norm = normaliser(name)
    if "mask" not in inspect.signature(norm).parameters:
        return
    mask = np.ones(SHAPE, bool)
    mask[:, 0] = False
    variables = norm.init(KEY, NOISE)

    def loss(params, x):
        y, _ = norm.apply(
            variables | {"params": params}, x, mask=mask, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.where(mask, jnp.square(y + 1.0), 0.0))

    gradient = jax.grad(loss, argnums=(0, 1))
    params = variables["params"]
    hidden = gradient(params, np.where(mask, NOISE, np.nan))
    chex.assert_trees_all_close(
        hidden[0], gradient(params, np.where(mask, NOISE, 5.0))[0], rtol=1e-5
    )
    assert not hidden[1][:, 0].any()
    chex.assert_tree_all_finite(hidden)


@pytest.mark.parametrize("noise", [None, "additive", "multiplicative"])
@pytest.mark.parametrize("name", ["kalman", "kalman_released", "group_kalman"])
def test_a_prediction_that_is_not_finite_counts_as_unknown(name, noise):
    """Channel by channel, and with finite gradients."""
    norm = normaliser(name, noise=noise, propagate="raw")
    mean = jnp.array([jnp.inf, 0.1, jnp.nan, 1e30])
    var = jnp.array([1.0, jnp.inf, 1.0, 1.0])
    variables = norm.init(KEY, NOISE)

    def loss(params, x, state):
        y, _ = norm.apply(
            variables | {"params": params},
            kf.Signal(x, state),
            mutable=["batch_stats"],
        )
        return jnp.sum(jnp.sin(y.value)), y.state

    gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    grads, state = gradient(variables["params"], NOISE, kf.KalmanState(mean, var))
    chex.assert_tree_all_finite(grads)
    expected = norm.apply(variables, kf.Signal(NOISE), mutable=["batch_stats"])[0]
    chex.assert_trees_all_close(state, expected.state, rtol=1e-5)


def test_gain_1_does_not_look_at_the_prediction():
    norm = kf.KalmanNorm(False, gain=1.0, noise="multiplicative")
    x = kf.Signal(NOISE, kf.KalmanState(jnp.inf, jnp.nan))
    y, _ = norm.apply(norm.init(KEY, x), x, mutable=["batch_stats"])
    expected = nn.BatchNorm(False, use_fast_variance=False).init_with_output(KEY, NOISE)
    chex.assert_trees_all_close(y.value, expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["batch", "cross_iteration", "group", "group_kalman", "instance", "kalman"]
)
def test_float64_stays_float64(name):
    with jax.enable_x64(True):
        x = 1e8 + np.random.default_rng(0).normal(size=(4, 8, 8, 4))
        norm = normaliser(name)
        variables = norm.init(KEY, x)
        y, written = norm.apply(variables, x, mutable=["batch_stats"])
        assert y.dtype == x.dtype
        np.testing.assert_allclose(np.std(y), 1.0, atol=1e-3)
        if name == "kalman":  # Flax's begin in float32 and end in float64
            chex.assert_trees_all_equal_dtypes(
                written, {"batch_stats": variables["batch_stats"]}
            )
