r"""Planar flows: one ridge bends space along one direction.

.. math:: x = z + \hat u \tanh(w^\top z + b), \qquad \log|\det J| = \log\left(1 + h'(w^\top z + b)\, w^\top \hat u\right)

with :math:`h' = 1 - \tanh^2`. It is invertible when :math:`w^\top \hat u > -1`, which the reparameterisation

.. math:: \hat u = u + \left(m(w^\top u) - w^\top u\right) \frac{w}{\|w\|^2}, \qquad m(a) = -1 + \log(1 + e^{a + \log(e - 1)})

guarantees; m(0) = 0, so that u = 0 is the identity. Rezende & Mohamed (2015), *Variational inference with normalizing flows*,
arXiv:1505.05770, appendix A.1, whose m has no shift: there u = 0 is not the identity.

The inverse needs one scalar root along w: with :math:`\alpha = w^\top z`,
:math:`\alpha + m \tanh(\alpha + b) = w^\top x` is increasing in α, and :math:`z = x - \hat u\tanh(\alpha + b)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .base import FlowTransform
from .networks import FreeParameters
from .numerics import LOG_E_MINUS_1, implicit_root, solve_increasing, tanh_derivative


class Planar(FlowTransform):
    r"""The planar flow of Rezende & Mohamed (2015). Always invertible; O(D) in both directions and for the score.

    Arguments:
        dim: The number D of coordinates.
        context_dim: The size of the context that u, w and b depend on; 0 for none.
        hidden_dims: The hidden layers of the network of the context.

    Example:
        >>> planar = Planar(3)
        >>> planar
        Planar(
          dim=3
          (parameters_of): FreeParameters()
        )
        >>> x, log_det = planar.forward_and_log_det(torch.randn(5, 3))
        >>> z, _ = planar.inverse_and_log_det(x)
    """

    def __init__(self, dim: int, *, context_dim: int = 0, hidden_dims: Sequence[int] = (32, 32)) -> None:
        super().__init__(dim, context_dim)
        initial = torch.zeros(2 * dim + 1)
        initial[dim : 2 * dim] = torch.randn(dim) / dim**0.5
        self.parameters_of = FreeParameters(initial, context_dim, hidden_dims)

    @property
    def closed_inverse(self) -> bool:
        return False

    def _ridge_parameters(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """û, w, b, m = wᵀû, and the softplus that is 1 + m, which does not lose its last digits near m = −1.

        The last three have a last dimension of 1.
        """
        u, w, b = self.parameters_of(context).split([self.dim, self.dim, 1], -1)
        a = (w * u).sum(-1, keepdim=True)
        one_plus_m = softplus(a + LOG_E_MINUS_1)
        m = one_plus_m - 1
        # At w = 0 the ridge has no direction and any û on w will do; the floor only keeps 0/0 out.
        squared_norm = (w * w).sum(-1, keepdim=True).clamp(min=1e-12)
        return torch.addcmul(u, (m - a) / squared_norm, w), w, b, m, one_plus_m

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u_hat, w, b, _, one_plus_m = self._ridge_parameters(context)
        ridge = _along(z, w) + b
        h = torch.tanh(ridge)
        slope = _slope(h, tanh_derivative(ridge), one_plus_m)
        return torch.addcmul(z, u_hat, h), slope.log().squeeze(-1)

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u_hat, w, b, m, one_plus_m = self._ridge_parameters(context)
        target = _along(x, w)

        def along_w(alpha: Tensor) -> tuple[Tensor, Tensor]:
            ridge = alpha + b
            h = torch.tanh(ridge)
            return alpha + m * h, _slope(h, tanh_derivative(ridge), one_plus_m)

        alpha = solve_increasing(along_w, target, target - m.abs(), target + m.abs())
        ridge = implicit_root(along_w, target, alpha) + b
        h = torch.tanh(ridge)
        slope = _slope(h, tanh_derivative(ridge), one_plus_m)
        return torch.addcmul(x, u_hat, h, value=-1), -slope.log().squeeze(-1)

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        u_hat, w, b, m, one_plus_m = self._ridge_parameters(context)
        ridge = _along(z, w) + b
        h = torch.tanh(ridge)
        h_prime = tanh_derivative(ridge)
        slope = _slope(h, h_prime, one_plus_m)
        with torch.no_grad():
            # ∇ log_det = (h'' m / slope) w, and J^{-T} by Sherman and Morrison, J = I + h' û wᵀ.
            score = score + 2 * h * h_prime * m / slope * w
            score = score - h_prime * _along(score, u_hat) / slope * w
        return torch.addcmul(z, u_hat, h), slope.log().squeeze(-1), score.detach()


def _along(point: Tensor, direction: Tensor) -> Tensor:
    """The scalar product, with a last dimension of 1; one matrix product where the direction is the same for all points."""
    if direction.dim() == 1:
        return point @ direction.unsqueeze(-1)
    return (point * direction).sum(-1, keepdim=True)


def _slope(h: Tensor, h_prime: Tensor, one_plus_m: Tensor) -> Tensor:
    """1 + h'·m as h² + h'·(1 + m): a sum of positive terms, precise where m is close to −1 and 0 nowhere."""
    return torch.addcmul(h.square(), h_prime, one_plus_m + torch.finfo(h.dtype).tiny)
