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

import os
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from .. import internals
from ..model.sites import unchanged_random_state

# Recording takes about a millisecond for each operation, with its gradient: beyond this number, eager steps are done sooner.
MAX_OPERATIONS = 8_000
# The checks compare sums in another order; what they are after is off by far more.
CHECK_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-7}
# How far the parameters are moved for the second check.
CHECK_STEP = 0.01


# The patches below are for the whole process.
_lock = threading.RLock()


class CaptureError(RuntimeError):
    """A step cannot be captured; the message says why and where."""


@dataclass(frozen=True)
class Parameters:
    """The unconstrained parameters that a step trains: leaves of autograd, each under one of its names.

    Attributes:
        names: Of the parameters in Pyro, in alphabetical order, so that a repeated run is the same run.
        leaves: The tensors themselves.
    """

    names: tuple[str, ...]
    leaves: tuple[Tensor, ...]

    def in_order(self, names: Iterable[str]) -> Parameters:
        """The same parameters in another order, given by their names."""
        leaves = dict(zip(self.names, self.leaves, strict=True))
        return Parameters(tuple(names), tuple(leaves[name] for name in names))

    def union(self, other: Parameters) -> Parameters:
        """These parameters and those of the other that are new."""
        known = {id(leaf) for leaf in self.leaves}
        new = [pair for pair in zip(other.names, other.leaves, strict=True) if id(pair[1]) not in known]
        return Parameters(self.names + tuple(name for name, _ in new), self.leaves + tuple(leaf for _, leaf in new))


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
    sites: list[Any] = sorted(capture.trace.nodes.values(), key=lambda site: site["name"])
    leaves: dict[int, tuple[str, Tensor]] = {}
    for site in sites:
        value = site["value"]
        # Parameters that a module keeps to itself (the setting module_local_params) are bare.
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
        if leaf.requires_grad:
            leaves.setdefault(id(leaf), (site["name"], leaf))
    if not leaves or not loss.requires_grad:
        return Gradients(loss.detach(), Parameters((), ()), ())
    gradients = torch.autograd.grad(loss, [leaf for _, leaf in leaves.values()], allow_unused=True)
    used = [
        (*pair, gradient) for pair, gradient in zip(leaves.values(), gradients, strict=True) if gradient is not None
    ]
    names, trained, gradients = zip(*used, strict=True) if used else ((), (), ())
    return Gradients(loss.detach(), Parameters(names, trained), gradients)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Pyro without anything that looks at a value: ``.item()``, validation, checks for NaN."""
    with (
        _lock,
        pyro.validation_enabled(False),
        internals.without_checks_of_elbos(),
        internals.without_checks_of_samples(),
    ):
        yield


class _ById(TorchFunctionMode):
    """Replaces tensors by others wherever they are handed to a function of torch."""

    def __init__(self, replacements: dict[int, Tensor]) -> None:
        super().__init__()
        self.replacements = replacements

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: self._replace(value) for name, value in (kwargs or {}).items()}
        return function(*map(self._replace, args), **kwargs)

    def _replace(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.replacements.get(id(value), value)
        if type(value) in (list, tuple):
            return type(value)(map(self._replace, value))
        return value


@contextmanager
def substituted(parameters: Parameters, values: Sequence[Tensor], modules: Iterable[nn.Module]) -> Iterator[None]:
    """Puts tensors in the place of parameters: in Pyro's store, in modules, and wherever else they are held."""
    replacements = {id(leaf): value for leaf, value in zip(parameters.leaves, values, strict=True)}
    for value in values:
        internals.mark_as_parameter(value)
    entries = [
        (module, name)
        for root in modules
        for module in root.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in replacements
    ]
    originals = [module._parameters[name] for module, name in entries]
    try:
        for module, name in entries:
            module._parameters[name] = replacements[id(module._parameters[name])]  # type: ignore[assignment]
        with internals.replaced_in_store(replacements), _ById(replacements):
            yield
    finally:
        for (module, name), original in zip(entries, originals, strict=True):
            module._parameters[name] = original


class _CountOperations(internals.TorchDispatchMode):
    """Counts the operations of what runs within."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


class _EverySite(Messenger):
    """Calls a function with the name of every sample site."""

    def __init__(self, callback: Callable[[str], None]) -> None:
        super().__init__()
        self.callback = callback

    def _pyro_sample(self, msg: Any) -> None:
        self.callback(msg["name"])


def check_size(run: Callable[[], Any]) -> None:
    """Raises CaptureError for a loss of so many operations that recording them takes longer than it saves."""
    marks: list[tuple[int, str]] = []
    with _CountOperations() as counter, _EverySite(lambda name: marks.append((counter.count, name))):
        run()
    if counter.count > MAX_OPERATIONS:
        ends = [count for count, _ in marks[1:]] + [counter.count]
        steps = [(end - start, name) for end, (start, name) in zip(ends, marks, strict=False)]
        where = "{} of them after sample site '{}'".format(*max(steps)) if steps else "and has no sample site"
        raise CaptureError(
            f"its loss takes {counter.count} operations, {where}: a loop in Python? Capturing takes longer than it saves above "
            f"{MAX_OPERATIONS}; write the loop with vectorised operations"
        )


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
        with _EverySite(names.append):
            graph = internals.record(function, inputs)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(_explain(error, names[-1] if names else None)) from error
    _refuse_dynamic_shapes(graph)
    return graph


def _explain(error: BaseException, site: str | None) -> str:
    """Where a capture failed: the last site before, the last line that is the user's, and the message."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    frames = traceback.extract_tb(error.__traceback__)
    library = (*torch.__path__, *pyro.__path__, os.path.dirname(__file__))
    own = [frame for frame in frames if not frame.filename.startswith(library)]
    where = f"after sample site '{site}'" if site else "before the first sample site"
    line = f", {own[-1].filename}, line {own[-1].lineno}: {own[-1].line}" if own else ""
    message = " ".join(str(error).split())
    if "_local_scalar_dense" in message or "data-dependent" in message:
        message = "it looks at the value of a tensor (an if, float(), .item() or a check)"
    return f"{where}{line}: {message[:300]}"


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
