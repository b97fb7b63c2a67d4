r"""Orthogonal transforms: rotations and reflections that mix the coordinates and leave volumes alone.

.. math:: x = Qz, \qquad Q^\top Q = I, \qquad \log|\det J| = 0.

The inverse is :math:`z = Q^\top x`, and the score is rotated like the point, since :math:`Q^{-\top} = Q`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_positive_integer
from .base import FlowTransform
from .networks import FreeParameters


class Orthogonal(FlowTransform):
    r"""A trainable rotation by the Cayley transform, :math:`Q = (I + A)^{-1}(I - A)` with :math:`A^\top = -A`.

    A is :math:`(S - S^\top)/\sqrt{D}` with a free strictly lower triangular S; S = 0, the start, is the identity. I + A
    is never singular, and Q is a smooth function of A: unlike the Q of a QR decomposition it never jumps. It reaches
    every rotation without a half turn (an eigenvalue −1), and these in the limit; it reaches no reflection. Cayley
    (1846), *Sur quelques propriétés des déterminants gauches*. Q costs O(D³) per call (per context with one), applying
    it O(D²) in both directions and for the score. For D = 1 it is the identity, without parameters.

    Arguments:
        dim: The number D of coordinates.
        context_dim: The size of the context that A depends on; 0 for none.
        hidden_dims: The hidden layers of the network of the context.

    Example:
        >>> orthogonal = Orthogonal(3)
        >>> x, _ = orthogonal.forward_and_log_det(torch.ones(3))
        >>> bool(torch.isclose(x.norm(), torch.ones(3).norm()))
        True
    """

    def __init__(self, dim: int, *, context_dim: int = 0, hidden_dims: Sequence[int] = (32, 32)) -> None:
        super().__init__(dim, context_dim)
        rows, columns = torch.tril_indices(dim, dim, -1)
        self.register_buffer("below_diagonal", rows * dim + columns)
        self.parameters_of = FreeParameters(torch.zeros(len(rows)), context_dim, hidden_dims) if dim > 1 else None

    def _rotation(self, like: Tensor, context: Tensor | None) -> Tensor:
        identity = torch.eye(self.dim, dtype=like.dtype, device=like.device)
        if self.parameters_of is None:
            return identity
        packed = self.parameters_of(context) / self.dim**0.5
        zeros = packed.new_zeros(*packed.shape[:-1], self.dim**2)
        lower = zeros.index_copy(-1, self.below_diagonal, packed).reshape(*packed.shape[:-1], self.dim, self.dim)
        skew = lower - lower.mT
        # The check of plain solve for a singular matrix would wait for the device; I + A cannot be singular.
        return torch.linalg.solve_ex(identity + skew, identity - skew)[0]

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _rotate(self._rotation(z, context), z), z.new_zeros(z.shape[:-1])

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _rotate(self._rotation(x, context).mT, x), x.new_zeros(x.shape[:-1])

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        rotation = self._rotation(z, context)
        with torch.no_grad():
            score = _rotate(rotation, score.expand_as(z))
        return _rotate(rotation, z), z.new_zeros(z.shape[:-1]), score.detach()


class Householder(FlowTransform):
    r"""A product of reflections, :math:`Q = H_K \dots H_1` with :math:`H_k = I - 2 v_k v_k^\top / \|v_k\|^2`.

    D reflections make any orthogonal matrix; K reflections make every orthogonal matrix that moves at most K directions.
    The vectors start in equal pairs, so that with an even K the product starts as the identity, and the gradients are not 0:
    moving one vector of a pair is a rotation in a plane. Tomczak & Welling (2016), *Improving variational auto-encoders
    using Householder flow*, arXiv:1611.09630. O(K·D) per point in both directions and for the score, by two products with
    K × D matrices; they take O(K²·D) once per call (per context with one).

    Arguments:
        dim: The number D of coordinates.
        num_reflections: K; by default D, made even and at most 8.
        context_dim: The size of the context that the vectors depend on; 0 for none.
        hidden_dims: The hidden layers of the network of the context.

    Raises:
        ValueError: if ``num_reflections`` is smaller than 1.

    Example:
        >>> Householder(3, num_reflections=2).forward_and_log_det(torch.zeros(5, 3))[1]
        tensor([0., 0., 0., 0., 0.])
    """

    def __init__(
        self,
        dim: int,
        *,
        num_reflections: int | None = None,
        context_dim: int = 0,
        hidden_dims: Sequence[int] = (32, 32),
    ) -> None:
        super().__init__(dim, context_dim)
        if num_reflections is None:
            num_reflections = min(dim + dim % 2, 8)
        self.num_reflections = check_positive_integer("Householder", "num_reflections", num_reflections)
        vectors = torch.randn((num_reflections + 1) // 2, dim).repeat_interleave(2, 0)[:num_reflections]
        self.parameters_of = FreeParameters(vectors.reshape(-1), context_dim, hidden_dims)

    def _unit_vectors(self, context: Tensor | None) -> Tensor:
        vectors = self.parameters_of(context)
        vectors = vectors.reshape(*vectors.shape[:-1], self.num_reflections, self.dim)
        # Divided by its largest entry first, a vector of any size has a norm that neither over- nor underflows; a
        # vector that is 0 has no direction, and any will do. Either way the reflection is exact, as log_det = 0 needs.
        largest = vectors.detach().abs().amax(-1, keepdim=True)
        present = largest > 0
        vectors = torch.where(present, vectors / torch.where(present, largest, 1.0), 1.0)
        return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _reflect(z, self._unit_vectors(context)), z.new_zeros(z.shape[:-1])

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _reflect(x, self._unit_vectors(context).flip(-2)), x.new_zeros(x.shape[:-1])

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        unit_vectors = self._unit_vectors(context)
        with torch.no_grad():
            score = _reflect(score.expand_as(z), unit_vectors)
        return _reflect(z, unit_vectors), z.new_zeros(z.shape[:-1]), score.detach()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_reflections={self.num_reflections}"


def _rotate(matrix: Tensor, vector: Tensor) -> Tensor:
    """``matrix @ vector`` over any batch shapes."""
    return vector @ matrix.mT if matrix.dim() == 2 else (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _reflect(vector: Tensor, unit_vectors: Tensor) -> Tensor:
    """The vector after a reflection along each unit vector in turn, ``[..., reflection, coordinate]``."""
    return vector - _rotate(unit_vectors.mT, _rotate(reflection_factor(unit_vectors), vector))


def reflection_factor(unit_vectors: Tensor) -> Tensor:
    r"""The matrix W for which the product of the reflections, the first applied first, is :math:`I - V^\top W`.

    V holds the unit vectors in its rows. The multiple :math:`c_k` of each that is taken from a point z satisfies
    :math:`\tfrac12 c_k + \sum_{j<k} v_k^\top v_j c_j = v_k^\top z`: a triangular system, solved for all z at once.
    Joffrain et al. (2006), *Accumulating Householder transformations, revisited*. A vector that is 0 changes nothing.
    """
    half = torch.eye(unit_vectors.shape[-2], dtype=unit_vectors.dtype, device=unit_vectors.device) / 2
    overlaps = (unit_vectors @ unit_vectors.mT).tril(-1)
    return torch.linalg.solve_triangular(half + overlaps, unit_vectors, upper=False)
