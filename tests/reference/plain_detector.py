"""What a Mask R-CNN (C4) says in inference, in `jax.lax` alone: what serves an exported
detector. It knows nothing of `kalman_flax` but the names of the layers."""

import jax
import jax.numpy as jnp
from jax import lax


class PlainDetector:
    """Of one block a stage and no pool behind the stem.

    Args:
        variables: by path, ``"params/stem/kernel"``, as `train.export` writes them.
        epsilon: of the batch norms.
    """

    def __init__(self, variables, epsilon=1e-5):
        self.variables, self.epsilon = variables, epsilon

    def conv(self, x, path, strides=1):
        kernel = self.variables[f"params/{path}/kernel"]
        half = len(kernel) // 2
        y = lax.conv_general_dilated(
            x,
            kernel,
            (strides, strides),
            [(half, half)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )
        return y + self.variables.get(f"params/{path}/bias", 0)

    def normalised(self, x, path, strides=1):
        y = self.conv(x, path, strides)
        stats, params = (f"{kind}/{path}_norm" for kind in ("batch_stats", "params"))
        values = self.variables
        deviation = jnp.sqrt(values[f"{stats}/var"] + self.epsilon)
        y = (y - values[f"{stats}/mean"]) / deviation
        return y * values[f"{params}/scale"] + values[f"{params}/bias"]

    def block(self, x, number):
        path, strides = f"stage{number}_block1", 2 if number > 1 else 1
        y = jax.nn.relu(self.normalised(x, f"{path}/conv1"))
        y = jax.nn.relu(self.normalised(y, f"{path}/conv2", strides))
        y = self.normalised(y, f"{path}/conv3")
        return jax.nn.relu(y + self.normalised(x, f"{path}/shortcut", strides))

    def features(self, images):
        x = jax.nn.relu(self.normalised(images, "stem", 2))
        for number in (1, 2, 3):
            x = self.block(x, number)
        return x

    def rpn(self, features):
        x = jax.nn.relu(self.conv(features, "rpn/conv"))
        logits, deltas = self.conv(x, "rpn/objectness"), self.conv(x, "rpn/box")
        return logits.reshape(len(x), -1), deltas.reshape(len(x), -1, 4)

    def dense(self, x, path):
        kernel = self.variables[f"params/{path}/kernel"]
        product = jnp.matmul(x, kernel, precision="highest")
        return product + self.variables[f"params/{path}/bias"]

    def heads(self, crops):
        """Logits, deltas and masks of crops ``[R, h, w, C]``."""
        x = self.block(crops, 4)
        vectors = x.mean((1, 2))
        logits, deltas = (
            self.dense(vectors, f"box_head/{name}") for name in ("classes", "boxes")
        )
        # Every pixel becomes four, each by a matrix of its own; Flax counts the taps
        # from the other end.
        kernel = self.variables["params/mask_head/upsample/kernel"][::-1, ::-1]
        grown = jnp.einsum("rhwc,ijcd->rhiwjd", x, kernel, precision="highest")
        count, height, _, width, _, channels = grown.shape
        grown = grown.reshape(count, 2 * height, 2 * width, channels)
        grown += self.variables["params/mask_head/upsample/bias"]
        masks = self.conv(jax.nn.relu(grown), "mask_head/masks")
        return logits, deltas.reshape(len(x), -1, 4), masks
