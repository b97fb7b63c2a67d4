"""Running a model at values that are at hand instead of a guide's: draws of MCMC, predictive draws, draws of the prior."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ..model.call import ModelCall
from ..model.memory import draws_at_once
from ..model.sites import (
    is_deterministic,
    is_subsample,
    latent_sites,
    observed_sites,
    per_draw,
    quiet_trace,
    tensor_sites,
)
from .draws import Draws
from .sampling import draw_traced
from .tracer import GivenValues, Tracer


class _SampleAnew(Messenger):
    """Samples every site, data included, whatever has given it a value: Pyro's guides keep models that give initial values.

    Factors and deterministic sites are no draws.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if not is_deterministic(msg) and not isinstance(msg["fn"], Unit) and not is_subsample(msg):
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


def draws_at(call: ModelCall, values: Mapping[str, Tensor], origin: str) -> Draws:
    """The model's side of :class:`Draws`, with log-likelihoods, at values that no guide of ours has drawn.

    Arguments:
        call: The model with its arguments.
        values: The values of every latent site, ``(S,) + shape``; discrete sites without values are summed out.
        origin: Where the values come from: the reason why these draws have no ELBO, such as "the draws come from MCMC".

    Raises:
        ValueError: if a latent site has no values, or values have no site: they come from another model.
    """
    at_first = _trace_at_first(call, values)
    latents = dict(latent_sites(at_first))
    sites = {name for name, site in latents.items() if name in values or not site["fn"].support.is_discrete}
    if sites != set(values):
        missing, unknown = sorted(sites - set(values)), sorted(set(values) - sites)
        raise ValueError(
            "these values are not draws of this model: "
            + "; ".join(
                [f"site '{name}' has none" for name in missing]
                + [f"the model has no site '{name}'" for name in unknown]
            )
        )
    tracer = Tracer(call, _given(values, at_first))
    draws = draw_traced(tracer, len(next(iter(values.values()))), log_likelihood=True)
    return dataclasses.replace(draws, log_q=torch.full_like(draws.log_p, torch.nan), elbo_error=origin)


def predict(
    call: ModelCall, values: Mapping[str, Tensor], num_samples: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Runs the model with its data sampled anew: at draws of the posterior, or, with no values at all, from the prior.

    Arguments:
        call: The model with its arguments.
        values: The values of latent sites, ``(S,) + shape``, or empty.
        num_samples: The number S of runs.

    Returns:
        The latent and deterministic sites, and the data, all with the draws as their first dimension.
    """
    at_first = _trace_at_first(call, values)
    data = {name for name, _ in observed_sites(at_first)}
    with torch.no_grad():
        with warnings.catch_warnings():
            # Making the values has warned already that the model is run draw by draw.
            warnings.filterwarnings("ignore", "The model cannot be vectorised", UserWarning)
            sampling_anew = dataclasses.replace(call, model=_SampleAnew()(call.model))
            tracer = Tracer(sampling_anew, _given(values, at_first), sum_out=False)
        prototype: dict[str, Any] = dict(tracer.model_prototype.nodes)
        batch_size = min(num_samples, draws_at_once(tracer.elements_per_draw))
        sampled: dict[str, list[Tensor]] = {}
        for start in range(0, num_samples, batch_size):
            for _, trace, count in tracer.traces(min(batch_size, num_samples - start), start):
                for name, site in tensor_sites(trace):
                    if not isinstance(site["fn"], Unit):
                        value = per_draw(site["value"], prototype[name]["value"].shape, count)
                        sampled.setdefault(name, []).append(value)
    together = {name: torch.cat(parts) for name, parts in sampled.items()}
    return (
        {name: value for name, value in together.items() if name not in data},
        {name: value for name, value in together.items() if name in data},
    )


def predict_new(
    call: ModelCall, values: Mapping[str, Tensor], num_samples: int, new_plates: Collection[str] = ()
) -> dict[str, Tensor]:
    """Everything that a model samples on new arguments, given draws of the latents that it shares with the old ones.

    Latents in a plate of another size than before, and those in ``new_plates``, belong to new elements: they are drawn from their
    prior given the others.

    Arguments:
        call: The model with the new arguments.
        values: Draws of the latents on the old arguments, ``(S,) + shape``.
        num_samples: The number of draws to make; the values are taken in order, and anew from the first where there are fewer.
        new_plates: The names of plates that have as many elements as before, and are of other ones.

    Returns:
        The sites that are drawn anew, data included, by name, ``(num_samples,) + shape``.

    Raises:
        ValueError: if a plate is not in the model, or a latent outside of new plates has another shape than before.
    """
    with quiet_trace():
        trace = poutine.trace(call.model).get_trace(*call.args, **call.kwargs)
    nodes: dict[str, Any] = dict(trace.nodes)
    plates = {name: [frame.name for frame in site["cond_indep_stack"]] for name, site in tensor_sites(trace)}
    known = {plate for names in plates.values() for plate in names}
    if unknown := sorted(set(new_plates) - known):
        raise ValueError(f"predict: the model has no plate '{unknown[0]}'; its plates are {sorted(known)}")
    kept = {}
    for name, value in values.items():
        if name not in plates or set(plates[name]) & set(new_plates):
            continue
        shape = tuple(nodes[name]["value"].shape)
        if shape == tuple(value.shape[1:]):
            kept[name] = value[torch.arange(num_samples, device=value.device) % len(value)]
        elif not plates[name]:
            raise ValueError(
                f"predict: latent site '{name}' has shape {shape} with these arguments, and had {tuple(value.shape[1:])} before; "
                "only what is in a plate can be of another size"
            )
    latents, data = predict(call, kept, num_samples)
    return {name: value for name, value in {**latents, **data}.items() if name not in kept}


def simulate(model: Callable) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One run of a model without arguments, with its data sampled anew: its latent sites, and the data."""
    with quiet_trace():
        observed = {name for name, _ in observed_sites(poutine.trace(model).get_trace())}
        sites = dict(tensor_sites(poutine.trace(_SampleAnew()(model)).get_trace()))
    values = {
        name: site["value"]
        for name, site in sites.items()
        if not is_deterministic(site) and not isinstance(site["fn"], Unit)
    }
    return (
        {name: value for name, value in values.items() if name not in observed},
        {name: value for name, value in values.items() if name in observed},
    )


def _trace_at_first(call: ModelCall, values: Mapping[str, Tensor]) -> Trace:
    """The model at the first of the values, which stay latent."""
    with quiet_trace():
        first = GivenValues(values, {name: value.dim() - 1 for name, value in values.items()}).guide(0, None, 0)
        replayed = poutine.replay(call.model, trace=poutine.trace(first).get_trace())
        return poutine.trace(replayed).get_trace(*call.args, **call.kwargs)


def _given(values: Mapping[str, Tensor], at_first: Trace) -> GivenValues:
    nodes: dict[str, Any] = dict(at_first.nodes)
    return GivenValues(values, {name: nodes[name]["fn"].event_dim for name in values})
