r"""How far the moments of a guide's draws are off, estimated from the draws and their importance weights. Numpy alone.

Let w be the weights, with mean 1, and z a scalar in posterior sds from its weighted mean. The weighted moments are means of the
terms :math:`w z` and :math:`w z^2`. Their Monte-Carlo errors are known. What no draw has reached is estimated from the largest
terms: a generalised Pareto tail is fitted to them, as Pareto smoothing does it for the weights alone, and the part of it beyond
the largest term is what the posterior adds to the mean. For M terms above u in S draws, of shape k and scale :math:`\sigma`:

.. math:: \frac{1}{2S}\left[u + \frac{\sigma}{k}\left(\frac{(2M)^k}{1 - k} - 1\right)\right].

So the moments of the posterior are known with an uncertainty, and the errors of the draws, weighted or not, are their distances
from these moments.

Sources: Vehtari et al. (2024), *Pareto smoothed importance sampling*, arXiv:1507.02646; Zhang and Stephens (2009), *A new and
efficient estimation method for the generalized Pareto distribution*, Technometrics 51.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .importance import ImportanceWeights, effective_number

# From shape 1 on a Pareto tail has no mean. The posterior has one, so that its tail ends somewhere that no draw shows. Of 0.8 to
# 0.95, this one has the best expected errors of the draws as they are, on the posteriors CHOSEN_ON of benchmarks/verdict.py.
MAX_SHAPE = 0.9
# The variance of the posterior is at least this part of the weighted one: a shift of the mean takes some away.
MIN_VARIANCE = 0.05
# Fewer effective draws have no sd to speak of, and no tail.
FEW_EFFECTIVE = 5
# The scalars that are looked at together: so many draws stay in the processor's cache.
BLOCK = 16


@dataclass(frozen=True)
class Errors:
    """Estimated errors of the mean and the sd of scalars; every attribute has shape ``(scalars,)``.

    Attributes:
        mean_bias: The mean minus the posterior's, in sds of the posterior.
        mean_se: The standard error of this estimate.
        sd_bias: The sd over the posterior's, minus 1.
        sd_se: The standard error of this estimate.
    """

    mean_bias: np.ndarray
    mean_se: np.ndarray
    sd_bias: np.ndarray
    sd_se: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """By how many sds of the posterior the mean is expected to be off: the root of the expected square."""
        return np.hypot(self.mean_bias, self.mean_se)

    @property
    def sd(self) -> np.ndarray:
        """By which part of itself the sd is expected to be off, likewise."""
        return np.hypot(self.sd_bias, self.sd_se)

    @property
    def are_seen(self) -> bool:
        """Whether one of them stands out of its standard error. Of many, one in twenty does so by chance."""
        seen = np.concatenate([np.abs(self.mean_bias) > 2 * self.mean_se, np.abs(self.sd_bias) > 2 * self.sd_se])
        return bool(seen.mean() > 0.1)


@dataclass(frozen=True)
class Unseen:
    """A part of the posterior that no draw has reached, such as lost modes.

    Attributes:
        mass: Its fraction of the mass.
        mass_se: The standard error of the fraction.
        moments: Mean and sd within it of every scalar, by its label, as far as they are known.
    """

    mass: float
    mass_se: float
    moments: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class MomentErrors:
    """The errors of the moments of draws as they are, and of the weighted ones.

    Attributes:
        raw: Of the draws as they are.
        weighted: Of the draws with their smoothed weights.
        sampling_sd: The error that the sd would have if the draws were of the posterior, ``(scalars,)``: where it is large, the
            tails of the scalar are so heavy that this many draws do not determine its sd.
    """

    raw: Errors
    weighted: Errors
    sampling_sd: np.ndarray


def moment_errors(
    columns: Mapping[str, np.ndarray], weights: ImportanceWeights, unseen: Unseen | None = None
) -> MomentErrors:
    """Estimates the errors of all means and sds.

    It takes about a millisecond for each scalar of 10,000 draws.

    Arguments:
        columns: The draws of every scalar by its label, each of shape (S,).
        weights: Of the draws.
        unseen: What is known of a part of the posterior that no draw has reached, such as lost modes.

    Returns:
        The errors; NaN where fewer than five draws carry the weight, or the moments of what is unseen are not known.

    Raises:
        ValueError: if the weights cannot be smoothed, see :attr:`ImportanceWeights.error`.
    """
    smoothed, unsmoothed = weights.weights, weights.scaled_weights
    if effective_number(smoothed) < FEW_EFFECTIVE:
        unknown = np.full(len(columns), np.nan)
        nothing = Errors(unknown, unknown, unknown, unknown)
        return MomentErrors(nothing, nothing, np.zeros(len(columns)))
    # Bounded weights correct all they see. Others grow on where no draw is: of what they correct, as much again may be
    # left where k-hat is 1. The square was chosen among the powers 1 to 3, on fits of benchmarks/verdict.py and narrow Gaussians.
    left = 0.0 if weights.are_constant else min(1.0, max(0.0, weights.shape)) ** 2
    draws = list(columns.values())
    blocks = [np.stack(draws[i : i + BLOCK]) for i in range(0, len(draws), BLOCK)]
    joined = np.concatenate(
        [np.empty((13, 0)), *(_block(block, smoothed, unsmoothed, left) for block in blocks)], axis=1
    )
    raw, weighted = Errors(*joined[:4]), Errors(*joined[4:8])
    if unseen is not None:
        raw, weighted = (
            _with_unseen(errors, moments[0], moments[1], unseen, list(columns))
            for errors, moments in ((raw, joined[9:11]), (weighted, joined[11:13]))
        )
    return MomentErrors(raw, weighted, joined[8])


def _with_unseen(errors: Errors, mean: np.ndarray, sd: np.ndarray, unseen: Unseen, labels: list[str]) -> Errors:
    """Errors against the posterior, from those against the part of it that the draws are of, and mean and sd of the draws."""
    others = np.array([unseen.moments.get(label, (np.nan, np.nan)) for label in labels]).reshape(-1, 2).T
    # An infinite draw has no moments.
    with np.errstate(invalid="ignore"):
        seen_sd = sd / (1 + errors.sd_bias)
        seen_mean = mean - errors.mean_bias * seen_sd
        apart = others[0] - seen_mean
        variance = (1 - unseen.mass) * seen_sd**2 + unseen.mass * others[1] ** 2
        variance += unseen.mass * (1 - unseen.mass) * apart**2
        whole = np.sqrt(variance)
        # By how much the variance grows with the mass.
        slope = others[1] ** 2 - seen_sd**2 + (1 - 2 * unseen.mass) * apart**2
        return Errors(
            (mean - seen_mean - unseen.mass * apart) / whole,
            np.hypot(errors.mean_se * seen_sd, unseen.mass_se * apart) / whole,
            sd / whole - 1,
            np.hypot(errors.sd_se * seen_sd / whole, unseen.mass_se * slope / (2 * variance)),
        )


def _block(columns: np.ndarray, smoothed: np.ndarray, raw: np.ndarray, left: float) -> np.ndarray:
    """Biases and standard errors of the draws, then of the weighted draws, and the sampling error of the sd."""
    # A draw where a density overflows may be infinite. It weighs nothing; the moments of the draws as they are do not exist.
    finite = np.isfinite(columns)
    columns = np.where(finite, columns, 0.0).astype(np.float64)
    x, center, spread = _standardized(columns, None)
    z, mean, sd = _standardized(x, smoothed)
    terms, square = z * raw, z**2
    mass = hidden_mean(raw[None])
    above, below = hidden_mean(np.maximum(terms, 0)), hidden_mean(np.maximum(-terms, 0))
    # Mean and sd of the posterior, in units of the weighted draws.
    moved = (above - below) / (1 + mass)
    variance = (1 + hidden_mean(z * terms)) / (1 + mass) - moved**2
    scale = np.sqrt(np.maximum(variance, MIN_VARIANCE))
    # What is hidden is known to its order of magnitude.
    hidden_mean_se, hidden_sd_se = np.hypot(above, below) / (1 + mass), scale - 1
    size = np.where(sd == 0, 1.0, sd)
    mean_se = np.sqrt(square @ smoothed**2 + hidden_mean_se**2 + (left * mean / size) ** 2) / scale
    sd_se = np.sqrt((square - 1) ** 2 @ smoothed**2 / 4 + hidden_sd_se**2 + (left * (1 / size - 1)) ** 2) / scale
    raw_mean = np.where(finite.all(1), -(mean / size + moved) / scale, np.inf)
    raw_sd = np.where(finite.all(1), 1 / (size * scale) - 1, np.inf)
    sampling_sd = np.sqrt(np.maximum(square**2 @ smoothed - 1, 0) / columns.shape[1]) / 2
    found = np.stack([raw_mean, mean_se, raw_sd, sd_se, -moved / scale, mean_se, 1 / scale - 1, sd_se, sampling_sd])
    # A constant is right.
    found = np.where((sd == 0) & finite.all(1), 0.0, found)
    return np.concatenate([found, np.stack([center, spread, center + spread * mean, spread * sd])])


def _standardized(columns: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns with mean 0 and sd 1 under the weights, and their mean and sd; a constant has sd 0 and becomes 0."""
    mean = np.average(columns, axis=1, weights=weights)
    centered = columns - mean[:, None]
    sd = np.sqrt(np.average(centered**2, axis=1, weights=weights))
    return centered / np.where(sd == 0, 1.0, sd)[:, None], mean, sd


