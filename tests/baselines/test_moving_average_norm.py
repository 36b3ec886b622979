"""Moving averages in both passes, against recursions in float64."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from kalman_flax import KalmanState, Signal, merge_running
from kalman_flax.baselines.moving_average_norm import MovingAverageBatchNorm
from kalman_flax.layers.linear import Conv, centre_kernel
from tests.train.common import tiny_config
from tests.train.tiny import OneStage
from train.data.batches import Split
from train.data.sets import Dataset
from train.engine.classification import Classification
from train.engine.mesh import make_key, make_mesh, take
from train.engine.step import create_state, jit_update, make_update

EPSILON = 1e-5
SHORT = {"window": 3, "warmup_steps": 5, "renorm_warmup_steps": 7, "momentum": 0.6}


def train_replicas(norm, variables, x, dy):
    """What the trainer does with replicas ``[R, N, ...]``, for the loss sum(y dy).

    Returns y, the gradients of x and of the parameters, and the next variables.
    """

    def loss(learned, x):
        def replica(x):
            return norm.apply(
                {"batch_stats": variables["batch_stats"]} | learned,
                x,
                use_running_average=False,
                mutable=["batch_stats"],
            )

        y, written = jax.vmap(replica)(x)
        return jnp.sum(y.astype(jnp.float32) * dy), (y, written["batch_stats"])

    learned = {name: variables[name] for name in ("params", "gradient_stats")}
    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    (grads, dx), (y, written) = gradient(learned, x)
    after = {
        "params": variables["params"],
        "batch_stats": merge_running(written, 0.9),
        "gradient_stats": jax.tree.map(lambda g: g / len(x), grads["gradient_stats"]),
    }
    return y, dx, grads["params"], after


def assert_train_step_moves_gradient_stats(norm, conv=Conv):
    """Two updates of a network by the trainer: finite, and every statistic moved."""
    config = tiny_config(batch_size=4)
    network = OneStage(10, blocks_per_stage=1, width=4, norm=norm, conv=conv)
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    mesh = make_mesh(replicas=2)
    split = take(mesh, Split(images, np.arange(4)), np.arange(4))
    images = Dataset(Split(images, np.arange(4)), None, 10)
    task = Classification(config, mesh, images, network, lambda x: x / 128.0 - 1.0)
    key = make_key(mesh, 1)
    state = create_state(task, optax.sgd, key, mesh)
    norms = {path[:-1] for path in traverse_util.flatten_dict(state.gradient_stats)}
    assert len(norms) == 3  # all that the network has
    before = jax.tree.map(np.array, state.gradient_stats)
    chex.assert_trees_all_equal(before, jax.tree.map(np.zeros_like, before))
    step = jit_update(make_update(task, optax.sgd, config, mesh))
    for _ in range(2):
        state, metrics = step(state, split, key, jnp.array([0.1]))
        after = jax.tree.map(np.array, state.gradient_stats)
        moved = jax.tree.map(lambda a, b: np.any(a != b), before, after)
        assert all(jax.tree.leaves(moved)), moved
        chex.assert_tree_all_finite((after, state.params, state.batch_stats, metrics))
        before = after


def reference(state, scale, bias, x, dy, options):
    """One device's step, from the paper's equations; `state` is not changed."""
    window = options["window"]
    step = int(state["step"]) + 1
    alone = step <= window or step < options["warmup_steps"]

    def move(history, new):
        history = history.copy()
        history[step % window] = new
        return history, new if alone else history.mean(0)

    squares, square = move(state["history"], (x**2).mean((0, 1, 2)))
    s = np.sqrt(square + EPSILON)
    r = np.ones_like(s)
    if step > max(options["renorm_warmup_steps"], options["warmup_steps"]):
        r = np.clip(s / np.sqrt(state["mean_square"] + EPSILON), 0.2, 5.0)
    z = x / s
    g = dy * scale * r
    projections, projection = move(state["projections"], (g * z).mean((0, 1, 2)))
    new = {
        "step": step,
        "history": squares,
        "projections": projections,
        "mean_square": options["momentum"] * state["mean_square"]
        + (1 - options["momentum"]) * square,
    }
    grads = {"scale": (dy * z * r).sum((0, 1, 2)), "bias": dy.sum((0, 1, 2))}
    return scale * r * z + bias, (g - z * projection) / s, grads, new, r


@pytest.mark.parametrize("replicas", [1, 2])
def test_values_and_gradients_are_those_of_the_recursion(replicas):
    """Through both warm-ups, and with r in and at its limits."""
    norm = MovingAverageBatchNorm(**SHORT)
    rng = np.random.default_rng(0)
    variables = norm.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), False)
    scale, bias = np.array([0.5, 1.0, 2.0]), np.array([0.1, 0.0, -0.3])
    variables["params"] = {
        "scale": jnp.asarray(scale, jnp.float32),
        "bias": jnp.asarray(bias, jnp.float32),
    }
    state = {
        "step": 0,
        "mean_square": np.ones(3),
        "history": np.zeros((3, 3)),
        "projections": np.zeros((3, 3)),
    }
    train = jax.jit(functools.partial(train_replicas, norm))
    renorms = []
    for loudness in (1, 2, 0.5, 1, 1, 3, 1, 1, 1, 0.01, 0.01, 0.01, 30, 1):
        x = loudness * rng.normal(0.3, 1, (replicas, 2, 4, 4, 3)).astype(np.float32)
        dy = rng.normal(0.5, 1, x.shape).astype(np.float32) + x / loudness
        y, dx, grads, variables = train(variables, x, dy)
        results = [
            reference(state, scale, bias, *(np.float64(v) for v in pair), SHORT)
            for pair in zip(x, dy)
        ]
        for index, (ref_y, ref_dx, *_) in enumerate(results):
            np.testing.assert_allclose(y[index], ref_y, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(
                dx[index], ref_dx, rtol=1e-4, atol=1e-4 * np.abs(ref_dx).max()
            )
        for name in ("scale", "bias"):
            expected = sum(ref_grads[name] for *_, ref_grads, _, _ in results)
            np.testing.assert_allclose(grads[name], expected, rtol=1e-3, atol=1e-3)
        proposals = [new for *_, new, _ in results]
        state = {k: sum(p[k] for p in proposals) / replicas for k in state}
        stats = variables["batch_stats"]
        for name, written in (
            ("step", stats["step"]),
            ("mean_square", stats["mean_square"]),
            ("history", stats["history"]),
            ("projections", variables["gradient_stats"]["history"]),
        ):
            np.testing.assert_allclose(written, state[name], rtol=1e-4, atol=1e-5)
        renorms.append(results[0][-1])
    renorms = np.stack(renorms)
    assert np.all(renorms[:7] == 1) and np.all(renorms[7] != 1)
    assert renorms.min() == 0.2 and renorms.max() == 5.0

    x = rng.normal(2, 1, (2, 4, 4, 3))
    expected = scale * x / np.sqrt(state["mean_square"] + EPSILON) + bias
    y = norm.apply(variables, jnp.asarray(x, jnp.float32), True)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_gradient_is_exact_while_the_micro_batch_is_alone():
    norm = MovingAverageBatchNorm(False)
    x = jax.random.normal(jax.random.key(1), (2, 2, 2, 3))
    variables = norm.init(jax.random.key(0), x)

    def plain(x):
        return x / jnp.sqrt(jnp.mean(x**2, (0, 1, 2)) + EPSILON)

    def ours(x):
        return norm.apply(variables, x, mutable=["batch_stats"])[0]

    expected, pull = jax.vjp(plain, x)
    y, pull_ours = jax.vjp(jax.jit(ours), x)
    dy = jax.random.normal(jax.random.key(2), x.shape)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(pull_ours(dy)[0], pull(dy)[0], rtol=1e-4, atol=1e-5)


def test_shared_over_an_axis_it_is_one_micro_batch():
    """axis_name over replicas gives what all their images give at once."""
    x, dy = jax.random.normal(jax.random.key(1), (2, 3, 2, 2, 2, 5))
    whole = MovingAverageBatchNorm(**SHORT)
    shared = MovingAverageBatchNorm(**SHORT, axis_name="replicas")
    variables = shared.init(jax.random.key(0), x[0], False)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0, 0), axis_name="replicas")
    def replica(variables, x, dy):
        def loss(learned, x):
            y, written = shared.apply(
                {"batch_stats": variables["batch_stats"]} | learned,
                x,
                use_running_average=False,
                mutable=["batch_stats"],
            )
            return jnp.sum(y * dy), (y, written["batch_stats"])

        learned = {name: variables[name] for name in ("params", "gradient_stats")}
        (grads, dx), (y, written) = jax.grad(loss, (0, 1), has_aux=True)(learned, x)
        return y, dx, grads["params"], written, grads["gradient_stats"]

    train = jax.jit(functools.partial(train_replicas, whole))
    for _ in range(8):
        *results, grads, written, proposals = replica(variables, x, dy)
        results = [r.reshape(1, 6, 2, 2, 5) for r in results]
        *expected, expected_grads, variables = train(
            variables, *(v.reshape(1, 6, 2, 2, 5) for v in (x, dy))
        )
        chex.assert_trees_all_close(results, expected, rtol=1e-4, atol=1e-5)
        grads = jax.tree.map(lambda g: g.sum(0), grads)
        chex.assert_trees_all_close(grads, expected_grads, rtol=1e-4, atol=1e-4)
        for each in range(3):
            chex.assert_trees_all_close(
                jax.tree.map(lambda v, i=each: v[i], (written, proposals)),
                (variables["batch_stats"], variables["gradient_stats"]),
                rtol=1e-4,
                atol=1e-5,
            )


def test_replicas_of_a_mesh_propose_as_those_of_vmap_do():
    norm = MovingAverageBatchNorm(False, **SHORT)
    assert_mesh_equals_vmap(norm)


def assert_mesh_equals_vmap(norm):
    """Gradients under shard_map, statistics included, are those of the vmap."""
    x, dy = jax.random.normal(jax.random.key(1), (2, 4, 2, 2, 3))
    variables = norm.init(jax.random.key(0), x)
    stats = {"batch_stats": variables.pop("batch_stats")}

    def gradient(learned, x, dy):
        def loss(learned):
            y, _ = norm.apply(stats | learned, x, mutable=["batch_stats"])
            return jnp.sum(y * dy)

        return jax.grad(loss)(learned)

    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), auto, devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec
    sharded = jax.shard_map(
        gradient,
        mesh=mesh,
        in_specs=(spec(), spec("data"), spec("data")),
        out_specs=spec(),
    )
    split = x.reshape(2, 2, 2, 2, 3), dy.reshape(2, 2, 2, 2, 3)
    expected = jax.jit(jax.vmap(gradient, (None, 0, 0)))(variables, *split)
    expected = jax.tree.map(lambda g: g.sum(0), expected)
    actual = jax.jit(sharded)(variables, x, dy)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(actual["gradient_stats"]))


DEGENERATE = {
    "zero": np.zeros((2, 3, 3, 2)),
    "constant": np.full((2, 3, 3, 2), 1e4),
    "one value": np.arange(2.0).reshape(1, 1, 1, 2),
    "large": 1e4 + np.arange(36.0).reshape(2, 3, 3, 2),
    "tiny, no map": 1e-6 * np.arange(4.0).reshape(2, 2),
}
#: One of each shape is quick, and one of each dtype.
QUICK = (
    ("zero", "bfloat16"), ("one value", "float32"), ("tiny, no map", "float32")
)  # fmt: skip
each_degenerate = pytest.mark.parametrize(
    "case, dtype",
    [
        pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow)
        for each in itertools.product(DEGENERATE, ("float32", "bfloat16"))
    ],
)


@each_degenerate
def test_degenerate_inputs_stay_finite(case, dtype):
    norm = MovingAverageBatchNorm(dtype=jnp.dtype(dtype), **SHORT)
    assert_finite(norm, DEGENERATE[case])


def assert_finite(norm, x):
    """Values, gradients and statistics over several steps of two replicas."""
    x = jnp.asarray(x, norm.dtype)
    variables = norm.init(jax.random.key(0), x, False)
    train = jax.jit(functools.partial(train_replicas, norm))
    dy = jax.random.normal(jax.random.key(1), (2, *x.shape))
    for _ in range(10):
        y, dx, grads, variables = train(variables, jnp.stack([x, 2 * x]), dy)
        assert y.dtype == dx.dtype == norm.dtype
        for leaf in jax.tree.leaves((grads, variables)):
            assert leaf.dtype == jnp.float32
        chex.assert_tree_all_finite((y, dx, grads, variables))


def test_signal_contract_axis_and_missing_gradient_stats():
    assert_contract(MovingAverageBatchNorm)


def assert_contract(cls):
    """Signal for a Signal, any channel axis; `gradient_stats` may be left out."""
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    norm = cls(False)
    variables = norm.init(jax.random.key(0), x)
    assert set(variables) == {"params", "batch_stats", "gradient_stats"}
    initial = cls(True).init(jax.random.key(0), x)
    chex.assert_trees_all_equal(variables, initial)  # init moves nothing

    y, written = norm.apply(variables, x, mutable=["batch_stats"])
    signal, _ = norm.apply(
        variables, Signal(x, KalmanState(0.0, 1.0)), mutable=["batch_stats"]
    )
    assert isinstance(signal, Signal) and signal.state is None
    chex.assert_trees_all_equal(signal.value, y)

    transposed, _ = cls(False, axis=1).apply(
        variables, jnp.moveaxis(x, -1, 1), mutable=["batch_stats"]
    )
    chex.assert_trees_all_close(jnp.moveaxis(transposed, 1, -1), y, rtol=1e-5)

    del variables["gradient_stats"]
    without = norm.apply(variables, x, mutable=["batch_stats"])
    chex.assert_trees_all_equal(without, (y, written))
    bare = cls(False, use_scale=False, use_bias=False)
    assert "params" not in bare.init(jax.random.key(0), x)


def test_trainer_moves_the_statistics_of_the_backward_pass():
    assert_train_step_moves_gradient_stats(
        MovingAverageBatchNorm, functools.partial(Conv, kernel_map=centre_kernel)
    )


@pytest.mark.parametrize("options", [{"window": 0}, {"max_renorm": 0.5}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        MovingAverageBatchNorm(**options)
