"""The batch-norm versions against public ones, weights copied; skipped without them.

pip install torchvision pretrainedmodels
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import kalman_flax as kf

torch = pytest.importorskip("torch")
CLASSES = 7


@pytest.fixture
def image():
    return np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)


def randomise(model):
    """No parameter or running statistic of a norm stays where it starts, so that every
    one that is forgotten, or taken from another layer, shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    tensor.uniform_(-0.5, 0.5)
            if isinstance(module, torch.nn.Conv2d):
                # By its own initialisation the signal dies out before the logits.
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def copied(net, image, layers, head):
    """Variables of `net` from `layers`: the name of each convolution, and the torch
    convolution and norm; and all of them, no more and no less."""

    def array(tensor):
        return jnp.asarray(tensor.detach().numpy())

    flat = {
        "params/head/kernel": array(head.weight.T),
        "params/head/bias": array(head.bias),
    }
    for name, conv, norm in layers:
        # A bias before a norm moves its mean.
        bias = 0.0 if conv.bias is None else conv.bias
        flat |= {
            f"params/{name}/kernel": array(conv.weight.permute(2, 3, 1, 0)),
            f"params/{name}_norm/scale": array(norm.weight),
            f"params/{name}_norm/bias": array(norm.bias),
            f"batch_stats/{name}_norm/mean": array(norm.running_mean - bias),
            f"batch_stats/{name}_norm/var": array(norm.running_var),
        }
    variables = traverse_util.unflatten_dict(flat, sep="/")
    expected = jax.eval_shape(lambda: net.init(jax.random.key(0), image, True))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, expected)
    return variables


def assert_same_logits(net, variables, model, image):
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(image.transpose(0, 3, 1, 2))).numpy()
    expected_scale = np.abs(expected).max()
    assert np.abs(expected[0] - expected[1]).max() > 1e-2 * expected_scale
    logits = net.apply(variables, image, True)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * expected_scale)


@pytest.mark.parametrize("stride_in_1x1", [False, True])
def test_resnet_50_is_that_of_torchvision(image, stride_in_1x1):
    """v1.5; and the original with torchvision's strides moved to the 1x1."""
    models = pytest.importorskip("torchvision.models")
    model = models.resnet50(num_classes=CLASSES)
    randomise(model)
    layers = [("stem", model.conv1, model.bn1)]
    for stage in range(1, 5):
        for index, block in enumerate(getattr(model, f"layer{stage}"), start=1):
            prefix = f"stage{stage}_block{index}"
            if stride_in_1x1:
                block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
            layers += [
                (f"{prefix}/conv1", block.conv1, block.bn1),
                (f"{prefix}/conv2", block.conv2, block.bn2),
                (f"{prefix}/conv3", block.conv3, block.bn3),
            ]
            if block.downsample is not None:
                layers.append((f"{prefix}/shortcut", *block.downsample))
    net = kf.NETWORKS["resnet50"](
        num_classes=CLASSES, norm=kf.baselines.BatchNorm, stride_in_1x1=stride_in_1x1
    )
    variables = copied(net, image, layers, model.fc)
    assert_same_logits(net, variables, model, image)


def test_inception_v2_is_the_bninception_of_pretrainedmodels(image):
    """A port of the Caffe model. Its average pooling counts the padding, which is
    turned off here: ours does not, as TF-slim's does not. Its last one is of 7x7, for
    images of 224x224; here it is over the whole of a smaller map."""
    models = pytest.importorskip("pretrainedmodels.models")
    model = models.bninception(num_classes=CLASSES, pretrained=None)
    randomise(model)
    for module in model.modules():
        if isinstance(module, torch.nn.AvgPool2d):
            module.count_include_pad = False
    model.global_pool = torch.nn.AdaptiveAvgPool2d(1)
    layers = [("conv1", model.conv1_7x7_s2, model.conv1_7x7_s2_bn)]
    layers += [
        (ours, getattr(model, theirs), getattr(model, f"{theirs}_bn"))
        for ours, theirs in (("conv2_reduce", "conv2_3x3_reduce"),
                             ("conv2", "conv2_3x3"))
    ]  # fmt: skip
    branches = (
        ("1x1",),
        ("3x3_reduce", "3x3"),
        ("double_3x3_reduce", "double_3x3_1", "double_3x3_2"),
    )
    for module in ("3a", "3b", "3c", "4a", "4b", "4c", "4d", "4e", "5a", "5b"):
        prefix = f"inception_{module}"
        names = {"pool_conv": f"{prefix}_pool_proj"}
        there = [b for b in branches if hasattr(model, f"{prefix}_{b[0]}")]
        for i, branch in enumerate(there, start=1):
            for j, name in enumerate(branch, start=1):
                names[f"branch{i}_conv{j}"] = f"{prefix}_{name}"
        layers += [
            (f"{prefix}/{ours}", getattr(model, name), getattr(model, f"{name}_bn"))
            for ours, name in names.items()
            if hasattr(model, name)
        ]
    net = kf.models.InceptionV2(CLASSES, norm=kf.baselines.BatchNorm)
    variables = copied(net, image, layers, model.last_linear)
    assert_same_logits(net, variables, model, image)
