"""A run small enough for a test: ResNet-8 of width 4, a few updates of 8 digits."""

from configs import base


def tiny_config(**overrides):
    config = base.get_config()
    config.update(
        train_examples=64,
        width=4,
        batch_size=8,
        epochs=2,
        log_steps=3,
        eval_batch_size=128,
    )
    config.update(overrides)
    return config
