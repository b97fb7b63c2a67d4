"""Checks of the options of a training."""

from __future__ import annotations

from typing import Any

from .binding import optimizer_factory

BACKENDS = ("auto", "replay", "inductor", "eager")


def check_options(backend: str, optim: Any, schedule: Any, ema_decay: float | None) -> None:
    """Raises ValueError or TypeError for options of :class:`CompiledSVI` that are wrong, or do not go together."""
    if backend not in BACKENDS:
        raise ValueError(f"CompiledSVI: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if not callable(optim):
        raise TypeError(
            f"CompiledSVI: optim must be a Pyro optimiser or a function from parameters to a torch optimiser, got {optim!r}"
        )
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise ValueError(f"CompiledSVI: ema_decay must be between 0 and 1, got {ema_decay}")
    if schedule is not None and optimizer_factory(optim) is None:
        raise ValueError(
            "CompiledSVI: a Pyro optimiser with arguments for each parameter, or with clipping, takes no schedule; use Pyro's "
            "own, such as pyro.optim.ExponentialLR"
        )
