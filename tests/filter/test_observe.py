import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import kalman_flax as kf
from tests.reference import kalman as reference

SETS = [("batch", None), ("group", 2), ("layer", None), ("instance", None)]
each_set = pytest.mark.parametrize(("over", "num_groups"), SETS)


def draw(shape=(4, 8, 3, 6), offset=2.0, seed=0):
    """Every example and channel of another mean and scale."""
    rng = np.random.default_rng(seed)
    ends = (shape[0], *(1,) * (len(shape) - 2), shape[-1])
    x = rng.normal(offset + rng.normal(size=ends), rng.uniform(0.5, 2, ends), shape)
    return x.astype(np.float32)


def hidden(x, seed=1):
    """A mask that hides all of example 0, and x with NaN behind it."""
    mask = np.random.default_rng(seed).random((*x.shape[:-1], 1)) < 0.6
    mask[0] = False
    return mask, np.where(mask, x, np.nan)


@each_set
@pytest.mark.parametrize("shape", [(5, 6), (4, 8, 3, 6)])
@pytest.mark.parametrize("offset", [2.0, 1e4])
def test_against_numpy(over, num_groups, shape, offset):
    x = draw(shape, offset)
    state = kf.filter.observe(x, over, num_groups=num_groups)
    chex.assert_trees_all_close(
        tuple(state), reference.observe(x, over, num_groups), rtol=1e-4, atol=1e-5
    )


@each_set
def test_channels_at_another_axis(over, num_groups):
    x = draw()
    mask, x = hidden(x)
    state = kf.filter.observe(
        np.moveaxis(x, -1, 1),
        over,
        num_groups=num_groups,
        axis=1,
        mask=np.moveaxis(mask, -1, 1),
    )
    chex.assert_trees_all_close(
        state, kf.filter.observe(x, over, num_groups=num_groups, mask=mask), rtol=1e-5
    )


@each_set
def test_bfloat16_gives_float32_statistics(over, num_groups):
    x = jnp.asarray(draw(), jnp.bfloat16)
    state = kf.filter.observe(x, over, num_groups=num_groups)
    chex.assert_type([*state], jnp.float32)
    expected = reference.observe(np.asarray(x, np.float32), over, num_groups)
    chex.assert_trees_all_close(tuple(state), expected, rtol=1e-5)


@each_set
@pytest.mark.parametrize("offset", [2.0, 1e4])
def test_masked_values_do_not_count(over, num_groups, offset):
    mask, x = hidden(draw(offset=offset))
    state = kf.filter.observe(x, over, num_groups=num_groups, mask=mask)
    expected = reference.observe(x, over, num_groups, mask)
    assert over == "batch" or not expected[0][0].any()  # example 0 is an empty set
    chex.assert_trees_all_close(tuple(state), expected, rtol=1e-4, atol=1e-5)


@each_set
def test_an_empty_mask_gives_zeros(over, num_groups):
    x = np.full((2, 3, 3, 4), np.nan, np.float32)

    def loss(x):
        state = kf.filter.observe(
            x, over, num_groups=num_groups, mask=jnp.zeros((), bool)
        )
        return jnp.sum(state.mean) + jnp.sum(state.var), state

    for result in jax.tree.leaves(jax.jit(jax.grad(loss, has_aux=True))(x)):
        np.testing.assert_array_equal(result, np.zeros_like(result))


@each_set
def test_gradient_through_a_mask(over, num_groups):
    x = draw((2, 3, 4))
    mask = np.array([True, False, True])[:, None]  # the same positions of each example

    @jax.jit
    def loss(x, mask=None):
        mean, var = kf.filter.observe(x, over, num_groups=num_groups, mask=mask)
        return jnp.sum(jnp.sin(mean) * jnp.log(var))

    gradient = jax.jit(jax.grad(loss))
    grad = gradient(np.where(mask, x, np.nan), mask)
    visible = mask[:, 0]
    assert not grad[:, ~visible].any()
    chex.assert_trees_all_close(
        grad[:, visible], gradient(x[:, visible]), rtol=1e-4, atol=1e-6
    )
    check_grads(loss, (x,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2, eps=3e-3)


def over_vmap(fn, axis):
    def mapped(*args):
        shards = [np.stack(np.split(a, 4, axis)) for a in args]
        return jax.jit(jax.vmap(fn, axis_name="shards"))(*shards)

    return mapped


def over_shard_map(fn, axis):
    mesh = jax.make_mesh(
        (4,),
        ("shards",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:4],
    )
    spec = P(*[None] * axis, "shards")

    def per_device(*args):
        return jax.tree.map(lambda s: s[None], fn(*args))

    return jax.jit(
        jax.shard_map(
            per_device, mesh=mesh, in_specs=(spec, spec), out_specs=P("shards")
        )
    )


@each_set
@pytest.mark.parametrize("parallel", [over_vmap, over_shard_map])
@pytest.mark.parametrize("masked", [False, True])
def test_shared_over_an_axis(over, num_groups, parallel, masked):
    """Four shards of unequal counts see what one device sees of the whole.

    The batch is split by examples, where a set is one example by rows of the map.
    """
    axis = 0 if over == "batch" else 1
    x = draw()
    mask, x = hidden(x) if masked else (np.ones((*x.shape[:-1], 1), bool), x)

    def shared(x, mask):
        return kf.filter.observe(
            x,
            over,
            num_groups=num_groups,
            mask=mask if masked else None,
            axis_name="shards",
        )

    states = parallel(shared, axis)(x, mask)
    expected = reference.observe(x, over, num_groups, mask)
    for shard in range(4):
        state = jax.tree.map(lambda s, i=shard: s[i], tuple(states))
        chex.assert_trees_all_close(state, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "transform",
    [jax.remat, jax.vmap, lambda fn: lambda x: jax.lax.map(fn, x)],
    ids=["remat", "vmap", "scan"],
)
@each_set
def test_under_transformations(over, num_groups, transform):
    def fn(x):
        return kf.filter.observe(x, over, num_groups=num_groups)

    x = draw((3, 4, 5, 4))
    if transform is jax.remat:
        expected = reference.observe(x, over, num_groups)
    else:  # a micro-batch for each of 3 replicas
        states = [reference.observe(part, over, num_groups) for part in x]
        expected = tuple(np.stack(stats) for stats in zip(*states))
    chex.assert_trees_all_close(tuple(jax.jit(transform(fn))(x)), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"over": "pixel"}, "'pixel'; expected one of"),
        ({"over": "group", "num_groups": 4}, "num_groups is 4.* 6 channels"),
        ({"over": "group"}, "num_groups is None"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        kf.filter.observe(jnp.zeros((2, 3, 3, 6)), **arguments)
