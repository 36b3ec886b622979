"""GKN against the equations of the paper, and what it hands on against the truth."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from kalman_flax import KalmanState, Signal
from kalman_flax._filter.predict import predict_group
from kalman_flax.layers.group_kalman_norm import GroupKalmanNorm
from tests.reference import kalman as reference
from tests.reference.checks import (
    DEGENERATE,
    TwoSteps,
    assert_finite,
    directional,
    each_degenerate,
)

KEY = jax.random.key(0)
GROUPS, CHANNELS, EPSILON = 2, 6, 0.1
FIXED = {"num_groups": GROUPS, "epsilon": EPSILON, "learn_gain": None}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 4, CHANNELS)) + np.arange(CHANNELS) / 2
SCALE, BIAS = RNG.normal(size=(2, CHANNELS))
PARAMS = {"scale": SCALE, "bias": BIAS}
MASK = np.arange(12).reshape(1, 3, 4, 1) % 3 > 0


def draw(shape):
    return RNG.normal(size=shape), RNG.uniform(0.3, 2.0, shape)


PREDICTED = {"[C]": draw(CHANNELS), "[N, C]": draw((2, CHANNELS))}


def group(mean, var, groups=GROUPS):
    """Law of total variance, one group of one state ``[N, C]`` at a time."""
    mean, var = np.array(mean, np.float64), np.array(var, np.float64)
    size = mean.shape[-1] // groups
    out_mean, out_var = np.empty_like(mean), np.empty_like(var)
    for n in range(len(mean)):
        for first in range(0, mean.shape[-1], size):
            own = slice(first, first + size)
            second_moment = np.mean(var[n, own] + mean[n, own] ** 2)
            out_mean[n, own] = np.mean(mean[n, own])
            out_var[n, own] = second_moment - np.mean(mean[n, own]) ** 2
    return out_mean, out_var


def per_example(state):
    return [np.broadcast_to(stat, (2, CHANNELS)) for stat in state]


def filtered_group(x, predicted, gain, mask=None, rule="mixture"):
    """Eq. 6 and 7 on the group's own predicted and observed moments."""
    observed = reference.observe(x, "group", GROUPS, mask)
    return reference.update(group(*per_example(predicted)), observed, gain, rule)


def state(pair):
    return KalmanState(*(jnp.float32(stat) for stat in pair))


def apply(norm, x, params=None, **kwargs):
    params = {} if params is None else jax.tree.map(jnp.float32, params)
    return norm.apply({"params": params}, x, **kwargs)


def assert_state(actual, expected, **tolerance):
    tolerance = {"rtol": 1e-4, "atol": 1e-5} | tolerance
    chex.assert_trees_all_close(tuple(actual), tuple(expected), **tolerance)


def moments(value):
    """Of every channel of every example, as they are."""
    return reference.observe(value, "instance")


@pytest.mark.parametrize("shape", PREDICTED)
@pytest.mark.parametrize("gain", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mask", [None, MASK], ids=["", "mask"])
@pytest.mark.parametrize("rule", ["mixture", "paper"])
def test_normalises_by_the_filtered_moments_of_groups(rule, mask, gain, shape):
    predicted = PREDICTED[shape]
    norm = GroupKalmanNorm(**FIXED, gain=gain, rule=rule)
    y = apply(norm, Signal(jnp.float32(X), state(predicted)), PARAMS, mask=mask)
    mean, var = filtered_group(X, predicted, gain, mask, rule)
    expected = reference.normalize(X, mean, var, SCALE, BIAS, EPSILON)
    np.testing.assert_allclose(y.value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["mixture", "paper"])
def test_gradients(rule):
    """By the value, the state, the gain's logit, noise, scale and bias."""
    norm = GroupKalmanNorm(GROUPS, epsilon=EPSILON, noise="additive", rule=rule)
    params = PARAMS | {"gain": np.array(-0.5), "noise": RNG.normal(size=CHANNELS)}

    def ours(x, mean, var, params):
        return apply(norm, Signal(x, KalmanState(mean, var)), params).value

    def theirs(x, mean, var, params):
        gain = 1 / (1 + np.exp(-params["gain"]))
        noisy = mean, var + np.log1p(np.exp(params["noise"]))
        by = filtered_group(x, noisy, gain, rule=rule)
        return reference.normalize(x, *by, params["scale"], params["bias"], EPSILON)

    arguments = (X, *PREDICTED["[N, C]"], params)
    actual, expected = directional(ours, theirs, arguments)
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options, params", [
    ({}, ["bias", "gain", "scale"]),
    ({"learn_gain": None, "noise": "multiplicative"}, ["bias", "noise", "scale"]),
    ({"learn_gain": "channel", "use_scale": False}, ["bias", "gain"]),
], ids=str)  # fmt: skip
def test_parameters(options, params):
    variables = GroupKalmanNorm(GROUPS, **options).init(KEY, jnp.float32(X))
    assert set(variables) == {"params"}
    assert sorted(variables["params"]) == params
    if "gain" in params:
        gain = jax.nn.sigmoid(variables["params"]["gain"])
        shape = (CHANNELS,) if options else ()
        np.testing.assert_allclose(gain, np.full(shape, 0.1), rtol=1e-5)


