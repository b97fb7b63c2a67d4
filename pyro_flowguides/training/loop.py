"""One fit: rounds of steps, each of them judged by draws from the guide, and kept or taken back."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyro
import torch
from pyro.optim import PyroOptim

from ..checks import warn
from ..compiled.losses import KL
from ..compiled.recorded import BatchedCalls
from ..compiled.snapshot import Snapshot
from ..diagnostics.draws import Draws
from ..diagnostics.mode_finder import search_after_fit
from ..diagnostics.modes import Modes
from ..diagnostics.sampling import draw_traced
from ..diagnostics.tracer import Tracer
from ..guides.base import Call
from ..model.call import ModelCall
from ..model.missing import FillMissing
from ..model.ownership import owned
from ..model.sites import unchanged_random_state
from ..processes import Processes
from . import start
from .batches import warn_of_plate_of_the_batch
from .clock import RESERVE, Limit, has_time
from .division import check_own_rows
from .fingerprint import density_difference, describe, difference, fingerprint, log_densities
from .first_draws import check_gradients, check_start
from .result import FitResult
from .schedules import (
    Round,
    RoundScore,
    Temper,
    check_num_steps,
    check_temper,
    doubling_rounds,
    got_worse,
    is_worth_another,
    log_weight_sd,
)
from .steps import StepOptions, Steps, default_optimizer

# Where the number of steps is fixed beforehand.
NUM_STEPS = 3000
NUM_PARTICLES = 256
NUM_FINAL_DRAWS = 10_000
# That tell whether the start is good.
NUM_FIRST_DRAWS = 1000
# Without vectorisation every particle is a run of the model.
NUM_LOOPED_PARTICLES, NUM_LOOPED_DRAWS = 8, 1000


@dataclass(frozen=True, kw_only=True)
class Options(StepOptions):
    """The options of :func:`pyro_flowguides.fit`, checked."""

    num_steps: int | None
    num_particles: int | None
    temper: Temper | None
    # Whether the arguments are the first of the batches.
    args_are_a_batch: bool
    whiten: str | None
    search_modes: bool | None
    seed: int | None
    max_seconds: float | None


class Loop:
    """The rounds of one fit. A checkpoint lets them go on where they were.

    Arguments:
        call: The model with its arguments.
        guide: The guide.
        options: The options.
        log_likelihood: Whether the draws keep the log-likelihood of every observation.

    Attributes:
        losses: The loss of every step of the rounds that are over.
        scores: How good the guide was after each of them.
        start_sd: The standard deviation of its log weights before the first, where this decides on the rounds.
        interrupted: Whether an interrupt from the keyboard has ended the training, or the search for modes after it.
    """

    name = "fit"

    def __init__(self, call: ModelCall, guide: Callable, options: Options, *, log_likelihood: bool = False) -> None:
        self.call, self.guide, self.options = call, guide, options
        self.log_likelihood = log_likelihood
        self.losses: list[float] = []
        self.scores: list[RoundScore] = []
        self.start_sd = math.inf
        self.num_skipped = self.num_rolled_back = 0
        self.chunk_size: int | None = None
        # After the last round that did no harm.
        self.best: Snapshot | None = None
        self.interrupted = False

    def run(self) -> FitResult:
        """Fits the guide, whose parameters must be in a store of their own."""
        with self.options.checkpoint.reserved() if self.options.checkpoint else contextlib.nullcontext():
            return self._run()

    def _run(self) -> FitResult:
        self.began = time.perf_counter()
        if self.options.seed is not None:
            pyro.set_rng_seed(self.options.seed)
        checkpoint = self.options.checkpoint
        saved = None if checkpoint is None else checkpoint.load()
        flow_guides = self.set_up()
        if (division := self.options.division) and division.mode == "data" and self.options.batches is None:
            check_own_rows(division, self.call, self.guide, self.tracer.model_prototype)
        check_start(self.tracer, flow_guides)
        if self.options.loss is None:
            check_gradients(self.tracer)
        if checkpoint is not None:
            self.fingerprint = self._find_fingerprint()
        # Measured before a state is loaded, since the passes for it move the buffers of a guide.
        elements = self.tracer.elements_per_draw
        if checkpoint is not None and saved is not None:
            with checkpoint.used():
                self._load_modules(saved)
        else:
            with start.threads_for(elements * NUM_PARTICLES):
                start.whiten(
                    flow_guides,
                    self.guide,
                    self.options.whiten,
                    self.tracer,
                    # Neither another loss nor a batch says how good a guide is.
                    may_start_over=self.options.loss is None and self.options.batches is None,
                )
        self.batched = start.batched_calls(self.tracer, arguments_vary=self.options.batches is not None)
        self.rounds = self._choose_rounds(saved)
        if self.options.temper is not None:
            check_temper(self.options.temper, self.rounds[0].num_steps)
        if checkpoint is not None and saved is not None:
            with checkpoint.used():
                self._load(saved)
        draws = self._train_and_judge(saved)
        if start.simplify(flow_guides):
            draws = self.draw()
        return self._result(draws, flow_guides)

    def judge(self, prepare: Callable[[Tracer], None]) -> FitResult:
        """The result for a guide that is made of trained parts, without any training.

        Arguments:
            prepare: Finishes the guide, once it is set up, with what traces it.
        """
        self.began = time.perf_counter()
        flow_guides = self.set_up()
        with pyro.validation_enabled(False):
            prepare(self.tracer)
        return self._result(self.draw(), flow_guides)

    def set_up(self) -> list[Call]:
        """Runs model and guide once, and returns the flow guides."""
        self.tracer, flow_guides = start.set_up(self.call, self.guide)
        if start.has_missing(self.tracer):
            self.call = replace(self.call, model=FillMissing()(self.call.model))
        return flow_guides

    def _result(self, draws: Draws, flow_guides: list[Call]) -> FitResult:
        start.warn_of_ode_error(flow_guides, draws.elbo)
        modes = self._search(draws, is_flow=bool(flow_guides))
        model, guide, parameters = owned(self.call.model, self.guide)
        return FitResult(
            model,
            guide,
            self.call.args,
            dict(self.call.kwargs),
            parameters={
                name: value for name, value in parameters.items() if name not in self.tracer.guide_prototype.nodes
            },
            losses=np.array(self.losses),
            num_skipped=self.num_skipped,
            num_rolled_back=self.num_rolled_back,
            wall_time=time.perf_counter() - self.began,
            vectorization=self.tracer.vectorization,
            draws=draws,
            columns=self.call.columns,
            interrupted=self.interrupted,
            modes=modes,
            chunk_size=self.chunk_size,
        )

    def _train_and_judge(self, saved: dict[str, Any] | None) -> Draws:
        """Round after round, until one more would not help; returns the draws of the last one that is kept."""
        for round in self.rounds[len(self.scores) :]:
            steps = self._steps_of(round, saved)
            saved = None
            round_began = time.perf_counter()
            stopped = self._train(steps, round)
            seconds = time.perf_counter() - round_began
            try:
                draws = self._judge()
            except KeyboardInterrupt:
                if round is self.rounds[-1] or self.options.division is not None:
                    raise
                # Instead of the next round; another interrupt ends the fit.
                stopped = self.interrupted = True
                draws = self._judge()
            if self.best is not None and got_worse(self.scores):
                # Taken back.
                steps.svi.restore(self.best, *self.call.args, **self.call.kwargs)
                return self.draw()
            # The next one has twice the steps and, unless their number is fixed, twice the particles.
            next_seconds = (2 if self.options.num_particles is not None else 4) * seconds
            if stopped or not is_worth_another(self.scores) or not has_time(self._limit, next_seconds):
                return draws
            # Kept.
            self.best = steps.svi.snapshot()
        return draws

    def _choose_rounds(self, saved: dict[str, Any] | None) -> tuple[Round, ...]:
        """Rounds that the weights of the draws end; one of a fixed length where they cannot, or where it was asked for."""
        options, looped = self.options, not self.tracer.vectorizes
        num_particles = options.num_particles or (NUM_LOOPED_PARTICLES if looped else NUM_PARTICLES)
        asked_for_one = options.num_steps is not None or options.loss is not None or options.batches is not None
        # A Pyro optimiser has a schedule of its own, which would go on from round to round.
        if asked_for_one or isinstance(options.optim, PyroOptim) or looped or not self._has_weights():
            return (Round(options.num_steps or NUM_STEPS, num_particles),)
        # After a checkpoint the guide is no longer as it was at the start.
        self.start_sd = self._find_start_sd() if saved is None else float(saved["start_sd"])
        return doubling_rounds(num_particles, fixed=options.num_particles is not None, start_sd=self.start_sd)

    def _find_start_sd(self) -> float:
        """How uneven the weights of the guide are before the first step."""
        if self.options.temper is not None:
            # The first round is not of the posterior.
            return math.inf

        def sd_of_draws() -> float:
            with unchanged_random_state(), pyro.validation_enabled(False):
                return log_weight_sd(draw_traced(self.tracer, NUM_FIRST_DRAWS).log_weights)

        return self.options.division.processes.from_first(sd_of_draws) if self.options.division else sd_of_draws()

    def record(self) -> BatchedCalls | None:
        """The recording of a model that broadcasts, once for all rounds; None if it cannot be recorded."""
        if self.batched is None and self.options.batches is None:
            self.batched = start.record(self.tracer)
        return self.batched

    def _has_weights(self) -> bool:
        with unchanged_random_state():
            return draw_traced(self.tracer, 2).weights_error is None

    # --- a round ---------------------------------------------------------------------------------------------------------

    def _steps_of(self, round: Round, saved: dict[str, Any] | None) -> Steps:
        """The steps of a round, which continue from the content of a checkpoint, if there is one."""
        # What a round before has learnt is not forgotten.
        temper = None if self.scores else self.options.temper
        beta: Callable[[int], float] | None = temper and (lambda step: temper(step, round.num_steps))
        loss = KL(
            round.num_particles,
            vectorize_particles=self.tracer.vectorizes,
            max_plate_nesting=self.tracer.max_plate_nesting,
            batched=self.batched,
            otherwise=self.record,
            temper=beta,
        )
        title = type(self.guide).__name__
        if len(self.rounds) > 1:
            title += f", round {len(self.scores) + 1} of at most {len(self.rounds)}"
        clock = None if self._limit is None else self._limit.clock(round.num_steps)
        steps = Steps(self, round.num_steps, loss, title=title, temper=beta, clock=clock)
        if saved is not None:
            assert self.options.checkpoint is not None
            with self.options.checkpoint.used():
                steps.load_state_dict(saved["training"])
                self._check_densities(saved)
        return steps

    @functools.cached_property
    def _limit(self) -> Limit | None:
        """The time that this fit has, from the first round on."""
        if self.options.max_seconds is None:
            return None
        part = 10
        before = time.perf_counter()
        with unchanged_random_state(), pyro.validation_enabled(False):
            draw_traced(self.tracer, self._num_final_draws // part)
        # The draws that judge a round take as much time as these, times their number.
        judging = part * (time.perf_counter() - before)
        division = self.options.division
        end = self.began + (1 - RESERVE) * self.options.max_seconds - judging
        return Limit(end, division.processes if division else None)

    @property
    def _num_final_draws(self) -> int:
        return NUM_FINAL_DRAWS if self.tracer.vectorizes else NUM_LOOPED_DRAWS

    def check_batch(self, call: ModelCall, batches: Iterable[Any]) -> None:
        """Warns where the data of the first batch stand in a plate of the batch's own size."""
        warn_of_plate_of_the_batch(call, batches, self.tracer.model_prototype)

    def _train(self, steps: Steps, round: Round) -> bool:
        """Takes the steps of a round; returns whether a callback or an interrupt has ended the training."""
        with start.threads_for(self.tracer.elements_per_draw * round.num_particles):
            stopped = steps.run()
        self.losses += steps.losses
        self.chunk_size = steps.chunk_size
        self.num_skipped += steps.svi.num_skipped
        self.num_rolled_back += steps.svi.num_rolled_back
        return stopped

    def _judge(self) -> Draws:
        draws = self.draw()
        self.scores.append(RoundScore.of(draws))
        return draws

    def draw(self) -> Draws:
        """Draws of the guide as it is, enough to judge it."""
        num_samples = self._num_final_draws
        draw = functools.partial(draw_traced, self.tracer, log_likelihood=self.log_likelihood)
        # Draws of a poor fit may leave the support of the model, which is no error: they weigh nothing.
        with pyro.validation_enabled(False):
            return self.options.division.draws(draw, num_samples) if self.options.division else draw(num_samples)

    def _search(self, draws: Draws, *, is_flow: bool) -> Modes | None:
        division = self.options.division
        if division is None:
            return self._search_with(None, draws, is_flow)
        if division.mode == "particles":
            return self._search_with(division.processes, draws, is_flow)
        # The draws are those of the data that the first process has.
        return division.processes.from_first(lambda: self._search_with(None, draws, is_flow))

    def _search_with(self, processes: Processes | None, draws: Draws, is_flow: bool) -> Modes | None:
        """Modes that the guide may have lost; None where they cannot be looked for, or an interrupt has ended that."""
        if self.interrupted:
            return None
        asked_for = self.options.search_modes
        if self.options.args_are_a_batch:
            if asked_for:
                warn(
                    "fit: modes were not looked for: the arguments are a batch, whose posterior is not that of all data"
                )
            return None
        with start.threads_for(self.tracer.elements_per_draw * NUM_PARTICLES):
            try:
                return search_after_fit(
                    self.tracer,
                    draws,
                    len(self.losses),
                    is_flow=is_flow,
                    asked_for=asked_for,
                    seed=self.options.seed or 0,
                    processes=processes,
                )
            except KeyboardInterrupt:
                if self.options.division is not None:
                    raise
                self.interrupted = True
                return None

    # --- checkpoints -----------------------------------------------------------------------------------------------------

    def save(self, steps: Steps) -> None:
        """Writes the checkpoint in the middle of a round, or at its end."""
        assert self.options.checkpoint is not None
        self.options.checkpoint.try_to_save(
            {
                "fingerprint": self.fingerprint,
                "log_densities": log_densities(self.tracer),
                "modules": {name: module.state_dict() for name, module in self.modules().items()},
                "num_steps": [round.num_steps for round in self.rounds],
                "losses": self.losses,
                "start_sd": self.start_sd,
                "scores": [list(score) for score in self.scores],
                "num_skipped": self.num_skipped,
                "num_rolled_back": self.num_rolled_back,
                "best": self.best and self.best.state_dict(),
                "training": steps.state_dict(),
            }
        )

    def _find_fingerprint(self) -> dict[str, Any]:
        """What the numbers of this fit depend on."""
        options = self.options
        call = ModelCall(self.call.model) if options.args_are_a_batch else self.call
        named = {
            "batches": options.batches,
            "loss": options.loss,
            "optim": options.optim or default_optimizer(),
            "schedule": options.schedule,
            "num_particles": options.num_particles,
            "temper": options.temper,
            "whiten": options.whiten,
            "ema_decay": options.svi["ema_decay"],
            "chunk_size": options.svi["chunk_size"],
            "seed": options.seed,
        }
        # Of what may be shuffled the log-densities are compared only where it is the same.
        arguments = describe([self.call.args, self.call.kwargs])
        return {"belongs_to": fingerprint(call, self.guide, self.tracer, named), "arguments": arguments}

    def _load(self, saved: dict[str, Any]) -> None:
        num_steps = [round.num_steps for round in self.rounds]
        check_num_steps(saved, num_steps, self.options.schedule, self.options.temper)
        self.losses = [float(loss) for loss in saved["losses"]]
        self.scores = [RoundScore(*map(float, score)) for score in saved["scores"]]
        self.num_skipped, self.num_rolled_back = int(saved["num_skipped"]), int(saved["num_rolled_back"])
        self.best = saved["best"] and Snapshot.from_state_dict(saved["best"])

    def _check_densities(self, saved: dict[str, Any]) -> None:
        """Raises ValueError unless model and guide, with the parameters as they are, have the log-densities of a checkpoint."""
        if saved["fingerprint"]["arguments"] == self.fingerprint["arguments"]:
            different = density_difference(saved["log_densities"], log_densities(self.tracer))
            if different:
                raise ValueError(different)

    def modules(self) -> dict[str, torch.nn.Module]:
        """The model and the guide, as far as they are modules."""
        functions = {"model": self.call.model, "guide": self.guide}
        return {name: function for name, function in functions.items() if isinstance(function, torch.nn.Module)}

    def _load_modules(self, saved: Mapping[str, Any]) -> None:
        """What steps do not change, such as the fixed map of a flow guide, once it is sure that this is the same fit."""
        compare = functools.partial(difference, saved["fingerprint"]["belongs_to"], self.fingerprint["belongs_to"])
        # Data of the others are not those of the first process, which wrote the checkpoint.
        different = self.options.division.processes.from_first(compare) if self.options.division else compare()
        if different:
            raise ValueError(different)
        for name, module in self.modules().items():
            module.load_state_dict(saved["modules"][name])
