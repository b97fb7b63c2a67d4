r"""Gaussians from the curvature of log p, for many dimensions: at a point, or on average over the Gaussian.

The ELBO of a Gaussian :math:`N(m, \Sigma)` is highest where

.. math:: E[\nabla \log p] = 0, \qquad \Sigma^{-1} = -E[\nabla^2 \log p],

with expectations over the Gaussian itself. Everything here asks for scores alone, in batches: curvature is a difference of two
scores, or, on average over a Gaussian, the regression of the scores on the draws.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..model.target import LogProb, value_and_score
from ..transforms.fixed import LowRank

# Points of one batch of scores.
BATCH = 512
# The step of a difference, in units of the standard deviations: large against rounding, small against the posterior.
DIFFERENCE = 1e-3
# Directions that one step of the Krylov space adds, and its steps.
BLOCK_SIZE, NUM_BLOCKS = 16, 10
# The directions that are kept at most, and what each must be worth, in nats.
MAX_RANK, MIN_NATS = 64, 0.02
# Of curvatures in units of the diagonal: where log p bends upwards, the Gaussian is at most a hundred times as wide.
SMALLEST_CURVATURE = 1e-4
# Updates by regression are shortened by these factors until the ELBO rises.
STEPS = (1.0, 0.5, 0.2)
# Pairs of draws of a regression for each dimension: noise of the covariance costs some D / pairs of a nat a dimension.
MIN_PAIRS, MAX_PAIRS = 2, 16
MAX_REGRESSIONS = 12
# Pairs of draws for a mean alone.
NUM_PAIRS = 64


def _curvature(log_density: LogProb, loc: Tensor, units: Tensor, directions: Tensor) -> Tensor:
    """−∇² log p in these units, times each row of the directions; by central differences of the score."""
    steps = DIFFERENCE * directions * units
    scores = value_and_score(log_density, torch.cat([loc - steps, loc + steps]))[1]
    behind, ahead = scores.chunk(2)
    return (behind - ahead) * units / (2 * DIFFERENCE)


def _unit_vectors(dim: int, like: Tensor) -> Iterator[tuple[int, Tensor]]:
    """All unit vectors as rows, in batches, each with the index of its first."""
    for first in range(0, dim, BATCH // 2):
        rows = torch.arange(first, min(dim, first + BATCH // 2), device=like.device)
        yield first, torch.nn.functional.one_hot(rows, dim).to(like)


def diagonal_of_curvature(log_density: LogProb, loc: Tensor, units: Tensor) -> Tensor:
    """The diagonal of −∇² log p at a point, shape (D,). Cost: 2D scores.

    Arguments:
        log_density: The target, in float64.
        loc: The point, shape (D,).
        units: A length for each coordinate within which log p is smooth, such as a standard deviation, shape (D,).
    """
    parts = [
        _curvature(log_density, loc, units, rows).diagonal(offset=first) for first, rows in _unit_vectors(len(loc), loc)
    ]
    return torch.cat(parts) / units.square()


def laplace(log_density: LogProb, loc: Tensor, units: Tensor) -> tuple[Tensor, Tensor] | None:
    """The Gaussian with the curvature that log p has at its maximum; None where that is not positive definite.

    Cost: 2D scores and O(D³).

    Arguments:
        log_density: The target, in float64.
        loc: The maximum, shape (D,).
        units: As in :func:`diagonal_of_curvature`.

    Returns:
        The mean and the Cholesky factor of the covariance.
    """
    rows = [_curvature(log_density, loc, units, rows) for _, rows in _unit_vectors(len(loc), loc)]
    precision = torch.cat(rows)
    scale_tril = _scale_tril((precision + precision.mT) / 2)
    return None if scale_tril is None else (loc, units.unsqueeze(-1) * scale_tril)


def _scale_tril(precision: Tensor) -> Tensor | None:
    """The Cholesky factor of the covariance with this precision; None where it is not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(precision.nan_to_num(torch.inf))
    if int(failed) or not bool(factor.isfinite().all()):
        return None
    scale_tril, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor))
    return None if int(failed) else scale_tril


