r"""A check of a model against its reference draws, by Stein's identity.

For a density p on ℝ^D that vanishes at infinity, with the score :math:`s = \nabla \log p`,

.. math:: E_p[s] = 0, \qquad E_p[s\, x^\top] = -I.

Averages over the reference draws, mapped to unconstrained space, therefore reveal a wrong model, for example a missing prior,
before any fit is judged. (The first identity alone would accept p² as p.) Both averages are taken in the coordinates that
whiten the draws, where all statistics have the same scale. Stein (1972), *A bound for the error in the normal approximation to
the distribution of a sum of dependent random variables*.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from .known import KnownPosterior

# Batches of this number are long enough for the autocorrelation of thinned chains. The number is the degrees of freedom of the
# standard errors.
NUM_BATCHES = 200
# The probability of rejecting a right model.
SIGNIFICANCE = 1e-3
MAX_DRAWS, CHUNK = 10_000, 1000


@dataclass(frozen=True)
class Check:
    """The result of :func:`check`.

    Attributes:
        num_draws: The number of reference draws that were used.
        dim: The size D of unconstrained space.
        worst_mean: The largest |z| among the D statistics of E[s] = 0.
        worst_product: The largest |z| among the D² statistics of E[s xᵀ] = −I.
        bound: For a right model the largest |z| exceeds this bound once in a thousand times.
        worst_alone: The largest difference between log p of a draw in a batch and log p of the same draw alone, in nats.
    """

    num_draws: int
    dim: int
    worst_mean: float
    worst_product: float
    bound: float
    worst_alone: float

    @property
    def passed(self) -> bool:
        return max(self.worst_mean, self.worst_product) < self.bound and self.worst_alone < 1e-6


def check(posterior: KnownPosterior) -> Check:
    """Compare a model with its reference draws, and its density of a batch of draws with its density of each draw alone.

    Raises:
        ValueError: if the posterior has no draws, or a draw has no finite density or score.
    """
    if posterior.latents is None:
        raise ValueError(f"check: posterior '{posterior.name}' has no draws to compare its model with")
    latents = {name: value[:MAX_DRAWS] for name, value in posterior.latents.items()}
    density, points = unconstrained_density(posterior.model, posterior.args, latents)
    values, scores = log_density_and_score(density, points)
    wrong = ~(values.isfinite() & scores.isfinite().all(-1))
    if wrong.any():
        raise ValueError(
            f"check: '{posterior.name}' has no finite density or score at {int(wrong.sum())} of {len(points)} reference draws; "
            f"the first is draw {int(wrong.int().argmax())}"
        )
    alone = torch.stack([density(point) for point in points[:3]])
    mean, product = stein_statistics(points, scores)
    dim = points.shape[1]
    return Check(
        num_draws=len(points),
        dim=dim,
        worst_mean=float(mean.abs().max()),
        worst_product=float(product.abs().max()),
        bound=NormalDist().inv_cdf(1 - SIGNIFICANCE / 2 / (dim + dim**2)),
        worst_alone=float((alone - values[:3]).abs().max()),
    )


def stein_statistics(points: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The z-scores of E[s] = 0, shape (D,), and of E[s xᵀ] = −I, shape (D, D); points and scores have shape (S, D)."""
    centred = points - points.mean(0)
    factor = torch.linalg.cholesky(torch.cov(points.mT).reshape(points.shape[1], points.shape[1]))
    whitened = torch.linalg.solve_triangular(factor, centred.mT, upper=False).mT
    scores = scores @ factor
    products = scores.unsqueeze(-1) * whitened.unsqueeze(-2) + torch.eye(points.shape[1]).to(points)
    return _z_scores(scores), _z_scores(products)


def _z_scores(series: Tensor) -> Tensor:
    """Means in units of their standard errors, which the means of batches give, so that they include the autocorrelation."""
    usable = len(series) // NUM_BATCHES * NUM_BATCHES
    batches = series[:usable].reshape(NUM_BATCHES, -1, *series.shape[1:]).mean(1)
    return batches.mean(0) / (batches.std(0) / NUM_BATCHES**0.5)


def log_density_and_score(density: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    values, scores = [], []
    for rows in points.split(CHUNK):
        rows = rows.detach().requires_grad_()
        value = density(rows)
        scores.append(torch.autograd.grad(value.sum(), rows)[0])
        values.append(value.detach())
    return torch.cat(values), torch.cat(scores)


def unconstrained_density(
    model: Callable, args: tuple, latents: Mapping[str, Tensor]
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """log p on flat unconstrained space, for any batch of points, and the latents as points there, shape (S, D).

    The model has no plates, so that all dimensions on the left of a site's own are batch dimensions.

    Raises:
        ValueError: if the latents are not the latent sites of the model.
    """
    with torch.no_grad():
        prototype = poutine.trace(model).get_trace(*args)
    sites = {name: prototype.nodes[name] for name in prototype.stochastic_nodes}
    if set(sites) != set(latents):
        raise ValueError(f"the model has the latent sites {sorted(sites)}, but the draws have {sorted(latents)}")
    transforms = {name: biject_to(site["fn"].support) for name, site in sites.items()}
    shapes = {name: transforms[name].inverse_shape(site["value"].shape) for name, site in sites.items()}
    parts = [transforms[name].inv(latents[name]).reshape(-1, shape.numel()) for name, shape in shapes.items()]

    def density(points: Tensor) -> Tensor:
        batch_shape, values, total = points.shape[:-1], {}, 0.0
        flat = points.split([shape.numel() for shape in shapes.values()], -1)
        for (name, shape), part in zip(shapes.items(), flat, strict=True):
            unconstrained = part.reshape(batch_shape + shape)
            values[name] = transforms[name](unconstrained)
            log_det = transforms[name].log_abs_det_jacobian(unconstrained, values[name])
            total = total + log_det.reshape(*batch_shape, -1).sum(-1)
        with pyro.validation_enabled(False):
            trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*args)
            trace.compute_log_prob()
        log_probs = [site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample"]
        return sum(log_probs, start=total)

    return density, torch.cat(parts, -1)
