"""Drawing from a guide, with the log-densities of guide and model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import biject_to

from ..checks import warn
from ..model.call import ModelCall
from ..model.memory import draws_at_once
from ..model.missing import as_given
from ..model.sites import (
    SummedTrace,
    deterministic_sites,
    has_stochastic_log_prob,
    is_subsampled,
    latent_sites,
    log_prob_per_draw,
    observed_sites,
    per_draw,
    subsampled_plate,
    tensor_sites,
)
from .draws import Draws, concatenate
from .tracer import Tracer

# Minibatches of subsampled data, used to estimate the variance between them.
NUM_MINIBATCHES = 100


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
    warning. Discrete latents that the guide leaves out are summed out of all densities and drawn given the other latents and the
    data. A continuous one is drawn from its prior, with a warning.

    Arguments:
        model: The model.
        guide: The guide.
        args: The positional arguments of both.
        model_kwargs: The keyword arguments of both.
        num_samples: The number S of draws.
        batch_size: The number of draws to make at a time; bounds the memory.
        seed: Seeds Pyro first, if given.
        log_likelihood: Also keep the log-likelihood of every observation under every draw. Where observations share a discrete
            site that is summed out, there is none, and a warning says so.

    Raises:
        ValueError: if a number is smaller than 1, or a discrete latent cannot be summed out; the message names the site.
    """
    for name, number in (("num_samples", num_samples), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"draw: {name} must be at least 1, got {number}")
    call = ModelCall.given("draw", model, args, model_kwargs)
    with call.explaining("draw"):
        tracer = Tracer(call, guide)
    if seed is not None:
        # After the tracer, whose runs build a guide that is not set up.
        pyro.set_rng_seed(seed)
    return draw_traced(tracer, num_samples, batch_size, log_likelihood)


