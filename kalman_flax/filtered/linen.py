"""Catches the normalisers of a linen model while it is traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kalman_flax.filtered.marker import Normalizer, applying, kalman_norm_p
from kalman_flax.layers.kalman_norm import KalmanNorm
from kalman_flax.layers.signal import Signal

#: attributes of `nn.BatchNorm` that choose how its variance is computed, not what it is
_IMMATERIAL = ("use_fast_variance", "force_float32_reductions")


def catcher(
    options: Mapping[str, Any], inference: bool
) -> Callable[..., Any]:
    """Returns an interceptor for `nn.intercept_methods`: puts a `kalman_norm_p` in the
    place of every `nn.BatchNorm` and `KalmanNorm` that is called in training.

    Names, variables and checkpoints stay as they are.

    Args:
        options: of the `KalmanNorm` that takes the place of an `nn.BatchNorm`.
        inference: whether to catch them in inference, too.
    """

    def intercept(
        call: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Any:
        module = context.module
        if applying() or not _is_own_call(module, context):
            return call(*args, **kwargs)
        x, running, mask = _arguments(*args, **kwargs)
        running = nn.merge_param(
            "use_running_average", module.use_running_average, running
        )
        if module.is_initializing():
            y = call(*args, **kwargs)
            if options.get("decay_steps") and isinstance(module, nn.BatchNorm):
                module.put_variable("batch_stats", "steps", jnp.zeros((), jnp.float32))
            return y
        if (running and not inference) or isinstance(x, Signal):
            return call(*args, **kwargs)
        norm = as_kalman_norm(module, options).clone(use_running_average=running)
        return _bind(module, norm, x, mask)

    return intercept


def _is_own_call(module: nn.Module, context: Any) -> bool:
    """Whether it is the `__call__` of these classes themselves that is called: that of
    a subclass calls it in its turn."""
    if context.method_name != "__call__":
        return False
    function = getattr(context.orig_method, "func", None)
    return any(
        isinstance(module, cls) and function is cls.__call__.__wrapped__
        for cls in (nn.BatchNorm, KalmanNorm)
    )


def _arguments(
    x: Any, use_running_average: bool | None = None, *, mask: Any = None
) -> tuple[Any, bool | None, Any]:
    return x, use_running_average, mask


def as_kalman_norm(module: nn.Module, options: Mapping[str, Any]) -> KalmanNorm:
    """Returns an unbound `KalmanNorm`: of the attributes of an `nn.BatchNorm`, and
    `options`; or the module's own clone, if it is one.

    Raises:
        ValueError: an attribute of `nn.BatchNorm` that `KalmanNorm` has not.
    """
    if isinstance(module, KalmanNorm):
        return module.clone(parent=None, name=None)
    names = {field.name for field in dataclasses.fields(KalmanNorm)}
    own = {}
    for field in dataclasses.fields(module):
        if field.name in ("parent", "name", *_IMMATERIAL):
            continue
        value = getattr(module, field.name)
        if field.name in names:
            own[field.name] = value
        elif value != field.default:
            raise ValueError(
                f"nn.BatchNorm has {field.name}={value!r}, which KalmanNorm has no"
                " counterpart of; leave it out."
            )
    return KalmanNorm(**{**own, **options}, parent=None)


def _bind(module: nn.Module, norm: KalmanNorm, x: jax.Array, mask: Any) -> jax.Array:
    x = jnp.asarray(x)
    variables = {
        name: dict(module.variables.get(name, {})) for name in ("params", "batch_stats")
    }
    stats = variables["batch_stats"]
    shape = (x.shape[norm.axis],)
    stats.setdefault("mean", jnp.zeros(shape, jnp.float32))
    stats.setdefault("var", jnp.ones(shape, jnp.float32))
    if norm.decay_steps is not None:
        stats.setdefault("steps", jnp.zeros((), jnp.float32))
    moved = () if norm.use_running_average else tuple(sorted(stats))
    leaves, structure = jax.tree.flatten((variables, mask))
    caught = Normalizer(norm, "/".join(module.path), structure, moved)
    y, *new = kalman_norm_p.bind(x, *leaves, norm=caught, batch=())
    for name, value in zip(moved, new):
        module.put_variable("batch_stats", name, value)
    return y
