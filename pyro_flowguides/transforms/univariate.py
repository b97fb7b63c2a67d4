r"""Monotone scalar functions with parameters: what coupling, autoregressive and elementwise transforms apply to a coordinate.

A function is stateless. It maps a coordinate and its ``num_parameters`` parameters to the new coordinate and the logarithm of
its derivative; parameters that are all 0 give the identity, with a non-zero derivative with respect to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Univariate(Protocol):
    """What a structure needs of a scalar function; ``parameters`` has the shape of z with ``num_parameters`` appended."""

    @property
    def num_parameters(self) -> int: ...

    def forward(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """x and ``log dx/dz``, elementwise."""

    def inverse(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """z and ``log dz/dx``, elementwise."""


@dataclass(frozen=True)
class Shift:
    r"""The translation :math:`x = z + t` (Dinh et al. 2015, *NICE*, arXiv:1410.8516)."""

    num_parameters = 1

    def forward(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        x = z + parameters.squeeze(-1)
        return x, torch.zeros_like(x)

    def inverse(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        z = x - parameters.squeeze(-1)
        return z, torch.zeros_like(z)


@dataclass(frozen=True)
class ShiftScale:
    r"""The affine function :math:`x = e^{s}z + t` (Dinh et al. 2017, *Real NVP*, arXiv:1605.08803).

    With a bound c the log-scale is clipped smoothly, :math:`s = c\tanh(a/c)`: s(0) = 0, the slope there is 1, and the
    gradient neither explodes nor stops at a wall.

    Arguments:
        bound: The bound c of the log-scale, or None for s = a.
    """

    bound: float | None = 3.0
    num_parameters = 2

    def __post_init__(self) -> None:
        if self.bound is not None and not self.bound > 0:
            raise ValueError(f"ShiftScale: the bound of the log-scale must be positive or None, got {self.bound}")

    def _shift_and_log_scale(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = parameters.unbind(-1)
        if self.bound is not None:
            log_scale = self.bound * torch.tanh(log_scale / self.bound)
        return shift, log_scale

    def forward(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._shift_and_log_scale(parameters)
        return z * log_scale.exp() + shift, log_scale

    def inverse(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._shift_and_log_scale(parameters)
        return (x - shift) * (-log_scale).exp(), -log_scale
