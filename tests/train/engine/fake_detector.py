"""A network with the interface of `kalman_flax.models.detection.MaskRCNN`, which looks
at the image as a whole and knows nothing of boxes."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from kalman_flax import Conv, Signal
from kalman_flax.models.detection.recipe import Detections

SLOTS, CELLS = 3, 4


@dataclasses.dataclass(frozen=True)
class FakeRecipe:
    """Settings of the detector."""

    sampled: float = 0.9


class FakeDetector(nn.Module):
    """Finds `SLOTS` objects on any image."""

    num_classes: int
    norm: type
    conv: type = Conv
    activation: type = None
    input_state: type = None
    dtype: type = jnp.float32
    remat: bool = False
    width: int = 4
    recipe: FakeRecipe = FakeRecipe()

    def setup(self):
        self.stem = self.conv(self.width, (3, 3), (4, 4))
        self.stem_norm = self.norm()
        self.head = nn.Dense(SLOTS * (4 + self.num_classes + CELLS**2))

    def features(self, inputs, use_running_average):
        x = self.stem_norm(
            self.stem(Signal(inputs["image"])), use_running_average=use_running_average
        )
        found = self.head(nn.relu(x.value).mean((1, 2))).reshape(
            x.value.shape[0], SLOTS, -1
        )
        boxes, logits, masks = jnp.split(found, [4, 4 + self.num_classes], -1)
        size = jnp.tile(inputs["size"][:, ::-1], 2)[:, None]
        corner, extent = jnp.split(jax.nn.sigmoid(boxes), 2, -1)
        boxes = jnp.concatenate([corner / 2, corner / 2 + extent / 2], -1) * size
        masks = masks.reshape(*masks.shape[:2], CELLS, CELLS)
        return boxes, logits, jax.nn.sigmoid(masks)

    def __call__(self, inputs, use_running_average):
        boxes, logits, masks = self.features(inputs, use_running_average)
        scores = jax.nn.softmax(logits)
        labels = jnp.argmax(scores, -1) + 1
        labels = jnp.where(jnp.arange(SLOTS) < SLOTS - 1, labels, 0)
        return Detections(boxes, scores.max(-1), labels, masks)

    def losses(self, inputs, targets, key, use_running_average=False):
        boxes, logits, masks = self.features(inputs, use_running_average)
        size = jnp.tile(inputs["size"][:, ::-1], 2)[:, None]
        there = targets.labels[:, :SLOTS] > 0
        noise = jax.random.uniform(key, (len(boxes), SLOTS))
        chosen = there & (noise < self.recipe.sampled)
        box = jnp.abs(boxes - targets.boxes[:, :SLOTS]) / size
        share = targets.masks[:, :SLOTS].mean((-1, -2)) / 255
        classes = jax.nn.log_softmax(logits)
        right = jax.nn.one_hot(targets.labels[:, :SLOTS] - 1, self.num_classes)
        found = {
            "rpn_class": jnp.zeros(len(boxes)),
            "rpn_box": jnp.zeros(len(boxes)),
            "head_class": -jnp.sum(classes * right, (1, 2)),
            "head_box": jnp.sum(box.mean(-1), 1, where=chosen),
            "mask": jnp.sum((masks.mean((-1, -2)) - share) ** 2, 1, where=there),
        }
        return found | {"loss": sum(found.values())}


DETECTORS = {"fake": FakeDetector}
