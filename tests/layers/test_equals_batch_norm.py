"""Where the filter has nothing to add, KalmanNorm is `nn.BatchNorm`."""

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from kalman_flax import KalmanState, Signal

KEY = jax.random.key(0)
# The three ways to have no use for a prediction: how x comes, and the attributes.
WAYS = {
    "gain 1": (
        lambda x: Signal(x, KalmanState(jnp.full(6, 1.5), jnp.full(6, 3.0))),
        {"gain": 1.0, "learn_gain": None},
    ),
    "unknown state": (Signal, {"noise": "additive", "outlier_ratio": 100.0}),
    "plain array": (lambda x: x, {"learn_gain": "channel", "propagate": "raw"}),
}
OPTIONS = {
    "default": {},
    "axis": {"axis": 1},
    "no scale": {"use_scale": False},
    "no bias": {"use_bias": False},
    "numbers": {"momentum": 0.5, "epsilon": 0.1},
    "inits": {"scale_init": nn.initializers.constant(2.0),
              "bias_init": nn.initializers.constant(-1.0)},
    "half parameters": {"param_dtype": jnp.bfloat16},
    "half output": {"dtype": jnp.bfloat16},
}  # fmt: skip


@pytest.fixture
def x():
    x = jax.random.normal(jax.random.key(1), (3, 4, 5, 6))
    return 2 * x + jax.random.normal(jax.random.key(2), (6,))


def pair(way, x, use_running_average, **options):
    """Both modules, ours as a function of arrays, with the same randomised variables.

    Variables are those of `nn.BatchNorm`, and for ours with gain and noise besides.
    """
    wrap, attributes = WAYS[way]
    options = options | {"use_running_average": use_running_average}
    theirs = nn.BatchNorm(**options, use_fast_variance=False)
    ours = kf.KalmanNorm(**options, **attributes)
    variables = theirs.init(KEY, x)
    own = ours.init(KEY, wrap(x))
    extra = set(own["params"]) - set(variables.get("params", {}))
    assert extra <= {"gain", "noise"}
    chex.assert_trees_all_equal_shapes_and_dtypes(
        own["batch_stats"], variables["batch_stats"]
    )
    variables = jax.tree.map(
        lambda v: v + jnp.linspace(0, 1, 6, dtype=v.dtype)[: v.size], variables
    )
    params = variables.get("params", {}) | {name: own["params"][name] for name in extra}

    def run(x, **kwargs):
        out = ours.apply({**variables, "params": params}, wrap(x), **kwargs)
        y, *updates = out if "mutable" in kwargs else (out,)
        y = y.value if isinstance(y, Signal) else y
        return (y, *updates) if updates else y

    return run, lambda x, **kwargs: theirs.apply(variables, x, **kwargs)


def close(actual, expected):
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    half = any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(expected))
    tolerance = 0.02 if half else 2e-5
    chex.assert_trees_all_close(
        *(jax.tree.map(np.float32, t) for t in (actual, expected)),
        rtol=tolerance, atol=tolerance,
    )  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_training(way, options, x):
    x = jnp.moveaxis(x, -1, options.get("axis", -1))
    ours, theirs = pair(way, x, False, **options)
    close(ours(x, mutable=["batch_stats"]), theirs(x, mutable=["batch_stats"]))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_inference(way, options, x):
    x = jnp.moveaxis(x, -1, options.get("axis", -1))
    ours, theirs = pair(way, x, True, **options)
    close(ours(x), theirs(x))


@pytest.mark.parametrize("way", WAYS)
def test_mask(way, x):
    mask = jnp.arange(3 * 4 * 5).reshape(3, 4, 5, 1) % 3 > 0
    x = jnp.where(mask, x, jnp.nan)  # what does not count may hold anything
    ours, theirs = (
        run(x, mask=mask, mutable=["batch_stats"]) for run in pair(way, x, False)
    )
    chex.assert_tree_all_finite(ours)  # where theirs is NaN
    close(*((jnp.where(mask, y, 0.0), updates) for y, updates in (ours, theirs)))


