"""The layers under JAX's transformations, and over several devices."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads

import kalman_flax as kf
from kalman_flax import KalmanState, Signal

KEY = jax.random.key(0)
REPLICAS = 2


class Net(nn.Module):
    """conv, norm, relu, conv, norm: two observations, the second with a prediction."""

    train: bool = True
    remat: bool = False
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, mask=None):
        norm = nn.remat(kf.KalmanNorm) if self.remat else kf.KalmanNorm
        norm = functools.partial(
            norm,
            not self.train,
            axis_name=self.axis_name,
            gain=0.4,
            learn_gain="scalar",
            noise="additive",
        )
        conv = nn.remat(kf.Conv) if self.remat else kf.Conv
        x = Signal(images, KalmanState(0.0, 1.0))
        x = kf.relu(norm(name="norm1")(conv(3, (3, 3), name="conv1")(x), mask=mask))
        return norm(name="norm2")(conv(2, (3, 3), name="conv2")(x), mask=mask).value


@pytest.fixture(scope="module")
def variables():
    return jax.jit(Net().init)(KEY, jnp.zeros((1, 5, 5, 2)))


@pytest.fixture(scope="module")
def replicas():
    return jax.random.normal(jax.random.key(1), (REPLICAS, 2, 5, 5, 2))


def step(net, variables, images):
    """Loss, gradients and batch_stats of one micro-batch."""

    def loss(params):
        v = {**variables, "params": params}
        y, updates = net.apply(v, images, mutable=["batch_stats"])
        return jnp.mean(jnp.sin(3 * y)), updates["batch_stats"]

    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return value, grads, stats


def close(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=2e-4, atol=2e-5)


@pytest.fixture(scope="module")
def loop(variables, replicas):
    """What every way to run independent replicas must give."""
    one = jax.jit(functools.partial(step, Net(), variables))
    results = [one(images) for images in replicas]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


@pytest.mark.parametrize("train", [True, False])
def test_jit(train, variables, replicas):
    forward = functools.partial(Net(train).apply, mutable=["batch_stats"])
    eager = forward(variables, replicas[0])
    close(jax.jit(forward)(variables, replicas[0]), eager)


def test_vmapped_replicas_are_independent(variables, replicas, loop):
    run = jax.jit(jax.vmap(functools.partial(step, Net(), variables)))
    close(run(replicas), loop)


def test_gradient_outside_of_vmap_is_that_of_the_mean_loss(variables, replicas, loop):
    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params):
        v = {**variables, "params": params}
        forward = functools.partial(Net().apply, v, mutable=["batch_stats"])
        y, updates = jax.vmap(forward)(replicas)
        return jnp.mean(jnp.sin(3 * y)), updates["batch_stats"]

    (value, stats), grads = run(variables["params"])
    values, expected_grads, expected_stats = loop
    np.testing.assert_allclose(value, values.mean(), rtol=1e-4)
    close(stats, expected_stats)
    close(grads, jax.tree.map(lambda g: g.mean(0), expected_grads))


def test_remat_changes_nothing(variables, replicas, loop):
    recomputed = jax.jit(functools.partial(step, Net(remat=True), variables))
    recomputed = recomputed(replicas[0])
    close(recomputed, jax.tree.map(lambda leaf: leaf[0], loop))


def test_pmapped_devices_are_independent(variables, replicas, loop):
    run = functools.partial(step, Net(), variables)
    close(jax.device_get(jax.pmap(run)(replicas)), loop)


def sharded(function, out_specs):
    mesh = jax.make_mesh(
        (REPLICAS,), ("devices",), axis_types=(AxisType.Auto,),
        devices=jax.devices()[:REPLICAS],
    )  # fmt: skip
    specs = PartitionSpec("devices")
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs)
    )


def test_shard_mapped_devices_are_independent(variables, replicas):
    def forward(images):
        y, updates = Net().apply(variables, images[0], mutable=["batch_stats"])
        return jax.tree.map(lambda leaf: leaf[None], (y, updates))

    actual = sharded(forward, PartitionSpec("devices"))(replicas)
    one = functools.partial(Net().apply, variables, mutable=["batch_stats"])
    expected = [one(images) for images in replicas]
    close(actual, jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected))


def test_axis_name_shares_statistics_over_devices(variables, replicas):
    """Of the whole batch, though padding leaves one device fewer values to count."""
    mask = jnp.ones((REPLICAS, 2, 1, 1, 1), bool).at[0, 1].set(False)

    def forward(images, mask):
        net = functools.partial(Net(axis_name="devices").apply, variables)
        y, updates = net(images[0], mask[0], mutable=["batch_stats"])
        return y[None], updates["batch_stats"]

    # Statistics leave replicated: shard_map refuses what differs between devices.
    specs = (PartitionSpec("devices"), PartitionSpec())
    y, stats = sharded(forward, specs)(replicas, mask)

    def whole(leaf):
        return leaf.reshape(-1, *leaf.shape[2:])

    net = functools.partial(Net().apply, variables, mutable=["batch_stats"])
    expected, updates = net(whole(replicas), whole(mask))
    close(whole(y), expected)
    close(stats, updates["batch_stats"])
    assert jnp.abs(expected - net(whole(replicas))[0]).max() > 1e-2  # the mask matters


def test_gradient_through_shared_statistics(variables, replicas):
    def gradient(net, over, images):
        def loss(images):
            forward = functools.partial(net.apply, variables, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(3 * over(forward)(images)[0]))

        return jax.jit(jax.grad(loss))(images)

    over = functools.partial(jax.vmap, axis_name="devices")
    shared = gradient(Net(axis_name="devices"), over, replicas)
    whole = replicas.reshape(-1, *replicas.shape[2:])
    expected = gradient(Net(), lambda forward: forward, whole)
    close(shared.reshape(expected.shape), expected)


def test_gradients_are_those_of_finite_differences(variables, replicas):
    """Parameters reach the loss through the predicted states as well."""

    @jax.jit
    def loss(params):
        v = {**variables, "params": params}
        y, _ = Net().apply(v, replicas[0], mutable=["batch_stats"])
        return jnp.mean(jnp.square(y - 1))

    params = variables["params"]
    check_grads(loss, (params,), 1, ["rev"], atol=1e-2, rtol=2e-2, eps=3e-3)
    # The gain's own share, which the random direction above could hide:
    for norm in ("norm1", "norm2"):

        def of_gain(gain, norm=norm):
            return loss({**params, norm: {**params[norm], "gain": gain}})

        gain = params[norm]["gain"]
        slope = (of_gain(gain + 1e-2) - of_gain(gain - 1e-2)) / 2e-2
        np.testing.assert_allclose(jax.jit(jax.grad(of_gain))(gain), slope, rtol=2e-2)


def test_prediction_carries_gradient_to_the_kernel(variables, replicas):
    """Eq. 7: A is the layer's own kernel. Fails if the state were cut off from it."""

    def loss(kernel, cut):
        x = Signal(replicas[0], KalmanState(0.0, 1.0))
        conv = {"params": {"kernel": kernel, "bias": jnp.zeros(3)}}
        x = kf.Conv(3, (3, 3)).apply(conv, x)
        x = x.replace(state=jax.lax.stop_gradient(x.state)) if cut else x
        norm = kf.KalmanNorm(use_running_average=False)
        return jnp.sum(jnp.sin(norm.init_with_output(KEY, x)[0].value))

    kernel = variables["params"]["conv1"]["kernel"]
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    flowing, cut = (gradient(kernel, cut) for cut in (False, True))
    assert jnp.abs(flowing - cut).max() > 1e-2
