"""What every normaliser refuses, and what it warns of; all of them, by name."""

import inspect
import warnings

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from kalman_flax import KalmanState, Signal
from kalman_flax.layers.normalizer import Filtered

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 3, 3, 4))
ATTRIBUTES = {
    name: {
        field: getattr(kf.normalization(name).norm(), field, None)
        for field in kf.normalization(name).norm().__dataclass_fields__
    }
    for name in kf.NORMALIZERS
}
#: those that need more than one value a channel to train on
OF_BATCH = [name for name, has in ATTRIBUTES.items() if "momentum" in has]
OF_BATCH.remove("frozen_batch")
each = pytest.mark.parametrize("name", kf.NORMALIZERS)


def make(name, **options):
    return kf.normalization(name, **options).norm


@pytest.mark.parametrize(
    "attribute, value",
    [
        ("epsilon", -1.0),
        ("epsilon", float("nan")),
        ("epsilon", "1e-5"),
        ("momentum", 2),
        ("momentum", float("nan")),
        ("use_bias", "no"),
        ("use_scale", None),
        ("param_dtype", jnp.int8),
        ("param_dtype", "float33"),
        ("dtype", "complex64"),
        ("use_running_average", "no"),
        ("num_groups", 2.0),
    ],
)
def test_attributes_that_mean_nothing_are_refused_at_construction(attribute, value):
    for name, has in ATTRIBUTES.items():
        if attribute in has and (name, attribute) != (
            "frozen_batch",
            "use_running_average",  # which it never reads
        ):
            with pytest.raises(ValueError, match=rf"\.{attribute} is .*; expected"):
                make(name)(**{attribute: value})