def test_mask_of_nothing_gives_finite_output(x):
    mask = jnp.zeros((3, 1, 1, 1), bool)
    y, updates = pair("gain 1", x, False)[0](x, mask=mask, mutable=["batch_stats"])
    chex.assert_tree_all_finite((y, updates))


@pytest.mark.parametrize("way", WAYS)
def test_gradients(way, x):
    weights = jax.random.normal(KEY, x.shape)
    wrap, attributes = WAYS[way]
    ours = kf.KalmanNorm(use_running_average=False, **attributes)
    theirs = nn.BatchNorm(use_running_average=False, use_fast_variance=False)
    own = ours.init(KEY, wrap(x))["params"]

    def gradients(module, wrap, params):
        def loss(params, x):
            variables = {**theirs.init(KEY, x), "params": params}
            y, _ = module.apply(variables, wrap(x), mutable=["batch_stats"])
            return jnp.sum(weights * (y.value if isinstance(y, Signal) else y) ** 2)

        return jax.grad(loss, argnums=(0, 1))(params, x)

    params = {"scale": jnp.linspace(0.5, 2, 6), "bias": jnp.linspace(-1, 1, 6)}
    of_params, of_x = gradients(ours, wrap, own | params)
    for name in set(own) - set(params):  # gain and noise have no say
        np.testing.assert_array_equal(of_params.pop(name), jnp.zeros_like(own[name]))
    expected = gradients(theirs, lambda x: x, params)
    chex.assert_trees_all_close((of_params, of_x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("of_input", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_dtypes(dtype, of_input, x):
    ours, theirs = (
        run(x.astype(of_input), mutable=["batch_stats"])
        for run in pair("gain 1", x, False, dtype=dtype)
    )
    close(ours, theirs)
    chex.assert_type(jax.tree.leaves(ours[1]), jnp.float32)


@pytest.mark.parametrize(
    "dtype, spread", [("float32", 1.0), ("float16", 50.0), ("bfloat16", 300.0)]
)
def test_variance_at_a_large_offset(dtype, spread, x):
    """Where Flax's own fast variance is 0."""
    x = (1e4 + spread * x).astype(dtype)
    ours, theirs = pair("gain 1", x, False, momentum=0.0)
    (y, updates), expected = (
        ours(x, mutable=["batch_stats"]),
        theirs(x, mutable=["batch_stats"]),
    )
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(
        updates["batch_stats"]["var"], exact.var((0, 1, 2)), rtol=1e-3
    )
    np.testing.assert_allclose(y, expected[0], rtol=1e-2, atol=1e-2)


NORMS = {"KalmanNorm": kf.KalmanNorm, "BatchNorm": kf.baselines.BatchNorm}


@pytest.mark.parametrize("cls", NORMS.values(), ids=NORMS)
def test_initialisation_does_not_move_the_running_statistics(cls, x):
    # Nor does it need the mapped axis.
    norm = cls(use_running_average=False, axis_name="devices")
    stats = norm.init(KEY, Signal(x, KalmanState(0.0, 1.0)))["batch_stats"]
    np.testing.assert_array_equal(stats["mean"], np.zeros(6))
    np.testing.assert_array_equal(stats["var"], np.ones(6))


@pytest.mark.parametrize("cls", NORMS.values(), ids=NORMS)
def test_training_without_mutable_is_an_error_of_flax(cls, x):
    signal = Signal(x, KalmanState(0.0, 1.0))
    variables = cls(use_running_average=False).init(KEY, signal)
    with pytest.raises(flax.errors.ModifyScopeVariableError, match="batch_stats"):
        cls(use_running_average=False).apply(variables, signal)
    cls(use_running_average=True).apply(variables, signal)  # inference needs none


@pytest.mark.parametrize("cls", NORMS.values(), ids=NORMS)
def test_mode_is_an_attribute_or_an_argument_but_not_both(cls, x):
    variables = cls(use_running_average=True).init(KEY, x)
    attribute = cls(use_running_average=True).apply(variables, x)
    np.testing.assert_array_equal(cls().apply(variables, x, True), attribute)
    with pytest.raises(ValueError, match="use_running_average"):
        cls().apply(variables, x)
    with pytest.raises(ValueError, match="use_running_average"):
        cls(use_running_average=True).apply(variables, x, True)
