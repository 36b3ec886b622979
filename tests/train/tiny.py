"""Classification for tests of the trainer, as a plugin: `cifar_resnet` is one stage.

A ResNet-8 takes more than twice as long to trace and to compile, and what the trainer
does with a network needs no more than a few layers.
"""

import dataclasses
import functools

from kalman_flax.models.resnet import Block, ResNet
from train.engine.classification import Classification, make_network


class OneStage(ResNet):
    """Stem, blocks at half the size, and a norm: three normalisers with one block."""

    def _features(self, x, layers):
        norm, conv, activation = layers
        x = activation(norm(name="stem_norm")(conv(self.width, (3, 3), name="stem")(x)))
        block = functools.partial(
            self._block(Block), 2 * self.width, **layers._asdict()
        )
        for index in range(1, self.blocks_per_stage + 1):
            options = {"strides": 2, "normalized_input": True} if index == 1 else {}
            x = block(**options, name=f"stage1_block{index}")(x)
        return activation(norm(name="final_norm")(x))


class TinyClassification(Classification):
    @classmethod
    def build(cls, config, mesh, data_dir):
        task = super().build(config, mesh, data_dir)
        known = {"cifar_resnet": OneStage}
        network = make_network(config, task.dataset.num_classes, known)
        return dataclasses.replace(task, network=network)


TASKS = {"tiny": TinyClassification}
