r"""Radial flows: space is drawn to a centre, or pushed away from it.

.. math::

    x = z + \frac{\beta}{\alpha + r}(z - z_0), \qquad r = \|z - z_0\|, \qquad
    \log|\det J| = (D - 1) \log\left(1 + \frac{\beta}{\alpha + r}\right)
    + \log\left(1 + \frac{\alpha\beta}{(\alpha + r)^2}\right) .

It is invertible when :math:`\alpha > 0` and :math:`\beta > -\alpha`; here :math:`\beta = m\,\alpha` with
:math:`m = (1 - \delta)\left(\log(1 + e^{a + \log(e - 1)}) - 1\right) > -1`, so that a = 0 is the identity for every α,
and 1 + m, the scale at the centre, stays above δ = 10⁻⁴. Rezende & Mohamed (2015), *Variational inference with
normalizing flows*, arXiv:1505.05770, section 4.1 and appendix A.2, whose :math:`\beta = -\alpha + \log(1 + e^{a})` is 0
at an a that depends on α.

With :math:`p = \alpha / (\alpha + r)`, the Jacobian has the eigenvalue :math:`1 + m p^2` along the ray from the centre,
and :math:`1 + m p` across.

The inverse runs along the ray: :math:`\|x - z_0\| = r + m p\,r` is a quadratic equation in r with one positive root.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .base import FlowTransform
from .networks import NEAR_ZERO, FreeParameters
from .numerics import LOG_E_MINUS_1, log_one_plus

# The least scale, of space at the centre and of α in units of √D. Without it both reach 0 in float32, and log_det −∞.
_MARGIN = 1e-4


class Radial(FlowTransform):
    r"""The radial flow of Rezende & Mohamed (2015). Always invertible; O(D) in both directions and for the score.

    It starts as the identity around a random centre, with α = √D, the distance at which a normal vector lies.

    Arguments:
        dim: The number D of coordinates.
        context_dim: The size of the context that z₀, α and β depend on; 0 for none.
        hidden_dims: The hidden layers of the network of the context.

    Example:
        >>> radial = Radial(3)
        >>> x, log_det = radial.forward_and_log_det(torch.randn(5, 3))
        >>> z, _ = radial.inverse_and_log_det(x)
    """

    def __init__(self, dim: int, *, context_dim: int = 0, hidden_dims: Sequence[int] = (32, 32)) -> None:
        super().__init__(dim, context_dim)
        # With β exactly 0 neither the centre nor α would have a gradient.
        initial = torch.cat([torch.randn(dim), torch.tensor([0.0, NEAR_ZERO])])
        self.parameters_of = FreeParameters(initial, context_dim, hidden_dims)

    def _radial_parameters(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z₀, α, m = β/α, and 1 + m, which does not lose its last digits near m = −1."""
        centre, raw = self.parameters_of(context).split([self.dim, 2], -1)
        scale = _MARGIN + (1 - _MARGIN) * softplus(raw + LOG_E_MINUS_1)
        alpha, one_plus_m = scale.unbind(-1)
        return centre, self.dim**0.5 * alpha, _excess(raw[..., 1], one_plus_m), one_plus_m

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        centre, alpha, m, one_plus_m = self._radial_parameters(context)
        offset = z - centre
        p, across, along = _scales(_norm(offset), alpha, one_plus_m)
        shift = m * p
        return z + shift.unsqueeze(-1) * offset, self._log_det(shift, p, across, along)

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        centre, alpha, m, one_plus_m = self._radial_parameters(context)
        offset = x - centre
        distance = _norm(offset)
        # r² − b r − α·distance = 0. The root of larger size is a sum of positive terms; the product of both is known.
        b = distance - alpha * one_plus_m
        positive = b >= 0
        larger = (torch.where(positive, b, -b) + (b * b + 4 * alpha * distance).sqrt()) / 2
        r = torch.where(positive, larger, alpha * distance / larger)
        p, across, along = _scales(r, alpha, one_plus_m)
        return centre + offset / across.unsqueeze(-1), -self._log_det(m * p, p, across, along)

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        centre, alpha, m, one_plus_m = self._radial_parameters(context)
        offset = z - centre
        r = _norm(offset)
        p, across, along = _scales(r, alpha, one_plus_m)
        with torch.no_grad():
            # At the centre, where both scales are the same, any direction will do: 0 is what autograd says there, too.
            direction = offset / torch.where(r > 0, r, 1.0).unsqueeze(-1)
            # ∇ log_det points along the ray, with dp/dr = −p²/α.
            slope = -(m * p * p / alpha) * ((self.dim - 1) / across + 2 * p / along)
            score = score - slope.unsqueeze(-1) * direction
            # J⁻¹ by Sherman and Morrison; 1/along − 1/across without its cancellation.
            ray = (direction * score).sum(-1) * m * p * (1 - p) / along
            score = (score + ray.unsqueeze(-1) * direction) / across.unsqueeze(-1)
        shift = m * p
        return z + shift.unsqueeze(-1) * offset, self._log_det(shift, p, across, along), score.detach()

    def _log_det(self, shift: Tensor, p: Tensor, across: Tensor, along: Tensor) -> Tensor:
        return (self.dim - 1) * log_one_plus(shift, across) + log_one_plus(shift * p, along)


def _excess(a: Tensor, scale: Tensor) -> Tensor:
    """The scale of a minus 1, to full relative precision."""
    # log(1 + (e − 1) eᵃ) − 1 in a form that keeps the tiny a of the start: softplus minus 1 would lose it.
    excess = (1 - _MARGIN) * torch.log1p((1 - 1 / math.e) * torch.expm1(a.clamp(max=1.0)))
    return torch.where(a < 1, excess, scale - 1)


def _norm(offset: Tensor) -> Tensor:
    """The Euclidean norm, with gradient 0 at 0 (the square root of the sum of squares would give NaN there)."""
    return torch.linalg.vector_norm(offset, dim=-1)


def _scales(r: Tensor, alpha: Tensor, one_plus_m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The fraction p and the eigenvalues of the Jacobian across and along the ray: sums of positive terms."""
    total = alpha + r
    p, q = alpha / total, r / total
    across = torch.addcmul(q, one_plus_m, p)
    return p, across, torch.addcmul(q, p, across)
