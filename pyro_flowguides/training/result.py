"""What a fit returns: the guide, its draws and its verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from ..diagnostics.arviz import Coords, Dims, Group
from ..diagnostics.draws import Draws
from ..diagnostics.importance import Estimate, Verdict
from ..diagnostics.posterior import Posterior, to_arviz
from ..diagnostics.sampling import draw
from ..model.call import ModelCall

# The names of parameters that a printed fit shows.
NUM_SHOWN = 4


@dataclass(repr=False)
class FitResult:
    """A fitted guide. Made by :func:`fit`.

    It owns all parameters that were trained: whatever is fitted, loaded or set in Pyro's parameter store later, or cleared
    there, its guide and its model stay what they were.

    Attributes:
        model: The model, with the parameters that were trained with the guide, if it has any.
        guide: The fitted guide, a copy of the guide that was given to ``fit``. A second ``fit`` of it continues with a copy.
        args: The positional arguments it was fitted on.
        model_kwargs: The keyword arguments it was fitted on.
        losses: The loss (−ELBO estimate) of every step, shape (steps,).
        num_skipped: The number of steps that were skipped because loss or gradient were not finite.
        num_rolled_back: The number of times that the training exploded and was taken back.
        wall_time: The seconds that the fit took, final draws included.
        interrupted: Whether an interrupt from the keyboard has ended the training before its end.
        draws: Draws from the fitted guide with their densities, 10,000 (1000 for a model that cannot be vectorised).
        parameters: The trained parameters of the model (``pyro.param``, ``pyro.module``, ``PyroModule``) by name, in their own
            (constrained) space.
        restarts: Draws of every independent fit, log-likelihoods included, in the order of their seeds; empty where there was
            only one. Everything else here is of the best of them by ELBO.
    """

    model: Callable
    guide: Callable
    args: tuple
    model_kwargs: dict[str, Any]
    losses: np.ndarray
    num_skipped: int
    num_rolled_back: int
    wall_time: float
    draws: Draws
    parameters: dict[str, Tensor] = field(default_factory=dict)
    restarts: tuple[Draws, ...] = ()
    interrupted: bool = False

    def __repr__(self) -> str:
        steps = f"{len(self.losses)} steps, {self.wall_time:.1f} s"
        steps += ", interrupted" if self.interrupted else ""
        names = list(self.parameters)
        shown = ", ".join(names[:NUM_SHOWN]) + (f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else "")
        owns = f"owns the parameters {shown} of the model; " if names else ""
        return f"FitResult of {name_of(self.guide)}: ELBO {self.elbo} after {steps}; {owns}{self.verdict}"

    @property
    def elbo(self) -> Estimate:
        """The evidence lower bound in nats, from the final draws."""
        return self.draws.elbo

    @property
    def khat(self) -> Estimate:
        """The Pareto shape of the importance weights; NaN where they are constant, a perfect fit, or do not exist.

        The verdict tells the two apart.
        """
        return self.draws.khat

    @property
    def ess(self) -> Estimate:
        """The effective number of the final draws."""
        return self.draws.ess

    @property
    def verdict(self) -> Verdict:
        """Whether to believe the fit; ``print`` gives a sentence."""
        return self.draws.verdict

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

    def to_posterior(self, num_samples: int = 4000) -> Posterior:
        """The fit as chains with log-likelihoods: ``num_samples`` fresh draws, or with restarts up to as many of each."""
        call = ModelCall(self.model, self.args, self.model_kwargs)
        if self.restarts:
            number = min(num_samples, *map(len, self.restarts))
            chains = [draws[:number] for draws in self.restarts]
        else:
            options: dict[str, Any] = {"num_samples": num_samples, "log_likelihood": True}
            chains = [draw(self.model, self.guide, *self.args, model_kwargs=self.model_kwargs, **options)]
        return Posterior(
            chains,
            call,
            groups={"variational_fit": self._variational_fit()},
            # netCDF has no truth values.
            attrs={"guide": name_of(self.guide), "interrupted": int(self.interrupted)},
            seconds=self.wall_time,
        )

    def to_arviz(
        self,
        num_samples: int = 4000,
        *,
        predictive: bool = True,
        prior: bool = True,
        coords: Coords | None = None,
        dims: Dims | None = None,
        seed: int | None = None,
    ) -> Any:
        """The fit as ArviZ's ``InferenceData`` or ``DataTree``, a chain per independent fit; see :func:`to_arviz`."""
        return to_arviz(
            self,
            num_samples=num_samples,
            predictive=predictive,
            prior=prior,
            coords=coords,
            dims=dims,
            seed=seed,
        )

    def _variational_fit(self) -> Group:
        # The draws that were judged, not those that are exported: they are more.
        judged = self.restarts or (self.draws,)
        khats, elbos = [draws.khat for draws in judged], [draws.elbo for draws in judged]
        return Group(
            {
                "elbo": -self.losses,
                "num_skipped": np.asarray(self.num_skipped),
                "num_rolled_back": np.asarray(self.num_rolled_back),
                "wall_time": np.asarray(self.wall_time),
                **{
                    name: np.array([getattr(estimate, part) for estimate in estimates])
                    for name, estimates, part in (
                        ("khat", khats, "value"),
                        ("khat_se", khats, "se"),
                        ("final_elbo", elbos, "value"),
                        ("final_elbo_se", elbos, "se"),
                    )
                },
            },
            {"elbo": ["step"], **{name: ["chain"] for name in ("khat", "khat_se", "final_elbo", "final_elbo_se")}},
            (),
        )


def name_of(guide: Callable) -> str:
    """The class of a guide, or the name of a plain function."""
    guide = ModelCall(guide).as_written
    return getattr(guide, "__name__", type(guide).__name__)
