"""CBN against the paper's equations in NumPy, and what it does in a network."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from kalman_flax import KalmanState, Signal
from kalman_flax.baselines.cross_iteration import (
    ConvState,
    CrossIterationBatchNorm,
    CrossIterationConv,
)
from tests.reference.slow import few_quick
from tests.train.tiny import OneStage

KEY = jax.random.key(0)
EPSILON, MOMENTUM = 1e-5, 0.9
GROUPS, STRIDE = 2, 2


class Pair(nn.Module):
    """The convolution and the norm behind it."""

    norm: CrossIterationBatchNorm
    conv: CrossIterationConv

    @nn.compact
    def __call__(self, x, use_running_average=False):
        x = x if isinstance(x, Signal) else Signal(x)
        return self.norm(self.conv(x), use_running_average)


def pair(conv=None, **norm):
    conv = {"features": 4, "kernel_size": (3, 3), "use_bias": False} | (conv or {})
    norm = {"momentum": MOMENTUM, "epsilon": EPSILON} | norm
    return Pair(CrossIterationBatchNorm(**norm), CrossIterationConv(**conv))


@functools.partial(jax.jit, static_argnums=0)
def train(net, variables, x):
    y, updates = net.apply(variables, x, mutable=["batch_stats"])
    return y, variables | updates


def with_kernel(variables, kernel):
    params = variables["params"] | {"conv": {"kernel": jnp.asarray(kernel)}}
    return variables | {"params": jax.tree.map(lambda p: p.astype("float32"), params)}


def patches(x):
    """``[positions, 3, 3, C]`` of a 3x3 convolution with one pixel of zeros around."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, cols = (range(0, size - 2, STRIDE) for size in x.shape[1:3])
    windows = [x[:, r : r + 3, c : c + 3] for r in rows for c in cols]
    return np.stack(windows, axis=1).reshape(-1, 3, 3, x.shape[-1])


def moments(x, kernel):
    """y ``[positions, D]``; of each channel mu, nu = E[y^2] and their gradients."""
    p, features = patches(x), kernel.shape[-1]
    y, mu, nu, dmu, dnu = [], [], [], [], []
    for d in range(features):
        width = kernel.shape[2]
        first = d // (features // GROUPS) * width
        seen = p[..., first : first + width]
        y.append(np.einsum("phwc,hwc->p", seen, kernel[..., d]))
        mu.append(y[-1].mean())
        nu.append((y[-1] ** 2).mean())
        dmu.append(seen.mean(0))
        dnu.append(2 * np.einsum("phwc,p->hwc", seen, y[-1]) / len(seen))
    return np.stack(y, -1), *map(np.array, (mu, nu, dmu, dnu))


def compensated(past, kernel):
    """mu and nu of a past iteration with today's kernel, by Taylor's theorem."""
    mu, nu, dmu, dnu, old = past
    change = np.moveaxis(kernel - old, -1, 0)
    axes = (1, 2, 3)
    return mu + (dmu * change).sum(axes), nu + (dnu * change).sum(axes)


def combined(mu, nu, past):
    """Mean and variance over today and the past, and how many were dropped."""
    valid = [np.ones(len(mu), bool)] + [n >= m**2 for m, n in past]
    mus, nus = zip((mu, nu), *past)
    mean = np.where(valid, mus, 0).sum(0) / np.sum(valid, 0)
    var = np.where(valid, nus, 0).sum(0) / np.sum(valid, 0) - mean**2
    return mean, var, np.sum(~np.array(valid))


