"""The maxima behind :func:`pyro_flowguides.find_modes`: where to start, and which of the points where ascents end are distinct.

Everything here is in coordinates in which 1 is a sensible distance, and in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .ascent import Ascent, ascend, negative_hessians, without_errors
from .target import LogProb, value_and_score

# Starts are inflated up to this many standard deviations; uniform ones have a box of up to this half-width.
MAX_INFLATION = 30.0
MAX_BATCHES = 16
# The longest ascent, in batches of the target.
MAX_STEPS = 200
# Starts that come this near to each other have found the same maximum.
SAME_POINT = 0.05
# As far as this, in standard deviations of a maximum, another one is no mode of its own.
SAME_MODE = 1.0
# Between two modes log p falls by more than this, in nats, below the lower of them.
DIP = 0.1
# A point from which a Newton step would gain more nats is no maximum.
MAX_DECREMENT = 0.1
# Directions along which log p does not bend get this standard deviation.
WIDEST = 10.0
MAX_MODES = 256
# The number of elements that all Hessians together may have: 128 MB.
MAX_ELEMENTS = 2**24
# An optimum with a smaller fraction of the mass of the largest is not a mode.
MIN_MASS = 0.01


class Metered:
    """A log density that counts the points that it is asked for, and is NaN where it raises.

    Arguments:
        log_density: The density, in float64.
        left: How many points may be asked for before a search comes to its end.
        small_batch: Up to so many points a batch takes the same time, and counts the same.
    """

    def __init__(self, log_density: LogProb, left: float = math.inf, small_batch: int = 1) -> None:
        self.log_density, self.left, self.small_batch = log_density, left, small_batch
        self._safe = without_errors(self._counted)

    def __call__(self, points: Tensor) -> Tensor:
        return self._safe(points)

    def _counted(self, points: Tensor) -> Tensor:
        # Also where it raises: a batch that is halved takes longer.
        self.left -= max(len(points), self.small_batch)
        return self.log_density(points)

    def steps_left(self, num_starts: int, dim: int) -> int:
        """The number of batches of so many points that are left beside two Hessians, at most ``MAX_STEPS``."""
        return max(0, int(min(MAX_STEPS, (self.left - 8 * dim) // max(num_starts, self.small_batch))))

    def hessians_left(self, dim: int) -> int:
        """The number of maxima whose curvature can be looked at."""
        return max(0, int(min(max_modes(dim), self.left // (4 * dim))))


def max_modes(dim: int) -> int:
    """The largest number of modes, by the memory that their Hessians take."""
    return min(MAX_MODES, max(1, MAX_ELEMENTS // dim**2))


@dataclass(frozen=True)
class Maxima:
    """Distinct maxima of log p, the highest first.

    Attributes:
        points: Shape (K, D).
        values: log p there, shape (K,).
        scale_trils: Cholesky factors of the inverse of −∇² log p, shape (K, D, D).
        definite: Whether −∇² log p is positive definite, shape (K,).
        counts: The number of starts that have come to each, shape (K,).
    """

    points: Tensor
    values: Tensor
    scale_trils: Tensor
    definite: Tensor
    counts: Tensor

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: Tensor) -> Maxima:
        return Maxima(*(getattr(self, name)[index] for name in Maxima.__dataclass_fields__))

    def heaviest(self, number: int) -> Maxima:
        """Those with the largest masses by Laplace's method, in the order of their values."""
        chosen = self.nats_of_mass().argsort(descending=True)[:number]
        return self[chosen.sort().values]

    def with_mass(self) -> Maxima:
        """Those that have a mass to speak of by Laplace's method."""
        nats = self.nats_of_mass()
        return self[nats > nats.max() + math.log(MIN_MASS)] if len(self) else self

    def nats_of_mass(self) -> Tensor:
        """The log of the mass of each by Laplace's method, shape (K,)."""
        dim = self.points.shape[-1]
        log_dets = self.scale_trils.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.values + dim / 2 * math.log(2 * math.pi) + log_dets

    def squared_distances(self, x: Tensor) -> Tensor:
        """The squared Mahalanobis distance of every point from every maximum, shape (points, K)."""
        columns = []
        for point, scale_tril in zip(self.points, self.scale_trils, strict=True):
            solved = torch.linalg.solve_triangular(scale_tril, (x - point).mT, upper=False)
            columns.append(solved.square().sum(0))
        return torch.stack(columns, -1)


