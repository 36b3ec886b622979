"""Published ResNets with bottleneck blocks, from files, under our names."""

from __future__ import annotations

import os
import pathlib
import re
import warnings
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from kalman_flax.inference.checkpoint import load_batch_norm

Path = tuple[str, ...]

_BLOCK = "stage{stage}_block{block}"


class _Dialect(NamedTuple):
    """How a library calls the layers of a `BottleneckResNet`.

    Attributes:
        layers: from patterns of its names to ours.
        first: number of the first stage, block and convolution.
        separator: stands between a layer and a tensor of it.
    """

    layers: dict[str, str]
    first: tuple[int, int, int]
    separator: str


_TORCHVISION_BLOCK = r"layer(?P<stage>\d+)\.(?P<block>\d+)\."
_HUGGING_FACE = r"(?:resnet\.)?"
_HUGGING_FACE_BLOCK = (
    _HUGGING_FACE + r"encoder\.stages\.(?P<stage>\d+)\.layers\.(?P<block>\d+)\."
)
_TENSORPACK_BLOCK = r"group(?P<stage>\d+)/block(?P<block>\d+)/"
_DIALECTS = (
    # torchvision and timm
    _Dialect(
        {
            r"conv1": "stem",
            r"bn1": "stem_norm",
            _TORCHVISION_BLOCK + r"conv(?P<conv>\d)": _BLOCK + "/conv{conv}",
            _TORCHVISION_BLOCK + r"bn(?P<conv>\d)": _BLOCK + "/conv{conv}_norm",
            _TORCHVISION_BLOCK + r"downsample\.0": _BLOCK + "/shortcut",
            _TORCHVISION_BLOCK + r"downsample\.1": _BLOCK + "/shortcut_norm",
            r"fc": "head",
        },
        (1, 0, 1),
        r"\.",
    ),
    # Hugging Face's transformers
    _Dialect(
        {
            _HUGGING_FACE + r"embedder\.embedder\.convolution": "stem",
            _HUGGING_FACE + r"embedder\.embedder\.normalization": "stem_norm",
            _HUGGING_FACE_BLOCK + r"layer\.(?P<conv>\d)\.convolution": _BLOCK
            + "/conv{conv}",
            _HUGGING_FACE_BLOCK + r"layer\.(?P<conv>\d)\.normalization": _BLOCK
            + "/conv{conv}_norm",
            _HUGGING_FACE_BLOCK + r"shortcut\.convolution": _BLOCK + "/shortcut",
            _HUGGING_FACE_BLOCK + r"shortcut\.normalization": _BLOCK + "/shortcut_norm",
            r"classifier\.1": "head",
        },
        (0, 0, 0),
        r"\.",
    ),
    # tensorpack
    _Dialect(
        {
            r"conv0": "stem",
            r"conv0/bn": "stem_norm",
            _TENSORPACK_BLOCK + r"conv(?P<conv>\d)": _BLOCK + "/conv{conv}",
            _TENSORPACK_BLOCK + r"conv(?P<conv>\d)/bn": _BLOCK + "/conv{conv}_norm",
            _TENSORPACK_BLOCK + r"convshortcut": _BLOCK + "/shortcut",
            _TENSORPACK_BLOCK + r"convshortcut/bn": _BLOCK + "/shortcut_norm",
            r"linear": "head",
        },
        (0, 0, 1),
        "/",
    ),
)
#: tensors of a layer by their names there; PyTorch's weight is a scale in norms
_TENSORS = {
    "weight": "kernel",
    "bias": "bias",
    "running_mean": "mean",
    "running_var": "var",
    "W": "kernel",
    "b": "bias",
    "gamma": "scale",
    "beta": "bias",
    "mean/EMA": "mean",
    "variance/EMA": "var",
}
_SHOWN = 5


def load_pretrained(
    path: str | os.PathLike[str], variables: Any, *, head: bool = True
) -> Any:
    """Loads a published ResNet into the variables of a `BottleneckResNet` of any norm
    that infers as batch norm does: batch norm, frozen or not, and `KalmanNorm`.

    What may be read, and how the images have to be standardised, is said at
    `read_pretrained`. Do not load into centred or standardised kernels (`kalman_wc`,
    `kalman_ws`): behind a ReLU they compute another function.

    Args:
        path: of the file.
        variables: of the network, freshly initialised: ``params``, ``batch_stats``.
        head: False keeps the classifier that `variables` have, for other classes.

    Returns:
        New variables with the structure of `variables`.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: it is a ``.safetensors``, and the package `safetensors` is missing.
        ValueError: the file is of another kind or network; what does not fit is named.
    """
    checkpoint = read_pretrained(path)
    if not head:
        checkpoint["params"] = checkpoint["params"] | {
            "head": variables["params"]["head"]
        }
    return load_batch_norm(variables, checkpoint)


