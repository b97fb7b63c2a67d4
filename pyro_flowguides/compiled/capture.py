"""Capturing a training step as one graph.

A step of SVI is Python that runs thousands of small operations. Here they are recorded once, by ``make_fx``, below autograd: the
graph holds the forward pass of model and guide and the backward pass, on plain tensors. What has to be arranged for that:

- The parameters. Pyro finds them by name in its parameter store, modules find them in themselves, closures hold them directly;
  while the step is recorded, all three get the graph's inputs instead (``functional_call`` alone leaves the constrained
  parameters of a guide behind, as constants, with the right loss and without a gradient).
- Pyro looks at values on the way (``.item()``, validation, checks for NaN); all of that is off while a step is recorded. Where
  it has branches for ``torch.jit.trace`` it takes those.

A graph repeats what was recorded, whatever the step has read apart from tensors. So each capture is checked against the step
itself, at the parameters as they are and at moved ones, under the same random numbers, loss and gradient: what a model takes
from Python's own random numbers, or counts, shows there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.fx import GraphModule

from .. import internals
from ..model.recording import CaptureError as CaptureError
from ..model.recording import EverySite, explain
from ..model.recording import check_size as check_size
from ..model.sites import unchanged_random_state
from ..model.substitution import Parameters as Parameters
from ..model.substitution import no_waiting as no_waiting
from ..model.substitution import parameters_in, substituted

# The checks compare sums in another order; what they are after is off by far more.
CHECK_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-7}
# How far the parameters are moved for the second check.
CHECK_STEP = 0.01


class _RememberWrites(internals.TorchDispatchMode):
    """Remembers what tensors from outside held before they were first written to."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self._made_within: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _written_arguments(function, args, kwargs):
            if internals.storage_id(tensor) not in self._made_within and id(tensor) not in self.before:
                self.before[id(tensor)] = tensor, tensor.clone()
        result = function(*args, **kwargs)
        given = {internals.storage_id(leaf) for leaf in _leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = {internals.storage_id(leaf) for leaf in _leaves(result) if isinstance(leaf, Tensor)}
        self._made_within |= made - given
        return result


# They write to the running mean and variance, which their schemas do not say.
_BATCH_NORM = {
    torch.ops.aten.native_batch_norm.default: (3, 4),
    torch.ops.aten.cudnn_batch_norm.default: (3, 4),
    torch.ops.aten.miopen_batch_norm.default: (3, 4),
}


def _written_arguments(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    if function in _BATCH_NORM:
        written = [args[place] for place in _BATCH_NORM[function]]
    else:
        written = internals.written_arguments(function, args, kwargs)
    return [leaf for leaf in _leaves(written) if isinstance(leaf, Tensor)]


def _leaves(tree: Any) -> list[Any]:
    return internals.flatten(tree)[0]


@contextmanager
def without_side_effects(first: Callable[[], Any]) -> Iterator[None]:
    """Runs a function, then what is within; neither leaves a trace in random generators, or in tensors that the function writes.

    The running means of BatchNorm are such tensors; those that the function makes itself keep what they hold.

    Arguments:
        first: The function.
    """
    remember = _RememberWrites()
    try:
        with unchanged_random_state():
            with remember:
                first()
            yield
    finally:
        with torch.no_grad():
            for tensor, value in remember.before.values():
                tensor.copy_(value)


@dataclass(frozen=True)
class Gradients:
    """A loss with its gradients.

    Attributes:
        loss: The loss, detached.
        parameters: The parameters that it depends on.
        gradients: The gradients to them.
    """

    loss: Tensor
    parameters: Parameters
    gradients: tuple[Tensor, ...]

    def gradients_of(self, parameters: Parameters) -> list[Tensor]:
        """The gradients to other parameters; 0 for those that the loss does not depend on."""
        known = dict(zip(map(id, self.parameters.leaves), self.gradients, strict=True))
        return [known.get(id(leaf), torch.zeros_like(leaf)) for leaf in parameters.leaves]


def differentiate(run: Callable[[], Tensor]) -> Gradients:
    """A loss with the gradients to the parameters that SVI would train: those that it meets on its way and depends on.

    Arguments:
        run: Computes the loss.
    """
    with poutine.trace(param_only=True) as capture:
        loss = torch.as_tensor(run())
    met = parameters_in(capture.trace)
    if not met.leaves or not loss.requires_grad:
        return Gradients(loss.detach(), Parameters((), ()), ())
    gradients = torch.autograd.grad(loss, met.leaves, allow_unused=True)
    used = [parts for parts in zip(met.names, met.leaves, gradients, strict=True) if parts[2] is not None]
    names, trained, gradients = zip(*used, strict=True) if used else ((), (), ())
    return Gradients(loss.detach(), Parameters(names, trained), gradients)


def loss_and_gradients(
    run: Callable[[], Tensor], parameters: Parameters, values: Sequence[Tensor], modules: Iterable[nn.Module]
) -> tuple[Tensor, list[Tensor]]:
    """The loss with its gradients, at other values of the parameters than their own; can be recorded."""
    points = [value.detach().requires_grad_() for value in values]
    with torch.enable_grad(), substituted(parameters, points, modules), no_waiting(), internals.branches_for_tracing():
        value = run()
        # Other arguments may use other parameters.
        gradients = torch.autograd.grad(value, points, allow_unused=True, materialize_grads=True)
    return value.detach(), list(gradients)


def record(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> GraphModule:
    """The graph of a function of tensors; every tensor that is not an input becomes a constant of it.

    Raises:
        CaptureError: if the function looks at a value, or its shapes depend on one.
    """
    names: list[str] = []
    try:
        with EverySite(names.append):
            graph = internals.record(function, inputs)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(explain(error, names[-1] if names else None)) from error
    _refuse_dynamic_shapes(graph)
    return graph


def _refuse_dynamic_shapes(graph: GraphModule) -> None:
    """A graph has the shapes of its capture: one that depends on a value would be wrong, or fail, later on."""
    varying: set[Any] = set()
    for node in graph.graph.nodes:
        random_numbers = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op == "placeholder" or random_numbers or any(source in varying for source in node.all_input_nodes):
            varying.add(node)
        selects = node.target is torch.ops.aten.nonzero.default and node in varying
        if node.target is torch.ops.aten.index.Tensor:
            selects = any(index in varying and index.meta["val"].dtype == torch.bool for index in node.args[1] if index)
        if selects:
            raise CaptureError(
                "it selects elements by a condition, so that shapes depend on values; use torch.where or a mask"
            )


def compare(captured: tuple[Tensor, Sequence[Tensor]], eager: tuple[Tensor, Sequence[Tensor]]) -> str | None:
    """What differs between two pairs of loss and gradients; None if nothing does."""
    for what, ours, theirs in [
        ("loss", [captured[0]], [eager[0]]),
        ("gradient", captured[1], eager[1]),
    ]:
        first, second = (torch.cat([part.reshape(-1).double() for part in parts]) for parts in (ours, theirs))
        both = first.isfinite() & second.isfinite()
        if not torch.equal(first.isfinite(), second.isfinite()):
            return what
        tolerance = max(CHECK_TOLERANCE.get(part.dtype, 1e-3) for part in theirs)
        scale = second[both].abs().max() if both.any() else 1.0
        if bool(((first - second)[both].abs() > tolerance * (scale + tolerance)).any()):
            return what
    return None
