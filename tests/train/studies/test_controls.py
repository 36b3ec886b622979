"""Each control takes away what it says, and nothing else. With gain 0 a normaliser
shows what it takes for the prediction."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from kalman_flax import KalmanState, Signal
from train.studies.controls import (
    NORMALIZERS,
    BorderlessConv,
    ConstantCorrectionKalmanNorm,
    ConstantKalmanNorm,
    ForgetfulConv,
    MovingKalmanNorm,
    OpeningKalmanNorm,
    ShuffledKalmanNorm,
)

KEY = jax.random.key(0)
FIXED = {"use_running_average": False, "gain": 0.0, "learn_gain": None}
X = 3 + 2 * jax.random.normal(jax.random.key(1), (2, 5, 5, 4))
STATE = KalmanState(jnp.arange(4.0), jnp.arange(1.0, 5.0))


def apply(module, x=X, state=STATE, variables=None):
    variables = variables or module.init(KEY, Signal(x, state))
    return module.apply(variables, Signal(x, state), mutable=["batch_stats"])[0]


def test_shuffled_takes_another_channels_prediction():
    mean, var = np.array([2.0, 3.0, 0.0, 1.0]), np.array([3.0, 4.0, 1.0, 2.0])
    y = apply(ShuffledKalmanNorm(**FIXED))
    np.testing.assert_allclose(y.value, (X - mean) / np.sqrt(var + 1e-5), rtol=1e-5)
    for state in (None, KalmanState(0.0, 1.0)):  # nothing to shuffle
        ours, theirs = (
            apply(norm(**FIXED), state=state)
            for norm in (ShuffledKalmanNorm, kf.KalmanNorm)
        )
        chex.assert_trees_all_equal(ours, theirs)


def test_a_gain_that_opens():
    """The observation alone in the first update, an equal share in the second."""
    norm = OpeningKalmanNorm(False, gain=0.1, calibrate="both", momentum=0.8)
    variables = norm.init(KEY, Signal(X, STATE))
    mean, var = np.mean(X, (0, 1, 2)), np.var(X, (0, 1, 2))
    for t, gain in enumerate((1.0, 0.5, 1 / 3)):
        weight = jnp.full(4, 1.0 - 0.8**t)
        stats = variables["batch_stats"] | {"weight": weight}
        given = {**variables, "batch_stats": stats}
        expected = kf.filter.update(STATE, KalmanState(mean, var), gain)
        y = apply(norm, variables=given).value
        normal = (X - expected.mean) / np.sqrt(expected.var + 1e-5)
        np.testing.assert_allclose(y, normal, rtol=1e-4, atol=1e-5)
    given["batch_stats"] = stats | {"weight": jnp.ones(4)}
    expected = apply(kf.KalmanNorm(False, gain=0.1, calibrate="both"), variables=given)
    chex.assert_trees_all_close(apply(norm, variables=given), expected, rtol=1e-5)


def test_a_correction_that_is_seeded_and_stays():
    norm = ConstantCorrectionKalmanNorm(False, gain=0.0, calibrate="both")
    variables = norm.init(KEY, Signal(X, STATE))
    stats = variables["batch_stats"] | {
        "mean": jnp.full(4, 5.0),
        "var": jnp.full(4, 9.0),
    }
    call = {"mutable": ["batch_stats"]}
    variables = kf.seed_calibration(
        norm.apply, {**variables, "batch_stats": stats}, Signal(X, STATE), **call
    )
    for _ in range(2):
        y, updates = norm.apply(variables, Signal(X, STATE), **call)
        np.testing.assert_allclose(y.value, (X - 5) / 3, rtol=1e-4)
        variables = {**variables, **updates}


def test_moving_averages_in_place_of_the_prediction():
    norm = MovingKalmanNorm(**FIXED)
    variables = norm.init(KEY, X)
    stats = {"mean": jnp.full(4, 5.0), "var": jnp.full(4, 9.0)}
    y = apply(norm, variables={**variables, "batch_stats": stats})
    np.testing.assert_allclose(y.value, (X - 5) / np.sqrt(9 + 1e-5), rtol=1e-5)


def test_constant_prediction_has_values_but_no_gradient():
    def loss(mean, norm):
        return jnp.sum(apply(norm(**FIXED), state=STATE._replace(mean=mean)).value)

    ours, theirs = (
        jax.value_and_grad(loss)(STATE.mean, norm)
        for norm in (ConstantKalmanNorm, kf.KalmanNorm)
    )
    np.testing.assert_allclose(ours[0], theirs[0])
    assert not np.any(ours[1]) and np.all(theirs[1])


@pytest.mark.parametrize("kernel_map", [None, kf.standardize_kernel])
def test_no_border(kernel_map):
    conv = BorderlessConv(3, (3, 3), use_bias=False, kernel_map=kernel_map)
    variables = conv.init(KEY, Signal(X))
    y = conv.apply(variables, Signal(X, STATE))
    kernel = variables["params"]["kernel"]
    kernel = np.float64(kernel if kernel_map is None else kernel_map(kernel))
    mean = np.einsum("c,hwcd->d", STATE.mean, kernel)
    var = np.einsum("c,hwcd->d", STATE.var, kernel**2)
    np.testing.assert_allclose(y.state.mean, mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(y.state.var, var, rtol=1e-4)
    plain = kf.Conv(3, (3, 3), use_bias=False, kernel_map=kernel_map)
    expected = plain.apply(variables, Signal(X, STATE))
    chex.assert_trees_all_equal(y.value, expected.value)
    assert not np.allclose(y.state.var, expected.state.var)  # which knows the border


def test_no_state_in_the_stream():
    seen = {}

    def note(call, args, kwargs, context):
        if context.method_name == "filter":
            seen["/".join(context.module.path)] = args[0].state is not None
        return call(*args, **kwargs)

    entry = NORMALIZERS["control_no_stream"]
    net = kf.models.ResNet(3, blocks_per_stage=1, width=4, **entry._asdict())
    with nn.intercept_methods(note):
        jax.eval_shape(lambda: net.init(KEY, jnp.zeros((1, 8, 8, 1)), False))
    known = {name for name, state in seen.items() if state}
    inside = {f"stage{stage}_block1/norm2" for stage in (1, 2, 3)}
    assert known == {"stem_norm", *inside}
    assert apply(ForgetfulConv(3, (3, 3), name="conv2")).state is None
