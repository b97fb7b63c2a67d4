"""Guards: whether the Python values that a captured step has seen are still what they were.

A graph repeats what was recorded. Numbers, flags and arrays that model and guide read from closures, global variables and
attributes are baked into it, and so are the tensors among them, as constants. The guards of a captured step look for all of
these values once, when it is captured, and compare them by identity (numbers and strings by value) before each run of steps.
What torch calls guards is the same idea.

Values are looked for four levels deep, and in the first hundred entries of each list and dictionary. The insides of torch, Pyro,
numpy and of this library are left out, but for attributes of their modules that are meant to be changed, such as ``training``.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from .. import internals

MAX_DEPTH = 4
MAX_LENGTH = 100

# Compared by value; everything else by identity.
_NUMBERS = (int, float, complex, str, bytes, type(None))
# Their functions depend on their arguments alone, and of their modules only these attributes are meant to be changed.
_LIBRARIES = {"torch", "pyro", "numpy", "pyro_flowguides"}


class Guards:
    """The guards of one captured step.

    Arguments:
        values: Model, guide, objective, and whatever else the step is computed from.
        constants: The tensors that the graph holds, which must not be written to.
    """

    def __init__(self, values: Iterable[Any], constants: Iterable[Tensor]) -> None:
        # Variables of closures: the cell, and the value in it.
        self._cells: list[tuple[Any, Any]] = []
        # Attributes, global variables and entries of dictionaries: the dictionary, the name, and its value.
        self._entries: list[tuple[Mapping[Any, Any], Any, Any]] = []
        # Lists and arrays, with a copy of each.
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []
        # Parameters, and whether they require a gradient.
        self._flags: list[tuple[nn.Parameter, bool]] = []
        # Tensors, and the number of writes to them.
        self._constants = [(tensor, internals.version(tensor)) for tensor in constants]
        # The ids of objects that were visited.
        self._seen: set[int] = set()
        for value in values:
            self._visit(value, 0)

    def difference(self) -> str | None:
        """The first value that has changed, as a clause; None if all are what they were."""
        for cell, value in self._cells:
            if not _same(cell.cell_contents, value):
                return (
                    f"a variable was {_brief(value)} when the step was captured and is {_brief(cell.cell_contents)} now"
                )
        for mapping, name, value in self._entries:
            if not _same(mapping.get(name), value):
                return f"'{name}' was {_brief(value)} when the step was captured and is {_brief(mapping.get(name))} now"
        for values, before in self._lists:
            if len(values) != len(before) or not all(map(_same, values, before)):
                return "a list was changed"
        for array, copy in self._arrays:
            if not np.array_equal(array, copy):
                return "an array of numpy was written to"
        for parameter, requires_grad in self._flags:
            if parameter.requires_grad != requires_grad:
                return f"requires_grad of a parameter is {parameter.requires_grad}"
        return "a tensor was written to" if self.changed_constants() else None

    def changed_constants(self) -> list[Tensor]:
        """The constants that were written to."""
        return [tensor for tensor, version in self._constants if internals.version(tensor) != version]

    def _visit(self, value: Any, depth: int) -> None:
        if (
            depth > MAX_DEPTH
            or id(value) in self._seen
            or isinstance(value, (*_NUMBERS, Tensor, type, types.ModuleType))
        ):
            return
        self._seen.add(id(value))
        if isinstance(value, types.MethodType):
            self._visit(value.__self__, depth)
            value = value.__func__
        if isinstance(value, types.FunctionType):
            self._visit_function(value, depth)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._visit(part, depth)
        elif isinstance(value, (list, tuple)):
            if isinstance(value, list) and len(value) <= MAX_LENGTH:
                self._lists.append((value, list(value)))
            for part in value[:MAX_LENGTH]:
                self._visit(part, depth + 1)
        elif isinstance(value, np.ndarray):
            self._arrays.append((value, value.copy()))
        elif isinstance(value, nn.Module):
            for module in value.modules():
                self._visit_object(module, depth)
        elif isinstance(value, dict):
            self._visit_mapping(value, depth)
        else:
            self._visit_object(value, depth)

    def _visit_function(self, function: types.FunctionType, depth: int) -> None:
        for cell in function.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:  # Not filled yet.
                continue
            self._cells.append((cell, value))
            self._visit(value, depth + 1)
        if _is_library(function.__module__):
            return
        names = _global_names(function.__code__)
        for name in names:
            value = function.__globals__.get(name)
            if isinstance(value, types.ModuleType) and not _is_library(value.__name__):
                self._visit_mapping(vars(value), depth, names)
            if name in function.__globals__:
                self._visit_entry(function.__globals__, name, depth)

    def _visit_object(self, value: Any, depth: int) -> None:
        mapping = getattr(value, "__dict__", {})
        if isinstance(value, nn.Module):
            self._flags.extend((leaf, leaf.requires_grad) for leaf in value._parameters.values() if leaf is not None)
        if not _is_library(type(value).__module__):
            self._visit_mapping(mapping, depth)
        elif isinstance(value, nn.Module):
            self._visit_mapping(mapping, depth, ("training", "gradient"))
            self._visit_mapping(value._parameters, depth)
            self._visit_mapping(value._buffers, depth)
        else:
            # Not what it keeps for itself, such as caches.
            self._visit_mapping(mapping, depth, [name for name in mapping if not name.startswith("_")])
        for kind in type(value).__mro__:
            if not _is_library(kind.__module__):
                self._visit_class(kind, depth)

    def _visit_class(self, kind: type, depth: int) -> None:
        if id(kind) in self._seen:
            return
        self._seen.add(id(kind))
        for name, value in vars(kind).items():
            if isinstance(value, (staticmethod, classmethod)):
                self._visit(value.__func__, depth + 1)
            elif isinstance(value, property):
                self._visit(value.fget, depth + 1)
            elif isinstance(value, types.FunctionType) or not name.startswith("__"):
                self._visit_entry(vars(kind), name, depth)

    def _visit_mapping(self, mapping: Mapping[Any, Any], depth: int, names: Iterable[Any] | None = None) -> None:
        for name in list(mapping)[:MAX_LENGTH] if names is None else names:
            if name in mapping:
                self._visit_entry(mapping, name, depth)

    def _visit_entry(self, mapping: Mapping[Any, Any], name: Any, depth: int) -> None:
        self._entries.append((mapping, name, mapping[name]))
        self._visit(mapping[name], depth + 1)


def _is_library(module: str | None) -> bool:
    """Whether a module is one of a library, whose functions depend on their arguments alone."""
    root = (module or "").split(".")[0]
    return root in _LIBRARIES or (root in sys.stdlib_module_names and root != "__main__")


def _same(now: Any, before: Any) -> bool:
    return now is before or (type(now) is type(before) and isinstance(now, _NUMBERS) and now == before)


def _brief(value: Any) -> str:
    return repr(value) if isinstance(value, _NUMBERS) else f"a {type(value).__name__}"


def _global_names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return names
