"""`KalmanNorm.calibrate`: what is kept, who averages it, and where it is not."""

import functools
import operator

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kalman_flax as kf
from kalman_flax import KalmanState, Signal

KEY = jax.random.key(0)
STATE = KalmanState(jnp.array([-1.0, 0.5, 2.0]), jnp.array([0.5, 1.0, 4.0]))
VALUE = jnp.array([0.0, 1.0, 3.0]) + jax.random.normal(KEY, (4, 2, 3, 3))
TRAIN = {"use_running_average": False, "mutable": ["batch_stats"]}


def start(norm):
    return norm.init(KEY, Signal(VALUE, STATE), use_running_average=False)


def steps(norm, values):
    """Filtered moments of each step, and the last variables."""
    variables, moments = start(norm), []
    for value in values:
        filtered, updates = norm.apply(
            variables, Signal(value, STATE), **TRAIN, method="filter"
        )
        variables = {**variables, **updates}
        moments.append(filtered.moments)
    return moments, variables["batch_stats"]


def reference(what, values, gain, momentum):
    """The same in float64: a prior of all that was seen before, and the mixture."""
    predicted = [np.asarray(stat, np.float64) for stat in STATE]
    square = predicted[1] + 1e-6
    terms, moments = [], []
    for t, value in enumerate(np.asarray(values, np.float64)):
        mean, var = value.mean((0, 1, 2)), value.var((0, 1, 2))
        weights = momentum ** (t - 1 - np.arange(t))
        d, e = np.zeros(3), np.ones(3)
        if t:
            means, variances = zip(*terms)
            weights = weights[:, None] / weights.sum()
            d = np.sum(weights * means, 0)
            e = np.sum(weights * (np.array(variances) + (np.array(means) - d) ** 2), 0)
        prior = predicted[0] + (what == "both") * d * np.sqrt(square), e * square
        between = gain * (1 - gain) * (mean - prior[0]) ** 2
        moments.append(
            [
                (1 - gain) * prior[0] + gain * mean,
                (1 - gain) * prior[1] + gain * var + between,
            ]
        )
        terms.append(((mean - predicted[0]) / np.sqrt(square), var / square))
    return moments


@pytest.mark.parametrize("what", ["var", "both"])
def test_the_prior_is_what_was_seen_before(what):
    values = jnp.stack([VALUE, 2.0 * VALUE, VALUE - 1.0])
    norm = kf.KalmanNorm(gain=0.3, momentum=0.8, calibrate=what)
    moments, stats = steps(norm, values)
    for actual, (mean, var) in zip(moments, reference(what, values, 0.3, 0.8)):
        chex.assert_trees_all_close(actual, KalmanState(mean, var), rtol=1e-4)
    np.testing.assert_allclose(stats["weight"], np.full(3, 1 - 0.8**3), rtol=1e-5)


