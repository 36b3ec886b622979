"""Mask R-CNN with a convolution in place of each half of its ResNet: all of a detector
but what classifiers have too, in a program that compiles in seconds."""

import functools
from typing import Any

import flax.linen as nn

from kalman_flax.models.detection import MaskRCNN


class ConvNorm(nn.Module):
    """A 1x1 convolution of stride 2, a norm and an activation."""

    features: int
    layers: Any

    @nn.compact
    def __call__(self, x):
        layers = self.layers
        return layers.conv_norm_activation(x, self.features, 1, strides=2, name="conv")


class Shallow(MaskRCNN):
    """Two convolutions, each with norm and activation."""

    def _maps(self, images, layers):
        (stride,) = self.strides
        conv = layers.conv_norm_activation
        return [conv(images, self.width, 7, strides=stride, name="stem")]

    def _stage(self, number, layers):
        return [ConvNorm(self.width, layers, name=f"stage{number}_block1")]


DETECTORS = {"shallow": functools.partial(Shallow, stem_pool=False)}
