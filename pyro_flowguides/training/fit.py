"""``fit``: from a model and a guide to a fitted guide with its verdict, in one call."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import warn
from ..compiled.losses import path_gradient
from ..compiled.svi import CHECK_EVERY, MAX_SKIPPED, CompiledSVI
from ..diagnostics.draws import Draws
from ..diagnostics.sampling import draw_traced
from ..diagnostics.tracer import Tracer
from ..guides.auto import AutoFlow
from ..model.sites import latent_sites, observed_sites, site_without_density, unchanged_random_state
from . import checkpoint as checkpoints
from .result import FlowFit
from .rounds import Round, Standing, doubling_rounds, got_worse, is_worth_another, spread
from .schedules import Convergence, Progress, find_schedule

# Where the number of steps is fixed beforehand.
NUM_STEPS = 3000
NUM_PARTICLES = 256
LEARNING_RATE = 1e-2
# Gradients are clipped at this multiple of the running mean of their norm.
CLIP_FACTOR = 2.0
NUM_FINAL_DRAWS = 10_000
# Without vectorisation every particle is a run of the model.
NUM_LOOPED_PARTICLES, NUM_LOOPED_DRAWS = 8, 1000
CHECKPOINT_EVERY = 500
NUM_START_DRAWS = 10


@dataclass(frozen=True)
class _Settings:
    """The options of :func:`fit`, checked and with their defaults."""

    num_steps: int | None
    num_particles: int | None
    optim: PyroOptim | Callable[[list[Tensor]], torch.optim.Optimizer] | None
    schedule: Callable[[float], float] | None
    loss: Any
    whiten: str | None
    backend: str
    batches: Iterable[Any] | None
    average: float | None
    tolerance: float | None
    seed: int | None
    checkpoint: Path | None
    checkpoint_every: int
    resume: bool
    callbacks: Sequence[Callable[[int, float], bool | None]]
    max_skipped: int
    progress: bool


def fit(
    model: Callable,
    guide: Callable,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    num_steps: int | None = None,
    num_particles: int | None = None,
    optim: PyroOptim | Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    schedule: str | Callable[[float], float] | None = None,
    loss: ELBO | None = None,
    whiten: str | None = "auto",
    backend: str = "auto",
    batches: Iterable[Any] | None = None,
    average: float | None = None,
    tolerance: float | None = None,
    num_restarts: int = 1,
    seed: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    callbacks: Sequence[Callable[[int, float], bool | None]] = (),
    max_skipped: int | None = None,
    progress: bool = True,
) -> FlowFit:
    """Fits a guide to a model and judges the result.

    The defaults: whiten the guide, then a round of 1000 steps of Adam at learning rate 1e-2 with a cosine to 0, on the path
    gradient of ``Trace_ELBO`` with 256 vectorised particles, gradients clipped at twice their running norm. Then 10,000 draws
    are weighted. If the standard deviation s of the log weights, a thousandth of them left out at either end, is above 0.05
    (near a perfect fit KL(q, p) is s² / 2, and no mean is off by more than about s standard deviations), another round follows
    with twice the steps and twice the particles, and a third one, doubled again, if the second has made the ELBO rise by more
    than its standard error. A round that makes it fall is taken back.

    The step is captured once a round as a graph, see :class:`pyro_flowguides.CompiledSVI`, which also keeps steps that are not
    finite, or explode, from doing harm. An interrupt from the keyboard ends the training, and what was reached is returned.

    Arguments:
        model: A Pyro model.
        guide: A guide of this library, or any other Pyro guide; then there is nothing to whiten and the gradient is its own.
        args: The positional arguments of both.
        model_kwargs: The keyword arguments of both.
        num_steps: The number of steps, in one round; with a ``tolerance`` the most there can be. By default as said above; 3000
            where the draws have no weights that could end a round (subsampled data, a random log-density), where the model
            cannot be vectorised, and with a ``loss``, ``batches``, a ``tolerance`` or a Pyro optimiser.
        num_particles: The number of draws per step, in every round; not together with ``loss``, which has its own.
        optim: A Pyro optimiser, or a function from a list of parameters to a torch optimiser.
        schedule: What the learning rate is multiplied with in a round: ``"cosine"``, ``"constant"``, ``"step"`` (a tenth from
            half of the steps on, a hundredth from three quarters on), ``"warm_up"`` (rises over the first twentieth, then a
            cosine), or a function of the progress from 0 to 1. By default cosine; none for a Pyro optimiser, which has
            schedulers of its own.
        loss: An ELBO of Pyro, or :class:`pyro_flowguides.IWELBO`, to use instead; then the guide's own ``gradient`` holds.
        whiten: The method of :meth:`pyro_flowguides.AutoFlow.whiten`, or None. ``"auto"`` leaves a trained guide alone, so that
            a second call continues the training, and the flows inside an ``AutoGuideList``, whose parts have no posterior of
            their own; where those are to start from, docs/how_to/initialise.md says.
        backend: How a step is run, see :class:`pyro_flowguides.CompiledSVI`.
        batches: Arguments step by step, such as a ``DataLoader``, iterated over again and again: a tuple or list of positional
            arguments, a dict of keyword arguments, or one argument. ``args`` then are what the guide is whitened and judged on,
            for example all of the data; by default the first batch.
        average: Keep an exponential moving average of the parameters with this decay, such as 0.99, and return it.
        tolerance: End early: once the ELBO, in means over 100 steps, rises by less than this (in nats) or than its standard
            error, the learning rate goes to 0 within a quarter of the steps so far. None to take all steps.
        num_restarts: Fit so many times, with the seeds ``seed``, ``seed + 1``, …, and keep the best by ELBO; the draws of all are
            in ``FlowFit.restarts``. A flow guide that is not set up yet starts from new weights each time, any other guide from
            the parameters it has.
        seed: Seeds Pyro first, if given.
        checkpoint: Write everything that is needed to go on to this file; with restarts, to one for each, ``name-0.suffix``, ….
        checkpoint_every: After so many steps; 500 by default.
        resume: Go on from the checkpoint if there is one, with the same results as without the interruption.
        callbacks: Functions called as ``callback(step, loss)`` after each step, counted over all rounds; one that returns True
            ends the training.
        max_skipped: So many skipped steps in a row end the fit with an error; 50 by default.
        progress: Show a progress bar.

    Returns:
        The fitted guide with its draws, ELBO, k-hat and verdict.

    Raises:
        TypeError: if the guide is a class, or an argument of another type than it must be.
        ValueError: if an argument is wrong, the data hold NaN, the model has no finite log-probability at the start, or the
            guide leaves out a discrete site that the loss does not sum out; the message names the site. Also if a checkpoint is
            damaged, or of another model.
        FileExistsError: if there is a checkpoint already and ``resume`` is not set.
        RuntimeError: if ``max_skipped`` steps in a row had no finite loss or gradient.
    """
    if isinstance(guide, type) or not callable(guide):
        given = f"the class {guide.__name__}" if isinstance(guide, type) else repr(guide)
        raise TypeError(f"fit: guide must be a guide of the model, such as AutoCoupling(model), got {given}")
    if loss is not None and num_particles is not None:
        raise ValueError("fit: num_particles belongs to the default loss; give it to the loss instead")
    if isinstance(optim, PyroOptim) and schedule is not None:
        raise ValueError(
            "fit: a Pyro optimiser has its own schedulers, such as pyro.optim.ExponentialLR; leave schedule out"
        )
    if optim is not None and not callable(optim):
        raise TypeError(
            f"fit: optim must be a Pyro optimiser or a function from parameters to a torch optimiser, got {optim!r}"
        )
    if checkpoint is None and (checkpoint_every is not None or resume):
        raise ValueError("fit: checkpoint_every and resume need a file, checkpoint=")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"fit: tolerance must be at least 0, got {tolerance}")
    if num_particles is not None:
        num_particles = _positive("num_particles", num_particles, NUM_PARTICLES)
    settings = _Settings(
        num_steps=None if num_steps is None else _positive("num_steps", num_steps, NUM_STEPS),
        num_particles=num_particles,
        optim=optim,
        schedule=None if isinstance(optim, PyroOptim) else find_schedule(schedule),
        loss=loss,
        whiten=whiten,
        backend=backend,
        batches=batches,
        average=average,
        tolerance=tolerance,
        seed=seed,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        checkpoint_every=_positive("checkpoint_every", checkpoint_every, CHECKPOINT_EVERY),
        resume=resume,
        callbacks=callbacks,
        max_skipped=_positive("max_skipped", max_skipped, MAX_SKIPPED),
        progress=progress,
    )
    kwargs = dict(model_kwargs or {})
    if batches is not None and not args and not kwargs:
        if seed is not None:
            # A loader that shuffles draws.
            pyro.set_rng_seed(seed)
        args, kwargs = _arguments(next(iter(batches)))
    if _positive("num_restarts", num_restarts, 1) == 1:
        return _fit_once(model, guide, args, kwargs, settings)[0]
    return _fit_repeatedly(model, guide, args, kwargs, settings, num_restarts)


def _fit_once(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    settings: _Settings,
    initial: _Values | None = None,
    log_likelihood: bool = False,
) -> tuple[FlowFit, bool]:
    """One fit, and whether it was interrupted."""
    if settings.seed is not None:
        pyro.set_rng_seed(settings.seed)
    start = time.perf_counter()
    saved = _read_checkpoint(settings)
    if isinstance(guide, AutoFlow):
        guide.setup(*args, **kwargs)
    tracer = Tracer(model, guide, args, kwargs)
    if initial is not None:
        initial.restore()
    _check_start(tracer)
    if settings.loss is None:
        _check_discrete_sites(tracer)
    if saved is not None:
        _load_modules(saved["modules"], model, guide)
    else:
        _start_well(guide, args, kwargs, settings.whiten, tracer)

    rounds = _rounds(settings, tracer)
    history = _History()
    if saved is not None:
        _check_rounds(saved, rounds, settings.checkpoint)
        history.load_state_dict(saved["history"], model, guide)
    with path_gradient(guide) if settings.loss is None else contextlib.nullcontext():
        while True:
            training = _Training(model, guide, args, kwargs, settings, tracer, rounds, history)
            if saved is not None:
                training.load_state_dict(saved["training"])
                saved = None
            training.run()
            # A round that did harm may leave the support of the model, which is no error: it is taken back.
            with pyro.validation_enabled(False) if history.values is not None else contextlib.nullcontext():
                draws = _final_draws(tracer, log_likelihood)
            history.add(training, draws)
            if history.values is not None and got_worse(history.standings):
                history.values.restore()
                draws = _final_draws(tracer, log_likelihood)
                break
            if training.stopped or len(history.standings) == len(rounds) or not is_worth_another(history.standings):
                break
            history.values = _Values(model, guide)
    result = FlowFit(
        model,
        guide,
        args,
        kwargs,
        losses=np.array(history.losses),
        num_skipped=history.num_skipped,
        num_rolled_back=history.num_rolled_back,
        wall_time=time.perf_counter() - start,
        draws=draws,
    )
    return result, training.interrupted


def _check_rounds(saved: dict[str, Any], rounds: Sequence[Round], path: Path | None) -> None:
    numbers = [one.num_steps for one in rounds]
    if saved["num_steps"] != numbers:
        then, now = (" + ".join(map(str, steps)) for steps in (saved["num_steps"], numbers))
        raise ValueError(
            f"fit: checkpoint '{path}' is of a fit with num_steps = {then}, here it is {now}: the schedule would not be the same"
        )


def _start_well(guide: Callable, args: tuple, kwargs: dict[str, Any], method: str | None, tracer: Tracer) -> None:
    if not isinstance(guide, AutoFlow):
        if method not in ("auto", None):
            raise ValueError(
                f"fit: whiten={method!r} needs a guide of this library; {type(guide).__name__} has no fixed map"
            )
    elif method is not None and not (method == "auto" and guide.is_trained()):
        guide.whiten(*args, method=method, model_kwargs=kwargs, vectorize=tracer.vectorizes)
    for part in guide.modules() if isinstance(guide, torch.nn.Module) else ():
        if isinstance(part, AutoFlow) and part.prototype_trace is not None:
            part.undamp()


def _rounds(settings: _Settings, tracer: Tracer) -> tuple[Round, ...]:
    """The rounds that a fit may have."""
    num_particles = settings.num_particles or (NUM_PARTICLES if tracer.vectorizes else NUM_LOOPED_PARTICLES)
    if (
        settings.num_steps is None
        and settings.loss is None
        and settings.batches is None
        and settings.tolerance is None
        and not isinstance(settings.optim, PyroOptim)
        and tracer.vectorizes
        and _has_weights(tracer)
    ):
        return doubling_rounds(num_particles, fixed=settings.num_particles is not None)
    return (Round(settings.num_steps or NUM_STEPS, num_particles),)


def _final_draws(tracer: Tracer, log_likelihood: bool) -> Draws:
    num_draws = NUM_FINAL_DRAWS if tracer.vectorizes else NUM_LOOPED_DRAWS
    return draw_traced(tracer, num_draws, log_likelihood=log_likelihood)


def _has_weights(tracer: Tracer) -> bool:
    """Whether draws have weights by which the fit can be judged."""
    with unchanged_random_state():
        return draw_traced(tracer, 2).no_weights is None


def _default_loss(tracer: Tracer, num_particles: int) -> Trace_ELBO:
    return Trace_ELBO(
        num_particles=num_particles,
        vectorize_particles=tracer.vectorizes and num_particles > 1,
        max_plate_nesting=tracer.max_plate_nesting,
    )


@dataclass
class _History:
    """What the rounds so far leave."""

    losses: list[float] = field(default_factory=list)
    standings: list[Standing] = field(default_factory=list)
    # After the last of them.
    values: _Values | None = None
    num_skipped: int = 0
    num_rolled_back: int = 0

    def add(self, training: _Training, draws: Draws) -> None:
        self.losses += training.losses
        elbo = draws.elbo()
        self.standings.append(Standing(elbo.value, elbo.se, spread(draws.log_weights)))
        self.num_skipped += training.svi.num_skipped
        self.num_rolled_back += training.svi.num_rolled_back

    def state_dict(self) -> dict[str, Any]:
        standings = [list(standing) for standing in self.standings]
        return {**vars(self), "standings": standings, "values": self.values and self.values.values}

    def load_state_dict(self, state: dict[str, Any], model: Callable, guide: Callable) -> None:
        vars(self).update(state)
        self.standings = [Standing(*standing) for standing in state["standings"]]
        self.values = None if state["values"] is None else _Values(model, guide, values=state["values"])


class _Training:
    """The loop over the steps of a round, which can be left and taken up again."""

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        settings: _Settings,
        tracer: Tracer,
        rounds: Sequence[Round],
        history: _History,
    ) -> None:
        self.args, self.kwargs = args, kwargs
        self.settings = settings
        self.rounds = rounds
        self.history = history
        self.round = rounds[len(history.standings)]
        self.progress = progress = Progress(self.round.num_steps)
        self.svi = CompiledSVI(
            model,
            guide,
            settings.optim or functools.partial(torch.optim.Adam, lr=LEARNING_RATE),
            settings.loss or _default_loss(tracer, self.round.num_particles),
            backend=settings.backend,
            schedule=None
            if (schedule := settings.schedule) is None
            else lambda step: schedule(progress.fraction(step)),
            clip_factor=CLIP_FACTOR,
            average=settings.average,
            max_skipped=settings.max_skipped,
        )
        self.losses: list[float] = []
        self.stopped = False
        self.interrupted = False
        # Steps whose loss has not been waited for.
        self.pending: list[Tensor] = []
        self.convergence = None if settings.tolerance is None else Convergence(settings.tolerance)
        self.batches = None if settings.batches is None else _Batches(settings.batches)

    def run(self) -> None:
        """Takes the steps, until the end or an interrupt from the keyboard."""
        description = type(self.svi.guide).__name__
        if len(self.rounds) > 1:
            description += f", round {len(self.history.standings) + 1} of at most {len(self.rounds)}"
        quiet = not self.settings.progress
        with tqdm(total=self.progress.end, disable=quiet, desc=description, mininterval=0.5) as bar:
            bar.update(len(self.losses))
            try:
                self._take_steps(bar)
            except KeyboardInterrupt:
                self.stopped = self.interrupted = True
                self._collect(bar)
                warn(f"fit: interrupted after {len(self.losses)} of {self.round.num_steps} steps")
        if self.settings.average is not None:
            self.svi.use_average()

    def _take_steps(self, bar: tqdm) -> None:
        # What stays the same is looked at once in a while, unless a callback may change it.
        every = 1 if self.settings.callbacks or self.batches else CHECK_EVERY
        step: Callable[[], Tensor] | None = None
        number, before = len(self.losses), len(self.history.losses)
        while number < self.progress.end and not self.stopped:
            if number % every == 0 or step is None:
                step = self.svi.prepare(*self._next_arguments(), self.progress.end - number)
            self.pending.append(step())
            for callback in self.settings.callbacks:
                self.stopped |= bool(callback(before + number, float(self.pending[-1])))
            number += 1
            checkpoint_due = self.settings.checkpoint is not None and number % self.settings.checkpoint_every == 0
            if checkpoint_due or len(self.pending) == CHECK_EVERY:
                self._collect(bar)
            if checkpoint_due:
                self._save()
        self._collect(bar)
        if self.settings.checkpoint is not None:
            self._save()

    def _next_arguments(self) -> tuple[tuple, dict[str, Any]]:
        return (self.args, self.kwargs) if self.batches is None else next(self.batches)

    def _collect(self, bar: tqdm) -> None:
        """Waits for the losses of the last steps."""
        if not self.pending:
            return
        values = torch.stack(self.pending).tolist()
        self.pending.clear()
        self.losses.extend(values)
        if (
            self.convergence is not None
            and self.progress.converged_at is None
            and self.convergence.reached(self.losses)
        ):
            self.progress.converged_at = len(self.losses)
            bar.total = self.progress.end
        now = self.svi.scalars
        bar.set_postfix(
            elbo=f"{-np.nanmean(values) if not np.isnan(values).all() else np.nan:.3f}",
            gradient=f"{now.norm:.2g}",
            skipped=int(now.num_skipped),
            refresh=False,
        )
        bar.update(len(values))

    # --- checkpoints -----------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        assert self.settings.checkpoint is not None
        checkpoints.save(
            self.settings.checkpoint,
            {
                "modules": {
                    name: module.state_dict()
                    for name, module in (("model", self.svi.model), ("guide", self.svi.guide))
                    if isinstance(module, torch.nn.Module)
                },
                "training": {
                    "svi": self.svi.state_dict(),
                    "losses": self.losses,
                    "converged_at": self.progress.converged_at,
                    "random": checkpoints.random_state(),
                    "batches": None if self.batches is None else self.batches.state_dict(),
                },
                "num_steps": [one.num_steps for one in self.rounds],
                "history": self.history.state_dict(),
            },
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where a checkpoint was written."""
        try:
            self.svi.load_state_dict(state["svi"], *self.args, **self.kwargs)
        except ValueError as error:
            raise ValueError(f"fit: checkpoint '{self.settings.checkpoint}' does not fit: {error}") from error
        self.losses = list(state["losses"])
        self.progress.converged_at = state["converged_at"]
        if self.batches is not None and state["batches"] is not None:
            self.batches.load_state_dict(state["batches"])
        checkpoints.set_random_state(state["random"])


