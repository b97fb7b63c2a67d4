"""Watches the losses of a training: whether it explodes (losses far above what they were), or is lost (no finite loss)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .snapshot import Snapshot

# A loss is bad if it is above the mean of the last good window by this many of its standard deviations,
NUM_DEVIATIONS = 20.0
# and by this much in any case, relative to the mean: the deviation goes to 0 where a guide is exact.
SLACK = 1e-4
NUM_BAD_STEPS = 10


class ExplosionDetector:
    """Judges each window of losses by the last one that was good."""

    def __init__(self) -> None:
        self.bound = np.inf
        self.num_bad_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """What the windows so far have left."""
        return {"bound": float(self.bound), "num_bad_in_a_row": self.num_bad_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a :meth:`state_dict`."""
        self.bound, self.num_bad_in_a_row = state["bound"], state["num_bad_in_a_row"]

    def judge(self, losses: Sequence[float]) -> Literal["good", "bad", "exploded"]:
        """``"good"`` if no loss of a window is bad, ``"exploded"`` at ten bad ones in a row, ``"bad"`` in between.

        The next windows are judged by a good one. A loss that is not finite counts as a bad one, but does not make its window
        bad: its step was skipped.
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


class Watch:
    """Collects losses without waiting for them, and judges them together.

    Arguments:
        every: The number of losses that are judged together; fewer if ``max_nonfinite_steps`` is smaller.
        max_nonfinite_steps: After this many consecutive steps without a finite loss and gradient a training is lost.

    Attributes:
        max_nonfinite_steps: As given.
        good: The state at the end of the last good window, if it was kept; what a rollback goes back to.
    """

    def __init__(self, every: int, max_nonfinite_steps: int) -> None:
        self._every = min(every, max_nonfinite_steps)
        self.max_nonfinite_steps = max_nonfinite_steps
        self.good: Snapshot | None = None
        # Losses that have not been judged, and whether their steps were finite.
        self._unseen: list[tuple[Tensor, Tensor]] = []
        self._num_nonfinite_in_a_row = 0
        self._detector = ExplosionDetector()

    def add(self, loss: Tensor, finite: Tensor) -> bool:
        """Keeps the loss of a step; returns whether it is time to judge.

        Arguments:
            loss: The loss.
            finite: Whether loss and gradient were finite.
        """
        self._unseen.append((loss, finite))
        return len(self._unseen) == self._every

    def judge(self, is_comparable: bool = True) -> Literal["good", "bad", "exploded", "lost"]:
        """What has become of the training since the last judgement; waits for the device.

        Arguments:
            is_comparable: Whether these losses and those before them are of the same loss; otherwise they cannot have exploded.
        """
        if not is_comparable:
            self._detector = ExplosionDetector()
        losses, finite = (torch.stack(each).tolist() for each in zip(*self._unseen, strict=True))
        self._unseen.clear()
        for each in finite:
            self._num_nonfinite_in_a_row = 0 if each else self._num_nonfinite_in_a_row + 1
            if self._num_nonfinite_in_a_row == self.max_nonfinite_steps:
                return "lost"
        return self._detector.judge(losses)

    def begin_anew(self) -> None:
        """Forgets the good losses and the state of that time, which are of other parameters."""
        self.good, self._detector = None, ExplosionDetector()

    def state_dict(self) -> dict[str, Any]:
        """Everything that it remembers, as tensors and plain Python values."""
        return {
            "good": None if self.good is None else self.good.state_dict(),
            "unseen": [(float(loss), bool(finite)) for loss, finite in self._unseen],
            "num_nonfinite_in_a_row": self._num_nonfinite_in_a_row,
            "detector": self._detector.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continues from a :meth:`state_dict`.

        Arguments:
            state: The state.
            device: Where the next losses are.
        """
        self.good = None if state["good"] is None else Snapshot.from_state_dict(state["good"])
        self._unseen = [
            (torch.tensor(loss, device=device), torch.tensor(finite, device=device)) for loss, finite in state["unseen"]
        ]
        self._num_nonfinite_in_a_row = state["num_nonfinite_in_a_row"]
        self._detector.load_state_dict(state["detector"])
