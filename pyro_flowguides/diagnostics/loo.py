r"""Leave-one-out cross-validation by importance sampling, for draws of a posterior and for draws of a guide.

The expected log predictive density :math:`\sum_i \log p(y_i \mid y_{-i})` needs the posterior without observation i. Draws of the
posterior have the importance ratios :math:`1 / p(y_i \mid \theta)` for that; draws of a guide q have

.. math:: r_i(\theta) = \frac{p(\theta, y)}{q(\theta)} \cdot \frac{1}{p(y_i \mid \theta)},

Pareto-smoothed in both cases. Vehtari, Gelman and Gabry (2017), *Practical Bayesian model evaluation using leave-one-out
cross-validation and WAIC*, arXiv:1507.04544; the correction for a guide: Magnusson, Andersen, Jonasson and Vehtari (2019),
*Bayesian leave-one-out cross-validation for large data*, arXiv:1904.10679.

This module works on numpy arrays and needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .importance import psis

# The number of weights to smooth at a time; bounds the memory.
MAX_ELEMENTS = 2**20


@dataclass(frozen=True)
class Loo:
    """The result of leave-one-out cross-validation.

    Attributes:
        pointwise: The log predictive density of every observation given all others, shape (n,).
        khats: The Pareto shape of every observation's weights, shape (n,).
    """

    pointwise: np.ndarray
    khats: np.ndarray

    @property
    def elpd(self) -> float:
        """The expected log predictive density, the sum over observations, in nats."""
        return float(self.pointwise.sum())

    @property
    def se(self) -> float:
        """Its standard error, from the spread between observations; NaN for a single one."""
        num = len(self.pointwise)
        return float(num**0.5 * self.pointwise.std(ddof=1)) if num > 1 else float("nan")


def loo(log_likelihood: np.ndarray, log_ratios: np.ndarray | None = None) -> Loo:
    """The log predictive density of every observation given all others.

    Arguments:
        log_likelihood: Of every observation at every draw, shape (S, n). A column that is exactly 0 is a masked entry and no
            observation.
        log_ratios: log p(θ, y) − log q(θ) for draws of a guide q, up to a constant, shape (S,); None for draws of the
            posterior.

    Raises:
        ValueError: if there are too few draws, or a ratio is NaN or +inf.
    """
    offset = 0.0 if log_ratios is None else log_ratios
    step = max(1, MAX_ELEMENTS // len(log_likelihood))
    blocks = []
    for start in range(0, log_likelihood.shape[1], step):
        block = log_likelihood[:, start : start + step]
        columns = block[:, (block != 0).any(0)].T.astype(np.float64)
        if not len(columns):
            continue
        log_weights, khats = psis(offset - columns)
        blocks.append(Loo(np.logaddexp.reduce(log_weights + columns, axis=-1), khats))
    return joined(blocks)


def joined(parts: Sequence[Loo]) -> Loo:
    """The result for all observations, from those for some of them."""
    return Loo(
        np.concatenate([np.empty(0), *[part.pointwise for part in parts]]),
        np.concatenate([np.empty(0), *[part.khats for part in parts]]),
    )
