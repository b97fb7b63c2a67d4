"""A step whose particles are taken in chunks, one after the other, so that its memory is that of a chunk.

The loss is a mean over particles, and so is its gradient: those of the chunks are added up, each weighed by its share of the
particles. The parameters move once, at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.fx import GraphModule

from ..checks import check_positive_integer
from .capture import Gradients
from .losses import KL, PyroELBO
from .memory import chunk_size_for
from .rewrite import Run

# Losses that are a mean over particles. Those of TraceGraph_ELBO share a running baseline, those of RenyiELBO a logarithm.
MEANS = (Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO)
# Fewer particles are not measured: a chunk of them would hardly be smaller.
MIN_MEASURED = 16


class Chunks:
    """How many particles of an objective a step takes at a time.

    Arguments:
        objective: The objective.
        size: The number of particles of a chunk; ``"auto"`` for as many as the memory has room for; None for all of them.

    Attributes:
        size: As given; a number or None, once :meth:`settle` has chosen one for ``"auto"``.

    Raises:
        ValueError: if the size is no positive number, or the objective is no mean over particles.
    """

    def __init__(self, objective: Any, size: int | str | None) -> None:
        self._elbo = elbo = _mean_over_particles(objective)
        if isinstance(size, str):
            if size != "auto":
                raise ValueError(f'CompiledSVI: chunk_size must be a number, "auto" or None, got {size!r}')
            # What cannot be split is not.
            size = None if elbo is None or elbo.num_particles <= MIN_MEASURED else size
        elif size is not None:
            check_positive_integer("CompiledSVI", "chunk_size", size)
            if elbo is None:
                loss = type(objective.elbo if isinstance(objective, PyroELBO) else objective).__name__
                raise ValueError(
                    f"CompiledSVI: chunk_size needs a loss that is a mean over particles, such as Trace_ELBO, and {loss} is not "
                    "known to be one: what its particles contribute depends on the others. Leave chunk_size out"
                )
        self.size = size

    def settle(self, loss: Callable[[int], Tensor], gradient: Callable[[int], Any]) -> None:
        """Chooses the size for ``"auto"``, by what steps with few particles hold in memory.

        Arguments:
            loss: Computes the loss with a number of particles.
            gradient: Computes the loss and its gradient.
        """
        assert self._elbo is not None
        self.size = chunk_size_for(loss, gradient, self._elbo.num_particles)

    @property
    def parts(self) -> list[tuple[int | None, float]]:
        """The particles of each chunk, None for all, with its share of the particles."""
        if self.size is None or self._elbo is None or self.size >= (number := self._elbo.num_particles):
            return [(None, 1.0)]
        assert isinstance(self.size, int)
        whole, rest = divmod(number, self.size)
        return [(size, size / number) for size in [self.size] * whole + [rest] * bool(rest)]

    @property
    def counted(self) -> list[tuple[int | None, float, int]]:
        """The chunks of different sizes, with their share of the particles, and the number of chunks like this."""
        return [(*part, count) for part, count in Counter(self.parts).items()]

    @contextmanager
    def taking(self, number: int | None) -> Iterator[None]:
        """The objective takes this many particles."""
        elbo = self._elbo
        if number is None or elbo is None:
            yield
            return
        before, nesting = elbo.num_particles, elbo.max_plate_nesting
        elbo.num_particles = number
        try:
            yield
        finally:
            elbo.num_particles = before
            if number == 1:
                # Pyro's guess for one particle has no dimension for many.
                elbo.max_plate_nesting = nesting


def _mean_over_particles(objective: Any) -> ELBO | None:
    """The ELBO of an objective that is a mean over its particles; None for any other objective."""
    if type(objective) is KL:
        return objective.elbo
    if isinstance(objective, PyroELBO) and isinstance(objective.elbo, MEANS):
        # A class from outside of Pyro may do anything.
        return objective.elbo if type(objective.elbo).__module__.startswith("pyro.infer") else None
    return None


def mean(parts: Iterable[tuple[Gradients, float]]) -> Gradients:
    """The loss and the gradients of a whole step, from those of its chunks with their shares."""
    total: Gradients | None = None
    for part, share in parts:
        if share == 1:
            return part
        if total is None:
            total = Gradients(share * part.loss, part.parameters, tuple(share * each for each in part.gradients))
            continue
        both = total.parameters.union(part.parameters)
        # In place: these tensors are ours, and there is one for each parameter.
        pairs = zip(total.gradients_of(both), part.gradients_of(both), strict=True)
        sums = tuple(ours.add_(theirs, alpha=share) for ours, theirs in pairs)
        total = Gradients(total.loss + share * part.loss, both, sums)
    assert total is not None
    return total


@dataclass(frozen=True)
class Program:
    """The graphs of a step: one of the whole step, or one for each size of chunk, and one of what follows.

    A graph of chunks takes the inputs of the step, and returns its part of loss and gradient. The last graph takes the inputs,
    and behind them, where there are chunks, the sum of these parts; it returns what the step returns.

    Attributes:
        graphs: The graphs.
        counts: How often each graph of chunks is run.
    """

    graphs: tuple[GraphModule, ...]
    counts: tuple[int, ...] = ()

    @property
    def num_nodes(self) -> int:
        """The size of all graphs together."""
        return sum(len(graph.graph.nodes) for graph in self.graphs)

    def examples(self, inputs: Sequence[Tensor]) -> list[list[Tensor]]:
        """Inputs for each graph, from those of a step."""
        sums = example_outputs(self.graphs[0]) if self.counts else []
        return [*[list(inputs) for _ in self.counts], [*inputs, *sums]]

    def run_by(self, backend: Callable[[GraphModule, Sequence[Tensor]], Run], inputs: Sequence[Tensor]) -> Run:
        """What runs a step.

        Arguments:
            backend: Makes what runs a graph, from the graph and an example of its inputs.
            inputs: An example of the inputs of a step.
        """
        *parts, last = map(backend, self.graphs, self.examples(inputs))
        if not parts:
            return last

        def run(*inputs: Tensor) -> Sequence[Tensor]:
            sums: Sequence[Tensor] | None = None
            for part, count in zip(parts, self.counts, strict=True):
                for _ in range(count):
                    new = part(*inputs)
                    sums = new if sums is None else [ours + theirs for ours, theirs in zip(sums, new, strict=True)]
            return last(*inputs, *(sums or ()))

        return run


def example_outputs(graph: GraphModule) -> list[Tensor]:
    """Zeros like the outputs of a graph."""
    (output,) = [node for node in graph.graph.nodes if node.op == "output"]
    values: list[Tensor] = [node.meta["val"] for node in output.args[0]]
    return [torch.zeros(value.shape, dtype=value.dtype, device=value.device) for value in values]