@pytest.mark.parametrize("num_groups", [1, 2, 6])
@pytest.mark.parametrize("case", ["array", "unknown state", "gain 1"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["", "mask"])
def test_without_a_prediction_it_is_group_norm(mask, case, num_groups):
    x = jnp.float32(X)
    mask = None if mask is None else jnp.broadcast_to(mask, x.shape)
    options = {"learn_gain": None, "gain": 1.0} if case == "gain 1" else {}
    norm = GroupKalmanNorm(num_groups, **options)
    variables = norm.init(KEY, x)
    variables["params"] |= jax.tree.map(jnp.float32, PARAMS)
    known = state(PREDICTED["[C]"]) if case == "gain 1" else None
    y = norm.apply(variables, x if case == "array" else Signal(x, known), mask=mask)
    theirs = nn.GroupNorm(num_groups, use_fast_variance=False)
    expected = theirs.apply({"params": PARAMS}, x, mask=mask)
    value = y if case == "array" else y.value
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    if case != "array" and mask is None:  # and it then knows its output
        assert_state(y.state, moments(value), rtol=1e-3)


def test_hands_on_the_filtered_moments_of_each_channel():
    """Those of the input, moved by the map the group makes of it."""
    predicted = per_example(PREDICTED["[N, C]"])
    norm = GroupKalmanNorm(**FIXED, gain=0.3)
    y = apply(norm, Signal(jnp.float32(X), state(predicted)), PARAMS)
    mean, var = reference.update(predicted, moments(X), 0.3, "mixture")
    group_mean, group_var = filtered_group(X, predicted, 0.3)
    std = np.sqrt(group_var + EPSILON)
    expected = SCALE * (mean - group_mean) / std + BIAS, SCALE**2 * var / std**2
    assert_state(y.state, expected)


def test_raw_hands_on_the_filtered_moments_of_the_group():
    predicted = PREDICTED["[N, C]"]
    norm = GroupKalmanNorm(**FIXED, gain=0.3, propagate="raw")
    y = apply(norm, Signal(jnp.float32(X), state(predicted)), PARAMS)
    assert_state(y.state, filtered_group(X, predicted, 0.3))


def test_state_handed_on_is_true_where_the_prediction_is():
    """As mu and sigma of channels differ, the group's moments would not be."""
    norm = GroupKalmanNorm(**FIXED, gain=0.1)
    y = apply(norm, Signal(jnp.float32(X), state(moments(X))), PARAMS)
    assert_state(y.state, moments(y.value), rtol=1e-3)


def test_channels_at_another_axis():
    norm = GroupKalmanNorm(**FIXED, gain=0.3)
    last = apply(norm, Signal(jnp.float32(X), state(PREDICTED["[C]"])), PARAMS)
    x = Signal(jnp.moveaxis(jnp.float32(X), -1, 1), state(PREDICTED["[C]"]))
    y = apply(norm.clone(axis=1), x, PARAMS)
    expected = last.replace(value=jnp.moveaxis(last.value, -1, 1))
    chex.assert_trees_all_close(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("known", [True, False])
def test_contract_of_signals(known):
    x = Signal(jnp.float32(X), state(PREDICTED["[C]"]) if known else None)
    outputs = []
    for mode in (True, False, None):
        norm = GroupKalmanNorm(GROUPS, use_running_average=mode)
        y, _ = norm.init_with_output(KEY, x)
        (apart, stream), _ = TwoSteps(norm).init_with_output(KEY, x)
        chex.assert_trees_all_equal(apart, y)
        chex.assert_trees_all_equal(stream.value, x.value)
        outputs.append(y)
    chex.assert_trees_all_equal(*outputs)
    assert_state(stream.state, reference.update(
        per_example(PREDICTED["[C]"]), moments(X), 0.1 if known else 1.0, "mixture"
    ))  # fmt: skip


@each_degenerate
def test_degenerate_inputs(case):
    value = DEGENERATE[case]
    norm = GroupKalmanNorm(2, dtype=value.dtype)
    for known in (None, KalmanState(0.0, 0.0)):
        y = assert_finite(_Taking(norm, known), value)
        assert y.dtype == value.dtype
        out, _ = norm.init_with_output(KEY, Signal(value, known))
        chex.assert_tree_all_finite(out.state)
        assert jnp.all(out.state.var >= 0)
        chex.assert_type([*out.state], jnp.float32)


class _Taking(nn.Module):
    """The normaliser on an array of known state."""

    norm: nn.Module
    state: KalmanState | None

    def __call__(self, x):
        return self.norm(Signal(x, self.state))


@pytest.mark.parametrize("options, message", [
    ({"num_groups": 0}, r"num_groups is 0.*whole number"),
    ({"gain": 1.5}, r"gain is 1.5.*\[0, 1\]"),
    ({"gain": 1.0}, r"gain is 1.0.*learn_gain=None"),
    ({"noise": "white"}, r"noise is 'white'.*'additive', 'multiplicative'"),
    ({"propagate": "output"}, r"propagate is 'output'.*'normalized', 'raw'"),
], ids=str)  # fmt: skip
def test_bad_options_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        GroupKalmanNorm(**options)


@pytest.mark.parametrize("shape, message", [
    ((4,), r"\(4,\).* 6 channels"),
    ((3, CHANNELS), r"shape \(3, 6\).*\(6,\), or \(2, 6\)"),
], ids=str)  # fmt: skip
def test_state_of_another_shape_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        GroupKalmanNorm(GROUPS).init(KEY, Signal(jnp.float32(X), state(draw(shape))))


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match=r"num_groups is 32.* 6 channels.*divisor"):
        GroupKalmanNorm().init(KEY, jnp.float32(X))


# predict_group


def test_moments_of_groups():
    mean, var = draw((3, 2, CHANNELS))
    mean += 1e3  # where E[x^2] - E[x]^2 would give nothing in float32
    out = jax.jit(predict_group, static_argnums=1)(state((mean, var)), 3)
    for n in range(3):
        expected = group(np.float32(mean[n]), np.float32(var[n]), 3)
        assert_state(KalmanState(out.mean[n], out.var[n]), expected)


def test_moments_of_groups_against_sampling():
    mean, var = draw((1, CHANNELS))
    x = RNG.normal(mean, np.sqrt(var), (1, 100_000, CHANNELS))
    observed = reference.observe(x, "group", GROUPS)
    assert_state(predict_group(state((mean, var)), GROUPS), observed, atol=0.02)


@pytest.mark.parametrize("num_groups", [0, 4, -2])
def test_groups_of_a_state_that_do_not_divide_its_channels(num_groups):
    with pytest.raises(ValueError, match=rf"num_groups is {num_groups}.* 6 channels"):
        predict_group(state(draw(CHANNELS)), num_groups)


# In a network: states [N, C] through every layer, as examples by themselves.


def network(**options):
    options = {"num_classes": 3, "blocks_per_stage": 1, "width": 4} | options
    norm = GroupKalmanNorm
    return kf.models.ResNet(norm=lambda **kwargs: norm(2, **kwargs), **options)


IMAGES = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))


