"""Functions of one point, recorded once and run for many points.

A model that is written for one draw is run once under a recorder (``make_fx``), below autograd, so that the gradient is among the
recorded operations. ``torch.func.vmap`` runs the recording for many draws at once. What has to be arranged for that:

- What depends on the data alone is computed outside of the recording, and is a constant of it. Its values can be read: ``if`` on
  data, ``one_hot`` of an index, selection by a mask.
- Writes in place become operations that return new tensors.
- Operations that vmap would run row by row are written as others that it can batch. A recording that still has one is refused.
"""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode

from .. import internals

aten = torch.ops.aten

# Recording takes about a millisecond for each operation, gradient included (twice as much where the model writes in place), and
# capturing the step that again. This many are a loop over some 500 time steps.
MAX_OPERATIONS = 20_000


class CaptureError(RuntimeError):
    """A step cannot be captured; the message says why and where."""


class _CountOperations(internals.TorchDispatchMode):
    """Counts the operations of what runs within."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


class TooLargeError(Exception):
    """A tensor is larger than the limit."""


class LargestTensor(internals.TorchDispatchMode):
    """Finds the largest tensor that is computed within; above a limit an error, before the tensor is made where that can be told.

    Attributes:
        sizes: The number of elements of every tensor that was seen, in order.
    """

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__()
        self.limit = limit
        self.sizes: list[int] = []

    @property
    def largest(self) -> int:
        """The number of elements of the largest tensor."""
        return max(self.sizes, default=0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.pointwise in getattr(function, "tags", ()):
            shapes = [leaf.shape for leaf in internals.flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
            self._see(torch.broadcast_shapes(*shapes).numel())
        result = function(*args, **(kwargs or {}))
        for leaf in internals.flatten(result)[0]:
            if isinstance(leaf, Tensor):
                self._see(leaf.numel())
        return result

    def _see(self, size: int) -> None:
        self.sizes.append(size)
        if size > self.limit:
            raise TooLargeError


class EverySite(Messenger):
    """Calls a function with the name of every sample site."""

    def __init__(self, callback: Callable[[str], None]) -> None:
        super().__init__()
        self.callback = callback

    def _pyro_sample(self, msg: Any) -> None:
        self.callback(msg["name"])


def check_size(run: Callable[[], Any]) -> None:
    """Raises CaptureError for a loss of so many operations that recording them takes longer than it saves."""
    marks: list[tuple[int, str]] = []
    with _CountOperations() as counter, EverySite(lambda name: marks.append((counter.count, name))):
        run()
    if counter.count > MAX_OPERATIONS:
        ends = [count for count, _ in marks[1:]] + [counter.count]
        steps = [(end - start, name) for end, (start, name) in zip(ends, marks, strict=False)]
        where = "{} of them after sample site '{}'".format(*max(steps)) if steps else "and has no sample site"
        raise CaptureError(
            f"its loss takes {counter.count} operations, {where}: a loop in Python? Capturing takes longer than it saves above "
            f"{MAX_OPERATIONS}; write the loop with vectorised operations"
        )


def explain(error: BaseException, site: str | None) -> str:
    """Where a capture failed: the last site before, the last line that is the user's, and the message."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    frames = traceback.extract_tb(error.__traceback__)
    library = (*torch.__path__, *pyro.__path__, os.path.dirname(os.path.dirname(__file__)))
    own = [frame for frame in frames if not frame.filename.startswith(library)]
    where = f"after sample site '{site}'" if site else "before the first sample site"
    line = f", {own[-1].filename}, line {own[-1].lineno}: {own[-1].line}" if own else ""
    message = " ".join(str(error).split())
    if "_local_scalar_dense" in message or "data-dependent" in message:
        message = "it looks at the value of a tensor (an if, float(), .item() or a check)"
    return f"{where}{line}: {message[:300]}"


# --- what is constant --------------------------------------------------------------------------------------------------

# They return fresh memory that may be written to afterwards.
_FRESH = frozenset(
    {
        aten.clone.default,
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.empty_like.default,
        aten.full_like.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_empty.default,
        aten.new_full.default,
        aten.lift_fresh.default,
    }
)
# They take no tensor, and hardly anybody writes to what they return.
_RANGES = frozenset({aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default})


