"""A captured graph made small and fast: what it computes twice or in vain is taken out, then a backend runs it."""

from __future__ import annotations

import operator
import shutil
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten

# A constant is computed in advance only up to this size; beyond it, memory is dearer than time.
MAX_CONSTANT_SIZE = 2**20

Run = Callable[..., Sequence[Tensor]]


def constants(module: GraphModule, varying: Sequence[Tensor] = ()) -> list[Tensor]:
    """The tensors that a graph holds and takes for constant: nobody writes to them.

    Arguments:
        module: The graph.
        varying: Tensors that others are known to write to.
    """
    written = _written(module, varying)
    names = [node.target for node in module.graph.nodes if node.op == "get_attr" and node not in written]
    return [value for name in names if isinstance(value := getattr(module, str(name)), Tensor)]


def simplify(module: GraphModule, varying: Sequence[Tensor] = ()) -> None:
    """Takes out of a graph, in place, what has no effect, what is computed twice, and what is the same at every step.

    Pyro's handlers and autograd leave a lot of it: sums with 0, views of views, transposes of transposes, logarithms of
    constants. What is left computes the same numbers up to the order of sums.

    Arguments:
        module: The graph.
        varying: Tensors that others are known to write to, which are not taken for constant.
    """
    graph = module.graph
    written = _written(module, varying)
    _fold_constants(module, written)
    _merge_equal_nodes(graph, written)
    for node in list(graph.nodes):
        if node.op == "call_function" and node not in written and (other := _equivalent(module, node)) is not None:
            node.replace_all_uses_with(other)
    _join_slices(module, written)
    _merge_equal_nodes(graph, written)
    _remove_unused(graph)
    graph.lint()
    module.recompile()


def _is_pure(node: Node) -> bool:
    """Whether a node's value depends on its arguments alone, and nothing else depends on the node."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded in node.target.tags or node.target._schema.is_mutable:
        return False
    # Memory that somebody else fills.
    return "empty" not in str(node.target)


def _written(module: GraphModule, varying: Sequence[Tensor]) -> set[Node]:
    """Every node whose memory is written to, by the graph or by others, with the views that share it."""
    graph = module.graph
    written = set()
    for node in graph.nodes:
        if node.op == "get_attr" and any(getattr(module, node.target) is tensor for tensor in varying):
            written.add(node)
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            written.add(node)
            for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Node):
                    written.add(value)
    # Memory is shared along views, in both directions.
    size = -1
    while len(written) > size:
        size = len(written)
        for node in graph.nodes:
            family = {node, *node.all_input_nodes}
            if _may_alias(node) and family & written:
                written |= family
    return written


def _may_alias(node: Node) -> bool:
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    return not schema.is_mutable and any(result.alias_info is not None for result in schema.returns)


# --- constants ---------------------------------------------------------------------------------------------------------

# What they return depends on the shape of their argument alone.
_FILLS: dict[Any, Callable[..., float]] = {
    aten.zeros_like.default: lambda like: 0.0,
    aten.ones_like.default: lambda like: 1.0,
    aten.new_zeros.default: lambda like, size: 0.0,
    aten.new_ones.default: lambda like, size: 1.0,
    aten.full_like.default: lambda like, value: value,
    aten.new_full.default: lambda like, size, value: value,
}


def _fold_constants(module: GraphModule, written: set[Node]) -> None:
    """Computes now what depends on no input and on no random number."""
    values: dict[Node, Any] = {}
    for node in module.graph.nodes:
        if node in written:
            continue
        if node.op == "get_attr":
            values[node] = getattr(module, node.target)
        elif node.op == "call_function" and _is_pure(node):
            if node.target in _FILLS and isinstance(_FILLS[node.target](*node.args), (int, float)):
                like = node.meta["val"]
                values[node] = torch.full(
                    like.shape, _FILLS[node.target](*node.args), dtype=like.dtype, device=like.device
                )
            elif all(source in values for source in node.all_input_nodes):
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    for node in list(module.graph.nodes):
        value = values.get(node)
        if node.op != "call_function" or not isinstance(value, Tensor) or value.numel() > MAX_CONSTANT_SIZE:
            continue
        if not all(user in values for user in node.users):
            constant = _add_constant(module, node, value)
            node.replace_all_uses_with(constant, delete_user_cb=lambda user: user not in values)


def _add_constant(module: GraphModule, node: Node, value: Tensor) -> Node:
    """A constant in front of a node."""
    name = f"_folded_{len(module._buffers)}"
    # Not as a view: its base could be far larger, and be written to.
    module.register_buffer(name, value.detach().clone(), persistent=False)
    with module.graph.inserting_before(node):
        constant = module.graph.get_attr(name)
    constant.meta["val"] = value
    return constant


# --- nodes that another node is equal to -----------------------------------------------------------------------------------

_IDENTITIES = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}
# They return their first argument if nothing about its layout changes.
_RESHAPES = {
    *(aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.slice.Tensor, aten.squeeze.dim),
    *(aten.sum.dim_IntList, aten.permute.default, aten.transpose.int),
}
_NEUTRAL = {
    aten.add.Tensor: 0.0,
    aten.add.Scalar: 0.0,
    aten.sub.Tensor: 0.0,
    aten.mul.Tensor: 1.0,
    aten.mul.Scalar: 1.0,
    aten.div.Tensor: 1.0,
    aten.div.Scalar: 1.0,
    aten.pow.Tensor_Scalar: 1.0,
}
_COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor}
_INVOLUTIONS = {aten.neg.default, aten.t.default}


def _equivalent(module: GraphModule, node: Node) -> Node | None:
    """An earlier node with the same values in the same layout, or one that is cheaper."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        source = None
    if node.target in _IDENTITIES:
        return source
    if node.target in _INVOLUTIONS and source is not None and source.target is node.target:
        return _if_alike(node, source.args[0])
    if node.target in _RESHAPES:
        return _reshaped(module.graph, node)
    if node.target is aten._to_copy.default and set(node.kwargs) <= {"dtype", "device", "layout"}:
        return _if_alike(node, source)
    if node.target in _NEUTRAL and not node.kwargs:
        if _uniform(module, node.args[1]) == _NEUTRAL[node.target]:
            return _if_alike(node, source)
        if node.target in _COMMUTATIVE and _uniform(module, source) == _NEUTRAL[node.target]:
            return _if_alike(node, node.args[1])
    return None


