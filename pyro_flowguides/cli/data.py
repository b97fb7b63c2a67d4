"""Data files: the arguments of a model by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .errors import UserError, reason_of, text_of


def read_data(path: Path) -> dict[str, Any]:
    """The arguments of a model by name; lists and arrays become tensors, floating-point ones in the default dtype.

    JSON: an object. NPZ: its arrays. CSV: its columns, by the names in the first row.

    Raises:
        UserError: if the file cannot be read, or an argument is no number, string, truth value, null, or array of numbers.
    """
    if not path.is_file():
        raise UserError(f"there is no data file {path}")
    readers = {".json": _read_json, ".npz": _read_npz, ".csv": _read_csv}
    if path.suffix not in readers:
        raise UserError(f"{path}: data files are .json, .npz or .csv")
    try:
        content = readers[path.suffix](path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason_of(error)}") from error
    except RecursionError as error:
        raise UserError(f"{path} cannot be read: it is nested too deeply") from error
    # Damaged files are found out by whatever trips over them.
    except Exception as error:
        raise UserError(f"{path} cannot be read: {text_of(error) or type(error).__name__}") from error
    return {name: _as_argument(path, name, value) for name, value in content.items()}


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON data file must hold an object, argument name to value")
    return content


def _read_npz(path: Path) -> dict[str, Any]:
    # numpy leaves a file open that it cannot read.
    with open(path, "rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise UserError(
                f"{path} is one array, not an archive of arrays by name; write it with numpy.savez(file, name=array)"
            )
        return {name: _read_member(path, archive, name) for name in archive.files}


def _read_member(path: Path, archive: Any, name: str) -> np.ndarray:
    try:
        value = archive[name]
    except Exception as error:
        raise UserError(f"{path}: '{name}' cannot be read: {text_of(error) or type(error).__name__}") from error
    if not isinstance(value, np.ndarray):
        raise UserError(f"{path}: '{name}' is no array")
    return value


def _read_csv(path: Path) -> dict[str, Any]:
    table = pd.read_csv(path)
    if not isinstance(table.index, pd.RangeIndex):
        raise UserError(f"{path}: the rows have more values than the first row has names")
    return {str(name): column.to_numpy() for name, column in table.items()}


def _as_argument(path: Path, name: str, value: Any) -> Any:
    if isinstance(value, dict):
        raise UserError(f"{path}: '{name}' is an object; an argument is a number, a string, or an array of numbers")
    if not isinstance(value, (list, np.ndarray)):
        return value
    try:
        # A copy: pandas gives arrays that must not be written to, which torch would share.
        array = np.array(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: '{name}' is not a rectangular array") from error
    if array.size == 0:
        raise UserError(f"{path}: '{name}' is empty")
    if array.dtype.kind not in "biuf":
        raise UserError(f"{path}: '{name}' holds values that are not numbers")
    try:
        # torch takes the byte order of this machine alone.
        native = array.astype(array.dtype.newbyteorder("="))
        tensor = torch.as_tensor(native, device=torch.get_default_device())
    except TypeError as error:
        raise UserError(
            f"{path}: '{name}' has dtype {array.dtype}, which torch does not have; write it as float64"
        ) from error
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def not_arrays(arguments: Mapping[str, Any]) -> str:
    """A clause about the arguments that are no arrays, which a model may have expected them to be; empty if all are."""
    names = {type(None): "null", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
    found = []
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.dim() == 0:
            found.append(f"'{name}' is a single number")
        elif type(value) in names:
            found.append(f"'{name}' is {names[type(value)]}")
    return " and ".join(found)
