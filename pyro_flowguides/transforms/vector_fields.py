r"""Vector fields f(t, x) of continuous flows, with what a flow needs of their Jacobian J = ∂f/∂x.

A solve of :class:`~pyro_flowguides.transforms.Continuous` binds its field to a context once (``bind``), and asks the result
for rates at one time after the other: the velocity f, the trace tr J, and for the score
:math:`-J^\top s - \nabla \operatorname{tr} J`.

Ridges have all of these in closed form. With columns :math:`u_m` of U, :math:`w_m` of W and gates :math:`g_m(t)`,

.. math::

    f(t, x) = \sum_{m=1}^M g_m(t)\, u_m \tanh(r_m), \quad r_m = w_m^\top x + b_m + c_m t, \qquad
    \operatorname{tr} J = \sum_m g_m(t)\, h'(r_m)\, u_m^\top w_m, \qquad h' = 1 - \tanh^2,

    J^\top s + \nabla \operatorname{tr} J = \sum_m g_m(t)\, h'(r_m) \left(u_m^\top s - 2 \tanh(r_m)\, u_m^\top w_m\right) w_m,

at a cost of O(DM). Chen, Rubanova, Bettencourt & Duvenaud (2018), *Neural ordinary differential equations*, arXiv:1806.07366,
section 4. The rate of the score: Vaitl, Nicoli, Nakajima & Kessel (2022), *Path-gradient estimators for continuous normalizing
flows*, arXiv:2206.09016.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..checks import check_positive_integer
from .linear import affine, multiply
from .networks import NEAR_ZERO, FreeParameters, scale_parameters
from .numerics import value_and_pull_back

Time = float | Tensor


class BoundField(Protocol):
    """A vector field at one context, for one solve."""

    def velocity(self, t: Time, x: Tensor) -> Tensor:
        """f(t, x), of the shape of x."""
        ...

    def rates(self, t: Time, x: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity, and tr J of the batch shape of x."""
        ...

    def rates_with_score(self, t: Time, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Velocity, trace, and without graph the rate of the score, −Jᵀs − ∇ tr J."""
        ...

    def squared_norm(self, t: Time, x: Tensor) -> Tensor:
        """The squared Frobenius norm of J, or an unbiased estimate of it."""
        ...


# --- ridges -----------------------------------------------------------------------------------------------------------


class Ridges(NamedTuple):
    """Ridges at one context; the shapes are ``(D, M)`` and ``(M,)``, with the batch shape of the context before them.

    ``products`` are uᵀw of every ridge.
    """

    out: Tensor
    into: Tensor
    products: Tensor
    shift: Tensor
    drift: Tensor
    gate_level: Tensor
    gate_slope: Tensor

    def _at(self, t: Time, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tanh, and with the gate of every ridge tanh and its derivative."""
        h = torch.tanh(affine(self.into.mT, x, self.shift + t * self.drift))
        gate = 2 * torch.sigmoid(self.gate_level + (t - 0.5) * self.gate_slope)
        gated = gate * h
        # Rates are sums over ridges, so that a derivative near 0 needs no digits of its own.
        return h, gated, torch.addcmul(gate, gated, h, value=-1)

    def velocity(self, t: Time, x: Tensor) -> Tensor:
        _, gated, _ = self._at(t, x)
        return multiply(self.out, gated)

    def rates(self, t: Time, x: Tensor) -> tuple[Tensor, Tensor]:
        _, gated, slope = self._at(t, x)
        return multiply(self.out, gated), (slope * self.products).sum(-1)

    def rates_with_score(self, t: Time, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, gated, slope = self._at(t, x)
        with torch.no_grad():
            inner = slope * (2 * self.products * h - multiply(self.out.mT, score))
            rate = multiply(self.into, inner)
        return multiply(self.out, gated), (slope * self.products).sum(-1), rate

    def squared_norm(self, t: Time, x: Tensor) -> Tensor:
        """‖U diag(g h′) Wᵀ‖², by the Gram matrices of U and W."""
        _, _, slope = self._at(t, x)
        gram = (self.out.mT @ self.out) * (self.into.mT @ self.into)
        return (slope * multiply(gram, slope)).sum(-1)


class PlanarField(nn.Module):
    r"""M ridges, each along a direction :math:`w_m` and with a push :math:`u_m` of its own.

    .. math:: f(t, x) = \sum_{m=1}^M g_m(t)\, u_m \tanh(w_m^\top x / \sqrt D + b_m + c_m t),
       \qquad g_m(t) = 2 \sigma(a_m + k_m (t - \tfrac12)).

    The gates let ridges act at different times, over which they are spread at the start, and :math:`c_m` lets ridges move. The
    push starts at 0, so that the flow starts as the identity. The field is bounded, so that no start leads to infinity. It learns
    best with larger steps than networks do, see :class:`~pyro_flowguides.AutoContinuousFlow`. The field of a planar flow in
    continuous time: Chen et al. (2018), arXiv:1806.07366, section 4.1.

    Arguments:
        dim: The number D of coordinates.
        num_units: The number M of ridges; any number, also above D.
        context_dim: The size of a context that all parameters depend on; 0 for none.
        hidden_dims: The hidden layers of the network of the context.

    Raises:
        ValueError: if a size is smaller than 1.
    """

    def __init__(
        self, dim: int, num_units: int = 32, *, context_dim: int = 0, hidden_dims: Sequence[int] = (32, 32)
    ) -> None:
        super().__init__()
        self.dim = check_positive_integer(type(self).__name__, "dim", dim)
        self.num_units = check_positive_integer(type(self).__name__, "num_units", num_units)
        self.context_dim = context_dim
        initial = [*self._initial_ridges(), torch.randn(num_units), torch.zeros(2 * num_units)]
        # Half of the gates close while time runs, the others open, most of them by a factor of 4 and more.
        initial.append(3 * torch.randn(num_units))
        self.parameters_of = FreeParameters(torch.cat([part.flatten() for part in initial]), context_dim, hidden_dims)

    def _initial_ridges(self) -> tuple[Tensor, Tensor]:
        """What U and W are made of."""
        # A push of exactly 0 would leave all else without a gradient.
        return NEAR_ZERO * torch.randn(self.dim, self.num_units), torch.randn(self.dim, self.num_units)

    def _matrices(self, out: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
        """U and W: steps of one size in all entries of W move the ridges by that size, whatever D is."""
        shape = *out.shape[:-1], self.dim, self.num_units
        return out.reshape(shape), into.reshape(shape) / self.dim**0.5

    def bind(self, context: Tensor | None = None) -> Ridges:
        """The ridges at a context."""
        parameters = self.parameters_of(context)
        size = (parameters.shape[-1] - 4 * self.num_units) // 2
        out, into, *vectors = parameters.split([size, size, *[self.num_units] * 4], -1)
        out, into = self._matrices(out, into)
        return Ridges(out, into, (out * into).sum(-2), *vectors)

    def forward(self, t: Time, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The velocity at x, shape ``batch_shape + (dim,)``."""
        return self.bind(context).velocity(t, x)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_units={self.num_units}"


class SylvesterField(PlanarField):
    r"""M ridges that act together in a subspace with an orthonormal basis Q.

    .. math:: f(t, x) = Q R\, g(t) \tanh(\tilde R\, Q^\top x + b + c\, t), \qquad
       \operatorname{tr} J = \sum_{m=1}^M g_m(t)\, h'_m\, (\tilde R R)_{mm}.

    It is :class:`PlanarField` with :math:`U = QR` and :math:`W = Q\tilde R^\top`: what moves and what is looked at is the same
    subspace of :math:`M \le D` dimensions. R and :math:`\tilde R` are square and need not be triangular as in the discrete
    Sylvester flow (van den Berg et al. 2018, arXiv:1803.05649): the trace is cheap for all of them. The basis comes from a QR
    decomposition per solve, O(DM²); it is the same for every context.

    Arguments:
        dim: The number D of coordinates.
        num_units: The number M of directions, at most D.
        context_dim: The size of a context that all parameters but Q depend on; 0 for none.
        hidden_dims: The hidden layers of the network of the context.

    Raises:
        ValueError: if a size is smaller than 1, or M is larger than D.
    """

    def __init__(
        self, dim: int, num_units: int | None = None, *, context_dim: int = 0, hidden_dims: Sequence[int] = (32, 32)
    ) -> None:
        num_units = min(dim, 32) if num_units is None else num_units
        if num_units > dim:
            raise ValueError(f"SylvesterField: num_units must be at most dim = {dim}, got {num_units}")
        super().__init__(dim, num_units, context_dim=context_dim, hidden_dims=hidden_dims)
        # In one dimension a unit vector has no degree of freedom.
        self.basis = nn.Parameter(torch.randn(dim, num_units)) if dim > 1 else None

    def _initial_ridges(self) -> tuple[Tensor, Tensor]:
        size = self.num_units
        return NEAR_ZERO * torch.randn(size, size), torch.randn(size, size)

    def _matrices(self, out: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
        size = self.num_units
        shape = *out.shape[:-1], size, size
        out, into = out.reshape(shape), into.reshape(shape) / size**0.5
        if self.basis is None:
            return out, into
        q, r = torch.linalg.qr(self.basis)
        # The sign of a column would jump where an entry of the matrix crosses 0, see transforms/sylvester.py.
        q = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
        return q @ out, q @ into


# --- networks and functions of the user's own -------------------------------------------------------------------------


class NetworkField(nn.Module):
    r"""A fully connected network of x, t and the context, with tanh between its layers: the field of FFJORD.

    Each layer is a "concatsquash" layer, :math:`(W y + b)\, \sigma(G\,[t, c] + g) + S\,[t, c]`. The last one starts near 0. Tanh
    bounds the field, so that no start leads to infinity. Grathwohl, Chen, Bettencourt, Sutskever & Duvenaud (2019), *FFJORD:
    free-form continuous dynamics for scalable reversible generative models*, arXiv:1810.01367.

    Arguments:
        dim: The number D of coordinates.
        hidden_dims: The hidden layers, at least one.
        context_dim: The size of a context, a further input; 0 for none.

    Raises:
        ValueError: if a size is smaller than 1, or there is no hidden layer.
    """

    def __init__(self, dim: int, hidden_dims: Sequence[int] = (32, 32), *, context_dim: int = 0) -> None:
        super().__init__()
        check_positive_integer("NetworkField", "dim", dim)
        sizes = [dim, *hidden_dims, dim]
        if len(sizes) < 3 or min(sizes) < 1:
            raise ValueError(
                f"NetworkField: needs hidden_dims with at least one layer and all sizes at least 1, got dim = {dim}, "
                f"hidden_dims = {tuple(hidden_dims)}"
            )
        self.dim = dim
        self.context_dim = context_dim
        layers = [_ConcatSquash(*pair, 1 + context_dim) for pair in pairwise(sizes)]
        scale_parameters(layers[-1].linear, NEAR_ZERO)
        scale_parameters(layers[-1].shift, NEAR_ZERO)
        self.layers: Any = nn.ModuleList(layers)

    def forward(self, t: Time, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The velocity at x, shape ``batch_shape + (dim,)``."""
        when = torch.zeros_like(x[..., :1]) + t
        if context is not None:
            when = torch.cat([when, context.expand(*x.shape[:-1], self.context_dim)], -1)
        y = x
        for layer in self.layers[:-1]:
            y = torch.tanh(layer(y, when))
        return self.layers[-1](y, when)


class _ConcatSquash(nn.Module):
    def __init__(self, in_features: int, out_features: int, num_conditions: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.gate = nn.Linear(num_conditions, out_features)
        self.shift = nn.Linear(num_conditions, out_features, bias=False)

    def forward(self, x: Tensor, conditions: Tensor) -> Tensor:
        return torch.addcmul(self.shift(conditions), self.linear(x), torch.sigmoid(self.gate(conditions)))


class DifferentiatedField:
    """Any field at one context, with its Jacobian by autograd.

    Arguments:
        field: A function of t and x.
        probe: A vector of random signs per point, of the shape of x, that estimates traces by one product with the Jacobian
            (Hutchinson 1990); None for all D products, which are exact.
    """

    def __init__(self, field: Callable[[Tensor, Tensor], Tensor], probe: Tensor | None) -> None:
        self.field = field
        self.probe = probe

    def velocity(self, t: Time, x: Tensor) -> Tensor:
        # What a user's module does with the time is for tensors.
        return self.field(t if isinstance(t, Tensor) else x.new_full((), t), x)

    def _with_rows(self, t: Time, x: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity, and the rows of its Jacobian that are asked for, ``[row, ..., coordinate]``."""
        velocity, pull_back = value_and_pull_back(lambda point: self.velocity(t, point), x)
        if self.probe is not None:
            return velocity, pull_back(self.probe)[0].unsqueeze(0)
        dim = x.shape[-1]
        basis = torch.eye(dim, dtype=x.dtype, device=x.device).reshape(dim, *[1] * (x.dim() - 1), dim)
        return velocity, torch.func.vmap(lambda row: pull_back(row)[0])(basis.expand(dim, *x.shape))

    def rates(self, t: Time, x: Tensor) -> tuple[Tensor, Tensor]:
        velocity, rows = self._with_rows(t, x)
        if self.probe is not None:
            return velocity, (rows[0] * self.probe).sum(-1)
        return velocity, rows.diagonal(dim1=0, dim2=-1).sum(-1)

    def rates_with_score(self, t: Time, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (velocity, trace), pull_back = value_and_pull_back(lambda point: self.rates(t, point), x)
        with torch.no_grad():
            (rate,) = pull_back((score, torch.ones_like(trace)))
        return velocity, trace, -rate

    def squared_norm(self, t: Time, x: Tensor) -> Tensor:
        return self._with_rows(t, x)[1].square().sum((0, -1))
