"""Kalman Normalization as a Flax module that goes where `nn.BatchNorm` went."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from kalman_flax._filter.calibration import (
    Corrected,
    Correction,
    merged_corrections,
    uncorrected,
)
from kalman_flax._filter.mixture import merged
from kalman_flax._filter.state import KalmanState
from kalman_flax._filter.update import (
    Rule,
    choose,
    is_known,
    normalize,
    normalized_state,
    reject_outlier,
    update,
)
from kalman_flax._kernels import hold
from kalman_flax.layers.calibrated import Calibrated, Change
from kalman_flax.layers.micro_batches import each, of_examples
from kalman_flax.layers.normalizer import (
    Affine,
    Filtered,
    RunningNormalizer,
    filtered_moments,
)
from kalman_flax.layers.remat import keep
from kalman_flax.layers.signal import Signal, as_signal, state_of
from kalman_flax.layers.unpredicted import warn_of_plain_array

LearnGain = Literal["scalar", "channel"]
Noise = Literal["additive", "multiplicative"]
Propagate = Literal["normalized", "raw"]


class Parameters(NamedTuple):
    """What a Kalman normaliser learns, as its equations use it."""

    gain: jax.Array | float  # q in [0, 1], scalar or [C]
    predict_noise: Change  # adds R to a prediction
    scale: jax.Array | float  # gamma, [C]
    bias: jax.Array | float  # beta, [C]


class FilterParameters(Affine):
    """Mixin of what every Kalman normaliser learns.

    Its attributes are those of `KalmanNorm`, with the same meaning.
    """

    # What the module has that mixes this in.
    gain: float
    learn_gain: LearnGain | None
    noise: Noise | None
    propagate: Propagate

    def __post_init__(self):
        if self.learn_gain and self.gain in (0.0, 1.0):
            raise ValueError(
                f"gain is {self.gain}, which a sigmoid never leaves; start a learned"
                " gain inside (0, 1), or fix it with learn_gain=None."
            )
        super().__post_init__()

    def _parameters(self, channels: int) -> Parameters:
        """To be called in the compact method of the normaliser."""
        gain, noise = self._gain((channels,)), self._noise((channels,))
        return Parameters(gain, noise, *self._affine(channels))

    def _gain(self, shape: tuple[int, ...]) -> jax.Array | float:
        if self.learn_gain is None:
            return self.gain
        logit = nn.initializers.constant(jax.scipy.special.logit(self.gain))
        shape = () if self.learn_gain == "scalar" else shape
        return jax.nn.sigmoid(self.param("gain", logit, shape, jnp.float32))

    def _noise(self, shape: tuple[int, ...]) -> Change:
        if self.noise is None:
            return lambda state: state
        if self.noise == "additive":
            init = nn.initializers.constant(jnp.log(jnp.expm1(0.01)))
            r = jax.nn.softplus(self.param("noise", init, shape, jnp.float32))
            return lambda state: state._replace(var=state.var + r)
        r = jnp.exp(self.param("noise", nn.initializers.zeros, shape, jnp.float32))
        return lambda state: state._replace(var=state.var * r)

    def _combine(
        self,
        predicted: KalmanState,
        observed: KalmanState,
        parameters: Parameters,
        rule: Rule = "mixture",
        outlier_ratio: float | None = None,
    ) -> KalmanState:
        """The update; what is observed where the prediction is infinite or NaN, which
        says nothing."""
        # With what noise and correction make of it, which may overflow.
        known = is_known(parameters.predict_noise(lax.stop_gradient(predicted)))
        # Put aside before anything is computed of it: 0 inf is NaN in gradients.
        predicted = choose(known, predicted, KalmanState(0.0, 1.0))
        predicted = parameters.predict_noise(predicted)
        if outlier_ratio is not None:
            predicted = reject_outlier(predicted, observed, outlier_ratio)
        # Keeps XLA:CPU from computing these small vectors, and those of all layers
        # below that they follow from, again at every pixel.
        updated = hold(update(predicted, observed, parameters.gain, rule))
        return choose(known, updated, observed)


class KalmanNorm(FilterParameters, Calibrated, RunningNormalizer):
    r"""Normalises by the Kalman estimate of the mean and variance.

    $$
    \hat{\mu} = p \, \mu_{\mathrm{pred}} + q \, \bar{x}, \qquad
    \hat{\Sigma} = p \, (\Sigma_{\mathrm{pred}} + R) + q \, S
    + p \, q \, (\bar{x} - \mu_{\mathrm{pred}})^2
    $$

    $$
    y = \gamma \, \frac{x - \hat{\mu}}{\sqrt{\hat{\Sigma} + \epsilon}} + \beta
    $$

    $\mu_{\mathrm{pred}}$ and $\Sigma_{\mathrm{pred}}$ are the state that comes with the
    Signal. $\bar{x}$ and $S$ are the mean and variance of the micro-batch. $q$ is the
    gain, $p = 1 - q$. $R$ is the process noise, 0 by default. $\gamma$ and $\beta$ are
    ``scale`` and ``bias``. The last term is that of the rule "mixture"; Eq. 7 is
    without it.

    On a plain array, a Signal of unknown state, or with gain 1 it is `nn.BatchNorm`,
    and it always is in inference.

    Source:
        Wang et al., "Kalman Normalization: Normalizing Internal Representations Across
        Network Layers" (NeurIPS 2018), Eq. 6 and 7. The defaults are ours;
        `kalman_flax.layers.presets` has the paper's form and the authors' code beside
        them, and says why they differ.

    Cost:
        - Parameters: 2 C as batch norm; with `learn_gain` 1 or C more, with `noise` C
          more.
        - Statistics: 2 C running ones, as batch norm, and a counter with `decay_steps`.
        - Passes: those of batch norm, and arithmetic on ``[C]`` vectors.
        - Inference: that of batch norm.

    When to use:
        Where 1 to 4 images share statistics. Trained from scratch, take centred kernels
        (``"kalman_wc"``). Where many do, batch norm is simpler.

    Variables:
        Those of `nn.BatchNorm`: parameters ``scale`` and ``bias``, and in
        ``batch_stats`` the running ``mean`` and ``var`` of the filtered moments, all
        ``[C]``. With options the parameters ``gain`` and ``noise`` and, in
        ``batch_stats``, ``steps``, ``offset``, ``ratio`` and ``weight``. Where the
        collection ``intermediates`` is mutable, the states ``observed``, ``predicted``
        and ``filtered`` are left there.

    State:
        Hands on the state of what it put out, mean $\beta$ and variance $\gamma^2$; see
        `propagate`.

    Attributes are those of `nn.BatchNorm` up to `axis_name`, and:

    Attributes:
        gain: q, the weight of the observation in [0, 1]; the value learning starts from
            when it is learned. The smaller, the nearer is inference to training.
        learn_gain: None (fixed), ``"scalar"`` (one per layer, as in the paper) or
            ``"channel"``. Adds a parameter ``gain``, the logit of q.
        noise: R: None, ``"additive"`` (Sigma_pred + R, R = softplus, from 0.01) or
            ``"multiplicative"`` (Sigma_pred R, R = exp, from 1). Adds a parameter
            ``noise`` ``[C]``.
        rule: ``"mixture"`` or ``"paper"``, see `update`.
        propagate: ``"normalized"``: the moments of the output, which is what enters the
            next layer; or ``"raw"``: the filtered moments of the input, which is what
            Eq. 7 says literally and no stable filter in deep networks
            (`kalman_flax.layers.presets` shows why).
        outlier_ratio: None, or the limit of `reject_outlier`.
        decay_steps: None, or the training steps over which q falls to 0 along half a
            cosine, as learning rates do. With as many as there are in the run, training
            ends with the statistics of inference: those of a single image stop counting
            (docs/lab/evidence.md has what that is worth, and how a gain of 0 can go
            astray at high learning rates). Counted by ``steps`` in ``batch_stats``, a
            float32 scalar, exact to 2^24.
        axis_name: share observed statistics over this mapped axis, as in
            `nn.BatchNorm`. None observes the batch that the module gets: that of one
            replica under `jax.vmap`, of one device under `jax.shard_map` and
            `jax.pmap`. Under plain `jax.jit` it is the whole batch, however a
            `NamedSharding` splits it over devices, and statistics are global.
        micro_batch_size: None, or the number of examples that share statistics: every
            so many that follow each other are a replica, as if `jax.vmap` ran over them
            and `kalman_flax.merge_running` over what they wrote. That is for plain
            `jax.jit` of a sharded batch: where devices hold whole micro-batches,
            statistics need no communication in training, and only the running ones
            are averaged over the devices.
        calibrate: None, or what of the prediction to correct by how far it was off in
            past updates (`kalman_flax.filter.correct`): ``"var"``, or ``"both"`` mean
            and variance. Averages decay by `momentum`, without a gradient, and live as
            ``offset``, ``ratio`` and ``weight`` ``[C]`` in ``batch_stats``. Start them
            before the first update, by `kalman_flax.calibrate`, or from a batch-norm
            checkpoint by `kalman_flax.seed_calibration`, which needs ``"both"`` to
            begin as that normalised. Without a prediction there is nothing to correct.

    Raises:
        ValueError: a gain outside [0, 1], or outside (0, 1) where it is learned; an
            unknown option; no steps to decay over; a state of another number of
            channels than the value; a `micro_batch_size` that does not divide the
            batch, or together with `axis_name` or ``propagate="raw"``; in training,
            `calibrate` with variables of a network without it.
    """

    gain: float = 0.02
    learn_gain: LearnGain | None = None
    noise: Noise | None = None
    rule: Rule = "mixture"
    propagate: Propagate = "normalized"
    outlier_ratio: float | None = None
    decay_steps: int | None = None
    micro_batch_size: int | None = None
    calibrate: Corrected | None = None

    def __post_init__(self):
        if self.micro_batch_size is not None and self.axis_name is not None:
            raise ValueError(
                f"micro_batch_size is {self.micro_batch_size}, which shares no"
                f" statistics beyond the micro-batch, and axis_name {self.axis_name!r}"
                " does; give one of them."
            )
        if self.micro_batch_size is not None and self.propagate == "raw":
            raise ValueError(
                'propagate="raw" hands on a state of each micro-batch, and'
                f" micro_batch_size={self.micro_batch_size} one for all of them; take"
                ' propagate="normalized", or jax.vmap over the micro-batches.'
            )
        super().__post_init__()

    def __call__(
        self,
        x: Signal | jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> Signal | jax.Array:
        """Filters and normalises.

        Args:
            x: ``[N, ..., C]``, a Signal or a plain array.
            use_running_average: True normalises by the moving statistics (inference,
                the paper's option A); False by the filtered statistics of this
                micro-batch (training, and option B), which moves the averages.
            mask: broadcastable to `x`; values where it is false do not count, and some
                have to: a channel masked out entirely is observed as 0.

        Returns:
            What came in, normalised: a Signal for a Signal, an array for an array.
        """
        y = self.normalize(self.filter(x, use_running_average, mask=mask))
        return y if isinstance(x, Signal) else y.value

    def filter(
        self,
        x: Signal | jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> Filtered:
        """The first step: returns the value with the moments to normalise it by.

        A pre-activation network keeps its `Filtered.signal` for the shortcut.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        valid, (value, mask) = as_signal(x).valid, self._masked(x, mask)
        parameters, running = self._variables(value)
        predicted = self._predicted(Signal(value, as_signal(x).state))
        if use_running_average:
            return Filtered(value, running, valid)
        if not isinstance(x, Signal):
            warn_of_plain_array(self)
        # Has XLA:CPU form the gradient of the input once, not for each of its readers.
        value = hold(value)
        correction = None if predicted is None else self._correction()
        noise = parameters.predict_noise
        if correction is not None:
            parameters = parameters._replace(
                predict_noise=self._correcting(correction, noise)
            )

        def combine(
            value: jax.Array, mask: jax.Array | None, predicted: KalmanState | None
        ) -> tuple[KalmanState, KalmanState, Correction | None]:
            observed = self._observe(
                value,
                axis=self.axis,
                mask=mask,
                guess=self._guess(predicted, running, parameters),
                alone=predicted is None,
            )
            learned = None
            if predicted is not None and correction is not None:
                learned = self._learn(correction, predicted, observed, noise)
            filtered = self._filtered(predicted, observed, parameters)
            return observed, keep(filtered), learned

        size = None if self.is_initializing() else self.micro_batch_size
        run = each(combine, size, self.axis) if size else combine
        observed, filtered, learned = run(value, mask, predicted)
        self._report(observed=observed, predicted=predicted, filtered=filtered)
        self._move_running(running, merged(filtered) if size else filtered)
        if correction is not None:
            learned = merged_corrections(learned) if size else learned
            self._put_correction(learned, correction)
        self._count_step()
        filtered = of_examples(filtered, size) if size else filtered
        return Filtered(value, filtered, valid)

    def normalize(self, x: Filtered) -> Signal:
        """The second step: normalises what `filter` returned by its moments.

        Raises:
            ValueError: something else than `filter` returns.
        """
        state = filtered_moments(self, x)
        (*_, scale, bias), _ = self._variables(x.value)
        y = normalize(x.value, state, scale, bias, epsilon=self.epsilon, axis=self.axis)
        if self.propagate == "normalized":
            state = normalized_state(scale, bias)
        return Signal(self._cast(x.value, y, scale, bias), state, x.valid)

    def _predicted(self, x: Signal) -> KalmanState | None:
        """What is known of `x`, ``[C]``, before it is observed; ``[N, C]`` behind
        another normaliser's `filter`, with a `micro_batch_size`."""
        state = state_of(x, self.axis)
        if state is not None and jnp.ndim(state.mean) > 1 + bool(self.micro_batch_size):
            raise ValueError(
                f"KalmanNorm got a state of shape {jnp.shape(state.mean)}; expected one"
                " state [C] for the micro-batch. jax.vmap over several, or give"
                " micro_batch_size."
            )
        return state

    def _guess(
        self,
        predicted: KalmanState | None,
        running: KalmanState,
        parameters: Parameters,
    ) -> jax.Array | None:
        """What to take the moments about in one pass, where nothing can be lost by it.

        Rounding then adds an error of e (mean - guess)^2 to the variance S, e some
        1e-7, all of it where the guess is far off. With the predicted mean as guess the
        rule "mixture" adds p q (mean - guess)^2 to q S, so that the filtered variance
        is wrong by e / p of itself: 1e-5 for a gain up to 0.99. The rule "paper" has no
        such term, a learned gain may come as close to 1 as it likes, and where a
        prediction is rejected the observation stands alone: no guess then.
        """
        bounded = self.learn_gain is None and self.gain <= 0.99
        rejects = self.outlier_ratio is not None
        if predicted is None or self.rule != "mixture" or rejects or not bounded:
            return None
        prior = parameters.predict_noise(predicted)
        return jnp.where(is_known(prior), prior.mean, running.mean)

    def _filtered(
        self,
        predicted: KalmanState | None,
        observed: KalmanState,
        parameters: Parameters,
    ) -> KalmanState:
        """Combines what was predicted with what was observed."""
        if predicted is None or (self.gain == 1.0 and self.decay_steps is None):
            return observed
        return self._combine(
            predicted, observed, parameters, self.rule, self.outlier_ratio
        )

    def _report(self, **states: KalmanState | None) -> None:
        """Leaves the states in ``intermediates``, where that is mutable."""
        for name, state in states.items():
            if state is not None:
                self.sow(
                    "intermediates",
                    name,
                    state,
                    init_fn=lambda: None,
                    reduce_fn=_latest,
                )

    @nn.nowrap
    def own_statistics(self, channels: int) -> dict[str, jax.Array]:
        """What it has in ``batch_stats`` besides ``mean`` and ``var``, at the start."""
        own = {}
        if self.decay_steps is not None:
            own["steps"] = jnp.zeros((), jnp.float32)
        if self.calibrate is not None:
            own |= uncorrected(channels)._asdict()
        return own

    @nn.compact
    def _variables(self, value: jax.Array) -> tuple[Parameters, KalmanState]:
        parameters = self._parameters(value.shape[self.axis])
        self._start_correction(value.shape[self.axis])
        if self.decay_steps is not None:
            steps = self.variable("batch_stats", "steps", jnp.zeros, (), jnp.float32)
            done = jnp.minimum(steps.value / self.decay_steps, 1.0)
            left = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
            parameters = parameters._replace(gain=left * parameters.gain)
        return parameters, self._running(value, self.axis)

    def _count_step(self) -> None:
        if self.decay_steps is not None and not self.is_initializing():
            steps = self.get_variable("batch_stats", "steps")
            self.put_variable("batch_stats", "steps", steps + 1.0)


def _latest(_: Any, new: Any) -> Any:
    return new
