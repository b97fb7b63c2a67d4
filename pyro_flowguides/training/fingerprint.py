"""What a checkpoint belongs to: descriptions of everything that the numbers of a fit depend on, and their first difference."""

from __future__ import annotations

import functools
import hashlib
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn

from ..checks import version
from ..compiled.capture import without_side_effects
from ..diagnostics.tracer import Tracer
from ..model.call import ModelCall
from ..model.sites import quiet_trace, tensor_sites

Fingerprint = dict[str, str]

_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
MAX_DEPTH = 4
MAX_SHOWN = 120
# Pyro's ELBOs find it out at their first step, and keep it.
_FOUND_OUT = {"max_plate_nesting"}
# Two computers may round log-densities differently.
TOLERANCE = 1e-5
NUM_SCHEDULE_POINTS = 20


def fingerprint(call: ModelCall, guide: Callable, tracer: Tracer, options: Mapping[str, Any]) -> Fingerprint:
    """Descriptions, by the name of what they describe, in the order in which differences are reported.

    Arguments:
        call: The model with its arguments; none where they are the first of ``batches``, which may be shuffled.
        guide: The guide, before any training.
        tracer: What traces both.
        options: The options of the fit by name.
    """
    found = {"version of pyro_flowguides": version(), **_guide(guide)}
    for name, site in tensor_sites(tracer.model_prototype):
        kind = "observed" if site["is_observed"] else "latent"
        found[f"site '{name}'"] = f"{kind}, {type(site['fn']).__name__}, {_form(site['value'])}"
    for index, value in enumerate(call.args):
        found[f"argument {index + 1}"] = describe(value)
    for name, value in call.kwargs.items():
        found[f"argument '{name}'"] = describe(value)
    return found | describe_options(options)


def describe_options(options: Mapping[str, Any]) -> Fingerprint:
    """Descriptions of options by their names; ``schedule``, ``temper`` and ``optim`` by what they do."""
    by_what_they_do: dict[str, Callable[[Any], str]] = {"schedule": _schedule, "temper": _temper, "optim": _optimizer}
    return {name: by_what_they_do.get(name, describe)(value) for name, value in options.items()}


def difference(there: Mapping[str, str], here: Mapping[str, str]) -> str | None:
    """A clause about the first description that is another one; None if all are the same."""
    for name in [*here, *(name for name in there if name not in here)]:
        before, now = there.get(name, "none"), here.get(name, "none")
        if before != now:
            owner = "guide" if name.split(".")[0] == "guide" else "fit"
            return f"it is of another {owner}: {name} was {cut(before, now)}, and is {cut(now, before)} here"
    return None


def cut(text: str, other: str) -> str:
    """A long text from shortly before the place where it differs from another."""
    pairs = enumerate(zip(text, other, strict=False))
    same = next((index for index, (one, two) in pairs if one != two), min(len(text), len(other)))
    begin = max(0, same - 40)
    return text if len(text) <= MAX_SHOWN else f"{'…' if begin else ''}{text[begin : begin + MAX_SHOWN]}…"


def log_densities(tracer: Tracer) -> dict[str, float]:
    """The log-density of every site of guide and model at one draw of the guide, the same draw every time.

    They depend on the parameters as they are, on the data, and on all that model and guide compute. Nothing is changed by it.
    """
    found: dict[str, float] = {}

    def run() -> None:
        pyro.set_rng_seed(0)
        for guide_trace, model_trace, _ in tracer.traces(1):
            for owner, trace in (("guide", guide_trace), ("model", model_trace)):
                trace.compute_log_prob()
                for name, site in tensor_sites(trace):
                    found[f"site '{name}' of the {owner}"] = float(site["log_prob"].double().sum())

    with quiet_trace(), pyro.validation_enabled(False), without_side_effects(run):
        return found


