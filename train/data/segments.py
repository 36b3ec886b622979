"""Labels of pixels, and how they are cropped and mirrored with their images."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from train.data.batches import Crops, Split, augment

#: the label of a pixel that does not count
IGNORE = 255


def augment_both(
    batch: Split[jax.Array], crops: Crops, padding: int
) -> Split[jax.Array]:
    """Crops and mirrors images and the labels of their pixels alike, see `augment`;
    what comes from beyond the border is `IGNORE`.

    Args:
        batch: of labels ``[N, H, W]``.
        crops, padding: as of `augment`.
    """
    known = (IGNORE - batch.labels)[..., None]  # 0, which it pads with, for IGNORE
    return Split(
        augment(batch.images, crops, padding),
        IGNORE - augment(known, crops, padding)[..., 0],
    )


def one_of_each(labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns labels with 0 in the place of `IGNORE`, and where they count."""
    counts = labels != IGNORE
    return jnp.where(counts, labels, 0).astype(jnp.int32), counts
