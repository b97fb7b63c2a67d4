r"""Importance weights of a guide's draws: how well they fit, and the verdict in words.

With draws x from the guide, :math:`w = p(x, y) / q(x)`. Their mean logarithm is the ELBO, and the shape :math:`\hat k` of their
upper tail tells whether the guide covers the posterior: Vehtari et al. (2024), *Pareto smoothed importance sampling*,
arXiv:1507.02646; Yao et al. (2018), *Yes, but did it work?*, arXiv:1802.02538.

This module works on numpy arrays and needs no torch.
"""

from __future__ import annotations

import importlib.metadata
import math
from dataclasses import dataclass

import numpy as np

NUM_BOOTSTRAP = 25
# A tail of at least five draws is needed to fit its shape, and a fifth of the draws is taken as the tail.
MIN_DRAWS = 25
# Above this fraction of effective draws the weights do not matter, whatever the shape of their tail.
NEAR_PERFECT_ESS = 0.997
# Below this one the moments of the unweighted draws are visibly off.
WELL_FITTED_ESS = 0.9


@dataclass(frozen=True)
class Estimate:
    """A number that was estimated from draws, with its standard error.

    Example:
        >>> print(Estimate(-31.3271, 0.0042))
        -31.327 ± 0.004
    """

    value: float
    se: float

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        if not (math.isfinite(self.se) and self.se > 0):
            return f"{self.value:.3f}"
        digits = max(0, -math.floor(math.log10(self.se)))
        return f"{self.value:.{digits}f} ± {self.se:.{digits}f}"


def arviz_generation() -> int:
    """0 for ArviZ 0.x (InferenceData), 1 for 1.x and later (DataTree)."""
    return min(1, int(importlib.metadata.version("arviz").split(".")[0]))


def psis(log_ratios: np.ndarray) -> tuple[np.ndarray, float]:
    """Pareto-smoothed, normalised log weights and the shape of the tail, by ArviZ.

    Arguments:
        log_ratios: log p − log q of every draw, shape (S,).

    Raises:
        ValueError: if there are too few draws, or a ratio is NaN or +inf.
    """
    log_ratios = np.asarray(log_ratios, dtype=np.float64)
    if log_ratios.size < MIN_DRAWS:
        raise ValueError(
            f"PSIS needs at least {MIN_DRAWS} draws to fit the tail of their weights, got {log_ratios.size}"
        )
    wrong = np.isnan(log_ratios) | np.isposinf(log_ratios)
    if wrong.any():
        raise ValueError(
            f"{wrong.sum()} of {log_ratios.size} draws have a log weight that is NaN or infinite (the first is draw "
            f"{int(wrong.argmax())}); the model or the guide gives no finite log-probability there"
        )
    # A draw without probability has weight 0; the smoother wants a finite logarithm.
    finite = np.where(np.isneginf(log_ratios), -1e30, log_ratios)
    if arviz_generation() == 0:
        import arviz as az

        log_weights, khat = az.psislw(finite.copy())
    else:
        from arviz_stats.base import array_stats

        # This generation takes log-likelihoods to leave out, the opposite sign.
        log_weights, khat = array_stats.psislw(-finite)
    return np.asarray(log_weights), float(khat)


def weights_are_constant(log_p: np.ndarray, log_q: np.ndarray, eps: float) -> bool:
    """Whether log p − log q varies by no more than rounding in numbers of its size."""
    log_ratios = log_p - log_q
    size = max(1.0, float(np.abs(log_p).max()), float(np.abs(log_q).max()))
    return bool(np.ptp(log_ratios) <= 50 * eps * size)


def khat_threshold(num_draws: int) -> float:
    """The k-hat below which importance weights of so many draws are reliable: min(1 − 1/log10 S, 0.7)."""
    return min(1 - 1 / math.log10(num_draws), 0.7)


def verdict(khat: float, ess_fraction: float, num_draws: int) -> str:
    """What k-hat and the effective sample size say about the guide, in words.

    Arguments:
        khat: The Pareto shape; NaN where the weights are constant.
        ess_fraction: The effective sample size as a fraction of the draws.
        num_draws: The number S of draws.

    Example:
        >>> print(verdict(0.31, 0.95, 10_000))
        good: k-hat 0.31 is below 0.70 and 95% of the draws are effective. A mode that no draw has reached would not show.
    """
    unseen = "A mode that no draw has reached would not show."
    if math.isnan(khat):
        return f"exact: every draw has the same weight, up to rounding. {unseen}"
    threshold = khat_threshold(num_draws)
    if ess_fraction > NEAR_PERFECT_ESS and khat >= threshold:
        return (
            f"good: {ess_fraction:.1%} of the draws are effective; k-hat {khat:.2f} is the shape of a tail that carries no "
            f"weight. {unseen}"
        )
    if khat < threshold:
        weighted = "" if ess_fraction > WELL_FITTED_ESS else "Weight the draws: unweighted they are off. "
        return (
            f"good: k-hat {khat:.2f} is below {threshold:.2f} and {ess_fraction:.0%} of the draws are effective. "
            f"{weighted}{unseen}"
        )
    return (
        f"doubtful: k-hat {khat:.2f} is not below {threshold:.2f}: the guide misses part of the posterior, and neither its "
        "draws nor weights can be trusted there. Try a flow with more layers, more steps, or another parameterisation of the "
        "model (non-centred for weak data), and compare with NUTS."
    )
