"""The readings of the method, as presets of `KalmanNorm`: what the paper's text says, what
the authors' released code does, and what we do.

|                           | the text, literally    | released code    | text, as it trains     | our default   |
|---------------------------|------------------------|------------------|------------------------|---------------|
| preset (``KalmanNorm``)   | Literal-paper-         | Released-        | Paper-                 |               |
| name                      | `kalman_paper_literal` | `kalman_released`| `kalman_paper`         | `kalman`      |
| state handed on           | raw                    | raw              | normalized             | normalized    |
| norm, ReLU on the way     | not in Eq. 7; ReLU (a) | ReLU             | scale, bias, ReLU      | the same      |
| guard                     | none                   | 100, whole layer | none                   | none          |
| rule for the variance     | Eq. 7                  | mixture          | Eq. 7                  | mixture       |
| gain q                    | learned, one a layer   | 0.1 (b)          | learned, one a layer   | 0.02          |
| noise R                   | learned, each channel  | none             | learned, each channel  | none          |
| where q and R start       | not said; 0.1, 0.01    | -                | not said; 0.1, 0.01    | -             |
| first state               | of the data set        | none             | of the data set        | the same      |
| moments of a shortcut sum | from the map (c)       | independence     | independence           | independence  |
| prediction                | Monte Carlo (d)        | closed form      | closed form (d)        | closed form   |

(a) Eq. 7 has no activation between two kernels. Ours has always moved the state through
the ReLU that is there, so the literal preset is equal to the letter without one.
(b) At a micro-batch of 2; 0.95 at 128.
(c) Section 3.4 mentions it as possible, "in theory"; the released code does not do it, and
nor do we. It is no cure: with it, the literal reading is off by a factor of 200 in a
ResNet-50 as well.
(d) `kalman_paper_mc` is `kalman_paper` with the Monte Carlo of the text.

Why not literally. Eq. 5 follows from Eq. 2, x^k = A^k x^(k-1) + u^k, only where u^k has
mean 0: A^k has to act on what the state describes. The kernel of layer k acts on what the
normaliser below put out, so the state has to be that of its output, ``"normalized"``. The
raw state describes its input. Each layer then predicts from a variance that the network
has divided out, and each residual block doubles it. In slim networks of the true depth at
initialisation (noise of 64x64, micro-batch 4, width 8), the worst predicted variance, as
the mean over a layer of its ratio to the observed one:

|              | literal | literal, guard of 100 | normalized |
|--------------|---------|-----------------------|------------|
| ResNet-50    | 6e6     | 2e3                   | 1.3        |
| Inception-v2 | 2e10    | 2e3                   | 12         |

A guard resets a layer after the harm is done: the next ones start from there again.
"""  # noqa: E501

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np

from kalman_flax._filter.state import KalmanState
from kalman_flax._filter.update import Rule
from kalman_flax.layers.group_kalman_norm import GroupKalmanNorm
from kalman_flax.layers.kalman_norm import KalmanNorm, LearnGain, Noise, Propagate

_LIMIT = 100.0


class ReleasedKalmanNorm(KalmanNorm):
    r"""`KalmanNorm` as the authors' released code has it, with its guard.

    $$
    \hat{\mu} = p \, \mu_{\mathrm{pred}} + q \, \bar{x}, \qquad
    \hat{\Sigma} = p \, \Sigma_{\mathrm{pred}} + q \, S
    + p \, q \, (\bar{x} - \mu_{\mathrm{pred}})^2
    $$

    The symbols are those of `KalmanNorm`; $q$ is 0.1.

    Source:
        The code that Wang et al. released beside "Kalman Normalization: Normalizing
        Internal Representations Across Network Layers" (NeurIPS 2018).
        `kalman_flax.layers.presets` has it beside the paper's text.

    Cost:
        - Parameters: 2 C as batch norm.
        - Statistics: 2 C running ones, as batch norm.
        - Passes: those of batch norm, and arithmetic on ``[C]`` vectors.
        - Inference: that of batch norm.

    When to use:
        To compare with the released experiments.

    Variables:
        Those of `KalmanNorm`.

    State:
        Hands on the filtered moments of its input. Where the predicted variances are
        100 times the observed ones or more, as the mean over the layer, it drops the
        prediction (`kalman_flax.filter.reject_outlier`).

    Attributes are those of `KalmanNorm`, with other defaults.

    Raises:
        ValueError: as in `KalmanNorm`.
    """

    gain: float = 0.1
    propagate: Propagate = "raw"
    outlier_ratio: float | None = _LIMIT


