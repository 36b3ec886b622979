"""Mask R-CNN with a convolution in place of each half of its ResNet: all of a detector
but what classifiers have too, in a program that compiles in seconds."""

import functools

from kalman_flax.models.detection import MaskRCNN


class Shallow(MaskRCNN):
    """Two convolutions, each with norm and activation."""

    def _maps(self, images, layers):
        (stride,) = self.strides
        conv = layers.conv_norm_activation
        return [conv(images, self.width, 7, strides=stride, name="stem")]

    def _stage(self, number, layers):
        conv = functools.partial(layers.conv_norm_activation, name=f"stage{number}")
        return [lambda x: conv(x, self.width, 1, strides=2)]


DETECTORS = {"shallow": functools.partial(Shallow, stem_pool=False)}
