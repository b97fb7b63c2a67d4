r"""Monotone scalar functions with parameters: what coupling, autoregressive and elementwise transforms apply to a coordinate.

A function is stateless. It maps a coordinate and its ``num_parameters`` parameters to the new coordinate and the logarithm of
its derivative; parameters that are all 0 give the identity, with a non-zero derivative with respect to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad, softplus

from .numerics import LOG_E_MINUS_1, solve_increasing


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


# Where the two halves of the components of a mixture of logistics start, −m and m, in the unit of their coordinate.
_MIXTURE_START = 1.5
# How far a component can move from there. Between narrow components far apart the slope is exp(−distance/scale), which has to
# stay a number of float32.
_MIXTURE_REACH = 4.0
# Steps of the inverse, safeguarded and plain: the first find the piece of the staircase that components far apart make, and the
# last, from within a tenth of the root, double its digits each.
_MIXTURE_ITERATIONS, _MIXTURE_NEWTON_STEPS = 16, 4


@dataclass(frozen=True)
class MixtureOfLogistics:
    r"""The logit of a mixture of logistic distribution functions, then an affine function (Flow++).

    .. math::
        x = e^{a} \operatorname{logit}\left(\sum_{k=1}^{K} \pi_k\, \sigma\left((u - \mu_k) / s_k\right)\right) + b,
        \qquad g(u) = z .

    It is increasing on the whole line. Its slopes vary as a spline's do where the components are, at means between −5.5 and
    5.5, and its tails are straight. Sums are taken of logarithms, so that both tails keep their digits. The parameters are K
    logits of the weights, K means, K log-scales, b and a. Means and log-scales are clipped smoothly as in
    :class:`ShiftScale`. Ho et al. (2019), *Flow++: improving flow-based generative models with variational dequantization
    and architecture design*, arXiv:1902.00275.

    The paper takes z for u. Then the identity is the mixture of K equal components, where no parameter but a shift and a
    scale has an effect of first order: training sits at a saddle. Here half of the components start at −m, the others at
    m = 1.5, and g is the function of that start,

    .. math:: g(u) = u + \log\frac{e^{u} + c}{1 + c\,e^{u}}, \qquad c = \cosh m,

    whose inverse is the root of a quadratic equation. So the start is the identity, and bends from the first step on. The
    components of one half have the same gradients there; factors between 1/2 and 3/2 on their means and log-scales let them
    part. O(K) in both directions; the inverse is a root in u, found by Newton's method within a bracket.

    Arguments:
        num_components: The number K of components, even.
        log_scale_bound: The bound of all log-scales.

    Raises:
        ValueError: if num_components is not an even number of at least 2, or log_scale_bound is not positive and finite.
    """

    num_components: int = 8
    log_scale_bound: float = 2.0
    closed_inverse = False

    def __post_init__(self) -> None:
        count = self.num_components
        if isinstance(count, bool) or not isinstance(count, int) or count < 2 or count % 2:
            raise ValueError(f"MixtureOfLogistics: num_components must be an even number of at least 2, got {count!r}")
        if not 0 < self.log_scale_bound < math.inf:
            raise ValueError(
                f"MixtureOfLogistics: log_scale_bound must be positive and finite, got {self.log_scale_bound}"
            )

    @property
    def num_parameters(self) -> int:
        return 3 * self.num_components + 2

    @property
    def _outer(self) -> ShiftScale:
        return ShiftScale(self.log_scale_bound)

    def forward(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        components, outer = self._split(parameters)
        u, log_start = _before_start_mixture(z)
        value, log_derivative = _logit_of_mixture(u, *components)
        x, log_scale = self._outer.forward(value, outer)
        return x, log_derivative - log_start + log_scale

    def inverse(self, x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        components, outer = self._split(parameters)
        value, log_scale = self._outer.inverse(x, outer)

        def function(u: Tensor) -> tuple[Tensor, Tensor]:
            logit, log_derivative = _logit_of_mixture(u, *components)
            return logit, log_derivative.exp()

        with torch.no_grad():
            # Where component k alone would reach the value; a mixture reaches it between the first and the last of them.
            _, means, log_scales = components
            ends = means + log_scales.exp() * value.unsqueeze(-1)
            root = solve_increasing(function, value, ends.amin(-1), ends.amax(-1), _MIXTURE_ITERATIONS)
            root = _refine(function, value, root, _MIXTURE_NEWTON_STEPS)
        # A term of value 0 with the derivative of the implicit function theorem. A Newton step would spoil a root between
        # components far apart, where the slope is nearly 0.
        value_back, slope = function(root)
        residual = value_back - value
        u = root - (residual - residual.detach()) / slope.detach().clamp(min=torch.finfo(x.dtype).tiny)
        z, log_start = _start_mixture(u)
        return z, log_start - _logit_of_mixture(u, *components)[1] + log_scale

    def _split(self, parameters: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """The log-weights, means and log-scales of the components, and the parameters of the affine function."""
        count, bound = self.num_components, self.log_scale_bound
        logits, means, log_scales, outer = parameters.split([count, count, count, 2], -1)
        start = _MIXTURE_START * (2 * (torch.arange(count, dtype=parameters.dtype, device=parameters.device) % 2) - 1)
        pace = torch.linspace(0.5, 1.5, count, dtype=parameters.dtype, device=parameters.device)
        log_scales = bound * torch.tanh(pace.flip(0) * log_scales / bound)
        means = start + _MIXTURE_REACH * torch.tanh(pace * means / _MIXTURE_REACH)
        return (logits.log_softmax(-1), means, log_scales), outer


def _refine(function: Callable, target: Tensor, root: Tensor, num_steps: int) -> Tensor:
    """Newton's method, where a step that does not reduce the residual is not taken."""
    value, slope = function(root)
    for _ in range(num_steps):
        trial = root - (value - target) / slope
        trial_value, trial_slope = function(trial)
        better = (trial_value - target).abs() < (value - target).abs()
        root = torch.where(better, trial, root)
        value, slope = torch.where(better, trial_value, value), torch.where(better, trial_slope, slope)
    return root


