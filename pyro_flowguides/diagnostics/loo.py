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

from dataclasses import dataclass

import numpy as np

from .importance import psis

# The number of weights to smooth at a time; bounds the memory.
MAX_BATCH_ELEMENTS = 2**22


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
    columns = log_likelihood[:, (log_likelihood != 0).any(0)].T.astype(np.float64)
    offset = 0.0 if log_ratios is None else log_ratios
    step = max(1, MAX_BATCH_ELEMENTS // max(1, log_likelihood.shape[0]))
    pointwise, khats = np.empty(len(columns)), np.empty(len(columns))
    for start in range(0, len(columns), step):
        part = slice(start, start + step)
        log_weights, khats[part] = psis(offset - columns[part])
        pointwise[part] = np.logaddexp.reduce(log_weights + columns[part], axis=-1)
    return Loo(pointwise, khats)