def _reshaped(graph: Graph, node: Node) -> Node | None:
    source = node.args[0]
    assert isinstance(source, Node)
    if node.target is aten.sum.dim_IntList and source.meta["val"].numel() != node.meta["val"].numel():
        return None
    if node.target in (aten.transpose.int, aten.permute.default):
        if source.target is node.target and source.args[1:] == node.args[1:] and node.target is aten.transpose.int:
            return _if_alike(node, source.args[0])
        return None
    if (same := _if_alike(node, source)) is not None:
        return same
    if node.target is aten.view.default and (moved := _view_before_operation(graph, node, source)) is not None:
        return moved
    if node.target is aten.view.default and source.target is aten.view.default:
        with graph.inserting_before(node):
            direct = graph.call_function(node.target, (source.args[0], node.args[1]))
        direct.meta = dict(node.meta)
        # What is left may be nothing.
        return _if_alike(direct, source.args[0]) or direct
    return None


def _view_before_operation(graph: Graph, node: Node, operation: Node) -> Node | None:
    """The view of an elementwise operation on views, without the views: the operation on what they are views of."""
    if not isinstance(operation.target, torch._ops.OpOverload) or torch.Tag.pointwise not in operation.target.tags:
        return None
    if not _is_pure(operation) or any(user.target is not aten.view.default for user in operation.users):
        return None
    wanted = node.meta["val"]
    if any(user.meta["val"].shape != wanted.shape for user in operation.users):
        return None
    sources = {}
    for argument in operation.all_input_nodes:
        original = argument.args[0] if argument.target is aten.view.default else None
        if not isinstance(original, Node) or _layout(original) != _layout(node):
            return None
        if argument.meta["val"].shape != operation.meta["val"].shape:
            return None
        sources[argument] = original
    args, kwargs = torch.fx.node.map_arg((operation.args, operation.kwargs), sources.__getitem__)
    with graph.inserting_before(node):
        moved = graph.call_function(operation.target, args, kwargs)
    moved.meta = dict(node.meta)
    return moved


