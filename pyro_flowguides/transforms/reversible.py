r"""Composition without stored activations: the backward pass finds them again by inverting the parts.

Plain backpropagation keeps the hidden layers of every part until the backward pass. A flow can do without: from
:math:`x_k = f_k(x_{k-1})` follows :math:`x_{k-1} = f_k^{-1}(x_k)`. So only x is kept. The backward pass goes from the last part
to the first: it inverts the part, runs it again with a graph, and lets the gradient through. Gomez et al. (2017), *The reversible
residual network: backpropagation without storing activations*, arXiv:1707.04585; for couplings Dinh et al. (2015), *NICE*,
arXiv:1410.8516, are invertible as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..checks import warn
from ..internals import is_in_functorch, is_recording
from .base import Compose, Conditioned, FlowTransform
from .nan import can_be_read


class Reversible(Compose):
    r"""A composition whose training keeps no activations: memory does not grow with the number of parts.

    It is the map of :class:`Compose`, in all directions, with the same gradients up to rounding. Kept for the backward pass are
    the result, the context and nothing else, so that the memory of a step beyond parameters and gradients is that of one part.
    The price is time: the backward pass also inverts each part and runs it again. The score of :meth:`forward_with_score` is
    carried through in the forward pass and costs no memory either.

    Parts that are a :class:`Compose` are taken apart, so that ``Reversible([flow])`` is a deep flow part by part, with the
    parameters of the flow. All parts need a closed inverse (``closed_inverse``): couplings, elementwise and linear maps, radial
    layers. Where an inverse is found by iteration, its error would be one of the gradient.

    Rounding is another error of the gradient: a point that went through all parts and back is not the same to the last digit.
    The first call that is differentiated compares the two once, and warns where they differ by more than the root of the
    precision; later, after training, :meth:`round_trip_error` does. Nothing is checked in a captured step.

    Gradients go to the points, the context and the registered parameters of the parts, by ``backward`` and ``autograd.grad``.
    Second derivatives by these raise an error. Under ``torch.func`` (vmap, vjp), ``torch.compile`` and ``torch.jit.trace`` it
    is a plain :class:`Compose`, with the memory of one. Captured steps (:class:`~pyro_flowguides.CompiledSVI`) invert like
    others.

    Arguments:
        transforms: The parts, first applied first, as in :class:`Compose`.

    Raises:
        ValueError: if a part has no closed inverse, or holds a context that was bound with ``condition``; and as
            :class:`Compose`.

    Example:
        >>> from pyro_flowguides import flows
        >>> deep = Reversible([flows.coupling(3, num_layers=64)])
        >>> len(deep.transforms)
        64
        >>> x, log_det = deep.forward_and_log_det(torch.randn(5, 3))
        >>> bool((deep.round_trip_error(torch.randn(5, 3)) < 1e-5).all())
        True
    """

    def __init__(self, transforms: Iterable[FlowTransform]) -> None:
        super().__init__(_taken_apart(transforms))
        for index, part in enumerate(self.transforms):
            if not part.closed_inverse:
                raise ValueError(
                    f"Reversible: part {index}, {type(part).__name__}, has no closed inverse, and the error of its solver would "
                    "be one of the gradient; leave it outside, as in Compose([Reversible(parts), other])"
                )
            if any(isinstance(module, Conditioned) for module in part.modules()):
                raise ValueError(
                    f"Reversible: part {index}, {type(part).__name__}, holds a context, which would get no gradient; bind the "
                    "context of the whole instead, by Reversible(parts).condition(context)"
                )
        self._is_checked = False

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if _is_plain():
            return super().forward_and_log_det(z, context)
        x, log_det = self._without_graph(super().forward_and_log_det, z, context=context)
        return x, log_det

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if _is_plain():
            return super().inverse_and_log_det(x, context)
        z, log_det = self._without_graph(super().inverse_and_log_det, x, context=context, inverse=True)
        return z, log_det

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if _is_plain():
            return super().forward_with_score(z, score, context)
        x, log_det, score = self._without_graph(super().forward_with_score, z, score, context=context)
        return x, log_det, score

    def round_trip_error(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        r"""How far points come back from where they started: :math:`\max_i |f^{-1}(f(z)) - z|_i / \max(1, \max_i |z_i|)`.

        Gradients are wrong by about as much, relative to their size.

        Arguments:
            z: Points, shape ``batch_shape + (dim,)``.
            context: As in :meth:`forward_and_log_det`.

        Returns:
            One number per point, of shape ``batch_shape``, without graph; inf where something is not finite.
        """
        return _round_trip_error(self, z, context)

    def _without_graph(
        self, run: Callable, z: Tensor, *scores: Tensor, context: Tensor | None, inverse: bool = False
    ) -> Any:
        self._check_once(z, context, inverse)
        parameters, steps = _steps(self.transforms)
        return _Forgetful.apply(run, steps, inverse, scores, z, context, *parameters)

    @torch.no_grad()
    def _check_once(self, z: Tensor, context: Tensor | None, inverse: bool) -> None:
        """Warns if the first points that are differentiated do not come back."""
        if self._is_checked or not can_be_read(z):
            return
        self._is_checked = True
        z = self.inverse_and_log_det(z, context)[0] if inverse else z
        error, tolerance = float(_round_trip_error(self, z, context).max()), torch.finfo(z.dtype).eps ** 0.5
        if error <= tolerance:
            return
        errors = []
        for part in self.transforms:
            own_context = self._context_of(part, context)
            errors.append(float(_round_trip_error(part, z, own_context).max()))
            z, _ = part.forward_and_log_det(z, own_context)
        worst = errors.index(max(errors))
        warn(
            f"Reversible: its first points come back from the round trip with a relative error of {error:.1g}, where "
            f"{tolerance:.1g} is allowed, and gradients are wrong by about as much; the largest error of one part is "
            f"{errors[worst]:.1g}, of part {worst}, {type(self.transforms[worst]).__name__}. Correct its inverse, or use float64 "
            "or Compose"
        )


def _is_plain() -> bool:
    """Whether the parts run as they are: no graph is wanted, or one that holds operations and no function in Python."""
    if not torch.is_grad_enabled() or is_in_functorch():
        return True
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def _taken_apart(transforms: Iterable[FlowTransform]) -> Iterator[FlowTransform]:
    for transform in transforms:
        if type(transform) in (Compose, Reversible):
            yield from _taken_apart(transform.transforms)  # type: ignore[attr-defined, arg-type]
        else:
            yield transform


@torch.no_grad()
def _round_trip_error(transform: FlowTransform, z: Tensor, context: Tensor | None) -> Tensor:
    x, _ = transform.forward_and_log_det(z, context)
    z_back, _ = transform.inverse_and_log_det(x, context)
    error = (z_back - z).abs().amax(-1) / z.abs().amax(-1).clamp(min=1.0)
    return error.nan_to_num(nan=torch.inf, posinf=torch.inf)


# --- the backward pass --------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """A part, and where it keeps its parameters: the module, the name there, the number among all parameters."""

    part: FlowTransform
    places: list[tuple[nn.Module, str, int]]


def _steps(parts: Iterable[FlowTransform]) -> tuple[list[Tensor], list[_Step]]:
    """The parameters of all parts, as they are now, and the steps."""
    parameters: list[Tensor] = []
    numbers: dict[int, int] = {}
    steps = []
    for part in parts:
        places = []
        for module in part.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    number = numbers.setdefault(id(parameter), len(parameters))
                    if number == len(parameters):
                        parameters.append(parameter)
                    places.append((module, name, number))
        steps.append(_Step(part, places))
    return parameters, steps


class _Forgetful(torch.autograd.Function):
    """Makes the steps without a graph; its backward pass undoes them one by one."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Callable,
        steps: list[_Step],
        inverse: bool,
        scores: tuple[Tensor, ...],
        point: Tensor,
        context: Tensor | None,
        *parameters: Tensor,
    ) -> Any:
        result, log_det, *scores_there = run(point, *scores, context)
        ctx.steps, ctx.inverse = steps, inverse
        ctx.save_for_backward(result, context, *parameters)
        ctx.mark_non_differentiable(*scores_there)
        return result, log_det, *scores_there

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, log_det_gradient: Tensor, *score_gradients: Any) -> Any:
        result, context, *parameters = ctx.saved_tensors
        apart = _copied if is_recording() else torch.Tensor.detach
        result = apart(result)
        context = None if context is None else _leaf(apart, context)
        # The last one is the gradient to the context.
        totals: list[Tensor | None] = [None] * (len(parameters) + 1)
        for part, places in ctx.steps if ctx.inverse else reversed(ctx.steps):
            leaves = {number: _leaf(apart, parameters[number]) for *_, number in places}
            own_context = context if part.context_dim else None
            with _replaced(places, leaves):
                again = part.recompute(result, own_context, inverse=ctx.inverse)
            if own_context is not None:
                leaves[len(parameters)] = own_context
            wanted = {number: leaf for number, leaf in leaves.items() if leaf.requires_grad}
            # The log-determinant of some parts is a constant.
            outputs = [*zip(again.images, again.split(gradient), strict=True), (again.log_det, log_det_gradient)]
            outputs = [(output, its_gradient) for output, its_gradient in outputs if output.requires_grad]
            gradients = torch.autograd.grad(
                [output for output, _ in outputs],
                [*again.pieces, *wanted.values()],
                [its_gradient for _, its_gradient in outputs],
                allow_unused=True,
            )
            result = again.join(*(piece.detach() for piece in again.pieces))
            gradient = again.join(*gradients[: len(again.pieces)])
            for number, other in zip(wanted, gradients[len(again.pieces) :], strict=True):
                if other is not None:
                    total = totals[number]
                    totals[number] = other if total is None else total + other
        *of_parameters, of_context = totals
        return None, None, None, None, gradient, of_context, *of_parameters


def _copied(tensor: Tensor) -> Tensor:
    """A copy, for a recorded step, which computes once what it would compute twice from the same tensors.

    In the backward pass that would keep the activations of the forward pass until then.
    """
    return tensor.detach().clone()


def _leaf(apart: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    return apart(tensor).requires_grad_(tensor.requires_grad)


@contextmanager
def _replaced(places: list[tuple[nn.Module, str, int]], tensors: Mapping[int, Tensor]) -> Iterator[None]:
    """Puts other tensors in the place of parameters, by their numbers.

    Parameters may be replaced after the forward pass, and hooks on them are for the whole gradient.
    """
    before = [module._parameters[name] for module, name, _ in places]
    try:
        for module, name, number in places:
            module._parameters[name] = tensors[number]  # type: ignore[assignment]
        yield
    finally:
        for (module, name, _), parameter in zip(places, before, strict=True):
            module._parameters[name] = parameter
