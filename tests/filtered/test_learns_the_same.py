"""A plain Flax network through `filtered` learns what the Signal network learns."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kalman_flax as kf
from tests.filtered.models import resnet, signal_resnet
from train.data.batches import make_standardize
from train.data.sets import load_dataset

SIZE = {"stage_sizes": (1, 1), "filters": 4, "num_classes": 10}


def learn(apply, variables, images, labels, micro_batch_size, learning_rate=0.05):
    """The losses of 20 updates of SGD, each on another part of the images."""
    updates, optimizer = 20, optax.sgd(learning_rate, momentum=0.9)

    @jax.jit
    def update(variables, moments, images, labels):
        replicas = images.reshape(-1, micro_batch_size, *images.shape[1:])

        def loss(params):
            forward = functools.partial(apply, variables | {"params": params})
            logits, stats = jax.vmap(
                lambda x: forward(x, train=True, mutable=["batch_stats"])
            )(replicas)
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits.reshape(len(labels), -1), labels
            )
            return jnp.mean(losses), stats["batch_stats"]

        params = variables["params"]
        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        steps, moments = optimizer.update(grads, moments)
        params = optax.apply_updates(params, steps)
        stats = kf.merge_running(stats, momentum=0.9)
        return {"params": params, "batch_stats": stats}, moments, value

    moments, losses = optimizer.init(variables["params"]), []
    for x, y in zip(np.split(images, updates), np.split(labels, updates)):
        variables, moments, value = update(variables, moments, x, y)
        losses.append(value)
    return np.array(losses), variables


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_the_same_losses(name):
    if name == "cifar10" and not os.path.isdir(
        os.path.join(os.environ.get("TFDS_DATA_DIR", ""), name)
    ):
        pytest.skip("no CIFAR-10 in TFDS_DATA_DIR")
    train = load_dataset(name).train
    standardize = make_standardize("channel", train.images)
    images = np.array(standardize(train.images[:160]))
    labels = train.labels[:160]
    if name == "cifar10":
        images = images[:, ::2, ::2]  # as much as there is in a minute

    plain, signals = resnet.ResNet(**SIZE), signal_resnet.ResNet(**SIZE)
    start = jax.jit(plain.init, static_argnums=2)(jax.random.key(0), images[:2], False)
    apply = kf.filtered(plain.apply, input_states={1: kf.KalmanState(0.0, 1.0)})
    expected, expected_variables = learn(signals.apply, start, images, labels, 2)
    losses, variables = learn(apply, start, images, labels, 2)
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    for ours, theirs in zip(*map(jax.tree.leaves, (variables, expected_variables))):
        np.testing.assert_allclose(ours, theirs, rtol=2e-2, atol=2e-3)

    unfiltered, _ = learn(plain.apply, start, images, labels, 2)
    assert np.abs(unfiltered - expected).max() > 0.1
