"""Models: bundled ones by name, and those of a user's file."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ..examples import EXAMPLES
from ..examples.example import Example
from .data import read_data
from .errors import UserError, line_of, line_with_place


def find_model(name: str, data: Path | None) -> tuple[Example, Path | None]:
    """A model with its data, and the file of the user that it comes from, if any.

    Raises:
        UserError: if there is no such model, its file cannot be run, or the data are not its arguments.
    """
    if name in EXAMPLES:
        if data is not None:
            raise UserError(f"'{name}' is a bundled model with its own data; --data is for a model of your own")
        return EXAMPLES[name], None
    file, colon, attribute = name.rpartition(":")
    if not colon:
        raise UserError(f"unknown model '{name}'; known are {', '.join(EXAMPLES)}, or FILE.py:NAME for your own")
    path = Path(file)
    module = _run(path)
    model = vars(module).get(attribute)
    if not callable(model):
        raise UserError(f"{path} has no model '{attribute}'")
    arguments = read_data(data) if data is not None else {}
    _check_arguments(model, arguments, data)
    return Example(name=attribute, description=str(path), model=model, data=lambda: arguments), path


def _run(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    # Dataclasses look their module up by its name.
    sys.modules.setdefault(spec.name, module)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        reason = line_with_place(path, error) or line_of(error)
        raise UserError(f"{path} cannot be run: {reason}") from error
    return module


def _check_arguments(model: Callable, arguments: Mapping[str, Any], data: Path | None) -> None:
    """One line about an argument that is missing or not wanted, before anything runs."""
    try:
        signature = inspect.signature(model)
    except (TypeError, ValueError):
        return
    parameters = signature.parameters.values()
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    missing = [name for name in required if name not in arguments]
    if missing and data is None:
        raise UserError(f"the model needs the argument '{missing[0]}': give it in a file with --data")
    if missing:
        raise UserError(f"the model needs the argument '{missing[0]}', which {data} does not have")
    null = [name for name in required if arguments[name] is None]
    if null:
        raise UserError(f"{data}: '{null[0]}' is null, and the model needs it")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    unknown = [name for name in arguments if name not in signature.parameters]
    if unknown:
        taken = ", ".join(signature.parameters)
        raise UserError(f"{data} has '{unknown[0]}', which the model does not take; it takes {taken}")
