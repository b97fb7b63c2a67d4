"""The steps of a training, whatever is trained: batches, progress bar, callbacks, checkpoints, interrupts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor
from tqdm.auto import tqdm

from ..checks import warn
from ..compiled.losses import Prepared
from ..compiled.svi import CHECK_EVERY, CompiledSVI
from ..model.call import ModelCall
from .batches import Batches
from .checkpoint import Checkpoint, random_state, set_random_state
from .clock import Clock
from .division import Division, own_state
from .schedules import needs_loss

LEARNING_RATE = 1e-2
# Gradients are clipped at this multiple of the running mean of their norm.
CLIP_FACTOR = 2.0

OptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]


def default_optimizer() -> OptimizerFactory:
    """Adam at the default learning rate."""
    return functools.partial(torch.optim.Adam, lr=LEARNING_RATE)


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """The options of steps, checked."""

    batches: Iterable[Any] | None
    loss: Any
    optim: PyroOptim | OptimizerFactory | None
    schedule: Callable[[float], float] | None
    svi: dict[str, Any]
    checkpoint: Checkpoint | None
    callbacks: Sequence[Callable[[int, float], bool | None]]
    progress: bool
    # How several processes share the work; None for one.
    division: Division | None = None


class Training(Protocol):
    """What steps are of: a round of a fit, or the fit of a density.

    Attributes:
        name: The name that messages begin with.
        call: The model with its arguments; steps take batches in their place, if there are any.
        guide: The guide.
        losses: The losses of the steps before these.
        interrupted: Whether an interrupt from the keyboard has ended the training.
    """

    name: str
    call: ModelCall
    guide: Callable
    losses: list[float]
    interrupted: bool

    @property
    def options(self) -> StepOptions:
        """The options of the steps."""
        ...

    def save(self, steps: Steps) -> None:
        """Writes the checkpoint, if the options have one."""
        ...

    def check_batch(self, call: ModelCall, batches: Iterable[Any]) -> None:
        """Looks at the first batch."""
        ...


class Steps:
    """Steps with one schedule of the learning rate: a round of a fit, or all of a density's.

    Arguments:
        training: What they are of.
        num_steps: How many they are.
        loss: What they minimise, where the options have no loss.
        title: The title of the progress bar.
        shows: What the progress bar calls the negative loss.
        pauses: A function and a number: it is called after every so many steps, and ends the training by returning True.
        temper: The inverse temperature of the loss at a step, which the progress bar shows where it is not 1.
        clock: How much time there is; None for as much as the steps take.
    """

    def __init__(
        self,
        training: Training,
        num_steps: int,
        loss: Any = None,
        *,
        title: str,
        shows: str = "elbo",
        pauses: tuple[Callable[[], bool], int] | None = None,
        temper: Callable[[int], float] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.training, self.num_steps, self.clock = training, num_steps, clock
        self._title, self._shows, self._pauses, self._temper = title, shows, pauses, temper
        options, schedule = training.options, training.options.schedule
        self.svi = CompiledSVI(
            training.call.model,
            training.guide,
            options.optim or default_optimizer(),
            options.loss or loss,
            schedule=schedule and (lambda step: schedule(clock.progress if clock else step / num_steps)),
            clip_factor=CLIP_FACTOR,
            distributed=options.division is not None,
            **options.svi,
        )
        self.division, batches = options.division, options.batches
        if batches is not None:
            batches = self.division.batches(batches) if self.division else batches
        self.batches = None if batches is None else Batches(batches)
        self.losses: list[float] = []
        # Losses that have not been waited for.
        self.pending: list[Tensor] = []

    @property
    def chunk_size(self) -> int | None:
        """The number of particles that the steps take at a time; None for all of them."""
        size = self.svi.chunk_size
        return size if isinstance(size, int) else None

    @property
    def number(self) -> int:
        """The number of steps that were taken."""
        return len(self.losses) + len(self.pending)

    def run(self) -> bool:
        """Takes the steps; returns whether a callback, a pause or an interrupt has ended the training."""
        training = self.training
        quiet = not training.options.progress or not (self.division is None or self.division.is_first)
        with tqdm(total=self.num_steps, disable=quiet, desc=self._title, mininterval=0.5) as bar:
            bar.update(len(self.losses))
            try:
                stopped = self._take(bar)
            except KeyboardInterrupt:
                if self.division is not None:
                    # The others may be at another step, and wait for this one there.
                    raise
                stopped = training.interrupted = True
                self._collect(bar)
                warn(f"{training.name}: interrupted after {len(self.losses)} of {self.num_steps} steps")
        if training.options.svi["ema_decay"] is not None and self.losses:
            self.svi.use_ema()
        return stopped

    def _take(self, bar: tqdm) -> bool:
        callbacks, checkpoint = self.training.options.callbacks, self.training.options.checkpoint
        scheduler = self.training.options.optim
        # Capturing compares what stays the same only once in a while, unless a callback may change it.
        every = 1 if callbacks or self.batches else CHECK_EVERY
        step: Callable[[], Tensor] | None = None
        before = len(self.training.losses)
        stopped = False
        if self.clock is not None and self.number:
            self.clock.look(self.number)
        while self.number < self.num_steps and not stopped:
            if self.number % every == 0 or step is None:
                step = self.svi.compile_step(*self._next_arguments(), self._steps_left)
            self.pending.append(step())
            if isinstance(scheduler, PyroLRScheduler):
                scheduler.step(*[float(self.pending[-1])] * needs_loss(scheduler))
            for callback in callbacks:
                stopped |= bool(callback(before + self.number - 1, float(self.pending[-1])))
            if callbacks and self.division is not None:
                stopped = self.division.processes.any(stopped)
            if self._pauses is not None and self.number % self._pauses[1] == 0:
                stopped |= self._pauses[0]()
            checkpoint_due = checkpoint is not None and self.number % checkpoint.every == 0
            if checkpoint_due or len(self.pending) == CHECK_EVERY:
                self._collect(bar)
            if checkpoint_due:
                self.training.save(self)
            if self.clock is not None and self.number % self.clock.every == 0:
                self.clock.look(self.number)
                if self.clock.progress == 1:
                    break
        self._collect(bar)
        if checkpoint is not None:
            self.training.save(self)
        return stopped

    @property
    def _steps_left(self) -> int:
        return self.num_steps - self.number if self.clock is None else self.clock.steps_left(self.number)

    def _next_arguments(self) -> tuple[tuple, dict[str, Any]]:
        call = self.training.call
        if self.batches is None:
            return call.args, dict(call.kwargs)
        call = ModelCall.given(self.training.name, call.model, *next(self.batches))
        if not self.number:
            self.training.check_batch(call, self.training.options.batches or ())
        return call.args, dict(call.kwargs)

    def _collect(self, bar: tqdm) -> None:
        """Waits for the losses of the last steps."""
        if not self.pending:
            return
        values = torch.stack(self.pending).tolist()
        self.pending.clear()
        self.losses.extend(values)
        now = self.svi.scalars
        beta = 1.0 if self._temper is None else self._temper(self.number - 1)
        bar.set_postfix(
            {
                self._shows
                + (
                    f" at beta {beta:.2f}" if beta < 1 else ""
                ): f"{-np.nanmean(values) if not np.isnan(values).all() else np.nan:.3f}",
                "gradient": f"{now.norm:.2g}",
                "skipped": int(now.num_skipped),
                **({"chunks_of": self.chunk_size} if self.chunk_size else {}),
                **({"seconds_left": round(self.clock.seconds_left)} if self.clock else {}),
            },
            refresh=False,
        )
        bar.update(len(values))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "svi": self.svi.state_dict(),
            "losses": self.losses,
            "states": self.division.processes.gather(self._own_state()) if self.division else [self._own_state()],
        }

    def _own_state(self) -> list[Any]:
        """The random state of this process, where it is among its batches, and what its objective keeps."""
        objective = self.svi.objective
        return [
            random_state(),
            None if self.batches is None else self.batches.state_dict(),
            objective.state_dict() if isinstance(objective, Prepared) else {},
        ]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a :meth:`state_dict`."""
        call = self.training.call
        self.svi.load_state_dict(state["svi"], *call.args, **call.kwargs)
        self.losses = [float(loss) for loss in state["losses"]]
        own = own_state(self.training.name, self.division, state["states"])
        if own is None:
            return
        random, batches, objective = own
        if self.batches is not None:
            self.batches.load_state_dict(batches)
        if isinstance(self.svi.objective, Prepared):
            self.svi.objective.load_state_dict(objective)
        set_random_state(random)
