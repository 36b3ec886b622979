"""The networks by name: their sizes, their states, and every normaliser in them."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import kalman_flax as kf

KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
TINY = {
    "resnet": functools.partial(kf.BottleneckResNet, stage_sizes=(1, 2), width=4),
    "small_inception": kf.SmallInception,
}
#: the same and the full networks, of which only shapes are computed
ALL = TINY | {"resnet50": kf.NETWORKS["resnet50"], "inception_v2": kf.InceptionV2}


def build(network, name="batch", **options):
    return network(**{"num_classes": 3} | options, **kf.normalization(name)._asdict())


def apply(net, variables, images=IMAGES, use_running_average=False):
    """Logits, and what training writes with every layer's output."""
    return net.apply(
        variables,
        images,
        use_running_average,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
        rngs={"transition": KEY},
    )


def shapes(net, images=IMAGES):
    """Of the variables, the logits and what training writes; nothing is computed."""
    images = jax.ShapeDtypeStruct(images.shape, images.dtype)

    def run(images):
        variables = net.init(KEY, images, True)
        return variables, *apply(net, variables, images)

    return jax.eval_shape(run, images)


def count(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def outputs(written):
    """What each layer gave, by path."""
    flat = traverse_util.flatten_dict(written["intermediates"], sep="/")
    end = "/__call__"
    return {path[: -len(end)]: y[0] for path, y in flat.items() if path.endswith(end)}


def drawn(variables, seed=0):
    """As after training: no leaf at its initial value, variances positive."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if leaf.ndim > 1:
            return leaf
        low, high = (0.5, 2.0) if path[-1].key in ("var", "scale") else (-0.5, 0.5)
        return jnp.asarray(rng.uniform(low, high, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, variables)


def small_inception_count():
    """From the table of section 4.3.2, bottom to top; a norm is two per channel."""
    columns = (
        # 1x1, 1x1/3x3, 1x1/5x5, pool/1x1, filters
        (64, (96, 128), (16, 32), 32, 256),
        (128, (128, 192), (32, 96), 64, 480),
        (192, (96, 208), (16, 48), 64, 512),
    )
    total, depth = 3 * 3 * 3 * 32 + 2 * 32, 32
    for one, (three1, three), (five1, five), pool, filters in columns:
        assert one + three + five + pool == filters
        total += depth * (one + three1 + five1 + pool)
        total += 9 * three1 * three + 25 * five1 * five
        total += 2 * (filters + three1 + five1)
        depth = filters
    return total + 512 * 10 + 10


# ResNet-50 and -101: torchvision's models, 25,557,032 and 44,549,160. Inception-v2:
# pretrainedmodels' bninception, 11,295,240 with 10,016 biases that precede a norm.
@pytest.mark.parametrize(
    "name, size, classes, parameters",
    [
        ("resnet32", 32, 10, 464_154),
        ("resnet110", 32, 10, 1_727_962),
        ("small_inception", 32, 10, small_inception_count()),
        ("resnet50", 224, 1000, 25_557_032),
        ("resnet101", 224, 1000, 44_549_160),
        ("inception_v2", 224, 1000, 11_295_240 - 10_016),
    ],
)
def test_sizes(name, size, classes, parameters):
    net = build(kf.NETWORKS[name], num_classes=classes)
    variables, logits, _ = shapes(net, jnp.zeros((2, size, size, 3)))
    assert count(variables) == parameters
    assert (logits.shape, logits.dtype) == ((2, classes), jnp.float32)


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "resnet50",
            {
                "stem": (112, 64),
                "stage1_block1": (56, 256),
                "stage2_block4": (28, 512),
                "stage3_block6": (14, 1024),
                "stage4_block3": (7, 2048),
            },
        ),
        (
            "inception_v2",
            {
                "conv1": (112, 64),
                "conv2": (56, 192),
                "inception_3a": (28, 256),
                "inception_3b": (28, 320),
                "inception_3c": (14, 576),
                "inception_4a": (14, 576),
                "inception_4b": (14, 576),
                "inception_4c": (14, 608),
                "inception_4d": (14, 608),
                "inception_4e": (7, 1056),
                "inception_5a": (7, 1024),
                "inception_5b": (7, 1024),
            },
        ),
    ],
)
def test_maps(name, expected):
    *_, written = shapes(build(ALL[name]), jnp.zeros((1, 224, 224, 3)))
    seen = outputs(written)
    for layer, (size, channels) in expected.items():
        assert seen[layer].value.shape == (1, size, size, channels), layer


def test_small_inception_maps():
    *_, written = shapes(build(kf.SmallInception), jnp.zeros((1, 32, 32, 3)))
    seen = outputs(written)
    names = ("stem", "inception1", "inception2", "inception3")
    assert [seen[name].value.shape[1:] for name in names] == [
        (16, 16, channels) for channels in (32, 256, 480, 512)
    ]


@pytest.mark.parametrize("stride_in_1x1, height", [(False, 4), (True, 2)])
def test_stride_placement(stride_in_1x1, height):
    net = build(TINY["resnet"], stride_in_1x1=stride_in_1x1)
    seen = outputs(shapes(net)[-1])
    assert seen["stage2_block1/conv1"].value.shape[1] == height
    assert seen["stage2_block1/conv2"].value.shape[1] == 2


def test_zero_init_last_scale_starts_blocks_as_their_shortcuts():
    net = build(TINY["resnet"], "kalman", zero_init_last_scale=True)
    variables = net.init(KEY, IMAGES, True)
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    for path, scale in flat.items():
        if path.endswith("/scale"):
            assert jnp.all(scale == (0 if "conv3_norm" in path else 1)), path
    seen = outputs(apply(net, variables)[1])
    block, before = seen["stage2_block2"], seen["stage2_block1"]
    chex.assert_trees_all_close(block.value, before.value)
    chex.assert_tree_all_finite(block.state)


@pytest.mark.parametrize("name", ALL)
def test_no_state_is_lost(name):
    """Every KalmanNorm is told a state, of all its channels; without an input state
    all but the first."""

    def predicted(**options):
        net = build(ALL[name], "kalman").clone(**options)
        *_, written = shapes(net, jnp.zeros((2, 64, 64, 3)))
        flat = traverse_util.flatten_dict(written["intermediates"], sep="/")
        norms = {path[: -len("/observed")] for path in flat if "/observed" in path}
        for norm in norms:
            assert norm.endswith("_norm")
        told = {path[: -len("/predicted")]: s for path, s in flat.items() if
                path.endswith("/predicted")}  # fmt: skip
        for norm, state in told.items():
            assert state.mean.shape == flat[f"{norm}/observed"].mean.shape
        return norms, set(told)

    norms, told = predicted()
    assert len(norms) > 5 and told == norms
    norms, told = predicted(input_state=None)
    first = "conv1_norm" if name == "inception_v2" else "stem_norm"
    assert norms - told == {first}


def test_sum_carries_the_states_of_both_branches():
    net = build(TINY["resnet"], "kalman")
    seen = outputs(apply(net, drawn(net.init(KEY, IMAGES, True)))[1])
    for block, shortcut in (
        ("stage2_block1", "stage2_block1/shortcut_norm"),
        ("stage2_block2", "stage2_block1"),
    ):
        branch = seen[f"{block}/conv3_norm"].state
        expected = kf.predict_relu(kf.predict_sum(branch, seen[shortcut].state))
        chex.assert_trees_all_close(seen[block].state, expected, rtol=1e-5)


def test_concatenation_joins_the_states_of_all_branches():
    net = build(TINY["small_inception"], "kalman")
    seen = outputs(apply(net, drawn(net.init(KEY, IMAGES, True)))[1])
    last = ("branch1_conv1", "branch2_conv2", "branch3_conv2", "pool_conv")
    states = [seen[f"inception2/{name}_norm"].state for name in last]
    expected = kf.predict_relu(kf.predict_concatenate(states))
    chex.assert_trees_all_close(seen["inception2"].state, expected, rtol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_gain_1_is_batch_norm(name):
    batch, kalman = build(TINY[name]), build(TINY[name], "kalman")
    one = kalman.clone(norm=functools.partial(kf.KalmanNorm, gain=1.0))
    variables = drawn(batch.init(KEY, IMAGES, True))

    def run(net):
        logits, written = net.apply(variables, IMAGES, False, mutable=["batch_stats"])
        return logits, written["batch_stats"]

    (expected, stats), (logits, ours) = run(batch.clone(norm=BATCH_NORM)), run(one)
    chex.assert_trees_all_close(logits, expected, rtol=1e-3, atol=1e-4)
    chex.assert_trees_all_close(ours, stats, rtol=1e-3, atol=1e-4)
    assert jnp.abs(run(kalman)[0] - expected).max() > 1e-2


BATCH_NORM = functools.partial(kf.BatchNorm, momentum=0.99)


@pytest.mark.parametrize("norm", kf.NORMALIZERS)
@pytest.mark.parametrize("name", TINY)
def test_every_normalizer(name, norm):
    net = build(TINY[name], norm, dtype=jnp.bfloat16)
    variables, logits, written = shapes(net)
    assert (logits.shape, logits.dtype) == ((2, 3), jnp.float32)
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)
    chex.assert_type(jax.tree.leaves(written.get("batch_stats", {})), jnp.float32)
    seen = outputs(written)
    last = seen["stage2_block2" if name == "resnet" else "inception3"]
    assert last.value.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ALL)
def test_group_kalman_norm_keeps_examples_apart(name):
    """Also where max-pooling observes, and where its branch is joined with others."""
    net = build(ALL[name], "group_kalman")
    *_, written = shapes(net, jnp.zeros((2, 64, 64, 3)))
    for path, y in outputs(written).items():
        if isinstance(y, kf.Signal) and path.endswith("_norm"):
            assert y.state.mean.shape == (2, y.value.shape[-1]), path
    if name not in TINY:
        return
    variables = drawn(net.init(KEY, IMAGES, True))
    together = net.apply(variables, IMAGES, True)
    alone = [net.apply(variables, image[None], True)[0] for image in IMAGES]
    chex.assert_trees_all_close(together, jnp.stack(alone), rtol=1e-3, atol=1e-4)


def test_export_serves_without_the_filter():
    net = build(TINY["resnet"], "kalman_paper_wc")
    variables = drawn(net.init(KEY, IMAGES, True))
    exported = kf.export_batch_norm(net, variables, IMAGES, True)
    plain = build(TINY["resnet"]).clone(norm=BATCH_NORM, conv=nn_conv, input_state=None)
    chex.assert_trees_all_equal_shapes(exported, shapes(plain)[0])
    np.testing.assert_allclose(
        plain.apply(exported, IMAGES, True),
        net.apply(variables, IMAGES, True),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def nn_conv(*args, **kwargs):
    """Flax's own convolution, over the values of Signals."""
    conv = nn.Conv(*args, **kwargs)
    return lambda x: kf.Signal(conv(x.value))
