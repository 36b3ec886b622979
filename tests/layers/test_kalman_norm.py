"""What the filter adds: gain, noise, rules, the state handed on, running statistics."""

import warnings

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from kalman_flax import KalmanState, Signal

KEY = jax.random.key(0)
EPSILON = 1e-5
STATE = KalmanState(jnp.array([-1.0, 0.5, 2.0]), jnp.array([0.5, 1.0, 4.0]))
TRAIN = {"use_running_average": False}


@pytest.fixture
def x():
    centre = jnp.array([0.0, 1.0, 3.0])
    return Signal(centre + jax.random.normal(KEY, (2, 4, 4, 3)), STATE)


def observed(x):
    flat = np.asarray(x.value, np.float64).reshape(-1, 3)
    return flat.mean(0), flat.var(0)


def filtered(x, q, rule="mixture", add=0.0, times=1.0):
    """Eq. 6 and 7 in float64, with process noise R."""
    mean, var = observed(x)
    pred_mean = np.asarray(x.state.mean, np.float64)
    pred_var = np.asarray(x.state.var, np.float64) * times + add
    between = q * (1 - q) * (mean - pred_mean) ** 2 if rule == "mixture" else 0.0
    return (1 - q) * pred_mean + q * mean, (1 - q) * pred_var + q * var + between


def apply(norm, x, variables=None, **kwargs):
    """Output and updated batch_stats."""
    variables = norm.init(KEY, x) if variables is None else variables
    y, updates = norm.apply(variables, x, mutable=["batch_stats"], **kwargs)
    return y, updates["batch_stats"]


