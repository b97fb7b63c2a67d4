r"""The numbers behind :func:`pyro_flowguides.find_modes`: starts, distinct maxima, and the mass around each.

Everything here is in coordinates in which 1 is a sensible distance, and in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..model.ascent import ascend, negative_hessians
from ..model.target import LogProb, value_and_score
from .importance import psis

# Starts are inflated up to this many standard deviations; uniform ones have a box of up to this half-width.
MAX_INFLATION = 30.0
MAX_BATCHES = 16
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
MIN_DRAWS_OF_A_MODE = 64
# Modes with fewer effective draws have no mass that could be relied on.
MIN_ESS = 10
# A mode is lost where the guide draws less than this fraction of its mass.
LOST = 0.5
# The worst shape of weights at which a Gaussian is left as it is.
GOOD_KHAT = 0.7
# An optimum with a smaller fraction of the mass of the largest is not a mode.
MIN_MASS = 0.01


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


def search(
    log_density: LogProb,
    starts: Tensor,
    max_steps: int,
    *,
    min_batches: int = 1,
    max_batches: int = MAX_BATCHES,
    rounding: float = 0.0,
) -> tuple[Maxima, int]:
    """Distinct maxima from a batch of starts, and from further ones as long as a batch finds new modes or one has a single start.

    The starts of later batches are around the maxima that are known, and in the box that holds them.

    Arguments:
        log_density: The target.
        starts: The first starts, shape (starts, D).
        max_steps: The longest ascent, in batches of the target.
        min_batches: The smallest number of batches of starts.
        max_batches: The largest.
        rounding: The relative rounding error of log p.

    Returns:
        The maxima, and the number of starts.
    """
    number, difference = len(starts), 1e-4 if rounding < 1e-10 else 1e-3
    maxima = _distinct(log_density, None, *_arrivals(log_density, starts, max_steps, rounding), difference)
    before = 1
    for batch in range(1, max_batches):
        modes = maxima.with_mass()
        settled = len(modes) <= before and (len(modes) < 2 or not bool((modes.counts == 1).any()))
        if not len(modes) or (batch >= min_batches and settled):
            return maxima, batch * number
        before = len(modes)
        starts = torch.cat([around(modes, number // 2), between(modes, number - number // 2)])
        maxima = _distinct(log_density, maxima, *_arrivals(log_density, starts, max_steps, rounding), difference)
    return maxima, max_batches * number


def _arrivals(log_density: LogProb, starts: Tensor, max_steps: int, rounding: float) -> tuple[Tensor, Tensor]:
    ascent = ascend(log_density, starts, max_steps, rounding=rounding)
    order = ascent.values[ascent.arrived].argsort(descending=True)
    return ascent.points[ascent.arrived][order], ascent.values[ascent.arrived][order]


# --- distinct maxima -----------------------------------------------------------------------------------------------------


def _distinct(log_density: LogProb, known: Maxima | None, points: Tensor, values: Tensor, difference: float) -> Maxima:
    """The maxima among points where ascents have ended, highest first, together with those that are known."""
    counts = torch.ones_like(values)
    if known is not None and len(points):
        # What has come to a known maximum is counted there.
        nearest = known.squared_distances(points).min(-1)
        old = nearest.values < SAME_MODE**2
        known = replace(known, counts=known.counts.index_add(0, nearest.indices[old], counts[old]))
        points, values = points[~old], values[~old]
    chosen, counts = _far_apart(points, torch.cdist(points, points) < SAME_POINT)
    points, values = points[chosen][:MAX_MODES], values[chosen][:MAX_MODES]
    new = _with_curvature(log_density, points, values, counts[:MAX_MODES], difference)
    if known is not None:
        joint = Maxima(*(torch.cat([getattr(known, name), getattr(new, name)]) for name in Maxima.__dataclass_fields__))
        new = joint[joint.values.argsort(descending=True, stable=True)]
    if not len(new):
        return new
    distances = new.squared_distances(new.points)
    near = torch.minimum(distances, distances.mT) < SAME_MODE**2
    chosen, counts = _far_apart(new.points, near, new.counts)
    apart = replace(new[chosen], counts=counts)
    return _separated(log_density, apart)


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


# --- mass ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Masses:
    """The mass around every maximum, by importance sampling from a Student-t distribution around each.

    Attributes:
        maxima: The maxima, with the Gaussians that were drawn from.
        nats: The log of the mass that belongs to each, shape (K,).
        relative_se: The standard error of each mass over the mass, shape (K,).
        nats_of_ball: The log of the mass within a ball of three standard deviations or so, shape (K,).
        relative_se_of_ball: Likewise.
        khats: The Pareto shape of the weights of each one's draws, shape (K,).
    """

    maxima: Maxima
    nats: np.ndarray
    relative_se: np.ndarray
    nats_of_ball: np.ndarray
    relative_se_of_ball: np.ndarray
    khats: np.ndarray

    def memberships(self, x: Tensor) -> Tensor:
        """To which maximum a point belongs: probabilities, shape (points, K)."""
        return _memberships(self.maxima, self.maxima.squared_distances(x))

    def in_balls(self, x: Tensor) -> Tensor:
        """Whether a point is in the ball of its maximum, shape (points, K)."""
        squared = self.maxima.squared_distances(x)
        return _in_balls(squared, _memberships(self.maxima, squared), x.shape[-1])


def weigh(log_density: LogProb, maxima: Maxima, num_draws: int) -> Masses:
    r"""The mass of every mode.

    The draws come from all modes alike, as from the mixture :math:`q = \frac1K \sum_k t_k` of Student-t distributions with
    D + 4 degrees of freedom, whose scales are those of the inverse Hessians. With the probability :math:`r_k(x)` that x belongs
    to mode k, the mass of it is the mean of :math:`r_k p / q`. Where the weights of a mode have a heavy tail, its Gaussian takes
    the moments of its weighted draws, and there are new draws.

    Arguments:
        log_density: The target; NaN, which weighs nothing, where it has no value.
        maxima: The modes.
        num_draws: The number of draws, at least 64 from each.
    """
    masses, x, ratios = _weigh(log_density, maxima, num_draws)
    heavy = torch.as_tensor(~(masses.khats < GOOD_KHAT), device=x.device)
    if not bool(heavy.any()):
        return masses
    matched = _moment_matched(maxima, x, ratios, heavy)
    again = _weigh(log_density, matched, num_draws)[0]
    return again if np.nanmax(again.khats) < np.nanmax(masses.khats) else masses


def _weigh(log_density: LogProb, maxima: Maxima, num_draws: int) -> tuple[Masses, Tensor, Tensor]:
    count, dim = maxima.points.shape
    each = max(MIN_DRAWS_OF_A_MODE, num_draws // count)
    noise = torch.randn(count, each, dim, dtype=maxima.points.dtype, device=maxima.points.device)
    freedom = float(dim + 4)
    chi = torch.distributions.Chi2(torch.full((), freedom, dtype=noise.dtype, device=noise.device))
    radii = (freedom / chi.sample((count, each, 1))).sqrt()
    x = (maxima.points.unsqueeze(1) + (noise * radii) @ maxima.scale_trils.mT).reshape(-1, dim)
    with torch.no_grad():
        log_p = log_density(x)
    squared = maxima.squared_distances(x)
    log_dets = maxima.scale_trils.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constant = math.lgamma((freedom + dim) / 2) - math.lgamma(freedom / 2) - dim / 2 * math.log(freedom * math.pi)
    log_t = constant - log_dets - (freedom + dim) / 2 * torch.log1p(squared / freedom)
    ratios = (log_p - log_t.logsumexp(-1) + math.log(count)).nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    memberships = _memberships(maxima, squared)
    nats, relative_se = log_means(ratios, memberships)
    in_balls = log_means(ratios, _in_balls(squared, memberships, dim).double())
    khats = np.array([_khat(part) for part in ratios.reshape(count, each).cpu().numpy()])
    return Masses(maxima, nats, relative_se, *in_balls, khats), x, ratios


def log_means(log_weights: Tensor, fractions: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The log of the mean of weights times each column of fractions, and its relative standard error."""
    largest = log_weights.max()
    if not bool(largest.isfinite()):
        nothing = np.full(fractions.shape[-1], -np.inf)
        return nothing, np.full_like(nothing, np.nan)
    terms = (log_weights - largest).exp().unsqueeze(-1) * fractions
    means, sds = terms.mean(0).cpu().numpy(), terms.std(0).cpu().numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(means) + float(largest), sds / means / len(terms) ** 0.5


