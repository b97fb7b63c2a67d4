"""Several independent fits, of which the best by its ELBO is kept."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pyro
from torch import nn

from ..checks import warn
from ..guides.auto import AutoFlow
from ..model.call import ModelCall
from ..model.ownership import owned, private_store
from ..model.sites import unchanged_random_state
from . import start
from .loop import Loop, Options
from .result import FitResult


def fit_repeatedly(call: ModelCall, guide: Callable, options: Options, num_restarts: int) -> FitResult:
    """The best of several fits by its ELBO, whose parameters the guide and the modules of the model have in the end."""
    with options.checkpoint.reserved() if options.checkpoint else nullcontext():
        return _fit_repeatedly(call, guide, options, num_restarts)


def _fit_repeatedly(call: ModelCall, guide: Callable, options: Options, num_restarts: int) -> FitResult:
    if options.seed is not None:
        pyro.set_rng_seed(options.seed)
    # A guide that is not built yet has new weights each time.
    starts_anew = isinstance(guide, AutoFlow) and guide.prototype_trace is None
    first_model, first_guide = _before_training(call, guide, starts_anew)
    fits: list[FitResult] = []
    errors: list[Exception] = []
    interrupted = False
    for index in range(num_restarts):
        one = replace(
            options,
            seed=None if options.seed is None else options.seed + index,
            max_seconds=options.max_seconds and options.max_seconds / num_restarts,
            checkpoint=options.checkpoint and options.checkpoint.of_restart(index),
        )
        candidate = copy.deepcopy(guide) if starts_anew else first_guide
        with private_store(first_model, candidate) as (model, candidate):
            loop = Loop(replace(call, model=model), candidate, one, log_likelihood=True)
            try:
                fits.append(loop.run())
            except RuntimeError as error:
                warn(f"fit: restart {index} of {num_restarts} failed: {error}")
                errors.append(error)
            except KeyboardInterrupt:
                # Before or after the training of this one: the others are whole.
                if not fits:
                    raise
                interrupted = True
        interrupted |= loop.interrupted
        if interrupted:
            break
    if not fits:
        raise errors[0]
    best = max(fits, key=lambda fit: -math.inf if math.isnan(fit.elbo.value) else fit.elbo.value)
    _take_over(call, guide, best)
    return replace(
        best,
        restarts=tuple(fit.draws for fit in fits),
        wall_time=sum(fit.wall_time for fit in fits),
        interrupted=interrupted,
    )


def _before_training(call: ModelCall, guide: Callable, starts_anew: bool) -> tuple[Callable, Callable]:
    """Copies of model and guide with the parameters that every restart begins with."""
    with (
        unchanged_random_state() if starts_anew else nullcontext(),
        warnings.catch_warnings(),
        private_store(call.model, copy.deepcopy(guide) if starts_anew else guide) as (model, guide),
    ):
        # It warns again where the fit itself does it.
        warnings.simplefilter("ignore")
        start.set_up(replace(call, model=model), guide)
        return owned(model, guide)[:2]


def _take_over(call: ModelCall, guide: Callable, best: FitResult) -> None:
    """Gives the user's own guide, and the modules that the model is or closes over, the parameters of the best fit."""
    with (
        unchanged_random_state(),
        warnings.catch_warnings(),
        # Modules that the model closes over take their values from it when the model runs, and keep them.
        private_store(best.model, guide) as (model, trained),
    ):
        warnings.simplefilter("ignore")
        start.set_up(replace(call, model=model), trained)
        for module, source in ((call.model, model), (trained, best.guide)):
            if isinstance(module, nn.Module) and isinstance(source, nn.Module):
                module.load_state_dict(source.state_dict())
