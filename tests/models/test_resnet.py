"""The ResNet: its size, its dtypes, every normaliser in it, and the scanned form."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from kalman_flax.models.resnet import Block
from tests.reference.plain_resnet import unstack_blocks
from tests.reference.slow import few_quick

KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
LABELS = jnp.array([0, 2])


def tiny(name="kalman", **options):
    options = {"num_classes": 3, "blocks_per_stage": 1, "width": 4} | options
    return kf.models.ResNet(**options, **kf.normalization(name)._asdict())


def step(net, variables):
    """Loss, gradients and new batch_stats of a training step on IMAGES."""

    def loss(params, variables):
        logits, updates = net.apply(
            {**variables, "params": params},
            IMAGES,
            False,
            mutable=["batch_stats"],
            rngs={"transition": KEY},  # for the Monte Carlo one
        )
        log_probability = jax.nn.log_softmax(logits)
        return -jnp.mean(log_probability[jnp.arange(2), LABELS]), (logits, updates)

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return gradient(variables["params"], variables)


def init(net, train=False):
    return jax.jit(lambda: net.init(KEY, IMAGES, not train))()


def infer(net, variables):
    return jax.jit(
        lambda: net.apply(variables, IMAGES, True, rngs={"transition": KEY})
    )()


def shapes(net, images=IMAGES):
    return jax.eval_shape(lambda: net.init(KEY, images, True))


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_size_of_resnet_32():
    """Of the released experiments: n = 5, width 16, batch norm, CIFAR-10."""
    net = kf.models.ResNet(
        10, blocks_per_stage=5, width=16, norm=kf.baselines.BatchNorm
    )
    params = shapes(net, jnp.zeros((1, 32, 32, 3)))["params"]
    convolutions = (
        27 * 16  # stem
        + 10 * 9 * 16 * 16  # stage 1: five blocks of two
        + 9 * 16 * 32 + 9 * 9 * 32 * 32  # stage 2: the first grows
        + 9 * 32 * 64 + 9 * 9 * 64 * 64
    )  # fmt: skip
    # scale and bias; before, between and after convolutions, but not at the first
    # block's input, which the stem has normalised
    norms = 2 * (16 + 9 * 16 + (16 + 9 * 32) + (32 + 9 * 64) + 64)
    head = 64 * 10 + 10
    assert count(params) == convolutions + norms + head == 464_154


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_depth_is_6n_plus_2(blocks):
    params = shapes(tiny(blocks_per_stage=blocks))["params"]
    paths = [path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert paths.count("kernel") == 6 * blocks + 2


def test_learned_gain_and_noise_are_few_parameters():
    """Paper, Table 2: 0.1 % more. One gain per norm, and R per channel."""
    batch, paper = (shapes(tiny(name))["params"] for name in ("batch", "kalman_paper"))
    norms = len(jax.tree.leaves(batch["stem_norm"])) // 2 * 7  # stem, 5 blocks', final
    channels = 4 + 4 + (4 + 8) + (8 + 16) + 16
    assert count(paper) - count(batch) == norms + channels


@pytest.mark.parametrize("name", few_quick(kf.NORMALIZERS, ["kalman", "group"]))
def test_trains_with_every_normaliser(name):
    net = tiny(name)
    variables = init(net, train=True)
    (loss, (logits, updates)), grads = step(net, variables)
    chex.assert_shape(logits, (2, 3))
    chex.assert_tree_all_finite((loss, grads, updates))
    # Every kernel learns, the last layer's bias as well as the stem's.
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        if path[-1].key == "kernel":
            assert jnp.any(grad != 0), jax.tree_util.keystr(path)
    variables = {**variables, **updates}
    params = jax.tree.map(lambda p, g: p - 1e-3 * g, variables["params"], grads)
    after = step(net, {**variables, "params": params})[0][0]
    assert after < loss
    variables = {**variables, "params": params}
    chex.assert_tree_all_finite(infer(net, variables))


@pytest.mark.parametrize("name", ["kalman", "group"])
def test_half_precision_computes_but_keeps_float32(name):
    net = tiny(name, dtype=jnp.bfloat16)
    variables = shapes(net)
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)

    def forward(variables):
        return net.apply(
            variables, IMAGES, False, mutable=["batch_stats", "intermediates"],
            capture_intermediates=True,
        )  # fmt: skip

    logits, updates = jax.eval_shape(forward, variables)
    assert logits.dtype == jnp.float32
    chex.assert_type(jax.tree.leaves(updates.get("batch_stats", {})), jnp.float32)
    for block in (1, 2, 3):
        seen = updates["intermediates"][f"stage{block}_block1"]["__call__"][0]
        assert seen.value.dtype == jnp.bfloat16, f"stage {block}"
        chex.assert_type(jax.tree.leaves(seen.state), jnp.float32)


@pytest.mark.parametrize(
    "name", few_quick(["group_kalman", "kalman_mc", "moving_average"], ["kalman_mc"])
)
def test_remat_takes_the_same_step(name):
    net = tiny(name)
    variables = init(net, train=True)
    expected, actual = (step(n, variables) for n in (net, net.clone(remat=True)))
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_images_may_bring_their_own_state():
    net = tiny("kalman")
    variables = init(net, train=True)

    def logits(net, images):
        return net.apply(variables, images, False, mutable=["batch_stats"])[0]

    standard = logits(net, IMAGES)
    given = kf.Signal(IMAGES, kf.KalmanState(0.0, 1.0))
    chex.assert_trees_all_equal(logits(net, given), standard)
    chex.assert_trees_all_equal(logits(net.clone(input_state=None), given), standard)
    unknown = logits(net.clone(input_state=None), IMAGES)
    assert jnp.abs(unknown - standard).max() > 1e-3
    other = kf.Signal(IMAGES, kf.KalmanState(0.0, 3.0))
    assert jnp.abs(logits(net, other) - standard).max() > 1e-3


def original_resnet(variables, x):
    """He et al. (2015), section 4.2, n = 1, by running statistics, with plain JAX."""

    def conv_norm(tree, x, conv, norm, strides=1):
        params, stats = (variables[c] for c in ("params", "batch_stats"))
        for name in tree:
            params, stats = params[name], stats[name]
        y = jax.lax.conv_general_dilated(
            x, params[conv]["kernel"], (strides,) * 2, "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        y = (y - stats[norm]["mean"]) / jnp.sqrt(stats[norm]["var"] + 1e-5)
        return y * params[norm]["scale"] + params[norm]["bias"]

    x = jnp.maximum(conv_norm((), x, "stem", "stem_norm"), 0)
    for stage in (1, 2, 3):
        block, strides = (f"stage{stage}_block1",), 1 if stage == 1 else 2
        y = jnp.maximum(conv_norm(block, x, "conv1", "norm1", strides), 0)
        y = conv_norm(block, y, "conv2", "norm2")
        extra = y.shape[-1] - x.shape[-1]
        shortcut = x[:, ::strides, ::strides]
        pad = (extra // 2, extra - extra // 2)
        x = jnp.maximum(y + jnp.pad(shortcut, [(0, 0)] * 3 + [pad]), 0)
    head = variables["params"]["head"]
    return x.mean((1, 2)) @ head["kernel"] + head["bias"]


def test_original_resnet():
    net = tiny(pre_activation=False)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.2, 1, leaf.shape), jnp.float32),
        shapes(net),
    )
    np.testing.assert_allclose(
        infer(net, variables),
        jax.jit(original_resnet)(variables, IMAGES),
        rtol=1e-3,
    )


class OneStage(kf.models.ResNet):
    """The first stage alone: a third to trace and to compile."""

    def _features(self, x, layers):
        block = functools.partial(Block, self.width, **layers._asdict())
        x = layers.conv(self.width, (3, 3), name="stem")(x)
        x = block(name="stage1_block1")(x)
        return self._rest_of_stage(block, 1, x)


@pytest.mark.parametrize("network, name, original", [
    (OneStage, "kalman_paper", False),
    pytest.param(kf.models.ResNet, "kalman_paper", False, marks=pytest.mark.slow),
    pytest.param(kf.models.ResNet, "group", True, marks=pytest.mark.slow),
])  # fmt: skip
def test_scan_over_blocks_is_the_loop(network, name, original):
    options = {"blocks_per_stage": 3, "width": 4, "pre_activation": not original}
    options |= kf.normalization(name)._asdict()
    scanned, looped = (network(3, scan=scan, **options) for scan in (True, False))
    stacked = init(scanned)
    # Apart, so that a mixed-up order of blocks shows.
    first = stacked["params"]["stage1_blocks"]["conv1"]["kernel"]
    assert jnp.abs(first[0] - first[1]).max() > 1e-2
    variables = {name: unstack_blocks(tree) for name, tree in stacked.items()}
    chex.assert_trees_all_equal_shapes(shapes(looped), variables)

    def run(net, variables):
        (loss, (logits, updates)), grads = step(net, variables)
        return loss, logits, grads, updates.get("batch_stats", {})

    loss, logits, grads, stats = run(scanned, stacked)
    actual = loss, logits, unstack_blocks(grads), unstack_blocks(stats)
    chex.assert_trees_all_close(actual, run(looped, variables), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        infer(scanned, stacked), infer(looped, variables), rtol=1e-4, atol=1e-5
    )
