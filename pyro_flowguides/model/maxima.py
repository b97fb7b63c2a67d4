"""The maxima of a model without a guide: the coordinates of the search, its first starts, and the Gaussians that it finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.linalg import solve_triangular

from . import mode_search
from .call import ModelCall
from .latents import Latents
from .missing import FillMissing
from .mode_search import Maxima, Metered
from .sites import quiet_trace
from .target import ERRORS_OF_MODELS, LogProb, Target

# Draws of the prior: starts, and the scale of the search where there is no guide.
NUM_PRIOR_DRAWS = 16
# More latents have a matrix of curvature that is too large.
MAX_DIM = 1000


@dataclass(frozen=True)
class Coordinates:
    """Coordinates in which 1 is a sensible distance, float64.

    Attributes:
        loc: The origin, shape (D,).
        scale_tril: What stands for 1, shape (D, D), lower triangular.
    """

    loc: Tensor
    scale_tril: Tensor

    @property
    def log_det(self) -> Tensor:
        """The log of the volume of a unit cube."""
        return self.scale_tril.diagonal().log().sum()

    def standard(self, x: Tensor) -> Tensor:
        """Points in these coordinates."""
        return solve_triangular(self.scale_tril, (x - self.loc).mT, upper=False).mT

    def original(self, z: Tensor) -> Tensor:
        """Points in unconstrained space."""
        return self.loc + z @ self.scale_tril.mT

    def log_density(self, log_prob: LogProb) -> LogProb:
        """log p at points in these coordinates, without the volume."""
        return lambda z: log_prob(self.original(z))


def prior_draws(call: ModelCall, latents: Latents, number: int = NUM_PRIOR_DRAWS) -> Tensor:
    """Up to so many draws of the prior, float64; a flat one has none."""
    rows = []
    model = FillMissing()(call.without_initial_values.model)
    with quiet_trace():
        for _ in range(number):
            try:
                rows.append(latents.pack(poutine.trace(model).get_trace(*call.args, **call.kwargs)))
            except ERRORS_OF_MODELS:
                break
    init = latents.init_loc
    drawn = torch.stack(rows).double() if rows else init.new_zeros(0, len(init)).double()
    return drawn[drawn.isfinite().all(-1)]


def coordinates(points: Tensor, init: Tensor, *, full: bool) -> Coordinates:
    """The location and scale of points; around ``init`` where they are too few.

    Arguments:
        points: Draws, shape (S, D), float64.
        init: Where to begin otherwise.
        full: Whether their correlations count, where they are enough for that.
    """
    init = init.double()
    if len(points) < 2:
        return Coordinates(init, torch.eye(len(init)).to(init))
    sds = points.std(0)
    sds = torch.where(sds > 1e-6, sds, 1.0)
    if full and len(points) > 2 * len(init):
        factor, failed = torch.linalg.cholesky_ex(torch.cov(points.mT).reshape(len(init), -1))
        if not int(failed):
            return Coordinates(points.mean(0), factor)
    return Coordinates(points.mean(0), sds.diag())


def first_starts(prior: Tensor, num_starts: int, within: Coordinates) -> Tensor:
    """Draws of the prior, inflated normal draws and uniform ones in standard coordinates, from the inside to the outside."""
    like: Any = {"dim": len(within.loc), "dtype": within.loc.dtype, "device": within.loc.device}
    from_prior = prior[: num_starts // 4]
    rest = num_starts - len(from_prior)
    starts = torch.cat(
        [
            within.standard(from_prior),
            mode_search.inflated(rest - rest // 2, **like),
            mode_search.uniform(rest // 2, **like),
        ]
    )
    # Where the model raises far outside, it is a part of the batch.
    return starts[starts.norm(dim=-1).argsort()]


def rounding(latents: Latents) -> float:
    """The relative rounding error of log p."""
    return 4 * float(torch.finfo(latents.init_loc.dtype).eps)


def find_maxima(target: Target, num_starts: int) -> tuple[Maxima, Tensor]:
    """The maxima with at least a hundredth of the mass of the heaviest by Laplace's method, in unconstrained space.

    Arguments:
        target: The log density of the model.
        num_starts: The number of starts of a batch; there are at least two batches.

    Returns:
        The maxima, the heaviest first, and the log of the mass of each.

    Raises:
        ValueError: if there are more than 1000 latents.
    """
    latents = target.latents
    if latents.dim > MAX_DIM:
        raise ValueError(f"modes are looked for among at most {MAX_DIM} latents, here are {latents.dim}")
    prior = prior_draws(target.call, latents)
    within = coordinates(prior, latents.init_loc, full=False)
    log_density = Metered(within.log_density(target.log_prob))
    starts = first_starts(prior, num_starts, within)
    found = mode_search.search(log_density, starts, min_batches=2, rounding=rounding(latents))[0].with_mass()
    found = Maxima(
        within.original(found.points),
        found.values,
        within.scale_tril @ found.scale_trils,
        found.definite,
        found.counts,
    )
    nats = found.nats_of_mass()
    order = nats.argsort(descending=True, stable=True)
    return found[order], nats[order]


def local(log_density: LogProb, locs: Tensor, scales: Tensor, nats: Tensor, index: int) -> LogProb:
    r"""The part of a density that belongs to one of several Gaussians.

    .. math:: \log p_k(x) = \log p(x) + \log \frac{m_k N_k(x)}{\sum_j m_j N_j(x)}

    with the mass m of each Gaussian N: another Gaussian that is fitted to it stays there.

    Arguments:
        log_density: The density.
        locs: The means, shape (K, D).
        scales: Cholesky factors of the covariances, shape (K, D, D), or standard deviations, shape (K, D).
        nats: The log of the mass of each, shape (K,).
        index: Which of them.
    """
    diagonal = scales.dim() == 2
    log_dets = (scales if diagonal else scales.diagonal(dim1=-2, dim2=-1)).log().sum(-1)

    def log_prob(x: Tensor) -> Tensor:
        offsets = x - locs.unsqueeze(1)
        noise = (offsets / scales.unsqueeze(1)).mT if diagonal else solve_triangular(scales, offsets.mT, upper=False)
        joint = (nats - log_dets).unsqueeze(-1) - noise.square().sum(-2) / 2
        return log_density(x) + joint.log_softmax(0)[index]

    return log_prob
