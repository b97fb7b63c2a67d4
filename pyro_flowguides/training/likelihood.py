r"""Training by maximum likelihood: the parameters of log q that make the data most likely,

.. math:: \min_\theta\; -\frac1N \sum_{n=1}^N \log q_\theta(x_n),

on minibatches, until held-out rows no longer become more likely. This is the step, the guard and the progress bar of ``fit``: the
model is one factor log q of a batch, and the guide draws nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from ..checks import check_positive_integer
from ..compiled.losses import as_objective
from ..compiled.snapshot import Snapshot
from ..compiled.svi import CHECK_EVERY, MAX_NONFINITE_STEPS
from ..model.call import ModelCall
from ..model.recording import LargestTensor
from ..model.sites import unchanged_random_state
from . import start
from .checkpoint import Checkpoint
from .division import Division
from .fingerprint import Fingerprint, difference
from .schedules import find_schedule
from .steps import StepOptions, Steps

LogProb = Callable[[Tensor, "Tensor | None"], Tensor]

# Rows that are scored together where nothing is trained.
SCORED_TOGETHER = 4096


@dataclass(frozen=True)
class Rows:
    """Rows of data.

    Attributes:
        x: The rows, shape (N, D).
        context: What each is conditioned on, shape (N, C), or None.
        noisy: Whether a batch gets uniform noise between 0 and 1, which makes integers continuous.
    """

    x: Tensor
    context: Tensor | None = None
    noisy: bool = False

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor | slice) -> Rows:
        return Rows(self.x[index], None if self.context is None else self.context[index], self.noisy)

    def continuous(self) -> Rows:
        """The same rows with the noise in them."""
        return Rows(self.x + torch.rand_like(self.x), self.context) if self.noisy else self

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """What a density is evaluated on."""
        return (self.x,) if self.context is None else (self.x, self.context)


class Epochs:
    """Minibatches of rows, in a new order in every epoch; the rows that are left over at its end come in a later one.

    Arguments:
        rows: The rows.
        batch_size: The number of rows in a batch; all of them, where they are fewer.
    """

    def __init__(self, rows: Rows, batch_size: int) -> None:
        self.rows = rows
        self.batch_size = min(batch_size, len(rows))

    def __len__(self) -> int:
        return len(self.rows) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = torch.randperm(len(self.rows)).to(self.rows.x.device)
        for index in order[: len(self) * self.batch_size].split(self.batch_size):
            yield self.rows[index].continuous().arguments


@dataclass(frozen=True)
class Plan:
    """How long to train, and by which steps: the options that all training by maximum likelihood has.

    Attributes:
        num_steps: The number of steps; None for what ``num_epochs`` says.
        num_epochs: The number of passes over the rows.
        batch_size: The number of rows in a step.
        patience: How many looks at the held-out rows in a row may show nothing better; None for no end.
        optim: As in ``fit``, and so are the others.
        division: How several processes share the work; None for one.
    """

    num_steps: int | None
    num_epochs: int | None
    batch_size: int
    patience: int | None
    optim: Any
    schedule: Any
    progress: bool
    backend: str = "auto"
    checkpoint: Checkpoint | None = None
    callbacks: Sequence[Callable[[int, float], bool | None]] = ()
    max_nonfinite_steps: int = MAX_NONFINITE_STEPS
    division: Division | None = None

    def check(self, owner: str) -> None:
        """Raises an error that names the first wrong number."""
        if self.num_steps is not None and self.num_epochs is not None:
            raise ValueError(f"{owner}: give num_steps or num_epochs, not both")
        if self.optim is not None and (isinstance(self.optim, PyroOptim) or not callable(self.optim)):
            raise TypeError(
                f"{owner}: optim must be a function from parameters to a torch optimiser, got {self.optim!r}"
            )
        for name in ("num_steps", "num_epochs", "batch_size", "patience", "max_nonfinite_steps"):
            if (value := getattr(self, name)) is not None:
                check_positive_integer(owner, name, value)

    def options(self, batches: Epochs) -> StepOptions:
        """The options of the steps."""
        return StepOptions(
            batches=batches,
            loss=as_objective(Trace_ELBO()),
            optim=self.optim,
            schedule=find_schedule(self.schedule),
            svi={"backend": self.backend, "ema_decay": None, "max_nonfinite_steps": self.max_nonfinite_steps},
            checkpoint=self.checkpoint,
            callbacks=self.callbacks,
            progress=self.progress,
            division=self.division,
        )


def no_latents(*args: Any) -> None:
    """The guide of a model without latents."""


class MaximumLikelihood:
    """One training by maximum likelihood; afterwards the parameters are the best ones that the held-out rows have seen.

    Arguments:
        name: The name that messages begin with.
        log_prob: log q of rows given their context, shape (rows,); its parameters go through Pyro's store.
        train: The rows to train on.
        held_out: The rows that say which parameters are best; None for the last ones.
        plan: How long, and by which steps.
        belongs_to: What the numbers depend on, for a checkpoint.

    Attributes:
        losses: The mean negative log-likelihood of the batch of every step, in nats.
        looks: The number of steps before each look at the held-out rows, and their mean negative log-likelihood then.
        best_step: The number of steps behind the parameters that were kept.
        stopped_early: Whether patience has ended the training.
        interrupted: Whether an interrupt from the keyboard has ended it.
        seconds: How long it took.
    """

    def __init__(
        self,
        name: str,
        log_prob: LogProb,
        train: Rows,
        held_out: Rows | None,
        plan: Plan,
        belongs_to: Fingerprint | None = None,
    ) -> None:
        size = plan.division.processes.size if plan.division else 1
        epochs = Epochs(train, min(plan.batch_size, max(1, len(train) // size)))
        self.name, self.log_prob, self.plan = name, log_prob, plan
        self.options = plan.options(epochs)
        # The steps of an epoch.
        num_steps = len(epochs) // size
        self.num_steps = plan.num_steps or (plan.num_epochs or 0) * num_steps
        # The same noise at every look.
        self.held_out = None if held_out is None else held_out.continuous()
        self.belongs_to = belongs_to or {}
        self.call = ModelCall(_model_of(log_prob), train[slice(epochs.batch_size)].continuous().arguments)
        self.guide: Callable = no_latents
        self.losses: list[float] = []
        self.looks: list[tuple[int, float]] = []
        self.best: Snapshot | None = None
        self.best_step = self.num_skipped = self.num_rolled_back = 0
        self.stopped_early = self.interrupted = False
        self.seconds = 0.0
        self._look_every = max(num_steps, CHECK_EVERY)

    def run(self, saved: Mapping[str, Any] | None = None, began: Mapping[str, Any] | None = None) -> None:
        """Trains.

        Arguments:
            saved: The content of the checkpoint to continue from, if any.
            began: What a checkpoint shall hold besides.
        """
        started = time.perf_counter()
        self._began = began or {}
        self._steps = steps = Steps(
            self,
            self.num_steps,
            title=self.name,
            shows="log_likelihood",
            pauses=None if self.held_out is None else (self._look, self._look_every),
        )
        if saved is None:
            if self.held_out is not None:
                self._look()
        else:
            self._load(saved, steps)
        with start.threads_for(self._largest_result()):
            if not self.stopped_early:
                steps.run()
            if self.held_out is not None and self.looks[-1][0] != steps.number:
                self._look()
        self.losses = steps.losses
        self.best_step = steps.number
        if self.best is not None:
            self.best_step = self._best_look[0]
            steps.svi.restore(self.best, *self.call.args)
        self.num_skipped, self.num_rolled_back = steps.svi.num_skipped, steps.svi.num_rolled_back
        self.seconds = time.perf_counter() - started

    # --- looks at the held-out rows --------------------------------------------------------------------------------------

    @property
    def _best_look(self) -> tuple[int, float]:
        return min(self.looks, key=lambda look: look[1] if math.isfinite(look[1]) else math.inf)

    def _look(self) -> bool:
        """Scores the held-out rows, and keeps the parameters if they are the best so far; returns whether to end."""
        assert self.held_out is not None
        number = self._steps.number
        loss = self._held_out_loss()
        self.looks.append((number, loss))
        if self._best_look[0] == number:
            self.best = self._steps.svi.snapshot(*self.call.args)
        since = [step for step, _ in self.looks].index(self._best_look[0])
        self.stopped_early = self.plan.patience is not None and len(self.looks) - 1 - since >= self.plan.patience
        return self.stopped_early

    def _held_out_loss(self) -> float:
        """The mean negative log-likelihood of the held-out rows, the same in all processes, so that they end together."""
        assert self.held_out is not None
        if (division := self.options.division) is None:
            return -float(score(self.log_prob, self.held_out).mean())
        part = self.held_out[slice(division.processes.rank, None, division.processes.size)]
        own = float(score(self.log_prob, part).sum()) if len(part) else 0.0
        return -sum(division.processes.gather(own)) / len(self.held_out)

    def _largest_result(self) -> int:
        largest = LargestTensor()
        with torch.no_grad(), unchanged_random_state(), largest:
            x, *context = self.call.args
            self.log_prob(x, context[0] if context else None)
        return largest.largest

    # --- checkpoints -----------------------------------------------------------------------------------------------------

    def save(self, steps: Steps) -> None:
        """Writes the checkpoint."""
        assert self.options.checkpoint is not None
        self.options.checkpoint.try_to_save(
            {
                **self._began,
                "belongs_to": self.belongs_to,
                "looks": [list(look) for look in self.looks],
                "best": self.best and self.best.state_dict(),
                "stopped_early": self.stopped_early,
                "training": steps.state_dict(),
            }
        )

    def _load(self, saved: Mapping[str, Any], steps: Steps) -> None:
        assert self.options.checkpoint is not None
        with self.options.checkpoint.used():
            if different := difference(saved["belongs_to"], self.belongs_to):
                raise ValueError(different)
            self.looks = [(int(step), float(loss)) for step, loss in saved["looks"]]
            self.best = saved["best"] and Snapshot.from_state_dict(saved["best"])
            self.stopped_early = bool(saved["stopped_early"])
            steps.load_state_dict(saved["training"])

    def check_batch(self, call: ModelCall, batches: Iterable[Any]) -> None:
        """Nothing: the batches are of our own making."""


def _model_of(log_prob: LogProb) -> Callable[..., None]:
    def density(x: Tensor, context: Tensor | None = None) -> None:
        pyro.factor("data", log_prob(x, context).mean())

    return density


@torch.no_grad()
def score(log_prob: LogProb, rows: Rows) -> Tensor:
    """log q of many rows, shape (rows,), some thousand at a time."""
    parts = [rows[slice(begin, begin + SCORED_TOGETHER)] for begin in range(0, len(rows), SCORED_TOGETHER)]
    return torch.cat([log_prob(part.x, part.context) for part in parts])


def split(owner: str, rows: Rows, validation: float) -> tuple[Rows, Rows]:
    """Rows to train on, and others to look at, drawn at random.

    Raises:
        ValueError: if the fraction is not between 0 and 1, or too few are left on a side.
    """
    if not 0 < validation < 1:
        raise ValueError(
            f"{owner}: validation must be a fraction between 0 and 1, rows of their own, or None, got {validation!r}"
        )
    num_held_out = round(validation * len(rows))
    if num_held_out < 1 or len(rows) - num_held_out < 2:
        raise ValueError(
            f"{owner}: {len(rows)} rows are too few to hold {validation:g} of them out; give more, or validation=None"
        )
    order = torch.randperm(len(rows)).to(rows.x.device)
    return rows[order[num_held_out:]], rows[order[:num_held_out]]