def hidden_mean(terms: np.ndarray) -> np.ndarray:
    """The part of the mean of a heavy-tailed term that lies beyond the largest of its values, see the formula of this module.

    Arguments:
        terms: Values, at least 0, shape ``(terms, S)``.

    Returns:
        The part of the mean, ``(terms,)``; 0 where the upper values are equal.
    """
    num_draws = terms.shape[1]
    size = int(min(0.2 * num_draws, 3 * num_draws**0.5))
    top = np.sort(np.partition(terms, num_draws - size - 1, axis=1)[:, -size - 1 :], axis=1)
    threshold, excess = top[:, 0], top[:, 1:] - top[:, :1]
    largest = excess[:, -1:]
    varies = largest[:, 0] > 0
    # Equal values, such as zeros, have no logarithm.
    relative = np.maximum(excess / np.where(varies[:, None], largest, 1.0), 1e-9)
    shape, scale = fit_pareto(relative)
    shape = np.minimum(shape, MAX_SHAPE)
    # At 0 the limit is −log of what is beyond.
    shape = np.where(np.abs(shape) < 1e-6, 1e-6, shape)
    beyond = threshold + largest[:, 0] * scale / shape * ((2 * size) ** shape / (1 - shape) - 1)
    return np.where(varies, beyond / (2 * num_draws), 0.0)


def fit_pareto(excess: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shapes and scales of generalised Pareto distributions, with the prior of Pareto smoothing towards a shape of 0.5.

    Arguments:
        excess: Excesses above the threshold in rising order, positive, shape ``(tails, M)``.
    """
    size = excess.shape[1]
    number = 30 + int(size**0.5)
    grid = 1 - np.sqrt(number / (np.arange(1, number + 1) - 0.5))
    quartile = excess[:, int(size / 4 + 0.5) - 1]
    rates = grid[:, None] / (3 * quartile) + 1 / excess[:, -1]
    shapes = np.stack([np.log1p(-rate[:, None] * excess).mean(1) for rate in rates])
    log_likelihood = size * (np.log(-rates / shapes) - shapes - 1)
    probability = np.exp(log_likelihood - log_likelihood.max(0))
    rate = (rates * probability).sum(0) / probability.sum(0)
    shape = np.log1p(-rate[:, None] * excess).mean(1)
    return (size * shape + 5) / (size + 10), -shape / rate
