"""Hamiltonian Monte Carlo of many chains at once, on a density in many dimensions.

All chains take their leapfrog steps together, with one step size and one mass matrix. The warm-up learns both from all of them:
the covariance of the draws of a window whitens the next one, and the step size follows the mean acceptance. The number of
leapfrog steps is uniform, up to half a period of a standard normal in whitened coordinates, so that consecutive draws of a normal
are uncorrelated.

Source: Neal, 2011, "MCMC using Hamiltonian dynamics", arXiv:1206.1901; the step size by Robbins and Monro, as in Andrieu and
Thoms, 2008, "A tutorial on adaptive MCMC".
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from .density import Density, diagnostics, moments

NUM_CHAINS = 128
# The windows of the warm-up. The second half of each, but for the last, gives the mass matrix of the next one.
WINDOWS = (50, 50, 100, 150, 50)
TARGET_ACCEPTANCE = 0.8
NUM_CLIMBS, CLIMB_RATE = 60, 0.1
FIRST_STEP, MAX_LEAPFROG = 0.1, 32
ENOUGH, MAX_RHAT = 8000, 1.01
BLOCK, MAX_DRAWS = 200, 3000
MAX_ENERGY_ERROR = 1000.0


def hmc(density: Density, seed: int = 0) -> dict[str, Any]:
    """Draws of all chains until the worst scalar has enough effective draws and the chains agree.

    Arguments:
        density: The log density.
        seed: Of the starts, which are standard normal in the unconstrained space and climb a little, and of the chains.

    Raises:
        RuntimeError: if that takes more than ``MAX_DRAWS`` draws of each chain.
    """
    with pyro.validation_enabled(False):
        chains = Chains(density, seed)
        for number, length in enumerate(WINDOWS):
            positions = chains.warm_up(length)
            if number < len(WINDOWS) - 1:
                chains.whiten(positions[length // 2 :].flatten(0, 1))
        blocks, acceptances, divergences = [], [], 0
        while True:
            positions, acceptance, diverged = chains.sample(BLOCK)
            blocks.append(positions)
            acceptances.append(acceptance)
            divergences += diverged
            points = torch.cat(blocks)
            values = density.values(points.flatten(0, 1))[0]
            ess, rhat = diagnostics({name: _by_chain(value, len(points)) for name, value in values.items()})
            if ess >= ENOUGH and rhat <= MAX_RHAT:
                break
            if len(points) >= MAX_DRAWS:
                raise RuntimeError(
                    f"{NUM_CHAINS} chains of {len(points)} draws: the smallest effective sample size is {ess:.0f}, the largest "
                    f"R-hat {rhat:.3f}, the acceptance {np.mean(acceptances):.2f}, and {divergences} trajectories diverged"
                )
    number = NUM_CHAINS * len(points)
    return {
        "kind": "HMC",
        "chains": NUM_CHAINS,
        "draws": number,
        "min_ess": ess,
        "max_rhat": rhat,
        "acceptance": float(np.mean(acceptances)),
        "step": chains.step,
        "divergences": divergences,
        **moments({name: value.flatten(1) for name, value in values.items()}, torch.full((number,), 1 / number)),
    }


def _by_chain(value: Tensor, num_draws: int) -> np.ndarray:
    return value.reshape(num_draws, NUM_CHAINS, -1).transpose(0, 1).numpy()


class Chains:
    """Chains with a common step size and mass matrix.

    Arguments:
        density: The log density of rows of points.
        seed: Of the starts and of all that follows.
    """

    def __init__(self, density: Density, seed: int) -> None:
        self._density = density
        self._generator = torch.Generator().manual_seed(seed)
        self._x = self._starts()
        self._fast = _traced(density, self._x)
        self._log_density, self._gradient = _with_gradient(self._fast, self._x)
        self._scale = torch.eye(density.dim)
        self.step = FIRST_STEP

    def _starts(self) -> Tensor:
        """The better half of spread points moved uphill: one in a tail would hold back the steps of all chains."""
        x = torch.randn(2 * NUM_CHAINS, self._density.dim, generator=self._generator)
        optimizer = torch.optim.Adam([x], lr=CLIMB_RATE)
        for _ in range(NUM_CLIMBS):
            x.grad = -_with_gradient(self._density, x)[1]
            optimizer.step()
        return x[_with_gradient(self._density, x)[0].topk(NUM_CHAINS).indices]

    def whiten(self, draws: Tensor) -> None:
        """Makes the covariance of the draws the inverse mass matrix."""
        self._scale = torch.linalg.cholesky(torch.atleast_2d(draws.T.cov()))
        self.step = draws.shape[-1] ** -0.25

    def warm_up(self, number: int) -> Tensor:
        """Positions, ``(number, chains, D)``, made while the step size follows the acceptance."""
        positions = []
        for iteration in range(number):
            acceptance, _ = self._move()
            self.step *= math.exp(2 * (float(acceptance.mean()) - TARGET_ACCEPTANCE) / (1 + iteration) ** 0.6)
            positions.append(self._x)
        return torch.stack(positions)

    def sample(self, number: int) -> tuple[Tensor, float, int]:
        """Positions, ``(number, chains, D)``, the mean acceptance, and how many trajectories diverged."""
        positions, acceptances, divergences = [], [], 0
        for _ in range(number):
            acceptance, error = self._move()
            positions.append(self._x)
            acceptances.append(float(acceptance.mean()))
            divergences += int((error > MAX_ENERGY_ERROR).sum())
        return torch.stack(positions), float(np.mean(acceptances)), divergences

    def _move(self) -> tuple[Tensor, Tensor]:
        """One trajectory of every chain: the chances that its end is accepted, and the errors of its energy."""
        longest = min(max(1, round(math.pi / self.step)), MAX_LEAPFROG)
        number = int(torch.randint(1, longest + 1, (), generator=self._generator))
        x, log_density, gradient = self._x, self._log_density, self._gradient
        momentum = torch.randn(x.shape, generator=self._generator)
        before = log_density - (momentum**2).sum(-1) / 2
        for _ in range(number):
            momentum = momentum + self.step / 2 * gradient @ self._scale
            x = x + self.step * momentum @ self._scale.T
            log_density, gradient = _with_gradient(self._fast, x)
            momentum = momentum + self.step / 2 * gradient @ self._scale
        error = (before - log_density + (momentum**2).sum(-1) / 2).nan_to_num(nan=torch.inf)
        acceptance = (-error).exp().clamp(max=1)
        accepted = torch.rand(len(x), generator=self._generator) < acceptance
        self._x = torch.where(accepted[:, None], x, self._x)
        self._log_density = torch.where(accepted, log_density, self._log_density)
        self._gradient = torch.where(accepted[:, None], gradient, self._gradient)
        return acceptance, error


def _with_gradient(density: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    log_density = density(x)
    (gradient,) = torch.autograd.grad(log_density.sum(), x)
    return log_density.detach().nan_to_num(nan=-torch.inf), gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _traced(density: Density, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The density without Pyro's work at every call, which takes more than half of the time; for as many rows as ``x`` has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(lambda rows: density(rows), (x,), check_trace=False)
