"""Images with a label for every pixel, and how both are cropped and mirrored."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.data.batches import Crops, augment, first

#: the label of a pixel that does not count
IGNORE = 255


class Segments(NamedTuple):
    """Images ``[N, H, W, 3]`` and the label of each pixel, ``[N, H, W]``, uint8.

    Labels are those of classes, or `IGNORE`. As a split it is in memory.
    """

    images: np.ndarray
    labels: np.ndarray

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of each image, ``[H, W, C]``."""
        return self.images.shape[1:]

    def take(self, examples: int) -> Segments:
        """Returns the first so many examples; all of them for 0.

        Raises:
            ValueError: there are fewer.
        """
        return Segments(*(a[: first(examples, self.examples)] for a in self))

    def read(self, index: np.ndarray, key: Sequence[int] | None = None) -> Segments:
        """Returns the examples `index`, as they are."""
        return Segments(*(a[index] for a in self))

    def describe(self) -> dict[str, object]:
        """Returns what to know the split by, see `train.data.fingerprint`."""
        digest = hashlib.sha256()
        for array in self:
            digest.update(np.ascontiguousarray(array))
        return {
            "images": self.examples,
            "shape": list(self.image_shape),
            "dtype": "uint8",
            "sha256": digest.hexdigest(),
        }


def augment_both(batch: Segments, crops: Crops, padding: int) -> Segments:
    """Crops and mirrors images and their labels alike, see `augment`; what comes from
    beyond the border is `IGNORE`.

    Args:
        batch: on the device.
        crops, padding: as of `augment`.
    """
    known = (IGNORE - batch.labels)[..., None]  # 0, which it pads with, for IGNORE
    return Segments(
        augment(batch.images, crops, padding),
        IGNORE - augment(known, crops, padding)[..., 0],
    )


def one_of_each(labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns labels with 0 in the place of `IGNORE`, and where they count."""
    counts = labels != IGNORE
    return jnp.where(counts, labels, 0).astype(jnp.int32), counts
