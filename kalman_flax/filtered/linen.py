"""Catches the normalisers of a linen model while it is traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from kalman_flax.filtered.marker import applying, bind
from kalman_flax.layers.calibrated import warn_if_not_started
from kalman_flax.layers.kalman_norm import KalmanNorm
from kalman_flax.layers.signal import Signal

#: attributes of `nn.BatchNorm` that say how its variance is computed, not what it is
_IMMATERIAL = ("use_fast_variance", "force_float32_reductions", "parent", "name")


def catcher(options: Mapping[str, Any], inference: bool) -> Callable[..., Any]:
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
            if isinstance(module, nn.BatchNorm):
                norm = as_kalman_norm(_attributes(module), options)
                own = norm.own_statistics(jnp.shape(x)[norm.axis])
                for name, value in own.items():
                    module.put_variable("batch_stats", name, value)
            return y
        if (running and not inference) or isinstance(x, Signal):
            return call(*args, **kwargs)
        if isinstance(module, KalmanNorm):
            norm = module.clone(parent=None, name=None)
        else:
            norm = as_kalman_norm(_attributes(module), options)
        norm = norm.clone(use_running_average=running)
        if norm.calibrate is not None and not running:
            warn_if_not_started(module.variables.get("batch_stats", {}))
        y, stats = bind(norm, "/".join(module.path), module.variables, x, mask)
        for name, value in stats.items():
            module.put_variable("batch_stats", name, value)
        return y

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


def _attributes(module: nn.BatchNorm) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(module))
    return {name: getattr(module, name) for name in names}


def as_kalman_norm(
    attributes: Mapping[str, Any], options: Mapping[str, Any]
) -> KalmanNorm:
    """Returns an unbound `KalmanNorm`: `attributes` of a batch norm, and `options`.

    Raises:
        ValueError: an attribute that `KalmanNorm` has not, and that makes a difference.
    """
    names = {field.name for field in dataclasses.fields(KalmanNorm)}
    ours = {}
    for name, value in attributes.items():
        if name in names - {"parent", "name"}:
            ours[name] = value
        elif name not in _IMMATERIAL and value is not None:
            raise ValueError(
                f"a batch norm has {name}={value!r}, which KalmanNorm has no"
                " counterpart of; leave it out."
            )
    return KalmanNorm(**{**ours, **options}, parent=None)
