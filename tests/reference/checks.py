"""Checks of a normaliser: degenerate inputs, derivatives in float64, two steps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference.slow import few_quick

KEY = jax.random.key(0)


def _degenerate(size=(2, 3, 3, 4)):
    noise = np.random.default_rng(0).normal(size=size)
    cases = {
        "zeros": np.zeros(size),
        "constant": np.full(size, 3.0),
        "constant below zero": np.full(size, -3.0),
        "one example": noise[:1],
        "1x1": noise[:, :1, :1],
        "one value": noise[:1, :1, :1],
        "large": 1e4 + noise,
        "tiny": 1e-6 * noise,
    }
    cases = {name: jnp.float32(value) for name, value in cases.items()}
    half = {f"{n} half": jnp.bfloat16(cases[n]) for n in ("zeros", "1x1", "large")}
    return cases | half


DEGENERATE = _degenerate()
#: Of them three are quick: no variance, one value of each channel, half precision.
each_degenerate = pytest.mark.parametrize(
    "case", few_quick(DEGENERATE, ("zeros", "one value", "large half"))
)


def assert_finite(norm, x, **kwargs):
    """Returns the output of a fresh `norm` on `x`, which must be finite, as must be
    its gradients by `x` and by the parameters."""
    variables = jax.jit(lambda: norm.init(KEY, x, **kwargs))()

    def loss(x, params):
        y, updates = norm.apply(
            {**variables, "params": params}, x, mutable=["batch_stats"], **kwargs
        )
        value = getattr(y, "value", y)
        return jnp.sum(jnp.sin(jnp.float32(value))), (value, updates)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True, allow_int=True))
    grads, (value, updates) = gradient(x, variables["params"])
    for leaf in jax.tree.leaves(jax.device_get((grads, value, updates))):
        assert np.all(np.isfinite(leaf)), leaf
    return value


def directional(ours, theirs, arguments, step=1e-6):
    """Derivatives of a scalar of ``fn(*arguments)``, one along a random direction of
    each leaf: of `ours` by JAX, of `theirs`, in float64, by central differences."""
    rng = np.random.default_rng(7)
    leaves, tree = jax.tree.flatten(jax.tree.map(np.float64, arguments))
    weights = rng.normal(size=np.shape(theirs(*arguments)))

    def loss(*arguments):
        return jnp.sum(jnp.float32(weights) * ours(*arguments))

    arguments = jax.tree.map(jnp.float32, arguments)
    grads = jax.grad(loss, argnums=tuple(range(len(arguments))))(*arguments)
    actual, expected = [], []
    for i, grad in enumerate(jax.tree.leaves(grads)):
        direction = rng.normal(size=leaves[i].shape)
        actual.append(np.sum(direction * np.float64(grad)))

        def value(t, i=i, direction=direction):
            moved = [*leaves[:i], leaves[i] + t * direction, *leaves[i + 1 :]]
            return np.sum(weights * theirs(*jax.tree.unflatten(tree, moved)))

        expected.append((value(step) - value(-step)) / (2 * step))
    return np.array(actual), np.array(expected)


class TwoSteps(nn.Module):
    """What a pre-activation network does with a normaliser."""

    norm: nn.Module

    def __call__(self, x):
        """Returns what is normalised, and the stream."""
        filtered = self.norm.filter(x)
        return self.norm.normalize(filtered), filtered.signal
