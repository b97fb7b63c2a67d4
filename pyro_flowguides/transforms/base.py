r"""The contract of a transform, its composition and inversion, and the numerical inverses.

A transform maps z (base space) to x (target space). ``forward`` is z → x, the sampling direction; ``inverse`` is x → z. Every
call returns ``log_det``, the log absolute determinant of the Jacobian of *that* call, with the batch shape of its input.

Training a flow by variational inference needs the sampling direction alone: draw z, push it forward, and

.. math:: \log q(x) = \log q_0(z) - \log\left|\det \frac{\partial x}{\partial z}\right| .
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions import constraints

from ..checks import check_positive_integer
from .nan import is_detecting_nan, refuse_nan
from .numerics import Recomputed, linearize, solve_newton, sum_tensors, value_and_pull_back


def _checked_forward(method: Callable) -> Callable:
    @functools.wraps(method)
    def forward_and_log_det(self: Any, z: Tensor, context: Tensor | None = None) -> Any:
        z, context = self.check_input(z, context)
        return method(self, z, context)

    return forward_and_log_det


def _checked_inverse(method: Callable) -> Callable:
    @functools.wraps(method)
    def inverse_and_log_det(self: Any, x: Tensor, context: Tensor | None = None) -> Any:
        x, context = self.check_input(x, context)
        return method(self, x, context)

    return inverse_and_log_det


def _checked_score(method: Callable) -> Callable:
    @functools.wraps(method)
    def forward_with_score(self: Any, z: Tensor, score: Tensor, context: Tensor | None = None) -> Any:
        z, context = self.check_input(z, context)
        return method(self, z, score, context)

    return forward_with_score


# The methods that a family writes, each with the function that puts the check of its input before it.
_CHECKED: dict[str, Callable[[Callable], Callable]] = {
    "forward_and_log_det": _checked_forward,
    "inverse_and_log_det": _checked_inverse,
    "forward_with_score": _checked_score,
}


class FlowTransform(TransformModule):
    r"""A learnable bijection of :math:`\mathbb{R}^D` with its log-determinant in both directions.

    A subclass writes the maths of one method, :meth:`forward_and_log_det`; everything else has a working default here. Where
    a family knows better (an analytic inverse, a closed-form inverse Jacobian) it overrides :meth:`inverse_and_log_det` and
    :meth:`forward_with_score`. These three methods of a subclass run after :meth:`check_input`: they get a point whose shape
    is right, broadcast with the context, and need no check of their own.

    A transform is also a ``torch.distributions.Transform`` and a ``pyro.distributions.TransformModule``, so it can be used in
    ``pyro.distributions.TransformedDistribution``. No tensor is ever cached on it: points that were not produced by it can be
    scored, and it can be copied, pickled and traced at any time.

    Arguments:
        dim: The number :math:`D` of coordinates, at least 1.
        context_dim: The size of the context vector that the parameters depend on; 0 for an unconditional transform.

    Raises:
        ValueError: if ``dim < 1`` or ``context_dim < 0``.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, checked in _CHECKED.items():
            if isinstance(method := vars(cls).get(name), types.FunctionType):
                setattr(cls, name, checked(method))

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__()
        self.dim = check_positive_integer(type(self).__name__, "dim", dim)
        if context_dim < 0:
            raise ValueError(f"{type(self).__name__}: context_dim must be at least 0, got {context_dim}")
        self.context_dim = context_dim

    # --- what a family implements ---------------------------------------------------------------------------------------

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps z to x.

        Arguments:
            z: Points of the base space, shape ``batch_shape + (dim,)``.
            context: The context, shape ``context_batch_shape + (context_dim,)``; its batch shape broadcasts with the one of z.

        Returns:
            x of the (broadcast) shape of z, and ``log|det ∂x/∂z|`` of shape ``batch_shape``.

        Raises:
            ValueError: if the last dimension of z or of the context is wrong, or a context is missing or not wanted.
            TypeError: if z is not of a floating-point type.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward_and_log_det")

    @_checked_inverse
    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Maps x to z; ``log_det`` is ``log|det ∂z/∂x|``.

        The default solves ``forward(z) = x`` by :func:`solve_newton`, with gradients to x, the context and the parameters by
        the implicit function theorem. A point at which the solver does not converge comes back as NaN. Cost: some tens of
        forward passes, each with D vector-Jacobian products and one solve of size D.
        """

        def forward(z: Tensor) -> tuple[Tensor, Tensor]:
            return self.forward_and_log_det(z, context)

        with torch.no_grad():
            solution = solve_newton(lambda z: linearize(forward, z)[::2], x)
            jacobian = linearize(forward, solution)[2]
        # One Newton step with the Jacobian held fixed: its value polishes the solution, its derivative is the implicit one.
        residual = forward(solution)[0] - x
        z = solution - torch.linalg.solve(jacobian, residual.unsqueeze(-1)).squeeze(-1)
        return z, -forward(z)[1]

    @_checked_score
    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        r"""Maps z to x and carries the score :math:`s = \nabla \log q` along, in one pass.

        .. math:: s_x = J^{-\top}\left(s_z - \nabla_z \log|\det J|\right), \qquad J = \frac{\partial x}{\partial z}.

        The outgoing score is detached from the graph: this is what the path gradient (Roeder et al. 2017, arXiv:1703.09194)
        needs. The recursion: Vaitl et al. (2024), *Fast and unified path gradient estimators for normalizing flows*,
        arXiv:2403.15881. The default builds the Jacobian by D vector-Jacobian products and solves a system of size D.

        Arguments:
            z: Points of the base space, shape ``batch_shape + (dim,)``.
            score: The gradient of the log-density at z, of the shape of z.
            context: As in :meth:`forward_and_log_det`.

        Returns:
            x, ``log|det ∂x/∂z|`` and the score at x.
        """
        x, log_det, jacobian, log_det_gradient = linearize(lambda z: self.forward_and_log_det(z, context), z)
        with torch.no_grad():
            score = torch.linalg.solve(jacobian.mT, (score - log_det_gradient).unsqueeze(-1)).squeeze(-1)
        return x, log_det, score.detach()

    def recompute(self, result: Tensor, context: Tensor | None = None, *, inverse: bool = False) -> Recomputed:
        """Finds a point again from its image, and maps it once more, now with a graph.

        :class:`~pyro_flowguides.transforms.Reversible` calls it in its backward pass. The default calls both directions; a
        family that can share work between the two overrides it.

        Arguments:
            result: What forward has returned for the point.
            context: As in :meth:`forward_and_log_det`.
            inverse: Whether it is the inverse that has returned it.
        """
        there, back = self.forward_and_log_det, self.inverse_and_log_det
        if inverse:
            there, back = back, there
        with torch.no_grad():
            point, _ = back(result, context)
        with torch.enable_grad():
            point = point.detach().requires_grad_()
            image, log_det = there(point, context)
            return Recomputed((point,), (image,), log_det, lambda point: (point,), lambda point: point)

    # --- derived -------------------------------------------------------------------------------------------------------

    def condition(self, context: Tensor) -> FlowTransform:
        """The same transform with its context bound: a transform without context that shares the parameters."""
        return Conditioned(self, context)

    @property
    def stochastic_log_det(self) -> bool:
        """Whether log_det is a random estimate, whose noise is right on average in a gradient, never in importance weights."""
        return False

    @property
    def closed_inverse(self) -> bool:
        """Whether the inverse is a formula, exact to rounding at about the cost of forward, and no iteration.

        A transform that solves for its inverse in :meth:`inverse_and_log_det` overrides this with False.
        """
        return type(self).inverse_and_log_det is not FlowTransform.inverse_and_log_det

    @property
    def inv(self) -> FlowTransform:
        """The inverse transform; it shares the parameters of this one."""
        return Inverse(self)

    @property
    def sign(self) -> int:
        """+1 by convention, since torch uses it for univariate transforms only, but serialising a module reads it."""
        return 1

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """This transform itself: flow transforms keep no cache."""
        return self

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The log-determinant of the map from x to y, recomputed from x; torch's names."""
        return self.forward_and_log_det(x)[1]

    def _call(self, z: Tensor) -> Tensor:
        return self.forward_and_log_det(z)[0]

    def _inverse(self, x: Tensor) -> Tensor:
        return self.inverse_and_log_det(x)[0]

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)

    def extra_repr(self) -> str:
        return f"dim={self.dim}" + (f", context_dim={self.context_dim}" if self.context_dim else "")

    def check_input(self, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Checks a point and its context, and broadcasts the point to their common batch shape.

        It runs before the methods of a subclass by itself. Within :func:`detect_nan` it refuses NaN.
        """
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            # Sizes are tensors there, and their comparison would become part of the trace.
            return value, context
        name = type(self).__name__
        if not value.is_floating_point():
            raise TypeError(f"{name} works on floating-point tensors, got {value.dtype}")
        if value.dim() == 0 or value.shape[-1] != self.dim:
            raise ValueError(
                f"{name}: the last dimension of its input must be dim = {self.dim}, got shape {tuple(value.shape)}"
            )
        if is_detecting_nan():
            refuse_nan(name, {"its input": value, "its context": context})
        if self.context_dim == 0:
            if context is not None:
                raise ValueError(f"{name} has no context (context_dim = 0), but was given one")
            return value, None
        if context is None:
            raise ValueError(
                f"{name} needs a context of size {self.context_dim}: pass context, or use condition(context)"
            )
        if context.dim() == 0 or context.shape[-1] != self.context_dim:
            raise ValueError(
                f"{name}: the last dimension of the context must be context_dim = {self.context_dim}, "
                f"got shape {tuple(context.shape)}"
            )
        batch_shape = torch.broadcast_shapes(value.shape[:-1], context.shape[:-1])
        return value.expand(*batch_shape, self.dim), context


class Compose(FlowTransform):
    r"""Transforms applied one after the other: :math:`x = f_K(\dots f_1(z))`; the log-determinants add.

    The context goes to every part that takes one.

    Arguments:
        transforms: The parts, first applied first. Their ``dim`` must agree, and so must their ``context_dim`` where it is
            not 0.

    Raises:
        ValueError: if there is no part, or the sizes differ.

    Example:
        >>> from pyro_flowguides.transforms import AffineCoupling, Reverse
        >>> flow = Compose([AffineCoupling(3), Reverse(3)])
        >>> x, log_det = flow.forward_and_log_det(torch.zeros(5, 3))
        >>> x.shape, log_det.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(self, transforms: Iterable[FlowTransform]) -> None:
        transforms = list(transforms)
        if not transforms:
            raise ValueError("Compose needs at least one transform")
        dims = [transform.dim for transform in transforms]
        if len(set(dims)) > 1:
            raise ValueError(f"Compose: all transforms must have the same dim, got {dims}")
        context_dims = {transform.context_dim for transform in transforms} - {0}
        if len(context_dims) > 1:
            raise ValueError(f"Compose: the transforms take contexts of different sizes, {sorted(context_dims)}")
        super().__init__(dims[0], context_dim=max(context_dims, default=0))
        self.transforms: Any = nn.ModuleList(transforms)

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.transforms[0].domain

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.transforms[-1].codomain

    @property
    def stochastic_log_det(self) -> bool:
        return any(transform.stochastic_log_det for transform in self.transforms)

    @property
    def closed_inverse(self) -> bool:
        return all(transform.closed_inverse for transform in self.transforms)

    def _context_of(self, transform: Any, context: Tensor | None) -> Tensor | None:
        return context if transform.context_dim else None

    def _check_part(self, index: int, results: dict[str, Tensor | None]) -> None:
        """Within :func:`detect_nan`, an error for NaN that a part has returned: its input had none."""
        if is_detecting_nan():
            part = f"{type(self.transforms[index]).__name__}, part {index} of {type(self).__name__}"
            refuse_nan(part, {f"the {name} it returned": value for name, value in results.items()})

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_dets = z, []
        for index, transform in enumerate(self.transforms):
            x, log_det = transform.forward_and_log_det(x, self._context_of(transform, context))
            self._check_part(index, {"x": x, "log_det": log_det})
            log_dets.append(log_det)
        return x, sum_tensors(log_dets)

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_dets = x, []
        for index, transform in reversed(list(enumerate(self.transforms))):
            z, log_det = transform.inverse_and_log_det(z, self._context_of(transform, context))
            self._check_part(index, {"z, going back": z, "log_det, going back": log_det})
            log_dets.append(log_det)
        return z, sum_tensors(log_dets)

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, log_dets = z, []
        for index, transform in enumerate(self.transforms):
            x, log_det, score = transform.forward_with_score(x, score, self._context_of(transform, context))
            self._check_part(index, {"x": x, "log_det": log_det, "score": score})
            log_dets.append(log_det)
        return x, sum_tensors(log_dets), score

    def intermediates(self, z: Tensor, context: Tensor | None = None) -> list[Tensor]:
        """Every step of the way: ``[z, f_1(z), f_2(f_1(z)), …, x]``."""
        z, context = self.check_input(z, context)
        steps = [z]
        for transform in self.transforms:
            steps.append(transform.forward_and_log_det(steps[-1], self._context_of(transform, context))[0])
        return steps


class Inverse(FlowTransform):
    """The inverse of a transform, sharing its parameters: its forward is the other's inverse.

    The score goes through without a linear solve: with :math:`x = f^{-1}(z)` it is one vector-Jacobian product of f at x,
    :math:`s_x = J_f^\\top s_z + \\nabla_x \\log|\\det J_f|`.
    """

    def __init__(self, transform: FlowTransform) -> None:
        super().__init__(transform.dim, transform.context_dim)
        self.transform = transform

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.transform.codomain

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.transform.domain

    @property
    def stochastic_log_det(self) -> bool:
        return self.transform.stochastic_log_det

    @property
    def closed_inverse(self) -> bool:
        # Forward of every family is a formula; that of an inverse is what the inverse of the other is.
        return not isinstance(self.transform, Inverse) or self.transform.transform.closed_inverse

    @property
    def inv(self) -> FlowTransform:
        return self.transform

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_log_det(z, context)

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_log_det(x, context)

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, log_det = self.transform.inverse_and_log_det(z, context)
        with torch.no_grad():
            _, pull_back = value_and_pull_back(lambda point: self.transform.forward_and_log_det(point, context), x)
            (score,) = pull_back((score.expand_as(x), torch.ones_like(log_det)))
        return x, log_det, score.detach()

    def recompute(self, result: Tensor, context: Tensor | None = None, *, inverse: bool = False) -> Recomputed:
        return self.transform.recompute(result, context, inverse=not inverse)


class Conditioned(FlowTransform):
    """A transform with its context bound; made by :meth:`FlowTransform.condition`."""

    def __init__(self, transform: FlowTransform, context: Tensor) -> None:
        super().__init__(transform.dim)
        self.transform = transform
        self.context = context

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.transform.domain

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return self.transform.codomain

    @property
    def stochastic_log_det(self) -> bool:
        return self.transform.stochastic_log_det

    @property
    def closed_inverse(self) -> bool:
        return self.transform.closed_inverse

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_log_det(z, self.context)

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_log_det(x, self.context)

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.transform.forward_with_score(z, score, self.context)
