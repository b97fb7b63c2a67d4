"""Several independent fits, of which the best by its ELBO is kept, or a mixture of all."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ..checks import warn
from ..compiled.svi import NonfiniteError
from ..diagnostics.mode_finder import pack
from ..diagnostics.tracer import Tracer
from ..guides.auto import AutoFlow
from ..guides.mixture import AutoMixture
from ..model.call import ModelCall
from ..model.ownership import owned, private_store
from ..model.sites import unchanged_random_state
from . import start
from .loop import Loop, Options
from .result import FitResult

WAYS = ("best", "mixture")
# Of the weights of a mixture.
NUM_UPDATES = 500


def fit_repeatedly(call: ModelCall, guide: Callable, options: Options, num_restarts: int, keep: str) -> FitResult:
    """The best of several fits by its ELBO, or their mixture; the user's guide and the model have the parameters of the best.

    Arguments:
        call: The model with its arguments.
        guide: The guide.
        options: The options of each fit.
        num_restarts: How many fits.
        keep: ``"best"`` or ``"mixture"``.

    Raises:
        ValueError: if there can be no mixture of such guides.
    """
    if keep == "mixture" and (not isinstance(guide, AutoFlow) or isinstance(guide, AutoMixture)):
        raise ValueError(
            f'fit: restarts="mixture" needs guides with one flow each, such as AutoCoupling(model), got {type(guide).__name__}'
        )
    with options.checkpoint.reserved() if options.checkpoint else nullcontext():
        return _fit_repeatedly(call, guide, options, num_restarts, keep)


def _fit_repeatedly(call: ModelCall, guide: Callable, options: Options, num_restarts: int, keep: str) -> FitResult:
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
                if keep == "mixture":
                    _check_mixture(fits[-1])
            except RuntimeError as error:
                if options.division is not None and not isinstance(error, NonfiniteError):
                    # The others may not have it.
                    raise
                warn(f"fit: restart {index} of {num_restarts} failed: {error}")
                errors.append(error)
            except KeyboardInterrupt:
                if options.division is not None:
                    raise
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
    kept = _mixture(call, guide, fits, options) if keep == "mixture" and len(fits) > 1 else best
    return replace(
        kept,
        restarts=tuple(fit.draws for fit in fits),
        wall_time=sum(fit.wall_time for fit in fits),
        interrupted=interrupted,
    )


def _check_mixture(fit: FitResult) -> None:
    """Raises ValueError where the restarts cannot be weighed against each other."""
    if fit.parameters:
        name = next(iter(fit.parameters))
        raise ValueError(
            f"fit: restarts=\"mixture\" is for one posterior, and the parameter '{name}' of the model makes every restart one of "
            'another; use restarts="best"'
        )
    if reason := fit.draws.elbo_error or fit.draws.weights_error:
        raise ValueError(f'fit: restarts="mixture" weighs draws, but {reason}; use restarts="best"')


def _mixture(call: ModelCall, guide: Any, fits: Sequence[FitResult], options: Options) -> FitResult:
    """The guides of all fits as one, weighed by the part of the evidence that belongs to each."""
    guides: list[Any] = [fit.guide for fit in fits]
    new = AutoMixture(guide.model, num_components=1, create_plates=guide.create_plates)
    with private_store(call.model, new) as (model, mixture):
        assert isinstance(mixture, AutoMixture)
        loop = Loop(replace(call, model=model), mixture, replace(options, checkpoint=None), log_likelihood=True)

        def prepare(tracer: Tracer) -> None:
            mixture.mix(guides)
            draws = loop.draw()
            x = pack(mixture.latents, draws).to(mixture.fixed_map.loc)
            with torch.no_grad():
                log_q = mixture.get_posterior().component_log_probs(x).double()
                log_weights = torch.as_tensor(draws.smoothed_log_weights).to(log_q)
                mixture.flow.logits.copy_(weights_of_parts(log_weights, log_q).log())
            with unchanged_random_state():
                # Several processes come to the same end.
                pyro.set_rng_seed(0)
                mixture.simplify()

        result = loop.judge(prepare)
    best = max(fits, key=lambda fit: fit.elbo.value)
    return replace(
        result,
        losses=best.losses,
        num_skipped=best.num_skipped,
        num_rolled_back=best.num_rolled_back,
        columns=best.columns,
    )


def weights_of_parts(log_weights: Tensor, log_q: Tensor) -> Tensor:
    r"""The weights of a mixture that fit weighted draws best, by the EM algorithm.

    .. math:: \pi_k \leftarrow \sum_s w_s \frac{\pi_k q_k(x_s)}{\sum_j \pi_j q_j(x_s)}

    Components that are apart get the evidence of their parts; those that share a part share its evidence.

    Arguments:
        log_weights: The log weights of the draws, which add up to 1, shape (S,).
        log_q: The log-density of every component at each, shape (S, K).
    """
    log_pi = torch.full_like(log_q[0], -math.log(log_q.shape[-1]))
    for _ in range(NUM_UPDATES):
        shares = (log_q + log_pi).log_softmax(-1)
        log_pi = (log_weights.unsqueeze(-1) + shares).logsumexp(0)
    return log_pi.exp().clamp(min=torch.finfo(log_pi.dtype).tiny)


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