class _Batches:
    """The arguments of the steps, epoch after epoch."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches
        self._begin()

    def _begin(self) -> None:
        # What a loader shuffles with: the generator of torch, or one of its own.
        self.random_state = checkpoints.random_state()
        generator = getattr(self.batches, "generator", None)
        self.generator_state = None if generator is None else generator.get_state()
        self.iterator = iter(self.batches)
        self.position = 0

    def __next__(self) -> tuple[tuple, dict[str, Any]]:
        try:
            batch = next(self.iterator)
        except StopIteration:
            self._begin()
            try:
                batch = next(self.iterator)
            except StopIteration:
                raise ValueError(
                    "fit: batches came to an end and cannot be iterated over again; give a list or a DataLoader, not a generator"
                ) from None
        self.position += 1
        return _arguments(batch)

    def state_dict(self) -> dict[str, Any]:
        return {
            "random_state": self.random_state,
            "generator_state": self.generator_state,
            "position": self.position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        checkpoints.set_random_state(state["random_state"])
        if state["generator_state"] is not None:
            self.batches.generator.set_state(state["generator_state"])  # type: ignore[attr-defined]
        self._begin()
        for _ in range(state["position"]):
            next(self)


def _arguments(batch: Any) -> tuple[tuple, dict[str, Any]]:
    """The arguments that an element of batches stands for."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def _read_checkpoint(settings: _Settings) -> dict[str, Any] | None:
    path = settings.checkpoint
    if path is None:
        return None
    if not path.parent.is_dir():
        raise ValueError(f"fit: the directory of checkpoint '{path}' does not exist")
    if not path.exists():
        return None
    if not settings.resume:
        raise FileExistsError(
            f"fit: checkpoint '{path}' exists; give resume=True to go on from it, or delete it to begin anew"
        )
    return checkpoints.load(path)