def draw_traced(tracer: Tracer, num_samples: int, batch_size: int = 10_000, log_likelihood: bool = False) -> Draws:
    """Draws by a tracer that exists already, see :func:`draw`."""
    _warn_of_sites_left_out(tracer)
    prototype = tracer.model_prototype
    subsampled = subsampled_plate(prototype)
    if log_likelihood:
        _warn_of_shared_sites(tracer)
    batch_size = min(batch_size, draws_at_once(tracer.elements_per_draw))
    if subsampled:
        # Every batch has a minibatch of its own.
        batch_size = max(1, min(batch_size, num_samples // NUM_MINIBATCHES))
    log_likelihood = log_likelihood and not subsampled
    with torch.no_grad():
        draws = concatenate(
            [
                _extract(guide_trace, model_trace, prototype, count, log_likelihood)
                for start in range(0, num_samples, batch_size)
                for guide_trace, model_trace, count in tracer.traces(min(batch_size, num_samples - start), start)
            ]
        )
    return dataclasses.replace(
        draws,
        observed={} if subsampled else {name: as_given(site) for name, site in observed_sites(prototype)},
        dims={name: _dimension_names(name, site) for name, site in tensor_sites(prototype)},
        weights_error=_weights_error(tracer.guide_prototype, subsampled, _inferred(draws.unconstrained, prototype)),
        minibatch_size=batch_size if subsampled else None,
        summed_out=tracer.enumeration.names if tracer.enumeration else (),
    )


def _warn_of_shared_sites(tracer: Tracer) -> None:
    reasons = tracer.enumeration.without_log_likelihood if tracer.enumeration else {}
    for name, reason in reasons.items():
        warn(
            f"Observed site '{name}' has no log-likelihood for each observation: it {reason}, and the sum over the values "
            "of that site does not factorise. There is no leave-one-out cross-validation"
        )
        return


def _warn_of_sites_left_out(tracer: Tracer) -> None:
    if tracer.enumeration:
        return
    left_out = [name for name, _ in latent_sites(tracer.model_prototype) if name not in tracer.guide_prototype.nodes]
    if left_out:
        warn(
            f"The guide leaves out site '{left_out[0]}'"
            + (f" and {len(left_out) - 1} more" if len(left_out) > 1 else "")
            + ": it is drawn from its prior, and ELBO, weights and verdict are about the guide and that prior together."
        )


def _inferred(unconstrained: Mapping[str, Tensor], prototype: Trace) -> dict[str, Tensor]:
    """The latents of which something counts: of missing data (``obs_mask=``) there may be none."""
    nodes: dict[str, Any] = dict(prototype.nodes)
    masks = {name: nodes[name]["mask"] for name in unconstrained}
    return {
        name: value
        for name, value in unconstrained.items()
        if not isinstance(masks[name], Tensor) or bool(masks[name].any())
    }


def _weights_error(guide_prototype: Trace, subsampled: str | None, unconstrained: Mapping[str, Tensor]) -> str | None:
    """The first reason why the ratios of the densities are no importance weights."""
    # By the sites, not by the guide, which may be any function.
    sites: list[Any] = list(guide_prototype.nodes.values())
    if any(has_stochastic_log_prob(site["fn"]) for site in sites if site["type"] == "sample"):
        return (
            "the log-density of the guide is a random estimate, and only its mean, the ELBO, is right; build the flow with "
            "log_det='exact' to have them"
        )
    for name, value in unconstrained.items():
        if len(value) > 1 and value.numel() and bool((value == value[:1]).all()):
            return f"the guide gives site '{name}' a single point, which has no density to weigh"
    if subsampled:
        return (
            f"the data are subsampled by plate '{subsampled}', and the noise of a minibatch is in every ratio; run the model "
            "on the whole data to have them"
        )
    return None


def _extract(guide_trace: Trace, model_trace: Trace, prototype: Trace, count: int, log_likelihood: bool) -> Draws:
    """The values and densities of one pair of traces of ``count`` draws."""
    originals: dict[str, Any] = dict(prototype.nodes)

    def at_draws(name: str, value: Tensor) -> Tensor:
        return per_draw(value, originals[name]["value"].shape, count)

    values, unconstrained = {}, {}
    for name, site in latent_sites(model_trace):
        if _in_subsampled_plate(site):
            continue
        values[name] = at_draws(name, site["value"])
        if not site["fn"].support.is_discrete:
            # The bounds are those of this run, or those that a recording kept for each draw; the shape is that of a single run.
            shape = biject_to(originals[name]["fn"].support).inverse_shape(originals[name]["value"].shape)
            points = (
                site["unconstrained"] if "unconstrained" in site else biject_to(site["fn"].support).inv(site["value"])
            )
            unconstrained[name] = per_draw(points, shape, count)
    likelihoods = {}
    if log_likelihood:
        for name, site in observed_sites(model_trace):
            # A recording knows it; its distributions are those of a single draw.
            known = site.get("log_likelihood", site.get("unscaled_log_prob", site["fn"].log_prob))
            if known is None:
                # Its observations have none of their own.
                continue
            log_prob = known if isinstance(known, Tensor) else known(site["value"])
            # A masked entry is no observation. (A scale is not applied: it would change what one observation is.)
            log_prob = scale_and_mask(log_prob, mask=site["mask"])
            likelihoods[name] = per_draw(log_prob, originals[name]["fn"].batch_shape, count)
    log_p, log_q = log_prob_per_draw(model_trace, count), log_prob_per_draw(guide_trace, count)
    for name, site in latent_sites(model_trace):
        # A site that the guide leaves out is drawn from its prior, which is part of the guide then.
        if name not in guide_trace.nodes and not isinstance(model_trace, SummedTrace):
            log_q = log_q + site.get("unscaled_log_prob", site["log_prob"]).reshape(count, -1).sum(-1)
    return Draws(
        values=values,
        unconstrained=unconstrained,
        deterministic={
            name: at_draws(name, site["value"])
            for name, site in deterministic_sites(model_trace)
            if not _in_subsampled_plate(site)
        },
        log_p=log_p,
        log_q=log_q,
        log_likelihood=likelihoods,
        observed={},
        dims={},
        non_finite_site=_non_finite_site(guide_trace, model_trace, log_p - log_q, count),
    )


def _non_finite_site(guide_trace: Trace, model_trace: Trace, log_ratios: Tensor, count: int) -> str:
    """The first site without a finite density in the first draw whose weight is not finite."""
    wrong = ~log_ratios.isfinite()
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
    return any(map(is_subsampled, site["cond_indep_stack"]))


def _dimension_names(name: str, site: Any) -> list[str]:
    """A name for every dimension of a site's value: the name of its plate, or ``<site>_dim_<i>``."""
    shape = site["value"].shape
    names = [f"{name}_dim_{i}" for i in range(len(shape))]
    # To pyro.deterministic every dimension is one of the event.
    event_dim = 0 if site["infer"].get("_deterministic") else site["fn"].event_dim
    for frame in site["cond_indep_stack"]:
        axis = len(shape) - event_dim + frame.dim if frame.vectorized else -1
        # A deterministic value need not use the plates it stands in.
        if axis >= 0 and shape[axis] == frame.size:
            names[axis] = frame.name
    return names