def _logit_of_mixture(u: Tensor, log_weights: Tensor, means: Tensor, log_scales: Tensor) -> tuple[Tensor, Tensor]:
    """``log F − log(1 − F)`` for the mixture's distribution function F at u, and the logarithm of its derivative."""
    t = (u.unsqueeze(-1) - means) * (-log_scales).exp()
    below, above = log_weights + logsigmoid(t), log_weights + logsigmoid(-t)
    log_below, log_above = below.logsumexp(-1), above.logsumexp(-1)
    # The derivative is f/(F(1 − F)). With the smaller of F and 1 − F it is a mean of what the components say, where the
    # large numbers far out cancel exactly.
    right = log_below > log_above
    share = torch.where(right.unsqueeze(-1), above, below).log_softmax(-1)
    other = logsigmoid(torch.where(right.unsqueeze(-1), t, -t))
    log_mean = (share + other - log_scales).logsumexp(-1)
    return log_below - log_above, log_mean - torch.where(right, log_below, log_above)


# Both are odd functions, computed at −|u| and −|z|, where no exponential overflows. With c = cosh m and w = exp(−|u|),
# g = log(w (w + c)/(1 + cw)) there, and g' = (c + 2w + cw²)/((w + c)(1 + cw)).


def _start_mixture(u: Tensor) -> tuple[Tensor, Tensor]:
    """g, the logit of the mixture of two logistic distributions at −m and m in equal parts, and the log of its derivative."""
    c = math.cosh(_MIXTURE_START)
    left = torch.where(u < 0, u, -u)
    w = left.exp()
    z = left + (w + c).log() - (c * w).log1p()
    return torch.where(u < 0, z, -z), _start_log_derivative(w)


def _before_start_mixture(z: Tensor) -> tuple[Tensor, Tensor]:
    """The u with g(u) = z, and the logarithm of the derivative of g there."""
    c = math.cosh(_MIXTURE_START)
    left = torch.where(z < 0, z, -z)
    # w² + c(1 − y)w − y = 0 with y = exp(−|z|), by the form of its root that adds positive numbers.
    linear = -c * torch.expm1(left)
    ratio = 2 / (linear + (linear.square() + 4 * left.exp()).sqrt())
    u = left + ratio.log()
    return torch.where(z < 0, u, -u), _start_log_derivative(ratio * left.exp())


def _start_log_derivative(w: Tensor) -> Tensor:
    c = math.cosh(_MIXTURE_START)
    return ((c + 2 * w + c * w.square()) / ((w + c) * (1 + c * w))).log()
