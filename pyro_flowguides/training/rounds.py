"""Rounds of training: how long a fit goes on that was not told how long."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

NUM_ROUNDS = 3
FIRST_NUM_STEPS = 1000
# The standard deviation s of the log weights below which little is left to learn. Near a perfect fit KL(q, p) is s² / 2, as much
# as when the mean in some direction is off by s standard deviations, and 1 − s² of the draws are effective.
NEAR_PERFECT_SPREAD = 0.05
# The part of the draws on either side that the spread leaves out.
TRIMMED = 1e-3


class Round(NamedTuple):
    """A part of the training with a learning-rate schedule of its own."""

    num_steps: int
    num_particles: int


def doubling_rounds(num_particles: int, fixed: bool) -> tuple[Round, ...]:
    """Rounds of 1000, 2000 and 4000 steps.

    Loshchilov & Hutter (2017), *SGDR: stochastic gradient descent with warm restarts*, arXiv:1608.03983.

    Arguments:
        num_particles: The number of draws per step in the first round.
        fixed: Whether it stays the same; otherwise it doubles with the number of steps.
    """
    return tuple(
        Round(FIRST_NUM_STEPS * 2**index, num_particles if fixed else num_particles * 2**index)
        for index in range(NUM_ROUNDS)
    )


def spread(log_weights: Tensor) -> float:
    """The standard deviation of log weights without the largest and the smallest thousandth.

    Of ten thousand draws one far out can make all the standard deviation, and is not what another round would learn.
    """
    num_trimmed = int(TRIMMED * len(log_weights))
    kept = log_weights.double().sort().values[num_trimmed : len(log_weights) - num_trimmed]
    return float(kept.std())


class Standing(NamedTuple):
    """How good the guide is after a round, by its draws.

    Attributes:
        elbo: The ELBO.
        elbo_se: Its standard error.
        spread: The :func:`spread` of its log weights.
    """

    elbo: float
    elbo_se: float
    spread: float


def is_worth_another(standings: Sequence[Standing]) -> bool:
    """Whether another round may help: the fit is not near perfect, and the last round made the ELBO rise, noise excepted.

    Arguments:
        standings: After each round so far.
    """
    now = standings[-1]
    if now.spread <= NEAR_PERFECT_SPREAD:
        return False
    if len(standings) == 1 or not math.isfinite(now.elbo):
        return True
    before = standings[-2]
    return not now.elbo - before.elbo <= math.hypot(now.elbo_se, before.elbo_se)


def got_worse(standings: Sequence[Standing]) -> bool:
    """Whether the last round did harm: the ELBO fell, noise excepted, or is not finite any more.

    Arguments:
        standings: After each round so far.
    """
    if len(standings) == 1 or not math.isfinite(standings[-2].elbo):
        return False
    now, before = standings[-1], standings[-2]
    return not now.elbo >= before.elbo - 2 * math.hypot(now.elbo_se, before.elbo_se)
