"""What a recording of a model needs: other tensors in the place of its parameters, and a Pyro that looks at no value."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import internals

# The patches below are for the whole process.
_lock = threading.RLock()


@dataclass(frozen=True)
class Parameters:
    """The unconstrained parameters that a step trains: leaves of autograd, each under one of its names.

    Attributes:
        names: Of the parameters in Pyro, in alphabetical order, so that a repeated run is the same run.
        leaves: The tensors themselves.
    """

    names: tuple[str, ...]
    leaves: tuple[Tensor, ...]

    def in_order(self, names: Iterable[str]) -> Parameters:
        """The same parameters in another order, given by their names."""
        leaves = dict(zip(self.names, self.leaves, strict=True))
        return Parameters(tuple(names), tuple(leaves[name] for name in names))

    def union(self, other: Parameters) -> Parameters:
        """These parameters and those of the other that are new."""
        known = {id(leaf) for leaf in self.leaves}
        new = [pair for pair in zip(other.names, other.leaves, strict=True) if id(pair[1]) not in known]
        return Parameters(self.names + tuple(name for name, _ in new), self.leaves + tuple(leaf for _, leaf in new))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Pyro without anything that looks at a value: ``.item()``, validation, checks for NaN."""
    with (
        _lock,
        pyro.validation_enabled(False),
        internals.without_checks_of_elbos(),
        internals.without_checks_of_samples(),
    ):
        yield


def parameters_in(trace: Trace) -> Parameters:
    """The parameters that a run of model or guide has met, as far as they can be trained."""
    sites: list[Any] = sorted(trace.nodes.values(), key=lambda site: site["name"])
    leaves: dict[int, tuple[str, Tensor]] = {}
    for site in sites:
        if site["type"] != "param":
            continue
        value = site["value"]
        # Parameters that a module keeps to itself (the setting module_local_params) are bare.
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
        if leaf.requires_grad:
            leaves.setdefault(id(leaf), (site["name"], leaf))
    return Parameters(tuple(name for name, _ in leaves.values()), tuple(leaf for _, leaf in leaves.values()))


class _ById(TorchFunctionMode):
    """Replaces tensors by others wherever they are handed to a function of torch."""

    def __init__(self, replacements: dict[int, Tensor]) -> None:
        super().__init__()
        self.replacements = replacements

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: self._replace(value) for name, value in (kwargs or {}).items()}
        return function(*map(self._replace, args), **kwargs)

    def _replace(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.replacements.get(id(value), value)
        if type(value) in (list, tuple):
            return type(value)(map(self._replace, value))
        return value


@contextmanager
def substituted(parameters: Parameters, values: Sequence[Tensor], modules: Iterable[nn.Module]) -> Iterator[None]:
    """Puts tensors in the place of parameters: in Pyro's store, in modules, and wherever else they are held."""
    replacements = {id(leaf): value for leaf, value in zip(parameters.leaves, values, strict=True)}
    for value in values:
        internals.mark_as_parameter(value)
    entries = [
        (module, name)
        for root in modules
        for module in root.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in replacements
    ]
    originals = [module._parameters[name] for module, name in entries]
    try:
        for module, name in entries:
            module._parameters[name] = replacements[id(module._parameters[name])]  # type: ignore[assignment]
        with internals.replaced_in_store(replacements), _ById(replacements):
            yield
    finally:
        for (module, name), original in zip(entries, originals, strict=True):
            module._parameters[name] = original
