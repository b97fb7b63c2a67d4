r"""A log-Gaussian Cox process: the density of points in the unit square, on a grid of M × M cells.

With counts y of the cells, and d the distance of two cells in cell widths,

.. math::
    f \sim N(\mu_0, K), \quad K_{ij} = 1.91\, e^{-33 d_{ij} / M}, \quad \mu_0 = \log n - 1.91 / 2, \qquad
    \log p(y \mid f) = \sum_c y_c f_c - e^{f_c} / M^2

for n points, without the constant :math:`\sum \log y_c!` and that of the cells' size. Møller, Syversveen & Waagepetersen
(1998), *Log Gaussian Cox processes*. On 40 × 40 cells it is the target of 1600 dimensions of the literature on samplers.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .known import KnownPosterior, flat, tensor

VARIANCE, DECAY = 1.91, 33.0
# By annealed importance sampling from the best Gaussian, 250 temperatures × 96 particles, ± 0.02.
LOG_EVIDENCE = {40: 501.74}


def cox_process(counts: Tensor, mean: Tensor, whitening: Tensor) -> None:
    """The process on a grid.

    Arguments:
        counts: y, shape (cells,).
        mean: μ₀.
        whitening: The inverse of the Cholesky factor of K, shape (cells, cells).
    """
    cells = len(counts)
    # Its density is below, by a product: a Cholesky factor would be solved with for every draw.
    f = pyro.sample("f", flat(dist.Normal(torch.zeros_like(counts), 1.0).to_event(1)))
    noise = (f - mean) @ whitening.mT
    log_normal = -0.5 * noise.square().sum(-1) + whitening.diagonal().log().sum() - 0.5 * cells * math.log(2 * math.pi)
    pyro.factor("field", log_normal)
    pyro.factor("points", (counts * f - f.exp() / cells).sum(-1))


def cox_posterior(path: Path, side: int) -> KnownPosterior:
    """The process of 126 Scots pine saplings (Penttinen, Stoyan & Henttonen 1992).

    Arguments:
        path: A CSV file with a header, whose last two columns are the coordinates of the points.
        side: The number M of cells along a side.
    """
    with path.open() as file:
        points = np.array([[float(value) for value in row[-2:]] for row in list(csv.reader(file))[1:]])
    counts = np.zeros((side, side))
    np.add.at(counts, tuple(np.minimum((points * side).astype(int), side - 1).T), 1)
    cells = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).reshape(-1, 2)
    distance = np.linalg.norm(cells[:, None] - cells, axis=-1)
    factor = np.linalg.cholesky(VARIANCE * np.exp(-DECAY * distance / side))
    arguments = counts.reshape(-1), math.log(len(points)) - VARIANCE / 2, np.tril(np.linalg.inv(factor))
    return KnownPosterior(
        f"cox_{side**2}", cox_process, tuple(map(tensor, arguments)), log_evidence=LOG_EVIDENCE.get(side)
    )