def sequence(steps, flipped=()):
    """Inputs and kernels; at the steps `flipped` channel 2 of the kernel turns over."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 3, 2, 4))
    for step in range(steps):
        kernel = kernel + 0.1 * rng.normal(size=kernel.shape)
        if step in flipped:
            kernel[..., 2] *= -1
        yield rng.normal(0.5, 1.0, size=(2, 6, 6, 4)), kernel


GEOMETRY = {"feature_group_count": GROUPS, "strides": STRIDE, "padding": 1}


@pytest.mark.parametrize("kernel_map", [None, kf.centre_kernel])
def test_values_and_statistics_are_those_of_the_paper(kernel_map):
    """Over burn-in, filling of the window, and iterations dropped from it."""
    window, burn_in = 3, 2
    net = pair(GEOMETRY | {"kernel_map": kernel_map}, window=window, burn_in=burn_in)
    variables = net.init(KEY, jnp.ones((1, 6, 6, 4)))
    scale, bias = np.arange(1.0, 5.0), np.arange(4.0)
    variables["params"]["norm"] = {"scale": jnp.array(scale), "bias": jnp.array(bias)}
    running_mean, running_var = np.zeros(4), np.ones(4)
    history, dropped = [], []
    for step, (x, kernel) in enumerate(sequence(8, flipped=(1, 6))):
        actual, variables = train(net, with_kernel(variables, kernel), jnp.array(x))
        if kernel_map is not None:
            kernel = kernel - kernel.mean((0, 1, 2))
        y, mu, nu, dmu, dnu = moments(x, kernel)
        past = history[: window - 1] if step >= burn_in else []
        past = [compensated(entry, kernel) for entry in past]
        mean, var, number = combined(mu, nu, past)
        dropped.append(number)
        history = [(mu, nu, dmu, dnu, kernel), *history]
        expected = scale * (y - mean) / np.sqrt(var + EPSILON) + bias
        np.testing.assert_allclose(
            actual.value.reshape(2 * 9, 4), expected, rtol=1e-3, atol=1e-4
        )
        running_mean = MOMENTUM * running_mean + (1 - MOMENTUM) * mean
        running_var = MOMENTUM * running_var + (1 - MOMENTUM) * var
        stats = variables["batch_stats"]["norm"]
        np.testing.assert_allclose(stats["mean"], running_mean, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(stats["var"], running_var, rtol=1e-3)
        # What it hands on describes what it put out.
        np.testing.assert_allclose(actual.state.mean, expected.mean(0), atol=1e-4)
        np.testing.assert_allclose(actual.state.var, expected.var(0), rtol=1e-3)
    # The turned channel: both of the past, then the one from before the turn.
    assert dropped == [0, 0, 1, 0, 0, 0, 2, 1]
    assert set(stats) == {"mean", "var", "steps", "past1", "past2"}

    inference = net.apply(variables, x, True).value.reshape(18, 4)
    expected = (y - running_mean) / np.sqrt(running_var + EPSILON) * scale + bias
    np.testing.assert_allclose(inference, expected, rtol=1e-3, atol=1e-4)


def test_gradient_flows_through_the_current_statistics_only():
    net = pair(GEOMETRY, window=3)
    variables = net.init(KEY, jnp.ones((1, 6, 6, 4)))
    history = []
    for x, kernel in sequence(4):
        before = with_kernel(variables, kernel)
        _, variables = train(net, before, jnp.array(x))
        history = [(*moments(x, kernel)[1:], kernel), *history]
    past = [compensated(entry, kernel) for entry in history[1:3]]
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(18, 4))

    def expected(x, kernel):
        y, mu, nu, *_ = moments(x, kernel)
        mean, var, dropped = combined(mu, nu, past)  # the past stays as it is
        assert not dropped
        return np.sum(weights * (y - mean) / np.sqrt(var + EPSILON))

    def actual(x, kernel):
        y, _ = train(net, with_kernel(before, kernel), x)
        return jnp.sum(weights * y.value.reshape(18, 4))

    of_x, of_kernel = jax.grad(actual, argnums=(0, 1))(jnp.array(x), jnp.array(kernel))
    for _ in range(3):
        dx, dk = rng.normal(size=x.shape), rng.normal(size=kernel.shape)
        h = 1e-5
        for grad, direction, step in (
            (of_x, dx, (h * dx, 0)),
            (of_kernel, dk, (0, h * dk)),
        ):
            ahead = expected(x + step[0], kernel + step[1])
            behind = expected(x - step[0], kernel - step[1])
            slope = np.sum(np.asarray(grad) * direction)
            np.testing.assert_allclose(slope, (ahead - behind) / (2 * h), rtol=1e-3)


def convolve(x, variables):
    """The output of the pair's convolution, by the plain one."""
    conv = kf.Conv(4, (3, 3), use_bias=False)
    return conv.apply({"params": variables["params"]["conv"]}, x)