def read_pretrained(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a published ResNet with bottleneck blocks, of any depth and width.

    - ``.safetensors`` in the names of torchvision and timm, or of Hugging Face's
      transformers. The 3x3 convolutions stride, as by default in `BottleneckResNet`.
      Images are RGB, (x / 255 - mean) / std by the moments of ImageNet.
    - ``.npz`` of tensorpack. Its images are BGR; the kernel of the stem is turned, so
      that ours stay RGB. The padding is not in the file: only those that are called
      ``*-AlignPadding.npz`` fit ours, on maps of even size. Others warn.

    A ``.pth`` becomes a ``.safetensors`` by two lines of Python with PyTorch:

        import safetensors.torch, torch
        safetensors.torch.save_file(torch.load("resnet50.pth"), "resnet50.safetensors")

    Args:
        path: of the file.

    Returns:
        ``{"params": ..., "batch_stats": ...}`` under our names, float32.

    Raises:
        FileNotFoundError, ImportError: as in `load_pretrained`.
        ValueError: another kind of file, a tensor that this network does not have, or
            batch norm without its statistics.
    """
    path = pathlib.Path(path)
    flat: dict[Path, Any] = {}
    unknown = []
    for name, tensor in _tensors(path).items():
        place = _place(name.removesuffix(":0"))
        if place is None:
            unknown.append(name)
        elif place[-1] != "num_batches_tracked":
            flat[place] = jnp.asarray(_as_here(place, tensor, path.suffix), jnp.float32)
    if any(name.endswith("_bn_s") for name in unknown) or (
        flat and not any(place[0] == "batch_stats" for place in flat)
    ):
        raise ValueError(_folded(path))
    if unknown or not flat:
        more = f" and {len(unknown) - _SHOWN} more" if unknown[_SHOWN:] else ""
        raise ValueError(
            f"{path} has tensors that a ResNet with bottleneck blocks has not:"
            f" {', '.join(unknown[:_SHOWN]) or 'none at all'}{more}. Expected the names"
            " of torchvision, timm or Hugging Face (layer1.0.conv1.weight,"
            " resnet.encoder.stages.0.layers.0.layer.0.convolution.weight), or of"
            " tensorpack (group0/block0/conv1/W)."
        )
    return traverse_util.unflatten_dict(flat)


def _tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a file, by the names that they have there."""
    if path.suffix in (".pth", ".pt", ".bin"):
        raise ValueError(
            f"{path} is a pickle of PyTorch. Convert it once, where PyTorch is:\n"
            "    import safetensors.torch, torch\n"
            f"    safetensors.torch.save_file(torch.load({path.name!r}),"
            f" {path.with_suffix('.safetensors').name!r})"
        )
    if path.suffix == ".pkl":
        raise ValueError(_folded(path))
    if path.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"{path}: expected a .safetensors, or an .npz of tensorpack.")
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}.")
    if path.suffix == ".npz":
        if "AlignPadding" not in path.name:
            warnings.warn(
                f"{path.name} is not called *-AlignPadding.npz: tensorpack's other"
                " models pad strided convolutions on other sides than this network, and"
                " lose accuracy in it.",
                stacklevel=4,
            )
        with np.load(path) as file:
            return dict(file)
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs the package safetensors: pip install safetensors"
        ) from error
    try:
        return load_file(path)
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}. It is damaged, or of a dtype that NumPy"
            " has not, such as bfloat16; save it in float32."
        ) from error


def _place(name: str) -> Path | None:
    """Where a tensor belongs, ``("params", "stem", "kernel")``; None if nowhere."""
    for dialect in _DIALECTS:
        for pattern, ours in dialect.layers.items():
            found = re.fullmatch(rf"{pattern}{dialect.separator}(?P<tensor>.+)", name)
            if found is None or found["tensor"] not in (
                *_TENSORS,
                "num_batches_tracked",
            ):
                continue
            numbers = {
                key: int(found[key]) - first + 1
                for key, first in zip(("stage", "block", "conv"), dialect.first)
                if key in found.groupdict()
            }
            layer = ours.format(**numbers)
            leaf = _TENSORS.get(found["tensor"], found["tensor"])
            if leaf == "kernel" and layer.endswith("_norm"):
                leaf = "scale"
            collection = "batch_stats" if leaf in ("mean", "var") else "params"
            return (collection, *layer.split("/"), leaf)
    return None


def _as_here(place: Path, tensor: np.ndarray, suffix: str) -> np.ndarray:
    """A tensor in our order of axes and, of the stem, of colours."""
    if place[-1] != "kernel":
        return tensor
    if suffix == ".npz":  # HWIO already
        return tensor[:, :, ::-1] if place[1] == "stem" else tensor
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _folded(path: pathlib.Path) -> str:
    return (
        f"{path} has no population statistics: batch norm is folded into scales and"
        " shifts or into the convolutions, as in Detectron's R-50.pkl. There is nothing"
        " to normalise by. Take weights that keep running means and variances, such as"
        " torchvision's."
    )