def density_difference(there: Mapping[str, float], here: Mapping[str, float]) -> str | None:
    """A clause about the first log-density that is another one; None if all are the same up to rounding."""
    for name in [*here, *(name for name in there if name not in here)]:
        before, now = there.get(name, math.nan), here.get(name, math.nan)
        same = before == now or (math.isnan(before) and math.isnan(now))
        if not same and not math.isclose(before, now, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            return (
                f"it is of another model or guide: with its parameters {name} had log-density {before:.7g}, and has {now:.7g} "
                "here"
            )
    return None


# --- descriptions ---------------------------------------------------------------------------------------------------------


def describe(value: Any, depth: int = 0) -> str:
    """A value as text: numbers as they are, arrays by dtype, shape and a digest of their bytes, functions by their constants.

    Objects of other classes are described by their class, and, where the class is one of torch, Pyro or this library, by their
    public attributes.
    """
    if isinstance(value, _SIMPLE):
        return repr(value)
    if depth > MAX_DEPTH:
        return type(value).__name__
    inner = functools.partial(describe, depth=depth + 1)
    if isinstance(value, Tensor) and value.layout == torch.strided:
        return f"{_form(value)} with values {_digest(_bytes(value))}"
    if hasattr(value, "__array__") and not isinstance(value, Tensor):
        array = np.asarray(value)
        content = repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
        return f"{array.dtype} {list(array.shape)} with values {_digest(content)}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{inner(key)}: {inner(each)}' for key, each in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(inner, value))}]"
    if isinstance(value, functools.partial):
        return f"{inner(value.func)}({inner(value.args)}, {inner(value.keywords)})"
    if isinstance(value, (type, types.BuiltinFunctionType)):
        return value.__qualname__
    if isinstance(value, types.FunctionType):
        return _function(value, inner)
    return _object(value, inner)


def _form(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device.type}"


def _bytes(value: Tensor) -> bytes:
    flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _function(function: types.FunctionType, inner: Callable[[Any], str]) -> str:
    """A function by the numbers and names in it; its code differs between versions of Python."""
    captured = []
    for cell in function.__closure__ or ():
        try:
            captured.append(cell.cell_contents)
        except ValueError:  # Not filled yet.
            continue
    return f"{function.__name__} {inner([_code(function.__code__), captured, function.__defaults__])}"


def _code(code: types.CodeType) -> list[Any]:
    constants = [_code(each) if isinstance(each, types.CodeType) else each for each in code.co_consts]
    return [list(code.co_names), [each for each in constants if isinstance(each, (list, *_SIMPLE))]]


def _object(value: Any, inner: Callable[[Any], str]) -> str:
    name = type(value).__name__
    if type(value).__module__.split(".")[0] not in ("torch", "pyro", "pyro_flowguides"):
        size = f" of length {len(value)}" if hasattr(value, "__len__") else ""
        return f"{name}{size}"
    attributes = {
        key: each
        for key, each in vars(value).items()
        if not key.startswith("_") and key not in _FOUND_OUT and not isinstance(each, (torch.Generator, nn.Module))
    }
    return f"{name}({', '.join(f'{key}={inner(each)}' for key, each in attributes.items())})"


def _guide(guide: Callable) -> Fingerprint:
    """The class of every part of a guide, with its numbers and the shapes of its parameters and buffers."""
    if not isinstance(guide, nn.Module):
        return {"guide": f"a {type(guide).__name__}"}
    found = {}
    for path, module in guide.named_modules():
        name = f"guide.{path}" if path else "guide"
        found[name] = type(module).__name__
        for key, value in vars(module).items():
            if not key.startswith("_") and key != "training" and isinstance(value, _SIMPLE):
                found[f"{name}.{key}"] = repr(value)
    for key, value in guide.state_dict().items():
        if isinstance(value, Tensor):
            found[f"guide.{key}"] = _form(value)
    return found


def _schedule(schedule: Callable[[float], float] | None) -> str:
    """A schedule by its values."""
    if schedule is None:
        return "none"
    points = (index / NUM_SCHEDULE_POINTS for index in range(NUM_SCHEDULE_POINTS))
    return "factors " + ", ".join(f"{schedule(point):.6g}" for point in points)


def _temper(temper: Callable[[int, int], float] | None) -> str:
    """A rise of the inverse temperature by its values over some steps, which may depend on their number or not."""
    if temper is None:
        return "none"
    num_steps = NUM_SCHEDULE_POINTS**2
    values = (temper(index * NUM_SCHEDULE_POINTS, num_steps) for index in range(NUM_SCHEDULE_POINTS))
    return "inverse temperatures " + ", ".join(f"{value:.6g}" for value in values)


def _optimizer(optim: Any) -> str:
    """An optimiser by its class and options."""
    if isinstance(optim, PyroOptim):
        own = {key: value for key, value in vars(optim).items() if key.startswith("pt_") or key == "kwargs"}
        return f"{type(optim).__name__} {describe(own)}"
    try:
        optimizer = optim([torch.zeros(1, requires_grad=True)])
        options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        return f"{type(optimizer).__name__} {describe(options)}"
    except Exception:
        # A function that needs the parameters themselves.
        return describe(optim)
