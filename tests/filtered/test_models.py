"""How many normalisers of public model families get a prediction, and what loses it."""

import jax
import jax.numpy as jnp
import pytest

import kalman_flax as kf
from tests.filtered.models import efficientnet, resnet, unet, zoo

STATES = {1: kf.KalmanState(0.0, 1.0)}
KEY = jax.random.key(0)


def explain(model, shape, states=STATES, **options):
    """Of shapes: without computing anything."""
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(KEY, x, train=False), images)
    return kf.explain(
        kf.filtered(model.apply, input_states=states, **options),
        variables,
        images,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": KEY},
    )


@pytest.mark.parametrize(
    ("model", "shape", "count"),
    [
        (resnet.ResNet(), (2, 8, 8, 3), 6),
        (resnet.ResNet(norm=kf.KalmanNorm), (2, 8, 8, 3), 6),
        (unet.UNet(), (2, 8, 8, 3), 10),
        (efficientnet.EfficientNet(), (2, 8, 8, 3), 8),
        (zoo.DenseNet(), (2, 8, 8, 3), 10),
        (zoo.ConvMixer(), (2, 8, 8, 3), 5),
        (zoo.AudioNet(), (2, 16, 1), 3),
        (zoo.VideoNet(), (2, 4, 8, 8, 3), 3),
        (zoo.Upsampler(), (2, 4, 4, 3), 3),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "apply") else "",
)
def test_every_normaliser_is_predicted(model, shape, count):
    explanation = explain(model, shape)
    assert explanation.predicted == len(explanation.rows) == count, str(explanation)
    assert str(explanation).endswith(f"{count} of {count} normalisers predicted")
    assert len({row.path for row in explanation.rows}) == count


def test_a_layer_norm_loses_the_state_and_it_is_said():
    first, second = explain(zoo.HybridViT(), (2, 8, 8, 3)).rows
    assert first.predicted
    assert not second.predicted
    assert "zoo.py" in second.lost_at
    with pytest.raises(ValueError, match=second.path) as error:
        explain(zoo.HybridViT(), (2, 8, 8, 3), strict=True)
    assert second.lost_at in str(error.value)


def test_without_input_states_the_first_observes():
    first, *rest = explain(resnet.ResNet(), (2, 8, 8, 3), states={}).rows
    assert not first.predicted
    assert "input_states" in first.lost_at
    assert all(row.predicted for row in rest)
