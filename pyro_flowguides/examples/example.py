"""What a bundled model consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Example:
    """A model with its data and what is known about its posterior.

    Attributes:
        name: The name on the command line.
        description: One line.
        model: The Pyro model.
        data: Makes the keyword arguments of the model.
        coords: Labels along the plates.
        report: The sites to put in tables; all if empty.
        reference: Draws by NUTS, site name to array ``(draws, …)``, or None.
        log_evidence: log Z, if it is known, in nats.
    """

    name: str
    description: str
    model: Callable
    data: Callable[[], dict[str, Any]]
    coords: Mapping[str, Sequence[str]] = field(default_factory=dict)
    report: Sequence[str] = ()
    reference: Callable[[], dict[str, np.ndarray]] | None = None
    log_evidence: float | None = None
