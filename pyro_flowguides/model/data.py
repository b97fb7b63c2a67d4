"""The arguments of a model as people have them: arrays, series, frames and lists become tensors, by one rule.

- A tensor stays the tensor that it is. A Python number, a string and any other object stay what they are: sizes, flags, options.
- An array of numpy (or anything else with ``__array__``), a series or index of pandas, and a list of numbers, flat or
  rectangular, become tensors: floats in torch's default dtype, integers as ``int64``, bools as bools. A scalar of numpy becomes a
  Python number.
- A frame of pandas becomes a matrix in the default dtype, with a column for each of its own. Where the annotation of the model's
  parameter has the word ``dict`` or ``Mapping``, it becomes a dict of tensors by column.
- A tuple, a dict and a list without numbers are kept, with their entries converted by the same rule. Numbers in a tuple stay
  numbers.

A tensor that is made is a copy, on the device of the tensors among the arguments, or else on torch's default device. Rows are
taken by position; the index of a series or frame is not read. What cannot become a tensor is an error that names the argument.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pandas as pd
import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor

from .. import internals
from ..checks import is_of_package
from .sites import observed_sites

_DTYPES = {"b": np.bool_, "i": np.int64, "u": np.int64, "f": np.float64}
_MAX_INT = np.iinfo(np.int64).max
# What torch and Python raise where a model is given something else than it was written for.
_ERRORS = (RuntimeError, IndexError, TypeError, KeyError, AttributeError)


class Note(NamedTuple):
    """What the model is given for an argument, in words."""

    text: str
    is_number: bool


class Conversion:
    """Converts the arguments of one call.

    Arguments:
        owner: The name that errors begin with.
        model: The function or module whose parameters name the arguments.
        args: The positional arguments.
        kwargs: The keyword arguments.

    Attributes:
        args: The positional arguments, converted.
        kwargs: The keyword arguments, converted.
        columns: The names of the columns of every argument that is a frame, by the name of the argument.
        notes: A note about every argument that was converted, or is a number or a list.

    Raises:
        ValueError: if an argument holds something that is no tensor of numbers.
    """

    def __init__(self, owner: str, model: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self.owner = owner
        self.columns: dict[str, tuple[str, ...]] = {}
        self.notes: list[Note] = []
        self._model = model
        self._device = _common_device(args, kwargs)
        self.args = tuple(self._argument(index, value) for index, value in enumerate(args))
        self.kwargs = {name: self._argument(name, value) for name, value in kwargs.items()}

    @functools.cached_property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        return _parameters(self._model)

    def _argument(self, key: int | str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value
        name = self._name(key)
        converted = self._convert(name, value)
        if isinstance(value, list) and value and converted is value:
            self.notes.append(Note(f"'{name}' is a list of {type(value[0]).__name__} and stays one", is_number=False))
        elif isinstance(converted, (int, float)) and not isinstance(converted, bool):
            self.notes.append(Note(f"'{name}' is the number {converted} and stays one", is_number=True))
        elif converted is not value:
            text = f"'{name}' was a {type(value).__name__} and is {_describe(converted)}"
            self.notes.append(Note(text, is_number=False))
        return converted

    def _name(self, key: int | str) -> str:
        if isinstance(key, str):
            return key
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [name for name, parameter in self._parameters.items() if parameter.kind in positional]
        return names[key] if key < len(names) else f"argument {key}"

    def _convert(self, name: str, value: Any) -> Any:
        if isinstance(value, np.generic):
            return value.item() if value.dtype.kind in _DTYPES else value
        if isinstance(value, (Tensor, str, bytes, int, float)) or value is None:
            return value
        if isinstance(value, pd.DataFrame):
            return self._frame(name, value)
        if isinstance(value, (pd.Series, pd.Index, pd.api.extensions.ExtensionArray)):
            return self._series(name, pd.Series(value))
        if isinstance(value, list):
            return self._list(name, value)
        if isinstance(value, dict):
            changed = self._changed(name, value.items())
            if not changed:
                return value
            result = copy.copy(value)
            result.update(changed)
            return result
        if isinstance(value, tuple):
            return self._sequence(name, value)
        if hasattr(value, "__array__") and not isinstance(value, type):
            return self._array(name, value if isinstance(value, np.ndarray) else np.asarray(value))
        return value

    def _changed(self, name: str, entries: Any) -> dict[Any, Any]:
        """The entries of a container that are something else once they are converted."""
        pairs = [(key, each, self._convert(f"{name}[{key!r}]", each)) for key, each in entries]
        return {key: now for key, before, now in pairs if now is not before}

    def _sequence(self, name: str, value: list | tuple) -> Any:
        changed = self._changed(name, enumerate(value))
        if not changed:
            return value
        entries = [changed.get(index, each) for index, each in enumerate(value)]
        if isinstance(value, list):
            return entries
        return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)

    def _list(self, name: str, value: list) -> Any:
        leaves = list(_leaves(value))
        others = [leaf for leaf in leaves if not _is_number(leaf)]
        if others and len(others) < len(leaves):
            self._refuse(
                name,
                f"is a list of numbers with a {type(others[0]).__name__} among them",
                "a list is data: write nan for a missing number, and a tuple where it is configuration",
            )
        if others or not leaves:
            return self._sequence(name, value)
        try:
            array = np.array(value)
        except ValueError:
            self._refuse(
                name,
                "is a list of lists of different lengths",
                "pad them to one length and mask the rest, or give a list of tensors",
            )
        return self._array(name, array)

    def _array(self, name: str, array: np.ndarray) -> Tensor:
        kind = array.dtype.kind
        if kind not in _DTYPES:
            self._refuse(name, f"holds {_NAMES.get(kind, 'values')} ({array.dtype})", _ADVICE.get(kind, _ADVICE["O"]))
        if np.ma.isMaskedArray(array) and np.ma.getmaskarray(array).any():
            self._refuse(name, "is a masked array", "fill it, and give the mask to poutine.mask in the model")
        if kind == "u" and array.size and array.max() > _MAX_INT:
            self._refuse(name, "holds integers above 2**63 - 1", "give them as floats")
        # A copy: the fit would otherwise change with an array that is written to later.
        tensor = torch.from_numpy(np.array(array, dtype=_DTYPES[kind], order="C"))
        return tensor.to(self._device, torch.get_default_dtype() if kind == "f" else None)

    def _series(self, name: str, series: pd.Series) -> Tensor:
        dtype = series.dtype
        if isinstance(dtype, np.dtype):
            return self._array(name, series.to_numpy())
        if isinstance(dtype, pd.CategoricalDtype):
            self._refuse(name, "holds categories", "give their numbers, such as y.cat.codes for a series y")
        if pd.api.types.is_float_dtype(dtype):
            return self._array(name, series.to_numpy(dtype=np.float64, na_value=np.nan))
        whole = pd.api.types.is_bool_dtype(dtype) or pd.api.types.is_integer_dtype(dtype)
        if not whole:
            kind = "M" if pd.api.types.is_datetime64_any_dtype(dtype) else "U"
            self._refuse(name, f"holds {dtype} values", _ADVICE[kind])
        missing = int(series.isna().sum())
        if missing:
            self._refuse(
                name,
                f"is a series of {dtype} with {missing} missing values",
                "drop or fill them: an integer or a bool cannot be missing in a tensor",
            )
        return self._array(name, series.to_numpy(dtype=bool if pd.api.types.is_bool_dtype(dtype) else np.int64))

    def _frame(self, name: str, frame: pd.DataFrame) -> Any:
        if not len(frame.columns) or frame.columns.has_duplicates:
            self._refuse(name, "is a frame without columns, or with two of one name", "name each column once")
        columns = {label: self._series(f"{name}[{label!r}]", column) for label, column in frame.items()}
        if len(frame) != len(columns):
            # Otherwise a plate of this size may be one over rows.
            self.columns[name] = tuple(map(str, columns))
        parameter = self._parameters.get(name)
        if parameter is not None and re.search(
            r"\b([dD]ict|Mapping|MutableMapping)\b", inspect.formatannotation(parameter.annotation)
        ):
            return columns
        return torch.stack([column.to(torch.get_default_dtype()) for column in columns.values()], -1)

    def _refuse(self, name: str, problem: str, advice: str) -> NoReturn:
        raise ValueError(f"{self.owner}: argument '{name}' {problem}; {advice}")


_NAMES = {"O": "objects", "U": "strings", "S": "strings", "M": "dates", "m": "durations", "c": "complex numbers"}
_ADVICE = {
    "O": "convert it to numbers first, such as y.astype(float)",
    "U": "give numbers, such as pandas.factorize(y)[0] for the names of groups",
    "M": "give numbers, such as (y - y.min()) / pandas.Timedelta(days=1)",
    "m": "give numbers, such as y / pandas.Timedelta(days=1)",
    "c": "give the real and the imaginary part as two arguments",
}
_ADVICE["S"] = _ADVICE["U"]


def _parameters(model: Any) -> dict[str, inspect.Parameter]:
    try:
        # The call of a module has no names for its arguments, its forward has.
        return dict(inspect.signature(model.forward if isinstance(model, torch.nn.Module) else model).parameters)
    except (TypeError, ValueError):
        return {}


def _common_device(args: tuple, kwargs: Mapping[str, Any]) -> torch.device:
    leaves = internals.flatten((args, dict(kwargs)))[0]
    devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}
    return devices.pop() if len(devices) == 1 else torch.get_default_device()


def _leaves(value: list) -> Iterator[Any]:
    for entry in value:
        if isinstance(entry, list):
            yield from _leaves(entry)
        else:
            yield entry


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, np.generic) and value.dtype.kind in _DTYPES)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return f"a {type(value).__name__}"


@contextmanager
def explaining(owner: str, notes: tuple[Note, ...]) -> Iterator[None]:
    """Turns the error of a model that was not written for what its arguments have become into one that says what they are.

    Arguments:
        owner: The name that the error begins with.
        notes: What is known of the arguments; without any, errors stay as they are.

    Raises:
        ValueError: in place of an error from outside of this package.
    """
    try:
        yield
    except _ERRORS as error:
        # Where a tensor is wanted and there is a number, it is one of these.
        concerned = [
            note.text for note in notes if not note.is_number or isinstance(error, (TypeError, AttributeError))
        ]
        if not concerned or is_of_package(traceback.extract_tb(error.__traceback__)[-1].filename):
            raise
        raise ValueError(
            f"{owner}: the model cannot be run on these arguments ({' '.join(str(error).split())[:300]}): "
            f"{'; '.join(concerned)}. Numbers stay numbers: give [y], or torch.tensor(y), for a tensor. Integers stay integers: "
            "give y.astype(float) where the model multiplies matrices or needs floats. A frame is a matrix: give dict(frame), or "
            "annotate the parameter as dict, where the model takes columns by name"
        ) from error


def check_observed(trace: Trace) -> None:
    """An error that names the site where a model observes something that has no density there.

    Raises:
        ValueError: if an observed value is no tensor, or of integers or bools where the distribution needs floats.
    """
    for name, site in observed_sites(trace):
        value, fn = site["value"], site["fn"]
        if not isinstance(value, Tensor):
            what = f"the number {value}" if _is_number(value) else f"a {type(value).__name__}"
            raise ValueError(
                f"site '{name}' is observed at {what}, which is no tensor; give it as one, such as obs=torch.as_tensor(y) in the "
                "model, or as an array or a list in the arguments"
            )
        if not value.is_floating_point() and not _has_density(fn, value) and _has_density(fn, value.to(torch.float64)):
            raise ValueError(
                f"site '{name}' is observed at {value.dtype} values, and {_name_of(fn)} needs floats; give them as floats, such "
                "as y.astype(float) for an array or a series, y.to(torch.get_default_dtype()) for a tensor"
            )


def _has_density(fn: Any, value: Tensor) -> bool:
    try:
        with torch.no_grad(), pyro.validation_enabled(False):
            fn.log_prob(value)
    except Exception:
        return False
    return True


def _name_of(fn: Any) -> str:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn).__name__
