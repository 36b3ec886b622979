"""Signals on a padded canvas: the valid part is what the map without the canvas gives.

The oracle is the same network on the map alone. The padding holds NaN, which must reach
no value, no statistic and no gradient.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from kalman_flax import KalmanState, Signal
from kalman_flax._filter import convolution
from tests.reference.slow import few_quick

MAP, CANVAS = (13, 11), (20, 16)
STATE = KalmanState(0.0, 1.0)
close = functools.partial(
    jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
)


def on_canvas(x, canvas=CANVAS):
    """`x` ``[N, h, w, C]`` in the corner of a canvas of NaN, and where it is valid."""
    pads = [(0, 0), *((0, c - n) for c, n in zip(canvas, x.shape[1:3])), (0, 0)]
    valid = np.pad(np.ones((*x.shape[:3], 1), bool), pads)
    return np.pad(x, pads, constant_values=np.nan), valid


def image(shape=(2, *MAP, 3), seed=0):
    return np.random.default_rng(seed).normal(0.5, 1.0, shape).astype(np.float32)


def crop(y, like):
    """What is valid of `y`, which is to be of the size of `like`; elsewhere it is 0."""
    h, w = like.shape[1:3]
    np.testing.assert_array_equal(y.valid[:, :h, :w], True)
    assert np.sum(y.valid) == np.prod(like.shape[:3])
    assert np.all(np.where(y.valid, 0, y.value) == 0)
    return y.value[:, :h, :w]


def no_border(axes):
    """In place of `convolution._over_positions`: as if each tap saw the map always."""
    taps = math.prod(axis.taps for axis in axes)
    return np.ones(taps), np.zeros((taps, taps))


class Net(nn.Module):
    """Strides, both pools, a shortcut, a concatenation, and up again."""

    norm: str

    @nn.compact
    def __call__(self, x):
        entry = kf.normalization(self.norm, momentum=0.5)

        def unit(x, features, **options):
            x = entry.conv(features, (3, 3), padding=1, use_bias=False, **options)(x)
            return kf.relu(entry.norm(use_running_average=False)(x))

        skip = unit(x, 4)
        x = kf.max_pool(skip, (3, 3), (2, 2), ((1, 1), (1, 1)))
        y = unit(x, 4, strides=2) + entry.conv(4, (1, 1), strides=2)(x) * 0.5
        up = kf.resize(y, (*y.shape[:1], 4 * y.shape[1], 4 * y.shape[2], 4), "nearest")
        up = up[:, : skip.shape[1], : skip.shape[2]]
        maps = kf.concatenate([kf.avg_pool(skip, (3, 3), padding="SAME"), up])
        return kf.Dense(2)(maps), kf.global_avg_pool(y).value


@pytest.mark.parametrize(
    "norm", few_quick(("batch", "group", "group_kalman", "kalman_wc"), ("kalman_wc",))
)
def test_a_network_on_a_canvas(norm, monkeypatch):
    """Values, running statistics and gradients. The share of the border, which KN has
    of the canvas, is left out here, and has a test of its own."""

    monkeypatch.setattr(convolution, "_over_positions", no_border)
    x, net = image(), Net(norm)
    padded, valid = on_canvas(x)
    variables = jax.jit(net.init)(jax.random.key(0), Signal(x, STATE))
    weights = np.random.default_rng(1).normal(size=(*x.shape[:3], 2))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(params, value, valid):
        given = variables | {"params": params}
        signal = Signal(value, STATE, valid)
        (maps, pooled), stats = net.apply(given, signal, mutable=["batch_stats"])
        # Where the map without the canvas ends, so that both losses are one sum.
        cut = maps.value[:, : MAP[0], : MAP[1]]
        loss = jnp.mean(weights * jnp.square(cut)) + jnp.sum(jnp.sin(pooled))
        return loss, (maps, pooled, stats)

    (_, expected), (grads, grad) = run(variables["params"], x, None)
    (_, found), (found_grads, found_grad) = run(variables["params"], padded, valid)
    close(crop(found[0], expected[0]), expected[0].value)
    close(found[1:], expected[1:])
    close(found_grads, grads)
    close(found_grad[:, : MAP[0], : MAP[1]], grad)
    assert not np.where(valid, 0, found_grad).any()  # nor NaN


def test_the_share_of_the_border_is_that_of_the_canvas():
    """A state of mean 1, by a kernel of ones: of 9 taps fewer see the map at a border,
    which a larger canvas has less of."""
    conv = kf.Conv(1, (3, 3), kernel_init=nn.initializers.ones)
    errors = []
    for size in (8, 16, 32):
        x = image((1, size, size, 1))
        padded, valid = on_canvas(x, (size + size // 4,) * 2)
        signals = Signal(x, STATE), Signal(padded, STATE, valid)
        variables = conv.init(jax.random.key(0), signals[0])
        (_, mine), (_, whole) = (conv.apply(variables, s).state for s in signals)
        errors.append(float(abs(mine[0] / whole[0] - 1)))
    assert 0 < errors[2] < 0.6 * errors[1] < 0.6 * errors[0] < 0.1


def norms():
    left_out = "online", "moving_average", "cross_iteration", "kalman_mc"
    return [name for name in kf.NORMALIZERS if name not in left_out]


@pytest.mark.parametrize("name", norms())
def test_every_normaliser_leaves_the_canvas_out(name):
    """Of a second image nothing is valid, as of a slot that is not filled."""
    x = image((2, 4, 3, 8))
    padded, valid = on_canvas(x, (5, 5))
    norm = kf.normalization(name).norm(use_running_average=False)
    variables = norm.init(jax.random.key(0), Signal(x))
    one = np.concatenate([padded[:1], padded[:1]]), valid & [[[[True]]], [[[False]]]]

    def run(value, valid=None):
        y, stats = norm.apply(
            variables, Signal(value, None, valid), mutable=["batch_stats"]
        )
        return y, stats

    for given, alone in (((padded, valid), x), (one, x[:1])):
        (y, stats), (expected, expected_stats) = run(*given), run(alone)
        close(y.value[: len(alone), :4, :3], expected.value)
        close(stats, expected_stats)
        assert y.valid is not None and not np.where(given[1], 0, y.value).any()


@pytest.mark.parametrize("name", ["online", "moving_average", "cross_iteration"])
def test_what_cannot_leave_it_out_says_so(name):
    entry = kf.normalization(name)
    signal = Signal(*(image((2, 4, 3, 8)), None, np.ones((2, 4, 3, 1), bool)))
    with pytest.raises(ValueError, match="valid in places, but cannot"):
        entry.norm(use_running_average=False).init(jax.random.key(0), signal)


@pytest.mark.parametrize("padding", ["SAME", "VALID", 1, ((2, 0), (3, 1))])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: kf.Conv(2, (3, 2), padding=p),
        lambda p: kf.Conv(2, (3, 3), (2, 1), padding=p, kernel_dilation=(1, 2)),
        lambda p: kf.ConvTranspose(2, (3, 2), (2, 2), padding=p),
        lambda p: lambda x: kf.avg_pool(x, (2, 2), (2, 2), _pairs(p), False),
        lambda p: lambda x: kf.max_pool(x, (3, 2), (1, 2), _pairs(p)),
    ],
)
def test_where_the_output_of_a_window_is_valid(make, padding):
    layer = make(padding)
    x = image((1, 7, 5, 2))
    padded, valid = on_canvas(x, (13, 11))  # odd as the map is: "SAME" looks alike
    if isinstance(layer, nn.Module):
        layer = layer.bind(layer.init(jax.random.key(0), x))
    expected, found = layer(Signal(x)), layer(Signal(padded, None, valid))
    close(crop(found, expected), expected.value)


def _pairs(padding):
    """For pools, of windows that all see something."""
    return padding if isinstance(padding, str) else ((1, 1), (0, 1))


def test_windows_of_padding_alone():
    """Of what is around the map, and of the canvas: no maximum, no NaN."""
    x = jnp.asarray(image((1, 4, 4, 2)))

    def pooled_var(x, valid=None, pads=((2, 0), (0, 0))):
        pooled = kf.max_pool(Signal(x, None, valid), (2, 2), (2, 2), pads)
        return jnp.sum(pooled.state.var), pooled

    for given in (x,), (x, jnp.arange(4)[None, :, None, None] < 2):
        (var, pooled), grad = jax.value_and_grad(pooled_var, has_aux=True)(*given)
        assert np.isfinite(grad).all() and np.any(grad)
        rows = np.asarray(pooled.value[:, 1 : 3 if len(given) == 1 else 2], np.float64)
        np.testing.assert_allclose(var, rows.var((0, 1, 2)).sum(), rtol=1e-5)
    assert not pooled.value[:, [0, 2]].any() and not pooled.valid[:, [0, 2]].any()


def test_two_signals_together():
    a, b = np.zeros((2, 1, 3, 1), bool), np.ones((1, 1, 3, 1), bool)
    b[..., 2, :] = False
    x = image((1, 1, 3, 2))
    a = a[:1] | [[[[True], [False], [True]]]]
    mine, yours, plain = Signal(x, None, a), Signal(x, None, b), Signal(x)
    for together in (mine + yours, mine / yours, kf.concatenate([mine, yours])):
        np.testing.assert_array_equal(together.valid, a & b)
        assert np.isfinite(together.value).all()
    for alone in (
        mine * plain,
        plain - mine,
        1.0 / mine,
        mine + 1.0,
        mine.astype("f2"),
    ):
        np.testing.assert_array_equal(alone.valid, a)
        assert np.isfinite(alone.value).all() and not alone.value[~a[..., 0]].any()
    below = kf.concatenate([mine, plain], axis=1)
    np.testing.assert_array_equal(below.valid, np.concatenate([a, a | True], 1))
    with pytest.raises(ValueError, match="valid at different positions"):
        mine + Signal(x[:, :, :1], None, b[:, :, :1])


def test_the_mean_is_of_what_is_valid():
    x, valid = image((3, 4, 5, 2)), np.zeros((3, 4, 5, 1), bool)
    valid[0, :2, :3] = valid[1, 3, 4] = True
    pooled = kf.global_avg_pool(Signal(x, STATE, valid))
    expected = [x[0, :2, :3].mean((0, 1)), x[1, 3, 4], [0, 0]]
    np.testing.assert_allclose(pooled.value, expected, rtol=1e-5)
    assert pooled.valid is None
    dropped = kf.Dropout(0.5, deterministic=False)
    signal = Signal(x, STATE, valid)
    y = dropped.apply({}, signal, rngs={"dropout": jax.random.key(0)})
    assert y.valid is signal.valid


def test_shapes_and_what_cannot_be():
    x, valid = image((2, 3, 4, 2)), np.arange(4)[:, None] < [[3]]
    signal = Signal(x, STATE, valid)
    assert signal.valid.shape == (2, 3, 4, 1)
    np.testing.assert_array_equal(
        signal.reshape(-1, 2).value, signal.value.reshape(-1, 2)
    )
    np.testing.assert_array_equal(
        signal.reshape(6, 4, 2).valid, signal.valid.reshape(6, 4, 1)
    )
    np.testing.assert_array_equal(
        signal[1:, ..., 2:, :1].valid, signal.valid[1:, :, 2:]
    )
    doubled = jax.jit(lambda s: jax.vmap(lambda x: x + x)(s))(signal)
    np.testing.assert_array_equal(doubled.valid, signal.valid)
    for what, message in (
        (lambda: Signal(x, None, np.ones((2, 3, 4), bool)), "valid is bool of shape"),
        (lambda: Signal(x, None, np.ones((2, 3, 4, 1))), "valid is float32 of shape"),
        (lambda: signal.reshape(2, -1), r"reshape\(2, -1\) mixes channels"),
        (lambda: signal[..., 0], "mixes channels with positions"),
        (lambda: kf.resize(signal, (2, 6, 8, 2), "linear"), "mixes what is valid"),
        (
            lambda: kf.Conv(2, (3, 3), padding="CIRCULAR").init(
                jax.random.key(0), signal
            ),
            "from the end of the canvas",
        ),
        (
            lambda: kf.KalmanNorm(False, axis=1).init(jax.random.key(0), signal),
            "has its channels last",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            what()