class _FoldConstants(internals.TorchDispatchMode):
    """Runs what does not depend on the inputs outside of the recording.

    Arguments:
        inputs: The inputs of the recording.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        # The tensors themselves are kept, so that no other memory gets their number.
        self._varying: dict[int, Tensor] = {}
        self._mark(inputs)

    def _mark(self, leaves: Iterable[Any]) -> None:
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                self._varying[internals.storage_id(leaf)] = leaf

    def _varies(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and internals.storage_id(leaf) in self._varying

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = internals.flatten((args, kwargs))[0]
        has_tensors = any(isinstance(leaf, Tensor) for leaf in leaves)
        random_numbers = torch.Tag.nondeterministic_seeded in getattr(function, "tags", ())
        may_fold = function in _RANGES or (has_tensors and function not in _FRESH and not random_numbers)
        if may_fold and not any(map(self._varies, leaves)):
            with internals.not_recording():
                return function(*args, **kwargs)
        written = internals.written_arguments(function, args, kwargs) if internals.is_mutable(function) else []
        if not all(map(self._varies, internals.flatten(written)[0])):
            raise CaptureError(
                "it writes into a tensor from outside of the model, or into one that it has computed from data alone; write into "
                "a .clone() of it"
            )
        result = function(*args, **kwargs)
        self._mark(internals.flatten(result)[0])
        return result


class _IndexByScalars(TorchFunctionMode):
    """``x[z]`` and ``x[..., z]`` for a whole number z that is a tensor, which torch would look at."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__getitem__:
            value, index = args
            first, *rest = index if isinstance(index, tuple) and index else (index,)
            if _is_whole_number(first):
                taken = value.index_select(0, first.reshape(1)).squeeze(0)
                return taken[tuple(rest)] if rest else taken
            if first is Ellipsis and len(rest) == 1 and _is_whole_number(rest[0]):
                return value.index_select(-1, rest[0].reshape(1)).squeeze(-1)
        return function(*args, **(kwargs or {}))


