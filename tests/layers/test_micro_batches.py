"""`micro_batch_size`: every micro-batch by itself in a batch that `jit` shards."""

import functools
import re
from collections.abc import Callable

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import kalman_flax as kf
from kalman_flax.models.resnet import Block

KEY = jax.random.key(0)
STATE = kf.KalmanState(0.0, 1.0)
# Of 8 replicas of two, no two alike.
IMAGES = jax.random.normal(KEY, (16, 4, 4, 3)) + jnp.arange(16.0)[:, None, None, None]
COLLECTIVE = re.compile("all-reduce|all-gather|all-to-all|collective-permute")


def close(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


class Signals(nn.Module):
    """A pre-activation block, whose shortcut carries the filtered moments."""

    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, images):
        norm = functools.partial(self.norm, False, gain=0.3, momentum=0.9)
        x = kf.Conv(2, (3, 3))(kf.Signal(images, STATE))
        block = Block(2, norm, functools.partial(kf.Conv, use_bias=False))
        return kf.global_avg_pool(norm()(block(x))).value


class Plain(nn.Module):
    @nn.compact
    def __call__(self, images):
        norm = functools.partial(nn.BatchNorm, False, momentum=0.9)
        x = nn.relu(norm()(nn.Conv(2, (3, 3))(images)))
        return jnp.mean(norm()(nn.Conv(2, (3, 3))(x)), axis=(1, 2))


def signals(size):
    net = Signals(functools.partial(kf.KalmanNorm, micro_batch_size=size))
    return net, functools.partial(net.apply, mutable=["batch_stats"])


def filtered(size):
    net, options = Plain(), {"micro_batch_size": size, "gain": 0.3}
    apply = kf.filtered(net.apply, input_states={1: STATE}, **options)
    return net, functools.partial(apply, mutable=["batch_stats"])


@pytest.mark.parametrize("make", [signals, filtered])
def test_sharded_batch(make):
    net, apart = make(2)
    _, alone = make(None)
    variables = jax.jit(lambda: net.init(KEY, IMAGES[:2]))()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    data = NamedSharding(mesh, PartitionSpec("data"))
    every = NamedSharding(mesh, PartitionSpec())
    images, on_all = jax.device_put(IMAGES, data), jax.device_put(variables, every)

    def outputs(apply, variables, images):
        return apply(variables, images)[0]

    def compiled(apply):
        jitted = jax.jit(functools.partial(outputs, apply), out_shardings=data)
        return jitted.lower(on_all, images).compile().as_text()

    assert not COLLECTIVE.search(compiled(apart))
    assert COLLECTIVE.search(compiled(alone))  # statistics of the whole batch

    def step(variables, images):
        def loss(params):
            y, updates = apart({**variables, "params": params}, images)
            return jnp.mean(jnp.sin(y)), (y, updates["batch_stats"])

        return jax.grad(loss, has_aux=True)(variables["params"])

    def replicas(variables, images):
        def loss(params):
            one = functools.partial(alone, {**variables, "params": params})
            y, updates = jax.vmap(one)(images.reshape(8, 2, *images.shape[1:]))
            stats = kf.merge_running(updates["batch_stats"], 0.9)
            return jnp.mean(jnp.sin(y)), (y.reshape(16, -1), stats)

        return jax.grad(loss, has_aux=True)(variables["params"])

    close(jax.jit(step)(on_all, images), jax.jit(replicas)(variables, IMAGES))


def test_mask_and_states():
    """Against a loop over the micro-batches."""
    norm = kf.KalmanNorm(gain=0.3, momentum=0.9, micro_batch_size=4)
    alone = norm.clone(micro_batch_size=None)
    variables = norm.init(KEY, IMAGES, False)
    rows = 1 + jnp.arange(16)[:, None, None, None] % 4
    mask = jnp.arange(4)[:, None, None] < rows
    run = functools.partial(norm.apply, variables, mutable=True)
    one = functools.partial(alone.apply, variables, mutable=True)
    y, written = run(kf.Signal(IMAGES, STATE), False, mask=mask)
    parts = [
        one(kf.Signal(x, STATE), False, mask=m)
        for x, m in zip(np.split(IMAGES, 4), np.split(mask, 4))
    ]
    close(y.value, jnp.concatenate([part.value for part, _ in parts]))
    close(y.state, parts[0][0].state)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(w for _, w in parts))
    filtered = written["intermediates"]["filtered"]
    close(filtered, stacked["intermediates"]["filtered"])
    merged = kf.merge_running(stacked["batch_stats"], momentum=0.9)
    close(written["batch_stats"], merged)
    inferred = norm.apply(variables, IMAGES[:3], True)  # of any number
    close(inferred, alone.apply(variables, IMAGES[:3], True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch_size": 3}, "16 examples is no multiple of micro_batch_size=3"),
        ({"micro_batch_size": 2, "axis": 0}, "axis is 0.*channels last"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0; expected a whole number"),
        ({"micro_batch_size": 2, "propagate": "raw"}, "a state of each micro-batch"),
        ({"micro_batch_size": 2, "axis_name": "data"}, "axis_name 'data' does"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        norm = kf.KalmanNorm(False, **options)
        norm.apply(norm.init(KEY, IMAGES), IMAGES, mutable=True)
