"""Before the first update: statistics set by forward passes, or from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from kalman_flax._filter.calibration import uncorrected
from kalman_flax.layers.calibrated import NAMES, not_training
from kalman_flax.layers.kalman_norm import KalmanNorm
from kalman_flax.layers.normalizer import Filtered
from kalman_flax.layers.signal import Signal, as_signal

#: counts of updates in ``batch_stats``: no pass before the first is one
_COUNTS = ("step", "steps")

#: part of the key of jax.jit's caches, so that no function that was traced before, and
#: seeds nothing, serves in its place
_seeding = jax.make_user_context(default_value=None)


def calibrate(
    apply: Callable[[Any, Any], Any], variables: Any, batches: Iterable[Any]
) -> dict[str, Any]:
    """Sets the statistics of a network before its first update, by forward passes.

    Each pass moves them as in training, and nothing else: parameters stay, and so do
    counts of updates (``steps``), by which gains and ramps change. `KalmanNorm` with
    `calibrate` needs such a start: 10 batches of the size of an update. Its correction
    is right from the first pass. Running ``mean`` and ``var`` move by 1 - momentum a
    pass, as always, and so forget their 0 and 1 over 1 / (1 - momentum) passes and
    more. For every normaliser that keeps statistics in ``batch_stats``.

        @jax.jit
        def forward(variables, images):
            return model.apply(variables, images, train=True, mutable=["batch_stats"])

        variables = kf.calibrate(forward, variables, batches)

    Args:
        apply: maps variables and a batch to what a training pass returns: its outputs,
            and what it wrote, with ``batch_stats``. For several micro-batches, merged
            by `merge_running`. Jit it.
        variables: of the network, with ``batch_stats``.
        batches: training examples, as `apply` takes them.

    Returns:
        `variables` with other ``batch_stats``.

    Raises:
        ValueError: no ``batch_stats``, or no batch; a pass that returns none, or moves
            none; statistics that are not finite in the end.
    """
    if not variables.get("batch_stats"):
        raise ValueError(
            "the variables have no batch_stats: this network keeps no statistics that"
            " could be set."
        )
    stats: dict[Any, Any] = traverse_util.flatten_dict(variables["batch_stats"])
    old, passes = stats, 0
    for batch in batches:
        passes += 1
        given = {**variables, "batch_stats": traverse_util.unflatten_dict(stats)}
        with not_training():
            stats = traverse_util.flatten_dict(_written(apply(given, batch)))
        for path in stats:
            if path[-1] in _COUNTS:
                stats[path] = old.get(path, jnp.zeros_like(stats[path]))
    if not passes:
        raise ValueError("no batches; calibrating needs at least one.")
    if old.keys() == stats.keys() and all(
        jnp.array_equal(stats[path], old[path], equal_nan=True) for path in old
    ):
        raise ValueError(
            "the passes moved no statistics; call the network as in training, e.g. with"
            " train=True or use_running_average=False."
        )
    if bad := ["/".join(p) for p, s in stats.items() if not jnp.all(jnp.isfinite(s))]:
        raise ValueError(
            f"after {passes} passes these statistics are infinite or NaN:"
            f" {', '.join(bad)}; look at the examples, and at the parameters."
        )
    return {**variables, "batch_stats": traverse_util.unflatten_dict(stats)}


def seed_calibration(
    fn: Callable[..., Any], variables: Any, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Starts `KalmanNorm.calibrate` from a checkpoint's moving statistics.

    Sets each correction so that the corrected prediction is the running ``mean`` and
    ``var`` of its layer: training begins as with frozen batch norm. With ``"both"`` and
    gain 0 it begins exactly so; with a small gain the micro-batch counts by as much.
    With ``"var"`` the means stay as predicted. One pass through the network does it,
    in which every layer normalises by its running statistics and hands them on.

        apply = kf.filtered(model.apply, input_states=STATES, calibrate="both")
        variables = kf.seed_calibration(
            apply, checkpoint, images, train=True, mutable=["batch_stats"]
        )

    Args:
        fn: a function of `variables` and the other arguments, that returns outputs and
            what was written: the ``apply`` of a network of Signals, or what
            `kalman_flax.filtered` returned. Jit it where it is large.
        variables: with the running statistics to begin with.
        *args, **kwargs: of a training pass, with ``batch_stats`` mutable. The values of
            the inputs matter only where the filter observes on the way, as behind a
            max-pool; then take a large batch.

    Returns:
        `variables` with other corrections in ``batch_stats``, and all else as it was.

    Raises:
        ValueError: there is nothing to seed; ``batch_stats`` are not mutable, or not
            returned.
    """
    seeded: list[str] = []

    def seed(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if (
            not isinstance(module, KalmanNorm)
            or module.calibrate is None
            or context.method_name != "filter"
            or module.is_initializing()
        ):
            return call(*args, **kwargs)
        filtered, predicted = _seed(module, *args, **kwargs)
        seeded.extend(["/".join(module.path)] * predicted)
        return filtered

    with not_training(), _seeding(True), nn.intercept_methods(seed):
        stats = _written(fn(variables, *args, **kwargs))
    if not seeded:
        raise ValueError(
            "no KalmanNorm with calibrate got a prediction in this call: there is"
            " nothing to seed. Give it calibrate='both', see kalman_flax.explain for"
            " the predictions, and call the network as in training."
        )
    flat: dict[Any, Any] = traverse_util.flatten_dict(variables.get("batch_stats", {}))
    written = traverse_util.flatten_dict(stats).items()
    flat |= {path: stat for path, stat in written if path[-1] in NAMES}
    return {**variables, "batch_stats": traverse_util.unflatten_dict(flat)}


def _seed(
    module: KalmanNorm,
    x: Signal | jax.Array,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
) -> tuple[Filtered, bool]:
    """In the place of `KalmanNorm.filter`: leaves the correction of the prediction to
    the running moments, and filters as in inference; says whether there was one."""
    value, _ = module._masked(x, mask)
    parameters, running = module._variables(value)
    filtered = Filtered(value, running, as_signal(x).valid)
    predicted = module._predicted(Signal(value, as_signal(x).state))
    if predicted is None:
        return filtered, False
    if not module.is_mutable_collection("batch_stats"):
        raise ValueError(
            "the corrections of calibrate are kept in batch_stats, which this call may"
            ' not write; add mutable=["batch_stats"].'
        )
    start = uncorrected(value.shape[module.axis])
    learned = module._learn(
        start, predicted, running, parameters.predict_noise, momentum=0.0
    )
    module._put_correction(learned, start)
    return filtered, True


def _written(returned: Any) -> Any:
    """The ``batch_stats`` of what a call of a network returned.

    Raises:
        ValueError: there are none.
    """
    written: Any = {}
    if isinstance(returned, tuple) and len(returned) > 1:
        written = returned[1]
    if not hasattr(written, "get") or not written.get("batch_stats"):
        raise ValueError(
            "the call returned no batch_stats; expected what a training pass of a Flax"
            " network returns, (outputs, updates): call it with"
            ' mutable=["batch_stats"].'
        )
    return written["batch_stats"]
