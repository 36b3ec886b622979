"""The whole detector under changes of its input that it should follow, or not see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.detection.test_mask_rcnn import build, filled


def mirrored_variables(variables):
    """Every kernel mirrored along its width, and every horizontal offset of a box."""

    def mirror(path, leaf):
        *_, layer, name = (key.key for key in path)
        if name == "kernel" and leaf.ndim == 4:
            leaf = leaf[:, ::-1]
        if layer in ("box", "boxes"):  # dx, dy, dw, dh
            leaf = leaf * np.tile(np.float32([-1, 1, 1, 1]), leaf.shape[-1] // 4)
        return leaf

    return jax.tree_util.tree_map_with_path(mirror, variables)


@pytest.mark.parametrize(
    "name", ["kalman", pytest.param("group", marks=pytest.mark.slow)]
)
def test_a_mirrored_image_has_mirrored_objects(name):
    """By a mirrored network, with what was written to the running statistics.

    Strided convolutions look at every second pixel from the first: of an odd number the
    mirrored ones are the same. So 65 pixels become 9 cells, which by their stride span
    72, and so large is the image said to be.
    """
    net = build(name)
    # An odd number of bins; in the last stage, too, a convolution strides.
    net = net.clone(recipe=dataclasses.replace(net.recipe, roi_size=5))
    size, width = jnp.array([[72, 72]]), 72
    image = np.random.default_rng(1).normal(size=(1, 65, 65, 3)).astype(np.float32)
    variables = filled(net)

    @jax.jit
    def find(variables, image):
        inputs = {"image": image, "size": size}
        return net.apply(variables, inputs, False, mutable=["batch_stats"])

    expected, stats = find(variables, image)
    found, found_stats = find(mirrored_variables(variables), image[:, :, ::-1])
    assert np.all(expected.labels > 0) and np.ptp(expected.boxes[..., 0]) > 5
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-3)
    x1, y1, x2, y2 = np.moveaxis(expected.boxes, -1, 0)
    boxes = np.stack([width - x2, y1, width - x1, y2], -1)
    np.testing.assert_allclose(found.boxes, boxes, atol=0.01)
    masks = expected.masks[..., ::-1]
    np.testing.assert_allclose(found.masks, masks, atol=1e-3)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4),
        found_stats,
        stats,
    )
