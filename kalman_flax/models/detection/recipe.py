"""The constants of Mask R-CNN, and what it takes and gives."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax


class Targets(NamedTuple):
    """The objects to learn in N images, in G slots each.

    Attributes:
        boxes: ``[N, G, 4]`` float32, x1, y1, x2, y2 in pixels of the canvas.
        labels: ``[N, G]`` int32, 1 to num_classes; 0 is an empty slot.
        crowd: ``[N, G]`` bool; a crowd is no object to learn.
        masks: ``[N, G, M, M]`` uint8, 0 to 255: each object's mask, cropped to its own
            box and resampled to M x M. It may be soft.
    """

    boxes: jax.Array
    labels: jax.Array
    crowd: jax.Array
    masks: jax.Array

    @property
    def to_learn(self) -> jax.Array:
        """Which slots hold an object to learn, bool."""
        return (self.labels > 0) & ~self.crowd

    @property
    def crowds(self) -> jax.Array:
        """Which slots hold a crowd, bool."""
        return (self.labels > 0) & self.crowd


class Detections(NamedTuple):
    """What was found in N images, best first, in D slots each.

    Attributes:
        boxes: ``[N, D, 4]`` float32, x1, y1, x2, y2 in pixels of the canvas.
        scores: ``[N, D]`` float32, the probability of the class.
        labels: ``[N, D]`` int32, 1 to num_classes; 0 is an empty slot.
        masks: ``[N, D, m, m]`` float32, over each box, the probability that a pixel
            belongs to the object.
    """

    boxes: jax.Array
    scores: jax.Array
    labels: jax.Array
    masks: jax.Array


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of Mask R-CNN. As they are, those of the KN paper's Table 6, which are
    tensorpack's for R50-C4 of its commit edac0543 (``examples/FasterRCNN``, July 2018):
    36.8 box and 32.1 mask AP with frozen batch norm.

    Attributes:
        anchor_sizes: square roots of the anchors' areas, in pixels.
        anchor_ratios: of their heights to their widths.
        rpn_channels: of the 3x3 convolution that looks for proposals.
        rpn_positive, rpn_negative: IoU from which an anchor is an object, and below
            which it is background.
        crowd_overlap: IoU with a crowd above which an anchor is ignored.
        rpn_samples, rpn_positives: anchors an image to learn from, and at most so many
            that are objects.
        candidates_training, candidates: best anchors, of each map, that become boxes,
            in training and in inference.
        proposals_training, proposals: of these, what non-maximum suppression leaves.
        proposal_overlap: IoU above which it suppresses.
        roi_samples, roi_positives: proposals an image to learn from, and at most so
            many that are objects.
        roi_positive: IoU from which a proposal is an object.
        roi_size: bins of RoIAlign along an axis.
        box_weights: of dx, dy, dw, dh in what the box head puts out.
        mask_channels: of the mask head.
        min_score: what a detection's score has to exceed.
        detection_candidates: best pairs of a proposal and a class to choose from.
        detection_overlap: IoU above which one suppresses another of its class.
        detections: an image, at most.
    """

    anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 512)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_channels: int = 1024
    rpn_positive: float = 0.7
    rpn_negative: float = 0.3
    crowd_overlap: float = 0.7
    rpn_samples: int = 256
    rpn_positives: int = 128
    candidates_training: int = 12000
    candidates: int = 6000
    proposals_training: int = 2000
    proposals: int = 1000
    proposal_overlap: float = 0.7
    roi_samples: int = 256
    roi_positives: int = 64
    roi_positive: float = 0.5
    roi_size: int = 14
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    mask_channels: int = 256
    min_score: float = 0.05
    detection_candidates: int = 1000
    detection_overlap: float = 0.5
    detections: int = 100

    @classmethod
    def fpn(cls) -> Recipe:
        """For `MaskRCNNFPN`: what Detectron and tensorpack have otherwise there, one
        size of anchors for each map, and 512 regions."""
        return cls(
            rpn_channels=256,
            candidates_training=2000,
            candidates=1000,
            roi_samples=512,
            roi_positives=128,
            roi_size=7,
        )

    @classmethod
    def small(cls) -> Recipe:
        """For scenes of 64x64, at a stride of 8. The boxes of their digits have areas
        of 10^2 to 22^2 pixels and are 1.3 to 2 times as high as wide. An IoU of 0.7
        would leave one positive anchor an object, since cells lie far apart; a digit
        covers at most four of them, so that 8 bins see all of it."""
        return cls(
            anchor_sizes=(10, 14, 20),
            anchor_ratios=(1.0, 1.5, 2.0),
            rpn_positive=0.5,
            rpn_channels=64,
            rpn_samples=64,
            rpn_positives=32,
            candidates_training=256,
            candidates=256,
            proposals_training=64,
            proposals=64,
            roi_samples=32,
            roi_positives=8,
            roi_size=8,
            mask_channels=32,
            detection_candidates=64,
            detections=16,
        )

    @classmethod
    def small_fpn(cls) -> Recipe:
        """For `MaskRCNNFPN` on the same scenes, with maps at strides of 2 to 32."""
        return dataclasses.replace(cls.small(), anchor_sizes=(10, 14, 20, 28, 40))
