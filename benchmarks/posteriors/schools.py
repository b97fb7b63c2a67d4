r"""Eight schools (Rubin 1981), with exact answers.

Given τ everything is normal, so that moments, draws and evidence are integrals over τ alone, with
:math:`p(y \mid \tau) = N(y;\, 0,\, \mathrm{diag}(\sigma^2 + \tau^2) + 25\, 1 1^\top)`. The trapezoidal rule in log τ computes
them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.special import logsumexp, softmax
from torch import Tensor

from .known import Reference

_LOG_TAU, _STEP = np.linspace(-20.0, 9.0, 8001, retstep=True)
_PRIOR_SD, _PRIOR_SCALE = 5.0, 5.0


# --- models ------------------------------------------------------------------------------------------------------------


def _population(y: Tensor) -> tuple[Tensor, Tensor]:
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), _PRIOR_SD))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(_PRIOR_SCALE)))
    return mu.unsqueeze(-1), tau.unsqueeze(-1)


def centered(y: Tensor, sigma: Tensor) -> None:
    """θ_j ~ N(μ, τ): a funnel."""
    mu, tau = _population(y)
    theta = pyro.sample("theta", dist.Normal(mu, tau).expand(mu.shape[:-1] + y.shape).to_event(1))
    pyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)


def noncentered(y: Tensor, sigma: Tensor) -> None:
    """θ = μ + τ θ̃."""
    mu, tau = _population(y)
    deviation = pyro.sample("theta_tilde", dist.Normal(torch.zeros_like(y), 1.0).to_event(1))
    theta = pyro.deterministic("theta", mu + tau * deviation, event_dim=1)
    pyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)


def noncentered_latents(reference: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, Tensor]:
    mu, tau, theta = reference["mu"], reference["tau"], reference["theta"]
    return {"mu": mu, "tau": tau, "theta_tilde": (theta - mu.unsqueeze(-1)) / tau.unsqueeze(-1)}


# --- exact answers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _GivenTau:
    """The posterior at every τ of the grid.

    Attributes:
        log_weight: The log-density of y and log τ.
        mu_mean: The mean of μ.
        mu_sd: Its standard deviation.
        shrinkage: The weight of μ in the mean of each θ_j given μ; the rest is the weight of y_j.
        theta_sd: The standard deviation of each θ_j given μ.
    """

    log_weight: np.ndarray
    mu_mean: np.ndarray
    mu_sd: np.ndarray
    shrinkage: np.ndarray
    theta_sd: np.ndarray


def _given_tau(y: np.ndarray, sigma: np.ndarray) -> _GivenTau:
    tau = np.exp(_LOG_TAU)[:, None]
    variance = sigma**2 + tau**2
    mu_precision = 1 / _PRIOR_SD**2 + (1 / variance).sum(-1)
    mu_mean = (y / variance).sum(-1) / mu_precision
    # The determinant and the inverse of a diagonal matrix plus 25 times ones.
    log_likelihood = -0.5 * (
        (y**2 / variance + np.log(2 * np.pi * variance)).sum(-1)
        - mu_mean**2 * mu_precision
        + np.log(mu_precision * _PRIOR_SD**2)
    )
    log_prior = np.log(2 / (np.pi * _PRIOR_SCALE)) - np.log1p((tau[:, 0] / _PRIOR_SCALE) ** 2)
    return _GivenTau(
        log_weight=log_likelihood + log_prior + _LOG_TAU,
        mu_mean=mu_mean,
        mu_sd=mu_precision**-0.5,
        shrinkage=sigma**2 / variance,
        theta_sd=sigma * tau / variance**0.5,
    )


def log_evidence(y: Tensor, sigma: Tensor) -> float:
    return float(logsumexp(_given_tau(y.cpu().numpy(), sigma.cpu().numpy()).log_weight) + np.log(_STEP))


def exact_reference(y: np.ndarray, sigma: np.ndarray, num_draws: int) -> Reference:
    """Independent draws, with the exact moments instead of the moments of the draws."""
    given = _given_tau(y, sigma)
    weight, tau = softmax(given.log_weight), np.exp(_LOG_TAU)
    names = ("mu", "tau", *(f"theta[{j}]" for j in range(1, 1 + len(y))))
    # Means and variances of every scalar at every τ, and of their mixture.
    means = np.column_stack([given.mu_mean, tau, given.shrinkage * given.mu_mean[:, None] + (1 - given.shrinkage) * y])
    theta_variance = given.theta_sd**2 + (given.shrinkage * given.mu_sd[:, None]) ** 2
    variances = np.column_stack([given.mu_sd**2, np.zeros_like(tau), theta_variance])
    mean = weight @ means
    sd = (weight @ (variances + (means - mean) ** 2)) ** 0.5

    rng = np.random.default_rng(0)
    node = rng.choice(len(weight), size=num_draws, p=weight)
    # Uniform within the cell of the node, where the rule treats the density as constant.
    tau = np.exp(_LOG_TAU[node] + _STEP * (rng.random(num_draws) - 0.5))
    mu = given.mu_mean[node] + given.mu_sd[node] * rng.standard_normal(num_draws)
    shrinkage = given.shrinkage[node]
    theta = shrinkage * mu[:, None] + (1 - shrinkage) * y
    theta += given.theta_sd[node] * rng.standard_normal(theta.shape)
    return Reference(names, np.column_stack([mu, tau, theta]), mean, sd)
