"""Normalisers by name: what `configs` and commands call them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn

from kalman_flax.baselines.flax_norms import BatchNorm, GroupNorm
from kalman_flax.layers.functions import relu
from kalman_flax.layers.kalman_norm import (
    KalmanNorm,
    PaperKalmanNorm,
    ReleasedKalmanNorm,
)
from kalman_flax.layers.linear import Conv, standardize_kernel
from kalman_flax.layers.signal import Signal
from kalman_flax.state import KalmanState


class Normalization(NamedTuple):
    """What a network is told of its normaliser: ``ResNet(..., **n._asdict())``.

    Attributes:
        norm: factory of the normaliser.
        conv: factory of the convolutions.
        input_state: what the filter knows of the input, or None.
        activation: what the network applies to what is normalised; the identity for a
            normaliser that has a nonlinearity of its own.
    """

    norm: Callable[..., nn.Module]
    conv: Callable[..., nn.Module] = Conv
    input_state: KalmanState | None = KalmanState(0.0, 1.0)
    activation: Callable[[Signal], Signal] = relu


_NORMALIZERS = {
    "batch": Normalization(BatchNorm),
    "group": Normalization(functools.partial(GroupNorm, num_groups=4)),
    "kalman": Normalization(KalmanNorm),
    "kalman_paper": Normalization(PaperKalmanNorm),
    "kalman_mc": Normalization(
        KalmanNorm, conv=functools.partial(Conv, transition="monte_carlo")
    ),
    # The released code starts with no state: its first normaliser only observes.
    "kalman_released": Normalization(ReleasedKalmanNorm, input_state=None),
}
NORMALIZERS: dict[str, Normalization] = _NORMALIZERS | {
    f"{name}_ws": entry._replace(
        conv=functools.partial(entry.conv, kernel_map=standardize_kernel)
    )
    for name, entry in _NORMALIZERS.items()
}


def normalization(
    name: str, *, momentum: float = 0.99, **options: Any
) -> Normalization:
    """Looks up a normaliser, ``"_ws"`` at the end of its name for weight-standardised
    kernels, and sets its attributes.

    Args:
        name: a key of `NORMALIZERS`.
        momentum: of the running statistics; unused by those that keep none.
        **options: attributes of the normaliser.

    Raises:
        ValueError: unknown name or attribute; both are listed.
    """
    if name not in NORMALIZERS:
        raise ValueError(
            f"unknown normaliser {name!r}; known are {', '.join(NORMALIZERS)}."
        )
    entry = NORMALIZERS[name]
    cls = entry.norm.func if isinstance(entry.norm, functools.partial) else entry.norm
    known = {f.name for f in dataclasses.fields(cls)} - {"parent", "name"}
    if unknown := sorted(set(options) - known):
        raise ValueError(
            f"{cls.__name__} ({name!r}) has no attribute {unknown};"
            f" it has {sorted(known)}."
        )
    if "momentum" in known:
        options["momentum"] = momentum
    return entry._replace(norm=functools.partial(entry.norm, **options))
