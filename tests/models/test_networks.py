"""The networks by name: their sizes, their states, and every normaliser in them."""

import functools
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import kalman_flax as kf
from kalman_flax.models.bottleneck_resnet import Bottleneck
from kalman_flax.models.inception import Inception
from kalman_flax.models.network import Layers
from tests.reference.slow import few_quick

KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
TINY = {
    "resnet": functools.partial(
        kf.models.BottleneckResNet, stage_sizes=(1, 2), width=4
    ),
    "small_inception": kf.models.SmallInception,
}
#: of which only shapes are computed
FULL = {"resnet50": kf.NETWORKS["resnet50"], "inception_v2": kf.models.InceptionV2}


def build(network, name="batch", **options):
    return network(**{"num_classes": 3} | options, **kf.normalization(name)._asdict())


def apply(net, variables, *args):
    """The output, and what training writes with every layer's output."""
    return net.apply(
        variables,
        *args,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
        rngs={"transition": KEY},
    )


def shapes(net, images=IMAGES):
    """Logits and variables with every layer's output; nothing is computed."""
    images = jax.ShapeDtypeStruct(images.shape, images.dtype)
    init = functools.partial(
        net.init_with_output, mutable=True, capture_intermediates=True
    )
    return jax.eval_shape(lambda images: init(KEY, images, False), images)


