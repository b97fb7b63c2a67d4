r"""Annealed importance sampling by Hamiltonian Monte Carlo, many particles at once.

Particles start at draws of a density q and end with weights that make them draws of a density g, which need not have integral 1.
Between the two lie :math:`\pi_\beta \propto q^{1 - \beta} g^\beta` at :math:`\beta_m = m / (M + 1)`; at each of the M of them a
particle takes a step that leaves :math:`\pi_{\beta_m}` as it is. With :math:`r = \log g - \log q`, its log weight is

.. math:: \log w = \frac{1}{M + 1} \sum_{m=0}^{M} r(x_m), \qquad x_0 \sim q,

and :math:`E[w\,h(x_M)] = \int g\,h` for every h: the mean weight is an unbiased estimate of the integral of g.

Neal (2001), *Annealed importance sampling*, arXiv:physics/9803008; Neal (2011), *MCMC using Hamiltonian dynamics*,
arXiv:1206.1901.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# The rate of acceptance that the step sizes are led to, and how fast.
ACCEPTANCE, ADAPTATION = 0.65, 0.2


class Particles(NamedTuple):
    """Points with both densities and their gradients.

    Attributes:
        x: The points, shape (N, D).
        log_q: log q of each.
        log_g: log g of each.
        score_q: The gradient of log q.
        score_g: The gradient of log g.
    """

    x: Tensor
    log_q: Tensor
    log_g: Tensor
    score_q: Tensor
    score_g: Tensor

    def log_density(self, beta: float) -> Tensor:
        """log π at an inverse temperature, up to a constant."""
        return (1 - beta) * self.log_q + beta * self.log_g

    def score(self, beta: float) -> Tensor:
        """The gradient of it."""
        return (1 - beta) * self.score_q + beta * self.score_g

    def where(self, condition: Tensor, other: Particles) -> Particles:
        """These particles where a condition holds, others elsewhere."""
        return Particles(
            *(
                torch.where(condition.reshape(-1, *[1] * (ours.dim() - 1)), ours, theirs)
                for ours, theirs in zip(self, other, strict=True)
            )
        )


Evaluate = Callable[[Tensor], Particles]


def anneal(
    start: Particles, evaluate: Evaluate, step_sizes: Tensor, scale: Tensor, num_hmc_steps: int, num_leapfrog_steps: int
) -> tuple[Particles, Tensor, Tensor]:
    """Takes particles from q to g.

    Arguments:
        start: Draws of q.
        evaluate: Both densities at points.
        step_sizes: The step of each of the M densities in between, shape (M,).
        scale: How far a particle moves along each coordinate at a step size of 1, shape (D,).
        num_hmc_steps: The number of Hamiltonian steps at each density.
        num_leapfrog_steps: The number of leapfrog steps in each of these, with an evaluation for each.

    Returns:
        The particles, their log weights, and the step sizes for the next time.
    """
    num_between = len(step_sizes)
    particles, log_weights = start, (start.log_g - start.log_q) / (num_between + 1)
    adapted = []
    for index in range(num_between):
        beta, step = (index + 1) / (num_between + 1), step_sizes[index]
        rates = []
        for _ in range(num_hmc_steps):
            particles, rate = hmc_step(particles, beta, evaluate, step * scale, num_leapfrog_steps)
            rates.append(rate)
        # For the next time: a step size that depended on these particles would bias them.
        adapted.append(step * torch.exp(ADAPTATION * (torch.stack(rates).mean() - ACCEPTANCE)))
        log_weights = log_weights + (particles.log_g - particles.log_q) / (num_between + 1)
    # What starts outside of the support stays there, and weighs nothing.
    log_weights = log_weights.nan_to_num(nan=-torch.inf, posinf=-torch.inf)
    return particles, log_weights, torch.stack(adapted) if adapted else step_sizes


def hmc_step(
    particles: Particles, beta: float, evaluate: Evaluate, step: Tensor, num_leapfrog_steps: int
) -> tuple[Particles, Tensor]:
    """One step of Hamiltonian Monte Carlo on the density at an inverse temperature.

    Arguments:
        particles: The particles.
        beta: The inverse temperature.
        evaluate: Both densities at points.
        step: The step along each coordinate.
        num_leapfrog_steps: The number of leapfrog steps.

    Returns:
        The particles, and the mean probability that a move is accepted.
    """
    momentum = torch.randn_like(particles.x)
    moved, end = particles, momentum
    for _ in range(num_leapfrog_steps):
        end = end + 0.5 * step * moved.score(beta)
        moved = evaluate(moved.x + step * end)
        end = end + 0.5 * step * moved.score(beta)
    energy = 0.5 * (end.square() - momentum.square()).sum(-1)
    # NaN compares false: such a move is not made.
    log_accept = moved.log_density(beta) - particles.log_density(beta) - energy
    is_accepted = torch.rand_like(log_accept).log() < log_accept
    probability = log_accept.nan_to_num(nan=-torch.inf).clamp(max=0).exp().mean()
    return moved.where(is_accepted, particles), probability
