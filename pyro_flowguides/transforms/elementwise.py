r"""Elementwise transforms: each coordinate goes through its own scalar function.

.. math:: x_i = f(z_i; \theta_i), \qquad \log|\det J| = \sum_i \log f'(z_i; \theta_i).

Invertible whenever f is increasing. Both directions cost O(D).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..conditioners import FreeParameters
from .base import FlowTransform, value_and_pull_back
from .univariate import RationalQuadraticSpline, ShiftScale, Univariate


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

    def _univariate_parameters(self, context: Tensor | None) -> Tensor:
        parameters = self.parameters_of(context)
        return parameters.reshape(*parameters.shape[:-1], self.univariate.num_parameters, self.dim).mT

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, context = self.check_input(z, context)
        x, log_derivative = self.univariate.forward(z, self._univariate_parameters(context))
        return x, log_derivative.expand_as(x).sum(-1)

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, context = self.check_input(x, context)
        z, log_derivative = self.univariate.inverse(x, self._univariate_parameters(context))
        return z, log_derivative.expand_as(z).sum(-1)

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, context = self.check_input(z, context)
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
        context_dim: The size of the context; 0 for none.
        hidden_dims: The hidden layers of the network of the context.

    Example:
        >>> Affine(2).forward_and_log_det(torch.ones(2))[0]
        tensor([1., 1.], grad_fn=<AddBackward0>)
    """

    def __init__(self, dim: int, *, context_dim: int = 0, hidden_dims: Sequence[int] = (32, 32)) -> None:
        super().__init__(dim, ShiftScale(bound=None), context_dim=context_dim, hidden_dims=hidden_dims)


class ElementwiseSpline(Elementwise):
    r"""A rational-quadratic spline for every coordinate on :math:`[-\text{bound}, \text{bound}]`, the identity outside.

    Durkan et al. (2019), *Neural spline flows*, arXiv:1906.04032.

    Arguments:
        dim: The number D of coordinates.
        context_dim: The size of the context; 0 for none.
        hidden_dims: The hidden layers of the network of the context.
        num_bins, bound: As in :class:`~pyro_flowguides.transforms.univariate.RationalQuadraticSpline`.
    """

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (32, 32),
        num_bins: int = 8,
        bound: float = 5.0,
    ) -> None:
        super().__init__(
            dim, RationalQuadraticSpline(num_bins, bound), context_dim=context_dim, hidden_dims=hidden_dims
        )
