r"""The affine map that is found before training and stays as it is, and the scales that it may have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import FlowTransform
from .linear import affine, multiply, solve_lower


@dataclass(frozen=True)
class LowRank:
    r"""A square root of a covariance that is a diagonal and r directions.

    .. math:: L = \operatorname{diag}(d) (I + V \operatorname{diag}(e - 1) V^\top), \qquad
        L L^\top = \operatorname{diag}(d) (I + V \operatorname{diag}(e^2 - 1) V^\top) \operatorname{diag}(d)

    for positive d and e, and V of size D × r with orthonormal columns. Products and solves cost O(Dr).

    Attributes:
        diagonal: d, shape (D,).
        directions: V, shape (D, r).
        stretches: e, shape (r,): the standard deviations along the columns of V, in units of d.
    """

    diagonal: Tensor
    directions: Tensor
    stretches: Tensor

    def _stretched(self, vector: Tensor, stretches: Tensor) -> Tensor:
        return vector + ((stretches - 1) * (vector @ self.directions)) @ self.directions.mT

    def multiply(self, vector: Tensor) -> Tensor:
        """L @ vector, over any batch shapes."""
        return self.diagonal * self._stretched(vector, self.stretches)

    def multiply_transposed(self, vector: Tensor) -> Tensor:
        """Lᵀ @ vector."""
        return self._stretched(self.diagonal * vector, self.stretches)

    def solve(self, vector: Tensor) -> Tensor:
        """L⁻¹ @ vector."""
        return self._stretched(vector / self.diagonal, 1 / self.stretches)

    def solve_transposed(self, vector: Tensor) -> Tensor:
        """L⁻ᵀ @ vector."""
        return self._stretched(vector, 1 / self.stretches) / self.diagonal


# A lower triangular matrix, shape (D, D); the vector of a diagonal, shape (D,); or a diagonal and a few directions.
Scale = Tensor | LowRank


def scaled(scale: Scale, vector: Tensor) -> Tensor:
    """L @ vector, over any batch shapes."""
    return scale.multiply(vector) if isinstance(scale, LowRank) else multiply(scale, vector)


def log_det(scale: Scale) -> Tensor:
    """log|det L|."""
    if isinstance(scale, LowRank):
        return scale.diagonal.log().sum() + scale.stretches.log().sum()
    return (scale if scale.dim() == 1 else scale.diagonal()).log().sum()


def standard_deviations(scale: Scale) -> Tensor:
    """The root of the diagonal of L Lᵀ, shape (D,)."""
    if isinstance(scale, LowRank):
        return scale.diagonal * (1 + scale.directions.square() @ (scale.stretches.square() - 1)).sqrt()
    return scale if scale.dim() == 1 else scale.square().sum(-1).sqrt()


class FixedAffine(FlowTransform):
    r"""An affine map :math:`x = Lz + t` that is not trained: t and L are buffers.

    L is lower triangular with a positive diagonal; or, for a diagonal map, the vector of its diagonal, and both directions cost
    O(D) instead of O(D²); or a diagonal and r directions (:class:`LowRank`), at O(Dr). :meth:`put` and ``load_state_dict`` may
    exchange one kind for another.

    Arguments:
        loc: The location t, shape (D,).
        scale: L, shape (D, D), or its diagonal, shape (D,), or a :class:`LowRank`.

    Raises:
        ValueError: if the shapes do not agree, or the diagonal is not positive.
    """

    loc: Tensor
    scale: Tensor
    directions: Tensor
    stretches: Tensor

    def __init__(self, loc: Tensor, scale: Scale) -> None:
        super().__init__(len(loc))
        first = scale.diagonal if isinstance(scale, LowRank) else scale
        if first.shape not in ((self.dim,), (self.dim, self.dim)):
            raise ValueError(
                f"FixedAffine: scale must have shape ({self.dim},) or ({self.dim}, {self.dim}), got {tuple(first.shape)}"
            )
        diagonal = first if first.dim() == 1 else first.diagonal()
        if not bool((diagonal > 0).all()):
            raise ValueError("FixedAffine: the diagonal of the scale must be positive")
        for name, value in _buffers(loc, scale).items():
            self.register_buffer(name, value.clone())

    @property
    def whole_scale(self) -> Scale:
        """L, as it is given to the class."""
        return LowRank(self.scale, self.directions, self.stretches) if len(self.stretches) else self.scale

    @torch.no_grad()
    def put(self, loc: Tensor, scale: Scale) -> None:
        """Takes another location and scale, of any of the three kinds; in place where the kind is the same."""
        for name, value in _buffers(loc, scale).items():
            self._buffers[name] = self._like(name, value.shape).copy_(value)

    def _like(self, name: str, shape: torch.Size) -> Tensor:
        """The buffer of this name, or a new one where it has another shape."""
        buffer: Tensor = getattr(self, name)
        return buffer if buffer.shape == shape else buffer.new_empty(shape)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        dim, scale = self.dim, state_dict.get(prefix + "scale")
        if scale is not None and scale.shape in ((dim,), (dim, dim)):
            self._buffers["scale"] = self._like("scale", scale.shape)
            directions = state_dict.get(prefix + "directions")
            rank = 0 if directions is None else directions.shape[-1]
            self._buffers["directions"] = self._like("directions", torch.Size([dim, rank]))
            self._buffers["stretches"] = self._like("stretches", torch.Size([rank]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scale = self.whole_scale
        x = scale.multiply(z) + self.loc if isinstance(scale, LowRank) else affine(scale, z, self.loc)
        return x, log_det(scale).expand(z.shape[:-1])

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scale = self.whole_scale
        z = scale.solve(x - self.loc) if isinstance(scale, LowRank) else solve_lower(scale, x - self.loc)
        return z, -log_det(scale).expand(x.shape[:-1])

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, log_det = self.forward_and_log_det(z)
        scale = self.whole_scale
        if isinstance(scale, LowRank):
            return x, log_det, scale.solve_transposed(score).detach()
        return x, log_det, solve_lower(scale, score, transpose=True).detach()


class Standardized(FlowTransform):
    r"""A transform that sees every coordinate in units of its own: :math:`x = t + s \odot f((z - t) / s)`.

    The location t and the units s are buffers; f is trained. Its log-determinant is that of f.

    Arguments:
        inner: The transform f.
        loc: The location t, shape (D,).
        scale: The units s, positive, shape (D,).
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, inner: FlowTransform, loc: Tensor, scale: Tensor) -> None:
        super().__init__(inner.dim, inner.context_dim)
        self.inner = inner
        self.register_buffer("loc", loc.clone())
        self.register_buffer("scale", scale.clone())

    @property
    def closed_inverse(self) -> bool:
        return self.inner.closed_inverse

    @torch.no_grad()
    def put(self, loc: Tensor, scale: Tensor) -> None:
        """Takes another location and other units."""
        self.loc.copy_(loc)
        self.scale.copy_(scale)

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = self.inner.forward_and_log_det((z - self.loc) / self.scale, context)
        return self.loc + self.scale * x, log_det

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = self.inner.inverse_and_log_det((x - self.loc) / self.scale, context)
        return self.loc + self.scale * z, log_det

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        point = (z - self.loc) / self.scale
        x, log_det, score = self.inner.forward_with_score(point, score * self.scale, context)
        return self.loc + self.scale * x, log_det, score / self.scale


def _buffers(loc: Tensor, scale: Scale) -> dict[str, Tensor]:
    """What holds a location and a scale; a scale without directions has none of them, not no buffer for them."""
    if isinstance(scale, LowRank):
        return {"loc": loc, "scale": scale.diagonal, "directions": scale.directions, "stretches": scale.stretches}
    lower = scale if scale.dim() == 1 else scale.tril()
    return {"loc": loc, "scale": lower, "directions": loc.new_zeros(len(loc), 0), "stretches": loc.new_zeros(0)}
