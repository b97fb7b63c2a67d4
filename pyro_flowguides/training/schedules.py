"""How the learning rate and the temperature change over a round of training, and how many rounds there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor

from ..diagnostics.draws import Draws
from ..diagnostics.importance import Estimate

Schedule = Callable[[float], float]


def constant(progress: float) -> float:
    """Always 1."""
    return 1.0


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine. Loshchilov & Hutter (2017), arXiv:1608.03983."""
    return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Schedule] = {"constant": constant, "cosine": cosine}


def find_schedule(schedule: str | Schedule | None) -> Schedule:
    """A schedule by its name, by itself, or the default.

    Raises:
        ValueError: if there is none of this name.
    """
    if callable(schedule):
        return schedule
    if schedule is not None and schedule not in SCHEDULES:
        raise ValueError(
            f"fit: unknown schedule {schedule!r}; known are {', '.join(SCHEDULES)}, or a function of the progress"
        )
    return SCHEDULES[schedule or "cosine"]


# --- tempering -----------------------------------------------------------------------------------------------------------

# The inverse temperature at a step, from its number and the number of steps.
Temper = Callable[[int, int], float]
FIRST_BETA = 0.01


def linear(step: int, num_steps: int) -> float:
    """From 0.01 to 1 over the first half of the steps."""
    return min(1.0, FIRST_BETA + (1 - FIRST_BETA) * 2 * step / num_steps)


def rezende_mohamed(step: int, num_steps: int) -> float:
    """min(1, 0.01 + t / 10,000), t the number of the step. Rezende & Mohamed (2015), arXiv:1505.05770."""
    return min(1.0, FIRST_BETA + step / 10_000)


TEMPERS: dict[str, Temper] = {"linear": linear, "rezende_mohamed": rezende_mohamed}


def find_temper(temper: str | Callable[[float], float] | None) -> Temper | None:
    """A rise of the inverse temperature by its name, or by a function of the progress from 0 to 1.

    Raises:
        ValueError: if there is none of this name.
    """
    if temper is None:
        return None
    if callable(temper):
        return lambda step, num_steps: temper(step / num_steps)
    if temper not in TEMPERS:
        raise ValueError(
            f"fit: unknown temper {temper!r}; known are {', '.join(TEMPERS)}, or a function of the progress"
        )
    return TEMPERS[temper]


def check_temper(temper: Temper, num_steps: int) -> None:
    """Raises ValueError unless the inverse temperature is positive, nowhere above 1, and 1 after this number of steps."""
    for step in range(num_steps + 1):
        if not 0 < temper(step, num_steps) <= 1:
            raise ValueError(
                f"fit: temper must be an inverse temperature above 0 and at most 1, got {temper(step, num_steps)} at step "
                f"{step} of {num_steps}"
            )
    if (last := temper(num_steps, num_steps)) != 1:
        raise ValueError(
            f"fit: temper must rise to 1 in the first round, and is {last:.3g} after its {num_steps} steps; give more "
            "num_steps, or temper='linear'"
        )


# --- rounds --------------------------------------------------------------------------------------------------------------

NUM_ROUNDS = 3
FIRST_NUM_STEPS = 1000
# From a standard deviation of the log weights below EASY_SD, a round of this part of the first one mostly ends near perfect.
EASY_SD, SHORT_PART = 0.4, 0.4
# Below this standard deviation s of the log weights little is left to learn. Near a perfect fit KL(q, p) is s² / 2, as much as
# when the mean in some direction is off by s standard deviations, and 1 − s² of the draws are effective.
NEAR_PERFECT_SD = 0.05
# The fraction of the draws that log_weight_sd leaves out on either side.
TRIMMED = 1e-3


class Round(NamedTuple):
    """A part of the training with a learning-rate schedule of its own."""

    num_steps: int
    num_particles: int


def doubling_rounds(num_particles: int, *, fixed: bool, start_sd: float) -> tuple[Round, ...]:
    """Rounds of 1000, 2000 and 4000 steps; one of 400 before them where the start is good.

    Loshchilov & Hutter (2017), *SGDR: stochastic gradient descent with warm restarts*, arXiv:1608.03983.

    Arguments:
        num_particles: The number of draws per step in the first round.
        fixed: Whether it stays the same; otherwise it doubles with the number of steps.
        start_sd: The :func:`log_weight_sd` of draws before the first step.
    """
    short = (Round(round(SHORT_PART * FIRST_NUM_STEPS), num_particles),) if start_sd <= EASY_SD else ()
    return short + tuple(
        Round(FIRST_NUM_STEPS * 2**index, num_particles if fixed else num_particles * 2**index)
        for index in range(NUM_ROUNDS)
    )