def _memberships(maxima: Maxima, squared: Tensor) -> Tensor:
    freedom = maxima.points.shape[-1] + 4
    dim = maxima.points.shape[-1]
    # The masses by Laplace times the densities: the determinants cancel.
    return (maxima.values - (freedom + dim) / 2 * torch.log1p(squared / freedom)).softmax(-1)


def _in_balls(squared: Tensor, memberships: Tensor, dim: int) -> Tensor:
    # The squared distance of a normal draw has mean D and variance 2 D.
    return (squared < dim + 3 * (2 * dim) ** 0.5) & (memberships > 0.5)


def _khat(log_ratios: np.ndarray) -> float:
    finite = np.isfinite(log_ratios)
    if finite.sum() < MIN_DRAWS_OF_A_MODE // 2:
        return math.inf
    if np.ptp(log_ratios[finite]) < 1e-9:
        return -math.inf
    return float(psis(log_ratios)[1])


def _moment_matched(maxima: Maxima, x: Tensor, ratios: Tensor, chosen: Tensor) -> Maxima:
    """The maxima with means and covariances of weighted draws for some of them."""
    weights = (ratios - ratios.max()).exp().unsqueeze(-1) * _memberships(maxima, maxima.squared_distances(x))
    points, scale_trils = maxima.points.clone(), maxima.scale_trils.clone()
    dim = points.shape[-1]
    for index in chosen.nonzero().squeeze(-1).tolist():
        # No single draw decides: none weighs more than the mean of ten.
        own = weights[:, index]
        own = own.clamp(max=float(own.sort(descending=True).values[:10].mean()))
        own = own / own.sum()
        if not bool(own.isfinite().all()) or float(1 / own.square().sum()) < 2 * dim + 10:
            continue
        mean = own @ x
        covariance = (own.unsqueeze(-1) * (x - mean)).mT @ (x - mean)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if not int(failed):
            points[index], scale_trils[index] = mean, factor
    return replace(maxima, points=points, scale_trils=scale_trils)


