r"""Autoregressive transforms: the coordinates before it decide how a coordinate is transformed.

.. math:: x_i = f(z_i; \theta_i(z_1, \dots, z_{i-1})), \qquad \log|\det J| = \sum_i \log f'(z_i; \theta_i).

The Jacobian is lower triangular. Invertible whenever f is increasing. With P parameters per coordinate and a masked
network (MADE) of hidden width H,

- forward, the sampling direction, is one pass of the network, O(H·(P·D + H)): the inverse autoregressive flow of Kingma
  et al. (2016), *Improving variational inference with inverse autoregressive flow*, arXiv:1606.04934;
- the inverse takes its D coordinates in turn, each with a pass through the hidden layers, O(D·H·(D + H + P)). Its
  gradient is implicit, by one triangular solve: nothing of the D passes is kept. As a flow that samples this way it is
  the masked autoregressive flow of Papamakarios et al. (2017), *Masked autoregressive flow for density estimation*,
  arXiv:1705.07057;
- the score takes one triangular solve with the Jacobian, exact whatever D. For small D the Jacobian is formed,
  O(D·H·(D + H + P)) at once and O(D·(D + H)) memory per point; for larger D the solve goes through the network
  coordinate by coordinate and visits every unit once, O(H·(P·D + H)) in D steps and O(D + H) memory per point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import FlowTransform
from .masked import MaskedMLP, MaskedMLPAtContext
from .numerics import value_and_pull_back
from .univariate import MixtureOfLogistics, RationalQuadraticSpline, ShiftScale, Univariate

# Up to this D the score takes the whole Jacobian and one triangular solve: fewer kernels than D steps of substitution.
_LARGEST_DENSE_JACOBIAN = 24


class Autoregressive(FlowTransform):
    r"""The autoregressive structure over any scalar function.

    The parameters of coordinate 0, the only one for ``dim = 1``, are free (or depend on the context alone).

    Arguments:
        dim: The number D of coordinates.
        univariate: The scalar function, see :mod:`pyro_flowguides.transforms.univariate`.
        hidden_dims: The hidden layers of the masked network; any width will do, those well above D serve best.
        activation: Makes the elementwise activation module of the network.
        context_dim: The size of the context, a further input of the network; 0 for none.
    """

    def __init__(
        self,
        dim: int,
        univariate: Univariate,
        *,
        hidden_dims: Sequence[int] = (32, 32),
        activation: Callable[[], nn.Module] = nn.SiLU,
        context_dim: int = 0,
    ) -> None:
        super().__init__(dim, context_dim)
        self.univariate = univariate
        self.conditioner = MaskedMLP(dim, univariate.num_parameters, hidden_dims, activation, context_dim)

    @property
    def closed_inverse(self) -> bool:
        return False

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_derivative = self.univariate.forward(z, self.conditioner(z, context))
        return x, log_derivative.expand_as(x).sum(-1)

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        network = self.conditioner.at(context)
        with torch.no_grad():
            coordinates = torch.arange(self.dim, device=x.device)
            # The coordinates that are not solved yet stay at 0: a guess could overflow, and 0 (a masked weight) times inf is NaN.
            solution = torch.zeros_like(x)
            for i in range(self.dim):
                z_i, _ = self.univariate.inverse(x[..., i], network.of_coordinate(solution, i))
                solution = torch.where(coordinates == i, z_i.unsqueeze(-1), solution)
        solution = solution.detach()
        if not torch.is_grad_enabled():
            return solution, -self._log_det(network, solution)
        parameters, slopes = network.linearize(solution)
        x_back, log_derivative, pull_back = self._linearize_univariate(solution, parameters)
        with torch.no_grad():
            _, by_parameters = pull_back((torch.ones_like(x_back), torch.zeros_like(log_derivative)))
            jacobian = network.pull_back_rows(slopes, by_parameters) + torch.diag_embed(log_derivative.exp())
        residual = x_back - x
        # Of value 0, with the derivative of the implicit function theorem. A Newton step instead would spoil what is
        # exact to rounding already where the Jacobian is ill-conditioned.
        residual = residual - residual.detach()
        z = solution - torch.linalg.solve_triangular(jacobian.detach(), residual.unsqueeze(-1), upper=False).squeeze(-1)
        return z, -self._log_det(network, z)

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        network = self.conditioner.at(context)
        parameters, slopes = network.linearize(z)
        x, log_derivative, pull_back = self._linearize_univariate(z, parameters)
        with torch.no_grad():
            gradient, by_parameters = pull_back((torch.zeros_like(x), torch.ones_like(log_derivative)))
            score = score - gradient - network.pull_back(slopes, by_parameters)
            _, by_parameters = pull_back((torch.ones_like(x), torch.zeros_like(log_derivative)))
            diagonal = log_derivative.exp()
            if self.dim <= _LARGEST_DENSE_JACOBIAN:
                jacobian = network.pull_back_rows(slopes, by_parameters) + torch.diag_embed(diagonal)
                score = torch.linalg.solve_triangular(jacobian.mT, score.unsqueeze(-1), upper=True).squeeze(-1)
            else:
                score = network.back_substitute(slopes, by_parameters, diagonal, score)
        return x, log_derivative.expand_as(x).sum(-1), score.detach()

    def _log_det(self, network: MaskedMLPAtContext, z: Tensor) -> Tensor:
        x, log_derivative = self.univariate.forward(z, network(z))
        return log_derivative.expand_as(x).sum(-1)

    def _linearize_univariate(self, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor, Callable]:
        """x, the log-derivatives, and the function that pulls gradients back to z and the parameters of every point."""
        (x, log_derivative), pull_back = value_and_pull_back(self.univariate.forward, z, parameters)
        return x, log_derivative, pull_back

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, univariate={self.univariate}"


class AffineAutoregressive(Autoregressive):
    r"""Affine autoregressive transform: :math:`x_i = e^{s_i(z_{<i})} z_i + t_i(z_{<i})`.

    The log-scale is clipped smoothly at its bound c, :math:`s = c\tanh(a/c)`. Forward is an inverse autoregressive flow
    (IAF); ``.inv`` is a masked autoregressive flow (MAF).

    Arguments:
        dim: The number D of coordinates.
        log_scale_bound: The bound c of the log-scale.
        options: As in :class:`Autoregressive`.

    Example:
        >>> x, log_det = AffineAutoregressive(4).forward_and_log_det(torch.zeros(10, 4))
        >>> log_det.shape
        torch.Size([10])
    """

    def __init__(self, dim: int, *, log_scale_bound: float = 3.0, **options: Any) -> None:
        super().__init__(dim, ShiftScale(log_scale_bound), **options)


class SplineAutoregressive(Autoregressive):
    r"""Autoregressive rational-quadratic spline on :math:`[-B, B]`, the identity outside.

    Durkan et al. (2019), *Neural spline flows*, arXiv:1906.04032.

    Arguments:
        dim: The number D of coordinates.
        num_bins: The number of pieces of each spline.
        tail_bound: B, half the side of the box.
        options: As in :class:`Autoregressive`.
    """

    def __init__(self, dim: int, *, num_bins: int = 8, tail_bound: float = 5.0, **options: Any) -> None:
        super().__init__(dim, RationalQuadraticSpline(num_bins, tail_bound), **options)


class MixtureAutoregressive(Autoregressive):
    r"""Autoregressive mixture transform: the function of a
    :class:`~pyro_flowguides.transforms.MixtureCoupling`, one coordinate after the other.

    Ho et al. (2019), *Flow++*, arXiv:1902.00275; see
    :class:`~pyro_flowguides.transforms.univariate.MixtureOfLogistics`. The inverse solves one scalar equation per
    coordinate, in turn.

    Arguments:
        dim: The number D of coordinates.
        num_components: The number of components of each mixture, even.
        log_scale_bound: The bound of all log-scales.
        options: As in :class:`Autoregressive`.
    """

    def __init__(self, dim: int, *, num_components: int = 8, log_scale_bound: float = 2.0, **options: Any) -> None:
        super().__init__(dim, MixtureOfLogistics(num_components, log_scale_bound), **options)