def regression_updates(
    log_density: LogProb, loc: Tensor, scale_tril: Tensor, num_pairs: int
) -> Iterator[tuple[Tensor, Tensor]]:
    r"""The Gaussian with the average score and curvature that log p has over a Gaussian, by regression of scores on draws.

    With :math:`x = m + Lz`, :math:`z \sim N(0, I)`, the coefficients of the regression of :math:`L^\top \nabla \log p(x)` on z
    are :math:`L^\top E[\nabla^2 \log p] L`, by Stein's identity; where log p is quadratic they are exact. Draws come in pairs
    z, −z, so that the odd part of the score is regressed and its even part has the mean. This is a step of length 1 along the
    natural gradient of the ELBO. Salimans & Knowles (2013), *Fixed-form variational posterior approximation through
    stochastic linear regression*, arXiv:1206.6679.

    Arguments:
        log_density: The target, in float64.
        loc: The mean m, shape (D,).
        scale_tril: The Cholesky factor L of the covariance, shape (D, D).
        num_pairs: The number of pairs, more than D. Cost: two scores for each, and O(D²) for each besides O(D³).

    Returns:
        Mean and Cholesky factor after the whole step, and after shorter ones; those alone that have a covariance.
    """
    dim = len(loc)
    squares, products = torch.zeros_like(scale_tril), torch.zeros_like(scale_tril)
    mean_score, count = torch.zeros_like(loc), 0
    for first in range(0, num_pairs, BATCH // 2):
        size = min(BATCH // 2, num_pairs - first)
        noise = torch.randn(size, dim, dtype=loc.dtype, device=loc.device)
        offsets = noise @ scale_tril.mT
        ahead, behind = value_and_score(log_density, torch.cat([loc + offsets, loc - offsets]))[1].chunk(2)
        finite = (ahead + behind).isfinite().all(-1)
        noise, ahead, behind = noise[finite], ahead[finite], behind[finite]
        squares += noise.mT @ noise
        products += noise.mT @ ((ahead - behind) / 2 @ scale_tril)
        mean_score += (ahead + behind).sum(0) / 2
        count += len(noise)
    if 2 * count < num_pairs + dim:
        return
    precision = -torch.cholesky_solve(products, torch.linalg.cholesky(squares))
    precision = (precision + precision.mT) / 2
    slope = scale_tril.mT @ mean_score / count
    identity = torch.eye(dim, dtype=loc.dtype, device=loc.device)
    for step in STEPS:
        inner = _scale_tril(identity + step * (precision - identity))
        if inner is not None:
            yield loc + step * scale_tril @ (inner @ (inner.mT @ slope)), scale_tril @ inner


def low_rank(log_density: LogProb, loc: Tensor, units: Tensor) -> LowRank:
    r"""A diagonal, and the directions in which the curvature of log p at a point differs from it most.

    The diagonal d is that of the best independent Gaussian there, :math:`d_i^{-2} = -\partial_i^2 \log p`. Among all covariances
    that differ from it on a given subspace alone, the ELBO is highest with the inverse of the curvature there, in units of d,
    and each of its eigenvalues θ is worth :math:`(θ - 1 - \log θ) / 2` nats. The subspace is a block Krylov space, which finds
    the largest and the smallest eigenvalues first. Golub & Van Loan (2013), *Matrix computations*, section 10.3.

    Cost: 2D + 320 scores, and O(D) memory and time for each of up to 160 directions, of which at most 64 are kept.

    Arguments:
        log_density: The target, in float64.
        loc: The point, shape (D,).
        units: As in :func:`diagonal_of_curvature`.

    Returns:
        The scale.
    """
    dim = len(loc)
    diagonal = diagonal_of_curvature(log_density, loc, units)
    units = torch.where(diagonal > 0, diagonal.rsqrt(), units)
    basis, images = loc.new_zeros(dim, 0), loc.new_zeros(0, dim)
    block = torch.randn(dim, min(BLOCK_SIZE, dim), dtype=loc.dtype, device=loc.device)
    while basis.shape[1] < min(BLOCK_SIZE * NUM_BLOCKS, dim):
        # Twice, for rounding.
        for _ in range(2):
            block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
        block = block[:, : dim - basis.shape[1]]
        image = _curvature(log_density, loc, units, block.mT)
        basis, images = torch.cat([basis, block], 1), torch.cat([images, image])
        block = image.mT
    curvature = images @ basis
    values, vectors = torch.linalg.eigh((curvature + curvature.mT) / 2)
    values = values.clamp(min=SMALLEST_CURVATURE)
    nats = (values - 1 - values.log()) / 2
    kept = nats.argsort(descending=True)[:MAX_RANK]
    kept = kept[nats[kept] > MIN_NATS]
    return LowRank(units, basis @ vectors[:, kept], values[kept].rsqrt())


def centred(log_density: LogProb, loc: Tensor, scale: LowRank) -> Tensor:
    """The mean after a step of length 1 along the natural gradient of the ELBO, with the covariance held fixed.

    Cost: 128 scores.
    """
    offsets = scale.multiply(torch.randn(NUM_PAIRS, len(loc), dtype=loc.dtype, device=loc.device))
    scores = value_and_score(log_density, torch.cat([loc + offsets, loc - offsets]))[1]
    return loc + scale.multiply(scale.multiply_transposed(scores[scores.isfinite().all(-1)].mean(0)))
