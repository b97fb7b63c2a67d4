r"""The mass of every mode, and which of the modes a guide misses.

Everything here is in coordinates in which 1 is a sensible distance, and in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..model.mode_search import MIN_MASS, Maxima
from ..model.target import LogProb
from .importance import psis

MIN_DRAWS_OF_A_MODE = 64
# Modes with fewer effective draws have no mass that could be relied on.
MIN_ESS = 10
# A mode is lost where the guide draws less than this fraction of its mass.
LOST = 0.5
# Draws of the guide that climb.
NUM_CLIMBERS = 32
# The worst shape of weights at which a Gaussian is left as it is.
GOOD_KHAT = 0.7


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
        points: The draws, as many from each, shape (S, D).
        log_weights: log p − log q of each, −inf where there is no density, shape (S,).
    """

    maxima: Maxima
    nats: np.ndarray
    relative_se: np.ndarray
    nats_of_ball: np.ndarray
    relative_se_of_ball: np.ndarray
    khats: np.ndarray
    points: Tensor
    log_weights: Tensor

    def memberships(self, x: Tensor) -> Tensor:
        """To which maximum a point belongs: probabilities, shape (points, K)."""
        return _memberships(self.maxima, self.maxima.squared_distances(x))

    def weights(self) -> Tensor:
        """How much each of the draws counts for each mode, not normalised, shape (S, K)."""
        largest = self.log_weights.max()
        return (self.log_weights - largest).exp().unsqueeze(-1) * self.memberships(self.points)

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
        num_draws: The number of draws, the same from each.
    """
    masses = _weigh(log_density, maxima, num_draws)
    heavy = torch.as_tensor(~(masses.khats < GOOD_KHAT), device=masses.points.device)
    if not bool(heavy.any()):
        return masses
    matched = _moment_matched(masses, heavy)
    again = _weigh(log_density, matched, num_draws)
    return again if np.nanmax(again.khats) < np.nanmax(masses.khats) else masses


def _weigh(log_density: LogProb, maxima: Maxima, num_draws: int) -> Masses:
    count, dim = maxima.points.shape
    each = num_draws // count
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
    return Masses(maxima, nats, relative_se, *in_balls, khats, x, ratios)


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


def _moment_matched(masses: Masses, chosen: Tensor) -> Maxima:
    """The maxima with means and covariances of weighted draws for some of them."""
    maxima, x, weights = masses.maxima, masses.points, masses.weights()
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


def compare(
    masses: Masses, drawn: Tensor, log_weights: Tensor, khat: float, climb: Callable[[Tensor], Tensor]
) -> Comparison:
    """Which modes the draws of a guide miss.

    A mode is lost if all of this holds; a mode that is missed is less of an evil than one that is not there.

    - Its Hessian is definite, and its own draws find a hundredth of the mass in the ball around it, twice the standard error
      taken off.
    - The guide has drawn less than half of it.
    - The weights of the draws do not make up for that: in the ball they add up to less than half of the mass that is there.
    - Draws that climb do not come to it. What a guide misses on a slope, such as the neck of a funnel, is no other mode.

    The mass of a lost mode is that by its own draws; of any other it is the one with the smaller k-hat.

    Arguments:
        masses: The masses of the modes.
        drawn: The draws of the guide, shape (S, D).
        log_weights: log p − log q of each, shape (S,).
        khat: The Pareto shape of these weights; NaN where they are constant.
        climb: The points where ascents end, for those where they start; called only if a mode looks lost.
    """
    log_weights = log_weights.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
    memberships = masses.memberships(drawn)
    shares = memberships.mean(0).cpu().numpy()
    nats, relative_se = log_means(log_weights, memberships)
    nats_of_ball, se_of_ball = log_means(log_weights, masses.in_balls(drawn).double())
    # A mass that is estimated from too few draws is nearly always too small.
    total = np.logaddexp.reduce(np.maximum(nats, masses.nats))
    own, own_ball = np.exp(masses.nats - total), np.exp(masses.nats_of_ball - total)
    there = own_ball * np.maximum(0, 1 - 2 * np.nan_to_num(masses.relative_se_of_ball, nan=1.0))
    weighted = np.exp(nats_of_ball - total) * (1 + 2 * np.nan_to_num(se_of_ball))
    is_lost = (
        masses.maxima.definite.cpu().numpy()
        & (shares < LOST * own)
        & (weighted < LOST * there)
        & (there > MIN_MASS)
        & (masses.relative_se_of_ball < MIN_ESS**-0.5)
    )
    if is_lost.any():
        is_lost &= masses.memberships(climb(drawn[:NUM_CLIMBERS])).mean(0).cpu().numpy() < LOST * own
    by_own = is_lost | (masses.khats < (-math.inf if math.isnan(khat) else khat))
    return Comparison.of(
        masses,
        np.where(by_own, masses.nats, nats),
        np.where(by_own, masses.relative_se, relative_se),
        shares=shares,
        is_lost=is_lost,
    )
