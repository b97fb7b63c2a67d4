r"""Importance weights of a guide's draws, and how well they fit.

With draws x from the guide, :math:`w = p(x, y) / q(x)`. Their mean logarithm is the ELBO, and the shape :math:`\hat k` of their
upper tail tells whether the guide covers the posterior: Vehtari et al. (2024), *Pareto smoothed importance sampling*,
arXiv:1507.02646; Yao et al. (2018), *Yes, but did it work?*, arXiv:1802.02538.

This module works on numpy arrays and needs no torch.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from .arviz import arviz_generation

NUM_BOOTSTRAP = 25
# A tail of at least five draws is needed to fit its shape, and a fifth of the draws is taken as the tail.
MIN_DRAWS = 25


@dataclass(frozen=True)
class Estimate:
    """A number that was estimated from draws, with its standard error.

    ``print`` shows both, to the first digit of the standard error; ``float`` and a format such as ``f"{estimate:.2f}"`` take the
    value alone. Where there is no such number, both are NaN.

    Example:
        >>> estimate = Estimate(-31.3271, 0.0042)
        >>> print(estimate)
        -31.327 ± 0.004
        >>> f"{estimate:.1f}"
        '-31.3'
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

    def __format__(self, spec: str) -> str:
        return format(self.value, spec) if spec else str(self)


UNKNOWN = Estimate(float("nan"), float("nan"))


def khat_threshold(num_samples: int) -> float:
    """The k-hat below which the importance weights of S draws are reliable: min(1 − 1/log10 S, 0.7)."""
    return min(1 - 1 / math.log10(num_samples), 0.7)


