"""Several independent fits, of which the best by its ELBO is kept, or a mixture of all."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from .. import internals
from ..checks import warn
from ..compiled.svi import NonfiniteError
from ..diagnostics.mode_finder import pack
from ..diagnostics.tracer import Tracer
from ..guides.auto import AutoFlow
from ..guides.mixture import AutoMixture
from ..model.call import ModelCall
from ..model.ownership import owned, private_store
from ..model.sites import unchanged_random_state
from ..processes import alone
from . import start
from .division import Division
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
    starts = _Starts(call, first_model, lambda: copy.deepcopy(guide) if starts_anew else first_guide, options, keep)
    division = options.division
    if division is not None and division.mode == "particles" and num_restarts >= division.processes.size:
        outcomes = starts.fit_apart(division, num_restarts)
    else:
        outcomes = starts.fit(range(num_restarts), options, num_restarts)
    for index, error in outcomes.errors.items():
        warn(f"fit: restart {index} of {num_restarts} failed: {error}")
    fits = list(outcomes.fits.values())
    if not fits:
        raise next(iter(outcomes.errors.values()))
    best = max(fits, key=lambda fit: -math.inf if math.isnan(fit.elbo.value) else fit.elbo.value)
    _take_over(call, guide, best)
    kept = _mixture(call, guide, fits, options) if keep == "mixture" and len(fits) > 1 else best
    return replace(
        kept,
        restarts=tuple(fit.draws for fit in fits),
        wall_time=outcomes.seconds,
        interrupted=outcomes.interrupted,
    )


@dataclass
class _Outcomes:
    """What has become of some restarts.

    Attributes:
        fits: Those that have come to an end, by their index.
        errors: Why others have not.
        interrupted: Whether an interrupt has ended them.
        seconds: How long they took.
    """

    fits: dict[int, FitResult] = field(default_factory=dict)
    errors: dict[int, Exception] = field(default_factory=dict)
    interrupted: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class _Starts:
    """Where all restarts begin.

    Attributes:
        call: The arguments.
        model: The model.
        new_guide: Makes the guide for a restart.
        options: The options of all.
        keep: ``"best"`` or ``"mixture"``.
    """

    call: ModelCall
    model: Callable
    new_guide: Callable[[], Callable]
    options: Options
    keep: str

    def fit(
        self,
        indices: Iterable[int],
        options: Options,
        num_in_turn: int,
        finish: Callable[[int, Loop, FitResult], None] = lambda *_: None,
    ) -> _Outcomes:
        """Fits that come one after the other.

        Arguments:
            indices: Which.
            options: The options of each, but for its seed, time and checkpoint.
            num_in_turn: How many there are, at most, which share the time.
            finish: Called at the end of each, while its parameters are in Pyro's store.
        """
        outcomes = _Outcomes()
        for index in indices:
            one = replace(
                options,
                seed=None if options.seed is None else options.seed + index,
                max_seconds=options.max_seconds and options.max_seconds / num_in_turn,
                checkpoint=options.checkpoint and options.checkpoint.of_restart(index),
            )
            with private_store(self.model, self.new_guide()) as (model, candidate):
                loop = Loop(replace(self.call, model=model), candidate, one, log_likelihood=True)
                try:
                    fit = loop.run()
                    if self.keep == "mixture":
                        _check_mixture(fit)
                    finish(index, loop, fit)
                    outcomes.fits[index] = fit
                    outcomes.seconds += fit.wall_time
                except RuntimeError as error:
                    if options.division is not None and not isinstance(error, NonfiniteError):
                        # The others may not have it.
                        raise
                    outcomes.errors[index] = error
                except KeyboardInterrupt:
                    # Before or after the training of this one: the others are whole.
                    if self.options.division is not None or not outcomes.fits:
                        raise
                    outcomes.interrupted = True
            outcomes.interrupted |= loop.interrupted
            if outcomes.interrupted:
                break
        return outcomes

    def fit_apart(self, division: Division, num_restarts: int) -> _Outcomes:
        """Every process fits its share by itself, and then each has all of them."""
        processes = division.processes
        own = replace(
            self.options,
            division=None,
            progress=self.options.progress and division.is_first,
            checkpoint=division.own_checkpoint(self.options.checkpoint),
        )

        def fit() -> tuple[dict[int, _Parameters], dict[int, str], float]:
            carried: dict[int, _Parameters] = {}

            def carry(index: int, loop: Loop, fit: FitResult) -> None:
                carried[index] = _Parameters.of(loop, fit)

            indices = range(processes.rank, num_restarts, processes.size)
            outcomes = self.fit(indices, own, math.ceil(num_restarts / processes.size), carry)
            if outcomes.interrupted:
                # The others are interrupted as well, or wait.
                raise KeyboardInterrupt
            return carried, {index: str(error) for index, error in outcomes.errors.items()}, outcomes.seconds

        outcomes = _Outcomes()
        for carried, messages, seconds in processes.gather_from(fit):
            outcomes.fits |= {index: self._with(parameters) for index, parameters in carried.items()}
            outcomes.errors |= {index: NonfiniteError(message) for index, message in messages.items()}
            outcomes.seconds = max(outcomes.seconds, seconds)
        return replace(outcomes, fits=dict(sorted(outcomes.fits.items())), errors=dict(sorted(outcomes.errors.items())))

    def _with(self, parameters: _Parameters) -> FitResult:
        """The fit of another process, or this one, in a model and a guide of this one."""
        with (
            alone(),
            unchanged_random_state(),
            warnings.catch_warnings(),
            private_store(self.model, self.new_guide()) as (model, candidate),
        ):
            warnings.simplefilter("ignore")
            loop = Loop(replace(self.call, model=model), candidate, self.options)
            loop.set_up()
            parameters.fill(loop)
            # A mixture may have other components now, whose parameters Pyro has not met yet.
            start.set_up(loop.call, loop.guide)
            parameters.fill(loop)
            model, guide, _ = owned(loop.call.model, loop.guide)
            return FitResult(model, guide, self.call.args, dict(self.call.kwargs), **parameters.results)


@dataclass(frozen=True)
class _Parameters:
    """What makes a fit of one process one of another, which has the same model, guide and data.

    Attributes:
        results: The fields of the result that belong to no process.
        stored: What Pyro's store holds, unconstrained.
        modules: The states of model and guide, as far as they are modules.
    """

    results: dict[str, Any]
    stored: dict[str, Tensor]
    modules: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, loop: Loop, fit: FitResult) -> _Parameters:
        """Those of a loop that has come to its end."""
        names = {each.name for each in fields(fit)} - {"model", "guide", "args", "model_kwargs"}
        leaves = internals.stored_parameters()[0]
        return cls(
            {name: getattr(fit, name) for name in names},
            {name: leaf.detach().clone() for name, leaf in leaves.items()},
            {name: dict(module.state_dict()) for name, module in loop.modules().items()},
        )

    @torch.no_grad()
    def fill(self, loop: Loop) -> None:
        """Gives them to model and guide of another loop."""
        for name, module in loop.modules().items():
            module.load_state_dict(self.modules[name])
        for name, leaf in internals.stored_parameters()[0].items():
            if name in self.stored and leaf.shape == self.stored[name].shape:
                leaf.copy_(self.stored[name])


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
