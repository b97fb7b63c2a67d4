r"""Pareto smoothing of importance weights, for many sets of weights at once.

The largest weights of a set are replaced by the quantiles of a generalised Pareto distribution that is fitted to them. Its shape
:math:`\hat k` tells how heavy their tail is. Vehtari et al. (2024), *Pareto smoothed importance sampling*, arXiv:1507.02646; the
fit of the tail: Zhang and Stephens (2009), *A new and efficient estimation method for the generalized Pareto distribution*. The
numbers are those of ``arviz.psislw``, which takes the sets one after the other.

This module works on numpy arrays and needs no torch.
"""

from __future__ import annotations

import numpy as np

# The number of elements of the largest array that is computed at a time; it bounds the memory.
MAX_ELEMENTS = 2**20
# Fewer weights than this have no tail to fit.
MIN_TAIL = 5
# As many draws at the prior mean 1/2 are added to the estimate of the shape.
PRIOR_WEIGHT = 10
SMALLEST_LOG = float(np.log(np.finfo(np.float64).tiny))


def smooth(log_ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smoothed, normalised log weights and the shape of their tail.

    Cost: for S draws a sort, and about 30 + S^¼ logarithms for each of the 3 √S draws of the tail. The memory beside the result
    is that of a block of sets.

    Arguments:
        log_ratios: Finite, shape ``(..., S)``, float64.

    Returns:
        The log weights, shape ``(..., S)``, and the shapes, ``(...)``; a shape is infinite where no tail can be fitted.
    """
    num_draws = log_ratios.shape[-1]
    rows = log_ratios.reshape(-1, num_draws)
    tail = tail_length(num_draws)
    step = max(1, MAX_ELEMENTS // max(num_draws, num_candidates(tail) * tail))
    log_weights, shapes = np.empty(rows.shape), np.empty(len(rows))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        log_weights[part], shapes[part] = _smooth_rows(rows[part], tail)
    return log_weights.reshape(log_ratios.shape), shapes.reshape(log_ratios.shape[:-1])


def tail_length(num_draws: int) -> int:
    """The number of draws that are smoothed: a fifth of them, or 3 √S where that is fewer."""
    return int(np.ceil(min(num_draws / 5, 3 * num_draws**0.5)))


def num_candidates(tail: int) -> int:
    """The number of points of the profile likelihood of a tail."""
    return 30 + int(tail**0.5)


def _smooth_rows(log_ratios: np.ndarray, tail: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(log_ratios, axis=-1, kind="stable")
    ordered = np.take_along_axis(log_ratios, order, -1)
    ordered -= ordered[:, -1:]
    cutoffs = np.maximum(ordered[:, -tail - 1], SMALLEST_LOG)
    # Of draws that are equal to the one below the tail, and of those without weight, none is smoothed.
    lengths = (ordered[:, -tail:] > cutoffs[:, None]).sum(-1)
    shapes = np.full(len(ordered), np.inf)
    for length in np.unique(lengths[lengths >= MIN_TAIL]):
        rows = np.flatnonzero(lengths == length)
        cutoff = np.exp(cutoffs[rows, None])
        shapes[rows], scales = fit_tail(np.exp(ordered[rows, -length:]) - cutoff)
        quantiles = np.arange(0.5, length) / length
        smoothed = np.log(_quantiles(quantiles, shapes[rows], scales) + cutoff)
        fitted = np.isfinite(shapes[rows])
        ordered[rows[fitted], -length:] = np.minimum(smoothed[fitted], 0)
    ordered -= np.logaddexp.reduce(ordered, axis=-1, keepdims=True)
    log_weights = np.empty_like(ordered)
    np.put_along_axis(log_weights, order, ordered, -1)
    return log_weights, shapes


def fit_tail(exceedances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shape and scale of the generalised Pareto distribution of each row, by Zhang and Stephens.

    Arguments:
        exceedances: In ascending order, above 0, shape ``(sets, length)``.

    Returns:
        The shapes, drawn towards 1/2 with the weight of ten draws, and the scales, ``(sets,)`` each.
    """
    length = exceedances.shape[-1]
    count = num_candidates(length)
    candidates = (1 - np.sqrt(count / (np.arange(1, count + 1) - 0.5))) / (
        3 * exceedances[:, int(length / 4 + 0.5) - 1, None]
    )
    candidates += 1 / exceedances[:, -1:]
    shapes = np.log1p(-candidates[:, :, None] * exceedances[:, None, :]).mean(-1)
    log_likelihoods = length * (np.log(-candidates / shapes) - shapes - 1)
    weights = np.exp(log_likelihoods - np.logaddexp.reduce(log_likelihoods, axis=-1, keepdims=True))
    weights = np.where(weights >= 10 * np.finfo(np.float64).eps, weights, 0)
    best = (candidates * weights).sum(-1) / weights.sum(-1)
    shape = np.log1p(-best[:, None] * exceedances).mean(-1)
    return (length * shape + PRIOR_WEIGHT * 0.5) / (length + PRIOR_WEIGHT), -shape / best


def _quantiles(levels: np.ndarray, shapes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The quantiles of generalised Pareto distributions, ``(sets, levels)``."""
    shapes = shapes[:, None]
    log_tail = np.log1p(-levels)
    is_exponential = np.abs(shapes) < np.finfo(np.float64).eps
    divisor = np.where(is_exponential, 1, shapes)
    return scales[:, None] * np.where(is_exponential, -log_tail, np.expm1(-shapes * log_tail) / divisor)
