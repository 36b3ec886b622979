"""Detection and instance segmentation over Signals: Mask R-CNN and its geometry."""
