"""Inference by running statistics that each example moves towards its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kalman_flax._filter.observe import observe
from kalman_flax._filter.state import KalmanState
from kalman_flax._filter.update import update
from kalman_flax.layers.normalizer import Filtered
from kalman_flax.layers.signal import Signal, as_signal


@contextlib.contextmanager
def weigh_example(weight: jax.Array | float) -> Iterator[None]:
    """Weighs every example into the statistics it is normalised by, in inference
    ("inference example weighing": Summers and Dinneen, ICLR 2020, "Four Things Everyone
    Should Know to Improve Batch Normalization", code in four_things_batch_norm). In
    training an example is part of its batch's statistics, in inference it is not: the
    smaller the batch, the larger the difference. With a the weight, mu the running mean
    and x the values of one channel of one example,

        mean = (1 - a) mu + a E[x],  E[x^2] likewise,  var = E[x^2] - mean^2,

    which is the mixture `update` of the running state with what the example shows.
    Costs no parameter and no training; in inference what instance norm costs. Try it on
    a network trained with small micro-batches, and choose a on images it is not tested
    on. EvalNorm (Singh and Shrivastava, ICCV 2019) is the same idea with weights of
    every layer, one for the mean and one for the variance, estimated during training;
    here one weight, which is set, serves all.

    ::

        with weigh_example(0.2):
            logits = network.apply(variables, images, use_running_average=True)

    It affects all normalisers below, of any class, that keep a running ``mean`` and
    ``var``; each then infers by its own rule. At 0 nothing changes, at 1 batch norm is
    instance norm. The states of Signals end there: the moments of an example are not
    those of a micro-batch. A function jitted outside may have been traced before, and
    would not notice: enter inside of it, where `weight` may be an argument.

    Args:
        weight: a in [0, 1].

    Raises:
        ValueError: a weight outside [0, 1], or a training pass below.
    """
    if isinstance(weight, (int, float)) and not 0.0 <= weight <= 1.0:
        raise ValueError(f"weight is {weight}; expected a number in [0, 1].")
    with nn.intercept_methods(_Weigher(weight)):
        yield


class _Weigher:
    """Intercepts the outermost calls of normalisers that keep running moments."""

    def __init__(self, weight: jax.Array | float):
        self.weight = weight
        self.inside = False  # of a normaliser: what it calls of its own is left alone

    def __call__(
        self,
        method: Callable[..., Any],
        args: Any,
        kwargs: Any,
        context: nn.module.InterceptorContext,
    ) -> Any:
        name, module = context.method_name, context.module
        steps = {"__call__": _infer, "filter": _only_observe, "normalize": _infer}
        if self.inside or name not in steps or not _keeps_moments(module):
            return method(*args, **kwargs)
        self.inside = True
        try:
            return steps[name](module, self.weight, *args, **kwargs)
        finally:
            self.inside = False


def _keeps_moments(module: nn.Module) -> bool:
    stats = module.variables.get("batch_stats", {})
    return not module.is_initializing() and {"mean", "var"} <= set(stats)


def _only_observe(
    module: nn.Module,
    weight: jax.Array | float,
    x: Signal | jax.Array,
    use_running_average: bool | None = None,
    **_: Any,
) -> Filtered:
    """In the place of the first step: the second one does all."""
    _refuse_training(module, use_running_average)
    x = as_signal(x)
    return Filtered(x.value, None, x.valid)


def _infer(
    module: nn.Module,
    weight: jax.Array | float,
    x: Signal | Filtered | jax.Array,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
) -> Signal | jax.Array:
    """In the place of the call: each example by statistics of its own."""
    _refuse_training(module, use_running_average)
    ours = isinstance(x, Signal | Filtered)
    value, valid = (x.value, x.valid) if ours else (jnp.asarray(x), None)
    if valid is not None:
        mask = valid if mask is None else mask & valid
    states = _weigh(module, weight, value, mask)
    variables = module.variables
    unbound = module.clone(use_running_average=True, name=None)

    def infer(example: jax.Array, state: KalmanState) -> jax.Array:
        stats = {**variables["batch_stats"], **state._asdict()}
        return unbound.apply({**variables, "batch_stats": stats}, example[None])[0]

    value = jax.vmap(infer)(value, states)
    return Signal(value, valid=valid) if ours else value


def _refuse_training(module: nn.Module, use_running_average: bool | None) -> None:
    if use_running_average is None:
        use_running_average = module.use_running_average
    if use_running_average is False:
        raise ValueError(
            "weigh_example is for inference, but this is a training pass; call the"
            " network with use_running_average=True."
        )


def _weigh(
    module: nn.Module,
    weight: jax.Array | float,
    value: jax.Array,
    mask: jax.Array | None,
) -> KalmanState:
    """The running moments moved towards those of each example, ``[N, C]``."""
    stats = module.variables["batch_stats"]
    return update(
        KalmanState(stats["mean"], stats["var"]),
        observe(value, over="instance", axis=getattr(module, "axis", -1), mask=mask),
        weight,
    )
