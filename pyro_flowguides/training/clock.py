"""The time that a fit has, where it has to end in time."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ..processes import Processes

# The part of ``max_seconds`` that is kept for the search for modes.
RESERVE = 0.1
# Several processes have to exchange a message to look.
LOOK_EVERY = 10
# A round is begun if this part of it can be made.
WORTH_A_ROUND = 0.25


@dataclass(frozen=True)
class Limit:
    """When a training has to end.

    Attributes:
        end: The moment, by ``time.perf_counter``.
        processes: Several processes go by the clock of the first.
    """

    end: float
    processes: Processes | None = None

    def clock(self, num_steps: int) -> Clock:
        """A clock for a round of so many steps that begins now."""
        return Clock(num_steps, self.end, self.processes)


def has_time(limit: Limit | None, seconds: float) -> bool:
    """Whether there is time for a quarter of a round that takes so many seconds; always without a limit."""
    if limit is None:
        return True

    def decide() -> bool:
        return limit.end - time.perf_counter() >= WORTH_A_ROUND * seconds

    return limit.processes.from_first(decide) if limit.processes else decide()


class Clock:
    """How far a round is, by its steps or by its time, whichever is further.

    The learning rate follows this progress, so that it has fallen when the time is up.

    Arguments:
        num_steps: The number of steps, if there is time for them.
        end: When the time is up, by ``time.perf_counter``.
        processes: Several processes go by the clock of the first.

    Attributes:
        every: A look is due after so many steps.
        progress: From 0 to 1, at the last look.
        seconds_left: The seconds that were left at the last look.
    """

    def __init__(self, num_steps: int, end: float, processes: Processes | None = None) -> None:
        self.num_steps, self.end, self.processes = num_steps, end, processes
        self.every = 1 if processes is None else LOOK_EVERY
        self.began = time.perf_counter()
        self.progress, self.seconds_left = 0.0, end - self.began

    def look(self, step: int) -> None:
        """Looks at the clock.

        Arguments:
            step: The number of steps taken so far.
        """

        def read() -> tuple[float, float]:
            seconds_left, whole = max(0.0, self.end - time.perf_counter()), max(self.end - self.began, 1e-9)
            return seconds_left, min(1.0, max(step / self.num_steps, 1 - seconds_left / whole))

        self.seconds_left, self.progress = self.processes.from_first(read) if self.processes else read()

    def steps_left(self, step: int) -> int:
        """How many steps there is time for, at the pace so far."""
        seconds = max(self.end - self.began, 0.0) - self.seconds_left
        return min(self.num_steps - step, int(self.seconds_left * step / seconds)) if step and seconds > 0 else 0