def psis(log_ratios: np.ndarray, where: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Pareto-smoothed, normalised log weights and the shape of their tail, by ArviZ.

    Arguments:
        log_ratios: log p − log q of every draw, shape ``(..., S)``.
        where: The site that has no finite density in the first draw that is wrong, for the message.

    Returns:
        The log weights, shape ``(..., S)``, and the shapes, ``(...)``.

    Raises:
        ValueError: if there are too few draws, or a ratio is NaN or +inf.
    """
    log_ratios = np.asarray(log_ratios, dtype=np.float64)
    error = _psis_error(log_ratios, where)
    if error:
        raise ValueError(error)
    # A draw without probability has weight 0; the smoother wants a finite logarithm.
    finite = np.where(np.isneginf(log_ratios), -1e30, log_ratios)
    # The quantiles of a very heavy tail overflow: the smoothed weights there are then as large as the largest one was.
    with np.errstate(over="ignore"):
        if arviz_generation() == 0:
            import arviz as az

            log_weights, khat = az.psislw(finite)
        else:
            from arviz_stats.base import array_stats

            # This generation takes log-likelihoods to leave out, the opposite sign.
            log_weights, khat = array_stats.psislw(-finite)
    return np.asarray(log_weights), np.asarray(khat, dtype=np.float64)


def _psis_error(log_ratios: np.ndarray, where: str) -> str | None:
    """Why log ratios cannot be smoothed, or None."""
    num_samples = log_ratios.shape[-1]
    if num_samples < MIN_DRAWS:
        return f"PSIS needs at least {MIN_DRAWS} draws to fit the tail of their weights, got {num_samples}"
    wrong = (np.isnan(log_ratios) | np.isposinf(log_ratios)).reshape(-1, num_samples).any(0)
    if wrong.any():
        return (
            f"{wrong.sum()} of {num_samples} draws have a log weight that is NaN or infinite (the first is draw "
            f"{int(wrong.argmax())}{where and ', at ' + where}); the model or the guide gives no finite log-probability there"
        )
    return None


class ImportanceWeights:
    r"""The weights :math:`w \propto p / q` of draws, Pareto-smoothed; everything is computed when it is first asked for.

    Where the weights cannot be smoothed, :attr:`khat` and :attr:`ess` are NaN and :attr:`error` says why; everything else
    raises ValueError with that reason.

    Arguments:
        log_p: The log-density of the target at every draw, up to a constant, shape (S,).
        log_q: The log-density of the distribution that they were drawn from, shape (S,).
        where: The site that has no finite density in the first draw that is wrong, for the message of an error.
    """

    def __init__(self, log_p: np.ndarray, log_q: np.ndarray, where: str = "") -> None:
        ratios = (log_p - log_q).astype(np.float64)
        # A draw where a density overflows or underflows says as little of the posterior as one outside of it.
        self.log_ratios = np.where(np.isnan(ratios), -np.inf, ratios)
        self.num_without_density = int(np.isneginf(self.log_ratios).sum())
        self.where = where
        # Rounding in numbers of this size is all the spread that the weights of an exact guide have.
        size = max(1.0, float(np.abs(log_p).max()), float(np.abs(log_q).max()))
        spread = np.ptp(self.log_ratios) if np.isfinite(self.log_ratios).all() else np.inf
        self.are_constant = math.isfinite(size) and bool(spread <= 50 * np.finfo(log_p.dtype).eps * size)

    def __len__(self) -> int:
        return len(self.log_ratios)

    @functools.cached_property
    def error(self) -> str | None:
        """Why these weights cannot be smoothed, or None: too few draws, none with a density, or a ratio that is +inf."""
        if self.num_without_density == len(self):
            return f"no draw has a density{self.where and f' ({self.where})'}"
        return None if self.are_constant else _psis_error(self.log_ratios, self.where)

    @functools.cached_property
    def _psis(self) -> tuple[np.ndarray, float]:
        if self.are_constant:
            return np.full(len(self), -np.log(len(self))), float("nan")
        log_weights, khat = psis(self.log_ratios, self.where)
        return log_weights, float(khat)

    @property
    def smoothed_log_weights(self) -> np.ndarray:
        """Their logarithms; the weights add up to 1.

        Raises:
            ValueError: if they cannot be smoothed, see :attr:`error`.
        """
        return self._psis[0]

    @functools.cached_property
    def weights(self) -> np.ndarray:
        """The smoothed weights, which add up to 1; raises as :attr:`smoothed_log_weights` does."""
        return np.exp(self.smoothed_log_weights)

    @functools.cached_property
    def scaled_weights(self) -> np.ndarray:
        """The weights before they are smoothed, on the scale where the smoothed ones have mean 1."""
        finite = np.isfinite(self.log_ratios)
        # The smoothing leaves all but the tail as it was, up to the normalisation.
        shift = np.median((self.smoothed_log_weights - self.log_ratios)[finite])
        # The largest of very poor draws overflow.
        with np.errstate(over="ignore"):
            return np.exp(self.log_ratios + shift + math.log(len(self)))

    @functools.cached_property
    def unexplained_mass(self) -> float:
        """The part of all weight that the smoothing has taken away from the draw with the largest one, since it stands alone."""
        largest = self.log_ratios.argmax()
        share = np.exp(self.log_ratios[largest] - np.logaddexp.reduce(self.log_ratios))
        return max(0.0, float(share - self.weights[largest]))

    @functools.cached_property
    def elbo(self) -> Estimate:
        """The evidence lower bound, see :func:`elbo`."""
        return elbo(self.log_ratios)

    @property
    def shape(self) -> float:
        """The Pareto shape of the tail alone, without the standard error, which takes 25 times as long."""
        return UNKNOWN.value if self.error else self._psis[1]

    @functools.cached_property
    def khat(self) -> Estimate:
        """The Pareto shape of the tail, with a bootstrap standard error; NaN where all weights are equal."""
        if math.isnan(self.shape):
            return UNKNOWN
        rng = np.random.default_rng(0)
        repeats = [psis(rng.choice(self.log_ratios, len(self)))[1] for _ in range(NUM_BOOTSTRAP)]
        return Estimate(self.shape, float(np.std(repeats, ddof=1)))

    @functools.cached_property
    def ess(self) -> Estimate:
        """The effective number of draws, ``1 / Σ w²``, with a bootstrap standard error."""
        if self.error:
            return UNKNOWN
        rng = np.random.default_rng(0)
        repeats = [effective_number(rng.choice(self.weights, len(self))) for _ in range(NUM_BOOTSTRAP)]
        return Estimate(effective_number(self.weights), float(np.std(repeats, ddof=1)))

    def iw_elbo(self, num_weights: int) -> Estimate:
        """See :func:`iw_elbo`."""
        return iw_elbo(self.log_ratios, num_weights)

    def khat_of_mean(self, values: np.ndarray) -> float:
        r"""The Pareto shape that decides on the weighted mean of one scalar.

        The larger of two shapes: the one of the weights, and the one of :math:`|h - \bar h| w`, the terms that make up the error
        of the mean. Vehtari et al. (2024), *Pareto smoothed importance sampling*, arXiv:1507.02646, section 3. NaN where all
        weights are equal.

        Arguments:
            values: The scalar at every draw, shape (S,).
        """
        if self.are_constant:
            return float("nan")
        if np.ptp(values) == 0:
            return self._psis[1]
        with np.errstate(divide="ignore"):
            distance = np.log(np.abs(values - self.weights @ values))
        return max(self._psis[1], float(psis(distance + self.log_ratios)[1]))

    def resample(self, num_samples: int, replace: bool, rng: np.random.Generator) -> np.ndarray:
        """The indices of draws chosen with their weights as probabilities, shape (num_samples,).

        Raises:
            ValueError: without replacement, if more are asked for than there are draws with a weight above 0.
        """
        if num_samples < 1:
            raise ValueError(f"resample: num_samples must be at least 1, got {num_samples}")
        available = int((self.weights > 0).sum())
        if not replace and num_samples > available:
            raise ValueError(
                f"resample: {num_samples} draws without replacement, of {available} that have a weight; ask for fewer, or "
                "resample with replacement"
            )
        return rng.choice(len(self), num_samples, replace=replace, p=self.weights / self.weights.sum())


def effective_number(weights: np.ndarray) -> float:
    """The number of equal weights with the same relative error of a mean: (Σ w)² / Σ w²."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def elbo(log_ratios: np.ndarray, minibatch_size: int | None = None) -> Estimate:
    """The evidence lower bound, the mean of the log ratios, in nats.

    Arguments:
        log_ratios: log p − log q of every draw, shape (S,).
        minibatch_size: The number of consecutive draws that share one minibatch of data, if they do; then the standard error is
            the one between the means of minibatches.
    """
    values = log_ratios
    if minibatch_size is not None:
        values = values[: len(values) // minibatch_size * minibatch_size].reshape(-1, minibatch_size).mean(-1)
    return Estimate(float(log_ratios.mean()), _standard_error(values))


def iw_elbo(log_ratios: np.ndarray, num_weights: int) -> Estimate:
    r"""The importance-weighted bound :math:`\mathbb E \log \frac1K \sum_{k=1}^K w_k`, between ELBO (K = 1) and log evidence.

    Burda, Grosse and Salakhutdinov (2016), *Importance weighted autoencoders*, arXiv:1509.00519. The mean over S // K disjoint
    groups of draws: it is unbiased, and its standard error is the one of a mean.

    Arguments:
        log_ratios: log p − log q of every draw, shape (S,).
        num_weights: The number K of draws in a group.

    Raises:
        ValueError: if ``num_weights`` is smaller than 1 or leaves fewer than two groups.
    """
    num_groups = len(log_ratios) // max(1, num_weights)
    if num_weights < 1 or num_groups < 2:
        raise ValueError(
            f"iw_elbo: num_weights must be between 1 and half of the {len(log_ratios)} draws, got {num_weights}"
        )
    groups = log_ratios[: num_groups * num_weights].reshape(num_groups, num_weights)
    values = np.logaddexp.reduce(groups, axis=-1) - np.log(num_weights)
    return Estimate(float(values.mean()), _standard_error(values))


def _standard_error(values: np.ndarray) -> float:
    # A draw without density has a log weight of −inf, and then there is no standard error.
    with np.errstate(invalid="ignore"):
        return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