def test_compensation_is_exact_to_first_order():
    """The same input seen with W and W + e D: mean exact, variance off by O(e^2)."""
    net = pair(window=2, momentum=0.0)  # running statistics are those of the step
    x = jax.random.normal(KEY, (2, 5, 5, 3))
    first = net.init(KEY, x)
    kernel = first["params"]["conv"]["kernel"]
    change = jax.random.normal(jax.random.key(1), kernel.shape)
    errors = []
    for size in (0.2, 0.1, 0.05):
        _, variables = train(net, first, x)
        moved = with_kernel(variables, kernel + size * change)
        _, variables = train(net, moved, x)
        stats, true = (
            variables["batch_stats"]["norm"],
            kf.filter.observe(convolve(x, moved)),
        )
        np.testing.assert_allclose(stats["mean"], true.mean, atol=1e-5)
        errors.append(np.asarray(stats["var"] - true.var))
    errors = np.array(errors)
    assert np.all(np.abs(errors) > 1e-4)
    np.testing.assert_allclose(errors[:-1] / errors[1:], 4.0, rtol=2e-2)


def test_replicas_share_the_moments_of_all_their_examples():
    net = pair(window=2, momentum=0.0)
    x = 1 + jax.random.normal(KEY, (3, 2, 4, 4, 3))
    variables = net.init(KEY, x[0])
    replicas = jax.vmap(functools.partial(train, net), in_axes=(None, 0))
    _, written = replicas(variables, x)
    merged = kf.merge_running(written["batch_stats"], 0.0)
    _, written = replicas(variables | {"batch_stats": merged}, x)
    stats = written["batch_stats"]["norm"]
    y = np.asarray(convolve(x, variables), np.float64).reshape(3, -1, 4)
    # As many of one replica's values as of all, which is to say of its copies.
    both = np.stack([np.concatenate([*y, own, own, own]) for own in y])
    np.testing.assert_allclose(stats["mean"], both.mean(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["var"], both.var(1), rtol=1e-4)


def test_shared_statistics_are_those_of_the_whole_batch():
    x = jax.random.normal(KEY, (3, 4, 2, 4, 4, 3))
    whole, parts = pair(), pair(axis_name="devices")
    expected = actual = whole.init(KEY, x[0, 0])
    for batch in x:
        y, expected = train(whole, expected, batch.reshape(8, 4, 4, 3))
        z, written = jax.vmap(
            lambda x, variables=actual: train(parts, variables, x), axis_name="devices"
        )(batch)
        actual = jax.tree.map(lambda v: v[0], written)
        z = z.value.reshape(y.value.shape)
        chex.assert_trees_all_close((z, actual), (y.value, expected), atol=1e-4)


def test_convolution_is_conv_and_knows_its_output():
    options = {"features": 4, "kernel_size": (3, 3), "kernel_map": kf.centre_kernel}
    conv, plain = CrossIterationConv(**options), kf.Conv(**options)
    x = jax.random.normal(KEY, (2, 3, 5, 5, 3))
    variables = plain.init(KEY, x)
    chex.assert_trees_all_equal(conv.init(KEY, Signal(x)), variables)
    expected = plain.apply(variables, x)
    chex.assert_trees_all_equal(conv.apply(variables, x), expected)
    y = conv.apply(variables, Signal(x, KalmanState(0.0, 1.0)))
    chex.assert_trees_all_equal(y.value, expected)
    chex.assert_trees_all_equal(KalmanState(*y.state[:2]), kf.filter.observe(expected))


@pytest.mark.parametrize("between", [
    lambda x: Signal(x.value),
    lambda x: x + x,
    kf.relu,
    lambda x: x.value,
], ids=["unknown", "sum", "activation", "array"])  # fmt: skip
def test_elsewhere_it_is_batch_norm(between):
    conv = CrossIterationConv(4, (3, 3))
    x = Signal(jax.random.normal(KEY, (2, 5, 5, 3)))
    x = conv.init_with_output(KEY, x)[0]
    assert isinstance(x.state, ConvState)
    x = between(x)
    ours, theirs = CrossIterationBatchNorm(False), kf.baselines.BatchNorm(False)
    variables = theirs.init(KEY, x)
    chex.assert_trees_all_equal(ours.init(KEY, x), variables)
    expected = theirs.apply(variables, x, mutable=["batch_stats"])
    actual = ours.apply(variables, x, mutable=["batch_stats"])
    assert type(actual[0]) is type(x)
    chex.assert_trees_all_close(actual, expected, rtol=1e-3, atol=1e-5)


DEGENERATE = {
    "constant": jnp.ones((2, 4, 4, 3)),
    "zero": jnp.zeros((1, 1, 1, 3)),
    "single": jax.random.normal(KEY, (1, 1, 1, 3)),
    "large": 1e4 + jax.random.normal(KEY, (2, 4, 4, 3)),
    "small": 1e-6 * jax.random.normal(KEY, (2, 4, 4, 3)),
    "half": jax.random.normal(KEY, (2, 4, 4, 3)).astype(jnp.bfloat16),
}


@pytest.mark.parametrize("case", few_quick(DEGENERATE, ["constant", "zero", "half"]))
def test_numerically_safe(case):
    x = DEGENERATE[case]
    net = pair({"dtype": x.dtype}, dtype=x.dtype)
    variables = net.init(KEY, x)

    @jax.jit
    def step(variables):
        def loss(params):
            y, new = net.apply(
                variables | {"params": params}, x, mutable=["batch_stats"]
            )
            return jnp.sum(y.value[..., 0] ** 2 + y.value[..., 1]), (y.value, new)

        return jax.grad(loss, has_aux=True)(variables["params"])

    for _ in range(4):
        grads, (y, updates) = step(variables)
        chex.assert_tree_all_finite((grads, y, updates))
        chex.assert_type(y, x.dtype)
        chex.assert_type(jax.tree.leaves(updates), jnp.float32)
        variables |= updates


def test_variance_at_a_large_offset():
    net = pair({"padding": "VALID"})
    x = 1e4 + jax.random.normal(KEY, (8, 8, 8, 3))
    variables = net.init(KEY, x)
    for _ in range(5):
        y, variables = train(net, variables, x)
    np.testing.assert_allclose(np.std(y.value, axis=(0, 1, 2)), 1.0, rtol=1e-2)


def network(kind=kf.models.ResNet, **options):
    return kind(
        3,
        width=4,
        norm=functools.partial(CrossIterationBatchNorm, momentum=MOMENTUM),
        conv=CrossIterationConv,
        **options,
    )


def test_network_of_replicas_trains():
    net = network(OneStage, blocks_per_stage=1, dtype=jnp.bfloat16)
    images = jax.random.normal(KEY, (2, 2, 8, 8, 3))
    labels = jax.nn.one_hot(jnp.array([[0, 1], [2, 0]]), 3)
    variables = jax.jit(lambda: net.init(KEY, images[0], True))()

    @jax.jit
    def step(variables):
        def loss(params):
            def forward(images):
                changed = variables | {"params": params}
                return net.apply(changed, images, False, mutable=["batch_stats"])

            logits, new = jax.vmap(forward)(images)
            return -jnp.mean(labels * jax.nn.log_softmax(logits)), new

        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, new), grads = gradient(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.2 * g, variables["params"], grads)
        stats = kf.merge_running(new["batch_stats"], MOMENTUM)
        return value, {"params": params, "batch_stats": stats}

    losses = []
    for _ in range(5):
        before = variables
        value, variables = step(variables)
        losses.append(value)
        chex.assert_tree_all_finite((value, variables))
        chex.assert_trees_all_equal_shapes_and_dtypes(before, variables)
    assert losses[-1] < losses[0]
    infer = jax.jit(lambda variables: net.apply(variables, images[0], True))
    chex.assert_tree_all_finite(infer(variables))


@pytest.mark.parametrize("scan", [False, True])
def test_only_norms_behind_a_convolution_look_back(scan):
    net = network(blocks_per_stage=2, scan=scan)
    variables = jax.eval_shape(lambda: net.init(KEY, jnp.ones((2, 8, 8, 3)), True))
    _, updates = jax.eval_shape(
        lambda v: net.apply(v, jnp.ones((2, 8, 8, 3)), False, mutable=["batch_stats"]),
        variables,
    )
    stats = updates["batch_stats"]
    chex.assert_trees_all_equal_shapes_and_dtypes(stats, variables["batch_stats"])
    second = stats["stage1_blocks" if scan else "stage1_block2"]
    for norm in (stats["stem_norm"], stats["stage2_block1"]["norm2"], second["norm2"]):
        assert {"past1", "past2", "past3", "steps"} < set(norm)
    for norm in (
        stats["final_norm"], stats["stage2_block1"]["norm1"], second["norm1"]
    ):  # fmt: skip
        assert set(norm) == {"mean", "var"}


@pytest.mark.parametrize("options", [{"window": 0}, {"burn_in": -1}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} is .*expected"):
        CrossIterationBatchNorm(**options)
