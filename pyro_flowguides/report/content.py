"""What a report shows, gathered from a posterior: nothing of it is drawn or written yet."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch

from ..checks import version
from ..diagnostics import moments
from ..diagnostics.arviz import Coords, Dims, Group
from ..diagnostics.draws import Draws, to_numpy
from ..diagnostics.errors import moment_errors
from ..diagnostics.groups import stack_numbered
from ..diagnostics.importance import ImportanceWeights
from ..diagnostics.modes import Modes
from ..diagnostics.posterior import Posterior, posterior_of
from ..diagnostics.replay import predict
from ..diagnostics.summary import scalars
from ..diagnostics.verdicts import MAX_SD_ERROR, Verdict, VerdictKind
from ..model.sites import unchanged_random_state

# The table and the pictures stay readable.
MAX_ROWS = 30
NUM_PREDICTED = 100
HOW_IT_RAN = {
    "broadcast": "for all draws at once, with one more batch dimension (broadcast)",
    "recorded": "recorded once, and the record repeated for all draws (recorded)",
    "looped": "draw by draw (looped), which is slow",
}
# What a file of ArviZ calls the versions of its libraries.
_VERSIONS = {
    "pyro_flowguides": "creation_library_version",
    "pyro-ppl": "inference_library_version",
    "torch": "torch_version",
    "python": "python_version",
}


@dataclass(frozen=True)
class Report:
    """The content of a report. Made by :func:`gather`.

    Attributes:
        model: The name of the model.
        guide: The class of the guide; empty where it is not known.
        draws: The draws that the report is about.
        verdict: The verdict on them.
        modes: What a search for modes has found; None where there was none, or its table is not at hand.
        losses: The loss of every step; empty where it is not known.
        observed: The data, by site; sites of a loop over data are one.
        predicted: Data that the model makes at some of the draws, likewise; each ``(draws,) + shape``.
        unpredicted: Why there are none, in a sentence.
        beside: Other posteriors for the pictures of the marginals: name, to label of a scalar, to its draws.
        reference: The one of them that the others are compared with.
        facts: How it was run: names and sentences.
        again: The call that makes the fit again; empty where it is not known.
        versions: The libraries with their versions.
        coords: Labels along dimensions.
        dims: Names of dimensions, by site.
    """

    model: str
    guide: str
    draws: Draws
    verdict: Verdict
    modes: Modes | None = None
    losses: np.ndarray = field(default_factory=lambda: np.empty(0))
    observed: Mapping[str, np.ndarray] = field(default_factory=dict)
    predicted: Mapping[str, np.ndarray] = field(default_factory=dict)
    unpredicted: str = ""
    beside: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    reference: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    again: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    coords: Coords = field(default_factory=dict)
    dims: Dims = field(default_factory=dict)

    @property
    def is_weighted(self) -> bool:
        """Whether the estimates are those of the weighted draws: where the verdict is good for these alone."""
        return self.verdict.kind is VerdictKind.GOOD_ONCE_WEIGHTED

    @functools.cached_property
    def weights(self) -> ImportanceWeights | None:
        """The weights of the draws, or None if there are none that say anything."""
        if self.draws.elbo_error or self.draws.weights_error or self.draws.weights.error:
            return None
        return self.draws.weights

    @functools.cached_property
    def all_columns(self) -> dict[str, np.ndarray]:
        """The draws of every scalar by its label."""
        return scalars(self.draws.posterior(), {**self.draws.dims, **self.dims}, self.coords)

    @functools.cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """The scalars of the table: all of them, or those with the largest expected errors."""
        if len(self.all_columns) <= MAX_ROWS:
            return self.all_columns
        size = self._errors[["mean_error", "sd_error"]].max(axis=1).sort_values(ascending=False, kind="stable")
        kept = [*size.index, *(label for label in self.all_columns if label not in size.index)][:MAX_ROWS]
        return {label: self.all_columns[label] for label in kept}

    @property
    def finite_columns(self) -> dict[str, np.ndarray]:
        """Those that can be drawn."""
        return {label: column for label, column in self.columns.items() if np.isfinite(column).all()}

    @property
    def non_finite(self) -> list[str]:
        """The labels of scalars with draws that are not finite."""
        return [label for label, column in self.all_columns.items() if not np.isfinite(column).all()]

    @functools.cached_property
    def _errors(self) -> pd.DataFrame:
        """The expected errors of the mean and the sd of every scalar that the verdict is on; empty without weights.

        As in the verdict, there is none of an sd that so many draws do not determine.
        """
        columns = self._judged(self.all_columns)
        if self.weights is None or not columns:
            return pd.DataFrame(columns=["mean_error", "sd_error"])
        names = {**self.draws.dims, **self.dims}
        unseen = None if self.modes is None else self.modes.unseen(names, self.coords)
        found = moment_errors(columns, self.weights, unseen)
        errors = found.weighted if self.is_weighted else found.raw
        sd = np.where(found.sampling_sd <= MAX_SD_ERROR / 2, errors.sd, np.nan)
        return pd.DataFrame({"mean_error": errors.mean, "sd_error": sd}, index=list(columns))

    def _judged(self, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Those of finite draws that are not of a site that is summed out."""
        sites = {name: value for name, value in self.draws.posterior().items() if name in self.draws.summed_out}
        left_out = set(scalars(sites, {**self.draws.dims, **self.dims}, self.coords))
        return {
            label: column for label, column in columns.items() if label not in left_out and np.isfinite(column).all()
        }

    @functools.cached_property
    def table(self) -> pd.DataFrame:
        """A row per scalar: mean, sd, three quantiles, and where there are weights k-hat and the expected errors."""
        weights = self.draws.weights.weights if self.is_weighted else None
        rows = {}
        for label, column in self.columns.items():
            column = column.astype(np.float64)
            mean, sd = moments.mean(column, weights), moments.sd(column, weights)
            rows[label] = [mean, sd, *moments.quantiles(column, [0.05, 0.5, 0.95], weights)]
        table = pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "sd", "5%", "50%", "95%"])
        if self.weights is None:
            return table
        khats = {label: self.weights.khat_of_mean(column) for label, column in self._judged(self.columns).items()}
        return table.assign(khat=pd.Series(khats, dtype=float)).join(self._errors)


