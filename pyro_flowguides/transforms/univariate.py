r"""Monotone scalar functions with parameters: what coupling, autoregressive and elementwise transforms apply to a coordinate.

A function is stateless. It maps a coordinate and its ``num_parameters`` parameters to the new coordinate and the logarithm of
its derivative; parameters that are all 0 give the identity, with a non-zero derivative with respect to them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from .numerics import LOG_E_MINUS_1


class Univariate(Protocol):
    """What a structure needs of a scalar function; ``parameters`` has the shape of z with ``num_parameters`` appended."""

    @property
    def num_parameters(self) -> int: ...

    @property
    def closed_inverse(self) -> bool:
        """Whether the inverse is a formula, and no iteration."""

    def forward(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """x and ``log dx/dz``, elementwise."""

    def inverse(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """z and ``log dz/dx``, elementwise."""


@dataclass(frozen=True)
class Shift:
    r"""The translation :math:`x = z + t` (Dinh et al. 2015, *NICE*, arXiv:1410.8516)."""

    num_parameters = 1
    closed_inverse = True

    def forward(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        x = z + parameters.squeeze(-1)
        return x, x.new_zeros(()).expand_as(x)

    def inverse(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        z = x - parameters.squeeze(-1)
        return z, z.new_zeros(()).expand_as(z)


@dataclass(frozen=True)
class ShiftScale:
    r"""The affine function :math:`x = e^{s}z + t` (Dinh et al. 2017, *Real NVP*, arXiv:1605.08803).

    With a bound c the log-scale is clipped smoothly, :math:`s = c\tanh(a/c)`: s(0) = 0, the slope there is 1, and the
    gradient neither explodes nor stops at a wall.

    Arguments:
        log_scale_bound: The bound c, or None for s = a.
    """

    log_scale_bound: float | None = 3.0
    num_parameters = 2
    closed_inverse = True

    def __post_init__(self) -> None:
        if self.log_scale_bound is not None and not self.log_scale_bound > 0:
            raise ValueError(f"ShiftScale: log_scale_bound must be positive or None, got {self.log_scale_bound}")

    def _shift_and_log_scale(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        # All shifts first, then all log-scales: that is how they lie in memory, and how their gradients are put together.
        shift, log_scale = parameters.mT.unbind(-2) if parameters.dim() > 1 else parameters.unbind()
        if self.log_scale_bound is not None:
            log_scale = self.log_scale_bound * torch.tanh(log_scale / self.log_scale_bound)
        return shift, log_scale

    def forward(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._shift_and_log_scale(parameters)
        return z * log_scale.exp() + shift, log_scale

    def inverse(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._shift_and_log_scale(parameters)
        return (x - shift) * (-log_scale).exp(), -log_scale


@dataclass(frozen=True)
class RationalQuadraticSpline:
    r"""A monotone spline of rational-quadratic pieces on :math:`[-B, B]`, and the identity outside.

    Between the knots :math:`(x_k, y_k)` and :math:`(x_{k+1}, y_{k+1})`, with the derivatives :math:`\delta_k` and
    :math:`\delta_{k+1}` there, the slope :math:`s = (y_{k+1} - y_k) / (x_{k+1} - x_k)` and
    :math:`\theta = (z - x_k) / (x_{k+1} - x_k)`,

    .. math::
        x = y_k + (y_{k+1} - y_k) \frac{s\theta^2 + \delta_k\theta(1-\theta)}
                                      {s + (\delta_{k+1} + \delta_k - 2s)\theta(1-\theta)} .

    It is increasing since widths, heights and derivatives are positive, and continuously differentiable: the derivative
    at ±B is 1. The parameters are K unnormalised widths, K unnormalised heights (both through a softmax) and the K − 1
    inner derivatives (through a softplus that is 1 at 0). Gregory & Delbourgo (1982), *Piecewise rational quadratic
    interpolation to monotonic data*; Durkan et al. (2019), *Neural spline flows*, arXiv:1906.04032. O(K) in both
    directions; the inverse is the root of a quadratic equation. It cannot change the tails beyond ±B: points should be
    brought to unit scale before.

    Arguments:
        num_bins: The number K of pieces, at least 2.
        tail_bound: B, half the side of the box.
        min_width: The smallest width of a piece, as a fraction of the side of the box.
        min_height: The smallest height of a piece, as a fraction of the side of the box.
        min_derivative: The smallest derivative at a knot.

    Raises:
        ValueError: if there are fewer than 2 pieces, tail_bound is not positive, or a minimum leaves no room.
    """

    num_bins: int = 8
    tail_bound: float = 5.0
    min_width: float = 1e-3
    min_height: float = 1e-3
    min_derivative: float = 1e-3
    closed_inverse = True

    def __post_init__(self) -> None:
        if isinstance(self.num_bins, bool) or not isinstance(self.num_bins, int) or self.num_bins < 2:
            raise ValueError(
                f"RationalQuadraticSpline: num_bins must be an integer of at least 2, got {self.num_bins!r}"
            )
        if not 0 < self.tail_bound < math.inf:
            raise ValueError(f"RationalQuadraticSpline: tail_bound must be positive and finite, got {self.tail_bound}")
        for name, largest in [
            ("min_width", 1 / self.num_bins),
            ("min_height", 1 / self.num_bins),
            ("min_derivative", 1),
        ]:
            if not 0 < getattr(self, name) < largest:
                raise ValueError(
                    f"RationalQuadraticSpline: {name} must be between 0 and {largest:g}, got {getattr(self, name)}"
                )

    @property
    def num_parameters(self) -> int:
        return 3 * self.num_bins - 1

    def forward(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        inside, clipped = self._clip(z)
        x, log_derivative = _evaluate_piece(self._piece(clipped, parameters, axis=0), clipped)
        return torch.where(inside, x, z), torch.where(inside, log_derivative, torch.zeros_like(z))

    def inverse(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        inside, clipped = self._clip(x)
        piece = self._piece(clipped, parameters, axis=1)
        root = _solve_piece(piece, clipped)
        # The root has no graph: a vanishing discriminant would have an infinite derivative. This term of value 0 has
        # the derivative of the implicit function theorem.
        x_back, log_derivative = _evaluate_piece(piece, root)
        residual = x_back - clipped
        z = root - (residual - residual.detach()) * (-log_derivative).exp().detach()
        _, log_derivative = _evaluate_piece(piece, z)
        return torch.where(inside, z, x), torch.where(inside, -log_derivative, torch.zeros_like(x))

    def _clip(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the value is in the box, and the value clipped to it: no formula ever sees a point outside."""
        return value.abs() < self.tail_bound, value.clamp(-self.tail_bound, self.tail_bound)

    def _knots(self, raw: Tensor, smallest: float) -> Tensor:
        # Several times faster on a CPU than torch's softmax over so few numbers.
        weights = (raw - raw.detach().amax(-1, keepdim=True)).exp()
        fractions = smallest + (1 - smallest * self.num_bins) * weights / weights.sum(-1, keepdim=True)
        inner = 2 * self.tail_bound * fractions[..., :-1].cumsum(-1) - self.tail_bound
        # The ends are exactly those of the box: a sum would round.
        return pad(pad(inner, (1, 0), value=-self.tail_bound), (0, 1), value=self.tail_bound)

    def _piece(self, value: Tensor, parameters: Tensor, axis: int) -> Tensor:
        """What describes the piece that a value lies in: the left and right x, y and derivative, ``[6, ...]``."""
        widths, heights, derivatives = parameters.split([self.num_bins, self.num_bins, self.num_bins - 1], -1)
        derivatives = softplus(derivatives + LOG_E_MINUS_1)
        derivatives = pad(self.min_derivative + (1 - self.min_derivative) * derivatives, (1, 1), value=1.0)
        knots = self._knots(widths, self.min_width), self._knots(heights, self.min_height)
        table = torch.stack([*knots, derivatives], -2)
        index = (value.unsqueeze(-1) >= knots[axis][..., 1:-1]).sum(-1)
        if parameters.dim() == 2 and value.dim() > 1:
            # One table for all points, of shape (6, pieces, coordinates): it is not repeated for each of them.
            table = torch.stack([table[..., :-1], table[..., 1:]], -2).flatten(-3, -2).permute(1, 2, 0)
            index = index.reshape(-1, index.shape[-1])
            return table.gather(1, index.expand(6, *index.shape)).reshape(6, *value.shape)
        index = torch.stack([index, index + 1], -1).unsqueeze(-2).expand(*value.shape, 3, 2)
        piece = table.expand(*value.shape, 3, self.num_bins + 1).gather(-1, index)
        return piece.flatten(-2).movedim(-1, 0).contiguous()


