"""What a training trains: its parameters, the buffers that belong to them, and the loss of model and guide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from ..processes import Processes
from . import capture, chunks
from .binding import Binding
from .capture import Parameters
from .chunks import Chunks
from .losses import Objective, Prepared
from .snapshot import Buffers, Snapshot


class Trained:
    """What a training trains: the parameters that it has met so far, bound together, and the buffers of model and guide.

    Arguments:
        model: The model.
        guide: The guide.
        objective: The objective.
        pieces: How many particles it takes at a time.
        processes: The processes that train together; None for one alone.
        bind: Binds parameters, taking over the state of an earlier binding if there is one.
        begin_anew: Called when the parameters are not those of before.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        objective: Objective,
        pieces: Chunks,
        processes: Processes | None,
        bind: Callable[[Parameters, Binding | None], Binding],
        begin_anew: Callable[[], None],
    ) -> None:
        self.objective, self.chunks = objective, pieces
        self.functions = model, guide
        self._processes = processes
        # The tensors that the objective has made for the step, see Prepared.
        self.inputs: tuple[Tensor, ...] | None = None
        self._step = 0
        # How many parameters are those of the first of several processes.
        self._num_shared = 0
        self.modules = [function for function in (model, guide) if isinstance(function, nn.Module)]
        self.buffers = Buffers(model, guide)
        # None before the first step.
        self.binding: Binding | None = None
        self._make_binding = bind
        self._begin_anew = begin_anew

    @property
    def bound(self) -> Binding:
        """The binding, after the first step."""
        assert self.binding is not None
        return self.binding

    @property
    def is_together(self) -> bool:
        """Whether the parameters are those of the first of several processes."""
        return self.binding is not None and self._num_shared > 0

    def drop_stale(self) -> None:
        """Forgets the parameters if they were replaced, as by clearing or loading Pyro's store."""
        if self.binding is not None and not self.binding.is_current():
            self.binding = None

    def prepare(self, step: int, args: tuple, kwargs: dict[str, Any]) -> None:
        """Lets the objective make its tensors for a step."""
        self._step = step
        self.inputs = ()
        if isinstance(self.objective, Prepared):
            like = torch.zeros(()) if self.binding is None else self.binding.state.scalars
            self.inputs = self.objective.inputs(step, like, *self.functions, args, kwargs)

    def is_comparable(self, first: int, last: int) -> bool:
        """Whether these two steps minimise the same."""
        return not isinstance(self.objective, Prepared) or self.objective.is_comparable(first, last)

    def step_inputs(self, learning_rate: float, arguments: Sequence[Tensor]) -> list[Tensor]:
        """All inputs of a captured step.

        Arguments:
            learning_rate: The learning rate.
            arguments: The tensors among the arguments of model and guide.
        """
        return [*self.bound.tensors(learning_rate), *(self.inputs or ()), *arguments]

    @contextmanager
    def given(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """The loss takes other tensors in the place of those of the objective."""
        own = self.inputs
        self.inputs = tuple(inputs)
        try:
            yield
        finally:
            self.inputs = own

    def loss(self, args: tuple, kwargs: dict[str, Any], num_particles: int | None = None) -> Tensor:
        """The loss of the objective at the tensors that it has made last, with this many particles; by default all of them."""
        if self.inputs is None:
            self.prepare(self._step, args, kwargs)
        loss: Callable[..., Tensor] = self.objective.loss
        with self.chunks.taking(num_particles):
            return loss(*self.functions, args, kwargs, *(self.inputs or ()))

    def gradients(self, args: tuple, kwargs: dict[str, Any]) -> capture.Gradients:
        """Loss and gradients by running model and guide, chunk after chunk of the particles."""
        parts = self.chunks.parts
        return chunks.mean((self._gradients_of(number, args, kwargs), share) for number, share in parts)

    def _gradients_of(self, num_particles: int | None, args: tuple, kwargs: dict[str, Any]) -> capture.Gradients:
        return capture.differentiate(lambda: self.loss(args, kwargs, num_particles))

    def _settle_chunks(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Chooses how many particles are taken at a time, where the memory decides."""

        def settle() -> None:
            with capture.no_waiting():
                self.chunks.settle(
                    lambda number: self.loss(args, kwargs, number),
                    lambda number: self._gradients_of(number, args, kwargs),
                )

        if self.chunks.size == "auto":
            with capture.without_side_effects(settle):
                pass

    def differentiate(self, args: tuple, kwargs: dict[str, Any]) -> capture.Gradients:
        """Loss and gradients by running model and guide, and the parameters that are new, bound."""
        self._settle_chunks(args, kwargs)
        # The first time with Pyro's checks as the user has set them.
        with capture.no_waiting() if self.binding is not None else nullcontext():
            result = self.gradients(args, kwargs)
        self._bind(result.parameters)
        return result

    def find(self, args: tuple, kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """Binds the parameters for these arguments; on leaving, all that running model and guide has changed is undone."""

        def run() -> None:
            with capture.no_waiting():
                self.differentiate(args, kwargs)

        return capture.without_side_effects(run)

    def ensure(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Finds the parameters unless they are known."""
        self.drop_stale()
        if self.binding is None:
            with self.find(args, kwargs):
                pass

    def begin_together(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Takes parameters and buffers of the first process, and a seed of its own.

        Raises:
            ValueError: if the processes have different parameters.
        """
        processes = self._processes
        assert processes is not None
        self.ensure(args, kwargs)
        self._num_shared = 0
        self.share_new()
        self.buffers.restore(processes.from_first(self.buffers.copy))
        processes.separate_noise()
        if isinstance(self.objective, Prepared):
            self.objective.begin_anew()
            self.inputs = None

    def share_new(self) -> bool:
        """Takes the parameters of the first of several processes, if some have been met since the last time.

        All processes have to meet them at the same step.

        Returns:
            Whether there are some.

        Raises:
            ValueError: if the processes have different parameters.
        """
        processes, parameters = self._processes, self.bound.parameters
        if processes is None or len(parameters.leaves) == self._num_shared:
            return False
        if self._num_shared:
            new = ", ".join(f"'{name}'" for name in parameters.names[self._num_shared :])
            processes.meet(f"has met new parameters ({new}) in the middle of the training")
        ours = [
            f"'{name}' of shape {list(leaf.shape)} and dtype {leaf.dtype}"
            for name, leaf in zip(parameters.names, parameters.leaves, strict=True)
        ]
        for rank, theirs in enumerate(processes.gather(ours)):
            for here, there in zip_longest(ours, theirs, fillvalue="no more"):
                if here != there:
                    raise ValueError(
                        f"CompiledSVI: processes {processes.rank} and {rank} have different parameters: {here} in the one, "
                        f"{there} in the other; model, guide and the shapes of the data must be the same in all processes"
                    )
        processes.share(self.bound.state.vectors)
        self._num_shared = len(parameters.leaves)
        return True

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot.

        Raises:
            ValueError: if it is of other parameters, of another optimiser, or of other buffers.
        """
        self.bound.check_fits(snapshot)
        if tuple(snapshot.rows) != self.bound.parameters.names:
            # The state of an optimiser outside of the graph is one of the parameters in their order.
            self._rebind(self.bound.parameters.in_order(snapshot.rows))
        self.buffers.restore(snapshot.buffers)
        self.bound.restore(snapshot)

    def _bind(self, parameters: Parameters) -> None:
        """Makes sure that these parameters are trained."""
        if self.binding is not None:
            if {id(leaf) for leaf in parameters.leaves} <= self.binding.ids:
                self.binding.adopt_moved_values()
                return
            parameters = self.binding.parameters.union(parameters)
        elif not parameters.leaves:
            raise ValueError(
                "CompiledSVI: the loss has no gradient to any parameter: model and guide have none, or none that it depends on"
            )
        self._rebind(parameters)

    def _rebind(self, parameters: Parameters) -> None:
        self.binding = self._make_binding(parameters, self.binding)
        # They have the dtype and the device of the parameters.
        self.inputs = None
        self._begin_anew()
