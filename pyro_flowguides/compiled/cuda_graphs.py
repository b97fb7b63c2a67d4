"""CUDA graphs: the kernels of a step recorded once, and launched together from then on.

A step of a small model is a chain of hundreds of short kernels, and to launch them takes longer than to run them. A CUDA graph
launches all of them in one call. It reads and writes the same memory each time: inputs that lie elsewhere are copied into that
memory, and outputs are copied out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .. import internals
from ..checks import warn
from .rewrite import Run

# The first calls are launched one by one: libraries set themselves up in them.
NUM_WARM = 3
# What waits for the device, or has no fixed number of elements: none of it can be recorded.
_SELECTIONS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "repeat_interleave")
_FACTORIZATIONS = (
    "check_errors",
    "cholesky",
    *(f"linalg_{name}" for name in ("inv", "lu", "qr", "svd", "eigh", "solve_ex")),
)
_WAITING = (*_SELECTIONS, *_FACTORIZATIONS, "multinomial", "mean_over_processes")
_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)

Replay = Callable[[], None]


def can_record(module: GraphModule, inputs: Sequence[Tensor]) -> bool:
    """Whether a step can be a CUDA graph: all of it is on a GPU, and nothing of it waits.

    Arguments:
        module: The graph of the step.
        inputs: An example of its inputs.
    """
    return bool(inputs) and all(tensor.is_cuda for tensor in inputs) and not what_waits(module, inputs[0].device)


def what_waits(module: GraphModule, device: torch.device) -> list[str]:
    """The operations of a graph for which the host waits, or which wait for the host, in words.

    Arguments:
        module: The graph.
        device: Where its inputs are.
    """
    found = []
    for node in module.graph.nodes:
        value = getattr(module, str(node.target)) if node.op == "get_attr" else node.meta.get("val")
        if internals.is_operator(node.target) and any(name in str(node.target) for name in _WAITING):
            found.append(f"{node.target} waits")
        elif node.target in _INDEXING and any(each.meta["val"].dtype == torch.bool for each in node.all_input_nodes):
            # It looks for the places first.
            found.append(f"{node.target} by a condition waits")
        # A single number of the host is an argument of the kernel that takes it, of where() a copy.
        elif isinstance(value, Tensor) and value.device != device and (value.dim() or _is_chosen_from(node)):
            found.append(f"{node.target} is on {value.device}")
        elif node.target is internals.TO_COPY and node.args[0].meta["val"].device != value.device:
            found.append(f"{node.target} copies from {node.args[0].meta['val'].device} to {value.device}")
    return found


def _is_chosen_from(node: Node) -> bool:
    return any(user.target is torch.ops.aten.where.self for user in node.users)


def record(function: Callable[[], Sequence[Tensor]], device: torch.device) -> tuple[Sequence[Tensor], Replay]:
    """Records the kernels that a function launches, without running them; returns its outputs, and what runs them."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on, such as those that load batches.
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function()
    return outputs, graph.replay


class Graphed:
    """A function of tensors on a GPU, run as a CUDA graph after its first calls.

    Inputs that were in the same memory in all of the first calls are read there, such as the parameters. The others are copied.
    One that moves later on is copied from then on.

    Arguments:
        run: The function. It must not wait for the device.
        record: Records it, see :func:`record`.
    """

    def __init__(self, run: Run, record: Callable[..., tuple[Sequence[Tensor], Replay]] = record) -> None:
        self._run, self._record = run, record
        self._num_calls = 0
        self._failed = False
        self._places: list[int] = []
        self._moves: set[int] = set()
        self._recorded: tuple[list[Tensor], Sequence[Tensor], Replay] | None = None

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The outputs, in memory of their own."""
        places = [tensor.data_ptr() for tensor in inputs]
        moved = {index for index, (now, before) in enumerate(zip(places, self._places, strict=False)) if now != before}
        if not moved <= self._moves:
            self._moves |= moved
            self._recorded = None
        self._places = places
        self._num_calls += 1
        if self._num_calls <= NUM_WARM or self._failed:
            return self._run(*inputs)
        if self._recorded is None and not self._begin(inputs):
            return self._run(*inputs)
        assert self._recorded is not None
        own, outputs, replay = self._recorded
        for index in self._moves:
            own[index].copy_(inputs[index])
        replay()
        return [output.clone() for output in outputs]

    def _begin(self, inputs: Sequence[Tensor]) -> bool:
        """Records the graph for inputs at these places; returns whether it can be."""
        with torch.inference_mode(False), torch.no_grad():
            # Written to by every later call, in whatever mode.
            own = [tensor.clone() if index in self._moves else tensor for index, tensor in enumerate(inputs)]
        try:
            outputs, replay = self._record(lambda: self._run(*own), own[0].device)
        except RuntimeError as error:
            self._failed = True
            message = " ".join(str(error).split())[:300]
            warn(
                f"CompiledSVI: no CUDA graph of the step could be recorded, its kernels are launched one by one: {message}"
            )
            return False
        self._recorded = own, outputs, replay
        return True
