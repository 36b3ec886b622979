"""Detection and instance segmentation over Signals: Mask R-CNN and its geometry."""

from kalman_flax.models.detection.fpn import MaskRCNNFPN as MaskRCNNFPN
from kalman_flax.models.detection.mask_rcnn import MaskRCNN as MaskRCNN
from kalman_flax.models.detection.recipe import Detections as Detections
from kalman_flax.models.detection.recipe import Recipe as Recipe
from kalman_flax.models.detection.recipe import Targets as Targets