def log_weight_sd(log_weights: Tensor) -> float:
    """The standard deviation of log weights without the largest and the smallest thousandth.

    A single outlier among ten thousand draws can dominate the standard deviation, and another round would not learn it.
    """
    num_trimmed = int(TRIMMED * len(log_weights))
    kept = log_weights.double().sort().values[num_trimmed : len(log_weights) - num_trimmed]
    return float(kept.std())


# The part of the draws that may lose their density in a round that does no harm.
MAX_MORE_LOST = 0.01


class RoundScore(NamedTuple):
    """How good the guide is after a round, judged by its draws.

    Attributes:
        elbo: The ELBO, of the draws that have a density.
        elbo_se: Its standard error.
        log_weight_sd: The :func:`log_weight_sd` of the draws.
        lost: The part of the draws that have no density.
    """

    elbo: float
    elbo_se: float
    log_weight_sd: float
    lost: float = 0.0

    @classmethod
    def of(cls, draws: Draws) -> RoundScore:
        """The score of these draws."""
        log_weights, elbo = draws.log_weights.double(), draws.elbo
        finite = log_weights[log_weights.isfinite()]
        lost = 1 - len(finite) / len(log_weights)
        # One draw among thousands that overflows makes the ELBO infinite, and tells nothing of the others.
        if 0 < lost < 0.5:
            elbo = Estimate(float(finite.mean()), float(finite.std()) / math.sqrt(len(finite)))
        return cls(elbo.value, elbo.se, log_weight_sd(log_weights), lost)


def needs_loss(scheduler: PyroLRScheduler) -> bool:
    """Whether a step of a scheduler of Pyro takes the loss, to see whether it still falls."""
    return scheduler.pt_scheduler_constructor is torch.optim.lr_scheduler.ReduceLROnPlateau


def is_worth_another(scores: Sequence[RoundScore]) -> bool:
    """Whether another round may help: the fit is not near perfect, and the last round made the ELBO rise by more than noise.

    Arguments:
        scores: After each round so far.
    """
    now = scores[-1]
    if now.log_weight_sd <= NEAR_PERFECT_SD:
        return False
    if len(scores) == 1 or not math.isfinite(now.elbo):
        return True
    before = scores[-2]
    return not now.elbo - before.elbo <= math.hypot(now.elbo_se, before.elbo_se)


def got_worse(scores: Sequence[RoundScore]) -> bool:
    """Whether the last round did harm: the ELBO fell by more than noise, is no longer finite, or more draws have no density.

    Arguments:
        scores: After each round so far.
    """
    if len(scores) == 1 or not math.isfinite(scores[-2].elbo):
        return False
    now, before = scores[-1], scores[-2]
    if now.lost > before.lost + MAX_MORE_LOST:
        return True
    return not now.elbo >= before.elbo - 2 * math.hypot(now.elbo_se, before.elbo_se)


def check_num_steps(saved: Mapping[str, Any], now: list[int], schedule: Schedule | None, temper: Temper | None) -> None:
    """Raises ValueError unless the steps of a checkpoint would have been the same with these numbers of steps.

    More steps in the last round are no other fit, if neither learning rate nor temperature depend on their number.

    Arguments:
        saved: The content of the checkpoint.
        now: The numbers of steps of the rounds.
        schedule: The schedule of the learning rate, if there is one.
        temper: The rise of the inverse temperature in the first round, if there is one.
    """
    then = saved["num_steps"]
    if then == now:
        return
    taken, temper = len(saved["training"]["losses"]), temper if len(now) == 1 else None

    def at(step: int, num_steps: int) -> list[float]:
        """What a step depends on that may depend on the number of steps."""
        return [*([schedule(step / num_steps)] if schedule else []), *([temper(step, num_steps)] if temper else [])]

    same_rounds = then[:-1] == now[:-1] and len(saved["scores"]) == len(now) - 1 and taken <= now[-1]
    if same_rounds and all(at(step, then[-1]) == at(step, now[-1]) for step in range(taken)):
        return
    before, after = (" + ".join(map(str, numbers)) for numbers in (then, now))
    raise ValueError(
        f"it is of a fit with num_steps = {before}, here it is {after}: the steps that were taken would not have been the same; "
        "more steps in the last round are possible where learning rate and temperature do not depend on their number, as with "
        "schedule='constant' and without temper"
    )