@pytest.mark.parametrize(
    "options",
    [
        {"decay_steps": float("nan")},
        {"decay_steps": float("inf")},
        {"decay_steps": 1.5},
        {"decay_steps": True},
        {"outlier_ratio": -1},
        {"outlier_ratio": float("nan")},
        {"gain": "0.5"},
        {"gain": True},
        {"rule": 1},
        {"force_float32_reductions": False},
    ],
    ids=str,
)
def test_options_of_the_filter(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        kf.KalmanNorm(**options)


@each
def test_complex_values_are_refused(name):
    norm = make(name)(use_running_average=False)
    with pytest.raises(ValueError, match=r"complex64.*imaginary"):
        norm.init(KEY, X + 1j)


@each
def test_an_axis_is_checked_and_may_be_a_tuple_of_one(name):
    if "axis" not in ATTRIBUTES[name]:
        return
    with pytest.raises(ValueError, match=r"axis is 7.*\(2, 3, 3, 4\)"):
        make(name)(use_running_average=False, axis=7).init(KEY, X)
    assert make(name)(axis=(-1,)).axis == -1
    with pytest.raises(ValueError, match="axis"):
        make(name)(axis=(0, 1))


@each
def test_an_empty_batch_is_for_inference_only(name):
    norm = make(name)()
    variables = norm.init(KEY, X, True)
    empty = X[:0]
    assert norm.apply(variables, empty, True).shape == empty.shape
    if name in OF_BATCH:
        with pytest.raises(ValueError, match=r"\(0, 3, 3, 4\) has no values"):
            norm.apply(variables, empty, False, mutable=["batch_stats"])


@each
def test_one_value_a_channel_warns_in_training(name):
    norm, x = make(name)(), X[:1, :1, :1]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        variables = norm.init(KEY, x, False)
        norm.apply(variables, x, True)
        norm.apply(variables, X, False, mutable=["batch_stats"])
        assert not [w for w in seen if "one value" in str(w.message)]
        norm.apply(variables, x, False, mutable=["batch_stats"])
    seen = [w for w in seen if "one value" in str(w.message)]
    assert len(seen) == (name in OF_BATCH)
    assert all(w.filename == __file__ for w in seen)


def test_one_value_is_enough_where_there_is_a_prediction():
    norm, x = kf.KalmanNorm(False), Signal(X[:1, :1, :1], KalmanState(0.0, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm.apply(norm.init(KEY, x), x, mutable=["batch_stats"])


@each
def test_the_second_step_takes_what_the_first_returns(name):
    """And keeps both out of a Signal, whose state is what is believed of its value."""
    norm = make(name)(use_running_average=True)
    signal = Signal(X, KalmanState(jnp.zeros(4), jnp.ones(4)))
    variables = norm.init(KEY, signal)
    filtered = norm.apply(variables, signal, method="filter")
    assert isinstance(filtered, Filtered)
    chex.assert_trees_all_equal(filtered.signal.value, X)
    for wrong in (signal, signal.replace(state=None), X):
        with pytest.raises(ValueError, match=r"normalize got .*norm\.filter\(x\)"):
            norm.apply(variables, wrong, method="normalize")
    y = norm.apply(variables, filtered, method="normalize")
    chex.assert_trees_all_equal(y, norm.apply(variables, signal))


def test_moments_of_another_normaliser_are_refused():
    filtered = kf.baselines.BatchNorm(True).filter(X)
    with pytest.raises(ValueError, match="without moments"):
        kf.KalmanNorm(True).init(KEY, filtered, method="normalize")


def test_what_is_filtered_goes_through_transformations():
    norm = kf.KalmanNorm(use_running_average=False)
    x = Signal(X, KalmanState(jnp.zeros(4), jnp.ones(4)))
    variables = norm.init(KEY, x)

    def first(value):
        x_ = x.replace(value=value)
        return norm.apply(variables, x_, method="filter", mutable=["batch_stats"])[0]

    one = first(X)
    many = jax.vmap(jax.checkpoint(first))(jnp.stack([X, X]))
    _, scanned = jax.lax.scan(lambda carry, x: (carry, first(x)), 0, jnp.stack([X, X]))
    for tree in (many, scanned):
        chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[1], tree), one)


def parameters(function):
    return [
        (p.name, p.kind, p.default)
        for p in inspect.signature(function).parameters.values()
    ]


@pytest.mark.parametrize(
    "norm", [kf.KalmanNorm, kf.baselines.BatchRenorm, kf.baselines.BatchNorm]
)
def test_arguments_are_those_of_flax(norm):
    """So that what was given to `nn.BatchNorm`, by name or position, still fits."""
    theirs = parameters(nn.BatchNorm)
    theirs = [p for p in theirs if p[0] not in ("parent", "name")]
    if norm is kf.baselines.BatchNorm:  # which says so
        theirs = [(n, k, d and n != "use_fast_variance") for n, k, d in theirs]
        assert [p[0] for p in parameters(norm)][: len(theirs)] == [t[0] for t in theirs]
    else:
        assert parameters(norm)[: len(theirs)] == theirs
    assert parameters(norm.__call__)[2:] == parameters(nn.BatchNorm.__call__)[2:]


@pytest.mark.parametrize("fast", [True, False])
def test_no_variance_is_fast(fast):
    norm = kf.KalmanNorm(False, momentum=0.0, use_fast_variance=fast)
    x = 1e4 + X
    _, written = norm.apply(norm.init(KEY, x), x, mutable=["batch_stats"])
    expected = np.float64(x).var((0, 1, 2))
    np.testing.assert_allclose(written["batch_stats"]["var"], expected, rtol=1e-3)


def test_groups_of_devices_share_statistics():
    options = {"axis_name": "d", "axis_index_groups": [[0, 1], [2, 3]]}
    ours, theirs = (
        cls(False, use_fast_variance=False, **options)
        for cls in (kf.KalmanNorm, nn.BatchNorm)
    )
    variables, x = theirs.init(KEY, X[0]), jnp.arange(4.0)[:, None, None, None] + X[0]

    def run(norm):
        apply = lambda x: norm.apply(variables, x, mutable=["batch_stats"])  # noqa: E731
        return jax.device_get(jax.pmap(apply, axis_name="d")(x))

    chex.assert_trees_all_close(run(ours), run(theirs), rtol=1e-5, atol=1e-5)
