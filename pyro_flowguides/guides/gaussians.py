"""How well a Gaussian fits: its ELBO, and the spread of log p − log q over its draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..model.target import LogProb
from ..transforms.fixed import Scale, log_det, scaled

NUM_ELBO_DRAWS = 1000


def gaussian_elbo(log_density: LogProb, loc: Tensor, scale: Scale, num_draws: int = NUM_ELBO_DRAWS) -> float:
    """The ELBO of a Gaussian, estimated from draws; −inf where a draw has no density.

    The scale is a Cholesky factor, shape (D, D), standard deviations, shape (D,), or a diagonal with directions.
    """
    elbo = float(_log_ratios(log_density, loc, scale, num_draws).mean())
    return -math.inf if math.isnan(elbo) else elbo


def elbo_and_spread(log_density: LogProb, loc: Tensor, scale: Scale) -> tuple[float, float]:
    """The ELBO of a Gaussian, and the standard deviation of log p − log q over its draws."""
    log_ratios = _log_ratios(log_density, loc, scale, NUM_ELBO_DRAWS)
    elbo, spread = float(log_ratios.mean()), float(log_ratios.std())
    return (-math.inf, math.inf) if math.isnan(elbo) else (elbo, spread)


@torch.no_grad()
def _log_ratios(log_density: LogProb, loc: Tensor, scale: Scale, num_draws: int) -> Tensor:
    noise = torch.randn(num_draws, len(loc), dtype=loc.dtype, device=loc.device)
    log_p = log_density(loc + scaled(scale, noise))
    # Draw by draw, so that the noise of the two densities cancels where they agree.
    log_q = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1) - log_det(scale)
    return log_p - log_q