def _load_modules(states: Mapping[str, Any], model: Callable, guide: Callable) -> None:
    """Buffers and parameters of model and guide; the fixed map of a flow guide is among them."""
    for name, module in (("model", model), ("guide", guide)):
        if (name in states) != isinstance(module, torch.nn.Module):
            raise ValueError(f"fit: the checkpoint is of another {name}")
        if isinstance(module, torch.nn.Module):
            try:
                module.load_state_dict(states[name])
            except RuntimeError as error:
                raise ValueError(
                    f"fit: the checkpoint is of another {name}: {' '.join(str(error).split())[:300]}"
                ) from error


# --- restarts ------------------------------------------------------------------------------------------------------------


class _Values:
    """The values of parameters, to go back to."""

    def __init__(self, *functions: Callable, values: Sequence[Tensor] | None = None) -> None:
        modules = [function for function in functions if isinstance(function, torch.nn.Module)]
        leaves = [leaf for _, leaf in pyro.get_param_store().named_parameters()]
        leaves += [leaf for module in modules for leaf in module.parameters()]
        leaves += [buffer for module in modules for buffer in module.buffers()]
        self.leaves = list({id(leaf): leaf for leaf in leaves}.values())
        self.values = [leaf.detach().clone() for leaf in self.leaves] if values is None else list(values)

    def restore(self) -> None:
        with torch.no_grad():
            for leaf, value in zip(self.leaves, self.values, strict=True):
                leaf.copy_(value)


