r"""A Gaussian process with counts, and a compartment with a saturating rate of elimination."""

from __future__ import annotations

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

JITTER = 1e-10

# --- a Gaussian process ------------------------------------------------------------------------------------------------


def _covariance_factor(x: Tensor, rho: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """L with LLᵀ = α² exp(−(x − x′)² / 2ρ²) + jitter, and a number that is 0 where L exists."""
    distance = (x.unsqueeze(-1) - x).square()
    covariance = alpha[..., None, None] ** 2 * torch.exp(-distance / (2 * rho[..., None, None] ** 2))
    # The version that does not raise, because far from the posterior the matrix may be singular to working precision.
    return torch.linalg.cholesky_ex(covariance + JITTER * torch.eye(len(x), dtype=x.dtype, device=x.device))


def poisson_process(x: Tensor, k: Tensor) -> None:
    """k ~ Poisson(exp f), f = L f̃; ρ ~ Gamma(25, 4), α ~ half-N(0, 2), f̃ ~ N(0, 1)."""
    rho = pyro.sample("rho", dist.Gamma(x.new_tensor(25.0), 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(x.new_tensor(2.0)))
    f_tilde = pyro.sample("f_tilde", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
    factor, failed = _covariance_factor(x, rho, alpha)
    pyro.factor("positive_definite", torch.where(failed == 0, 0.0, -math.inf).to(x))
    f = pyro.deterministic("f", (factor @ f_tilde.unsqueeze(-1)).squeeze(-1), event_dim=1)
    pyro.sample("k", dist.Poisson(f.exp()).to_event(1), obs=k)


def poisson_process_latents(reference: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, Tensor]:
    rho, alpha, f = reference["rho"], reference["alpha"], reference["f"]
    factor, _ = _covariance_factor(data["x"], rho, alpha)
    f_tilde = torch.linalg.solve_triangular(factor, f.unsqueeze(-1), upper=False).squeeze(-1)
    return {"rho": rho, "alpha": alpha, "f_tilde": f_tilde}


# --- a compartment -----------------------------------------------------------------------------------------------------

# The error is 1 % of the noise at the most extreme of 10,000 draws, and 0.04 % at the median draw.
NUM_NODES, NUM_NEWTON_STEPS = 25, 5


@functools.cache
def _collocation() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chebyshev nodes on [−1, 1], and the maps from values there to integrals from −1 and to Chebyshev coefficients."""
    nodes = -np.cos(np.pi * np.arange(NUM_NODES) / (NUM_NODES - 1))
    coefficients = np.linalg.inv(np.polynomial.chebyshev.chebvander(nodes, NUM_NODES - 1))
    antiderivatives = np.polynomial.chebyshev.chebint(np.eye(NUM_NODES), lbnd=-1)
    integrals = np.polynomial.chebyshev.chebval(nodes, antiderivatives).T @ coefficients
    return nodes, integrals, coefficients


def collocation(times: Tensor, t0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes on [t0, the last time], and the maps from values there to integrals up to a node and to values at the times."""
    nodes, integrals, coefficients = _collocation()
    half_length = float(times.max() - t0) / 2
    at_times = np.polynomial.chebyshev.chebvander((times - t0).cpu().numpy() / half_length - 1, NUM_NODES - 1)
    arrays = float(t0) + half_length * (nodes + 1), half_length * integrals, at_times @ coefficients
    return tuple(torch.as_tensor(array).to(times) for array in arrays)


def concentration(
    dose: Tensor, volume: Tensor, k_a: Tensor, k_m: Tensor, v_m: Tensor, elapsed: Tensor, integrals: Tensor
) -> Tensor:
    r"""The solution of :math:`C' = \frac{D}{V} k_a e^{-k_a t} - \frac{V_m}{V} \frac{C}{K_m + C}`, C(0) = 0, at the nodes.

    As an integral equation this is C = A − ∫ r(C), where the absorbed amount A has a closed form. Newton's method solves the
    equation at all nodes at once: each step is one linear system for all times, instead of a loop over small time steps. The
    rate of elimination r is concave, which makes the steps monotone as long as C is positive (Bellman & Kalaba 1965,
    *Quasilinearization and nonlinear boundary-value problems*).

    Only the last step is differentiated: at the solution, a Newton step has the same first derivative as the solution.
    """
    k_a, k_m, v_m = (parameter.unsqueeze(-1) for parameter in (k_a, k_m, v_m))
    absorbed = -dose / volume * torch.expm1(-k_a * elapsed)

    def newton_step(c: Tensor) -> Tensor:
        rate = v_m / volume * c / (k_m + c)
        slope = v_m / volume * k_m / (k_m + c) ** 2
        matrix = torch.eye(len(elapsed), dtype=c.dtype, device=c.device) + integrals * slope.unsqueeze(-2)
        right = absorbed - (rate - slope * c) @ integrals.mT
        # The version that does not raise: a draw without a solution has no finite density, and the training skips such a step.
        return torch.linalg.solve_ex(matrix, right.unsqueeze(-1))[0].squeeze(-1)

    with torch.no_grad():
        solution = absorbed
        for _ in range(NUM_NEWTON_STEPS - 1):
            solution = newton_step(solution).clamp(min=0.0)
    return newton_step(solution)


def compartment(
    observed: Tensor, dose: Tensor, volume: Tensor, elapsed: Tensor, integrals: Tensor, at_times: Tensor
) -> None:
    """Absorption of first order, elimination after Michaelis and Menten; k_a, K_m, V_m, σ ~ half-Cauchy(1)."""
    one = observed.new_ones(())
    k_a, k_m, v_m, sigma = (pyro.sample(name, dist.HalfCauchy(one)) for name in ("k_a", "K_m", "V_m", "sigma"))
    at_nodes = concentration(dose, volume, k_a, k_m, v_m, elapsed, integrals)
    # The interpolant of a concentration near 0 may be negative, and a negative number has no logarithm.
    loc = (at_nodes @ at_times.mT).clamp(min=1e-12).log()
    pyro.sample("C_hat", dist.LogNormal(loc, sigma.unsqueeze(-1)).to_event(1), obs=observed)


def compartment_arguments(data: dict[str, Tensor]) -> tuple[Tensor, ...]:
    nodes, integrals, at_times = collocation(data["times"], data["t0"])
    return data["C_hat"], data["D"], data["V"], nodes - data["t0"], integrals, at_times
