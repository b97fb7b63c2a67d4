"""A captured graph made small and fast: what it computes twice or in vain is taken out, then a backend runs it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .. import internals

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
    changes = True
    while changes:
        changes = _replace_nodes(module, written) + _join_slices(module, written) > 0
        _merge_equal_nodes(graph, written)
        _remove_unused(graph)
    graph.lint()
    module.recompile()


def _is_pure(node: Node) -> bool:
    """Whether a node's value depends on its arguments alone, and nothing else depends on the node."""
    if node.target is operator.getitem:
        return True
    if not internals.is_operator(node.target):
        return False
    if _is_random(node) or internals.is_mutable(node.target):
        return False
    # Memory that somebody else fills.
    return "empty" not in str(node.target)


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _written(module: GraphModule, varying: Sequence[Tensor]) -> set[Node]:
    """Every node whose memory is written to, by the graph or by others, with the views that share it."""
    graph = module.graph
    written = set()
    for node in graph.nodes:
        if node.op == "get_attr" and any(getattr(module, node.target) is tensor for tensor in varying):
            written.add(node)
        if internals.is_operator(node.target) and internals.is_mutable(node.target):
            written.add(node)
            values = internals.written_arguments(node.target, node.args, node.kwargs)
            written.update(value for value in values if isinstance(value, Node))
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
    if not internals.is_operator(node.target):
        return False
    return not internals.is_mutable(node.target) and internals.returns_view(node.target)


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
    *(aten.view.default, internals.UNSAFE_VIEW, aten.expand.default, aten.slice.Tensor, aten.squeeze.dim),
    *(aten.sum.dim_IntList, aten.permute.default, aten.transpose.int, aten.unsqueeze.default),
}
_NEUTRAL: dict[Any, float] = {
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


def _replace_nodes(module: GraphModule, written: set[Node]) -> int:
    """Replaces nodes by equivalent ones; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node in written or not node.users:
            continue
        with module.graph.inserting_before(node):
            other = _equivalent(module, node)
        if other is not None:
            if "val" not in other.meta:
                other.meta = dict(node.meta)
            node.replace_all_uses_with(other)
            count += 1
    return count


def _equivalent(module: GraphModule, node: Node) -> Node | None:
    """A node with the same values, that is there already or costs less."""
    source: Any = node.args[0] if node.args else None
    if node.target in _IDENTITIES:
        return source
    if node.target in _INVOLUTIONS and source.target is node.target:
        return _if_alike(node, source.args[0])
    if node.target in _RESHAPES:
        return _reshaped(module.graph, node, source)
    if node.target is internals.TO_COPY and set(node.kwargs) <= {"dtype", "device", "layout"}:
        return _if_alike(node, source)
    if node.target is operator.getitem and source.target is aten.unbind.int:
        return _slice_of_rows(module.graph, node, source)
    if node.target in _NEUTRAL and not node.kwargs:
        return _without_neutral_element(module, node, source) or _with_fewer_signs(module.graph, node, source)
    return None


def _without_neutral_element(module: GraphModule, node: Node, source: Any) -> Node | None:
    neutral = _NEUTRAL[node.target]
    second: Any = node.args[1]
    if _uniform(module, second) == neutral:
        return _if_alike(node, source)
    if node.target in _COMMUTATIVE and _uniform(module, source) == neutral:
        return _if_alike(node, second)
    if node.target is aten.mul.Tensor:
        # The gradient of something that is not used.
        for factor in (source, second):
            if isinstance(factor, Node) and _uniform(module, factor) == 0.0:
                return _if_alike(node, factor)
    # The gradient of c·tanh(a / c).
    if node.target is aten.div.Tensor and _target(source) is aten.tanh_backward.default and len(source.users) == 1:
        scaled = source.args[0]
        if _target(scaled) is aten.mul.Tensor and scaled.args[1] == second and isinstance(second, (int, float)):
            return module.graph.call_function(aten.tanh_backward.default, (scaled.args[0], source.args[1]))
    return None


def _with_fewer_signs(graph: Graph, node: Node, source: Any) -> Node | None:
    second: Any = node.args[1]
    opposites: dict[Any, Any] = {aten.add.Tensor: aten.sub.Tensor, aten.sub.Tensor: aten.add.Tensor}
    opposite = opposites.get(node.target)
    if (
        opposite is not None
        and _target(second) is aten.neg.default
        and len(second.users) == 1
        and isinstance(source, Node)
    ):
        return graph.call_function(opposite, (source, second.args[0]))
    return None


def _reshaped(graph: Graph, node: Node, source: Any) -> Node | None:
    shape = tuple(node.meta["val"].shape)
    if node.target is aten.sum.dim_IntList and source.meta["val"].numel() != node.meta["val"].numel():
        return None
    if node.target in (aten.transpose.int, aten.permute.default):
        back = node.target is aten.transpose.int and source.target is node.target and source.args[1:] == node.args[1:]
        return _if_alike(node, source.args[0]) if back else None
    if (same := _if_alike(node, source)) is not None:
        return same
    if node.target is aten.slice.Tensor and source.target is aten.cat.default:
        return _piece(node, source)
    if node.target is not aten.view.default:
        return None
    if (moved := _view_before_operation(graph, node, source)) is not None:
        return moved
    if source.target is aten.view.default or (
        source.target is internals.UNSAFE_VIEW and source.meta["val"].is_contiguous()
    ):
        # What is left may be nothing.
        first = source.args[0]
        return _if_alike(node, first) or graph.call_function(aten.view.default, (first, list(shape)))
    if source.target is aten.sum.dim_IntList and source.args[2:] == (True,) and len(source.users) == 1:
        kept = [size for dim, size in enumerate(source.meta["val"].shape) if dim not in _dims(source)]
        if tuple(kept) == shape:
            return graph.call_function(aten.sum.dim_IntList, source.args[:2])
    if source.target is aten.stack.default and len(source.users) == 1:
        parts = source.args[0]
        rows, width = parts[0].meta["val"].shape[:-1], parts[0].meta["val"].shape[-1]
        if source.args[1:] == (-2,) and shape == (*rows, len(parts) * width):
            return graph.call_function(aten.cat.default, (parts, -1))
    return None


def _dims(reduction: Node) -> set[int]:
    source: Any = reduction.args[0]
    dims: Any = reduction.args[1]
    return {dim % source.meta["val"].dim() for dim in dims}


def _piece(node: Node, cat: Any) -> Node | None:
    """What a slice cuts out of tensors side by side, if it is one of them."""
    _, dim, start, end = (*node.args, *(0, 0, 2**63 - 1)[len(node.args) - 1 :])[:4]
    rank, size = cat.meta["val"].dim(), cat.meta["val"].shape[dim]
    if len(node.args) > 4 or (cat.args[1] if len(cat.args) > 1 else 0) % rank != dim % rank:
        return None
    place = 0
    for part in cat.args[0]:
        width = part.meta["val"].shape[dim] if part.meta["val"].dim() == rank else 0
        if place == start and place + width == min(end, size):
            return _if_alike(node, part)
        place += width
    return None


def _slice_of_rows(graph: Graph, node: Node, unbind: Any) -> Node | None:
    """A row of a matrix that is a view of longer rows: a slice of those."""
    view = unbind.args[0]
    matrix = view.meta["val"]
    if (
        view.target is not aten.view.default
        or matrix.dim() < 2
        or (unbind.args[1:] or (0,))[0] % matrix.dim() != matrix.dim() - 2
    ):
        return None
    source = view.args[0]
    count, width = matrix.shape[-2:]
    if tuple(source.meta["val"].shape) != (*matrix.shape[:-2], count * width):
        return None
    index: Any = node.args[1]
    return graph.call_function(aten.slice.Tensor, (source, matrix.dim() - 2, index * width, (index + 1) * width))


def _view_before_operation(graph: Graph, node: Node, operation: Node) -> Node | None:
    """The view of an elementwise operation on views, without the views: the operation on what they are views of."""
    if not _is_pointwise(operation) or any(user.target is not aten.view.default for user in operation.users):
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
    return graph.call_function(_target(operation), args, kwargs)


def _target(value: Any) -> Any:
    return value.target if isinstance(value, Node) else None


def _is_pointwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) and _is_pure(node)


def _layout(node: Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return value.shape, value.stride(), value.device


def _if_alike(node: Node, other: Any) -> Node | None:
    """The other node, if it can stand in the place of this one."""
    if not isinstance(other, Node) or "val" not in other.meta:
        return None
    ours, theirs = node.meta["val"], other.meta["val"]
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype or ours.device != theirs.device:
        return None
    # Another layout does no harm where nobody looks at it: rows in their order stay so through these operations.
    strides = [stride for stride, size in zip(theirs.stride(), theirs.shape, strict=True) if size > 1]
    in_order = strides == sorted(strides, reverse=True)
    return other if ours.stride() == theirs.stride() or (in_order and all(map(_ignores_layout, node.users))) else None


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


def _ignores_layout(user: Node) -> bool:
    return _is_pointwise(user) or user.target in {
        *(aten.mm.default, aten.addmm.default, aten.cat.default, aten.stack.default),
        *(aten.sum.default, aten.sum.dim_IntList, aten.index_select.default),
    }


# --- gradients of slices ---------------------------------------------------------------------------------------------------


def _join_slices(module: GraphModule, written: set[Node]) -> int:
    """Puts the gradients of the parts of a tensor side by side, where autograd adds them up padded with zeros."""
    count = 0
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
            count += 1
    return count


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
