"""Published weights: the logits are those of an independent network in plain JAX, which
reads the tensors under torchvision's names."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax import lax

import kalman_flax as kf

safetensors = pytest.importorskip("safetensors.numpy")
CLASSES, WIDTH, STAGES = 3, 4, (2, 1)
IMAGES = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)


def make_tensors():
    """A small ResNet under the names of torchvision, no value where it starts."""
    rng = np.random.default_rng(0)
    tensors = {}

    def conv_norm(conv, norm, out, into, size):
        std = np.sqrt(2 / (into * size**2))
        tensors[f"{conv}.weight"] = rng.normal(0, std, (out, into, size, size))
        tensors[f"{norm}.weight"] = rng.uniform(0.5, 1.5, out)
        tensors[f"{norm}.bias"] = rng.normal(0, 0.5, out)
        tensors[f"{norm}.running_mean"] = rng.normal(0, 0.5, out)
        tensors[f"{norm}.running_var"] = rng.uniform(0.5, 2.0, out)
        tensors[f"{norm}.num_batches_tracked"] = np.array(7)

    conv_norm("conv1", "bn1", WIDTH, 3, 7)
    into = WIDTH
    for stage, blocks in enumerate(STAGES, 1):
        inner = WIDTH * 2 ** (stage - 1)
        for block in range(blocks):
            at = f"layer{stage}.{block}."
            conv_norm(f"{at}conv1", f"{at}bn1", inner, into, 1)
            conv_norm(f"{at}conv2", f"{at}bn2", inner, inner, 3)
            conv_norm(f"{at}conv3", f"{at}bn3", 4 * inner, inner, 1)
            if block == 0:
                down = f"{at}downsample"
                conv_norm(f"{down}.0", f"{down}.1", 4 * inner, into, 1)
            into = 4 * inner
    tensors["fc.weight"] = rng.normal(size=(CLASSES, into))
    tensors["fc.bias"] = rng.normal(size=CLASSES)
    return {k: v if v.ndim == 0 else v.astype(np.float32) for k, v in tensors.items()}


TENSORS = make_tensors()


@jax.jit
def plain_logits(images):
    """The forward pass as PyTorch has it: v1.5, symmetric padding, [N, C, H, W]."""
    t = {k: v for k, v in TENSORS.items() if not k.endswith("tracked")}

    def conv_norm(x, conv, norm, strides=1):
        kernel = t[f"{conv}.weight"]
        pad = kernel.shape[-1] // 2
        x = lax.conv_general_dilated(
            x, kernel, (strides,) * 2, [(pad, pad)] * 2,
            dimension_numbers=("NCHW", "OIHW", "NCHW"), precision="highest",
        )  # fmt: skip
        mean, var, scale, bias = (
            t[f"{norm}.{name}"][:, None, None]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias

    x = jax.nn.relu(conv_norm(images.transpose(0, 3, 1, 2), "conv1", "bn1", 2))
    x = lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 1, 3, 3), (1, 1, 2, 2), [(0, 0)] * 2 + [(1, 1)] * 2
    )
    for stage, blocks in enumerate(STAGES, 1):
        for block in range(blocks):
            at, strides = f"layer{stage}.{block}.", 2 if stage > 1 and not block else 1
            y = jax.nn.relu(conv_norm(x, f"{at}conv1", f"{at}bn1"))
            y = jax.nn.relu(conv_norm(y, f"{at}conv2", f"{at}bn2", strides))
            y = conv_norm(y, f"{at}conv3", f"{at}bn3")
            if block == 0:
                down = f"{at}downsample"
                x = conv_norm(x, f"{down}.0", f"{down}.1", strides)
            x = jax.nn.relu(x + y)
    return x.mean((2, 3)) @ t["fc.weight"].T + t["fc.bias"]


def of_hugging_face(name):
    """As ``microsoft/resnet-50`` calls it."""
    name = re.sub(r"^(conv1|bn1)\.", r"resnet.embedder.embedder.\1.", name)
    name = name.replace("fc.", "classifier.1.")
    name = name.replace("downsample.0", "shortcut.convolution")
    name = name.replace("downsample.1", "shortcut.normalization")

    def block(found):
        stage, index, kind, number = found.groups()
        kind = {"conv": "convolution", "bn": "normalization"}[kind]
        return (
            f"resnet.encoder.stages.{int(stage) - 1}.layers.{index}"
            f".layer.{int(number) - 1}.{kind}"
        )

    name = re.sub(r"^layer(\d)\.(\d)\.(conv|bn)(\d)", block, name)
    name = re.sub(
        r"^layer(\d)\.(\d)",
        lambda m: f"resnet.encoder.stages.{int(m[1]) - 1}.layers.{m[2]}",
        name,
    )
    return name.replace(".conv1.", ".convolution.").replace(".bn1.", ".normalization.")


def of_tensorpack(name, tensor):
    """As ``ImageNet-R50-AlignPadding.npz`` calls it, and [H, W, BGR, out]."""
    if name.endswith("tracked"):
        return {}
    layer, _, leaf = name.rpartition(".")
    layer = re.sub(r"\bfc\b", "linear", layer)
    layer = re.sub(r"^conv1$", "conv0", re.sub(r"^bn1$", "conv0/bn", layer))
    layer = re.sub(r"downsample\.0", "convshortcut", layer)
    layer = re.sub(r"downsample\.1", "convshortcut/bn", layer)
    layer = re.sub(
        r"^layer(\d)\.(\d)\.", lambda m: f"group{int(m[1]) - 1}/block{m[2]}/", layer
    )
    layer = re.sub(r"/bn(\d)$", r"/conv\1/bn", layer)
    if layer == "linear":
        leaf = {"weight": "W", "bias": "b"}[leaf]
    else:
        weight = "gamma" if "bn" in layer else "W"
        names = {"running_mean": "mean/EMA", "running_var": "variance/EMA"}
        leaf = (names | {"bias": "beta", "weight": weight})[leaf]
    if tensor.ndim == 4:
        tensor = tensor.transpose(2, 3, 1, 0)
    elif tensor.ndim == 2:
        tensor = tensor.T
    return {f"{layer}/{leaf}": tensor[:, :, ::-1] if layer == "conv0" else tensor}


def written(tmp_path, dialect):
    if dialect == "tensorpack":
        path, arrays = tmp_path / "ImageNet-R50-AlignPadding.npz", {}
        for name, tensor in TENSORS.items():
            arrays |= of_tensorpack(name, tensor)
        np.savez(path, **arrays)
        return path, arrays
    path, arrays = tmp_path / "model.safetensors", dict(TENSORS)
    if dialect == "hugging_face":
        arrays = {of_hugging_face(name): t for name, t in arrays.items()}
    safetensors.save_file(arrays, path)
    return path, arrays


def resnet(norm="kalman", classes=CLASSES, **options):
    network = kf.models.BottleneckResNet(
        num_classes=classes,
        stage_sizes=STAGES,
        width=WIDTH,
        **options,
        **kf.normalization(norm)._asdict(),
    )
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), IMAGES, True))
    return network, jax.tree.map(lambda s: jnp.full(s.shape, 0.5, s.dtype), shapes)


@pytest.mark.parametrize("dialect, example", [
    ("torchvision", "layer1.0.downsample.1.running_mean"),
    ("hugging_face", "resnet.encoder.stages.1.layers.0.layer.2.normalization.weight"),
    ("tensorpack", "group0/block1/conv3/bn/variance/EMA"),
])  # fmt: skip
def test_logits_are_those_of_a_plain_network(tmp_path, dialect, example):
    path, arrays = written(tmp_path, dialect)
    assert example in arrays
    network, variables = resnet()
    loaded = kf.load_pretrained(path, variables)
    logits = jax.jit(network.apply, static_argnums=2)(loaded, IMAGES, True)
    expected = plain_logits(IMAGES)
    assert np.abs(expected[0] - expected[1]).max() > 0.05 * np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_a_head_for_other_classes_is_kept(tmp_path):
    path, _ = written(tmp_path, "torchvision")
    _, variables = resnet(classes=5)
    with pytest.raises(ValueError, match=r"head/kernel: shape \(32, 3\)"):
        kf.load_pretrained(path, variables)
    loaded = kf.load_pretrained(path, variables, head=False)
    assert loaded["params"]["head"]["kernel"].shape == (32, 5)
    stem = TENSORS["conv1.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(loaded["params"]["stem"]["kernel"], stem)


def saved(tmp_path, tensors, name="model.safetensors"):
    path = tmp_path / name
    safetensors.save_file(tensors, path)
    return path


def test_what_does_not_fit_is_named(tmp_path):
    _, variables = resnet()
    tensors = dict(TENSORS)
    del tensors["layer2.0.bn2.running_var"]
    tensors["layer1.0.conv2.weight"] = tensors["layer1.0.conv2.weight"][:, :, :1]
    with pytest.raises(ValueError) as error:
        kf.load_pretrained(saved(tmp_path, tensors), variables)
    assert "stage2_block1/conv2_norm/var: missing" in str(error.value)
    assert "stage1_block1/conv2/kernel: shape (1, 3, 4, 4)" in str(error.value)
    # Two heads, or blocks of another kind.
    tensors = TENSORS | {"layer1.0.se.conv.weight": TENSORS["conv1.weight"]}
    with pytest.raises(ValueError, match=r"has not: layer1.0.se.conv.weight"):
        kf.read_pretrained(saved(tmp_path, tensors))


@pytest.mark.parametrize("name, tensors, why", [
    ("R-50.pkl", {}, "no population statistics"),
    ("a.safetensors", {k: v for k, v in TENSORS.items() if "running" not in k},
     "no population statistics"),
    ("a.safetensors", {"res2_0_branch2a_bn_s": np.ones(4)}, "folded"),
    ("a.pth", {}, r"torch.load\('a.pth'\),\s+'a.safetensors'"),
    ("a.h5", {}, "expected a .safetensors"),
])  # fmt: skip
def test_files_of_another_kind_are_refused_with_the_reason(
    tmp_path, name, tensors, why
):
    with pytest.raises(ValueError, match=why):
        kf.read_pretrained(saved(tmp_path, tensors, name))


def test_damage_and_other_padding(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"not this")
    with pytest.raises(ValueError, match="cannot be read"):
        kf.read_pretrained(tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no .*b\.safetensors"):
        kf.read_pretrained(tmp_path / "b.safetensors")
    path, _ = written(tmp_path, "tensorpack")
    path = path.rename(tmp_path / "ImageNet-ResNet50.npz")
    with pytest.warns(UserWarning, match="AlignPadding"):
        kf.read_pretrained(path)


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    path, _ = written(tmp_path, "torchvision")
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        kf.read_pretrained(path)


def test_a_half_precision_file_is_read_in_float32(tmp_path):
    tensors = {k: v.astype(np.float16) for k, v in TENSORS.items()}
    found = kf.read_pretrained(saved(tmp_path, tensors))
    dtypes = {leaf.dtype for leaf in traverse_util.flatten_dict(found).values()}
    assert dtypes == {jnp.dtype("float32")}
