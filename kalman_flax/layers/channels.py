"""What an index, or a constant, has to do with the channels, which are last."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def picked_channels(parts: tuple, ndim: int) -> slice | None:
    """Which channels an index picks; None where the last axis is no longer theirs."""

    def is_plain(part: Any) -> bool:
        dtype = getattr(part, "dtype", None)
        return (
            part is None
            or isinstance(part, (int, slice, type(Ellipsis)))
            or (dtype is not None and jnp.issubdtype(dtype, jnp.integer))
        )

    if not all(map(is_plain, parts)):
        return None
    last = parts[-1] if parts else Ellipsis
    dots = any(part is Ellipsis for part in parts)
    named = sum(part is not None and part is not Ellipsis for part in parts)
    if last is Ellipsis or (not dots and named < ndim):
        return slice(None)
    return last if isinstance(last, slice) else None


def per_channel(constant: Any, shape: tuple[int, ...]) -> jax.Array | None:
    """Returns `constant` as a number or ``[C]``; None where it differs by position, or
    has the value's own shape, as another activation would."""
    of_constant = jnp.shape(constant)
    if of_constant == ():
        return constant
    *positions, channels = of_constant
    alone = len(of_constant) > 1 and of_constant == shape
    if alone or channels not in (1, shape[-1]) or any(n != 1 for n in positions):
        return None
    return jnp.reshape(constant, (channels,))
