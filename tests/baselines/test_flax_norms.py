"""The rivals are Flax's own, under the contract of Signals."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from kalman_flax import KalmanState, Signal

KEY = jax.random.key(0)
HALF = {"dtype": jnp.bfloat16}
BARE = {"use_scale": False, "use_bias": False}
CASES = {
    "batch": (kf.BatchNorm, nn.BatchNorm, {"use_running_average": False}),
    "inference": (kf.BatchNorm, nn.BatchNorm, {"use_running_average": True}),
    "bare": (kf.BatchNorm, nn.BatchNorm, {"use_running_average": False} | BARE),
    "batch half": (kf.BatchNorm, nn.BatchNorm, {"use_running_average": False} | HALF),
    "group": (kf.GroupNorm, nn.GroupNorm, {"num_groups": 2}),
    "size": (kf.GroupNorm, nn.GroupNorm, {"num_groups": None, "group_size": 3}),
    "group half": (kf.GroupNorm, nn.GroupNorm, {"num_groups": 3} | HALF),
}


@pytest.fixture
def x():
    return 1 + 2 * jax.random.normal(jax.random.key(1), (3, 4, 4, 6))


def randomized(variables):
    return jax.tree.map(lambda v: v + jnp.linspace(0.0, 1.0, v.size), variables)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_values_and_variables_are_those_of_flax(case, masked, x):
    ours, theirs, options = CASES[case]
    ours, theirs = ours(**options), theirs(**options, use_fast_variance=False)
    # `nn.GroupNorm` wants masks with all channels.
    mask = jnp.arange(16).reshape(1, 4, 4, 1) % 3 > 0
    mask = jnp.broadcast_to(mask, x.shape) if masked else None
    variables = theirs.init(KEY, x)
    chex.assert_trees_all_equal(ours.init(KEY, Signal(x)), variables)
    variables = randomized(variables)
    expected = theirs.apply(variables, x, mask=mask, mutable=["batch_stats"])
    for wrap in (lambda x: x, lambda x: Signal(x, KalmanState(0.0, 1.0))):
        y, updates = ours.apply(variables, wrap(x), mask=mask, mutable=["batch_stats"])
        assert isinstance(y, type(wrap(x)))
        value = y.value if isinstance(y, Signal) else y
        chex.assert_trees_all_equal((value, updates), expected)


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_hands_on_the_moments_of_its_output(affine, axis, x):
    norm = kf.BatchNorm(False, axis=axis, use_scale=affine, use_bias=affine)
    x = jnp.moveaxis(x, -1, axis)
    variables = randomized(norm.init(KEY, x))
    y, _ = norm.apply(variables, Signal(x), mutable=["batch_stats"])
    flat = np.moveaxis(y.value, axis, -1).reshape(-1, 6)
    np.testing.assert_allclose(y.state.mean, flat.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(y.state.var, flat.var(0), rtol=1e-4)


def test_group_norm_ends_the_state_and_ignores_the_mode(x):
    signal = Signal(x, KalmanState(0.0, 1.0))
    outputs = []
    for mode in (True, False, None):
        norm = kf.GroupNorm(num_groups=2, use_running_average=mode)
        variables = norm.init(KEY, signal)
        assert set(variables) == {"params"}
        outputs.append(norm.apply(variables, signal))
        assert outputs[-1].state is None
    chex.assert_trees_all_equal(*outputs)


@pytest.mark.parametrize("case", ["batch", "group"])
def test_filter_then_normalize_is_the_call(case, x):
    cls, _, options = CASES[case]

    class TwoSteps(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = cls(**options, name="norm")
            stream = norm.filter(x)
            return norm.normalize(stream), stream

    class OneStep(nn.Module):
        @nn.compact
        def __call__(self, x):
            return cls(**options, name="norm")(x)

    signal = Signal(x, KalmanState(0.5, 2.0))
    variables = OneStep().init(KEY, signal)
    (y, stream), updates = TwoSteps().apply(variables, signal, mutable=["batch_stats"])
    expected = OneStep().apply(variables, signal, mutable=["batch_stats"])
    chex.assert_trees_all_equal((y, updates), expected)
    chex.assert_trees_all_equal(stream, signal)


@pytest.mark.parametrize("norm", [
    kf.BatchNorm(False), kf.GroupNorm(num_groups=6),
], ids=["batch", "group"])  # fmt: skip
def test_variance_at_a_large_offset(norm, x):
    y, _ = norm.init_with_output(KEY, 1e4 + x)
    axes = (0, 1, 2) if isinstance(norm, kf.BatchNorm) else (1, 2)
    np.testing.assert_allclose(np.std(y, axis=axes), 1.0, rtol=1e-2)
