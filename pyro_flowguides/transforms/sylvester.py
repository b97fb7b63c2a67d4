r"""Sylvester flows: M ridges that act together, in a subspace with an orthonormal basis.

.. math::

    x = z + Q R \tanh(u), \quad u = \tilde R Q^\top z + b, \qquad
    \log|\det J| = \sum_{i=1}^M \log\left(1 + h'(u_i)\, r_{ii}\tilde r_{ii}\right), \quad h' = 1 - \tanh^2,

for Q of size D × M with orthonormal columns, and upper triangular R and R̃: by Sylvester's identity the determinant
equals that of the triangular matrix :math:`I_M + \operatorname{diag}(h')\tilde R R`. It is invertible when
:math:`r_{ii}\tilde r_{ii} > -1`; both diagonals are :math:`(1 - \delta)\tanh` of a free parameter, δ = 10⁻³. van den
Berg, Hasenclever, Tomczak & Welling (2018), *Sylvester normalizing flows for variational inference*, arXiv:1803.05649.

The inverse: :math:`w = Q^\top z` solves :math:`w + R\tanh(\tilde R w + b) = Q^\top x`. Row i holds no coordinate before
i: from the last to the first, each is the root of an increasing scalar function. Then
:math:`z = x - Q R \tanh(\tilde R w + b)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_positive_integer
from .base import FlowTransform
from .linear import affine, multiply
from .networks import NEAR_ZERO, FreeParameters
from .numerics import log_one_plus, tanh_derivative
from .orthogonal import reflection_factor

_BASES = ("qr", "householder", "triangular")
# Both diagonals stay below this in size. Without a margin tanh reaches 1 in float32, and the log-determinant −∞.
_LARGEST_DIAGONAL = 1 - 1e-3
# At that bound, the worst case, nine steps reach the last digit of float64.
_NUM_NEWTON_STEPS = 10


class Sylvester(FlowTransform):
    r"""The Sylvester flow of van den Berg et al. (2018). Always invertible.

    The three bases are the three flows of the paper. ``"qr"`` (the orthogonal flow; there by an iteration) takes Q from
    the QR decomposition of a free D × M matrix, its signs fixed so that Q is continuous. ``"householder"`` takes the
    first M columns of a product of Householder reflections. ``"triangular"`` has M = D, and for Q the identity or, with
    ``reverse``, the reversal of the coordinates; layers of both kinds should take turns. For D = 1 every basis is 1.

    Cost: O(DM + M²) per point in both directions and for the score; the inverse finds M scalar roots one after the
    other. On top, once per call (once per context, if there is one), O(DM²) for Q and the products with it, of which
    ``"triangular"`` needs none, and O(M³) for R̃R in the inverse and the score.

    Arguments:
        dim: The number D of coordinates.
        num_vectors: The number M of columns of Q, at most D; by default min(D, 8) for ``"qr"`` and D for the others.
        basis: ``"qr"``, ``"householder"`` or ``"triangular"``.
        num_reflections: The number of reflections of ``"householder"``; by default min(D, 8).
        reverse: Whether the Q of ``"triangular"`` is the reversal.
        context_dim: The size of the context that all parameters depend on; 0 for none. With one, leave M = D to the
            other bases: the square matrix behind ``"qr"`` is singular for some contexts, and Q jumps there.
        hidden_dims: The hidden layers of the network of the context.

    Raises:
        ValueError: if the basis is unknown, M is larger than D or (``"triangular"``) not D, or an option of another
            basis is given.

    Example:
        >>> sylvester = Sylvester(5, num_vectors=2)
        >>> sylvester
        Sylvester(
          dim=5, num_vectors=2, basis='qr'
          (parameters_of): FreeParameters()
        )
        >>> x, log_det = sylvester.forward_and_log_det(torch.randn(7, 5))
        >>> z, _ = sylvester.inverse_and_log_det(x)
    """

    upper_triangle: Tensor

    def __init__(
        self,
        dim: int,
        num_vectors: int | None = None,
        *,
        basis: str = "qr",
        num_reflections: int | None = None,
        reverse: bool = False,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (32, 32),
    ) -> None:
        super().__init__(dim, context_dim)
        if basis not in _BASES:
            raise ValueError(f'Sylvester: basis must be "qr", "householder" or "triangular", got {basis!r}')
        if num_reflections is not None and basis != "householder":
            raise ValueError(f'Sylvester: num_reflections is an option of the basis "householder", not of {basis!r}')
        if reverse and basis != "triangular":
            raise ValueError(f'Sylvester: reverse is an option of the basis "triangular", not of {basis!r}')
        if num_vectors is None:
            num_vectors = min(dim, 8) if basis == "qr" else dim
        check_positive_integer("Sylvester", "num_vectors", num_vectors)
        if num_vectors > dim:
            raise ValueError(f"Sylvester: num_vectors must be at most dim = {dim}, got {num_vectors}")
        if basis == "triangular" and num_vectors != dim:
            raise ValueError(f'Sylvester: the basis "triangular" has num_vectors = dim = {dim}, got {num_vectors}')
        if num_reflections is None:
            num_reflections = min(dim, 8)
        check_positive_integer("Sylvester", "num_reflections", num_reflections)
        self.num_vectors = num_vectors
        self.basis = basis
        self.reverse = reverse

        rows, columns = torch.triu_indices(num_vectors, num_vectors, 1)
        # Flat indices: the diagonal first, then the entries above it.
        diagonal = torch.arange(num_vectors) * (num_vectors + 1)
        self.register_buffer("upper_triangle", torch.cat([diagonal, rows * num_vectors + columns]))
        num_basis = {"qr": dim * num_vectors, "householder": num_reflections * dim, "triangular": 0}[basis]
        # In one dimension a unit vector has no degree of freedom but its sign.
        num_basis = num_basis if dim > 1 else 0
        num_above = len(rows)
        self._sizes = [num_basis, num_vectors, num_above, num_vectors, num_above, num_vectors]
        initial = torch.cat(
            [
                torch.randn(num_basis),
                # R at exactly 0 would leave Q, R̃ and b without a gradient, and with R̃ = 0, too, so would be R itself.
                NEAR_ZERO * torch.randn(num_vectors + num_above),
                0.5 + torch.rand(num_vectors),
                torch.randn(num_above),
                torch.zeros(num_vectors),
            ]
        )
        self.parameters_of = FreeParameters(initial, context_dim, hidden_dims)

    @property
    def closed_inverse(self) -> bool:
        return False

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_vectors={self.num_vectors}, basis={self.basis!r}" + (
            ", reverse=True" if self.reverse else ""
        )

    def _ridge_parameters(self, context: Tensor | None) -> _Ridges:
        raw_basis, *packed, shift = self.parameters_of(context).split(self._sizes, -1)
        out = self._upper_triangular(*packed[:2])
        into = self._upper_triangular(*packed[2:])
        product = out.diagonal(dim1=-2, dim2=-1) * into.diagonal(dim1=-2, dim2=-1)
        q = self._orthonormal_columns(raw_basis)
        if q is not None:
            return _Ridges(q, out, into, q @ out, q @ into.mT, shift, product)
        if self.reverse:
            return _Ridges(None, out, into, out.flip(-2), into.mT.flip(-2), shift, product)
        return _Ridges(None, out, into, out, into.mT, shift, product)

    def _upper_triangular(self, raw_diagonal: Tensor, above: Tensor) -> Tensor:
        """A bounded diagonal, and above it entries in units of 1/√M: a step of one size in all of them moves Rh by that size."""
        size, batch_shape = self.num_vectors, above.shape[:-1]
        diagonal = _LARGEST_DIAGONAL * torch.tanh(raw_diagonal)
        zeros = above.new_zeros(*batch_shape, size * size)
        entries = torch.cat([diagonal, above / size**0.5], -1)
        return zeros.index_copy(-1, self.upper_triangle, entries).reshape(*batch_shape, size, size)

    def _orthonormal_columns(self, raw: Tensor) -> Tensor | None:
        """Q, or None where it is a permutation."""
        if raw.shape[-1] == 0:
            return None
        if self.basis == "qr":
            q, r = torch.linalg.qr(raw.reshape(*raw.shape[:-1], self.dim, self.num_vectors))
            # Left alone, the sign of a column follows an entry of the matrix, and jumps where that crosses 0; with a
            # positive diagonal of r it does not. The sign of an exact 0 would wipe the column.
            return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-2)
        vectors = raw.reshape(*raw.shape[:-1], -1, self.dim)
        # A vector that is exactly 0 reflects nothing; the floor only keeps 0/0 out.
        squared_norms = (vectors * vectors).sum(-1, keepdim=True).clamp(min=torch.finfo(raw.dtype).tiny)
        vectors = vectors * squared_norms.rsqrt()
        identity = torch.eye(self.dim, self.num_vectors, dtype=raw.dtype, device=raw.device)
        return identity - vectors.mT @ reflection_factor(vectors)[..., : self.num_vectors]

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ridges = self._ridge_parameters(context)
        u = affine(ridges.q_into.mT, z, ridges.shift)
        h = torch.tanh(u)
        return z + multiply(ridges.q_out, h), _log_det(h, tanh_derivative(u), ridges.product)

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ridges = self._ridge_parameters(context)
        target = multiply(ridges.q.mT, x) if ridges.q is not None else x.flip(-1) if self.reverse else x
        with torch.no_grad():
            w = _solve_coordinates(ridges, target)
            h_prime = tanh_derivative(affine(ridges.into, w, ridges.shift))
        # One joint Newton step with the Jacobian I + R diag(h') R̃ held fixed: its value polishes the solution, its
        # derivative is the implicit one. By Woodbury's identity only I + diag(h') R̃ R is solved with.
        residual = w + multiply(ridges.out, torch.tanh(affine(ridges.into, w, ridges.shift))) - target
        into, out = ridges.into.detach(), ridges.out.detach()
        inner = _solve(h_prime.unsqueeze(-1) * (into @ out), h_prime * multiply(into, residual), upper=True)
        w = w - residual + multiply(out, inner)
        u = affine(ridges.into, w, ridges.shift)
        h = torch.tanh(u)
        return x - multiply(ridges.q_out, h), -_log_det(h, tanh_derivative(u), ridges.product)

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ridges = self._ridge_parameters(context)
        u = affine(ridges.q_into.mT, z, ridges.shift)
        h = torch.tanh(u)
        h_prime = tanh_derivative(u)
        log_det = _log_det(h, h_prime, ridges.product)
        with torch.no_grad():
            # −∂ log_det/∂u; ∇ log_det = Q R̃ᵀ ∂ log_det/∂u.
            curvature = 2 * h * h_prime * ridges.product / _slope(h, h_prime, ridges.product)
            # J^{-T} by Woodbury's identity, J = I + (Q R) diag(h') (Q R̃ᵀ)ᵀ: I + diag(h') (R̃ R)ᵀ is lower triangular.
            product = (ridges.into @ ridges.out).mT
            inner = h_prime * (multiply(ridges.q_out.mT, score) + multiply(product, curvature))
            inner = _solve(h_prime.unsqueeze(-1) * product, inner, upper=False)
            score = score + multiply(ridges.q_into, curvature - inner)
        return z + multiply(ridges.q_out, h), log_det, score.detach()


class _Ridges(NamedTuple):
    """The parameters of all ridges: Q (None: a permutation), R, R̃, Q R, Q R̃ᵀ, b, and the product of the diagonals."""

    q: Tensor | None
    out: Tensor
    into: Tensor
    q_out: Tensor
    q_into: Tensor
    shift: Tensor
    product: Tensor


def _slope(h: Tensor, h_prime: Tensor, product: Tensor) -> Tensor:
    """1 + h'·product as h² + h'·(1 + product): a sum of positive terms."""
    return torch.addcmul(h.square(), h_prime, 1 + product)


def _log_det(h: Tensor, h_prime: Tensor, product: Tensor) -> Tensor:
    return log_one_plus(h_prime * product, _slope(h, h_prime, product)).sum(-1)


def _solve(matrix: Tensor, vector: Tensor, upper: bool) -> Tensor:
    """``(I + matrix)⁻¹ @ vector`` for a triangular matrix."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(identity + matrix, vector.unsqueeze(-1), upper=upper).squeeze(-1)