def _fit_repeatedly(
    model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any], settings: _Settings, num_restarts: int
) -> FlowFit:
    """The best of several fits by its ELBO."""
    if settings.seed is not None:
        pyro.set_rng_seed(settings.seed)
    store = pyro.get_param_store()
    # Each such guide is a copy with parameters of its own.
    starts_anew = isinstance(guide, AutoFlow) and guide.prototype_trace is None
    initial = _initial_values(model, guide, args, kwargs, starts_anew)
    fits: list[tuple[FlowFit, _Values, Any]] = []
    errors: list[Exception] = []
    interrupted = False
    for index in range(num_restarts):
        one = replace(settings, seed=None if settings.seed is None else settings.seed + index)
        if settings.checkpoint is not None:
            path = settings.checkpoint
            one = replace(one, checkpoint=path.with_name(f"{path.stem}-{index}{path.suffix}"))
        with store.scope() if starts_anew else contextlib.nullcontext():
            candidate = copy.deepcopy(guide) if starts_anew else guide
            try:
                result, interrupted = _fit_once(model, candidate, args, kwargs, one, initial, log_likelihood=True)
            except RuntimeError as error:
                warn(f"fit: restart {index} of {num_restarts} failed: {error}")
                errors.append(error)
                continue
            fits.append((result, _Values(model, candidate), store.get_state()))
        if interrupted:
            break
    if not fits:
        raise errors[0]
    best, values, state = max(fits, key=lambda entry: -math.inf if math.isnan(entry[0].elbo) else entry[0].elbo)
    values.restore()
    if starts_anew:
        store.set_state(state)
        assert isinstance(guide, AutoFlow) and isinstance(best.guide, AutoFlow)
        guide.setup(*args, **kwargs)
        guide.load_state_dict(best.guide.state_dict())
    best.guide = guide
    best.restarts = tuple(result.draws for result, _, _ in fits)
    best.wall_time = sum(result.wall_time for result, _, _ in fits)
    return best


