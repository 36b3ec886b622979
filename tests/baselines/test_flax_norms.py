"""The rivals are Flax's own, under the contract of Signals."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kalman_flax import KalmanState, Signal, baselines
from kalman_flax.baselines.flax_norms import FrozenBatchNorm, InstanceNorm, LayerNorm

KEY = jax.random.key(0)
HALF = {"dtype": jnp.bfloat16}
BARE = {"use_scale": False, "use_bias": False}
CASES = {
    "batch": (baselines.BatchNorm, nn.BatchNorm, {"use_running_average": False}),
    "inference": (baselines.BatchNorm, nn.BatchNorm, {"use_running_average": True}),
    "bare": (
        baselines.BatchNorm,
        nn.BatchNorm,
        {"use_running_average": False} | BARE,
    ),
    "batch half": (
        baselines.BatchNorm,
        nn.BatchNorm,
        {"use_running_average": False} | HALF,
    ),
    "group": (baselines.GroupNorm, nn.GroupNorm, {"num_groups": 2}),
    "size": (
        baselines.GroupNorm,
        nn.GroupNorm,
        {"num_groups": None, "group_size": 3},
    ),
    "group half": (baselines.GroupNorm, nn.GroupNorm, {"num_groups": 3} | HALF),
}
#: Of each example: axes of `[N, H, W, groups, C / groups]` that a moment is taken over.
OF_EXAMPLES = {
    "layer": (LayerNorm, 1),
    "instance": (InstanceNorm, 6),
    "group": (functools.partial(baselines.GroupNorm, num_groups=3), 3),
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
    norm = baselines.BatchNorm(False, axis=axis, use_scale=affine, use_bias=affine)
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
        norm = baselines.GroupNorm(num_groups=2, use_running_average=mode)
        variables = norm.init(KEY, signal)
        assert set(variables) == {"params"}
        outputs.append(norm.apply(variables, signal))
        outputs.append(norm.apply(variables, signal, mode))
        assert outputs[-1].state is None
    chex.assert_trees_all_equal(*outputs)


@pytest.mark.parametrize("case", ["batch", "group"])
def test_filter_then_normalize_is_the_call(case, x):
    cls, _, options = CASES[case]

    class TwoSteps(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = cls(**options, name="norm")
            filtered = norm.filter(x)
            return norm.normalize(filtered), filtered.signal

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


@pytest.mark.parametrize("case", OF_EXAMPLES)
def test_moments_of_each_example(case, x):
    make, groups = OF_EXAMPLES[case]
    signal = Signal(x, KalmanState(0.0, 1.0))
    norm = make(use_running_average=False)
    variables = randomized(norm.init(KEY, signal))
    assert jax.tree.map(jnp.shape, variables) == {
        "params": {"scale": (6,), "bias": (6,)}
    }
    y = norm.apply(variables, signal)
    assert y.state is None
    split = np.float64(x).reshape(3, 4, 4, groups, -1)
    mean, var = (f(split, axis=(1, 2, 4), keepdims=True) for f in (np.mean, np.var))
    expected = ((split - mean) / np.sqrt(var + norm.epsilon)).reshape(x.shape)
    params = variables["params"]
    expected = params["scale"] * expected + params["bias"]
    np.testing.assert_allclose(y.value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", OF_EXAMPLES)
def test_moments_of_each_example_are_those_of_torch(case, x):
    torch = pytest.importorskip("torch")
    make, groups = OF_EXAMPLES[case]
    norm = make(epsilon=1e-5)
    variables = randomized(norm.init(KEY, x))
    params = variables["params"]
    scale, bias = (torch.tensor(np.float64(params[k])) for k in ("scale", "bias"))
    inputs = torch.tensor(np.moveaxis(np.float64(x), -1, 1))
    functional = torch.nn.functional
    if case == "layer":
        y = functional.layer_norm(inputs, inputs.shape[1:])
        y = y * scale.reshape(6, 1, 1) + bias.reshape(6, 1, 1)
    elif case == "instance":
        y = functional.instance_norm(inputs, weight=scale, bias=bias)
    else:
        y = functional.group_norm(inputs, groups, scale, bias)
    ours = np.moveaxis(norm.apply(variables, x), -1, 1)
    np.testing.assert_allclose(ours, y.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "norm", [LayerNorm(), InstanceNorm()], ids=["layer", "instance"]
)
@pytest.mark.parametrize("value", [0.0, 1e4, 1e-6])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_constant_examples_are_finite(norm, value, dtype):
    x = jnp.full((1, 1, 1, 6), value, dtype)
    variables = norm.init(KEY, x)
    result = jax.value_and_grad(lambda x: jnp.sum(norm.apply(variables, x)))(x)
    chex.assert_tree_all_finite(result)


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("mode", [True, False, None])
def test_frozen_batch_norm_is_an_affine_map(mode, affine, axis, x):
    norm = FrozenBatchNorm(mode, axis=axis, use_scale=affine, use_bias=affine)
    # The state of what really comes in: what it hands on is then what comes out.
    flat = np.float64(x).reshape(-1, 6)
    state = KalmanState(jnp.asarray(flat.mean(0)), jnp.asarray(flat.var(0)))
    x = jnp.moveaxis(x, -1, axis)
    variables = randomized(norm.init(KEY, x))
    y, written = norm.apply(variables, Signal(x, state), mode, mutable=["batch_stats"])
    stats = variables["batch_stats"]
    chex.assert_trees_all_equal(written["batch_stats"], stats)
    params = variables.get("params", {"scale": 1.0, "bias": 0.0})
    expected = (flat - stats["mean"]) / np.sqrt(np.float64(stats["var"]) + 1e-5)
    expected = params["scale"] * expected + params["bias"]
    value = np.moveaxis(y.value, axis, -1).reshape(-1, 6)
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(y.state.mean, expected.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(y.state.var, expected.var(0), rtol=1e-4)
    assert norm.apply(variables, Signal(x)).state is None
    np.testing.assert_allclose(norm.apply(variables, x), y.value)


def test_frozen_batch_norm_trains_scale_and_bias(x):
    norm = FrozenBatchNorm(use_running_average=False)
    variables = norm.init(KEY, x)

    def loss(params):
        return jnp.sum(norm.apply({**variables, "params": params}, x) ** 2)

    grads = jax.grad(loss)(variables["params"])
    flat = np.float64(x).reshape(-1, 6)  # statistics are still 0 and 1
    np.testing.assert_allclose(grads["bias"], 2 * flat.sum(0), rtol=1e-4)
    np.testing.assert_allclose(grads["scale"], 2 * (flat**2).sum(0), rtol=1e-4)


@pytest.mark.parametrize("norm", [
    baselines.BatchNorm(False), baselines.GroupNorm(num_groups=6),
], ids=["batch", "group"])  # fmt: skip
def test_variance_at_a_large_offset(norm, x):
    y, _ = norm.init_with_output(KEY, 1e4 + x)
    axes = (0, 1, 2) if isinstance(norm, baselines.BatchNorm) else (1, 2)
    np.testing.assert_allclose(np.std(y, axis=axes), 1.0, rtol=1e-2)