def _solve_coordinates(ridges: _Ridges, target: Tensor) -> Tensor:
    """The solution w of ``w + R tanh(R̃ w + b) = target``, without graph, from the last coordinate to the first."""
    diagonal_out = ridges.out.diagonal(dim1=-2, dim2=-1)
    diagonal_into = ridges.into.diagonal(dim1=-2, dim2=-1)
    shift, coordinates = ridges.shift, []
    for i in reversed(range(target.shape[-1])):
        # w_i + r_ii tanh(u_i) = target_i, times r̃_ii and plus b_i, is an equation in u_i = r̃_ii w_i + b_i alone.
        u = _solve_ridge(ridges.product[..., i], diagonal_into[..., i] * target[..., i] + shift[..., i])
        w = target[..., i] - diagonal_out[..., i] * torch.tanh(u)
        coordinates.append(w)
        # What this coordinate adds to the rows before it; the rows from here on are not looked at again.
        target = target - ridges.out[..., i] * torch.tanh(u).unsqueeze(-1)
        shift = shift + ridges.into[..., i] * w.unsqueeze(-1)
    return torch.stack(coordinates[::-1], -1)


def _solve_ridge(product: Tensor, target: Tensor) -> Tensor:
    """The solution of ``u + product·tanh(u) = target``.

    On the side of 0 where it lies the function is convex (product < 0) or concave, and Newton's method cannot overshoot
    from a start above the solution, or below it. Two such starts are known: there tanh(u) is at most 1 and at most u.
    """
    size = target.abs()
    bounded, linear = size - product, size / (1 + product)
    u = torch.where(product < 0, torch.minimum(bounded, linear), torch.maximum(bounded, linear))
    for _ in range(_NUM_NEWTON_STEPS):
        h = torch.tanh(u)
        u = u - (u + product * h - size) / _slope(h, tanh_derivative(u), product)
    return torch.copysign(u, target)
