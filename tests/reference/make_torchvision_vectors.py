"""Writes torchvision.npz: what torchvision computes, for the tests of detection.

The tests read the file and need no torch. It was made once, on Python 3.11:

    pip install torch==2.13.0 numpy pillow
    pip install --no-deps torchvision==0.28.0
    python -P tests/reference/make_torchvision_vectors.py

PyPI's torchvision does not load its C++ operators beside a torch for CPUs alone. Their
schemas are declared here in their place, and only what is written in Python is called.
"""

import pathlib

import numpy as np
import torch
from torch import library as operators

schemas = operators.Library("torchvision", "DEF")
schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
    schemas.define(f"{name}(Tensor input, Tensor rois) -> Tensor")
    schemas.define(f"_{name}_backward(Tensor grad, Tensor rois) -> Tensor")
schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchvision  # noqa: E402
from torchvision.models.detection import _utils, anchor_utils  # noqa: E402
from torchvision.models.detection.image_list import ImageList  # noqa: E402
from torchvision.models.detection.roi_heads import paste_masks_in_image  # noqa: E402
from torchvision.ops.poolers import LevelMapper  # noqa: E402
from torchvision.ops.roi_align import _roi_align  # noqa: E402


def boxes(generator: torch.Generator, count: int, limit: float) -> torch.Tensor:
    """Boxes with sides of at least a pixel inside of a square."""
    corners = torch.rand(count, 2, 2, generator=generator).sort(dim=1).values
    flat = corners.reshape(count, 4) * (limit - 1)
    flat[:, 2:] += 1
    return flat


def main() -> None:
    """Computes and writes."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, np.ndarray | torch.Tensor] = {
        "versions": np.array([torch.__version__, torchvision.__version__])
    }

    # Anchors of a 3 x 5 map at stride 16, of one ratio: others are rounded otherwise.
    maker = anchor_utils.AnchorGenerator(((32, 64, 128),), ((1.0,),))
    image = torch.zeros(1, 3, 48, 80)
    images = ImageList(image, [(48, 80)])
    found["anchors"] = maker(images, [torch.zeros(1, 1, 3, 5)])[0]

    # The coder, both ways; far deltas are clipped.
    ours, anchors = boxes(generator, 20, 100.0), boxes(generator, 20, 100.0)
    coder = _utils.BoxCoder((1.0,) * 4, bbox_xform_clip=float(np.log(1333 / 16)))
    deltas = coder.encode_single(ours, anchors)
    far = torch.randn(20, 4, generator=generator) * 3
    found |= {"boxes": ours, "box_anchors": anchors, "deltas": deltas, "far": far}
    found["decoded"] = coder.decode_single(far, anchors)

    # The matcher with low-quality matches; -1 background, -2 between.
    objects = boxes(generator, 6, 100.0)
    candidates = torch.cat([boxes(generator, 200, 100.0), objects + 2])
    quality = torchvision.ops.boxes.box_iou(objects, candidates)
    matcher = _utils.Matcher(0.7, 0.3, allow_low_quality_matches=True)
    found |= {"objects": objects, "candidates": candidates, "quality": quality}
    found["matches"] = matcher(quality)

    # RoIAlign and its gradient.
    features = torch.randn(1, 4, 7, 9, generator=generator, requires_grad=True)
    rois = boxes(generator, 9, 7 * 16.0)
    rois[0] = torch.tensor([0.0, 0.0, 9 * 16.0, 7 * 16.0])
    pooled = _roi_align.__wrapped__(  # as it is, not compiled
        features, torch.cat([torch.zeros(9, 1), rois], 1), 1 / 16, 5, 5, 2, True
    )
    cotangent = torch.randn(pooled.shape, generator=generator)
    (gradient,) = torch.autograd.grad(pooled, features, cotangent)
    found |= {"features": features[0], "rois": rois, "pooled": pooled}
    found |= {"cotangent": cotangent, "gradient": gradient[0]}

    # Masks pasted into an image.
    masks = torch.rand(3, 1, 14, 14, generator=generator)
    where = boxes(generator, 3, 40.0)
    found |= {"masks": masks[:, 0], "paste_boxes": where}
    found["pasted"] = paste_masks_in_image(masks, where, (40, 40), padding=1)[:, 0]

    # Levels of a feature pyramid, 2 to 5.
    spread = boxes(generator, 60, 1.0) * torch.logspace(1, 3, 60)[:, None]
    found |= {"spread": spread, "levels": LevelMapper(2, 5)([spread]) + 2}

    arrays = {
        name: value.detach().numpy() if isinstance(value, torch.Tensor) else value
        for name, value in found.items()
    }
    np.savez_compressed(pathlib.Path(__file__).with_name("torchvision.npz"), **arrays)


if __name__ == "__main__":
    main()