# --- beside a guide ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The masses of modes beside what a guide has drawn; every array has shape (K,).

    Attributes:
        masses: Those by the modes' own draws.
        nats: The log of the mass of each, by those draws or the guide's.
        mass_se: The standard error of its fraction of the mass.
        shares: The fraction of the guide's draws that belong to each; NaN without a guide.
        is_lost: Whether the guide misses it.
    """

    masses: Masses
    nats: np.ndarray
    mass_se: np.ndarray
    shares: np.ndarray
    is_lost: np.ndarray

    @property
    def mass(self) -> np.ndarray:
        """The fraction of the mass that belongs to each."""
        return np.exp(self.nats - np.logaddexp.reduce(self.nats))

    @classmethod
    def of(cls, masses: Masses, nats: np.ndarray, relative_se: np.ndarray, **others: np.ndarray) -> Comparison:
        """The standard errors of the fractions are those of independent masses."""
        mass = np.exp(nats - np.logaddexp.reduce(nats))
        each = mass * np.nan_to_num(relative_se)
        others_se = np.sqrt(np.maximum((each**2).sum() - each**2, 0.0))
        mass_se = np.hypot((1 - mass) * each, mass * others_se)
        return cls(masses, nats, mass_se, **others)

    @classmethod
    def without_guide(cls, masses: Masses) -> Comparison:
        """The masses alone."""
        nothing = np.full(len(masses.nats), np.nan)
        return cls.of(masses, masses.nats, masses.relative_se, shares=nothing, is_lost=np.zeros(len(nothing), bool))


def compare(masses: Masses, drawn: Tensor, log_weights: Tensor, khat: float) -> Comparison:
    """Which modes the draws of a guide miss.

    A mode is lost if it has a mass of its own, the guide has drawn less than half of it, and neither do the weights of the draws
    make up for it: in the ball around the mode they add up to less than half of the mass that is there by the mode's own draws.
    The mass of a lost mode is that by its own draws; of any other it is the one with the smaller k-hat.

    Arguments:
        masses: The masses of the modes.
        drawn: The draws of the guide, shape (S, D).
        log_weights: log p − log q of each, shape (S,).
        khat: The Pareto shape of these weights; NaN where they are constant.
    """
    log_weights = log_weights.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    memberships = masses.memberships(drawn)
    shares = memberships.mean(0).cpu().numpy()
    nats, relative_se = log_means(log_weights, memberships)
    nats_of_ball, se_of_ball = log_means(log_weights, masses.in_balls(drawn).double())
    total = np.logaddexp.reduce(nats)
    own, own_ball = np.exp(masses.nats - total), np.exp(masses.nats_of_ball - total)
    there = own_ball * np.maximum(0, 1 - 2 * np.nan_to_num(masses.relative_se_of_ball, nan=1.0))
    weighted = np.exp(nats_of_ball - total) * (1 + 2 * np.nan_to_num(se_of_ball))
    is_lost = (
        (shares < LOST * own / (1 + own))
        & (weighted < LOST * there)
        & (there / (1 + there) > MIN_MASS)
        & (masses.relative_se_of_ball < MIN_ESS**-0.5)
    )
    by_own = is_lost | (masses.khats < (-math.inf if math.isnan(khat) else khat))
    return Comparison.of(
        masses,
        np.where(by_own, masses.nats, nats),
        np.where(by_own, masses.relative_se, relative_se),
        shares=shares,
        is_lost=is_lost,
    )