def count(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def outputs(written):
    """What each layer gave, by path."""
    flat = traverse_util.flatten_dict(written["intermediates"], sep="/")
    end = "/__call__"
    # Last, for a layer calls Flax's of the same name for its value.
    return {path[: -len(end)]: y[-1] for path, y in flat.items() if path.endswith(end)}


def drawn(net, *args):
    """Variables as after training: none at its initial value, variances positive."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if leaf.ndim > 1:
            std = np.sqrt(2 / np.prod(leaf.shape[:-1]))
            return jnp.asarray(rng.normal(0, std, leaf.shape), leaf.dtype)
        low, high = (0.5, 2.0) if path[-1].key in ("var", "scale") else (-0.5, 0.5)
        return jnp.asarray(rng.uniform(low, high, leaf.shape), leaf.dtype)

    expected = jax.eval_shape(lambda: net.init(KEY, *args))
    return jax.tree_util.tree_map_with_path(draw, expected)


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
        pytest.param("resnet110", 32, 10, 1_727_962, marks=pytest.mark.slow),
        pytest.param("resnet32_v1", 32, 10, 464_154, marks=pytest.mark.slow),
        ("small_inception", 32, 10, small_inception_count()),
        ("resnet50", 224, 1000, 25_557_032),
        pytest.param("resnet101", 224, 1000, 44_549_160, marks=pytest.mark.slow),
        ("inception_v2", 224, 1000, 11_295_240 - 10_016),
    ],
)
def test_sizes(name, size, classes, parameters):
    net = build(kf.NETWORKS[name], num_classes=classes)
    logits, variables = jax.eval_shape(
        lambda: net.init_with_output(KEY, jnp.zeros((2, size, size, 3)), True)
    )
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
    _, written = shapes(build(FULL[name]), jnp.zeros((1, 224, 224, 3)))
    seen = outputs(written)
    for layer, (size, channels) in expected.items():
        assert seen[layer].value.shape == (1, size, size, channels), layer


def test_small_inception_maps():
    _, written = shapes(build(kf.models.SmallInception), jnp.zeros((1, 32, 32, 3)))
    seen = outputs(written)
    names = ("stem", "inception1", "inception2", "inception3")
    assert [seen[name].value.shape[1:] for name in names] == [
        (16, 16, channels) for channels in (32, 256, 480, 512)
    ]


@pytest.mark.parametrize("stride_in_1x1, height", [(False, 4), (True, 2)])
def test_stride_placement(stride_in_1x1, height):
    net = build(TINY["resnet"], stride_in_1x1=stride_in_1x1)
    seen = outputs(shapes(net)[1])
    assert seen["stage2_block1/conv1"].value.shape[1] == height
    assert seen["stage2_block1/conv2"].value.shape[1] == 2


X = kf.Signal(
    jax.random.normal(KEY, (2, 4, 4, 8)),
    kf.KalmanState(jnp.linspace(-1, 1, 8), jnp.linspace(0.5, 2, 8)),
)


def layers(name="kalman"):
    entry = kf.normalization(name)
    norm = functools.partial(entry.norm, use_running_average=False)
    return Layers(norm, functools.partial(entry.conv, use_bias=False), entry.activation)


def bottleneck(name="kalman", **options):
    return Bottleneck(2, layers(name), **options)


def inception(name="kalman", **options):
    branches = (((1, 4),), ((1, 2), (3, 6)))
    return Inception(branches, kf.max_pool, layers=layers(name), **options)


def test_zero_init_last_scale_starts_a_block_as_its_shortcut():
    block = bottleneck(zero_init_last_scale=True)
    variables = jax.jit(block.init)(KEY, X)
    for path, leaf in traverse_util.flatten_dict(variables["params"], sep="/").items():
        if path.endswith("/scale"):
            assert jnp.all(leaf == (0 if path == "conv3_norm/scale" else 1)), path
    y, _ = apply(block, variables, X)
    chex.assert_trees_all_close(y, kf.relu(X))
    net = build(TINY["resnet"], "weight", zero_init_last_scale=True)
    with pytest.raises(TypeError, match="scale_init"):  # it has no scale
        jax.eval_shape(lambda: net.init(KEY, IMAGES, True))


@pytest.mark.parametrize("name", [*TINY, "inception_v2"])
def test_no_state_is_lost(name):
    """Every KalmanNorm is told a state, of all its channels; without an input state
    all but the first."""

    def predicted(**options):
        net = build((TINY | FULL)[name], "kalman").clone(**options)
        _, written = shapes(net, jnp.zeros((2, 64, 64, 3)))
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


@pytest.mark.parametrize("strides", [1, 2])
def test_sum_carries_the_states_of_both_branches(strides):
    block = bottleneck(strides=strides)
    y, written = apply(block, drawn(block, X), X)
    seen = outputs(written)
    shortcut = X if strides == 1 else seen["shortcut_norm"]
    expected = kf.filter.predict_sum(seen["conv3_norm"].state, shortcut.state)
    chex.assert_trees_all_close(y.state, kf.filter.predict_relu(expected), rtol=1e-5)


@pytest.mark.parametrize("strides, projection", [(1, 4), (2, 0)])
def test_concatenation_joins_the_states_of_all_branches(strides, projection):
    module = inception(strides=strides, projection=projection)
    y, written = apply(module, drawn(module, X), X)
    seen = outputs(written)
    pooled = kf.max_pool(X, (3, 3), (2, 2), "SAME")
    branches = [
        kf.relu(seen["branch1_conv1_norm"]),
        kf.relu(seen["branch2_conv2_norm"]),
        kf.relu(seen["pool_conv_norm"]) if projection else pooled,
    ]
    chex.assert_trees_all_close(y, kf.concatenate(branches), rtol=1e-5)


def test_gain_1_is_batch_norm():
    """The whole of a ResNet, and a module of an Inception."""
    one = functools.partial(kf.KalmanNorm, gain=1.0)
    net, module = build(TINY["resnet"], "kalman"), inception(projection=4)
    in_module = functools.partial(one, use_running_average=False)
    for kalman, gain_1, batch, args in (
        (net, net.clone(norm=one), build(TINY["resnet"]), (IMAGES, False)),
        (
            module,
            module.clone(layers=module.layers._replace(norm=in_module)),
            inception("batch", projection=4),
            (X,),
        ),
    ):
        variables = drawn(batch, *args)
        ours, expected, other = (
            jax.jit(lambda v: n.apply(v, *args, mutable=["batch_stats"]))(variables)  # noqa: B023
            for n in (gain_1, batch, kalman)
        )
        values, stats = (jax.tree.leaves(ours[k]) for k in (0, 1))
        close = functools.partial(chex.assert_trees_all_close, rtol=1e-3, atol=1e-4)
        close(values[0], jax.tree.leaves(expected[0])[0])
        close(stats, jax.tree.leaves(expected[1]))
        assert jnp.abs(jax.tree.leaves(other[0])[0] - values[0]).max() > 1e-2


@pytest.mark.parametrize("norm", few_quick(kf.NORMALIZERS))
@pytest.mark.parametrize("name", TINY)
def test_every_normalizer(name, norm):
    net = build(TINY[name], norm, dtype=jnp.bfloat16)
    logits, variables = shapes(net)
    assert (logits.shape, logits.dtype) == ((2, 3), jnp.float32)
    written = variables.pop("intermediates")
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)
    seen = outputs({"intermediates": written})
    last = seen["stage2_block2" if name == "resnet" else "inception3"]
    assert last.value.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", TINY)
def test_remat_is_of_every_block(name):
    net = build(TINY[name], "kalman")
    again = net.clone(remat=True)
    (_, expected), (_, actual) = shapes(net), shapes(again)
    chex.assert_trees_all_equal_shapes(actual, expected)

    def blocks(net):
        jaxpr = jax.make_jaxpr(lambda v: net.apply(v, IMAGES, True))(actual)
        return len(re.findall(r"\b(remat2|checkpoint)\[", str(jaxpr)))

    assert (blocks(net), blocks(again)) == (0, 3)


def test_group_kalman_norm_keeps_examples_apart():
    """Where max-pooling observes, and what it observes is joined with other states."""
    module = inception("group_kalman", strides=2, projection=0)
    norm = functools.partial(kf.GroupKalmanNorm, 2)
    module = module.clone(layers=module.layers._replace(norm=norm))
    x = X.replace(state=kf.filter.observe(X.value, "instance"))
    value = X.value.at[1].multiply(3.0)
    other = kf.Signal(value, kf.filter.observe(value, "instance"))
    variables = drawn(module, x)
    before, after = (jax.jit(module.apply)(variables, y) for y in (x, other))
    assert before.state.mean.shape == (2, before.value.shape[-1])
    first = [jax.tree.map(lambda leaf: leaf[0], y) for y in (before, after)]
    chex.assert_trees_all_close(*first, rtol=1e-5, atol=1e-6)
    assert jnp.abs(before.state.mean[1] - after.state.mean[1]).max() > 1e-3


def test_export_serves_without_the_filter():
    net = build(TINY["resnet"], "kalman_paper_wc")
    variables = drawn(net, IMAGES, True)
    exported = kf.export_batch_norm(net, variables, IMAGES, True)
    plain = build(TINY["resnet"]).clone(conv=nn_conv, input_state=None)
    expected = jax.eval_shape(lambda: plain.init(KEY, IMAGES, True))
    chex.assert_trees_all_equal_shapes(exported, expected)
    np.testing.assert_allclose(
        jax.jit(lambda: plain.apply(exported, IMAGES, True))(),
        jax.jit(lambda: net.apply(variables, IMAGES, True))(),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def nn_conv(*args, **kwargs):
    """Flax's own convolution, over the values of Signals."""
    conv = nn.Conv(*args, **kwargs)
    return lambda x: kf.Signal(conv(x.value))
