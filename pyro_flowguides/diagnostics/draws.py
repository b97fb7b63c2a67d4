"""Draws from a guide, each with its log-density under the guide and under the model."""

from __future__ import annotations

import functools
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

from .. import __version__
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
from .arviz import to_tree
from .importance import NUM_BOOTSTRAP, Estimate, psis, verdict, weights_are_constant
from .summary import summarise

# The largest site of a batch of draws has so many elements, which bounds its memory.
MAX_BATCH_ELEMENTS = 2**24
# So many minibatches of subsampled data, to see how much they differ.
NUM_MINIBATCHES = 100

Coords = Mapping[str, Sequence[Any]]
Dims = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Draws:
    """Draws from a guide. Made by :func:`draw`; every tensor has the draws as its first dimension.

    Attributes:
        values: The latent sites of the model, in their own (constrained) space.
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
        minibatch_size: How many draws in a row share one minibatch of subsampled data; None where nothing is subsampled.
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
    minibatch_size: int | None = None

    def __len__(self) -> int:
        return len(self.log_p)

    @property
    def log_weights(self) -> Tensor:
        """log p − log q, not normalised and not smoothed."""
        return self.log_p - self.log_q

    @functools.cached_property
    def _log_ratios(self) -> np.ndarray:
        return _numpy(self.log_weights).astype(np.float64)

    @functools.cached_property
    def _psis(self) -> tuple[np.ndarray, float]:
        if self.no_weights:
            raise ValueError(f"These draws have no importance weights, k-hat, ESS or verdict: {self.no_weights}")
        if weights_are_constant(_numpy(self.log_p), _numpy(self.log_q), torch.finfo(self.log_p.dtype).eps):
            return np.full(len(self), -np.log(len(self))), float("nan")
        return psis(self._log_ratios)

    @property
    def smoothed_log_weights(self) -> np.ndarray:
        """Pareto-smoothed log weights that add up to 1."""
        return self._psis[0]

    def elbo(self) -> Estimate:
        """The evidence lower bound, the mean of the log weights, in nats."""
        # Draws that share a minibatch share its noise: what varies is the mean over them.
        values = self._log_ratios
        if self.minibatch_size is not None:
            values = values[: len(values) // self.minibatch_size * self.minibatch_size]
            values = values.reshape(-1, self.minibatch_size).mean(-1)
        se = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
        return Estimate(float(self._log_ratios.mean()), float(se))

    def khat(self) -> Estimate:
        """The Pareto shape of the weights' tail, with a bootstrap standard error; NaN where all weights are equal."""
        khat = self._psis[1]
        if np.isnan(khat):
            return Estimate(khat, float("nan"))
        rng = np.random.default_rng(0)
        repeats = [psis(rng.choice(self._log_ratios, len(self)))[1] for _ in range(NUM_BOOTSTRAP)]
        return Estimate(khat, float(np.std(repeats, ddof=1)))

    def ess(self) -> Estimate:
        """The effective number of draws, ``1 / Σ w²`` of the smoothed weights, with a bootstrap standard error."""
        weights = np.exp(self.smoothed_log_weights)
        rng = np.random.default_rng(0)
        resampled = rng.choice(weights, (NUM_BOOTSTRAP, len(self)))
        repeats = resampled.sum(-1) ** 2 / (resampled**2).sum(-1)
        return Estimate(float(1 / (weights**2).sum()), float(np.std(repeats, ddof=1)))

    def verdict(self) -> str:
        """What the weights say about the guide, in words; see :func:`pyro_flowguides.diagnostics.importance.verdict`."""
        return verdict(self._psis[1], self.ess().value / len(self), len(self))

    def posterior(self) -> dict[str, np.ndarray]:
        """The latent and the deterministic sites as numpy arrays."""
        return {name: _numpy(value) for name, value in {**self.values, **self.deterministic}.items()}

    def summary(
        self, *, quantiles: Sequence[float] = (0.05, 0.5, 0.95), coords: Coords | None = None, dims: Dims | None = None
    ) -> pd.DataFrame:
        """Mean, standard deviation and quantiles of every latent and deterministic scalar, as a pandas table.

        Arguments:
            quantiles: Numbers between 0 and 1.
            coords: Labels along a dimension, by the name of its plate.
            dims: Names of dimensions, by site, where the plates do not give them.
        """
        return summarise(self.posterior(), {**self.dims, **(dims or {})}, coords or {}, quantiles)

    def to_arviz(
        self,
        *,
        coords: Coords | None = None,
        dims: Dims | None = None,
        variational_fit: Mapping[str, Any] | None = None,
    ) -> Any:
        """The draws as ArviZ's ``InferenceData`` (0.x) or ``DataTree`` (1.x), with one chain.

        Groups: posterior, unconstrained_posterior, sample_stats (lp, log_q and, unless log_q is a random estimate, the
        smoothed log_weight), log_likelihood where it was computed, observed_data, and variational_fit where given.

        Arguments:
            coords: Labels along a dimension, by the name of its plate.
            dims: Names of dimensions, by site, where the plates do not give them.
            variational_fit: Arrays along the steps of a fit.
        """

        def one_chain(values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
            return {name: _numpy(value)[None] for name, value in values.items()}

        groups: dict[str, dict[str, np.ndarray]] = {
            "posterior": one_chain({**self.values, **self.deterministic}),
            "unconstrained_posterior": one_chain(self.unconstrained),
            "sample_stats": one_chain({"lp": self.log_p, "log_q": self.log_q}),
        }
        if not self.no_weights:
            groups["sample_stats"]["log_weight"] = self.smoothed_log_weights[None]
        if self.log_likelihood:
            groups["log_likelihood"] = one_chain(self.log_likelihood)
        if self.observed:
            groups["observed_data"] = {name: _numpy(value) for name, value in self.observed.items()}
        if variational_fit:
            groups["variational_fit"] = {name: np.asarray(value)[None] for name, value in variational_fit.items()}
        along_steps = {name: ["chain", "step"] for name in variational_fit or {}}
        return to_tree(
            groups,
            coords=coords,
            dims={**self.dims, **(dims or {}), **along_steps},
            sample_dims={"variational_fit": []},
            attrs={
                "inference_library": "pyro-ppl",
                "inference_library_version": pyro.__version__,
                "modeling_interface": "pyro_flowguides",
                "modeling_interface_version": __version__,
            },
        )


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
    warning.

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
    subsampled = subsampled_plate(tracer.model_prototype)
    largest = max(site["value"].numel() for _, site in tensor_sites(tracer.model_prototype))
    batch_size = max(1, min(batch_size, MAX_BATCH_ELEMENTS // max(1, largest)))
    if subsampled:
        # Every batch has a minibatch of its own.
        batch_size = max(1, min(batch_size, num_samples // NUM_MINIBATCHES))
    log_likelihood = log_likelihood and not subsampled
    parts = []
    for start in range(0, num_samples, batch_size):
        for guide_trace, model_trace, count in tracer.traces(min(batch_size, num_samples - start)):
            parts.append(_extract(guide_trace, model_trace, tracer.model_prototype, count, log_likelihood))
    prototype = tracer.model_prototype
    values = {
        key: {name: torch.cat([part[key][name] for part in parts]) for name in parts[0][key]}
        for key in ("values", "unconstrained", "deterministic", "log_likelihood")
    }
    return Draws(
        **values,
        log_p=torch.cat([part["log_p"] for part in parts]),
        log_q=torch.cat([part["log_q"] for part in parts]),
        observed={} if subsampled else {name: site["value"] for name, site in observed_sites(prototype)},
        dims={name: _dimension_names(name, site) for name, site in tensor_sites(prototype)},
        no_weights=_why_no_weights(tracer.guide_prototype, subsampled, values["unconstrained"]),
        minibatch_size=batch_size if subsampled else None,
    )


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
    log_q = log_prob_per_draw(guide_trace, count)
    for name, site in latent_sites(model_trace):
        # A site that the guide leaves out is drawn from its prior, which thereby is part of the guide.
        if name not in guide_trace.nodes:
            log_q = log_q + site["fn"].log_prob(site["value"]).reshape(count, -1).sum(-1)
    return {
        "values": values,
        "unconstrained": unconstrained,
        "deterministic": {name: at_draws(name, site["value"]) for name, site in deterministic_sites(model_trace)},
        "log_likelihood": likelihoods,
        "log_p": log_prob_per_draw(model_trace, count),
        "log_q": log_q,
    }


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
