"""What a node of a captured graph is: pure, random, a view; written to; replaceable by another."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .. import internals

aten = torch.ops.aten


def is_pure(node: Node) -> bool:
    """Whether a node's value depends on its arguments alone, and nothing else depends on the node."""
    if node.target is operator.getitem:
        return True
    if not internals.is_operator(node.target):
        return False
    if is_random(node) or internals.is_mutable(node.target):
        return False
    # Memory that somebody else fills; a message to other processes, which wait for it.
    return not any(name in str(node.target) for name in ("empty", "mean_over_processes"))


def is_random(node: Node) -> bool:
    """Whether a node draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def written_nodes(module: GraphModule, varying: Sequence[Tensor]) -> set[Node]:
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


def target_of(value: Any) -> Any:
    """The operation of a node; None for what is no node."""
    return value.target if isinstance(value, Node) else None


def is_pointwise(node: Node) -> bool:
    """Whether each element of a node depends on the elements of its arguments in the same place."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) and is_pure(node)


def layout(node: Node) -> tuple[Any, ...]:
    """Where the elements of a node lie in memory."""
    value = node.meta["val"]
    return value.shape, value.stride(), value.device


def if_alike(node: Node, other: Any) -> Node | None:
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


def _ignores_layout(user: Node) -> bool:
    return is_pointwise(user) or user.target in {
        *(aten.mm.default, aten.addmm.default, aten.cat.default, aten.stack.default),
        *(aten.sum.default, aten.sum.dim_IntList, aten.index_select.default),
    }