def gather(
    posterior: Posterior,
    *,
    verdict: Verdict | None = None,
    modes: Modes | None = None,
    beside: Mapping[str, Any] | None = None,
    reference: str | None = None,
    facts: Mapping[str, str] | None = None,
    with_predictive: bool = True,
    coords: Coords | None = None,
    dims: Dims | None = None,
) -> Report:
    """The content of a report on a posterior.

    Arguments:
        posterior: The posterior, of a fit or from a file.
        verdict: The verdict on its draws, where it rests on more than the posterior has.
        modes: What a search for modes has found.
        beside: Other posteriors for the pictures of the marginals, by name: a :class:`Posterior`, whatever
            :func:`posterior_of` takes, or a mapping of sites to draws.
        reference: The name of the one among them that the others are compared with.
        facts: What else is known of how it was made, by name.
        with_predictive: Whether to let the model make data.
        coords: Labels along dimensions.
        dims: Names of dimensions, by site.

    Raises:
        TypeError: if one beside it is no posterior.
        ValueError: if the reference is none of those beside it, or labels do not fit.
    """
    beside = beside or {}
    if reference is not None and reference not in beside:
        raise ValueError(f"report: the reference '{reference}' is not among {', '.join(beside) or 'those beside it'}")
    draws, attrs = posterior.best(), posterior.attrs
    own_coords = {**posterior.coords, **(coords or {})}
    names = {**draws.dims, **(dims or {})}
    fitted = posterior.groups["variational_fit"].variables if "variational_fit" in posterior.groups else {}
    predicted, unpredicted = _predicted(posterior, draws) if with_predictive else ({}, "")
    observed, predicted = _stacked(draws, predicted)
    call = posterior.call
    return Report(
        model=str(call.name if call else attrs.get("name", "")),
        guide=str(attrs.get("guide", "")),
        draws=draws,
        verdict=posterior.verdict if verdict is None else verdict,
        modes=modes,
        losses=-np.asarray(fitted.get("elbo", ()), dtype=np.float64),
        observed=observed,
        predicted=predicted,
        unpredicted=unpredicted,
        beside={name: _columns_of(source, names, own_coords) for name, source in beside.items()},
        reference=reference,
        facts={**_facts(posterior, draws, fitted), **(facts or {})},
        again=str(attrs.get("made_by", "")),
        versions=_versions(posterior),
        coords=own_coords,
        dims=dims or {},
    )


def _columns_of(source: Any, dims: Dims, coords: Coords) -> dict[str, np.ndarray]:
    if isinstance(source, Posterior):
        source = source.best().posterior()
    elif not isinstance(source, Mapping):
        source = posterior_of(source).best().posterior()
    return scalars({name: np.asarray(value) for name, value in source.items()}, dims, coords)