# --- starts --------------------------------------------------------------------------------------------------------------


def inflated(number: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal draws, each at a scale of its own from 1 to ``MAX_INFLATION``, uniform in its logarithm."""
    scales = MAX_INFLATION ** torch.rand(number, 1, dtype=dtype, device=device)
    return scales * torch.randn(number, dim, dtype=dtype, device=device)


def uniform(number: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uniform draws, each from a box of its own half-width from 1 to ``MAX_INFLATION``, uniform in its logarithm."""
    widths = MAX_INFLATION ** torch.rand(number, 1, dtype=dtype, device=device)
    return widths * (2 * torch.rand(number, dim, dtype=dtype, device=device) - 1)


def around(maxima: Maxima, number: int) -> Tensor:
    """Starts around the maxima that are known, inflated in the metric of each."""
    noise = inflated(number, maxima.points.shape[-1], maxima.points.dtype, maxima.points.device)
    chosen = torch.randint(len(maxima), (number,), device=noise.device)
    return maxima.points[chosen] + (maxima.scale_trils[chosen] @ noise.unsqueeze(-1)).squeeze(-1)


def between(maxima: Maxima, number: int) -> Tensor:
    """Starts from the box that holds the maxima that are known, and as much again around it."""
    low, high = maxima.points.amin(0), maxima.points.amax(0)
    fractions = 2 * torch.rand(number, len(low), dtype=low.dtype, device=low.device) - 0.5
    return low + fractions * (high - low)


def climb(log_density: Metered, starts: Tensor, rounding: float) -> Ascent:
    """Where the starts come to, before the points of the density have been used up.

    Arguments:
        log_density: The target.
        starts: Shape (starts, D).
        rounding: The relative rounding error of log p.
    """
    return ascend(
        log_density,
        starts,
        log_density.steps_left(*starts.shape),
        rounding=rounding,
        is_over=lambda: not log_density.steps_left(1, starts.shape[-1]),
    )


Climb = Callable[[Metered, Tensor, float], Ascent]


def search(
    log_density: Metered, starts: Tensor, *, min_batches: int = 1, rounding: float = 0.0, climb: Climb = climb
) -> tuple[Maxima, int]:
    """Distinct maxima from a batch of starts, and from further ones as long as a batch finds new modes or one has a single start.

    The starts of later batches are around the maxima that are known, and in the box that holds them. There are at most
    ``MAX_BATCHES``, and none once the points of the density have been used up.

    Arguments:
        log_density: The target.
        starts: The first starts, shape (starts, D).
        min_batches: The smallest number of batches of starts.
        rounding: The relative rounding error of log p.
        climb: Follows the ascents of a batch of starts, as :func:`climb` does.

    Returns:
        The maxima, and the number of starts.
    """
    number, difference = len(starts), 1e-4 if rounding < 1e-10 else 1e-3

    def arrivals() -> tuple[Tensor, Tensor]:
        ascent = climb(log_density, starts, rounding)
        order = ascent.values[ascent.arrived].argsort(descending=True)
        return ascent.points[ascent.arrived][order], ascent.values[ascent.arrived][order]

    maxima = _distinct(log_density, None, *arrivals(), difference)
    before = 1
    for batch in range(1, MAX_BATCHES):
        modes = maxima.with_mass()
        settled = len(modes) <= before and (len(modes) < 2 or not bool((modes.counts == 1).any()))
        if not len(modes) or (batch >= min_batches and settled) or not log_density.steps_left(*starts.shape):
            return maxima, batch * number
        before = len(modes)
        starts = torch.cat([around(modes, number // 2), between(modes, number - number // 2)])
        maxima = _distinct(log_density, maxima, *arrivals(), difference)
    return maxima, MAX_BATCHES * number


# --- distinct maxima -----------------------------------------------------------------------------------------------------


def _distinct(log_density: Metered, known: Maxima | None, points: Tensor, values: Tensor, difference: float) -> Maxima:
    """The maxima among points where ascents have ended, highest first, together with those that are known."""
    counts = torch.ones_like(values)
    if known is not None and len(points):
        # What has come to a known maximum is counted there.
        nearest = known.squared_distances(points).min(-1)
        old = nearest.values < SAME_MODE**2
        known = replace(known, counts=known.counts.index_add(0, nearest.indices[old], counts[old]))
        points, values = points[~old], values[~old]
    chosen, counts = _far_apart(points, torch.cdist(points, points) < SAME_POINT)
    most = log_density.hessians_left(points.shape[-1])
    new = _with_curvature(log_density, points[chosen][:most], values[chosen][:most], counts[:most], difference)
    if known is not None:
        joint = Maxima(*(torch.cat([getattr(known, name), getattr(new, name)]) for name in Maxima.__dataclass_fields__))
        new = joint[joint.values.argsort(descending=True, stable=True)]
    if not len(new):
        return new
    distances = new.squared_distances(new.points)
    near = torch.minimum(distances, distances.mT) < SAME_MODE**2
    chosen, counts = _far_apart(new.points, near, new.counts)
    apart = replace(new[chosen], counts=counts)
    return _separated(log_density, apart).heaviest(max_modes(new.points.shape[-1]))


def _far_apart(points: Tensor, near: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The first of every group of points that are near each other, and the number that each stands for."""
    counts = near.new_ones(len(points), dtype=torch.float64) if counts is None else counts
    chosen, numbers, left = [], [], np.ones(len(points), dtype=bool)
    closeness, each = near.cpu().numpy(), counts.cpu().numpy()
    for index in range(len(points)):
        if left[index]:
            group = closeness[index] & left
            group[index] = True
            chosen.append(index)
            numbers.append(each[group].sum())
            left &= ~group
    return torch.tensor(chosen, dtype=torch.long, device=points.device), points.new_tensor(numbers)


def _with_curvature(log_density: LogProb, points: Tensor, values: Tensor, counts: Tensor, difference: float) -> Maxima:
    """The points that are maxima by their own curvature."""
    if not len(points):
        empty = points.new_zeros(0, points.shape[-1], points.shape[-1])
        return Maxima(points, values, empty, values > 0, counts)
    hessians = negative_hessians(log_density, points, difference)
    finite = hessians.isfinite().all(-1).all(-1)
    points, values, counts, hessians = points[finite], values[finite], counts[finite], hessians[finite]
    curvatures, axes = torch.linalg.eigh(hessians)
    definite = (curvatures > 1e-6 * curvatures.amax(-1, keepdim=True)).all(-1)
    # A direction that does not bend is as wide as the coordinates; one that bends upwards, as it bends.
    covariance = axes / curvatures.abs().clamp(min=WIDEST**-2).unsqueeze(-2) @ axes.mT
    scale_trils, failed = torch.linalg.cholesky_ex(covariance)
    scores = value_and_score(log_density, points)[1]
    decrements = (scores.unsqueeze(-2) @ covariance @ scores.unsqueeze(-1)).reshape(-1) / 2
    is_maximum = (failed == 0) & (decrements < MAX_DECREMENT)
    return Maxima(points, values, scale_trils, definite, counts)[is_maximum]


def _separated(log_density: LogProb, maxima: Maxima) -> Maxima:
    """Without the maxima from which a straight way leads up to a higher one: ends of a ridge, and what has not quite arrived."""
    if len(maxima) < 2:
        return maxima
    fractions = torch.linspace(0, 1, 10, dtype=maxima.points.dtype, device=maxima.points.device)[1:-1]
    distances = torch.cdist(maxima.points, maxima.points)
    distances = distances.masked_fill(torch.ones_like(distances).triu().bool(), torch.inf)
    nearest = distances[1:].argmin(-1)
    lower, higher = maxima.points[1:], maxima.points[nearest]
    ways = lower.unsqueeze(1) + fractions.view(1, -1, 1) * (higher - lower).unsqueeze(1)
    with torch.no_grad():
        along = log_density(ways.reshape(-1, maxima.points.shape[-1])).reshape(len(lower), -1)
    dips = ~(along.amin(-1) > maxima.values[1:] - DIP)
    keep = torch.cat([dips.new_ones(1), dips])
    counts = maxima.counts.index_add(0, nearest[~dips], maxima.counts[1:][~dips])
    return replace(maxima, counts=counts)[keep]
