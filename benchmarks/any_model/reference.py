"""Means and standard deviations of the posteriors, by quadrature or by Pyro's NUTS, in float64.

In up to five dimensions the posterior is summed over a grid in the unconstrained space of the model vectorised by hand (for
discrete latents: with the sum over their values), which gives log Z too. The error of the trapezoidal rule falls exponentially
with the spacing of the grid; what every second point alone gives is reported beside it. In more dimensions Pyro's NUTS samples
the model as it is written; it enumerates discrete latents. Chains are added until every scalar has an effective sample size of
4000, so that the Monte-Carlo error of a mean is below 0.016 sd.
"""

from __future__ import annotations

import time
from typing import Any

import arviz as az
import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from torch import Tensor
from torch.distributions import biject_to

from pyro_flowguides.model.sites import is_subsample

from .problem import Problem

# The grid of each dimension: its width on either side, and the distance of its points, in standard deviations.
GRIDS = {1: (14.0, 0.02), 2: (14.0, 0.2), 3: (14.0, 0.45), 4: (11.0, 0.75), 5: (8.0, 0.85)}
MAX_EDGE_MASS = 1e-4
NUM_ROWS = 20_000
# Entries of a site that are constant, such as those above the diagonal of a Cholesky factor, have no error.
SMALLEST_SD = 1e-6
NUM_CHAINS, MAX_CHAINS, NUM_WARM_UP, NUM_DRAWS, ENOUGH = 4, 16, 500, 1500, 4000


def reference(problem: Problem) -> dict[str, Any]:
    """The mean and the standard deviation of every latent, with how they were found."""
    began = time.perf_counter()
    density = Density(problem)
    found = quadrature(density) if density.dim in GRIDS else nuts(problem)
    return {**found, "seconds": time.perf_counter() - began}


# --- quadrature ------------------------------------------------------------------------------------------------------------


class Density:
    """The log joint density of the model vectorised by hand, at many unconstrained points.

    Arguments:
        problem: The model.
    """

    def __init__(self, problem: Problem) -> None:
        self.model, self.arguments = problem.vectorized()
        trace = poutine.trace(self.model).get_trace(*self.arguments)
        sites = [site for site in trace.nodes.values() if site["type"] == "sample" and not is_subsample(site)]
        frames = [frame for site in sites for frame in site["cond_indep_stack"] if frame.vectorized]
        self.nesting = max([0, *[-frame.dim for frame in frames]])
        self.sites = [site for site in sites if not site["is_observed"]]
        self.transforms = [biject_to(site["fn"].support) for site in self.sites]
        self.sizes = [
            transform.inv(site["value"]).numel() for transform, site in zip(self.transforms, self.sites, strict=True)
        ]
        self.dim = sum(self.sizes)

    def values(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The values of the sites, ``(rows,) + batch shape + event shape``, and the log-determinant, ``(rows,)``."""
        values, log_det = {}, torch.zeros(len(x))
        parts = x.split(self.sizes, -1)
        for site, transform, part in zip(self.sites, self.transforms, parts, strict=True):
            batch = [1] * (self.nesting - len(site["fn"].batch_shape)) + list(site["fn"].batch_shape)
            shape = transform.inv(site["value"]).shape[len(site["fn"].batch_shape) :]
            unconstrained = part.reshape(len(x), *batch, *shape)
            value = transform(unconstrained)
            log_det = log_det + transform.log_abs_det_jacobian(unconstrained, value).reshape(len(x), -1).sum(-1)
            values[site["name"]] = value
        return values, log_det

    def __call__(self, x: Tensor) -> Tensor:
        values, log_det = self.values(x)
        with pyro.plate("rows", len(x), dim=-1 - self.nesting):
            trace = poutine.trace(poutine.condition(self.model, data=values)).get_trace(*self.arguments)
        trace.compute_log_prob()
        terms = [site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample"]
        return log_det + sum(term.expand(len(x), *term.shape[1:]).reshape(len(x), -1).sum(-1) for term in terms)


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
    moments = _moments(values, log_weight.softmax(0))
    coarse = _moments({name: value[second] for name, value in values.items()}, log_weight[second].softmax(0))
    return {
        "kind": "quadrature",
        "log_z": float(log_weight.logsumexp(0)),
        "points": len(points),
        "edge_mass": outside,
        "mean_error_of_half": _largest_difference(moments, coarse),
        **moments,
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


def _moments(values: dict[str, Tensor], weight: Tensor) -> dict[str, dict[str, list[float]]]:
    means = {name: weight @ value for name, value in values.items()}
    return {
        "mean": {name: mean.tolist() for name, mean in means.items()},
        "sd": {name: (weight @ (value - means[name]) ** 2).sqrt().tolist() for name, value in values.items()},
    }


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
        ess, rhat = _diagnostics(chains)
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
        **_moments(pooled, torch.full((number,), 1 / number)),
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


def _diagnostics(chains: list[dict[str, np.ndarray]]) -> tuple[float, float]:
    """The smallest effective sample size, of means and of spreads, and the largest R-hat."""
    data = az.from_dict({name: np.stack([chain[name] for chain in chains]) for name in chains[0]})
    found = [az.ess(data, method="bulk"), az.ess(data, method="sd")]
    smallest = min(float(each[name].min(skipna=True)) for each in found for name in each.data_vars)
    rhats = az.rhat(data)
    return smallest, max(float(rhats[name].max(skipna=True)) for name in rhats.data_vars)
