"""What a fit returns: the guide, its draws and its verdict."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
from torch import Tensor, nn

from ..diagnostics.arviz import Coords, Dims, Group
from ..diagnostics.draws import Draws
from ..diagnostics.importance import Estimate
from ..diagnostics.modes import Modes
from ..diagnostics.posterior import Posterior, to_arviz
from ..diagnostics.replay import predict_new
from ..diagnostics.sampling import draw
from ..diagnostics.verdicts import Verdict
from ..model.call import ModelCall
from ..report import Report, fragment, gather, page
from . import saving
from .files import write_whole

# The number of draws with log-likelihoods that a saved fit can export without its model.
NUM_EXPORTED = 4000
# The names of parameters that a printed fit shows.
NUM_SHOWN = 4
HOW_IT_RAN = {
    "broadcast": "",
    "recorded": "the model was recorded once, and repeated for all draws; ",
    "looped": "the model was run draw by draw; ",
}


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
        losses: The loss (−ELBO estimate) of every step, shape (steps,); with ``temper`` that of the flattened target at first.
        num_skipped: The number of steps that were skipped because loss or gradient were not finite.
        num_rolled_back: The number of times that the training exploded and was taken back.
        wall_time: The seconds that the fit took, final draws included.
        vectorization: How the model was run for many draws: ``"broadcast"`` with an extra batch dimension, ``"recorded"`` once
            and repeated for all draws, or ``"looped"`` draw by draw.
        interrupted: Whether an interrupt from the keyboard has ended the training before its end, or the search for modes.
        draws: Draws from the fitted guide with their densities, 10,000 (1000 for a model that cannot be vectorised).
        parameters: The trained parameters of the model (``pyro.param``, ``pyro.module``, ``PyroModule``) by name, in their own
            (constrained) space.
        columns: The names of the columns of each argument that was given as a frame, by its name; they are labels in ArviZ.
        restarts: Draws of every independent fit, log-likelihoods included, in the order of their seeds; empty where there was
            only one. Everything else here is of the best of them by ELBO.
        modes: What was found by looking for modes that the guide has not drawn; None where they were not looked for.
        chunk_size: The number of particles that a step of the last round took at a time, where they were split; else None.
        made_by: The call that makes the fit again, as text.
    """

    model: Callable
    guide: Callable
    args: tuple
    model_kwargs: dict[str, Any]
    losses: np.ndarray
    num_skipped: int
    num_rolled_back: int
    wall_time: float
    vectorization: str
    draws: Draws
    parameters: dict[str, Tensor] = field(default_factory=dict)
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    restarts: tuple[Draws, ...] = ()
    interrupted: bool = False
    modes: Modes | None = None
    chunk_size: int | None = None
    made_by: str = ""
    # What a fit exports that was loaded without its guide.
    exported: tuple[Draws, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        steps = f"{len(self.losses)} steps, {self.wall_time:.1f} s"
        steps += ", interrupted" if self.interrupted else ""
        names = list(self.parameters)
        shown = ", ".join(names[:NUM_SHOWN]) + (f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else "")
        owns = f"owns the parameters {shown} of the model; " if names else ""
        summed = f"discrete sites summed out: {len(self.draws.summed_out)}; " if self.draws.summed_out else ""
        told = f"{HOW_IT_RAN[self.vectorization]}{owns}{summed}{self.verdict}"
        return f"FitResult of {name_of(self.guide)}: ELBO {self.elbo} after {steps}; {told}"

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
        return self.draws.judge(self.modes)

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
        return self.draws.summary(
            kind=kind, quantiles=quantiles, weighted=weighted, coords=coords, dims=dims, modes=self.modes
        )

    def predict(
        self,
        *args: Any,
        model_kwargs: Mapping[str, Any] | None = None,
        num_samples: int = 1000,
        new_plates: Collection[str] = (),
        seed: int | None = None,
    ) -> dict[str, Tensor]:
        """New data, and whatever else the model samples, on new arguments: new rows, new groups.

        The latents that the model shares with the fit are draws of the posterior. Latents in a plate of another size than before,
        such as the effects of new groups, are drawn from their prior given the others; so are those in ``new_plates``.

        Arguments:
            args: The positional arguments of the model, with None for data where the model takes it.
            model_kwargs: The keyword arguments of the model.
            num_samples: The number of draws.
            new_plates: The names of plates that have as many elements as before, and are of other ones.
            seed: Seeds Pyro first, if given.

        Returns:
            The sites that are drawn, by name, ``(num_samples,) + shape``.

        Raises:
            ValueError: if a plate is not in the model, or a latent outside of new plates has another shape than before.
        """
        if seed is not None:
            pyro.set_rng_seed(seed)
        call = ModelCall.given("predict", self.model, args, model_kwargs)
        with call.explaining("predict"):
            return predict_new(call, self.draws.values, num_samples, new_plates)

    def to_posterior(self, num_samples: int = 4000) -> Posterior:
        """The fit as chains with log-likelihoods: ``num_samples`` fresh draws, or with restarts up to as many of each."""
        if kept := self.restarts or self.exported:
            number = min(num_samples, *map(len, kept))
            chains = [draws[:number] for draws in kept]
        else:
            options: dict[str, Any] = {"num_samples": num_samples, "log_likelihood": True}
            # As for the draws that were judged: a poor fit is exported, too.
            with pyro.validation_enabled(False):
                chains = [draw(self.model, self.guide, *self.args, model_kwargs=self.model_kwargs, **options)]
        return self._posterior(chains)

    def _posterior(self, chains: Sequence[Draws]) -> Posterior:
        call = None
        if not isinstance(self.model, saving.Missing):
            call = ModelCall(self.model, self.args, self.model_kwargs, self.columns)
        return Posterior(
            chains,
            call,
            groups={"variational_fit": self._variational_fit()},
            attrs={
                "guide": name_of(self.guide),
                "vectorization": self.vectorization,
                "made_by": self.made_by,
                # netCDF has no truth values.
                "interrupted": int(self.interrupted),
            },
            modes=None if self.modes is None else (self.modes.finding, self.modes.lost_mass),
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

    def report(
        self,
        path: str | Path,
        *,
        beside: Mapping[str, Any] | None = None,
        reference: str | None = None,
        coords: Coords | None = None,
        dims: Dims | None = None,
    ) -> None:
        """Writes a report: one HTML file with verdict, estimates, pictures, and how the fit was made.

        It needs no network and no script. A picture that cannot be drawn leaves a sentence in its place.

        Arguments:
            path: The file; an existing one is replaced.
            beside: Other posteriors for the pictures of the marginals, by name: fits, guides, :class:`Draws`, runs of MCMC, or
                mappings of sites to draws.
            reference: The name of the one among them that the others are compared with, drawn as an area.
            coords: Labels along a dimension, by the name of its plate.
            dims: Names of dimensions, by site, where the plates do not give them.

        Raises:
            OSError: if the file cannot be written.
            TypeError: if one beside it is no posterior.
            ValueError: if the reference is not among those beside it, or labels do not fit.
        """
        made = self._report(beside=beside, reference=reference, coords=coords, dims=dims)
        write_whole(Path(path), page(made).encode())

    def _report(self, **options: Any) -> Report:
        posterior, facts = self._posterior([self.draws]), {}
        if self.parameters:
            facts["Parameters of the model"] = ", ".join(self.parameters)
        return gather(posterior, verdict=self.verdict, modes=self.modes, facts=facts, **options)

    def _repr_html_(self) -> str:
        return fragment(self._report(with_predictive=False))

    def save(self, path: str | Path) -> None:
        """Writes the fit to a file that needs neither its model nor a pickle to be read; see :meth:`load`.

        The file holds the draws, up to 4000 draws with log-likelihoods for the export, the losses, the arguments, and the values
        of guide and model. It is a NumPy archive (``.npz``) with a description in JSON.

        Arguments:
            path: The file; an existing one is replaced.

        Raises:
            OSError: if it cannot be written.
        """
        arguments = {"args": self.args, "model_kwargs": self.model_kwargs}
        content = {
            **{name: getattr(self, name) for name in _PLAIN_FIELDS},
            "exported": () if self.restarts else tuple(self.to_posterior(NUM_EXPORTED).chains),
            "arguments": arguments if saving.can_be_written(arguments) else None,
            "guide": name_of(self.guide),
            "model": name_of(self.model),
            "state": dict(self.guide.state_dict()) if isinstance(self.guide, nn.Module) else None,
        }
        saving.write(Path(path), content)

    @classmethod
    def load(cls, path: str | Path, model: Callable | None = None, guide: Callable | None = None) -> FitResult:
        """Reads a fit that :meth:`save` has written. Nothing in the file is executed.

        The file alone gives estimates, verdict, summary, draws, and the export without the groups that need the model
        (posterior_predictive, prior, prior_predictive, constant_data).

        Arguments:
            path: The file.
            model: The model, for these groups.
            guide: A new guide of the same class and options, which gets the fitted values: ``fit.guide`` makes fresh draws then.
                A guide that knows its model brings it along.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is damaged or no saved fit; if model or guide are others than those that were fitted, or the fit
                had arguments that cannot be saved, such as objects of your own classes.
        """
        content = saving.read(Path(path))
        try:
            fields = {name: content[name] for name in (*_PLAIN_FIELDS, "exported")}
            names = {kind: saving.Missing(kind, content[kind]) for kind in ("model", "guide")}
            arguments, state = content["arguments"], content["state"]
        except KeyError as error:
            raise ValueError(f"FitResult.load: '{path}' is no saved fit: it lacks {error}") from error
        fitted: dict[str, Any] = {**names, "args": (), "model_kwargs": {}, **(arguments or {})}
        model = model or getattr(guide, "model", None)
        if model is None and guide is not None:
            raise ValueError(
                "FitResult.load: a guide that is a plain function does not know its model: give it with model="
            )
        if model is not None:
            if arguments is None:
                raise ValueError(
                    "FitResult.load: the arguments of the model were no arrays or plain values, and are not saved"
                )
            call = ModelCall(model, fitted["args"], fitted["model_kwargs"], fields["columns"])
            fitted["model"], loaded = saving.with_values(call, guide, fields["parameters"], state)
            if loaded is not None:
                fitted["guide"], fields["exported"] = loaded, ()
        return cls(**fields, **fitted)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        functions = (ModelCall(function).as_written for function in (self.model, self.guide))
        in_script = [name_of(each) for each in functions if getattr(each, "__module__", None) == "__main__"]
        if in_script:
            try:
                # By itself, so that a process without the script can say what is missing.
                return _unpickled, (pickle.dumps(fields), in_script[0])
            except (pickle.PicklingError, AttributeError, TypeError):
                # A pickler that knows more than this one may go on.
                pass
        return _made, (fields,)

    def __deepcopy__(self, memo: dict[int, Any]) -> FitResult:
        return _made({each.name: copy.deepcopy(getattr(self, each.name), memo) for each in dataclasses.fields(self)})

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


_PLAIN_FIELDS = (
    "losses",
    "num_skipped",
    "num_rolled_back",
    "wall_time",
    "vectorization",
    "draws",
    "parameters",
    "columns",
    "restarts",
    "interrupted",
    "modes",
    "chunk_size",
    "made_by",
)


def _made(fields: dict[str, Any]) -> FitResult:
    return FitResult(**fields)


def _unpickled(content: bytes, name: str) -> FitResult:
    """The fit in a pickle of its own, whose model was defined in the script that wrote it."""
    try:
        return _made(pickle.loads(content))
    except AttributeError as error:
        raise pickle.UnpicklingError(
            f"this fit needs '{name}', which was defined in the script that pickled it (__main__): define it in this one before "
            "loading, or import it from a module in both; fit.save(path) writes a file that FitResult.load reads without it"
        ) from error


def name_of(guide: Callable) -> str:
    """The class of a guide, or the name of a plain function."""
    guide = ModelCall(guide).as_written
    return getattr(guide, "__name__", type(guide).__name__)
