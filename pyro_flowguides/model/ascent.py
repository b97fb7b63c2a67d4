"""Maxima of a log density from many starts at once, and its curvature there; one batch of the density is one call of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .target import ERRORS_OF_MODELS, LogProb, value_and_score

# Pairs of steps and changes of the score that each start remembers.
HISTORY = 10
# A step must gain this fraction of what the slope promises.
SUFFICIENT = 1e-4
# A start that gains nothing by the shortest step stays where it is.
SHORTEST_STEP = 1e-6
# A start has arrived where a step is expected to gain no more, in nats.
TOLERANCE = 1e-5
# Steps of differences, in units of the conditional standard deviation along a coordinate.
DIFFERENCE = 0.1
# A batch that raises is divided into no more parts.
NUM_PARTS = 16
# Points of one batch of differences, or those of one maximum.
MAX_POINTS = 4096


@dataclass(frozen=True)
class Ascent:
    """Where the starts of :func:`ascend` have come to.

    Attributes:
        points: Shape (starts, D).
        values: log p there, shape (starts,).
        arrived: Whether a start has come to a maximum, shape (starts,).
        num_steps: The number of batches of the density.
    """

    points: Tensor
    values: Tensor
    arrived: Tensor
    num_steps: int


def ascend(
    log_density: LogProb,
    starts: Tensor,
    max_steps: int,
    *,
    rounding: float = 0.0,
    is_over: Callable[[], bool] = lambda: False,
) -> Ascent:
    """Maxima of log p by L-BFGS from many starts together.

    Every step is one batch of values and scores of all starts that have not arrived. Each start has a step length of its own,
    which is divided by 4 where log p does not rise enough, and a history of its own. Nocedal and Wright (2006), *Numerical
    optimization*, algorithm 7.4. The coordinates should be of similar scale, with 1 as a sensible first step.

    Arguments:
        log_density: The target, in float64; NaN where it has no value.
        starts: Shape (starts, D), float64.
        max_steps: The number of batches.
        rounding: The relative rounding error of log p, by which a value may seem to fall.
        is_over: Asked before every step whether to stop there.

    Returns:
        The points. A start that has no density there, or still rises after ``max_steps``, has not arrived.
    """
    points = starts.clone()
    values, scores = value_and_score(log_density, points)
    done = ~(values.isfinite() & scores.isfinite().all(-1))
    values, scores = values.masked_fill(done, -torch.inf), scores.masked_fill(done.unsqueeze(-1), 0.0)
    arrived = torch.zeros_like(done)
    moves = points.new_zeros(HISTORY, *points.shape)
    changes = torch.zeros_like(moves)
    scales = points.new_ones(len(points))
    length = torch.ones_like(scales)
    direction = scores / scores.norm(dim=-1, keepdim=True).clamp(min=1.0)
    num_steps = 1
    while num_steps < max_steps and not bool(done.all()) and not is_over():
        going = (~done).nonzero().squeeze(-1)
        # No step goes further than the point itself is away.
        step = length.unsqueeze(-1) * direction
        step = step * ((1 + points.norm(dim=-1)) / step.norm(dim=-1).clamp(min=1e-300)).clamp(max=1.0).unsqueeze(-1)
        new_values, new_scores = torch.full_like(values, torch.nan), torch.zeros_like(scores)
        new_values[going], new_scores[going] = value_and_score(log_density, (points + step)[going])
        num_steps += 1
        slope = (scores * step).sum(-1)
        allowed = values + SUFFICIENT * slope - rounding * values.abs()
        rises = new_values.isfinite() & new_scores.isfinite().all(-1) & (new_values >= allowed) & ~done
        change = scores - new_scores
        curvature = (step * change).sum(-1)
        bends = rises & (curvature > 1e-10 * step.norm(dim=-1) * change.norm(dim=-1))
        moves = torch.where(bends.view(1, -1, 1), torch.cat([moves[1:], step.unsqueeze(0)]), moves)
        changes = torch.where(bends.view(1, -1, 1), torch.cat([changes[1:], change.unsqueeze(0)]), changes)
        scales = torch.where(bends, curvature / change.square().sum(-1), scales)
        moved = rises.unsqueeze(-1)
        points = torch.where(moved, points + step, points)
        values = torch.where(rises, new_values, values)
        scores = torch.where(moved, new_scores, scores)
        direction = torch.where(moved, _newton_direction(scores, moves, changes, scales), direction)
        # Where log p bends upwards the direction tells nothing of the length.
        length = torch.where(bends, 1.0, torch.where(rises, 2 * length, length / 4))
        gain = (direction * scores).sum(-1) / 2
        here = gain.abs() < TOLERANCE + rounding * values.abs()
        arrived = arrived | (rises & bends & here) | (~done & (scores == 0).all(-1))
        done = done | arrived | (length < SHORTEST_STEP)
        # Of a start that gains nothing any more, rounding may be the reason.
        arrived = arrived | (done & here & values.isfinite())
    return Ascent(points, values, arrived & values.isfinite(), num_steps)


def _newton_direction(scores: Tensor, moves: Tensor, changes: Tensor, scales: Tensor) -> Tensor:
    """The inverse Hessian that the pairs imply, times the score, for every start; pairs of zeros count for nothing."""
    products = (moves * changes).sum(-1)
    inverse = torch.where(products > 0, 1 / products.clamp(min=1e-300), 0.0)
    direction = scores
    coefficients = []
    for move, change, each in zip(moves.flip(0), changes.flip(0), inverse.flip(0), strict=True):
        coefficients.append(each * (move * direction).sum(-1))
        direction = direction - coefficients[-1].unsqueeze(-1) * change
    direction = scales.unsqueeze(-1) * direction
    for move, change, each, coefficient in zip(moves, changes, inverse, reversed(coefficients), strict=True):
        correction = coefficient - each * (change * direction).sum(-1)
        direction = direction + correction.unsqueeze(-1) * move
    # The history of a start that has none is empty, and its first step is short.
    has_none = (products == 0).all(0)
    short = scores / scores.norm(dim=-1, keepdim=True).clamp(min=1.0)
    return torch.where(has_none.unsqueeze(-1), short, direction)


def negative_hessians(log_density: LogProb, points: Tensor, first_difference: float) -> Tensor:
    """−∇² log p at every point by central differences of the score, symmetric.

    The differences are taken twice: with one small step for all coordinates, and then with a tenth of the conditional standard
    deviation along each, at which rounding matters least.

    Arguments:
        log_density: The target, in float64.
        points: Shape (K, D).
        first_difference: The first step.

    Returns:
        Shape (K, D, D); NaN where a score is not finite. Cost: 4 D scores for every point, those of 4096 / (2 D) points at once.
    """
    steps = torch.full_like(points, first_difference)
    rough = _differences(log_density, points, steps).diagonal(dim1=-2, dim2=-1)
    steps = (DIFFERENCE / rough.clamp(min=1e-4).sqrt()).nan_to_num(first_difference).clamp(max=1.0)
    hessians = _differences(log_density, points, steps)
    return (hessians + hessians.mT) / 2


def _differences(log_density: LogProb, points: Tensor, steps: Tensor) -> Tensor:
    dim = points.shape[-1]
    at_once = max(1, MAX_POINTS // (2 * dim))
    found = []
    for some, away in zip(points.split(at_once), torch.split(steps, at_once), strict=True):
        offsets = torch.diag_embed(away)
        moved = torch.stack([some.unsqueeze(-2) + offsets, some.unsqueeze(-2) - offsets]).reshape(-1, dim)
        ahead, behind = value_and_score(log_density, moved)[1].reshape(2, len(some), dim, dim)
        found.append((behind - ahead) / (2 * away.unsqueeze(-1)))
    return torch.cat(found)


def without_errors(log_density: LogProb) -> LogProb:
    """The same density, NaN where it raises: a batch that raises is halved, down to ``NUM_PARTS`` parts."""

    def tried(points: Tensor, smallest: int) -> Tensor:
        try:
            return log_density(points)
        except ERRORS_OF_MODELS:
            if len(points) <= smallest:
                return points.sum(-1) * torch.nan
            return torch.cat([tried(half, smallest) for half in points.chunk(2)])

    return lambda points: tried(points, max(1, len(points) // NUM_PARTS))
