"""The normaliser-free ResNet: its equations, its size, and the variance it keeps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import kalman_flax as kf
from kalman_flax.models import NFResNet
from tests.baselines.test_scaled_weight_norm import equation

KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
TINY = {"num_classes": 3, "blocks_per_stage": 2, "width": 4}


def shapes(net, images=IMAGES):
    return jax.eval_shape(lambda: net.init(KEY, images, True))


def drawn(net):
    """Parameters as after training: none at its initial value."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.5, 0.5, leaf.shape), jnp.float32),
        shapes(net),
    )


def test_is_what_its_name_gives():
    """By itself, and with the normaliser that the trainer is told."""
    entry = kf.normalization("normalizer_free")
    named = kf.NETWORKS["nf_resnet"](**TINY, **entry._asdict())
    net = NFResNet(**TINY)
    variables = drawn(net)
    assert set(variables) == {"params"}
    chex.assert_trees_all_equal_shapes(shapes(named), variables)
    chex.assert_trees_all_close(
        named.apply(variables, IMAGES, False), net.apply(variables, IMAGES, True)
    )


@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_depth_is_6n_plus_2_and_two_projections(blocks):
    flat = traverse_util.flatten_dict(
        shapes(NFResNet(**TINY | {"blocks_per_stage": blocks}))["params"], sep="/"
    )
    kernels = [path for path in flat if path.endswith("kernel")]
    projections = [path for path in kernels if "shortcut" in path]
    assert len(kernels) - len(projections) == 6 * blocks + 2
    assert projections == [f"stage{s}_block1/shortcut/kernel" for s in (2, 3)]
    # A gain and a bias for each convolution, a scalar for each block.
    ends = [path.rpartition("/")[2] for path in flat]
    assert ends.count("gain") == ends.count("bias") - 1 == len(kernels) - 1
    assert ends.count("skip_gain") == 3 * blocks


def convolve(x, params, stride=1):
    """Zero padding by half the kernel, in float64."""
    kernel = equation(params["kernel"], params["kernel_map"]["gain"])
    size = len(kernel)
    around = size // 2
    x = np.pad(x, [(0, 0), (around, around), (around, around), (0, 0)])
    rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
    y = np.empty((len(x), rows, columns, kernel.shape[-1]))
    for i, j in np.ndindex(rows, columns):
        window = x[:, stride * i : stride * i + size, stride * j : stride * j + size]
        y[:, i, j] = np.einsum("nhwc,hwcd->nd", window, kernel)
    return y


def activate(x):
    return np.maximum(x, 0) * np.sqrt(2 / (1 - 1 / np.pi))


def reference(params, x, alpha):
    """The network of TINY from the equations."""

    def layer(block, name, x, stride=1):
        return convolve(x, block[name], stride) + block[f"{name}_norm"]["bias"]

    x = layer(params, "stem", x)
    std = 1.0
    for stage in (1, 2, 3):
        for index in (1, 2):
            block = params[f"stage{stage}_block{index}"]
            stride = 2 if stage > 1 and index == 1 else 1
            o = activate(x) / std
            x = layer(block, "shortcut", o, stride) if stride == 2 else x
            y = activate(layer(block, "conv1", o, stride))
            x = x + alpha * block["skip_gain"] * layer(block, "conv2", y)
            std = np.sqrt((1.0 if index == 1 else std**2) + alpha**2)
    pooled = activate(x).mean((1, 2))
    return pooled @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize("alpha", [0.2, 0.7])
def test_equations(alpha):
    net = NFResNet(**TINY, alpha=alpha)
    variables = drawn(net)
    params = jax.tree.map(np.float64, variables["params"])
    expected = reference(params, np.float64(IMAGES), alpha)
    logits = net.apply(variables, IMAGES, False)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_blocks_start_as_their_shortcuts():
    net = NFResNet(**TINY)
    variables = net.init(KEY, IMAGES, True)
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    moved = {path: leaf for path, leaf in flat.items() if "/conv" in path}
    moved = flat | {path: leaf + 1.0 for path, leaf in moved.items()}
    moved = {"params": traverse_util.unflatten_dict(moved, sep="/")}
    assert {float(v) for path, v in flat.items() if path.endswith("skip_gain")} == {0.0}
    chex.assert_trees_all_equal(
        *(net.apply(v, IMAGES, True) for v in (variables, moved))
    )


def test_variance_is_what_the_blocks_expect():
    """With skip gains of 1: what enters a block has the variance it divides by, in the
    maps of wide random networks and, of itself, in the filter's prediction."""
    net = NFResNet(10, blocks_per_stage=3, width=96, alpha=0.6)
    images = jax.random.normal(KEY, (2, 24, 24, 16))

    @jax.jit
    def forward(key):
        params = net.init(key, images, True)["params"]
        flat = traverse_util.flatten_dict(params)
        ones = {p: jnp.ones(()) for p in flat if p[-1] == "skip_gain"}
        params = traverse_util.unflatten_dict(flat | ones)
        capture = {"capture_intermediates": True, "mutable": ["intermediates"]}
        _, written = net.apply({"params": params}, images, True, **capture)
        return {
            name: (jnp.mean(jnp.var(y.value, (0, 1, 2))), jnp.mean(y.state.var))
            for name, value in written["intermediates"].items()
            if name.startswith("stage")
            for y in value["__call__"]
        }

    seen = forward(KEY)
    for stage in (1, 2, 3):
        for index in (1, 2, 3):
            expected = 1 + index * 0.6**2
            observed, predicted = seen[f"stage{stage}_block{index}"]
            # Zeros at the border take some of it, as they do from the prediction.
            np.testing.assert_allclose(observed / expected, 1.0, atol=0.25)
            np.testing.assert_allclose(observed / predicted, 1.0, atol=0.15)


@pytest.mark.slow
def test_gradients_and_half_precision():
    net = NFResNet(**TINY | {"blocks_per_stage": 1}, dtype=jnp.bfloat16, remat=True)
    variables = net.init(KEY, IMAGES, True)
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)

    def loss(params):
        logits = net.apply({"params": params}, IMAGES, False)
        assert logits.dtype == jnp.float32
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[:, 0])

    grads = traverse_util.flatten_dict(jax.grad(loss)(variables["params"]), sep="/")
    chex.assert_tree_all_finite(grads)
    # At first only the skip gains of blocks learn, not what is behind them.
    still = [path for path, g in grads.items() if not np.any(g)]
    assert still and all("/conv" in path for path in still)
