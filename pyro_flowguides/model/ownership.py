"""Parameters that belong to a fit, and stay what they were whatever is fitted, cleared, loaded or set later.

Pyro keeps parameters by name in one store of the process. Two guides of one class have the same names, so that the second takes
the values of the first. A fit trains in a store of its own (:func:`private_store`), and returns copies that own their
parameters (:func:`owned`):

- A ``PyroModule``, such as an autoguide, is copied, and uses a private store in every call.
- A function that calls ``pyro.param`` or ``pyro.module`` is wrapped (:class:`OwnedFunction`), and sees the values of its fit in
  every call. A module that it closes over is given them for the length of the call.

The buffers of a module that a function closes over (the running mean of a BatchNorm, for example) stay shared. Those of a
``PyroModule`` are copied with it.

Pyro's handlers and its store are global, so that one thread at a time may use them (:func:`exclusive`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import transform_to

from .. import internals

_lock = threading.RLock()


@contextmanager
def exclusive() -> Iterator[None]:
    """One thread at a time: whoever runs a model within it is alone with Pyro's handlers and store."""
    with _lock:
        yield


class PrivateStore:
    """A parameter store: the context in which it takes the place of Pyro's.

    Arguments:
        params: Unconstrained parameters by name.
        constraints: Their constraints by name.
        held: Values for parameters that modules hold, by name. A module has the value within the context.
        leaves: The parameters themselves that have these values, as far as they are known.
        belongs_to_fit: Whether the parameters are those of a :class:`pyro_flowguides.FitResult`.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor] | None = None,
        constraints: Mapping[str, Any] | None = None,
        held: Mapping[str, Tensor] | None = None,
        leaves: Mapping[str, Tensor] | None = None,
        belongs_to_fit: bool = False,
    ) -> None:
        self.params = dict(params or {})
        self.constraints = dict(constraints or {})
        self.held = dict(held or {})
        self.leaves = dict(leaves or {})
        self.belongs_to_fit = belongs_to_fit
        self._open: list[ExitStack] = []

    def __enter__(self) -> None:
        # Whoever is within it already has the parameters.
        with ExitStack() as stack:
            stack.enter_context(exclusive())
            if not self._open:
                stack.enter_context(internals.parameter_store(self.params, self.constraints))
                if self.held:
                    stack.enter_context(_ModulesHolding(self.held, self.leaves, are_kept=False))
            self._open.append(stack.pop_all())

    def __exit__(self, *error: Any) -> None:
        self._open.pop().__exit__(*error)

    def __getstate__(self) -> dict[str, Any]:
        # A parameter of a module is that of the module in the copy, too.
        params = {
            name: _without_link(leaf) if isinstance(leaf, nn.Parameter) else _copied(leaf)
            for name, leaf in self.params.items()
        }
        held = {name: _copied(value) for name, value in self.held.items()}
        return {**self.__dict__, "params": params, "held": held, "leaves": {}, "_open": []}


class _ModulesHolding(Messenger):
    """Gives modules other values for their parameters, each when its name comes by.

    Arguments:
        values: Unconstrained values by name.
        leaves: Takes up the parameters that were given a value.
        are_kept: Whether modules keep these values; otherwise they get back theirs at the end.
    """

    def __init__(self, values: Mapping[str, Tensor], leaves: dict[str, Tensor], are_kept: bool) -> None:
        super().__init__()
        self.values = values
        self.leaves = leaves
        self.are_kept = are_kept
        self._given: dict[int, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> _ModulesHolding:
        # At once where they are known: what is recorded, or inspected behind a block, sends no messages.
        for name, leaf in list(self.leaves.items()):
            if leaf.shape == self.values[name].shape:
                self._give(name, leaf)
        return super().__enter__()

    def _pyro_param(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.values or msg.get("_value_is_given"):
            return
        # A module hands its parameter to Pyro, or has just put it into the store. (While a step is recorded, plain tensors take
        # the place of parameters.)
        candidates = (*msg["args"], internals.stored_parameters()[0].get(name))
        leaf = next((each for each in candidates if isinstance(each, nn.Parameter) and type(each) is not Tensor), None)
        if leaf is None:
            return
        # The innermost of several stores gives the value and takes it back.
        msg["_value_is_given"] = True
        self._give(name, leaf)

    def _give(self, name: str, leaf: Tensor) -> None:
        if id(leaf) in self._given:
            return
        value = self.values[name]
        if leaf.shape != value.shape:
            raise ValueError(
                f"parameter '{name}' has shape {tuple(leaf.shape)} in its module now, and had shape {tuple(value.shape)} when it "
                "was fitted; use the module with the sizes it was fitted with"
            )
        self._given[id(leaf)] = leaf, leaf.data
        self.leaves[name] = leaf
        leaf.data = value.detach().clone().to(leaf.device)

    def _pyro_sample(self, msg: Any) -> None:
        # A deterministic site may hold a parameter itself, which is about to get back what it had.
        if not self.are_kept and any(msg["value"] is leaf for leaf, _ in self._given.values()):
            msg["value"] = msg["value"].detach().clone()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for leaf, data in () if self.are_kept else self._given.values():
            leaf.data = data
        self._given.clear()


@dataclass(frozen=True)
class OwnedFunction:
    """A model or a guide with parameters of its own.

    Attributes:
        function: The function or module as the user wrote it.
        store: Its parameters.
    """

    function: Callable
    store: PrivateStore

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.store:
            return self.function(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        for leaf in self.store.leaves.values():
            _without_link(leaf)
        return self.__dict__


@contextmanager
def private_store(model: Callable, guide: Callable) -> Iterator[tuple[Callable, Callable]]:
    """A parameter store for one fit, in place of Pyro's, with the model and the guide to train in it.

    It begins with copies of the values that Pyro's store holds for functions. Modules begin with the parameters that they hold,
    and never take those of a stranger of the same name. A model or a guide of an earlier fit is copied, and begins with its
    values. The modules that were trained keep their parameters to themselves afterwards, in a store of their own.

    Arguments:
        model: The model.
        guide: The guide.
    """
    with exclusive(), ExitStack() as stack:
        params, constraints = internals.stored_parameters()
        params = {
            name: _copied(leaf)
            for name, leaf in params.items()
            if not isinstance(leaf, nn.Parameter) and not any(_is_name_of(name, each) for each in (model, guide))
        }
        constraints = {name: constraints[name] for name in params}
        held: dict[str, Tensor] = {}
        trained = []
        memo: dict[int, Any] = {}
        # The model last: where both come from different fits, its parameters are its own.
        for function in (guide, model):
            earlier = _store_of(function)
            if isinstance(function, OwnedFunction):
                function = function.function
            if earlier is not None and earlier.belongs_to_fit and isinstance(function, nn.Module):
                function = internals.copy_with_models(function, memo)
            if isinstance(function, PyroModule):
                internals.set_module_context(function, None)
            if earlier is not None:
                state = earlier.__getstate__() if earlier.belongs_to_fit else vars(earlier)
                params.update(_loose(state["params"]))
                constraints.update(state["constraints"])
                held.update(state["held"])
                # At once, where nothing needs to run for it: a model that is run for inspection is hidden from handlers.
                for name, leaf in earlier.leaves.items():
                    leaf.data = held[name].detach().clone().to(leaf.device)
            trained.append(function)
        stack.enter_context(internals.parameter_store(params, constraints))
        if held:
            stack.enter_context(_ModulesHolding(held, {}, are_kept=True))
        try:
            yield trained[1], trained[0]
        finally:
            for function in trained:
                if isinstance(function, PyroModule):
                    kept = _loose(params) | _held_by(function, function, params)
                    store = PrivateStore(kept, {name: constraints[name] for name in kept})
                    internals.set_module_context(function, store)


def owned(model: Callable, guide: Callable) -> tuple[Callable, Callable, dict[str, Tensor]]:
    """Copies of a model and a guide that own the parameters in Pyro's store, for the result of a fit.

    Arguments:
        model: The model.
        guide: The guide.

    Returns:
        The model, the guide, and the values of all parameters but the guide's, in their own space, by name.
    """
    live, constraints = internals.stored_parameters()
    of_guide, of_model = (_names_of(function, live) for function in (guide, model))
    values = {name: _copied(leaf) for name, leaf in live.items() if name not in of_guide}
    loose = values.keys() - of_model
    held = {name for name in loose if isinstance(live[name], nn.Parameter)}
    memo: dict[int, Any] = {}
    results = []
    store = PrivateStore(
        {name: _copied(values[name]) for name in loose - held},
        {name: constraints[name] for name in loose},
        {name: values[name] for name in held},
        {name: live[name] for name in held},
        belongs_to_fit=True,
    )
    for function in (model, guide):
        result = internals.copy_with_models(function, memo) if isinstance(function, nn.Module) else function
        if isinstance(function, PyroModule) and isinstance(result, PyroModule):
            # Otherwise the first call would put them into the store, and Pyro switches their gradients on there.
            own = _held_by(result, function, live)
            store.params.update(own)
            store.constraints.update({name: constraints[name] for name in own})
            internals.set_module_context(result, store)
        elif loose or result is not function:
            result = OwnedFunction(result, store)
        results.append(result)
    constrained = {name: transform_to(constraints[name])(value).detach() for name, value in values.items()}
    return results[0], results[1], constrained


@contextmanager
def values_in_place(*functions: Any) -> Iterator[None]:
    """Modules that the functions of a fit close over hold the values of the fit until the end of the block.

    Needed where something is computed from a trace after the function has returned, since a distribution may hold a parameter.
    """
    with ExitStack() as stack:
        for function in functions:
            store = _store_of(function)
            if store is not None:
                stack.enter_context(store)
        yield


def _store_of(function: Any) -> PrivateStore | None:
    """The private store that a model or a guide has from an earlier fit."""
    if isinstance(function, OwnedFunction):
        return function.store
    if isinstance(function, PyroModule):
        inside = internals.inside_of_module_context(function)
        return inside if isinstance(inside, PrivateStore) else None
    return None


def _names_of(function: Callable, params: Mapping[str, Tensor]) -> set[str]:
    """The names of the parameters that belong to a module."""
    own = {id(leaf) for leaf in function.parameters()} if isinstance(function, nn.Module) else set()
    return {name for name, leaf in params.items() if id(leaf) in own or _is_name_of(name, function)}


def _loose(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that no module holds."""
    return {name: leaf for name, leaf in params.items() if not isinstance(leaf, nn.Parameter)}


def _held_by(result: nn.Module, module: nn.Module, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a module's copy, under the names that those of the module have in a store."""
    paths = {id(leaf): path for path, leaf in module.named_parameters()}
    copies = dict(result.named_parameters())
    return {name: copies[paths[id(leaf)]] for name, leaf in params.items() if id(leaf) in paths}


def _is_name_of(name: str, function: Callable) -> bool:
    """Whether a parameter of this name belongs to a module of Pyro that has a name, as every autoguide has."""
    root = internals.module_name(function) if isinstance(function, PyroModule) else ""
    return bool(root) and name.startswith((f"{root}.", f"{root}$$$"))


def _without_link(leaf: Tensor) -> Tensor:
    """A parameter without the link to itself that Pyro gives it, which can be neither copied nor pickled."""
    vars(leaf).pop("unconstrained", None)
    return leaf


def _copied(leaf: Tensor) -> Tensor:
    with torch.no_grad():
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)
