"""A captured graph made small and fast: what it computes twice or in vain is taken out, then a backend runs it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .. import internals
from .nodes import if_alike, is_pointwise, is_pure, layout, target_of, written_nodes

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
    written = written_nodes(module, varying)
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
    written = written_nodes(module, varying)
    _fold_constants(module, written)
    _merge_equal_nodes(graph, written)
    changes = True
    while changes:
        changes = _replace_nodes(module, written) + _join_slices(module, written) > 0
        _merge_equal_nodes(graph, written)
        _remove_unused(graph)
    graph.lint()
    module.recompile()


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
        elif node.op == "call_function" and is_pure(node):
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


def _replace_nodes(module: GraphModule, written: set[Node]) -> int:
    """Replaces nodes by equivalent ones; returns how many."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node in written or not node.users:
            continue
        with module.graph.inserting_before(node):
            rules = _RULES.get(node.target, ())
            source = node.args[0] if node.args else None
            other = next((other for rule in rules if (other := rule(module, node, source)) is not None), None)
        if other is not None:
            if "val" not in other.meta:
                other.meta = dict(node.meta)
            node.replace_all_uses_with(other)
            count += 1
    return count


# Each rule takes the graph, a node and its first argument, and returns a node with the same values, that is there already or
# costs less, or None.


def _no_effect(module: GraphModule, node: Node, source: Any) -> Node | None:
    """``detach(x)`` → ``x``."""
    return source


def _same_layout(module: GraphModule, node: Node, source: Any) -> Node | None:
    """``view(x, shape of x)`` → ``x``; so for every operation that changes nothing but the layout, or the dtype."""
    return if_alike(node, source)


def _sum_of_nothing(module: GraphModule, node: Node, source: Any) -> Node | None:
    """``sum(x, dims of size 1)`` → ``x``, with the dims kept."""
    return if_alike(node, source) if source.meta["val"].numel() == node.meta["val"].numel() else None


def _there_and_back(module: GraphModule, node: Node, source: Any) -> Node | None:
    """``neg(neg(x))`` → ``x``; ``transpose(transpose(x, i, j), i, j)`` → ``x``."""
    back = source.target is node.target and source.args[1:] == node.args[1:]
    return if_alike(node, source.args[0]) if back else None


def _cast_to_the_same(module: GraphModule, node: Node, source: Any) -> Node | None:
    """``to(x, dtype of x)`` → ``x``."""
    return if_alike(node, source) if set(node.kwargs) <= {"dtype", "device", "layout"} else None


def _slice_of_cat(module: GraphModule, node: Node, cat: Any) -> Node | None:
    """``cat([x, y])[start of y : end of y]`` → ``y``."""
    if cat.target is not aten.cat.default or len(node.args) > 4:
        return None
    _, dim, start, end = (*node.args, *(0, 0, 2**63 - 1)[len(node.args) - 1 :])[:4]
    rank, size = cat.meta["val"].dim(), cat.meta["val"].shape[dim]
    if (cat.args[1] if len(cat.args) > 1 else 0) % rank != dim % rank:
        return None
    place = 0
    for part in cat.args[0]:
        width = part.meta["val"].shape[dim] if part.meta["val"].dim() == rank else 0
        if place == start and place + width == min(end, size):
            return if_alike(node, part)
        place += width
    return None


def _view_of_operation(module: GraphModule, node: Node, operation: Any) -> Node | None:
    """``view(f(view(x)), shape of x)`` → ``f(x)`` for an elementwise f."""
    if not is_pointwise(operation) or any(user.target is not aten.view.default for user in operation.users):
        return None
    wanted = node.meta["val"]
    if any(user.meta["val"].shape != wanted.shape for user in operation.users):
        return None
    sources = {}
    for argument in operation.all_input_nodes:
        original = argument.args[0] if argument.target is aten.view.default else None
        if not isinstance(original, Node) or layout(original) != layout(node):
            return None
        if argument.meta["val"].shape != operation.meta["val"].shape:
            return None
        sources[argument] = original
    args, kwargs = torch.fx.node.map_arg((operation.args, operation.kwargs), sources.__getitem__)
    return module.graph.call_function(target_of(operation), args, kwargs)


def _view_of_view(module: GraphModule, node: Node, view: Any) -> Node | None:
    """``view(view(x))`` → ``view(x)``."""
    is_view = view.target is aten.view.default
    if not is_view and not (view.target is internals.UNSAFE_VIEW and view.meta["val"].is_contiguous()):
        return None
    # What is left may be nothing.
    first = view.args[0]
    shape = list(node.meta["val"].shape)
    return if_alike(node, first) or module.graph.call_function(aten.view.default, (first, shape))


def _view_of_sum(module: GraphModule, node: Node, total: Any) -> Node | None:
    """``view(sum(x, dims, keepdim=True))`` → ``sum(x, dims)``."""
    if total.target is not aten.sum.dim_IntList or total.args[2:] != (True,) or len(total.users) != 1:
        return None
    value = total.meta["val"]
    dims = {dim % value.dim() for dim in total.args[1]}
    kept = tuple(size for dim, size in enumerate(value.shape) if dim not in dims)
    same = kept == tuple(node.meta["val"].shape)
    return module.graph.call_function(aten.sum.dim_IntList, total.args[:2]) if same else None


