"""Inference by running statistics that each example moves towards its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax

from kalman_flax._filter.observe import observe
from kalman_flax._filter.state import KalmanState
from kalman_flax._filter.update import update
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
    inside = False  # of a normaliser: what it calls of its own is left alone

    def weigh(
        method: Callable[..., Any], args: Any, kwargs: Any, context: Any
    ) -> Signal | jax.Array:
        nonlocal inside
        name, module = context.method_name, context.module
        if inside or name not in ("__call__", "filter", "normalize"):
            return method(*args, **kwargs)
        if module.is_initializing() or not _keeps_moments(module):
            return method(*args, **kwargs)
        inside = True
        try:
            y = _infer(module, name, weight, *args, **kwargs)
        finally:
            inside = False
        return y

    with nn.intercept_methods(weigh):
        yield


def _keeps_moments(module: nn.Module) -> bool:
    return {"mean", "var"} <= set(module.variables.get("batch_stats", {}))


def _infer(
    module: nn.Module,
    method: str,
    weight: jax.Array | float,
    x: Signal | jax.Array,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
) -> Signal | jax.Array:
    """What `method` of a normaliser returns, with the example weighed in."""
    if use_running_average is None:
        use_running_average = module.use_running_average
    if use_running_average is False:
        raise ValueError(
            "weigh_example is for inference, but this is a training pass; call the"
            " network with use_running_average=True."
        )
    value = as_signal(x).value
    if method == "filter":
        return Signal(value)  # all in the second step
    variables = module.variables
    stats = variables["batch_stats"]
    states = update(
        KalmanState(stats["mean"], stats["var"]),
        observe(value, over="instance", axis=getattr(module, "axis", -1), mask=mask),
        weight,
    )
    unbound = module.clone(use_running_average=True, name=None)

    def infer(example: jax.Array, mean: jax.Array, var: jax.Array) -> jax.Array:
        weighed = {**stats, "mean": mean, "var": var}
        return unbound.apply({**variables, "batch_stats": weighed}, example[None])[0]

    value = jax.vmap(infer)(value, *states)
    return Signal(value) if isinstance(x, Signal) else value
