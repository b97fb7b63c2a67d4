r"""The Gaussian found before training, which a flow guide starts from.

A flow starts at N(0, I), whatever the posterior; an affine map that is close to the posterior's location and covariance
spares it what it is worst at. The map is held fixed while the flow trains, and is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# log p and its gradient at each row of a batch of points.
LogDensityAndScore = Callable[[Tensor], tuple[Tensor, Tensor]]

NUM_UPDATES = 150
NUM_ELBO_DRAWS = 1000


def batch_and_match(
    log_density_and_score: LogDensityAndScore, loc: Tensor, scale_tril: Tensor, num_updates: int = NUM_UPDATES
) -> tuple[Tensor, Tensor]:
    r"""The Gaussian whose scores match those of the target, by closed-form updates without a learning rate.

    Each update draws a batch from the current :math:`N(\mu, \Sigma)`, takes the scores :math:`g` of the target there, and
    solves for the Gaussian that matches them, regularised towards the current one with weight 1/λ:

    .. math::
        \Sigma' U \Sigma' + \Sigma' = V, \qquad
        \mu' = \frac{\mu + \lambda (\Sigma' \bar g + \bar z)}{1 + \lambda},

    with :math:`U = \lambda \mathrm{Cov}(g) + \frac{\lambda}{1+\lambda} \bar g \bar g^\top` and
    :math:`V = \Sigma + \lambda \mathrm{Cov}(z) + \frac{\lambda}{1+\lambda} (\mu - \bar z)(\mu - \bar z)^\top`. Cai et al.
    (2024), *Batch and match: black-box variational inference with a score-based divergence*, arXiv:2402.14758.

    Draws with a non-finite score are left out; where fewer than half remain the covariance is divided by 4 instead, so that a
    start that is too wide recovers. Cost: ``num_updates`` batches of max(32, 2D) gradients and O(D³) each.

    Arguments:
        log_density_and_score: The target, in float64.
        loc: The mean to start from, shape (D,), float64.
        scale_tril: The Cholesky factor of the covariance to start from, shape (D, D), float64.
        num_updates: The number of updates.

    Returns:
        The mean and the Cholesky factor of the covariance.
    """
    dim = len(loc)
    batch_size = max(32, 2 * dim)
    identity = torch.eye(dim, dtype=loc.dtype, device=loc.device)
    for update in range(num_updates):
        points = loc + torch.randn(batch_size, dim, dtype=loc.dtype, device=loc.device) @ scale_tril.mT
        scores = log_density_and_score(points)[1]
        finite = scores.isfinite().all(-1)
        if 2 * int(finite.sum()) < batch_size:
            scale_tril = scale_tril / 2
            continue
        points, scores = points[finite], scores[finite]
        weight = batch_size * dim / (update + 1)
        shrunk = weight / (1 + weight)
        mean_point, mean_score = points.mean(0), scores.mean(0)
        u = weight * torch.cov(scores.mT, correction=0).reshape(dim, dim) + shrunk * torch.outer(mean_score, mean_score)
        offset = loc - mean_point
        v = (
            scale_tril @ scale_tril.mT
            + weight * torch.cov(points.mT, correction=0).reshape(dim, dim)
            + shrunk * torch.outer(offset, offset)
        )
        # Σ' = 2 L (I + (I + 4 LᵀUL)^½)⁻¹ Lᵀ with V = LLᵀ: symmetric at every step, unlike the square root of I + 4UV.
        factor, failed = torch.linalg.cholesky_ex(v)
        values, vectors = torch.linalg.eigh(identity + 4 * factor.mT @ u @ factor)
        half = factor @ vectors * (2 / (1 + values.clamp(min=1.0).sqrt())).sqrt()
        covariance = half @ half.mT
        new_scale_tril, also_failed = torch.linalg.cholesky_ex(covariance)
        new_loc = (loc + weight * (covariance @ mean_score + mean_point)) / (1 + weight)
        if int(failed) or int(also_failed) or not bool(new_loc.isfinite().all()):
            scale_tril = scale_tril / 2
            continue
        loc, scale_tril = new_loc, new_scale_tril
    return loc, scale_tril


def gaussian_elbo(log_density_and_score: LogDensityAndScore, loc: Tensor, scale_tril: Tensor) -> float:
    """The ELBO of a Gaussian from 1000 draws; −inf where a draw has no density."""
    noise = torch.randn(NUM_ELBO_DRAWS, len(loc), dtype=loc.dtype, device=loc.device)
    log_p = log_density_and_score(loc + noise @ scale_tril.mT)[0]
    # Draw by draw, so that the noise of the two densities cancels where they agree.
    log_q = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1) - scale_tril.diagonal().log().sum()
    elbo = float((log_p - log_q).mean())
    return -math.inf if math.isnan(elbo) else elbo
