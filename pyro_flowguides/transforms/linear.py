r"""Linear transforms: permutations, trainable affine maps and their products. All have closed inverses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear

from ..checks import check_positive_integer
from .base import FlowTransform
from .networks import NEAR_ZERO, FreeParameters


class Permutation(FlowTransform):
    r"""A fixed reordering of the coordinates, :math:`x_i = z_{\pi(i)}`; log_det = 0. O(D) in both directions.

    Arguments:
        permutation: The order π, a tensor or sequence that holds each of 0, …, D − 1 once.

    Raises:
        ValueError: if it is not a permutation.

    Example:
        >>> Permutation([2, 0, 1])(torch.tensor([10.0, 11.0, 12.0]))
        tensor([12., 10., 11.])
    """

    permutation: Tensor
    inverse_permutation: Tensor

    def __init__(self, permutation: Sequence[int] | Tensor) -> None:
        permutation = torch.as_tensor(permutation)
        if permutation.dim() != 1 or not torch.equal(permutation.sort().values.cpu(), torch.arange(len(permutation))):
            raise ValueError(f"Permutation: expected each of 0, …, D − 1 once, got {permutation.tolist()}")
        super().__init__(len(permutation))
        self.register_buffer("permutation", permutation)
        self.register_buffer("inverse_permutation", permutation.argsort())

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z.index_select(-1, self.permutation), z.new_zeros(z.shape[:-1])

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.index_select(-1, self.inverse_permutation), x.new_zeros(x.shape[:-1])

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, log_det = z.index_select(-1, self.permutation), z.new_zeros(z.shape[:-1])
        return x, log_det, score.index_select(-1, self.permutation).detach()


class Reverse(Permutation):
    """The coordinates in reverse order; log_det = 0.

    Arguments:
        dim: The number D of coordinates.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(torch.arange(check_positive_integer("Reverse", "dim", dim)).flip(0))