def assert_state(actual, mean, var):
    np.testing.assert_allclose(actual.mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(actual.var, var, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["mixture", "paper"])
@pytest.mark.parametrize("gain", [0.0, 0.3, 1.0])
def test_normalises_by_the_filtered_moments(gain, rule, x):
    norm = kf.KalmanNorm(**TRAIN, gain=gain, learn_gain=None, rule=rule)
    mean, var = filtered(x, gain, rule)
    state = apply(norm, x, method="filter")[0].moments
    assert_state(state, mean, var)
    expected = (np.asarray(x.value) - mean) / np.sqrt(var + EPSILON)
    np.testing.assert_allclose(apply(norm, x)[0].value, expected, rtol=1e-4, atol=1e-4)


def test_running_statistics_average_the_filtered_moments(x):
    norm = kf.KalmanNorm(**TRAIN, gain=0.3, learn_gain=None, momentum=0.75)
    variables = norm.init(KEY, x)
    mean, var = np.zeros(3), np.ones(3)
    for step in range(3):
        x = x.replace(value=x.value * (1 + step))
        variables = {**variables, "batch_stats": apply(norm, x, variables)[1]}
        new_mean, new_var = filtered(x, 0.3)
        mean, var = 0.75 * mean + 0.25 * new_mean, 0.75 * var + 0.25 * new_var
    assert_state(KalmanState(**variables["batch_stats"]), mean, var)


@pytest.mark.parametrize("learn_gain, shape", [("scalar", ()), ("channel", (3,))])
@pytest.mark.parametrize("gain", [0.1, 0.8])
def test_gain_is_learned_as_a_logit(gain, learn_gain, shape, x):
    norm = kf.KalmanNorm(**TRAIN, gain=gain, learn_gain=learn_gain)
    variables = norm.init(KEY, x)
    logit = variables["params"]["gain"]
    chex.assert_shape(logit, shape)
    np.testing.assert_allclose(jax.nn.sigmoid(logit), np.full(shape, gain), rtol=1e-6)
    assert_state(
        apply(norm, x, variables, method="filter")[0].moments, *filtered(x, gain)
    )

    def loss(params):
        variables_ = {**variables, "params": params}
        return jnp.sum(jnp.sin(apply(norm, x, variables_)[0].value))

    assert jnp.all(jax.grad(loss)(variables["params"])["gain"] != 0)


def test_gain_of_each_channel_weighs_its_own(x):
    norm = kf.KalmanNorm(**TRAIN, learn_gain="channel")
    variables = norm.init(KEY, x)
    gain = np.array([0.2, 0.5, 0.9])
    variables["params"]["gain"] = jnp.log(gain / (1 - gain))
    state = apply(norm, x, variables, method="filter")[0].moments
    assert_state(state, *filtered(x, gain))


def test_gain_that_falls(x):
    """0.5 (1 + cos(pi t / T)) of the gain at step t, 0 from T on; inference and its
    statistics do not count."""
    norm = kf.KalmanNorm(gain=0.4, decay_steps=3)
    variables = norm.init(KEY, x, use_running_average=False)
    assert variables["batch_stats"]["steps"] == 0.0
    for share in (1.0, 0.75, 0.25, 0.0, 0.0):
        norm.apply(variables, x, use_running_average=True)
        y, stats = apply(norm, x, variables, **TRAIN, method="filter")
        assert_state(y.moments, *filtered(x, 0.4 * share))
        variables = variables | {"batch_stats": stats}


def test_default_has_the_parameters_of_batch_norm_and_a_fixed_gain(x):
    norm = kf.KalmanNorm(**TRAIN)
    assert set(norm.init(KEY, x)["params"]) == {"scale", "bias"}
    state = apply(norm, x, method="filter")[0].moments
    assert_state(state, *filtered(x, 0.02))


@pytest.mark.parametrize(
    "noise, at_init, after, at_three",
    [
        ("additive", {"add": 0.01}, np.log1p(np.exp(3.0)), "add"),
        ("multiplicative", {"times": 1.0}, np.exp(3.0), "times"),
    ],
)
def test_process_noise(noise, at_init, after, at_three, x):
    norm = kf.KalmanNorm(**TRAIN, gain=0.3, learn_gain=None, noise=noise)
    variables = norm.init(KEY, x)
    chex.assert_shape(variables["params"]["noise"], (3,))

    def state(variables):
        return apply(norm, x, variables, method="filter")[0].moments

    assert_state(state(variables), *filtered(x, 0.3, **at_init))
    variables["params"]["noise"] = jnp.array([3.0, 3.0, 3.0])
    assert_state(state(variables), *filtered(x, 0.3, **{at_three: after}))
    grad = jax.grad(lambda p: jnp.sum(state({**variables, "params": p}).var))
    assert jnp.all(grad(variables["params"])["noise"] != 0)


@pytest.mark.parametrize("use_scale, use_bias", [(True, True), (False, False)])
@pytest.mark.parametrize("train", [True, False])
def test_state_handed_on(train, use_scale, use_bias, x):
    scale, bias = np.array([0.5, 1.0, 2.0]), np.array([-1.0, 0.0, 3.0])

    def run(propagate):
        norm = kf.KalmanNorm(
            not train, propagate=propagate, use_scale=use_scale, use_bias=use_bias,
            gain=0.3,
        )  # fmt: skip
        params = {"scale": scale} if use_scale else {}
        params |= {"bias": bias} if use_bias else {}
        stats = {"mean": jnp.arange(3.0), "var": jnp.arange(3.0) + 0.5}
        return apply(norm, x, {"params": params, "batch_stats": stats})[0].state

    mean, var = filtered(x, 0.3) if train else (np.arange(3.0), np.arange(3.0) + 0.5)
    assert_state(run("raw"), mean, var)
    gamma, beta = scale if use_scale else np.ones(3), bias if use_bias else np.zeros(3)
    assert_state(run("normalized"), beta, gamma**2)


def test_state_handed_on_is_the_same_for_all_replicas(x):
    """So that `jax.vmap` over them predicts it onwards once, and not for each."""
    norm = kf.KalmanNorm(**TRAIN)
    variables = norm.init(jax.random.key(0), x)

    def state(value):
        return apply(norm, x.replace(value=value), variables)[0].state

    values = jnp.stack([x.value, 2.0 * x.value])
    assert_state(jax.vmap(state, out_axes=None)(values), np.zeros(3), np.ones(3))


def test_outliers_are_rejected_for_all_channels_together(x):
    norm = kf.KalmanNorm(**TRAIN, learn_gain=None, gain=0.3, outlier_ratio=100.0)

    def state(ratio):
        x_ = x.replace(state=KalmanState(STATE.mean, ratio * observed(x)[1]))
        return x_, apply(norm, x_, method="filter")[0].moments

    x_, kept = state(np.array([290.0, 5.0, 0.1]))  # on average below 100
    assert_state(kept, *filtered(x_, 0.3))
    _, rejected = state(np.array([310.0, 5.0, 0.1]))  # and above
    assert_state(rejected, *observed(x))


class TwoSteps(nn.Module):
    """What a pre-activation network does with a normaliser."""

    train: bool

    @nn.compact
    def __call__(self, x):
        norm = kf.KalmanNorm(not self.train, noise="additive", name="norm")
        filtered = norm.filter(x)
        return norm.normalize(filtered), filtered.signal


class OneStep(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        return kf.KalmanNorm(not self.train, noise="additive", name="norm")(x)


@pytest.mark.parametrize("train", [True, False])
def test_filter_then_normalize_is_the_call(train, x):
    variables = OneStep(train).init(KEY, x)
    chex.assert_trees_all_equal(TwoSteps(train).init(KEY, x), variables)
    (y, stream), stats = apply(TwoSteps(train), x, variables)
    expected, expected_stats = apply(OneStep(train), x, variables)
    chex.assert_trees_all_equal((y, stats), (expected, expected_stats))
    np.testing.assert_array_equal(stream.value, x.value)


def test_filtered_state_in_inference_is_the_running_statistics(x):
    norm = kf.KalmanNorm(use_running_average=True)
    stats = {"mean": jnp.arange(3.0), "var": jnp.arange(3.0) + 1}
    variables = {**norm.init(KEY, x), "batch_stats": stats}
    state = norm.apply(variables, x, method="filter").moments
    assert_state(state, stats["mean"], stats["var"])


def test_prediction_matters_only_in_training(x):
    variables = kf.KalmanNorm(**TRAIN).init(KEY, x)
    other = x.replace(state=KalmanState(5.0, 2.0))

    def difference(norm):
        a, b = (apply(norm, s, variables)[0].value for s in (x, other))
        return jnp.abs(a - b).max()

    assert difference(kf.KalmanNorm(**TRAIN)) > 0.1
    assert difference(kf.KalmanNorm(use_running_average=True)) == 0


@pytest.mark.parametrize("preset, params", [
    (kf.LiteralPaperKalmanNorm, {"scale", "bias", "gain", "noise"}),
    (kf.PaperKalmanNorm, {"scale", "bias", "gain", "noise"}),
    (kf.ReleasedKalmanNorm, {"scale", "bias"}),
], ids=["literal", "paper", "released"])  # fmt: skip
def test_presets(preset, params, x):
    norm = preset(**TRAIN)
    assert set(norm.init(KEY, x)["params"]) == params
    rule, add = ("mixture", 0) if preset is kf.ReleasedKalmanNorm else ("paper", 0.01)
    moments = norm.apply(norm.init(KEY, x), x, mutable=True, method="filter")[0].moments
    assert_state(moments, *filtered(x, 0.1, rule, add=add))
    handed_on = apply(norm, x)[0].state
    raw = preset is not kf.PaperKalmanNorm
    chex.assert_trees_all_close(
        handed_on, moments if raw else KalmanState(jnp.zeros(3), jnp.ones(3))
    )


@pytest.mark.parametrize("factor, warns", [(50.0, 0), (1e-3, 1), (500.0, 1)])
def test_literal_reading_warns_where_it_is_unstable(factor, warns):
    """Under jit and a gradient, of every micro-batch."""
    norm = kf.LiteralPaperKalmanNorm(use_running_average=False)
    value = jax.random.normal(KEY, (4, 2, 8, 8, 3))

    @jax.jit
    @jax.grad
    def gradient(factor):
        def loss(value):
            x = Signal(value, KalmanState(jnp.zeros(3), factor * jnp.ones(3)))
            variables = norm.init(KEY, x)
            return norm.apply(variables, x, mutable=True)[0].value.sum()

        return jax.vmap(loss)(value).sum()

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        jax.block_until_ready(gradient(factor))
        jax.effects_barrier()
    assert len(found) == warns
    if warns:
        assert "kalman_paper" in str(found[0].message)


@pytest.mark.parametrize("options, message", [
    ({"gain": 1.5}, r"gain is 1.5.*\[0, 1\]"),
    ({"gain": -0.1, "learn_gain": None}, r"gain is -0.1.*\[0, 1\]"),
    ({"gain": float("nan")}, r"gain is nan"),
    ({"gain": 0.0, "learn_gain": "scalar"}, r"gain is 0.0.*learn_gain=None"),
    ({"gain": 1.0, "learn_gain": "channel"}, r"gain is 1.0.*learn_gain=None"),
    ({"learn_gain": "layer"}, r"learn_gain is 'layer'.*'scalar', 'channel'"),
    ({"learn_gain": True}, r"learn_gain is True.*'scalar', 'channel'"),
    ({"decay_steps": 0}, r"decay_steps is 0.*whole number"),
    ({"noise": "white"}, r"noise is 'white'.*'additive', 'multiplicative'"),
    ({"rule": "exact"}, r"rule is 'exact'.*'mixture', 'paper'"),
    ({"propagate": "output"}, r"propagate is 'output'.*'normalized', 'raw'"),
], ids=str)  # fmt: skip
def test_bad_options_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        kf.KalmanNorm(**options)


@pytest.mark.parametrize("use_running_average", [True, False])
def test_state_of_other_channels_is_refused(use_running_average, x):
    wrong = x.replace(state=KalmanState(jnp.zeros(4), jnp.ones(4)))
    with pytest.raises(ValueError, match=r"\(4,\).*3 channels"):
        kf.KalmanNorm(use_running_average).init(KEY, wrong)
