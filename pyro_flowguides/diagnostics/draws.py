"""Draws from a guide, each with its log-density under the guide and under the model."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import biject_to

from ..tracing import (
    Tracer,
    deterministic_sites,
    has_stochastic_log_prob,
    is_deterministic,
    latent_sites,
    log_prob_per_draw,
    observed_sites,
    per_draw,
    subsampled_plate,
    tensor_sites,
)
from . import moments
from .arviz import Coords, Dims
from .export import export
from .importance import Estimate, ImportanceWeights, elbo
from .summary import diagnose, scalars, summarise

# The largest site of a batch of draws has so many elements, which bounds its memory.
MAX_BATCH_ELEMENTS = 2**24
# So many minibatches of subsampled data, to see how much they differ.
NUM_MINIBATCHES = 100


@dataclass(frozen=True)
class Draws:
    """Draws from a guide. Made by :func:`draw`; every tensor has the draws as its first dimension.

    Attributes:
        values: The latent sites of the model, in their own (constrained) space; without those in a subsampled plate, of which
            every minibatch has others.
        unconstrained: The same in unconstrained space.
        deterministic: The deterministic sites.
        log_p: The log joint density of model and data, shape (S,).
        log_q: The log-density of the guide, shape (S,).
        log_likelihood: Of every observed site, per observation; empty unless asked for.
        observed: The data.
        dims: The names of the dimensions of a site (without that of the draws), from the names of its plates.
        no_weights: Why these draws have no importance weights, or None if they have: the guide's log-density is a random
            estimate (as that of a residual flow with ``log_det="hutchinson"``), a latent is a single point, or the data are
            subsampled. Only :meth:`elbo` is to be had then; k-hat, weights, ESS and verdict raise ValueError.
        no_elbo: Why there is not even an ELBO, or None if there is: the draws have been resampled, or come from MCMC.
        minibatch_size: How many draws in a row share one minibatch of subsampled data; None where nothing is subsampled.
        non_finite_site: The site of model or guide that has no finite density in the first draw whose weight is not finite.
    """

    values: dict[str, Tensor]
    unconstrained: dict[str, Tensor]
    deterministic: dict[str, Tensor]
    log_p: Tensor
    log_q: Tensor
    log_likelihood: dict[str, Tensor]
    observed: dict[str, Tensor]
    dims: dict[str, list[str]]
    no_weights: str | None = None
    no_elbo: str | None = None
    minibatch_size: int | None = None
    non_finite_site: str = ""

    def __len__(self) -> int:
        return len(self.log_p)

    @property
    def log_weights(self) -> Tensor:
        """log p − log q, not normalised and not smoothed."""
        return self.log_p - self.log_q

    @functools.cached_property
    def weights(self) -> ImportanceWeights:
        """The importance weights.

        Raises:
            ValueError: if these draws have none, with the reason.
        """
        reason = self.no_elbo or self.no_weights
        if reason:
            raise ValueError(f"These draws have no importance weights, k-hat, ESS or verdict: {reason}")
        return ImportanceWeights(_numpy(self.log_p), _numpy(self.log_q), self.non_finite_site)

    @property
    def smoothed_log_weights(self) -> np.ndarray:
        """Pareto-smoothed log weights that add up to 1."""
        return self.weights.smoothed_log_weights

    def elbo(self) -> Estimate:
        """The evidence lower bound, the mean of the log weights, in nats.

        Raises:
            ValueError: if the draws have been resampled, or come from MCMC.
        """
        if self.no_elbo:
            raise ValueError(f"These draws have no ELBO: {self.no_elbo}")
        return elbo(_numpy(self.log_weights).astype(np.float64), self.minibatch_size)

    def iw_elbo(self, num_weights: int = 10) -> Estimate:
        """The importance-weighted bound with so many weights; see :func:`pyro_flowguides.diagnostics.importance.iw_elbo`."""
        return self.weights.iw_elbo(num_weights)

    def khat(self) -> Estimate:
        """The Pareto shape of the weights' tail, with a bootstrap standard error; NaN where all weights are equal."""
        return self.weights.khat()

    def ess(self) -> Estimate:
        """The effective number of draws, ``1 / Σ w²`` of the smoothed weights, with a bootstrap standard error."""
        return self.weights.ess()

    def verdict(self) -> str:
        """What the weights say about the guide, in words; see :func:`pyro_flowguides.diagnostics.importance.verdict`."""
        return self.weights.verdict()

    def resample(self, num_samples: int, *, replace: bool = True, seed: int | None = None) -> Draws:
        """Draws of the posterior with equal weights: these, taken with their smoothed weights as probabilities.

        With replacement their moments are those of the weighted draws, up to noise; without, no draw is there twice, and the
        fewer are taken the nearer they are to the posterior. Trustworthy where the verdict is good.

        Arguments:
            num_samples: How many to take.
            replace: Whether a draw may be taken more than once.
            seed: Of the choice; by default it follows Pyro's own seed.

        Raises:
            ValueError: if there are no weights, or more draws are asked for than can be had without replacement.
        """
        rng = np.random.default_rng(int(torch.randint(2**31, ())) if seed is None else seed)
        index = torch.as_tensor(self.weights.resample(num_samples, replace, rng), device=self.log_p.device)
        reason = "they have been resampled by their weights, and have equal weights now"
        return dataclasses.replace(self[index], no_elbo=reason)

    def posterior(self) -> dict[str, np.ndarray]:
        """The latent and the deterministic sites as numpy arrays."""
        return {name: _numpy(value) for name, value in {**self.values, **self.deterministic}.items()}

    def mean(self, *, weighted: bool = True) -> dict[str, np.ndarray]:
        """The posterior mean of every site, by the smoothed importance weights or of the guide's draws as they are."""
        return {name: moments.mean(draws, self._weights(weighted)) for name, draws in self.posterior().items()}

    def sd(self, *, weighted: bool = True) -> dict[str, np.ndarray]:
        """The posterior standard deviation of every site, weighted or not as in :meth:`mean`."""
        return {name: moments.sd(draws, self._weights(weighted)) for name, draws in self.posterior().items()}

    def quantiles(self, levels: Sequence[float], *, weighted: bool = True) -> dict[str, np.ndarray]:
        """The posterior quantiles of every site, ``(len(levels),) + shape``, weighted or not as in :meth:`mean`."""
        return {
            name: moments.quantiles(draws, levels, self._weights(weighted)) for name, draws in self.posterior().items()
        }

    def _weights(self, weighted: bool) -> np.ndarray | None:
        return self.weights.weights if weighted else None

    def to_dataframe(self, *, coords: Coords | None = None, dims: Dims | None = None) -> pd.DataFrame:
        """The draws as a pandas table: a row per draw, a column per latent and deterministic scalar.

        Then follow ``log_p``, ``log_q`` and, where there are weights, ``log_weight``, the smoothed and normalised one.

        Arguments:
            coords: Labels along a dimension, by the name of its plate.
            dims: Names of dimensions, by site, where the plates do not give them.

        Raises:
            ValueError: if labels do not fit, or a site has the name of one of these columns.
        """
        columns = scalars(self.posterior(), {**self.dims, **(dims or {})}, coords or {})
        densities = {name: _numpy(getattr(self, name)) for name in ("log_p", "log_q")}
        if not (self.no_elbo or self.no_weights):
            densities["log_weight"] = self.smoothed_log_weights
        for name in densities:
            if name in columns:
                raise ValueError(
                    f"to_dataframe: a site is called '{name}', as a column of the table is; rename the site"
                )
        return pd.DataFrame({**columns, **densities})

    def summary(
        self,
        *,
        kind: str = "stats",
        quantiles: Sequence[float] = (0.05, 0.5, 0.95),
        weighted: bool = False,
        coords: Coords | None = None,
        dims: Dims | None = None,
    ) -> pd.DataFrame:
        """A pandas table with one row per latent or deterministic scalar.

        Arguments:
            kind: ``"stats"``: mean, standard deviation and quantiles; ``"diagnostics"``: what the importance weights say about
                the mean, see :func:`pyro_flowguides.diagnostics.summary.diagnose`; ``"all"``: both.
            quantiles: Numbers between 0 and 1.
            weighted: Whether mean, standard deviation and quantiles are those of the weighted draws.
            coords: Labels along a dimension, by the name of its plate.
            dims: Names of dimensions, by site, where the plates do not give them.

        Raises:
            ValueError: if the kind is unknown; if weights are asked for that the draws have not; if labels do not fit.
        """
        if kind not in ("stats", "diagnostics", "all"):
            raise ValueError(f'summary: kind must be "stats", "diagnostics" or "all", got {kind!r}')
        posterior, names, labels = self.posterior(), {**self.dims, **(dims or {})}, coords or {}
        tables = []
        if kind != "diagnostics":
            tables.append(summarise(posterior, names, labels, quantiles, self._weights(weighted)))
        if kind != "stats":
            tables.append(diagnose(posterior, names, labels, self.weights))
        return pd.concat(tables, axis=1)

    def __getitem__(self, index: slice | Tensor) -> Draws:
        """Some of the draws."""

        def taken(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value[index] for name, value in values.items()}

        return dataclasses.replace(
            self,
            values=taken(self.values),
            unconstrained=taken(self.unconstrained),
            deterministic=taken(self.deterministic),
            log_p=self.log_p[index],
            log_q=self.log_q[index],
            log_likelihood=taken(self.log_likelihood),
        )

    def to_arviz(self, *, coords: Coords | None = None, dims: Dims | None = None) -> Any:
        """These draws alone as ArviZ's ``InferenceData`` (0.x) or ``DataTree`` (1.x), with one chain.

        Groups: posterior, unconstrained_posterior, sample_stats, log_likelihood where it was computed, observed_data. With
        :func:`pyro_flowguides.to_arviz` and the model come the predictive groups, the prior and the model's arguments.

        Arguments:
            coords: Labels along a dimension, by the name of its plate.
            dims: Names of dimensions, by site, where the plates do not give them.

        Raises:
            ValueError: if names clash or labels do not fit.
        """
        return export([self], coords=coords, dims=dims)


