"""Fits as files without pickles: arrays, and a description of them in JSON."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from torch.distributions import transform_to

from .. import internals
from ..checks import version
from ..diagnostics.draws import Draws
from ..diagnostics.importance import Estimate
from ..diagnostics.modes import Mode, Modes
from ..model.call import ModelCall
from ..model.ownership import owned, private_store
from ..model.sites import quiet_trace, unchanged_random_state
from . import start
from .files import write_whole

FORMAT = 2
_SIMPLE = (bool, int, float, str, type(None))
# Dataclasses by the name that they have in a file.
_DATACLASSES: dict[str, Any] = {"draws": Draws, "modes": Modes, "mode": Mode, "estimate": Estimate}


class Missing:
    """In the place of a model or a guide that a fit was loaded without.

    Arguments:
        kind: ``"model"`` or ``"guide"``.
        name: Its name.
    """

    def __init__(self, kind: str, name: str) -> None:
        self.kind = kind
        self.__name__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"this fit was loaded without its {self.kind} '{self.__name__}': give it with FitResult.load(path, {self.kind}=...)"
        )


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes tensors, arrays, draws, modes and plain values, nested in dicts, lists and tuples, to a whole file or none.

    Raises:
        OSError: if the file cannot be written.
        TypeError: if a value is none of these.
    """
    arrays: dict[str, np.ndarray] = {}
    description = json.dumps({"format": FORMAT, "version": version(), "content": _encoded(content, arrays)})
    buffer = io.BytesIO()
    arrays["description"] = np.frombuffer(description.encode(), dtype=np.uint8)
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_whole(path, buffer.getbuffer())


def read(path: Path, owner: str = "FitResult") -> dict[str, Any]:
    """The content of a file of :func:`write`. No code of the file is executed.

    Arguments:
        path: The file.
        owner: The class whose objects it is read for, which errors name.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        ValueError: if it is damaged, or was not written by :func:`write`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
        with np.load(path, allow_pickle=False) as arrays:
            described = json.loads(arrays["description"].tobytes().decode())
            if described["format"] != FORMAT:
                raise ValueError(f"its format is {described['format']}, and this version reads {FORMAT}")
            return _decoded(described["content"], arrays)
    except OSError:
        raise
    except Exception as error:
        reason = " ".join(f"{error}".split())[:200] or type(error).__name__
        raise ValueError(f"{owner}.load: '{path}' is damaged or no saved fit: {reason}") from error


def can_be_written(value: Any) -> bool:
    """Whether :func:`write` can write a value."""
    try:
        _encoded(value, {})
    except TypeError:
        return False
    return True


def _encoded(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, _SIMPLE):
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        if array.dtype.hasobject:
            raise TypeError("an array of objects cannot be written without a pickle")
        name = f"array_{len(arrays)}"
        arrays[name] = array
        return {"kind": "tensor" if isinstance(value, Tensor) else "array", "name": name}
    for kind, type_ in _DATACLASSES.items():
        if isinstance(value, type_):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return {"kind": kind, "items": _encoded(fields, arrays)}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("a dict whose keys are not strings cannot be written")
        return {"kind": "dict", "items": {key: _encoded(each, arrays) for key, each in value.items()}}
    if isinstance(value, (list, tuple)):
        return {"kind": type(value).__name__, "items": [_encoded(each, arrays) for each in value]}
    raise TypeError(f"a {type(value).__name__} cannot be written without a pickle")


def _decoded(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if not isinstance(value, dict):
        return value
    kind = value["kind"]
    if kind == "array":
        return arrays[value["name"]]
    if kind == "tensor":
        return torch.as_tensor(arrays[value["name"]])
    if kind in _DATACLASSES:
        return _DATACLASSES[kind](**_decoded(value["items"], arrays))
    if kind == "dict":
        return {key: _decoded(each, arrays) for key, each in value["items"].items()}
    items = [_decoded(each, arrays) for each in value["items"]]
    return tuple(items) if kind == "tuple" else items


def with_values(
    call: ModelCall, guide: Callable | None, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor] | None
) -> tuple[Callable, Callable | None]:
    """A model, and a guide of it, with the parameters of a saved fit.

    Arguments:
        call: The model with its arguments.
        guide: A guide like the one that was fitted; none, if only the model is wanted.
        parameters: The parameters of the model, in their own space.
        state: The ``state_dict`` of the guide; None if it was a function.

    Raises:
        ValueError: if they are of another model or guide.
    """
    if guide is not None and (state is None or not isinstance(guide, nn.Module)):
        raise ValueError("FitResult.load: the values of a guide that is a plain function are not saved, only its draws")
    with unchanged_random_state(), private_store(call.model, guide or call.model) as (model, inner):
        if guide is not None:
            start.set_up(dataclasses.replace(call, model=model), inner)
            _load_state(inner, state or {})
        with quiet_trace():
            model(*call.args, **call.kwargs)
        store, (leaves, constraints) = pyro.get_param_store(), internals.stored_parameters()
        for name, value in parameters.items():
            if name not in store or store[name].shape != value.shape:
                raise ValueError(f"FitResult.load: the model has no parameter '{name}' of shape {tuple(value.shape)}")
            with torch.no_grad():
                leaves[name].copy_(transform_to(constraints[name]).inv(value))
        model, inner, _ = owned(model, inner)
        return model, None if guide is None else inner


def _load_state(guide: Any, state: Mapping[str, Tensor]) -> None:
    try:
        guide.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"FitResult.load: the fit is of another guide: {' '.join(str(error).split())[:300]}"
        ) from error