def _layout(node: Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return value.shape, value.stride(), value.device


def _if_alike(node: Node, other: Any) -> Node | None:
    """The other node, if it has the same layout."""
    if not isinstance(other, Node):
        return None
    alike = _layout(node) == _layout(other) and node.meta["val"].dtype == other.meta["val"].dtype
    return other if alike else None


def _uniform(module: GraphModule, value: Any) -> float | None:
    """The number that all elements of a constant are equal to."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, Node) or value.op != "get_attr" or not str(value.target).startswith("_folded"):
        return None
    tensor = getattr(module, str(value.target))
    if not tensor.numel() or tensor.is_complex():
        return None
    first = tensor.flatten()[0]
    return float(first) if bool((tensor == first).all()) else None


# --- gradients of slices ---------------------------------------------------------------------------------------------------


def _join_slices(module: GraphModule, written: set[Node]) -> None:
    """Puts the gradients of the parts of a tensor side by side, where autograd adds them up padded with zeros."""
    for node in list(module.graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs or node in written:
            continue
        if len(node.users) == 1 and next(iter(node.users)).target is aten.add.Tensor:
            continue
        parts = [
            part for part in _summands(node) if isinstance(part, Node) and part.target is aten.slice_backward.default
        ]
        if len(parts) < 2 or len(parts) < len(_summands(node)):
            continue
        first: Any = parts[0]
        if any(part.args[1:3] != first.args[1:3] or part.args[5] != 1 for part in parts):
            continue
        dim = first.args[2]
        size = first.args[1][dim]
        pieces: list[Any] = []
        end = 0
        for part in sorted(parts, key=_start):
            if part.args[3] != end:
                break
            pieces.append(part.args[0])
            end = min(part.args[4], size)
        if len(pieces) == len(parts) and end == size:
            with module.graph.inserting_before(node):
                joined = module.graph.call_function(aten.cat.default, (pieces, dim))
            joined.meta = dict(node.meta)
            node.replace_all_uses_with(joined)


def _start(slice_backward: Any) -> int:
    return int(slice_backward.args[3])


def _summands(node: Any) -> list[Any]:
    """What a sum of sums adds up, as far as the partial sums are used nowhere else."""
    parts = []
    for part in node.args[:2]:
        nested = isinstance(part, Node) and part.target is aten.add.Tensor and not part.kwargs and len(part.users) == 1
        parts.extend(_summands(part) if nested else [part])
    return parts


# --- repetitions and leftovers ----------------------------------------------------------------------------------------------


def _merge_equal_nodes(graph: Graph, written: set[Node]) -> None:
    """Computes once what the graph computes several times from the same arguments."""
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        merges = node.op == "get_attr" or (node.op == "call_function" and _is_pure(node))
        if not merges or node in written:
            continue
        key = (node.op, node.target, _hashable(node.args), _hashable(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return tuple((name, _hashable(part)) for name, part in sorted(value.items()))
    # 1 == 1.0 == True, but they are not the same argument.
    return (type(value), value)


def _remove_unused(graph: Graph) -> None:
    """Drops what nobody uses; random numbers stay, so that the stream is that of the step which was captured."""
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.op == "get_attr" or (node.op == "call_function" and _is_pure(node))):
            graph.erase_node(node)


# --- backends ----------------------------------------------------------------------------------------------------------------


def replay(module: GraphModule, example_inputs: Sequence[Tensor]) -> Run:
    """Runs a graph operation by operation, with the least overhead that there is without a compiler."""
    with torch.no_grad(), warnings.catch_warnings():
        # Deprecated, and still the fastest; where it goes, or refuses an operation, the graph runs itself.
        warnings.simplefilter("ignore")
        try:
            return torch.jit.trace(module, tuple(example_inputs), check_trace=False)  # type: ignore[no-untyped-call]
        except (RuntimeError, AttributeError):
            return module


def has_compiler(device: torch.device) -> bool:
    """Whether inductor finds what it needs: a C++ compiler on the CPU, Triton on a GPU."""
    if device.type == "cuda":
        return torch.utils._triton.has_triton()
    return any(shutil.which(name) for name in ("g++", "clang++", "cl"))


def compile_with_inductor(module: GraphModule, example_inputs: Sequence[Tensor]) -> Run:
    """Compiles a graph; it draws the same random numbers as the graph itself."""
    on_cuda = any(tensor.is_cuda for tensor in example_inputs)
    options: dict[str, Any] = {"fallback_random": True}
    options.update({"triton.cudagraphs": True} if on_cuda else {"cpp_wrapper": True})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch._inductor.standalone_compile(
            module, list(example_inputs), dynamic_shapes="from_example_inputs", options=options
        )
