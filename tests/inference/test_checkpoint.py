"""Batch-norm checkpoints load; trained networks run in plain Flax."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import kalman_flax as kf
from tests.reference.plain_resnet import PlainResNet, unstack_blocks

KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
SIZE = {"num_classes": 3, "blocks_per_stage": 2, "width": 4}


def resnet(name, scan=False, **options):
    norm = kf.normalization(name, **options)
    return kf.models.ResNet(**SIZE, scan=scan, **norm._asdict())


def variables_of(net, seed=0):
    """As after training: no leaf at its initial value, variances positive."""
    shapes = jax.eval_shape(lambda: net.init(KEY, IMAGES, True))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key == "var":
            return jnp.asarray(rng.uniform(0.5, 2.0, leaf.shape), leaf.dtype)
        std = 1 / np.sqrt(np.prod(leaf.shape[-4:-1])) if leaf.ndim > 1 else 0.5
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(centre, std, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def assert_same_logits(plain, plain_variables, net, variables):
    expected = net.apply(variables, IMAGES, True)
    actual = plain.apply(plain_variables, IMAGES, True)
    # Standardised kernels let activations grow.
    np.testing.assert_allclose(actual, expected, atol=1e-5 * jnp.abs(expected).max())


def flat(variables):
    return traverse_util.flatten_dict(variables, sep="/")


@pytest.mark.parametrize("name, options, own", [
    ("kalman", {}, set()),
    ("kalman", {"decay_steps": 9}, {"steps"}),
    ("kalman_paper", {}, {"gain", "noise"}),
])  # fmt: skip
def test_load_takes_all_but_what_is_the_filters(name, options, own):
    plain, net = PlainResNet(**SIZE), resnet(name, **options)
    checkpoint = variables_of(plain)
    fresh = variables_of(net, seed=1)
    before = flat(fresh)
    loaded = kf.load_batch_norm(fresh, checkpoint)
    assert jax.tree.structure(loaded) == jax.tree.structure(fresh)
    kept = {path.split("/")[-1] for path in set(before) - set(flat(checkpoint))}
    assert kept == own
    for path, leaf in flat(loaded).items():
        source = flat(checkpoint).get(path, before[path])
        np.testing.assert_array_equal(leaf, source, err_msg=path)
    assert_same_logits(plain, checkpoint, net, loaded)


def test_a_kernel_map_that_changes_the_checkpoint_is_refused():
    net, fresh = (resnet("kalman_wc"), variables_of(resnet("kalman_wc")))
    checkpoint = variables_of(PlainResNet(**SIZE), seed=1)
    with pytest.raises(ValueError, match="kernel_map changes") as error:
        kf.load_batch_norm(fresh, checkpoint, net, IMAGES, True)
    assert "params/stage3_block2/conv2/kernel" in str(error.value)
    kf.load_batch_norm(fresh, checkpoint)  # if that is meant
    kf.load_batch_norm(fresh, checkpoint, resnet("kalman"), IMAGES, True)
    # Kernels that are centred already stay as they are.
    centred = kf.export_batch_norm(net, fresh, IMAGES, use_running_average=True)
    kf.load_batch_norm(fresh, centred, net, IMAGES, use_running_average=True)


@pytest.mark.parametrize("name", ["kalman", "kalman_ws", "kalman_paper", "batch"])
def test_export_runs_in_plain_flax(name):
    net, plain = resnet(name), PlainResNet(**SIZE)
    variables = variables_of(net)
    exported = kf.export_batch_norm(net, variables, IMAGES, use_running_average=True)
    expected = jax.eval_shape(lambda: plain.init(KEY, IMAGES, True))
    chex.assert_trees_all_equal_shapes_and_dtypes(exported, expected)
    assert_same_logits(plain, exported, net, variables)


def test_export_after_training():
    """The running statistics that training wrote are those that serve; how often it
    wrote them is nobody's business."""
    net, plain = resnet("kalman_ws", decay_steps=9), PlainResNet(**SIZE)
    variables = variables_of(net)
    _, updates = net.apply(variables, IMAGES, False, mutable=["batch_stats"])
    variables = {**variables, **updates}
    exported = kf.export_batch_norm(net, variables, IMAGES, True)
    assert_same_logits(plain, exported, net, variables)


def test_export_of_a_single_layer():
    norm = kf.KalmanNorm(True, gain=0.1, learn_gain="scalar", decay_steps=9)
    exported = kf.export_batch_norm(norm, norm.init(KEY, IMAGES), IMAGES)
    plain = nn.BatchNorm(True).init(KEY, IMAGES)
    chex.assert_trees_all_equal_shapes_and_dtypes(exported, plain)


