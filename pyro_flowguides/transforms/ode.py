r"""Solvers of dx/dt = f(t, x) from t = 0 to t = 1, or back.

An explicit Runge–Kutta method with s stages takes fixed steps of size h,

.. math:: k_i = f\Big(t + c_i h,\; x + h \sum_{j<i} a_{ij} k_j\Big), \qquad x \leftarrow x + h \sum_i b_i k_i .

Its error is O(hᵖ) with p = 1 (``"euler"``), 2 (``"midpoint"``), 4 (``"rk4"``). A fixed number of steps is a plain graph: it is
differentiated as it is computed ("discretise, then optimise"), captured, compiled and mapped like any other function. Hairer,
Nørsett & Wanner (1993), *Solving ordinary differential equations I*, section II.1.

Methods that choose their steps are those of torchdiffeq. All points of a batch share a step there, and every step waits for the
device; nothing of it can be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

State = tuple[Tensor, ...]
# From a time and a state to the rate of each of its parts.
Rates = Callable[[Any, State], State]

# c and the rows of a, then b.
_TABLEAUX: dict[str, tuple[tuple[tuple[float, tuple[float, ...]], ...], tuple[float, ...]]] = {
    "euler": (((0.0, ()),), (1.0,)),
    "midpoint": (((0.0, ()), (0.5, (0.5,))), (0.0, 1.0)),
    "rk4": (
        ((0.0, ()), (0.5, (0.5,)), (0.5, (0.0, 0.5)), (1.0, (0.0, 0.0, 1.0))),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
}
FIXED_SOLVERS = tuple(_TABLEAUX)
ADAPTIVE_SOLVERS = ("dopri5", "dopri8", "bosh3", "adaptive_heun")


@dataclass(frozen=True)
class FixedSteps:
    """A method with steps of one size.

    Arguments:
        method: One of ``FIXED_SOLVERS``.
        num_steps: The number of steps from 0 to 1.
    """

    method: str
    num_steps: int

    def finer(self) -> FixedSteps:
        """The same method with half the step."""
        return FixedSteps(self.method, 2 * self.num_steps)

    def __call__(self, rates: Rates, state: State, *, backward: bool = False) -> State:
        """The state at the other end."""
        stages, weights = _TABLEAUX[self.method]
        start, h = (1.0, -1 / self.num_steps) if backward else (0.0, 1 / self.num_steps)
        for step in range(self.num_steps):
            slopes: list[State] = []
            for c, row in stages:
                slopes.append(rates(start + (step + c) * h, _moved(state, slopes, row, h)))
            state = _moved(state, slopes, weights, h)
        return state


def _moved(state: State, slopes: Sequence[State], weights: Sequence[float], h: float) -> State:
    """The state plus h times the weighted slopes."""
    for slope, weight in zip(slopes, weights, strict=True):
        if weight:
            state = tuple(torch.add(x, rate, alpha=h * weight) for x, rate in zip(state, slope, strict=True))
    return state


@dataclass(frozen=True)
class AdaptiveSteps:
    """A method of torchdiffeq, which chooses its steps.

    Arguments:
        method: One of ``ADAPTIVE_SOLVERS``.
        rtol, atol: The tolerances of a step.
        adjoint: Whether the gradient comes from a second equation that is solved backwards.
        parameters: For the adjoint equation, all tensors with a gradient that the rates depend on.
    """

    method: str
    rtol: float
    atol: float
    adjoint: bool = False
    parameters: tuple[Tensor, ...] = ()

    def finer(self) -> AdaptiveSteps:
        """The same method with tolerances a hundredth as large."""
        return replace(self, rtol=self.rtol / 100, atol=self.atol / 100)

    def __call__(self, rates: Rates, state: State, *, backward: bool = False) -> State:
        """The state at the other end."""
        torchdiffeq = import_torchdiffeq(self.method)
        times = torch.tensor([1.0, 0.0] if backward else [0.0, 1.0], dtype=state[0].dtype, device=state[0].device)
        options: dict[str, Any] = {"method": self.method, "rtol": self.rtol, "atol": self.atol}
        if self.adjoint:
            path = torchdiffeq.odeint_adjoint(rates, state, times, adjoint_params=self.parameters, **options)
        else:
            path = torchdiffeq.odeint(rates, state, times, **options)
        return tuple(part[-1] for part in path)


def import_torchdiffeq(method: str) -> Any:
    """The package torchdiffeq.

    Raises:
        ImportError: if it is not installed; the message says how to install it.
    """
    try:
        import torchdiffeq
    except ImportError as error:
        raise ImportError(
            f'Continuous: solver="{method}" is one of torchdiffeq, which is not installed: pip install '
            f"'pyro-flowguides[ode]', or use solver=\"rk4\""
        ) from error
    return torchdiffeq