class PaperKalmanNorm(KalmanNorm):
    r"""`KalmanNorm` by Eq. 7 with all it learns: the paper's KN, as it trains.

    $$
    \hat{\mu} = p \, \mu_{\mathrm{pred}} + q \, \bar{x}, \qquad
    \hat{\Sigma} = p \, (\Sigma_{\mathrm{pred}} + R) + q \, S
    $$

    The symbols are those of `KalmanNorm`. A scalar $q$ starts at 0.1, a diagonal $R$ at
    0.01.

    Source:
        Wang et al., "Kalman Normalization: Normalizing Internal Representations Across
        Network Layers" (NeurIPS 2018), Eq. 6 and 7, on the state of what the kernel
        reads. `kalman_flax.layers.presets` says why that, and not the text's letter.

    Cost:
        - Parameters: 3 C + 1: scale, bias, noise, gain.
        - Statistics: 2 C running ones, as batch norm.
        - Passes: those of batch norm, and arithmetic on ``[C]`` vectors.
        - Inference: that of batch norm.

    When to use:
        To compare with the paper's tables.

    Variables:
        Those of `KalmanNorm`.

    State:
        Hands on the state of what it put out, as `KalmanNorm`.

    Attributes are those of `KalmanNorm`, with other defaults.

    Raises:
        ValueError: as in `KalmanNorm`.
    """

    gain: float = 0.1
    learn_gain: LearnGain | None = "scalar"
    noise: Noise | None = "additive"
    rule: Rule = "paper"


class PaperGroupKalmanNorm(GroupKalmanNorm):
    r"""`GroupKalmanNorm` by Eq. 7 with all it learns: the paper's GKN, as it trains.

    $$
    \hat{\mu}_g = p \, \mu_{\mathrm{pred}} + q \, \bar{x}_{ng}, \qquad
    \hat{\Sigma}_g = p \, (\Sigma_{\mathrm{pred}} + R) + q \, S_{ng}
    $$

    $\bar{x}_{ng}$ and $S_{ng}$ are the moments of group $g$ of example $n$; the other
    symbols are those of `GroupKalmanNorm`. A scalar $q$ starts at 0.1, a diagonal $R$
    at 0.01.

    Source:
        GKN of Wang et al., "Kalman Normalization" (NeurIPS 2018): Eq. 6 and 7 on the
        sets of Eq. 8, on the state of what the kernel reads.

    Cost:
        That of `GroupKalmanNorm`, with C parameters more, the noise.

    When to use:
        To compare with the paper's tables.

    Variables:
        Those of `GroupKalmanNorm` with `noise`.

    State:
        Hands on the moments of each channel of its output, as `GroupKalmanNorm`.

    Attributes are those of `GroupKalmanNorm`, with other defaults.

    Raises:
        ValueError: as in `GroupKalmanNorm`.
    """

    gain: float = 0.1
    learn_gain: LearnGain | None = "scalar"
    noise: Noise | None = "additive"
    rule: Rule = "paper"


class LiteralPaperKalmanNorm(PaperKalmanNorm):
    r"""`KalmanNorm` by Eq. 7 taken literally: the raw state is handed on.

    $$
    \hat{\mu} = p \, \mu_{\mathrm{pred}} + q \, \bar{x}, \qquad
    \hat{\Sigma} = p \, (\Sigma_{\mathrm{pred}} + R) + q \, S
    $$

    The symbols are those of `KalmanNorm`.

    Source:
        Wang et al., "Kalman Normalization: Normalizing Internal Representations Across
        Network Layers" (NeurIPS 2018), Eq. 6 and 7 to the letter.
        `kalman_flax.layers.presets` shows why that is no stable filter.

    Cost:
        - Parameters: 3 C + 1: scale, bias, noise, gain.
        - Statistics: 2 C running ones, as batch norm.
        - Passes: those of batch norm, and arithmetic on ``[C]`` vectors.
        - Inference: that of batch norm.

    When to use:
        For evidence, not for use: it does not train in deep networks. In training it
        warns, by a callback to the host, where it predicts variances more than 100
        times too large or too small, as the mean over a layer of their ratio to those
        observed.

    Variables:
        Those of `KalmanNorm`.

    State:
        Hands on the filtered moments of its input.

    Attributes are those of `KalmanNorm`, with other defaults.

    Raises:
        ValueError: as in `KalmanNorm`.
    """

    propagate: Propagate = "raw"

    def _report(self, **states: KalmanState | None) -> None:
        super()._report(**states)
        observed, predicted = states["observed"], states["predicted"]
        if observed is not None and predicted is not None:
            # No more than a ratio of 1 where nothing varies at all.
            ratio = (predicted.var + self.epsilon) / (observed.var + self.epsilon)
            jax.debug.callback(_warn_of, jnp.mean(ratio))


def _warn_of(ratio: np.ndarray) -> None:
    if not 1 / _LIMIT <= ratio <= _LIMIT:
        # The same text each time, of which Python shows the first.
        warnings.warn(
            "LiteralPaperKalmanNorm predicts variances that are more than"
            f" {_LIMIT:.0f} times too large or too small: the filter is not stable in"
            " this network. Take PaperKalmanNorm ('kalman_paper'), which hands on the"
            " state of what it puts out.",
            stacklevel=2,
        )