@pytest.mark.parametrize("layer", [
    kf.relu,
    lambda x: kf.avg_pool(x, (2, 2), strides=(2, 2), padding="SAME"),
    lambda x: kf.pad_channels(x, 1, 2),
    lambda x: x + kf.relu(x),
    lambda x: kf.concatenate([x, x]),
    lambda x: kf.Conv(3, (3, 3), strides=2).init_with_output(KEY, x)[0],
], ids=["relu", "avg_pool", "pad_channels", "sum", "concatenate", "conv"])  # fmt: skip
def test_layers_move_the_state_of_each_example(layer):
    x, states = jnp.float32(X), state(PREDICTED["[N, C]"])
    together = layer(Signal(x, states))
    for n in range(2):
        own = jax.tree.map(lambda stat, n=n: stat[n], states)
        alone = layer(Signal(x[n : n + 1], own))
        moved = jax.tree.map(lambda stat, n=n: stat[n], together.state)
        assert_state(moved, alone.state, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(lambda: network().init(KEY, IMAGES, True))()


@pytest.mark.slow
@pytest.mark.parametrize("input_state", [KalmanState(0.0, 1.0), None])
def test_resnet(input_state, variables):
    """Its examples do not depend on each other, and every parameter has a gradient."""
    net = network(input_state=input_state)

    def logits(params, images, train=True):
        return net.apply({"params": params}, images, not train)

    together = logits(variables["params"], IMAGES)
    alone = [logits(variables["params"], image[None])[0] for image in IMAGES]
    chex.assert_trees_all_close(together, jnp.stack(alone), rtol=1e-4, atol=1e-4)
    inference = logits(variables["params"], IMAGES, train=False)
    chex.assert_trees_all_equal(inference, together)

    grads = jax.grad(lambda p: jnp.sum(jnp.sin(logits(p, IMAGES))))(variables["params"])
    chex.assert_tree_all_finite(grads)
    gains = [norm["gain"] for norm in _normalisers(grads)]
    # Without the state of the input the first one has nothing to weigh.
    assert sum(bool(g != 0) for g in gains) == len(gains) - (input_state is None)


def _normalisers(tree):
    if "gain" in tree:
        return [tree]
    children = (child for child in tree.values() if isinstance(child, dict))
    return [norm for child in children for norm in _normalisers(child)]


def test_resnet_under_vmap_of_replicas(variables):
    replicas = jnp.stack([IMAGES, 2 * IMAGES])

    @jax.jit
    def logits(images):
        return network().apply(variables, images, False)

    expected = jnp.stack([logits(images) for images in replicas])
    actual = jax.jit(jax.vmap(logits))(replicas)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_resnet_scanned_over_its_blocks():
    net = network(scan=True, blocks_per_stage=2)
    logits, _ = jax.jit(lambda: net.init_with_output(KEY, IMAGES, True))()
    chex.assert_shape(logits, (2, 3))
    chex.assert_tree_all_finite(logits)
