"""Means and standard deviations of the posteriors, by quadrature, by Hamiltonian Monte Carlo or by Pyro's NUTS, in float64.

In up to five dimensions the posterior is summed over a grid in the unconstrained space of the model vectorised by hand (for
discrete latents: with the sum over their values), which gives log Z too. The error of the trapezoidal rule falls exponentially
with the spacing of the grid; what every second point alone gives is reported beside it. In more dimensions many chains of
Hamiltonian Monte Carlo sample the same density, see ``hmc``. Pyro's NUTS is an independent check: it samples the model as it is
written, and enumerates discrete latents, but takes a quarter of an hour for a model. Its chains are added until every scalar has
an effective sample size of 4000, so that the Monte-Carlo error of a mean is below 0.016 sd.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from .density import SMALLEST_SD, Density, diagnostics, moments
from .hmc import hmc
from .problem import Problem

# The grid of each dimension: its width on either side, and the distance of its points, in standard deviations.
GRIDS = {1: (14.0, 0.02), 2: (14.0, 0.2), 3: (14.0, 0.45), 4: (11.0, 0.75), 5: (8.0, 0.85)}
MAX_EDGE_MASS = 1e-4
NUM_ROWS = 20_000
NUM_CHAINS, MAX_CHAINS, NUM_WARM_UP, NUM_DRAWS, ENOUGH = 4, 16, 500, 1500, 4000


def reference(problem: Problem, by_nuts: bool = False) -> dict[str, Any]:
    """The mean and the standard deviation of every latent, with how they were found.

    Arguments:
        problem: The model.
        by_nuts: Whether Pyro's NUTS samples it where there are too many dimensions for a grid.
    """
    began = time.perf_counter()
    density = Density(problem)
    if density.dim in GRIDS:
        found = quadrature(density)
    elif by_nuts:
        found = nuts(problem)
    else:
        found = hmc(density)
    return {**found, "seconds": time.perf_counter() - began}


# --- quadrature ------------------------------------------------------------------------------------------------------------


def quadrature(density: Density) -> dict[str, Any]:
    """The trapezoidal rule, coarsely around the mode, then around the mean that this gives.

    Raises:
        ValueError: if more than a ten thousandth of the mass lies at the edge of the grid.
    """
    width, spacing = GRIDS[density.dim]
    with pyro.validation_enabled(False):
        center, scale = _mode(density)
        points, log_weight, _, _ = _grid(density, center, scale, width, 2 * spacing)
        weight = log_weight.softmax(0)
        center = weight @ points
        scale = torch.linalg.cholesky((weight[:, None] * (points - center)).T @ (points - center))
        points, log_weight, edge, second = _grid(density, center, scale, width, spacing)
    outside = float(log_weight.softmax(0)[edge].sum())
    if outside > MAX_EDGE_MASS:
        raise ValueError(f"quadrature: a mass of {outside:.1e} lies at the edge of the grid")
    values = {name: value.reshape(len(points), -1) for name, value in density.values(points)[0].items()}
    fine = moments(values, log_weight.softmax(0))
    coarse = moments({name: value[second] for name, value in values.items()}, log_weight[second].softmax(0))
    return {
        "kind": "quadrature",
        "log_z": float(log_weight.logsumexp(0)),
        "points": len(points),
        "edge_mass": outside,
        "mean_error_of_half": _largest_difference(fine, coarse),
        **fine,
    }


def _largest_difference(fine: dict[str, Any], coarse: dict[str, Any]) -> float:
    """The largest difference of two means, in standard deviations."""
    found = 0.0
    for name, sds in fine["sd"].items():
        for first, second, sd in zip(fine["mean"][name], coarse["mean"][name], sds, strict=True):
            found = max(found, abs(first - second) / sd) if sd > SMALLEST_SD else found
    return found


def _mode(density: Density) -> tuple[Tensor, Tensor]:
    x = torch.zeros(1, density.dim, requires_grad=True)
    optimizer = torch.optim.LBFGS([x], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -density(x).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    mode = x.detach()[0]
    precision = torch.autograd.functional.hessian(lambda point: -density(point[None]).sum(), mode)
    return mode, torch.linalg.cholesky(torch.linalg.inv(precision))


@torch.no_grad()
def _grid(
    density: Density, center: Tensor, scale: Tensor, width: float, spacing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points, the logarithms of density times volume, which points lie at the edge, and every second one in every direction."""
    numbers = torch.arange(-round(width / spacing), round(width / spacing) + 1)
    steps = torch.cartesian_prod(*[numbers] * density.dim).reshape(-1, density.dim)
    points = center + spacing * steps.to(center.dtype) @ scale.T
    log_density = torch.cat([density(rows) for rows in points.split(NUM_ROWS)])
    log_volume = density.dim * np.log(spacing) + scale.diagonal().log().sum()
    edge, second = (steps.abs() == numbers[-1]).any(-1), (steps % 2 == 0).all(-1)
    return points, log_density.nan_to_num(nan=-torch.inf) + log_volume, edge, second


# --- NUTS ------------------------------------------------------------------------------------------------------------------


def nuts(problem: Problem) -> dict[str, Any]:
    """Pyro's NUTS of the model as it is written: chains until the worst scalar has enough effective draws."""
    chains: list[dict[str, np.ndarray]] = []
    divergences = 0
    while True:
        samples, diverged = _chain(problem, seed=len(chains))
        chains.append(samples)
        divergences += diverged
        if len(chains) < NUM_CHAINS:
            continue
        ess, rhat = diagnostics({name: np.stack([chain[name] for chain in chains]) for name in chains[0]})
        if ess >= ENOUGH or len(chains) == MAX_CHAINS:
            break
    pooled = {name: torch.as_tensor(np.concatenate([chain[name] for chain in chains])).flatten(1) for name in chains[0]}
    number = NUM_DRAWS * len(chains)
    return {
        "kind": "NUTS",
        "chains": len(chains),
        "draws": number,
        "min_ess": ess,
        "max_rhat": rhat,
        "divergences": divergences,
        **moments(pooled, torch.full((number,), 1 / number)),
    }


def _chain(problem: Problem, seed: int) -> tuple[dict[str, np.ndarray], int]:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, arguments = problem.as_written()
    kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True, target_accept_prob=0.85)
    mcmc = MCMC(kernel, num_samples=NUM_DRAWS, warmup_steps=NUM_WARM_UP, disable_progbar=True)
    mcmc.run(*arguments)
    samples = {name: value.reshape(NUM_DRAWS, -1).numpy() for name, value in mcmc.get_samples().items()}
    return samples, sum(len(each) for each in mcmc.diagnostics()["divergences"].values())