def test_export_of_a_scanned_network_standardises_every_slice():
    net = resnet("kalman_ws", scan=True)
    variables = variables_of(net)
    exported = kf.export_batch_norm(net, variables, IMAGES, True)
    kernels = variables["params"]["stage2_blocks"]["conv1"]["kernel"]
    for index, kernel in enumerate(np.float64(kernels)):
        centred = kernel - kernel.mean((0, 1, 2))
        np.testing.assert_allclose(
            exported["params"]["stage2_blocks"]["conv1"]["kernel"][index],
            centred / (kernel.std((0, 1, 2)) + 1e-5),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
    exported = {name: unstack_blocks(tree) for name, tree in exported.items()}
    assert_same_logits(PlainResNet(**SIZE), exported, net, variables)


def test_export_leaves_the_variables_alone():
    net = resnet("kalman_ws")
    variables = variables_of(net)
    copy = jax.tree.map(jnp.copy, variables)
    kf.export_batch_norm(net, variables, IMAGES, True)
    chex.assert_trees_all_equal(variables, copy)


class User(nn.Module):
    """A user's network, in which Flax names the layers."""

    norms: tuple
    features: int = 4

    @nn.compact
    def __call__(self, x):
        for norm in self.norms:
            x = nn.Conv(self.features, (1, 1))(x)
            x = nn.relu(norm(use_running_average=True)(x))
        return x


def user(*norms, **options):
    net = User(norms, **options)
    return net, net.init(KEY, IMAGES)


def test_automatic_names_correspond():
    plain, checkpoint = user(nn.BatchNorm, nn.BatchNorm)
    checkpoint = jax.tree.map(
        lambda v: v + jnp.linspace(0, 1, v.size).reshape(v.shape), checkpoint
    )
    net, fresh = user(kf.KalmanNorm, kf.KalmanNorm)
    assert "KalmanNorm_1" in fresh["params"]
    loaded = kf.load_batch_norm(fresh, checkpoint)
    expected = plain.apply(checkpoint, IMAGES)
    np.testing.assert_allclose(net.apply(loaded, IMAGES), expected, rtol=1e-5)
    exported = kf.export_batch_norm(net, loaded, IMAGES)
    chex.assert_trees_all_equal(exported, checkpoint)


def test_layers_missing_unknown_and_of_another_shape_are_all_named():
    _, fresh = user(kf.KalmanNorm, kf.KalmanNorm)
    _, checkpoint = user(nn.BatchNorm, nn.BatchNorm, features=4)
    params, stats = checkpoint["params"], checkpoint["batch_stats"]
    params["Dense_7"] = {"kernel": jnp.zeros((1, 1))}  # unknown
    del stats["BatchNorm_1"]["mean"]  # missing
    params["Conv_0"]["kernel"] = jnp.zeros((1, 1, 3, 5))  # of another shape
    with pytest.raises(ValueError) as error:
        kf.load_batch_norm(fresh, checkpoint)
    missing, unknown, shape = str(error.value).splitlines()[1:]
    assert "missing" in missing and "batch_stats/BatchNorm_1/mean" in missing
    assert "unknown" in unknown and "params/Dense_7/kernel" in unknown
    assert "params/Conv_0/kernel" in shape
    assert "(1, 1, 3, 5)" in shape and "(1, 1, 3, 4)" in shape


def test_mixed_automatic_names_are_refused_and_named():
    _, checkpoint = user(nn.BatchNorm)
    net, mixed = user(kf.KalmanNorm, kf.baselines.BatchNorm)
    assert {"KalmanNorm_0", "BatchNorm_0"} <= set(mixed["params"])
    with pytest.raises(ValueError, match="BatchNorm_0"):
        kf.export_batch_norm(net, mixed, IMAGES)
    with pytest.raises(ValueError, match="BatchNorm_0"):
        kf.load_batch_norm(mixed, mixed)
    # Both of the network's norms would take the one of the checkpoint.
    checkpoint["params"]["Conv_1"] = mixed["params"]["Conv_1"]
    with pytest.raises(ValueError, match="BatchNorm_0"):
        kf.load_batch_norm(mixed, checkpoint)


class Gain(nn.Module):
    """A layer of the user's own whose parameter happens to be called gain."""

    @nn.compact
    def __call__(self, x):
        return x * self.param("gain", nn.initializers.constant(2.0), ())


class WithOwnLayers(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x):
        x = Gain(name="own")(self.norm(use_running_average=True, name="norm")(x))
        return nn.WeightNorm(nn.Dense(2))(x)  # its parameter's name has slashes


def test_layers_of_the_users_own_are_kept():
    plain, net = WithOwnLayers(nn.BatchNorm), WithOwnLayers(kf.KalmanNorm)
    checkpoint = plain.init(KEY, IMAGES)
    checkpoint["params"]["own"]["gain"] = jnp.float32(5.0)
    loaded = kf.load_batch_norm(net.init(KEY, IMAGES), checkpoint)
    assert loaded["params"]["own"]["gain"] == 5.0
    chex.assert_trees_all_equal(kf.export_batch_norm(net, loaded, IMAGES), checkpoint)
