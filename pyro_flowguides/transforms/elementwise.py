r"""Elementwise transforms: each coordinate goes through its own scalar function.

.. math:: x_i = f(z_i; \theta_i), \qquad \log|\det J| = \sum_i \log f'(z_i; \theta_i).

Invertible whenever f is increasing. Both directions cost O(D).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from .base import FlowTransform
from .networks import FreeParameters
from .numerics import value_and_pull_back
from .univariate import MixtureOfLogistics, RationalQuadraticSpline, ShiftScale, Univariate


class Elementwise(FlowTransform):
    r"""A scalar function applied to every coordinate, with free parameters (and a part that depends on the context).

    Arguments:
        dim: The number D of coordinates.
        univariate: The scalar function, see :mod:`pyro_flowguides.transforms.univariate`.
        context_dim: The size of the context; 0 for none.
        hidden_dims: The hidden layers of the network of the context.
    """

    def __init__(
        self, dim: int, univariate: Univariate, *, context_dim: int = 0, hidden_dims: Sequence[int] = (32, 32)
    ) -> None:
        super().__init__(dim, context_dim)
        self.univariate = univariate
        self.parameters_of = FreeParameters(torch.zeros(dim * univariate.num_parameters), context_dim, hidden_dims)

    @property
    def closed_inverse(self) -> bool:
        return self.univariate.closed_inverse

    def _univariate_parameters(self, context: Tensor | None) -> Tensor:
        parameters = self.parameters_of(context)
        return parameters.reshape(*parameters.shape[:-1], self.univariate.num_parameters, self.dim).mT

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_derivative = self.univariate.forward(z, self._univariate_parameters(context))
        return x, log_derivative.expand_as(x).sum(-1)

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_derivative = self.univariate.inverse(x, self._univariate_parameters(context))
        return z, log_derivative.expand_as(z).sum(-1)

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        parameters = self._univariate_parameters(context)
        (x, log_derivative), pull_back = value_and_pull_back(
            lambda point: self.univariate.forward(point, parameters), z
        )
        with torch.no_grad():
            (gradient,) = pull_back((torch.zeros_like(x), torch.ones_like(log_derivative)))
            score = (score - gradient) * (-log_derivative).exp()
        return x, log_derivative.expand_as(x).sum(-1), score.detach()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, univariate={self.univariate}"


class Affine(Elementwise):
    r"""A location and a positive scale for every coordinate: :math:`x = e^{s} \odot z + t`, with s and t free.

    Arguments:
        dim: The number D of coordinates.
        options: As in :class:`Elementwise`.

    Example:
        >>> Affine(2).forward_and_log_det(torch.ones(2))[0]
        tensor([1., 1.], grad_fn=<AddBackward0>)
        >>> Affine(2)
        Affine(
          dim=2, univariate=ShiftScale(log_scale_bound=None)
          (parameters_of): FreeParameters()
        )
    """

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, ShiftScale(None), **options)


class ElementwiseSpline(Elementwise):
    r"""A rational-quadratic spline for every coordinate on :math:`[-B, B]`, the identity outside.

    Durkan et al. (2019), *Neural spline flows*, arXiv:1906.04032.

    Arguments:
        dim: The number D of coordinates.
        num_bins: The number of pieces of each spline.
        tail_bound: B, half the side of the box.
        options: As in :class:`Elementwise`.
    """

    def __init__(self, dim: int, *, num_bins: int = 8, tail_bound: float = 5.0, **options: Any) -> None:
        super().__init__(dim, RationalQuadraticSpline(num_bins, tail_bound), **options)


class ElementwiseMixture(Elementwise):
    r"""The logit of a mixture of logistic distribution functions for every coordinate, then an affine function (Flow++).

    Ho et al. (2019), *Flow++*, arXiv:1902.00275; see
    :class:`~pyro_flowguides.transforms.univariate.MixtureOfLogistics`.

    Arguments:
        dim: The number D of coordinates.
        num_components: The number of components of each mixture, even.
        log_scale_bound: The bound of all log-scales.
        options: As in :class:`Elementwise`.
    """

    def __init__(self, dim: int, *, num_components: int = 8, log_scale_bound: float = 2.0, **options: Any) -> None:
        super().__init__(dim, MixtureOfLogistics(num_components, log_scale_bound), **options)


class ActNorm(Affine):
    r"""A location and a scale for every coordinate, :math:`x = e^{s} \odot z + t`, that can be set from draws.

    It starts as the identity, and :meth:`initialize` sets s and t so that given draws come out with mean 0 and standard
    deviation 1. That is an explicit call and never a side effect of a forward pass, which would hide in a copy, a
    captured graph or a map over draws. Always invertible; O(D) in both directions. Kingma & Dhariwal (2018), *Glow:
    generative flow with invertible 1×1 convolutions*, arXiv:1807.03039.

    Arguments:
        dim: The number D of coordinates.
        options: As in :class:`Elementwise`.

    Example:
        >>> norm = ActNorm(2)
        >>> norm.initialize(5 + 3 * torch.randn(1000, 2))
        >>> bool((norm(5 + 3 * torch.randn(1000, 2)).mean(0).abs() < 0.5).all())
        True
    """

    def initialize(self, z: Tensor) -> None:
        """Sets the free scale and location from draws that reach this transform.

        In a stack, pass base draws through the transforms before this one. With a context, the part that depends on the
        context stays as it is; before training it is 0.

        Arguments:
            z: At least two draws, shape ``(…, dim)``; 256 or more for a stable scale.

        Raises:
            ValueError: if the shape is wrong, there are fewer than two draws, or a coordinate does not vary.
        """
        if z.dim() == 0 or z.shape[-1] != self.dim:
            raise ValueError(f"ActNorm: expected draws of shape (…, {self.dim}), got {tuple(z.shape)}")
        draws = z.detach().reshape(-1, self.dim)
        if len(draws) < 2:
            raise ValueError(f"ActNorm: a standard deviation needs at least 2 draws, got {len(draws)}")
        standard_deviation, mean = torch.std_mean(draws, 0)
        constant = (~(standard_deviation > 0)).nonzero().squeeze(-1).tolist()
        if constant:
            raise ValueError(f"ActNorm: the draws do not vary in the coordinates {constant}")
        with torch.no_grad():
            self.parameters_of.value.copy_(torch.cat([-mean / standard_deviation, -standard_deviation.log()]))


class Sigmoid(FlowTransform):
    r"""The logistic function of every coordinate, :math:`x_i = 1/(1 + e^{-z_i})`: from R^D to the open unit cube.

    .. math:: \log|\det J| = \sum_i \left(\log\sigma(z_i) + \log\sigma(-z_i)\right),

    a sum that is finite and precise wherever z is. It has no parameters. O(D) in both directions. Where rounding would
    put x on the boundary it is kept inside, as a distribution on the open cube requires; the inverse does the same with
    points on the boundary or outside. The score :math:`(s - 1 + 2x)/(x(1 - x))` grows like :math:`e^{|z|}`, beyond the
    range of float32 from :math:`|z| = 88` on.

    Arguments:
        dim: The number D of coordinates.

    Example:
        >>> Sigmoid(2)(torch.zeros(2))
        tensor([0.5000, 0.5000])
    """

    codomain = constraints.independent(constraints.unit_interval, 1)

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _into_unit_interval(torch.sigmoid(z)), _log_sigmoid_derivative(z).sum(-1)

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = _into_unit_interval(x)
        z = x.log() - (-x).log1p()
        return z, -_log_sigmoid_derivative(z).sum(-1)

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        log_derivative = _log_sigmoid_derivative(z)
        with torch.no_grad():
            # 1 − 2σ(z) = −tanh(z/2) is the gradient of log_det.
            score = (score + torch.tanh(z / 2)) * (-log_derivative).exp()
        return _into_unit_interval(torch.sigmoid(z)), log_derivative.sum(-1), score.detach()


def _log_sigmoid_derivative(z: Tensor) -> Tensor:
    return logsigmoid(z) + logsigmoid(-z)


def _into_unit_interval(x: Tensor) -> Tensor:
    """The point of the open unit interval, as the dtype resolves it, that is closest to x."""
    limits = torch.finfo(x.dtype)
    return x.clamp(min=limits.tiny, max=1 - limits.eps / 2)