def _predicted(posterior: Posterior, draws: Draws) -> tuple[dict[str, np.ndarray], str]:
    """Data that the model makes at some of the draws, and otherwise why there are none."""
    if not draws.observed:
        return {}, "The model observes nothing, and so there are no data to compare with."
    if draws.minibatch_size is not None:
        return {}, "The data are subsampled, and every run of the model would take others."
    if posterior.call is None:
        group = posterior.groups.get("posterior_predictive")
        if group is None:
            return {}, "Neither the model nor data that it has made are at hand."
        return {name: _first_of_chains(value) for name, value in group.variables.items()}, ""
    index = torch.linspace(0, len(draws) - 1, min(NUM_PREDICTED, len(draws))).long()
    index = index.to(draws.log_p.device)
    values = {name: value[index] for name, value in draws.values.items()}
    try:
        with unchanged_random_state(), pyro.validation_enabled(False):
            pyro.set_rng_seed(0)
            _, data = predict(posterior.call, values, len(index))
    # A model may raise anything; the report is none the worse for it.
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())[:300]
        return {}, f"The model cannot make data at these draws: {type(error).__name__}: {reason}"
    return {name: to_numpy(value) for name, value in data.items()}, ""


def _stacked(draws: Draws, predicted: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The data and those of the model, the sites of a loop over data as one."""
    observed = Group({name: to_numpy(value) for name, value in draws.observed.items()}, sample_dims=())
    groups, _ = stack_numbered(
        {"observed_data": observed, "posterior_predictive": Group(predicted, sample_dims=("draw",))}
    )
    return dict(groups["observed_data"].variables), dict(groups["posterior_predictive"].variables)


def _first_of_chains(value: np.ndarray) -> np.ndarray:
    flat = value.reshape(-1, *value.shape[2:])
    return flat[np.linspace(0, len(flat) - 1, min(NUM_PREDICTED, len(flat))).astype(int)]


def _facts(posterior: Posterior, draws: Draws, fitted: Mapping[str, np.ndarray]) -> dict[str, str]:
    """How the fit was run, as far as the posterior knows it."""
    attrs, facts = posterior.attrs, {}
    if vectorization := str(attrs.get("vectorization", "")):
        facts["The model was run"] = HOW_IT_RAN[vectorization]
    if draws.summed_out:
        names = _shortened(draws.summed_out)
        facts["Discrete sites summed out"] = f"{names}; the verdict is of the other parameters"
    num_scalars = sum(int(np.prod(value.shape[1:])) for value in draws.unconstrained.values())
    facts["Unconstrained parameters"] = f"{num_scalars:,}" if draws.unconstrained else ""
    facts["Observations"] = ", ".join(f"{name}: {value.numel():,}" for name, value in draws.observed.items())
    num_steps = np.size(fitted.get("elbo", ()))
    facts["Steps of training"] = f"{num_steps:,}" if num_steps else ""
    for key, name in (("num_skipped", "Steps skipped"), ("num_rolled_back", "Explosions taken back")):
        number = int(np.asarray(fitted.get(key, 0)))
        facts[name] = f"{number:,}" if number else ""
    facts["Time"] = f"{posterior.seconds:,.1f} s" if np.isfinite(posterior.seconds) else ""
    facts["Draws"] = f"{len(draws):,}"
    num_fits = max(len(posterior.chains), np.size(fitted.get("khat", ())))
    facts["Independent fits"] = f"{num_fits}; this is the best of them by its ELBO" if num_fits > 1 else ""
    facts["Interrupted"] = "yes: the training had not ended" if int(attrs.get("interrupted", 0)) else ""
    return {name: text for name, text in facts.items() if text}


def _shortened(names: Sequence[str], number: int = 10) -> str:
    more = f" and {len(names) - number} more" if len(names) > number else ""
    return ", ".join(names[:number]) + more


def _versions(posterior: Posterior) -> dict[str, str]:
    """Of the libraries that made the fit: those in the attributes of a file, or those that are running."""
    if posterior.call is None and posterior.attrs.get("creation_library_version"):
        return {name: str(posterior.attrs[key]) for name, key in _VERSIONS.items() if key in posterior.attrs}
    return {
        "pyro_flowguides": version(),
        "pyro-ppl": pyro.__version__,
        "torch": str(torch.__version__),
        "arviz": importlib.metadata.version("arviz"),
        "python": platform.python_version(),
    }
