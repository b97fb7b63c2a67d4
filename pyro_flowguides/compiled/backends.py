"""What runs a captured graph: operation by operation, or compiled by inductor."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .. import internals
from ..model.recording import constants_to_inputs
from .cuda_graphs import Graphed, can_record
from .nodes import is_random
from .rewrite import Run


def replay(module: GraphModule, example_inputs: Sequence[Tensor]) -> Run:
    """Runs a graph operation by operation, with the least overhead that there is without a compiler.

    On a GPU it is a CUDA graph, if nothing in it waits for the device.
    """
    if can_record(module, example_inputs):
        # Not traced by torch.jit, which would join kernels, and round in other ways.
        return Graphed(module)
    drawn = [node for node in module.graph.nodes if is_random(node) and not node.users]
    whole = _with_outputs(module, drawn)
    # As inputs: torch.jit computes with constants once, and some of these are tensors that others write to.
    constants = constants_to_inputs(whole)
    with torch.no_grad(), warnings.catch_warnings():
        # Deprecated, and still the fastest; where it goes, or refuses an operation, the graph runs itself.
        warnings.simplefilter("ignore")
        try:
            run = internals.jit_function(whole, [*example_inputs, *constants])
        except (RuntimeError, AttributeError):
            return module
    end = -len(drawn) or None
    return lambda *tensors: run(*tensors, *constants)[:end]


def _with_outputs(module: GraphModule, nodes: Sequence[Node]) -> GraphModule:
    """The same graph, which returns these nodes, too: torch.jit drops even random numbers that nobody uses."""
    copied: dict[Node, Node] = {}
    graph = Graph()
    outputs: Any = graph.graph_copy(module.graph, copied)
    graph.output((*outputs, *[copied[node] for node in nodes]))
    return GraphModule(module, graph)


def has_compiler(device: torch.device) -> bool:
    """Whether inductor is there, and finds what it needs: a C++ compiler on the CPU, Triton on a GPU."""
    if not internals.has_standalone_compile():
        return False
    if device.type == "cuda":
        return internals.has_triton()
    return any(shutil.which(name) for name in ("g++", "clang++", "cl"))


def compile_with_inductor(module: GraphModule, example_inputs: Sequence[Tensor]) -> Run:
    """Compiles a graph; it draws the same random numbers as the graph itself."""
    on_cuda = any(tensor.is_cuda for tensor in example_inputs)
    # Inductor's own CUDA graphs would write the next losses over those that nobody has looked at yet.
    config = {"fallback_random": True, **({} if on_cuda else {"cpp_wrapper": True})}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = internals.standalone_compile(module, example_inputs, config)
    return Graphed(run) if can_record(module, example_inputs) else run
