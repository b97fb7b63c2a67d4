"""How the learning rate changes over a fit, and when a fit may end early."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

WARM_UP = 0.05
# The ELBO is compared in means over so many steps.
WINDOW = 100
# What is left of a fit that has converged, as a part of the steps so far, and at least.
COOL_DOWN, MIN_COOL_DOWN = 0.25, 100

Schedule = Callable[[float], float]


def constant(progress: float) -> float:
    """Always 1."""
    return 1.0


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine. Loshchilov & Hutter (2017), arXiv:1608.03983."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def step(progress: float) -> float:
    """1, from half of the steps on 0.1, from three quarters on 0.01."""
    return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01


def warm_up(progress: float) -> float:
    """From 0 to 1 in a straight line, then to 0 along half a cosine."""
    return progress / WARM_UP if progress < WARM_UP else cosine((progress - WARM_UP) / (1 - WARM_UP))


SCHEDULES: dict[str, Schedule] = {"constant": constant, "cosine": cosine, "step": step, "warm_up": warm_up}


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


class Progress:
    """How far a fit has come, from 0 to 1.

    Arguments:
        num_steps: The number of steps.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.converged_at: int | None = None

    @property
    def end(self) -> int:
        """The number of steps that the fit will take."""
        if self.converged_at is None:
            return self.num_steps
        return min(self.num_steps, self.converged_at + max(MIN_COOL_DOWN, int(COOL_DOWN * self.converged_at)))

    def fraction(self, step: int) -> float:
        """The progress at a step; once converged, what is left goes by faster."""
        if self.converged_at is None or step <= self.converged_at:
            return step / self.num_steps
        start = self.converged_at / self.num_steps
        return start + (1 - start) * (step - self.converged_at) / (self.end - self.converged_at)


class Convergence:
    """Whether the ELBO still rises, by its means over the last two windows of 100 steps.

    Arguments:
        tolerance: A rise by less than this, in nats, is none; nor is one by less than its standard error.
    """

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance

    def reached(self, losses: Sequence[float]) -> bool:
        """Whether it has stopped rising."""
        if len(losses) < 2 * WINDOW:
            return False
        before, last = np.array(losses[-2 * WINDOW : -WINDOW]), np.array(losses[-WINDOW:])
        rise = np.nanmean(before) - np.nanmean(last)
        standard_error = math.sqrt((np.nanvar(before) + np.nanvar(last)) / WINDOW)
        return bool(rise < max(self.tolerance, standard_error))
