"""`filtered` under JAX's transformations, and these inside of the model."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import kalman_flax as kf

STATES = {1: kf.KalmanState(0.0, 1.0)}
REPLICAS = jax.random.normal(jax.random.key(1), (2, 2, 4, 4, 3))
IMAGES = REPLICAS[0]
TRAIN = dict(train=True, mutable=["batch_stats"])


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        y = nn.BatchNorm(use_running_average=not train)(nn.Conv(3, (3, 3))(x))
        return nn.relu(x + y)


class Net(nn.Module):
    """Two blocks, by a loop or as `how` has it."""

    how: str = "loop"

    @nn.compact
    def __call__(self, x, train):
        if self.how == "scan":
            body = lambda block, x, _: (block(x, train), None)  # noqa: E731
            blocks = nn.scan(
                body,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=2,
            )
            return blocks(Block(name="blocks"), x, None)[0]
        block = nn.remat(Block, static_argnums=(2,)) if self.how == "remat" else Block
        block = nn.jit(Block, static_argnums=(2,)) if self.how == "jit" else block
        for name in ("first", "second"):
            x = block(name=name)(x, train)
        return x


def step(apply, variables, images):
    """Loss, gradients and batch_stats of one micro-batch."""

    def loss(params):
        y, updates = apply({**variables, "params": params}, images, **TRAIN)
        return jnp.mean(jnp.sin(3 * y)), updates["batch_stats"]

    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return value, grads, stats


@pytest.fixture(scope="module")
def variables():
    return jax.jit(Net().init, static_argnums=2)(jax.random.key(0), IMAGES, False)


FILTERED = kf.filtered(Net().apply, input_states=STATES, gain=0.3)


@pytest.fixture(scope="module")
def loop(variables):
    """What every way to run independent replicas must give."""
    one = jax.jit(functools.partial(step, FILTERED, variables))
    results = [one(images) for images in REPLICAS]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def close(actual, expected):
    chex.assert_trees_all_close(actual, expected, rtol=2e-4, atol=2e-5)


def test_vmap(variables, loop):
    run = functools.partial(step, FILTERED, variables)
    close(jax.jit(jax.vmap(run))(REPLICAS), loop)


def test_pmap(variables, loop):
    run = jax.pmap(functools.partial(step, FILTERED), in_axes=(None, 0))
    close(jax.device_get(run(variables, REPLICAS)), loop)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(variables, loop, check_vma):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def one(variables, images):
        if check_vma:
            variables = lax.pcast(variables, "data", to="varying")
        result = step(FILTERED, variables, images[0])
        return jax.tree.map(lambda leaf: leaf[None], result)

    data = PartitionSpec("data")
    run = jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(PartitionSpec(), data),
        out_specs=data,
        check_vma=check_vma,
    )
    close(jax.jit(run)(variables, REPLICAS), loop)


@pytest.mark.parametrize("how", ["remat", "jit"])
def test_inside_of_the_model(variables, loop, how):
    apply = kf.filtered(Net(how).apply, input_states=STATES, gain=0.3)
    run = jax.jit(functools.partial(step, apply))
    close(run(variables, IMAGES), jax.tree.map(lambda leaf: leaf[0], loop))
    explanation = kf.explain(apply, variables, IMAGES, **TRAIN)
    paths = [row.path for row in explanation.rows]
    # nn.jit compiles the block once, by its first name.
    second = "first" if how == "jit" else "second"
    assert paths == ["first/BatchNorm_0", f"{second}/BatchNorm_0"]
    assert explanation.predicted == 2
    assert all(np.isfinite(row.log_ratio) for row in explanation.rows)


def test_remat_stays_remat(variables):
    apply = kf.filtered(Net("remat").apply, input_states=STATES)
    jaxpr = jax.make_jaxpr(lambda v, x: apply(v, x, **TRAIN))(variables, IMAGES)
    names = [equation.primitive.name for equation in jaxpr.eqns]
    assert sum("remat" in name or "checkpoint" in name for name in names) == 2


def test_scan_over_blocks(variables, loop):
    apply = kf.filtered(Net("scan").apply, input_states=STATES, gain=0.3)

    def stacked(tree):
        both = tree["first"], tree["second"]
        return {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)}

    value, grads, stats = jax.tree.map(lambda leaf: leaf[0], loop)
    actual = jax.jit(functools.partial(step, apply))(
        {name: stacked(tree) for name, tree in variables.items()}, IMAGES
    )
    close(actual, (value, stacked(grads), stacked(stats)))


def test_vmap_inside(variables, loop):
    """Of replicas that share the parameters; the rows are those of one."""

    def forward(variables, replicas, **options):
        one = lambda images: Net().apply(variables, images, **options)  # noqa: E731
        return jax.vmap(one)(replicas)

    apply = kf.filtered(forward, input_states=STATES, gain=0.3)

    def losses(params):
        y, updates = apply({**variables, "params": params}, REPLICAS, **TRAIN)
        return jnp.mean(jnp.sin(3 * y)), updates["batch_stats"]

    (value, stats), grads = jax.jit(jax.value_and_grad(losses, has_aux=True))(
        variables["params"]
    )
    mean = functools.partial(jnp.mean, axis=0)
    close((value, grads), jax.tree.map(mean, loop[:2]))
    close(stats, loop[2])


def test_shard_map_inside(variables, loop):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    data, every = PartitionSpec("data"), PartitionSpec()

    def forward(variables, replicas, **options):
        def one(variables, images):
            y, updates = Net().apply(variables, images[0], **options)
            return y[None], jax.tree.map(lambda leaf: leaf[None], updates)

        return jax.shard_map(one, mesh=mesh, in_specs=(every, data), out_specs=data)(
            variables, replicas
        )

    apply = kf.filtered(forward, input_states=STATES, gain=0.3)
    _, updates = jax.jit(lambda v, x: apply(v, x, **TRAIN))(variables, REPLICAS)
    close(updates["batch_stats"], loop[2])


class Branches(nn.Module):
    """Control flow between two normalisers that keeps the form of a state, or not."""

    how: str

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(not train, name="first")(x)
        if self.how == "cond":
            x = lax.cond(x[0, 0, 0, 0] > 0, nn.relu, lambda x: 2 * x, x)
        if self.how == "lossy cond":
            x = lax.cond(x[0, 0, 0, 0] > 0, nn.relu, lambda x: x - x.mean(), x)
        if self.how == "while":
            x = lax.while_loop(
                lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] / 2), (0, x)
            )
            x = x[1]
        if self.how == "scan":
            x, _ = lax.scan(lambda x, a: (nn.relu(x) + a, None), x, jnp.arange(2.0))
        return nn.BatchNorm(not train, name="second")(x)


@pytest.mark.parametrize(
    ("how", "predicted"),
    [("cond", True), ("lossy cond", False), ("while", True), ("scan", True)],
)
def test_control_flow(how, predicted):
    net = Branches(how)
    variables = net.init(jax.random.key(0), IMAGES, False)
    apply = kf.filtered(net.apply, input_states=STATES)
    explanation = kf.explain(apply, variables, IMAGES, **TRAIN)
    assert explanation.rows[1].predicted is predicted
    if not predicted:
        assert "test_transforms.py" in explanation.rows[1].lost_at
    actual, _ = jax.jit(lambda v, x: apply(v, x, **TRAIN))(variables, IMAGES)
    alone = kf.filtered(net.apply, input_states=STATES, gain=1.0)
    observed, _ = jax.jit(lambda v, x: alone(v, x, **TRAIN))(variables, IMAGES)
    plain, _ = net.apply(variables, IMAGES, **TRAIN)
    close(observed, plain)
    chex.assert_tree_all_finite(actual)


def test_a_function_that_was_jitted_before_is_traced_anew(variables):
    """jax.jit's caches must not mix programs with and without the filter."""
    inner = jax.jit(lambda v, x: Net().apply(v, x, **TRAIN))
    plain = inner(variables, IMAGES)
    twice = [
        kf.filtered(inner, input_states=STATES, gain=gain)(variables, IMAGES)
        for gain in (0.3, 0.1)
    ]
    assert jnp.abs(twice[0][0] - plain[0]).max() > 1e-3
    assert jnp.abs(twice[0][0] - twice[1][0]).max() > 1e-3
    chex.assert_trees_all_equal(inner(variables, IMAGES), plain)


def test_a_gradient_inside_is_refused(variables):
    def gradients(variables, images):
        return step(Net().apply, variables, images)

    with pytest.raises(ValueError, match="gradient"):
        kf.filtered(gradients, input_states=STATES)(variables, IMAGES)
