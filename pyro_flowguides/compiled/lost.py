"""Why no step of a training is finite any more: the site, a value that does it, and the line of the model."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ..model.sites import latent_sites, site_without_density, unchanged_random_state
from . import capture

# Where a density has no finite gradient in a part of the space alone, one draw may miss it.
NUM_DRAWS = 50


@torch.no_grad()
def why_lost(model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> str:
    """A clause about the first site of fresh draws whose log-probability, or whose gradient, is not finite.

    Arguments:
        model: The model.
        guide: The guide.
        args: The positional arguments of both.
        kwargs: Their keyword arguments.
    """
    with capture.no_waiting(), poutine.block(), unchanged_random_state():
        for _ in range(NUM_DRAWS):
            try:
                found = _at_a_draw(model, guide, args, kwargs)
            except RuntimeError as error:
                return f"a draw raises {' '.join(str(error).split())[:300]}"
            if found:
                return found
    return "every site's log-probability is finite, its gradient is not"


def _at_a_draw(model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> str | None:
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    values = {
        name: site["value"].detach().clone()
        for name, site in latent_sites(model_trace)
        if site["value"].is_floating_point()
    }
    return site_without_density(guide_trace, model_trace) or _without_gradient(model, values, args, kwargs)


def _without_gradient(model: Callable, values: dict[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> str | None:
    """A clause about the first latent to which log p has no finite gradient at these values."""
    log_p = _log_joint(model, values, args, kwargs)
    if not log_p.requires_grad:
        return None
    gradients = torch.autograd.grad(log_p, list(values.values()), allow_unused=True, materialize_grads=True)
    for (name, value), gradient in zip(values.items(), gradients, strict=True):
        wrong = ~gradient.isfinite()
        if bool(wrong.any()):
            where, what = float(value.detach()[wrong].reshape(-1)[0]), float(gradient[wrong].reshape(-1)[0])
            return (
                f"log p is finite and its gradient to site '{name}' is {what}, for example where {name} = {where:.6g}"
                f"{_line_of_nan(model, values, args, kwargs)}. Where one branch of torch.where has no finite gradient, keep its "
                "argument inside of its domain too: torch.where(x > 0, x.clamp(min=1e-6).sqrt(), 0.0)"
            )
    return None


def _log_joint(model: Callable, values: dict[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    for value in values.values():
        value.requires_grad_()
    with torch.enable_grad():
        trace = poutine.trace(poutine.condition(model, data=values)).get_trace(*args, **kwargs)
        return torch.as_tensor(trace.log_prob_sum())


def _line_of_nan(model: Callable, values: dict[str, Tensor], args: tuple, kwargs: dict[str, Any]) -> str:
    """The line of the user's whose operation has a gradient of NaN, as torch's anomaly mode finds it."""
    library = (*torch.__path__, *pyro.__path__, os.path.dirname(os.path.dirname(__file__)))
    with warnings.catch_warnings(record=True) as caught, torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("always")
        try:
            log_p = _log_joint(model, values, args, kwargs)
            torch.autograd.grad(log_p, list(values.values()), allow_unused=True)
        except RuntimeError:
            frames = re.findall(
                r'File "([^"]+)", line (\d+), in .*\n\s+(.*)', "".join(str(each.message) for each in caught)
            )
            own = [frame for frame in frames if not frame[0].startswith(library)]
            if own:
                file, number, line = own[-1]
                return f", by {file}, line {number}: {line}"
    return ""


def has_no_factorization(error: BaseException | None) -> bool:
    """Whether a matrix without a factorisation or an inverse is the cause of an error."""
    while error is not None:
        # By the text: torch.jit hides the class, and cholesky_inverse raises a plain RuntimeError.
        if "could not be completed because the input" in str(error):
            return True
        error = error.__cause__
    return False
