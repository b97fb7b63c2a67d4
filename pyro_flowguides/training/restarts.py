"""Several independent fits, of which the best by its ELBO is kept."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro

from ..checks import warn
from ..guides.auto import AutoFlow
from ..model.call import ModelCall
from ..model.sites import unchanged_random_state
from . import start
from .loop import Loop, Options
from .result import FitResult
from .values import Values


def fit_repeatedly(call: ModelCall, guide: Callable, options: Options, num_restarts: int) -> FitResult:
    """The best of several fits by its ELBO."""
    if options.seed is not None:
        pyro.set_rng_seed(options.seed)
    store = pyro.get_param_store()
    # Each such guide is a copy with parameters of its own.
    starts_anew = isinstance(guide, AutoFlow) and guide.prototype_trace is None
    initial = _initial_values(call, guide, starts_anew)
    fits: list[tuple[FitResult, Values, Any]] = []
    errors: list[Exception] = []
    for index in range(num_restarts):
        one = replace(
            options,
            seed=None if options.seed is None else options.seed + index,
            checkpoint=options.checkpoint and options.checkpoint.of_restart(index),
        )
        with store.scope() if starts_anew else contextlib.nullcontext():
            candidate = copy.deepcopy(guide) if starts_anew else guide
            loop = Loop(call, candidate, one, log_likelihood=True)
            try:
                result = loop.run(initial)
            except RuntimeError as error:
                warn(f"fit: restart {index} of {num_restarts} failed: {error}")
                errors.append(error)
                continue
            fits.append((result, Values(call.model, candidate), store.get_state()))
        if loop.interrupted:
            break
    if not fits:
        raise errors[0]
    best, values, state = max(
        fits, key=lambda entry: -math.inf if math.isnan(entry[0].elbo.value) else entry[0].elbo.value
    )
    values.restore()
    if starts_anew:
        store.set_state(state)
        guide.setup(*call.args, **call.kwargs)
        guide.load_state_dict(best.guide.state_dict())
    best.guide = guide
    best.restarts = tuple(result.draws for result, _, _ in fits)
    best.wall_time = sum(result.wall_time for result, _, _ in fits)
    return best


def _initial_values(call: ModelCall, guide: Callable, starts_anew: bool) -> Values:
    """The values that every restart begins with; those of a guide that starts anew are of no use, but of its model they are."""
    with (
        pyro.get_param_store().scope() if starts_anew else contextlib.nullcontext(),
        unchanged_random_state() if starts_anew else contextlib.nullcontext(),
        warnings.catch_warnings(),
    ):
        # It warns again where the fit itself does it.
        warnings.simplefilter("ignore")
        guide = copy.deepcopy(guide) if starts_anew else guide
        start.set_up(call, guide)
        return Values(call.model, guide)
