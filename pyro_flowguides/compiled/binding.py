"""The parameters of a step as views of vectors, with everything that training keeps for them.

A step is a function of tensors. What goes in and comes out, and what lies between steps:

- ``tensors`` makes the inputs, and ``unpack`` takes them apart inside of the step;
- ``pack`` makes the outputs inside of the step, ``read`` takes them apart, and ``take`` makes them the new state;
- ``join``, ``split`` and ``rows`` lead from the shapes of the parameters to vectors and back;
- ``is_current`` tells whether these are still the parameters that a step would train, ``adopt_moved_values`` reads those that
  ``Module.to`` has given other memory;
- ``snapshot`` copies the state by name, ``restore`` goes back to it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from .. import internals
from ..processes import Processes
from .capture import Parameters
from .snapshot import Snapshot
from .update import Adam, State, Update

# Optimisers that treat every number alike, whatever tensor it is in: for them one vector is as good as many tensors.
_ELEMENTWISE = {
    *("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SGD", "ASGD", "RMSprop", "Rprop", "Adagrad", "Adadelta"),
    *("ClippedAdam", "AdagradRMSProp"),
}

OptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]


class StepResult(NamedTuple):
    """What a step leaves apart from its state."""

    loss: Tensor
    finite: Tensor
    gradients: Sequence[Tensor]
    clipped: Sequence[Tensor]


class Binding:
    """Parameters as views of one vector for each dtype, with the state of their training."""

    def __init__(
        self,
        make_optimizer: OptimizerFactory | None,
        pyro_optim: PyroOptim,
        options: dict[str, Any],
        processes: Processes | None,
        parameters: Parameters,
        previous: Binding | None,
    ) -> None:
        self._processes = processes
        devices = {str(leaf.device) for leaf in parameters.leaves}
        if len(devices) > 1:
            raise ValueError(
                f"CompiledSVI: the parameters are on several devices ({', '.join(sorted(devices))}); use pyro.infer.SVI, or put "
                "them on one"
            )
        self.parameters = parameters
        self.ids = {id(leaf) for leaf in parameters.leaves}
        self.dtypes = list(dict.fromkeys(leaf.dtype for leaf in parameters.leaves))
        self.members = [
            [index for index, leaf in enumerate(parameters.leaves) if leaf.dtype == dtype] for dtype in self.dtypes
        ]
        self.shapes = [leaf.shape for leaf in parameters.leaves]
        # Modules may keep their parameters to themselves.
        self._stored = [internals.stored_leaf(name) is not None for name in parameters.names]
        self.sizes = [[self.shapes[index].numel() for index in members] for members in self.members]
        flat = self.join([leaf.detach() for leaf in parameters.leaves])
        self._choose_optimizer(make_optimizer, pyro_optim, flat)
        self.update = Update(self.adam, **options)
        self.state = self.update.start(flat)
        self.num_states = len(self.dtypes) + 1
        # The state, the learning rate, and the parameters.
        self.num_tensors = self.num_states + 1 + len(self.shapes)
        if previous is not None:
            self._inherit(previous)
        self._attach()

    def _choose_optimizer(
        self, make_optimizer: OptimizerFactory | None, pyro_optim: PyroOptim, flat: Sequence[Tensor]
    ) -> None:
        """Adam goes into the graph; anything else stays outside, on the vectors if it can."""
        self.adam: Adam | None = None
        self.outside: torch.optim.Optimizer | PyroOptim | None = pyro_optim
        self.on_vectors = False
        self.learning_rate = 1.0
        if make_optimizer is None:
            return
        self.vector_leaves = [vector.clone().requires_grad_() for vector in flat]
        optimizer = make_optimizer(self.vector_leaves)
        if len(optimizer.param_groups) == 1:
            self.learning_rate = float(optimizer.param_groups[0]["lr"])
            self.adam = Adam.like(optimizer)
            self.on_vectors = type(optimizer).__name__ in _ELEMENTWISE
        self.outside = None
        if self.adam is None:
            self.outside = optimizer if self.on_vectors else make_optimizer(list(self.parameters.leaves))
            self.base_rates = [group["lr"] for group in self.outside.param_groups]

    # --- views ---------------------------------------------------------------------------------------------------------

    def rows(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """For each parameter a view of its columns, shape ``(rows, *shape)``."""
        views: list[Tensor] = [matrices[0]] * len(self.shapes)
        for members, sizes, matrix in zip(self.members, self.sizes, matrices, strict=True):
            for index, part in zip(members, matrix.split(sizes, dim=1), strict=True):
                views[index] = part.view(len(matrix), *self.shapes[index])
        return views

    def split(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """For each parameter its part of a vector, in the parameter's shape; the inverse of :meth:`join`."""
        return [rows[0] for rows in self.rows([vector.unsqueeze(0) for vector in vectors])]

    def join(self, values: Sequence[Tensor]) -> list[Tensor]:
        """One vector for each dtype."""
        return [torch.cat([values[index].reshape(-1) for index in members]) for members in self.members]

    def _attach(self) -> None:
        """Makes the parameters views of the vectors."""
        self.values = [rows[0] for rows in self.rows(self.state.vectors)]
        for leaf, view in zip(self.parameters.leaves, self.values, strict=True):
            leaf.data = view
        self._pointers = [leaf.data_ptr() for leaf in self.parameters.leaves]

    def is_current(self) -> bool:
        """Whether these are still the parameters that a step would train, with their dtypes and devices, and in Pyro's store."""
        return all(
            leaf.requires_grad
            and leaf.shape == value.shape
            and leaf.dtype == value.dtype
            and leaf.device == value.device
            and (internals.stored_leaf(name) is leaf or not stored)
            for name, leaf, value, stored in zip(
                self.parameters.names, self.parameters.leaves, self.values, self._stored, strict=True
            )
        )

    def adopt_moved_values(self) -> None:
        """Takes over parameters that have been given other memory, by ``to`` for example."""
        if [leaf.data_ptr() for leaf in self.parameters.leaves] == self._pointers:
            return
        with torch.no_grad():
            for view, leaf in zip(self.values, self.parameters.leaves, strict=True):
                view.copy_(leaf)
        self._attach()

    def _inherit(self, previous: Binding) -> None:
        """Takes over what was kept for parameters that were there before."""
        known = dict(zip(map(id, previous.parameters.leaves), previous.rows(previous.state.vectors), strict=True))
        for leaf, rows in zip(self.parameters.leaves, self.rows(self.state.vectors), strict=True):
            if id(leaf) in known:
                rows[1:].copy_(known[id(leaf)][1:])
        self.state = self.state._replace(scalars=previous.state.scalars)

    def check_fits(self, snapshot: Snapshot) -> None:
        """Raises ValueError unless a snapshot is of the same parameters, and of as many numbers for each."""
        ours = dict(zip(self.parameters.names, self.rows(self.state.vectors), strict=True))
        for name in sorted({*ours, *snapshot.rows}):
            there, here = (list(rows[name].shape[1:]) if name in rows else "none" for rows in (snapshot.rows, ours))
            if there != here:
                raise ValueError(
                    f"the state is of another model, guide or set of arguments: parameter '{name}' has shape {there} there and "
                    f"{here} here"
                )
            if len(snapshot.rows[name]) != len(ours[name]):
                raise ValueError("the state is of another optimiser, or one of both keeps an average of the parameters")

    def snapshot(self, buffers: dict[str, Tensor]) -> Snapshot:
        """The state, as a copy.

        Arguments:
            buffers: Copies of the buffers that belong to it.
        """
        rows = self.rows([vectors.clone() for vectors in self.state.vectors])
        named = dict(zip(self.parameters.names, rows, strict=True))
        return Snapshot(named, self.state.scalars.clone(), self._outside_state(), buffers)

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot of the same parameters, in the same order, with the same number of rows."""
        with torch.no_grad():
            for rows, saved in zip(self.rows(self.state.vectors), snapshot.rows.values(), strict=True):
                rows.copy_(saved)
        self.state = State(self.state.vectors, snapshot.scalars.to(self.state.scalars).clone())
        if isinstance(self.outside, PyroOptim):
            self.outside.set_state(snapshot.optimizer)
            # The state is taken over by the next optimisers that are made.
            self.outside.optim_objs.clear()
        elif self.outside is not None:
            self.outside.load_state_dict(copy.deepcopy(snapshot.optimizer))

    # --- a step --------------------------------------------------------------------------------------------------------

    def tensors(self, learning_rate: float) -> list[Tensor]:
        """The inputs of a step that are not arguments of the model."""
        scalars = self.state.scalars
        return [*self.state.vectors, scalars, scalars.new_full((), learning_rate), *self.values]

    def unpack(self, tensors: Sequence[Tensor]) -> tuple[State, Tensor, Sequence[Tensor]]:
        """The state, the learning rate and the parameters from the inputs of a step."""
        state = State(tuple(tensors[: self.num_states - 1]), tensors[self.num_states - 1])
        return state, tensors[self.num_states], tensors[self.num_states + 1 : self.num_tensors]

    def pack(
        self, state: State, loss: Tensor, gradients: Sequence[Tensor], learning_rate: Tensor
    ) -> tuple[Tensor, ...]:
        """The outputs of a step."""
        joined = self.join(gradients)
        if self._processes is not None:
            # Before the guard, so that all processes take or skip a step together.
            joined, loss = self._processes.mean(joined, loss)
        state, clipped, finite = self.update(state, loss, joined, learning_rate)
        # The loss as a tensor of its own: it may be a view of something else.
        outputs = (*state.vectors, state.scalars, loss.clone(), finite, *joined)
        return outputs if self.adam else (*outputs, *clipped)

    def read(self, outputs: Sequence[Tensor]) -> StepResult:
        """What the outputs of a step hold apart from the state."""
        loss, finite, *gradients = outputs[self.num_states :]
        count = len(self.dtypes)
        return StepResult(loss, finite, gradients[:count], gradients[count:])

    def take(self, outputs: Sequence[Tensor]) -> StepResult:
        """Makes the outputs of a step the state."""
        for vectors, new in zip(self.state.vectors, outputs, strict=False):
            vectors.copy_(new)
        self.state = State(self.state.vectors, outputs[self.num_states - 1])
        return self.read(outputs)

    # --- an optimiser outside of the graph -----------------------------------------------------------------------------

    def step_outside(self, gradients: Sequence[Tensor], factor: float) -> None:
        """One step of the optimiser that is not in the graph.

        Arguments:
            gradients: One vector for each dtype.
            factor: What the learning rate is multiplied by.
        """
        leaves = self.vector_leaves if self.on_vectors else self.parameters.leaves
        parts = gradients if self.on_vectors else self.split(gradients)
        for leaf, gradient in zip(leaves, parts, strict=True):
            # Optimisers write to it, which a tensor of inference mode would not have.
            leaf.grad = gradient.clone()
        if isinstance(self.outside, PyroOptim):
            with _scaled_rates(self.outside, factor):
                self.outside(list(leaves))
        elif self.outside is not None:
            for leaf, vectors in zip(leaves if self.on_vectors else (), self.state.vectors, strict=False):
                leaf.data = vectors[0]
            for group, rate in zip(self.outside.param_groups, self.base_rates, strict=True):
                group["lr"] = rate * factor
            self.outside.step()
        for leaf in leaves:
            leaf.grad = None

    def _outside_state(self) -> Any:
        if isinstance(self.outside, PyroOptim):
            return copy.deepcopy(self.outside.get_state())
        return None if self.outside is None else copy.deepcopy(self.outside.state_dict())


@contextmanager
def _scaled_rates(optim: PyroOptim, factor: float) -> Iterator[None]:
    """An optimiser of Pyro with other learning rates for a while; with a power of 2 as the factor nothing is rounded."""
    groups = [
        group
        for each in (optim.optim_objs.values() if factor != 1 else ())
        # A scheduler has its optimiser inside.
        for group in getattr(each, "optimizer", each).param_groups
    ]
    for group in groups:
        group["lr"] *= factor
    try:
        yield
    finally:
        for group in groups:
            group["lr"] /= factor


def optimizer_factory(optim: PyroOptim | OptimizerFactory) -> OptimizerFactory | None:
    """A function from parameters to a torch optimiser; None if only Pyro knows how to make it."""
    if not isinstance(optim, PyroOptim):
        return optim
    plain = type(optim) is PyroOptim and isinstance(optim.pt_optim_args, dict) and not optim.pt_clip_args
    if not plain or not isinstance(optim.pt_optim_constructor, type):
        return None
    options: Any = optim.pt_optim_args
    return functools.partial(optim.pt_optim_constructor, **options)
