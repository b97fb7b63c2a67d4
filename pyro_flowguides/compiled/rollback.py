"""Notices when training explodes: losses far above what they were, and for many steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# A loss is bad if it is above the mean of the last good window by so many of its standard deviations,
NUM_DEVIATIONS = 20.0
# and by so much in any case, since the deviation goes to 0 where a guide is exact.
SLACK = 1e-4
NUM_BAD_STEPS = 10


class ExplosionDetector:
    """Judges window after window of losses by the last one that was good."""

    def __init__(self) -> None:
        self.bound = float(np.inf)
        self.num_bad_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """What it has learned from the windows so far."""
        return {"bound": self.bound, "num_bad_in_a_row": self.num_bad_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a :meth:`state_dict`."""
        self.bound, self.num_bad_in_a_row = float(state["bound"]), int(state["num_bad_in_a_row"])

    def judge(self, losses: Sequence[float]) -> str:
        """``"good"`` if no loss of a window is bad, ``"exploded"`` at ten bad ones in a row, ``"bad"`` in between.

        A good window is what the next ones are judged by. A loss that is not finite is a bad one among others, but does not spoil
        a window by itself: its step was skipped.
        """
        values = np.asarray(losses, dtype=np.float64)
        finite = values[np.isfinite(values)]
        for bad in ~(values <= self.bound) & np.isfinite(self.bound):
            self.num_bad_in_a_row = self.num_bad_in_a_row + 1 if bad else 0
            if self.num_bad_in_a_row == NUM_BAD_STEPS:
                self.num_bad_in_a_row = 0
                return "exploded"
        if (finite > self.bound).any() or len(finite) < 2:
            return "bad"
        mean = float(finite.mean())
        self.bound = mean + NUM_DEVIATIONS * float(finite.std()) + SLACK * (1 + abs(mean))
        return "good"