def test_replicas_and_micro_batches_are_one():
    """vmap and `merge_running`, `micro_batch_size`, and all values at once."""
    norm = kf.KalmanNorm(momentum=0.8, calibrate="both")
    variables = start(norm)
    variables["batch_stats"]["offset"] = jnp.array([0.5, -1.0, 2.0])
    variables["batch_stats"]["weight"] = jnp.full(3, 0.9)

    def written(value, norm=norm):
        apply = functools.partial(norm.apply, variables, **TRAIN)
        return apply(Signal(value, STATE))[1]["batch_stats"]

    merged = kf.merge_running(jax.vmap(written)(VALUE.reshape(2, 2, 2, 3, 3)), 0.8)
    small = written(VALUE, norm.clone(micro_batch_size=2))
    whole = written(VALUE)
    for name in ("offset", "ratio", "weight"):
        np.testing.assert_allclose(merged[name], whole[name], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(small, merged, rtol=1e-5, atol=1e-6)


def test_shared_statistics_are_those_of_all():
    norm = kf.KalmanNorm(momentum=0.8, calibrate="both")
    variables = start(norm)

    def written(value, axis_name=None):
        shared = norm.clone(axis_name=axis_name)
        return shared.apply(variables, Signal(value, STATE), **TRAIN)[1]

    parts = jax.vmap(lambda v: written(v, "i"), axis_name="i")(VALUE[:, None])
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    chex.assert_trees_all_close(first, written(VALUE), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "state", [None, KalmanState(0.0, jnp.inf), KalmanState(jnp.nan, 1.0)]
)
def test_without_a_prediction_nothing_is_learned(state):
    norm = kf.KalmanNorm(calibrate="both")
    variables = start(norm)
    y, updates = norm.apply(variables, Signal(VALUE, state), **TRAIN)
    plain, _ = kf.KalmanNorm().apply(variables, Signal(VALUE, state), **TRAIN)
    np.testing.assert_allclose(y.value, plain.value, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(updates["batch_stats"]["weight"], np.zeros(3))
    np.testing.assert_array_equal(updates["batch_stats"]["ratio"], np.ones(3))


def test_a_micro_batch_that_overflows_teaches_nothing():
    norm = kf.KalmanNorm(calibrate="both")
    value = VALUE.at[0, 0, 0, 1].set(1e30)
    _, updates = norm.apply(start(norm), Signal(value, STATE), **TRAIN)
    weight = updates["batch_stats"]["weight"]
    np.testing.assert_allclose(weight, [0.01, 0.0, 0.01], rtol=1e-5)


def test_noise_comes_before_the_correction():
    """So that the correction is that of what is predicted in all."""
    noisy = kf.KalmanNorm(gain=0.0, momentum=0.0, calibrate="both", noise="additive")
    moments, _ = steps(noisy, [VALUE, VALUE])
    seen = KalmanState(VALUE.mean((0, 1, 2)), VALUE.var((0, 1, 2)))
    chex.assert_trees_all_close(moments[1], seen, rtol=1e-4)


def test_variables_of_a_network_without_it():
    plain = start(kf.KalmanNorm())
    norm = kf.KalmanNorm(calibrate="var")
    with pytest.raises(ValueError, match="lack its offset, ratio, weight"):
        norm.apply(plain, Signal(VALUE, STATE), **TRAIN)
    norm.apply(plain, Signal(VALUE, STATE), True)  # inference needs none
    kf.KalmanNorm().apply(start(norm), Signal(VALUE, STATE), **TRAIN)


class Net(nn.Module):
    norm: type = kf.KalmanNorm
    options: tuple = ()

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(self.norm, not train, **dict(self.options))
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        x = nn.relu(norm(name="norm1")(x))
        return norm(name="norm2")(nn.Conv(4, (3, 3), use_bias=False)(x))


@pytest.mark.parametrize("norm", [kf.KalmanNorm, nn.BatchNorm])
def test_in_a_plain_flax_model(norm):
    """By modules of ours, and in the place of batch norm; under vmap."""
    options = (("calibrate", "both"), ("gain", 0.1))
    ours = norm is kf.KalmanNorm
    net = Net(norm, options if ours else ())
    apply = kf.filtered(
        net.apply,
        input_states={1: KalmanState(0.0, 1.0)},
        **({} if ours else dict(options)),
    )
    images = jax.random.normal(KEY, (2, 2, 5, 5, 3))
    variables = net.init(KEY, images[0], True)

    @jax.jit
    def step(stats):
        def forward(x):
            given = {**variables, "batch_stats": stats}
            return apply(given, x, True, mutable=["batch_stats"])

        y, updates = jax.vmap(forward)(images)
        return y, kf.merge_running(updates["batch_stats"], 0.99)

    _, stats = step(variables["batch_stats"])
    y, _ = step(stats)

    # The first layer in float64, by hand.
    kernel = np.asarray(variables["params"]["Conv_0"]["kernel"])
    x = np.asarray(nn.Conv(4, (3, 3), use_bias=False).apply(
        {"params": {"kernel": kernel}}, images.reshape(4, 5, 5, 3)
    ), np.float64)  # fmt: skip
    predicted = kf.filter.predict_conv(KalmanState(0.0, 1.0), kernel, (5, 5))
    square = np.asarray(predicted.var, np.float64) + 1e-6
    found = stats["norm1"]
    offset = (x.mean((0, 1, 2)) - predicted.mean) / np.sqrt(square)
    np.testing.assert_allclose(found["offset"], offset, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["ratio"], x.var((0, 1, 2)) / square, rtol=1e-4)
    assert found["weight"].shape == (4,) and jnp.all(jnp.isfinite(y))


def test_in_nnx():
    norm = kf.nnx.KalmanNorm(3, rngs=nnx.Rngs(0), momentum=0.8, calibrate="both")
    for _ in range(2):
        norm(Signal(VALUE, STATE))
    _, stats = steps(kf.KalmanNorm(momentum=0.8, calibrate="both"), [VALUE, VALUE])
    for name, stat in stats.items():
        np.testing.assert_allclose(getattr(norm, name)[...], stat, rtol=1e-5)
    with pytest.raises(ValueError, match="calibrate needs statistics"):
        kf.filtered(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), calibrate="var")


@pytest.mark.parametrize("what", ["mean", True])
def test_what_cannot_be_calibrated(what):
    with pytest.raises(ValueError, match=r"calibrate is.*'var', 'both'"):
        kf.KalmanNorm(calibrate=what)


class Block(nn.Module):
    rule: str

    @nn.compact
    def __call__(self, x, _):
        norm = kf.KalmanNorm(False, gain=0.3, rule=self.rule, calibrate="both")
        return kf.relu(norm(kf.Conv(3, (3, 3))(x))), None


@pytest.mark.parametrize("rule", ["mixture", "paper"])
def test_remat_and_scan_are_the_loop(rule):
    """Two blocks and two steps, so that the second step is corrected by the first."""
    axes = {"params": 0, "batch_stats": 0}
    scanned = nn.scan(Block, axes, split_rngs={"params": True}, length=2)(rule)
    again = nn.remat(Block)(rule)
    x = Signal(VALUE[..., :3], KalmanState(jnp.zeros(3), jnp.ones(3)))
    variables = jax.jit(lambda: scanned.init(KEY, x, None))()

    def loop(block, variables, x):
        written = []
        for index in range(2):
            own = jax.tree.map(operator.itemgetter(index), variables)
            (x, _), updates = block.apply(own, x, None, mutable=["batch_stats"])
            written.append(updates)
        return x.value, jax.tree.map(lambda *leaves: jnp.stack(leaves), *written)

    def scan(variables, x):
        (y, _), updates = scanned.apply(variables, x, None, mutable=["batch_stats"])
        return y.value, updates

    @functools.partial(jax.jit, static_argnums=0)
    def second_step(run):
        stats = run(variables, x)[1]

        def loss(params):
            y, updates = run({"params": params, **stats}, x)
            return jnp.mean(jnp.sin(y)), updates

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    expected = second_step(functools.partial(loop, Block(rule)))
    for run in (scan, functools.partial(loop, again)):
        chex.assert_trees_all_close(second_step(run), expected, rtol=1e-4, atol=1e-5)