class LowerTriangularAffine(FlowTransform):
    r"""A trainable affine map :math:`x = Lz + t` with a lower triangular L; starts at x = z.

    .. math:: L = \operatorname{diag}(e^{d}) (I + S / \sqrt{D}), \qquad t = e^{d} \odot \tau, \qquad
        \log|\det J| = \sum_i d_i

    with free vectors d and :math:`\tau` and a free strictly lower triangular S. The scales multiply whole rows, so that
    location and correlations are free in units of the current scale: a step of one size, such as Adam's, suits a wide
    target and a narrow one, and a map that starts narrow takes longer strides as it widens. The factor makes a step of one
    size in every entry of S a step of that size in Lz, whatever D. The push-forward of a standard normal is any
    multivariate normal: a flow that ends with it has its location and covariance free. O(D²) in both directions and for
    the score.

    Arguments:
        dim: The number D of coordinates.
        context_dim: The size of the context that L and t depend on; 0 for none.
        hidden_dims: The hidden layers of the network of the context.
    """

    def __init__(self, dim: int, *, context_dim: int = 0, hidden_dims: Sequence[int] = (32, 32)) -> None:
        super().__init__(dim, context_dim)
        self.below_diagonal: Tensor
        rows, columns = torch.tril_indices(dim, dim, -1)
        self.num_below = dim * (dim - 1) // 2
        self.register_buffer("below_diagonal", rows * dim + columns)
        self.parameters_of = FreeParameters(torch.zeros(2 * dim + self.num_below), context_dim, hidden_dims)

    def _loc_scale_tril_log_det(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        dim = self.dim
        relative_loc, log_scale, below = self.parameters_of(context).split([dim, dim, self.num_below], -1)
        scale = log_scale.exp()
        below_diagonal = _strictly_lower(below / dim**0.5, self.below_diagonal, dim)
        return scale * relative_loc, scale.unsqueeze(-1) * below_diagonal + torch.diag_embed(scale), log_scale.sum(-1)

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loc, scale_tril, log_det = self._loc_scale_tril_log_det(context)
        return affine(scale_tril, z, loc), log_det.expand(z.shape[:-1])

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loc, scale_tril, log_det = self._loc_scale_tril_log_det(context)
        return solve_lower(scale_tril, x - loc), -log_det.expand(x.shape[:-1])

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        loc, scale_tril, log_det = self._loc_scale_tril_log_det(context)
        with torch.no_grad():
            score = solve_lower(scale_tril, score.expand_as(z), transpose=True)
        return affine(scale_tril, z, loc), log_det.expand(z.shape[:-1]), score.detach()


class LowRankAffine(FlowTransform):
    r"""A trainable affine map that costs O(Dr): a diagonal, and r directions that are stretched and mixed; starts at x = z.

    .. math:: x = \operatorname{diag}(e^{d}) \left(z + Q (T - I) Q^\top z + \tau\right), \qquad
        \log|\det J| = \sum_i d_i + \sum_k \log t_{kk}

    with free vectors d and :math:`\tau`, Q of size D × r with orthonormal columns (the QR decomposition of a free matrix), and
    an upper triangular T of size r × r with a positive diagonal. The push-forward of a standard normal is any normal law whose
    covariance is :math:`\operatorname{diag}(e^{d}) (I + Q S Q^\top) \operatorname{diag}(e^{d})` for a symmetric S: a diagonal
    and r directions along which the variance is larger or smaller than that. The inverse is Woodbury's identity,
    :math:`(I + Q (T - I) Q^\top)^{-1} = I + Q (T^{-1} - I) Q^\top`.

    Cost: O(Dr + r²) per point in both directions and for the score, O(Dr²) per call for Q; D (r + 2) + r (r + 1) / 2 parameters.

    Arguments:
        dim: The number D of coordinates.
        rank: The number r of directions; D − 1 where that is less, with which every covariance can be reached.
        context_dim: The size of the context that all but Q depends on; 0 for none.
        hidden_dims: The hidden layers of the network of the context.

    Raises:
        ValueError: if the rank is less than 1.

    Example:
        >>> transform = LowRankAffine(1000, rank=4)
        >>> x, log_det = transform.forward_and_log_det(torch.randn(5, 1000))
        >>> z, _ = transform.inverse_and_log_det(x)
    """

    upper_triangle: Tensor

    def __init__(
        self, dim: int, rank: int = 16, *, context_dim: int = 0, hidden_dims: Sequence[int] = (32, 32)
    ) -> None:
        super().__init__(dim, context_dim)
        # A diagonal scales one coordinate without directions.
        self.rank = rank = min(check_positive_integer("LowRankAffine", "rank", rank), dim - 1)
        rows, columns = torch.triu_indices(rank, rank, 1)
        self.num_above = len(rows)
        self.register_buffer("upper_triangle", rows * rank + columns)
        # Exactly at T = I, Q would have no gradient.
        inner = NEAR_ZERO * torch.randn(rank + self.num_above)
        self.parameters_of = FreeParameters(torch.cat([torch.zeros(2 * dim), inner]), context_dim, hidden_dims)
        if rank:
            self.directions = Parameter(torch.randn(dim, rank))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"

    def _parts(self, context: Tensor | None) -> _LowRank:
        dim, rank = self.dim, self.rank
        relative_loc, log_scale, log_diagonal, above = self.parameters_of(context).split(
            [dim, dim, rank, self.num_above], -1
        )
        log_det = log_scale.sum(-1) + log_diagonal.sum(-1)
        if not rank:
            return _LowRank(relative_loc, log_scale, None, None, log_det)
        zeros = above.new_zeros(*above.shape[:-1], rank * rank)
        # In units of 1/√r, and of the diagonal: a step of one size in all of them moves the point by that size.
        unit = zeros.index_copy(-1, self.upper_triangle, above / rank**0.5).reshape(*above.shape[:-1], rank, rank)
        identity = torch.eye(rank, dtype=above.dtype, device=above.device)
        triangle = log_diagonal.exp().unsqueeze(-1) * (unit + identity)
        return _LowRank(relative_loc, log_scale, torch.linalg.qr(self.directions).Q, triangle, log_det)

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        parts = self._parts(context)
        return parts.forward(z), parts.log_det.expand(z.shape[:-1])

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        parts = self._parts(context)
        y = x * (-parts.log_scale).exp() - parts.relative_loc
        if parts.directions is not None and parts.triangle is not None:
            along = y @ parts.directions
            y = y + (solve_lower(parts.triangle.mT, along, transpose=True) - along) @ parts.directions.mT
        return y, -parts.log_det.expand(x.shape[:-1])

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = self._parts(context)
        with torch.no_grad():
            score = score.expand_as(z)
            if parts.directions is not None and parts.triangle is not None:
                along = score @ parts.directions
                score = score + (solve_lower(parts.triangle.mT, along) - along) @ parts.directions.mT
            score = score * (-parts.log_scale).exp()
        return parts.forward(z), parts.log_det.expand(z.shape[:-1]), score.detach()


class _LowRank(NamedTuple):
    """τ, d, Q, T and log_det of a :class:`LowRankAffine`; Q and T are None without directions."""

    relative_loc: Tensor
    log_scale: Tensor
    directions: Tensor | None
    triangle: Tensor | None
    log_det: Tensor

    def forward(self, z: Tensor) -> Tensor:
        if self.directions is not None and self.triangle is not None:
            along = z @ self.directions
            z = z + (multiply(self.triangle, along) - along) @ self.directions.mT
        return self.log_scale.exp() * (z + self.relative_loc)


class LULinear(FlowTransform):
    r"""A trainable affine map :math:`x = LUz + t`, with L unit lower and U upper triangular; starts at x = z.

    .. math:: L = I + S_L / \sqrt{D}, \qquad U = \operatorname{diag}(e^{d}) (I + S_U / \sqrt{D}), \qquad
        \log|\det J| = \sum_i d_i

    with free strictly triangular :math:`S_L, S_U` and a free vector d. Always invertible. It mixes the coordinates in
    both orders, as a learnable permutation between couplings does: Kingma & Dhariwal (2018), *Glow: generative flow
    with invertible 1×1 convolutions*, arXiv:1807.03039, whose diagonal may change sign and pass through 0; here it
    cannot. The scales multiply whole rows of U, so that a small one does not spoil its condition. O(D²) per
    point in both directions and for the score, by products and solves with the triangular factors; where there are many
    more points than D, forward multiplies the factors first.

    Arguments:
        dim: The number D of coordinates.
        context_dim: The size of the context that L, U and t depend on; 0 for none.
        hidden_dims: The hidden layers of the network of the context.

    Example:
        >>> linear = LULinear(3)
        >>> x, log_det = linear.forward_and_log_det(torch.randn(5, 3))
        >>> z, _ = linear.inverse_and_log_det(x)
    """

    def __init__(self, dim: int, *, context_dim: int = 0, hidden_dims: Sequence[int] = (32, 32)) -> None:
        super().__init__(dim, context_dim)
        # t, and a square matrix that holds S_L, S_U and, in between, d.
        self.parameters_of = FreeParameters(torch.zeros(dim + dim**2), context_dim, hidden_dims)

    def _loc_factors_log_det(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The location t, the lower triangular L and Uᵀ, and log_det."""
        loc, packed = self.parameters_of(context).split([self.dim, self.dim**2], -1)
        entries = packed.reshape(*packed.shape[:-1], self.dim, self.dim)
        log_diagonal = entries.diagonal(dim1=-2, dim2=-1)
        identity = torch.eye(self.dim, dtype=loc.dtype, device=loc.device)
        entries = entries / self.dim**0.5
        upper = (identity + entries.triu(1)) * log_diagonal.exp().unsqueeze(-1)
        return loc, identity + entries.tril(-1), upper.mT, log_diagonal.sum(-1)

    def _multiply(self, loc: Tensor, lower: Tensor, upper_transposed: Tensor, z: Tensor) -> Tensor:
        upper = upper_transposed.mT
        # Many points are cheaper with the product of the factors, few with the factors. (A trace has no sizes to ask.)
        if lower.dim() == 2 and not torch.jit.is_tracing() and z.numel() > 2 * self.dim**2:  # type: ignore[attr-defined]
            return affine(lower @ upper, z, loc)
        return affine(lower, multiply(upper, z), loc)

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loc, lower, upper_transposed, log_det = self._loc_factors_log_det(context)
        return self._multiply(loc, lower, upper_transposed, z), log_det.expand(z.shape[:-1])

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        loc, lower, upper_transposed, log_det = self._loc_factors_log_det(context)
        z = solve_lower(upper_transposed, solve_lower(lower, x - loc), transpose=True)
        return z, -log_det.expand(x.shape[:-1])

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        loc, lower, upper_transposed, log_det = self._loc_factors_log_det(context)
        with torch.no_grad():
            score = solve_lower(lower, solve_lower(upper_transposed, score.expand_as(z)), transpose=True)
        x = self._multiply(loc, lower, upper_transposed, z)
        return x, log_det.expand(z.shape[:-1]), score.detach()


def _strictly_lower(packed: Tensor, below_diagonal: Tensor, dim: int) -> Tensor:
    """The matrices with the packed entries at the flat indices ``below_diagonal``, and 0 elsewhere."""
    zeros = packed.new_zeros(*packed.shape[:-1], dim * dim)
    return zeros.index_copy(-1, below_diagonal, packed).reshape(*packed.shape[:-1], dim, dim)


def multiply(matrix: Tensor, vector: Tensor) -> Tensor:
    """``matrix @ vector`` over any batch shapes; a matrix of one dimension is a diagonal."""
    if matrix.dim() == 1:
        return matrix * vector
    if matrix.dim() == 2:
        return vector @ matrix.mT
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def affine(matrix: Tensor, vector: Tensor, offset: Tensor) -> Tensor:
    """``matrix @ vector + offset`` over any batch shapes, in one kernel where matrix and offset have none."""
    if matrix.dim() == 2 and offset.dim() == 1:
        return linear(vector, matrix, offset)
    return multiply(matrix, vector) + offset


def solve_lower(matrix: Tensor, vector: Tensor, transpose: bool = False) -> Tensor:
    """``matrix⁻¹ @ vector``, or with the transposed matrix; a matrix of one dimension is a diagonal."""
    if matrix.dim() == 1:
        return vector / matrix
    matrix = matrix.mT if transpose else matrix
    if matrix.dim() == 2:
        # One factor and many right-hand sides as rows: a batch of one-column solves is much slower.
        rows = vector.reshape(-1, vector.shape[-1])
        return torch.linalg.solve_triangular(matrix.mT, rows, upper=not transpose, left=False).reshape(vector.shape)
    return torch.linalg.solve_triangular(matrix, vector.unsqueeze(-1), upper=transpose).squeeze(-1)
