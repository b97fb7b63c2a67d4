r"""Targets whose evidence is known: by construction, by quadrature, or by long importance sampling."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.special import logsumexp, softmax
from torch import Tensor

from pyro_flowguides.examples.eight_schools import EFFECTS, STANDARD_ERRORS

from . import schools
from .cox import cox_posterior
from .known import KnownPosterior, Reference, by_site, flat, tensor

NUM_DRAWS = 100_000
FUNNEL_DIMS = (2, 10, 50)
COX_SIDES = (16, 40)
# Importance sampling with 1,200,000 draws of the Gaussian that whitening finds, ± 0.004.
SONAR_LOG_EVIDENCE = -108.387


def targets(sonar: Path | None = None, pines: Path | None = None) -> dict[str, Callable[[], KnownPosterior]]:
    """A function that loads the target, for each target; the logistic regression and the Cox processes need the paths of data."""
    found: dict[str, Callable[[], KnownPosterior]] = {"eight_schools_centered": eight_schools}
    found |= {f"funnel_{dim}": functools.partial(funnel_posterior, dim) for dim in FUNNEL_DIMS}
    found |= {name: functools.partial(planar_posterior, name) for name in ENERGIES}
    if sonar is not None:
        found["sonar"] = functools.partial(sonar_posterior, sonar)
    if pines is not None:
        found |= {f"cox_{side**2}": functools.partial(cox_posterior, pines, side) for side in COX_SIDES}
    return found


# --- centred eight schools ---------------------------------------------------------------------------------------------


def eight_schools() -> KnownPosterior:
    """The centred eight schools, with exact moments instead of moments of reference draws."""
    y, sigma = tensor(EFFECTS), tensor(STANDARD_ERRORS)
    reference = schools.exact_reference(np.array(EFFECTS), np.array(STANDARD_ERRORS), NUM_DRAWS)
    return KnownPosterior(
        "eight_schools_centered",
        schools.centered,
        (y, sigma),
        reference,
        _latents(reference),
        schools.log_evidence(y, sigma),
    )


def _latents(reference: Reference) -> dict[str, Tensor]:
    """The latent sites, for a reference whose scalars are all latents."""
    draws = dict(zip(reference.names, reference.draws.T, strict=True))
    return {name: tensor(value) for name, value in by_site(draws).items()}


# --- Neal's funnel -----------------------------------------------------------------------------------------------------


def funnel(zeros: Tensor) -> None:
    """v ~ N(0, 3), x_i ~ N(0, e^{v/2}) (Neal 2003, *Slice sampling*); there are as many x as zeros."""
    v = pyro.sample("v", dist.Normal(zeros.new_zeros(()), 3.0))
    scale = (v / 2).exp().unsqueeze(-1)
    pyro.sample("x", dist.Normal(zeros.expand(scale.shape[:-1] + zeros.shape), scale).to_event(1))


def funnel_posterior(dim: int) -> KnownPosterior:
    """The funnel, judged on v alone: the tails of x are so heavy that draws do not determine its sd."""
    noise = np.random.default_rng(0).standard_normal((NUM_DRAWS, dim))
    v = 3 * noise[:, 0]
    reference = Reference(("v",), v[:, None], np.zeros(1), np.full(1, 3.0))
    latents = {"v": tensor(v), "x": tensor(np.exp(v / 2)[:, None] * noise[:, 1:])}
    return KnownPosterior(f"funnel_{dim}", funnel, (tensor(np.zeros(dim - 1)),), reference, latents, 0.0)


# --- densities in the plane --------------------------------------------------------------------------------------------

_BOUND, _NUM_CELLS = 4.0, 2000


def _wave(z: Tensor) -> Tensor:
    return torch.sin(math.pi * z[..., 0] / 2)


def _ridges(first: Tensor, first_width: float, second: Tensor, second_width: float) -> Tensor:
    """−log of the sum of two normal kernels."""
    return -torch.logaddexp(-0.5 * (first / first_width) ** 2, -0.5 * (second / second_width) ** 2)


def _ring(z: Tensor) -> Tensor:
    radius = z.square().sum(-1).clamp(min=1e-12).sqrt()
    return 0.5 * ((radius - 2) / 0.4) ** 2 + _ridges(z[..., 0] - 2, 0.6, z[..., 0] + 2, 0.6)


def _one_wave(z: Tensor) -> Tensor:
    return 0.5 * ((z[..., 1] - _wave(z)) / 0.4) ** 2


def _wave_with_loop(z: Tensor) -> Tensor:
    distance = z[..., 1] - _wave(z)
    return _ridges(distance, 0.35, distance + 3 * torch.exp(-0.5 * ((z[..., 0] - 1) / 0.6) ** 2), 0.35)


def _wave_with_step(z: Tensor) -> Tensor:
    distance = z[..., 1] - _wave(z)
    return _ridges(distance, 0.4, distance + 3 * torch.sigmoid((z[..., 0] - 1) / 0.3), 0.35)


# The energies U1 to U4 of Rezende & Mohamed (2015), arXiv:1505.05770, table 1: the density is e^{−U} on [−4, 4]².
ENERGIES: dict[str, Callable[[Tensor], Tensor]] = {
    "U1": _ring,
    "U2": _one_wave,
    "U3": _wave_with_loop,
    "U4": _wave_with_step,
}


def plane(bounds: Tensor, *, energy: Callable[[Tensor], Tensor]) -> None:
    """The density e^{−U}, within the bounds in both directions."""
    z = pyro.sample("z", flat(dist.Uniform(bounds[0], bounds[1]).expand([2]).to_event(1)))
    pyro.factor("energy", -energy(z))


def planar_posterior(name: str) -> KnownPosterior:
    """A density in the plane, with evidence, moments and draws by the midpoint rule."""
    width = 2 * _BOUND / _NUM_CELLS
    axis = np.linspace(-_BOUND + width / 2, _BOUND - width / 2, _NUM_CELLS)
    cells = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    log_density = -ENERGIES[name](torch.as_tensor(cells, device="cpu")).numpy()
    weight = softmax(log_density)
    mean = weight @ cells
    sd = (weight @ (cells - mean) ** 2) ** 0.5
    rng = np.random.default_rng(0)
    cell = rng.choice(len(cells), size=NUM_DRAWS, p=weight)
    reference = Reference(("z[1]", "z[2]"), cells[cell] + width * (rng.random((NUM_DRAWS, 2)) - 0.5), mean, sd)
    return KnownPosterior(
        name,
        functools.partial(plane, energy=ENERGIES[name]),
        (tensor([-_BOUND, _BOUND]),),
        reference,
        _latents(reference),
        float(logsumexp(log_density)) + 2 * math.log(width),
    )


# --- logistic regression -----------------------------------------------------------------------------------------------


def logistic_regression(x: Tensor, y: Tensor) -> None:
    """β ~ N(0, 1), including the intercept."""
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    pyro.sample("y", dist.Bernoulli(logits=beta @ x.mT).to_event(1), obs=y)


def sonar_posterior(path: Path) -> KnownPosterior:
    """Mines or rocks, by 60 standardised echoes (Gorman & Sejnowski 1988): columns x1, …, x60 and the label, 0 or 1."""
    table = tensor(np.loadtxt(path, delimiter=",", skiprows=1))
    x, label = table[:, :-1], table[:, -1]
    x = (x - x.mean(0)) / x.std(0, correction=0)
    design = torch.cat([torch.ones_like(label).unsqueeze(-1), x], -1)
    return KnownPosterior("sonar", logistic_regression, (design, label), log_evidence=SONAR_LOG_EVIDENCE)
