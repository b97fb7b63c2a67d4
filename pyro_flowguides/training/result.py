"""What a fit returns: the guide, its draws and its verdict."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from ..diagnostics import Draws, draw
from ..diagnostics.draws import Coords, Dims


@dataclass
class FlowFit:
    """A fitted guide. Made by :func:`fit`.

    Attributes:
        model: The model.
        guide: The fitted guide.
        args: The positional arguments it was fitted on.
        model_kwargs: The keyword arguments it was fitted on.
        losses: The loss (−ELBO estimate) of every step, shape (steps,).
        num_skipped: How many steps were skipped because loss or gradient were not finite.
        wall_time: The seconds that the fit took, final draws included.
        draws: Draws from the fitted guide with their densities, 10,000 (1000 for a model that cannot be vectorised).
        restarts: Draws of every independent fit, log-likelihoods included, in the order of their seeds; empty where there was
            only one. Everything else here is of the best of them by ELBO.
    """

    model: Callable
    guide: Callable
    args: tuple
    model_kwargs: dict[str, Any]
    losses: np.ndarray = field(repr=False)
    num_skipped: int
    wall_time: float
    draws: Draws = field(repr=False)
    restarts: tuple[Draws, ...] = field(default=(), repr=False)

    @functools.cached_property
    def _elbo(self) -> tuple[float, float]:
        estimate = self.draws.elbo()
        return estimate.value, estimate.se

    @property
    def elbo(self) -> float:
        """The evidence lower bound in nats, from the final draws."""
        return self._elbo[0]

    @property
    def elbo_se(self) -> float:
        """The standard error of :attr:`elbo`."""
        return self._elbo[1]

    @functools.cached_property
    def khat(self) -> float:
        """The Pareto shape of the importance weights; NaN where they are constant, a perfect fit.

        NaN also where the draws have no weights, see :class:`pyro_flowguides.Draws`; the verdict tells the two apart.
        """
        return math.nan if self.draws.no_weights else self.draws.khat().value

    @functools.cached_property
    def verdict(self) -> str:
        """Whether to believe the fit, in words."""
        return f"unknown: {self.draws.no_weights}." if self.draws.no_weights else self.draws.verdict()

    def summary(
        self,
        *,
        kind: str = "stats",
        quantiles: Sequence[float] = (0.05, 0.5, 0.95),
        weighted: bool = False,
        coords: Coords | None = None,
        dims: Dims | None = None,
    ) -> pd.DataFrame:
        """One row per scalar: mean, sd and quantiles, diagnostics, or both; see :meth:`pyro_flowguides.Draws.summary`."""
        return self.draws.summary(kind=kind, quantiles=quantiles, weighted=weighted, coords=coords, dims=dims)

    def to_arviz(self, num_samples: int = 4000, *, coords: Coords | None = None, dims: Dims | None = None) -> Any:
        """Fresh draws with their log-likelihoods as an ArviZ container, see :meth:`pyro_flowguides.Draws.to_arviz`.

        Arguments:
            num_samples: The number of draws.
            coords: Labels along a dimension, by the name of its plate.
            dims: Names of dimensions, by site, where the plates do not give them.
        """
        draws = draw(
            self.model,
            self.guide,
            *self.args,
            model_kwargs=self.model_kwargs,
            num_samples=num_samples,
            log_likelihood=True,
        )
        return draws.to_arviz(coords=coords, dims=dims, variational_fit={"elbo": -self.losses})