def _unpack_piece(piece: Tensor) -> tuple[Tensor, ...]:
    """The left and right end, the lower end, width, height and slope, and the derivatives at the two ends."""
    left, right, lower, upper, d_left, d_right = piece.unbind()
    width, height = right - left, upper - lower
    return left, right, lower, width, height, height / width, d_left, d_right


def _evaluate_piece(piece: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The value and log dx/dz on a piece."""
    left, right, lower, width, height, slope, d_left, d_right = _unpack_piece(piece)
    theta = (z - left) / width
    # 1 − θ, with all its digits near the right end.
    rest = (right - z) / width
    product = theta * rest
    denominator = slope + (d_left + d_right - 2 * slope) * product
    x = lower + height * (slope * theta.square() + d_left * product) / denominator
    # The derivative is slope²·(d_right·θ² + 2·slope·θ(1 − θ) + d_left·(1 − θ)²) / denominator². The sum of positive
    # terms is precise where derivatives are far below the slope; around the identity 1 + bend is, where bend is 0.
    bend = (d_right / slope - 1) * theta.square() + (d_left / slope - 1) * rest.square()
    positive = (d_right * theta.square() + d_left * rest.square()) / slope + 2 * product
    numerator = torch.where(bend.abs() < 0.5, 1 + bend, positive)
    return x, numerator.log() + 3 * slope.log() - 2 * denominator.log()


def _solve_piece(piece: Tensor, x: Tensor) -> Tensor:
    """The point z of a piece that is mapped to x, without graph.

    It is the root of a·θ² + b·θ = slope·ξ, where ξ is the fraction of the height that x has reached.
    """
    with torch.no_grad():
        left, _, lower, width, height, slope, d_left, d_right = _unpack_piece(piece)
        fraction = (x - lower) / height
        a = slope - d_left + fraction * (d_left + d_right - 2 * slope)
        b = d_left - fraction * (d_left + d_right - 2 * slope)
        # It is a square in exact arithmetic, hence never negative.
        discriminant = (b.square() + 4 * a * slope * fraction).clamp(min=0)
        # Of the two forms of the root the one that adds numbers of one sign; b < 0 implies a > slope.
        sum_of_one_sign = b.abs() + discriminant.sqrt()
        theta = torch.where(b < 0, sum_of_one_sign / (2 * a), 2 * slope * fraction / sum_of_one_sign)
        return (left + width * theta.clamp(0, 1)).detach()