@torch.no_grad()
def draw(
    model: Callable,
    guide: Callable,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    batch_size: int = 10_000,
    seed: int | None = None,
    log_likelihood: bool = False,
) -> Draws:
    """Draws from a guide, any Pyro guide, with the log-densities of guide and model.

    All draws of a batch are made in one vectorised pass. A model that cannot be vectorised is run once per draw, with one
    warning. A latent site that the guide leaves out is drawn from its prior, with a warning too.

    Arguments:
        model: The model.
        guide: The guide.
        args: The positional arguments of both.
        model_kwargs: The keyword arguments of both.
        num_samples: The number S of draws.
        batch_size: How many draws to make at a time; bounds the memory.
        seed: Seeds Pyro first, if given.
        log_likelihood: Also keep the log-likelihood of every observation under every draw.

    Raises:
        ValueError: if a number is smaller than 1.
    """
    for name, number in (("num_samples", num_samples), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"draw: {name} must be at least 1, got {number}")
    tracer = Tracer(model, guide, args, model_kwargs)
    if seed is not None:
        # After the tracer, whose runs build a guide that is not set up.
        pyro.set_rng_seed(seed)
    return draw_traced(tracer, num_samples, batch_size, log_likelihood)


@torch.no_grad()
def draw_traced(tracer: Tracer, num_samples: int, batch_size: int = 10_000, log_likelihood: bool = False) -> Draws:
    """Draws by a tracer that is at hand, see :func:`draw`."""
    _warn_of_sites_left_out(tracer)
    subsampled = subsampled_plate(tracer.model_prototype)
    batch_size = batch_size_within_memory(tracer, batch_size)
    if subsampled:
        # Every batch has a minibatch of its own.
        batch_size = max(1, min(batch_size, num_samples // NUM_MINIBATCHES))
    log_likelihood = log_likelihood and not subsampled
    parts = []
    for start in range(0, num_samples, batch_size):
        for guide_trace, model_trace, count in tracer.traces(min(batch_size, num_samples - start)):
            parts.append(_extract(guide_trace, model_trace, tracer.model_prototype, count, log_likelihood))
    prototype = tracer.model_prototype
    values: dict[str, Any] = {
        key: {name: torch.cat([part[key][name] for part in parts]) for name in parts[0][key]}
        for key in ("values", "unconstrained", "deterministic", "log_likelihood")
    }
    return Draws(
        **values,
        log_p=torch.cat([part["log_p"] for part in parts]),
        log_q=torch.cat([part["log_q"] for part in parts]),
        non_finite_site=next(filter(None, (part["non_finite_site"] for part in parts)), ""),
        observed={} if subsampled else {name: site["value"] for name, site in observed_sites(prototype)},
        dims={name: _dimension_names(name, site) for name, site in tensor_sites(prototype)},
        no_weights=_why_no_weights(tracer.guide_prototype, subsampled, values["unconstrained"]),
        minibatch_size=batch_size if subsampled else None,
    )


def _warn_of_sites_left_out(tracer: Tracer) -> None:
    left_out = [name for name, _ in latent_sites(tracer.model_prototype) if name not in tracer.guide_prototype.nodes]
    if left_out:
        warnings.warn(
            f"The guide leaves out site '{left_out[0]}'"
            + (f" and {len(left_out) - 1} more" if len(left_out) > 1 else "")
            + ": it is drawn from its prior, and ELBO, weights and verdict are those of the guide and that prior together. "
            "A discrete site is better summed out in the model; see docs/how_to/vectorise.md.",
            stacklevel=3,
        )


def batch_size_within_memory(tracer: Tracer, batch_size: int) -> int:
    """The size of a batch of draws whose largest site still fits into the memory allowed."""
    largest = max(site["value"].numel() for _, site in tensor_sites(tracer.model_prototype))
    return max(1, min(batch_size, MAX_BATCH_ELEMENTS // max(1, largest)))


def _why_no_weights(guide_prototype: Trace, subsampled: str | None, unconstrained: Mapping[str, Tensor]) -> str | None:
    """The first reason for which the ratios of the densities are no importance weights."""
    # By the sites, not by the guide, which may be any function.
    sites: list[Any] = list(guide_prototype.nodes.values())
    if any(has_stochastic_log_prob(site["fn"]) for site in sites if site["type"] == "sample"):
        return (
            "the log-density of the guide is a random estimate, and only its mean, the ELBO, is right; build the flow with "
            "log_det='exact' to have them"
        )
    for name, value in unconstrained.items():
        if len(value) > 1 and bool((value == value[:1]).all()):
            return f"the guide gives site '{name}' a single point, which has no density to weigh"
    if subsampled:
        return (
            f"the data are subsampled by plate '{subsampled}', and the noise of a minibatch is in every ratio; run the model "
            "on the whole data to have them"
        )
    return None


def _extract(
    guide_trace: Trace, model_trace: Trace, prototype: Trace, count: int, log_likelihood: bool
) -> dict[str, Any]:
    """The values and densities of one pair of traces, each with ``count`` draws in front."""
    originals: dict[str, Any] = dict(prototype.nodes)

    def at_draws(name: str, value: Tensor) -> Tensor:
        return per_draw(value, originals[name]["value"].shape, count)

    values, unconstrained = {}, {}
    for name, site in latent_sites(model_trace):
        if _in_subsampled_plate(site):
            continue
        values[name] = at_draws(name, site["value"])
        if not site["fn"].support.is_discrete:
            transform = biject_to(site["fn"].support)
            shape = transform.inverse_shape(originals[name]["value"].shape)
            unconstrained[name] = per_draw(transform.inv(site["value"]), shape, count)
    likelihoods = {}
    if log_likelihood:
        for name, site in observed_sites(model_trace):
            log_prob = site["fn"].log_prob(site["value"])
            # A masked entry is no observation. (A scale is not applied: it would change what one observation is.)
            if isinstance(site["mask"], Tensor):
                log_prob = torch.where(site["mask"], log_prob, 0.0)
            likelihoods[name] = per_draw(log_prob, originals[name]["fn"].batch_shape, count)
    log_p, log_q = log_prob_per_draw(model_trace, count), log_prob_per_draw(guide_trace, count)
    for name, site in latent_sites(model_trace):
        # A site that the guide leaves out is drawn from its prior, which thereby is part of the guide.
        if name not in guide_trace.nodes:
            log_q = log_q + site["fn"].log_prob(site["value"]).reshape(count, -1).sum(-1)
    return {
        "values": values,
        "unconstrained": unconstrained,
        "deterministic": {
            name: at_draws(name, site["value"])
            for name, site in deterministic_sites(model_trace)
            if not _in_subsampled_plate(site)
        },
        "log_likelihood": likelihoods,
        "log_p": log_p,
        "log_q": log_q,
        "non_finite_site": _non_finite_site(guide_trace, model_trace, log_p - log_q, count),
    }


def _non_finite_site(guide_trace: Trace, model_trace: Trace, log_ratios: Tensor, count: int) -> str:
    """The first site without a finite density in the first draw whose weight is NaN or infinite."""
    wrong = log_ratios.isnan() | log_ratios.isposinf()
    if not wrong.any():
        return ""
    first = int(wrong.int().argmax())
    for owner, trace in (("model", model_trace), ("guide", guide_trace)):
        for name, site in tensor_sites(trace):
            if not site["log_prob"].reshape(count, -1)[first].isfinite().all():
                return f"site '{name}' of the {owner}"
    return ""


def _in_subsampled_plate(site: Any) -> bool:
    """Whether a site stands in a plate that takes a part of its elements, and has other elements at every run."""
    return any(frame.full_size not in (None, frame.size) for frame in site["cond_indep_stack"])


def _dimension_names(name: str, site: Any) -> list[str]:
    """A name for every dimension of a site's value: that of its plate, or ``<site>_dim_<i>``."""
    shape = site["value"].shape
    names = [f"{name}_dim_{i}" for i in range(len(shape))]
    event_dim = 0 if is_deterministic(site) else site["fn"].event_dim
    for frame in site["cond_indep_stack"]:
        axis = len(shape) - event_dim + frame.dim if frame.vectorized else -1
        # A deterministic value need not use the plates it stands in.
        if axis >= 0 and shape[axis] == frame.size:
            names[axis] = frame.name
    return names


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