def _is_whole_number(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dim() == 0 and index.dtype in (torch.int32, torch.int64)


# --- operations that vmap cannot batch ---------------------------------------------------------------------------------


def _memory_order(tensor: Tensor) -> list[int]:
    """The dimensions of a tensor from the one whose elements lie farthest apart in memory to the nearest."""
    return sorted(range(tensor.dim()), key=lambda dim: tensor.stride(dim), reverse=True)


def _back(order: Sequence[int]) -> list[int]:
    """The permutation that undoes another one."""
    return sorted(range(len(order)), key=lambda place: order[place])


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    # As it lies in memory: views by strides may follow.
    order = _memory_order(target)
    copied = source.to(dtype=target.dtype, device=target.device).expand(target.shape).permute(order)
    return copied.clone(memory_format=torch.contiguous_format).permute(_back(order))


def _fill(target: Tensor, value: complex) -> Tensor:
    return torch.full_like(target, value)


def _index_put(target: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    given = [(place, index) for place, index in enumerate(indices) if index is not None]
    place, mask = given[0]
    if len(given) != 1 or mask.dtype != torch.bool or accumulate or values.numel() != 1:
        return NotImplemented
    shape = [1] * place + list(mask.shape) + [1] * (target.dim() - place - mask.dim())
    return torch.where(mask.reshape(shape), values.reshape(()), target)


def _places(size: Sequence[int], stride: Sequence[int], offset: int | None, device: torch.device) -> Tensor:
    """Where the elements of a strided view lie in the memory of its base."""
    places = torch.zeros((), dtype=torch.long, device=device)
    for length, step in zip(size, stride, strict=True):
        places = places.unsqueeze(-1) + step * torch.arange(length, device=device)
    return (places + (offset or 0)).reshape(-1)


def _as_strided(base: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> Any:
    memory = base.permute(_memory_order(base))
    if not memory.is_contiguous() or base.storage_offset():
        return NotImplemented
    return memory.reshape(-1).index_select(0, _places(size, stride, offset, base.device)).reshape(size)


def _as_strided_scatter(
    base: Tensor, source: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Any:
    order = _memory_order(base)
    memory = base.permute(order)
    if not memory.is_contiguous() or base.storage_offset():
        return NotImplemented
    places = _places(size, stride, offset, base.device)
    written = memory.reshape(-1).scatter(0, places, source.expand(size).reshape(-1))
    return written.reshape(memory.shape).permute(_back(order))


def _slice_scatter(
    target: Tensor, source: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    # vmap's rule takes bounds from the left alone, and none beyond the end.
    size = target.shape[dim]
    bounds = [None if bound is None else min(bound + size if bound < 0 else bound, size) for bound in (start, end)]
    if bounds == [start, end]:
        return NotImplemented
    return aten.slice_scatter.default(target, source, dim, *bounds, step)


# vmap gives every point the same numbers where an operation fills memory with them: they are drawn by ``rand`` and ``randn``.


def _unit(target: Tensor) -> Tensor:
    return torch.rand(target.shape, dtype=target.dtype, device=target.device)


def _normal(target: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Any = None) -> Tensor:
    return mean + std * torch.randn(target.shape, dtype=target.dtype, device=target.device)


def _uniform(target: Tensor, low: float = 0.0, high: float = 1.0, *, generator: Any = None) -> Tensor:
    return low + (high - low) * _unit(target)


def _exponential(target: Tensor, rate: float = 1.0, *, generator: Any = None) -> Tensor:
    return -(1 - _unit(target)).log() / rate


def _cauchy(target: Tensor, median: float = 0.0, sigma: float = 1.0, *, generator: Any = None) -> Tensor:
    return median + sigma * (math.pi * (_unit(target) - 0.5)).tan()


# With numbers of its own for every point, as tests show for each.
_RANDOM = frozenset(
    {
        aten.rand.default,
        aten.randn.default,
        aten.normal.Tensor_Tensor,
        aten.bernoulli.default,
        aten.binomial.default,
        aten.multinomial.default,
        aten.poisson.default,
        internals.STANDARD_GAMMA,
        internals.SAMPLE_DIRICHLET,
    }
)

_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.normal_functional.default: _normal,
    aten.uniform.default: _uniform,
    aten.exponential.default: _exponential,
    aten.cauchy.default: _cauchy,
    aten.fill.Scalar: _fill,
    aten.slice_scatter.default: _slice_scatter,
    aten.copy.default: _copy,
    aten.index_put.default: _index_put,
    aten.as_strided.default: _as_strided,
    aten.as_strided_copy.default: _as_strided,
    aten.as_strided_scatter.default: _as_strided_scatter,
}


# --- recording and running ---------------------------------------------------------------------------------------------


def record(function: Callable[..., Any], inputs: Sequence[Tensor]) -> GraphModule:
    """The operations of a function of tensors as a graph without writes in place.

    What does not depend on the inputs is a constant of the graph.

    Arguments:
        function: The function, of one point; it returns a tree of tensors.
        inputs: An example of its arguments.

    Raises:
        CaptureError: if the function looks at a value that depends on the inputs, or writes into a tensor from outside.
    """
    names: list[str] = []

    def folded(*tensors: Tensor) -> Any:
        with _FoldConstants(tensors), _IndexByScalars():
            return function(*tensors)

    try:
        with EverySite(names.append):
            graph = internals.record(folded, inputs)
        if any(map(_is_rewritten, graph.graph.nodes)):
            constants = constants_to_inputs(graph)
            graph = internals.record_functional(graph, [*inputs, *constants], _DECOMPOSITIONS)
            _inputs_to_constants(graph, constants)
    except Exception as error:
        raise CaptureError(explain(error, names[-1] if names else None)) from error
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and node.target not in _RANDOM:
            raise CaptureError(f"its random numbers come from {node.target}, which gives the same to all draws")
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _is_rewritten(node: Node) -> bool:
    """Whether an operation writes in place, or is batched in another form; without any, a second recording is spared."""
    return node.target in _DECOMPOSITIONS or (internals.is_operator(node.target) and internals.is_mutable(node.target))


def constants_to_inputs(graph: GraphModule) -> list[Tensor]:
    """Makes the constants of a graph its last inputs, and returns their values.

    Only what is computed from inputs can be written in place and taken for a function all the same: ``zeros_like`` of data too.
    """
    first = next(node for node in graph.graph.nodes if node.op != "placeholder")
    constants = graph.graph.find_nodes(op="get_attr")
    places: dict[str, Node] = {}
    with graph.graph.inserting_before(first):
        for name in dict.fromkeys(node.target for node in constants):
            places[name] = graph.graph.placeholder(name)
    for node in constants:
        node.replace_all_uses_with(places[node.target])
        graph.graph.erase_node(node)
    graph.recompile()
    return [getattr(graph, name).detach() for name in places]


def _inputs_to_constants(graph: GraphModule, constants: Sequence[Tensor]) -> None:
    """Makes constants of the last inputs of a graph."""
    inputs = graph.graph.find_nodes(op="placeholder")
    for index, (node, value) in enumerate(zip(inputs[len(inputs) - len(constants) :], constants, strict=True)):
        name = f"_constant_{index}"
        graph.register_buffer(name, value, persistent=False)
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.get_attr(name))
        graph.graph.erase_node(node)


def batch(graph: GraphModule, varies: Sequence[bool]) -> Callable[..., Any]:
    """A recording as a function of many points, ``run(number, *inputs)``.

    Random numbers are drawn for every point.

    Arguments:
        graph: The recording.
        varies: For each input, whether it has a first dimension of points; otherwise all points share it.
    """
    in_dims = (0, *[0 if each else None for each in varies])
    batched = torch.func.vmap(lambda _, *inputs: graph(*inputs), in_dims=in_dims, randomness="different")

    def run(number: int, *inputs: Tensor) -> Any:
        # The first input tells vmap the number of points, where all others are shared.
        with internals.no_batching_row_by_row():
            return batched(torch.empty(number), *inputs)

    return run


def repeat(function: Callable[..., Any], varies: Sequence[bool]) -> Callable[..., Any]:
    """A function as one of many points, ``run(number, *inputs)``, that is called for each.

    Arguments:
        function: The function, of one point; it returns a tree of tensors.
        varies: As for :func:`batch`.
    """

    def run(number: int, *inputs: Tensor) -> Any:
        points = [
            internals.flatten(
                function(*[value[i] if each else value for value, each in zip(inputs, varies, strict=True)])
            )
            for i in range(number)
        ]
        together = [torch.stack(leaves) for leaves in zip(*[leaves for leaves, _ in points], strict=True)]
        return internals.unflatten(together, points[0][1])

    return run