def _view_of_stack(module: GraphModule, node: Node, stack: Any) -> Node | None:
    """``view(stack([x, y], -2), rows side by side)`` → ``cat([x, y], -1)``."""
    if stack.target is not aten.stack.default or stack.args[1:] != (-2,) or len(stack.users) != 1:
        return None
    parts = stack.args[0]
    *rows, width = parts[0].meta["val"].shape
    same = tuple(node.meta["val"].shape) == (*rows, len(parts) * width)
    return module.graph.call_function(aten.cat.default, (parts, -1)) if same else None


def _row_of_view(module: GraphModule, node: Node, unbind: Any) -> Node | None:
    """``unbind(view(x, (n, m)))[i]`` → ``x[i * m : (i + 1) * m]``."""
    if unbind.target is not aten.unbind.int:
        return None
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
    bounds = (matrix.dim() - 2, index * width, (index + 1) * width)
    return module.graph.call_function(aten.slice.Tensor, (source, *bounds))


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


def _neutral_element(module: GraphModule, node: Node, source: Any) -> Node | None:
    """``x + 0`` → ``x``; ``1 * x`` → ``x``; ``x * 0`` → ``0``, which is the gradient of something that is not used."""
    if node.kwargs:
        return None
    neutral, second = _NEUTRAL[node.target], node.args[1]
    if _uniform(module, second) == neutral:
        return if_alike(node, source)
    if node.target in _COMMUTATIVE and _uniform(module, source) == neutral:
        return if_alike(node, second)
    if node.target is aten.mul.Tensor:
        for factor in (source, second):
            if isinstance(factor, Node) and _uniform(module, factor) == 0.0:
                return if_alike(node, factor)
    return None


def _gradient_of_clipping(module: GraphModule, node: Node, source: Any) -> Node | None:
    """``tanh_backward(c * g, t) / c`` → ``tanh_backward(g, t)``, in the gradient of c·tanh(a / c)."""
    divisor: Any = node.args[1]
    if target_of(source) is not aten.tanh_backward.default or len(source.users) != 1:
        return None
    scaled = source.args[0]
    if target_of(scaled) is not aten.mul.Tensor or scaled.args[1] != divisor or not isinstance(divisor, (int, float)):
        return None
    return module.graph.call_function(aten.tanh_backward.default, (scaled.args[0], source.args[1]))


def _fewer_signs(module: GraphModule, node: Node, source: Any) -> Node | None:
    """``x + (-y)`` → ``x - y``; ``x - (-y)`` → ``x + y``."""
    second: Any = node.args[1]
    if (
        node.kwargs
        or target_of(second) is not aten.neg.default
        or len(second.users) != 1
        or not isinstance(source, Node)
    ):
        return None
    opposite = aten.sub.Tensor if node.target is aten.add.Tensor else aten.add.Tensor
    return module.graph.call_function(opposite, (source, second.args[0]))


# The first rule that applies is used.
_RULES: dict[Any, tuple[Callable[[GraphModule, Node, Any], Node | None], ...]] = {
    **dict.fromkeys([aten.detach.default, aten.alias.default, aten.lift_fresh.default], (_no_effect,)),
    **dict.fromkeys([aten.neg.default, aten.t.default, aten.transpose.int], (_there_and_back,)),
    **dict.fromkeys([internals.UNSAFE_VIEW, aten.expand.default, aten.squeeze.dim], (_same_layout,)),
    **dict.fromkeys(_NEUTRAL, (_neutral_element,)),
    aten.add.Tensor: (_neutral_element, _fewer_signs),
    aten.sub.Tensor: (_neutral_element, _fewer_signs),
    aten.div.Tensor: (_neutral_element, _gradient_of_clipping),
    aten.sum.dim_IntList: (_sum_of_nothing,),
    aten.slice.Tensor: (_same_layout, _slice_of_cat),
    aten.view.default: (_same_layout, _view_of_operation, _view_of_view, _view_of_sum, _view_of_stack),
    internals.TO_COPY: (_cast_to_the_same,),
    operator.getitem: (_row_of_view,),
}


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
    # No recursion: the sum may be that of a loop over hundreds of time steps.
    left = list(reversed(node.args[:2]))
    while left:
        part = left.pop()
        if isinstance(part, Node) and part.target is aten.add.Tensor and not part.kwargs and len(part.users) == 1:
            left.extend(reversed(part.args[:2]))
        else:
            parts.append(part)
    return parts


# --- repetitions and leftovers ----------------------------------------------------------------------------------------------


def _merge_equal_nodes(graph: Graph, written: set[Node]) -> None:
    """Computes once what the graph computes several times from the same arguments."""
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        merges = node.op == "get_attr" or (node.op == "call_function" and is_pure(node))
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
        if not node.users and (node.op == "get_attr" or (node.op == "call_function" and is_pure(node))):
            graph.erase_node(node)
