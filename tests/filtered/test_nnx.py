"""NNX models: `filtered` of one with nnx.BatchNorm, and kf.nnx.KalmanNorm."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import kalman_flax as kf
from tests.filtered.models.nnx_resnet import ResNet

STATES = {0: kf.KalmanState(0.0, 1.0)}
IMAGES = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
NORMS = {
    "batch": nnx.BatchNorm,
    "kalman": functools.partial(kf.nnx.KalmanNorm, gain=0.3),
}


class Linen(nn.Module):
    """The same network in linen, by the same names."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=False)
        conv = functools.partial(nn.Conv, 4, (3, 3))
        x = nn.relu(norm(name="norm")(conv(name="stem")(x)))
        y = conv(use_bias=False, name="conv1")(x)
        y = conv(use_bias=False, name="conv2")(nn.relu(norm(name="norm1")(y)))
        x = nn.relu(x + norm(name="norm2")(y))
        return nn.Dense(3, name="head")(jnp.mean(x, axis=(1, 2)))


def linen_variables(model):
    """The variables of an NNX ResNet as those of `Linen`."""

    def flat(kind):
        state = nnx.to_pure_dict(nnx.state(model, kind))
        return {**{k: v for k, v in state.items() if k != "block"}, **state["block"]}

    return {"params": flat(nnx.Param), "batch_stats": flat(nnx.BatchStat)}


@pytest.mark.parametrize("norm", NORMS)
def test_is_the_linen_model(norm):
    """Loss, gradients and the statistics, which move in place."""
    model = ResNet(nnx.Rngs(0), norm=NORMS[norm])
    variables = linen_variables(model)
    options = {"gain": 0.3} if norm == "batch" else {}

    @nnx.jit
    def step(model):
        def loss(model):
            apply = kf.filtered(model, input_states=STATES, **options)
            return jnp.mean(jnp.sin(3 * apply(IMAGES)))

        return nnx.value_and_grad(loss)(model)

    value, grads = step(model)
    apply = kf.filtered(
        Linen().apply, input_states={1: kf.KalmanState(0.0, 1.0)}, gain=0.3
    )

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def expected(params):
        v = {**variables, "params": params}
        y, updates = apply(v, IMAGES, mutable=["batch_stats"])
        return jnp.mean(jnp.sin(3 * y)), updates["batch_stats"]

    (linen_value, stats), linen_grads = expected(variables["params"])
    np.testing.assert_allclose(value, linen_value, rtol=1e-4)
    chex.assert_trees_all_close(
        linen_variables(model)["batch_stats"], stats, rtol=2e-4, atol=2e-5
    )
    pure = nnx.to_pure_dict(grads)
    np.testing.assert_allclose(
        pure["stem"]["kernel"], linen_grads["stem"]["kernel"], rtol=2e-3, atol=2e-5
    )


@pytest.mark.parametrize("norm", NORMS)
def test_explain_and_inference(norm):
    model = ResNet(nnx.Rngs(0), norm=NORMS[norm])
    apply = kf.filtered(model, input_states=STATES)
    rows = kf.explain(apply, IMAGES).rows
    assert [row.path for row in rows] == ["norm", "block/norm1", "block/norm2"]
    assert all(row.predicted for row in rows)
    model.eval()
    np.testing.assert_allclose(apply(IMAGES), model(IMAGES), rtol=1e-5)
    assert not kf.explain(apply, IMAGES).rows


def test_kalman_norm_takes_signals():
    """As the linen module does."""
    norm = kf.nnx.KalmanNorm(
        3, rngs=nnx.Rngs(0), gain=0.3, learn_gain="scalar", noise="additive"
    )
    linen = kf.KalmanNorm(False, gain=0.3, learn_gain="scalar", noise="additive")
    x = kf.Signal(IMAGES, kf.KalmanState(jnp.ones(3), jnp.ones(3)))
    variables = linen.init(jax.random.key(0), x)
    y, updates = linen.apply(variables, x, mutable=["batch_stats"])
    chex.assert_trees_all_close(norm(x), y)
    np.testing.assert_allclose(norm.mean[...], updates["batch_stats"]["mean"])
    norm.eval()
    assert norm(x).value.shape == x.value.shape


def test_decay_steps_has_no_room():
    with pytest.raises(ValueError, match=r"kalman_flax\.nnx"):
        kf.filtered(ResNet(nnx.Rngs(0)), decay_steps=10)
