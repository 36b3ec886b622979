"""The U-Net over Signals is a plain Flax U-Net through `filtered`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kalman_flax as kf
from tests.reference.slow import few_quick

STATE = kf.KalmanState(0.0, 1.0)


class DoubleConv(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, train):
        for name in ("conv1", "conv2"):
            x = nn.Conv(self.features, (3, 3), use_bias=False, padding=1, name=name)(x)
            x = nn.BatchNorm(not train, momentum=0.9, name=f"{name}_norm")(x)
            x = nn.relu(x)
        return x


class PlainUNet(nn.Module):
    """As anybody would write it in Flax, of depth 1 and width 2."""

    @nn.compact
    def __call__(self, x, train):
        a = DoubleConv(2, name="down1")(x, train)
        x = DoubleConv(4, name="bottom")(nn.max_pool(a, (2, 2), (2, 2)), train)
        x = jax.image.resize(x, (*a.shape[:3], 4), "nearest")
        x = DoubleConv(2, name="up1")(jnp.concatenate([a, x], -1), train)
        return nn.Dense(3, name="head")(x)


def unet(name="kalman", **size):
    entry = kf.normalization(name, momentum=0.9)
    return kf.SEGMENTERS["unet"](num_classes=3, **size, **entry._asdict())


def test_the_same_as_a_plain_unet_through_filtered():
    images = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    plain, ours = PlainUNet(), unet(width=2, depth=1)
    variables = jax.jit(plain.init, static_argnums=2)(jax.random.key(1), images, False)

    @jax.jit
    def run(variables, images):
        given, stats = (variables, images), {"mutable": ["batch_stats"]}
        filtered = kf.filtered(plain.apply, input_states={1: STATE})
        return (
            (ours.apply(*given, False, **stats), filtered(*given, True, **stats)),
            (ours.apply(*given, True), plain.apply(*given, False)),
            plain.apply(*given, True, **stats)[0],
        )

    training, inference, unfiltered = run(variables, images)
    for found, expected in training, inference:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
            found,
            expected,
        )
    assert training[0][0].shape == (2, 4, 6, 3)
    assert np.abs(unfiltered - training[0][0]).max() > 0.01  # it is not batch norm


@pytest.mark.parametrize("name", few_quick(kf.NORMALIZERS, ["group"]))
def test_with_every_normaliser_and_any_size(name):
    net = unet(name, width=4, depth=2)
    images = jax.ShapeDtypeStruct((2, 9, 7, 3), jnp.float32)
    keys = {"params": jax.random.key(0), "transition": jax.random.key(0)}
    logits, _ = jax.eval_shape(lambda x: net.init_with_output(keys, x, False), images)
    assert logits.shape == (2, 9, 7, 3) and logits.dtype == jnp.float32
