"""The call that makes a fit again, as text for its report."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..model.call import ModelCall

# Shown before, or without a part in the numbers of a fit.
_NOT_SHOWN = ("model_kwargs", "progress", "checkpoint", "callbacks")
_SIMPLE = (bool, int, float, str, type(None))


def call_text(function: Callable, given: Mapping[str, Any]) -> str:
    """A call of ``fit`` with the arguments that it was given, the data by their names.

    Arguments:
        function: ``fit``.
        given: Its arguments by name.

    Example:
        >>> def model(y): ...
        >>> def guide(y): ...
        >>> def fit(model, guide, *args, model_kwargs=None, num_steps=None, seed=None): ...
        >>> print(call_text(fit, {"model": model, "guide": guide, "args": ([1.0, 2.0],), "seed": 1, "num_steps": None}))
        fit(model, guide, y, seed=1)
    """
    model = given["model"]
    name = ModelCall(model).name
    parts = [name, _guide_text(given["guide"], name), *_names_of(model, given["args"])]
    if given.get("model_kwargs"):
        parts.append(f"model_kwargs={{{', '.join(f'{key!r}: {key}' for key in given['model_kwargs'])}}}")
    for key, parameter in _parameters(function).items():
        is_option = key in given and parameter.default is not parameter.empty and key not in _NOT_SHOWN
        if is_option and _differs(given[key], parameter.default):
            parts.append(f"{key}={_text(given[key])}")
    return f"fit({', '.join(parts)})"


def _names_of(model: Callable, args: tuple) -> Iterator[str]:
    """Positional arguments by the names of the model's parameters."""
    function = ModelCall(model).as_written
    names = list(_parameters(getattr(function, "forward", function)))
    for index in range(len(args)):
        yield names[index] if index < len(names) else f"argument_{index + 1}"


def _guide_text(guide: Callable, model: str) -> str:
    """The call that makes a guide: its class, and the options of a flow that are other than by default."""
    guide = ModelCall(guide).as_written
    if hasattr(guide, "__name__"):
        return str(guide.__name__)
    options = {}
    recipe = getattr(guide, "_recipe", None)
    while isinstance(recipe, functools.partial):
        options.update(recipe.keywords)
        recipe = recipe.func
    options.update({name: getattr(guide, f"_{name}", None) for name in ("base", "affine", "init_scale")})
    defaults = {
        name: parameter.default
        for class_ in reversed(type(guide).__mro__)
        if "__init__" in vars(class_)
        for name, parameter in _parameters(vars(class_)["__init__"]).items()
    }
    given = {name: value for name, value in options.items() if name in defaults and _differs(value, defaults[name])}
    return f"{type(guide).__name__}({', '.join([model, *(f'{name}={_text(value)}' for name, value in given.items())])})"


def _parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function by name; none where Python does not know them."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _differs(value: Any, default: Any) -> bool:
    return value is not default and not (isinstance(value, _SIMPLE) and value == default)


def _text(value: Any) -> str:
    if isinstance(value, _SIMPLE):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    return str(getattr(value, "__name__", f"{type(value).__name__}(…)"))
