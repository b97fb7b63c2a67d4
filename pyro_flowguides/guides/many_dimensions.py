r"""The Gaussian that is found before training in many dimensions: a diagonal, a diagonal and a few directions, or a full one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..model.target import LogProb, value_and_score
from ..transforms.fixed import Scale, scaled, standard_deviations
from . import curvature
from .gaussians import elbo_and_spread, gaussian_elbo

NUM_UPDATES = 150
DIAGONAL_BATCH_SIZE = 32
MAX_PATH_STEPS = 200
# A Gaussian over whose draws log p − log q spreads by less, in nats, fits.
MAX_SPREAD = 0.5
# Above this size there is no full covariance: a draw costs D², more than the networks of a flow.
MAX_FULL_DIM = 2000
# Directions are worth their cost from this gain on, in nats; a full covariance, whose cost grows with D², from a nat for so many
# dimensions on.
MIN_GAIN, DIMS_PER_NAT = 0.25, 1000
# After a regression that gains more the next one has as many draws.
LARGE_GAIN = 5.0
# Steps of the mean of a Gaussian with a few directions.
MAX_MOVES = 5


def diagonal_batch_and_match(
    log_density: LogProb, loc: Tensor, scale: Tensor, num_updates: int = NUM_UPDATES
) -> tuple[Tensor, Tensor]:
    r"""Batch and match with a diagonal covariance, for many dimensions.

    With a diagonal covariance the divergence of Cai et al. (2024, arXiv:2402.14758) and its regulariser are sums over the
    coordinates, so that each has the update of :func:`batch_and_match` in one dimension,

    .. math:: \sigma'^2 = \frac{2 v}{1 + \sqrt{1 + 4 u v}},

    with the diagonals u and v of U and V. Cost: ``num_updates`` batches of 32 gradients.

    Arguments:
        log_density: The target, in float64.
        loc: The mean to start from, shape (D,), float64.
        scale: The standard deviations to start from, shape (D,), float64.
        num_updates: The number of updates.

    Returns:
        The mean and the standard deviations.
    """
    for update in range(num_updates):
        points = loc + torch.randn(DIAGONAL_BATCH_SIZE, len(loc), dtype=loc.dtype, device=loc.device) * scale
        scores = value_and_score(log_density, points)[1]
        finite = scores.isfinite().all(-1)
        if 2 * int(finite.sum()) < DIAGONAL_BATCH_SIZE:
            scale = scale / 2
            continue
        points, scores = points[finite], scores[finite]
        weight = DIAGONAL_BATCH_SIZE / (update + 1)
        shrunk = weight / (1 + weight)
        mean_point, mean_score = points.mean(0), scores.mean(0)
        u = weight * scores.var(0, correction=0) + shrunk * mean_score.square()
        v = scale.square() + weight * points.var(0, correction=0) + shrunk * (loc - mean_point).square()
        variance = 2 * v / (1 + (1 + 4 * u * v).sqrt())
        loc = (loc + weight * (variance * mean_score + mean_point)) / (1 + weight)
        scale = variance.sqrt()
    return loc, scale


def mode(log_density: LogProb, loc: Tensor, max_steps: int = MAX_PATH_STEPS) -> Tensor:
    """A maximum of log p by L-BFGS; where it leaves the range of finite numbers, the best point that it has seen."""
    point = loc.clone().requires_grad_()
    best, best_value = loc, -math.inf
    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=max_steps,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        # Not by backward(), which would leave gradients in the model's parameters.
        nonlocal best, best_value
        value, score = value_and_score(log_density, point.unsqueeze(0))
        if float(value[0]) > best_value and bool(score.isfinite().all()):
            best, best_value = point.detach().clone(), float(value[0])
        point.grad = -score[0]
        return -value[0]

    optimizer.step(closure)
    found = point.detach()
    return found if bool(found.isfinite().all()) else best


def best_diagonal_gaussian(log_density: LogProb, loc: Tensor, scale: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
    """The Gaussian of highest ELBO among the start, and diagonal batch and match from it and from the mode."""
    starts = [(loc, scale), (highest, scale)]
    matched = [diagonal_batch_and_match(log_density, *start) for start in starts]
    return max([starts[0], *matched], key=lambda gaussian: gaussian_elbo(log_density, *gaussian))


def best_gaussian_in_many_dimensions(log_density: LogProb, loc: Tensor, scale: Tensor) -> tuple[Tensor, Scale]:
    """The cheapest that fits of a diagonal Gaussian, one with a few directions besides, and a full one.

    A Gaussian with more numbers is looked for where log p − log q spreads by more than ``MAX_SPREAD`` over the draws of the one
    before, and is kept where its ELBO is higher by what it costs: by ``MIN_GAIN`` for directions, by D / ``DIMS_PER_NAT`` nats
    for a full covariance, which is for at most ``MAX_FULL_DIM`` dimensions.

    Arguments:
        log_density: The target, in float64.
        loc: The mean to start from, shape (D,), float64.
        scale: The standard deviations to start from, shape (D,), float64.
    """
    highest = mode(log_density, loc)
    best: tuple[Tensor, Scale] = best_diagonal_gaussian(log_density, loc, scale, highest)
    elbo, spread = elbo_and_spread(log_density, *best)
    richer = [(_with_directions, MIN_GAIN)]
    if len(loc) <= MAX_FULL_DIM:
        richer.append((_with_full_covariance, len(loc) / DIMS_PER_NAT))
    for find, min_gain in richer:
        if spread <= MAX_SPREAD:
            break
        found = find(log_density, *best, highest)
        new_elbo, new_spread = elbo_and_spread(log_density, *found)
        if new_elbo > elbo + min_gain:
            best, elbo, spread = found, new_elbo, new_spread
    return best


def _with_directions(log_density: LogProb, loc: Tensor, scale: Scale, highest: Tensor) -> tuple[Tensor, Scale]:
    """A diagonal and a few directions, by the curvature at the mean of another Gaussian or where log p is highest."""
    units = standard_deviations(scale)
    found = []
    for point in (loc, highest):
        low_rank = curvature.low_rank(log_density, point, units)
        best = point, low_rank
        elbo = gaussian_elbo(log_density, *best)
        for _ in range(MAX_MOVES):
            moved = curvature.centred(log_density, best[0], low_rank), low_rank
            new_elbo = gaussian_elbo(log_density, *moved)
            if not new_elbo > elbo + MIN_GAIN:
                break
            best, elbo = moved, new_elbo
        found.append((elbo, best))
    return max(found, key=lambda each: each[0])[1]


def _with_full_covariance(log_density: LogProb, loc: Tensor, scale: Scale, highest: Tensor) -> tuple[Tensor, Tensor]:
    """A full covariance: from another Gaussian or the curvature where log p is highest, by regressions on more and more draws."""
    dim = len(loc)
    identity = torch.eye(dim, dtype=loc.dtype, device=loc.device)
    half = scaled(scale, identity)
    candidates = [(loc, torch.linalg.cholesky(half.mT @ half))]
    at_highest = curvature.laplace(log_density, highest, standard_deviations(scale))
    candidates += [at_highest] if at_highest is not None else []
    elbos = [gaussian_elbo(log_density, *candidate) for candidate in candidates]
    elbo = max(elbos)
    best = candidates[elbos.index(elbo)]
    num_pairs = curvature.MIN_PAIRS * dim
    for _ in range(curvature.MAX_REGRESSIONS):
        gain = 0.0
        for candidate in curvature.regression_updates(log_density, *best, num_pairs):
            gain = gaussian_elbo(log_density, *candidate) - elbo
            if gain > 0:
                best, elbo = candidate, elbo + gain
                break
        # Far from the end more draws are no use, near it fewer are not.
        if gain < LARGE_GAIN:
            if (num_pairs > curvature.MIN_PAIRS * dim and gain < MIN_GAIN) or num_pairs >= curvature.MAX_PAIRS * dim:
                break
            num_pairs *= 2
    return best