def _initial_values(
    model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any], starts_anew: bool
) -> _Values:
    """The values that every restart begins with; those of a guide that starts anew are of no use, but of its model they are."""
    with (
        pyro.get_param_store().scope() if starts_anew else contextlib.nullcontext(),
        unchanged_random_state() if starts_anew else contextlib.nullcontext(),
        warnings.catch_warnings(),
    ):
        # It warns again where the fit itself does it.
        warnings.simplefilter("ignore")
        guide = copy.deepcopy(guide) if starts_anew else guide
        if isinstance(guide, AutoFlow):
            guide.setup(*args, **kwargs)
        Tracer(model, guide, args, kwargs)
        return _Values(model, guide)


# --- checks --------------------------------------------------------------------------------------------------------------


def _check_start(tracer: Tracer) -> None:
    """An error that names the site, if training could not even begin."""
    for name, site in observed_sites(tracer.model_prototype):
        missing = int(site["value"].isnan().sum()) if site["value"].is_floating_point() else 0
        if missing:
            raise ValueError(
                f"fit: observed site '{name}' holds {missing} NaN among its {site['value'].numel()} values; remove them, or "
                "put any valid number in their place and mask those with poutine.mask (a NaN has NaN gradients even masked)"
            )
    # Some draws may have no density, in a guide that has been trained too; the steps leave them out.
    for _ in range(NUM_START_DRAWS):
        message = _first_site_without_density(tracer)
        if message is None:
            return
    raise ValueError(f"fit: the ELBO is not finite at the start: {message}")


def _check_discrete_sites(tracer: Tracer) -> None:
    """An error where every step would draw a discrete site from its prior, which trains, but to another posterior."""
    for name, site in latent_sites(tracer.model_prototype):
        if name not in tracer.guide_prototype.nodes and site["fn"].has_enumerate_support:
            raise ValueError(
                f"fit: the guide leaves out the discrete site '{name}', and the default loss does not sum over its values; sum "
                "it out in the model (the mixture of its values; docs/how_to/vectorise.md), or give "
                "loss=TraceEnum_ELBO(...), whose ELBO the verdict does not know"
            )


@torch.no_grad()
def _first_site_without_density(tracer: Tracer) -> str | None:
    """A sentence about the first site of a fresh draw whose log-probability is not finite."""
    with poutine.block(), pyro.validation_enabled(False):
        for guide_trace, model_trace, _ in tracer.traces(1):
            return site_without_density(guide_trace, model_trace)
    return None


def _positive(name: str, value: int | None, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"fit: {name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"fit: {name} must be at least 1, got {value}")
    return value
