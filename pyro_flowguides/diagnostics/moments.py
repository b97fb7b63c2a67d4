"""Moments and quantiles of draws, weighted or not, in float64. Numpy alone.

Draws have shape ``(S,) + shape``; weights have shape (S,) and add up to 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mean(draws: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The mean over draws."""
    draws = draws.astype(np.float64)
    return draws.mean(0) if weights is None else np.tensordot(weights, draws, 1)


def sd(draws: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The standard deviation, with the correction S/(S − 1), which with weights is 1/(1 − Σ w²)."""
    draws = draws.astype(np.float64)
    if weights is None:
        return draws.std(0, ddof=1)
    variance = np.tensordot(weights, (draws - mean(draws, weights)) ** 2, 1)
    return np.sqrt(variance / (1 - (weights**2).sum()))


def quantiles(draws: np.ndarray, levels: Sequence[float], weights: np.ndarray | None = None) -> np.ndarray:
    """The quantiles, shape ``(len(levels),) + shape``; interpolated between the midpoints of the steps of the weighted ECDF."""
    draws = draws.astype(np.float64)
    if weights is None:
        return np.quantile(draws, list(levels), axis=0)
    columns = draws.reshape(len(draws), -1).T
    result = np.empty((len(levels), len(columns)))
    for i, column in enumerate(columns):
        order = np.argsort(column)
        ordered = weights[order]
        result[:, i] = np.interp(levels, np.cumsum(ordered) - 0.5 * ordered, column[order])
    return result.reshape(len(levels), *draws.shape[1:])
