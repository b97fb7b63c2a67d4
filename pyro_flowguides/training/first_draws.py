"""What the first draws of a fit show: data or a start without density, and latents that no gradient reaches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from ..checks import warn
from ..diagnostics.tracer import Tracer
from ..guides.auto import AutoFlow
from ..guides.base import Call
from ..model.missing import FillMissing, num_nan
from ..model.sites import (
    latent_sites,
    observed_sites,
    quiet_trace,
    site_without_density,
    tensor_sites,
    unchanged_random_state,
)

NUM_START_DRAWS = 10
NUM_PRIOR_DRAWS = 100
NUM_OTHER_VALUES = 5


def check_start(tracer: Tracer, calls: Sequence[Call]) -> None:
    """Finds a start with a density; an error that names the site, if the data hold NaN or there is no such start.

    Where no draw of the guide has a density, it begins at the best of some draws of the prior.

    Arguments:
        tracer: What traces the guide with its model.
        calls: The calls of flow guides in a run of the guide.
    """
    for name, site in observed_sites(tracer.model_prototype):
        if missing := num_nan(site):
            raise ValueError(
                f"fit: observed site '{name}' holds {missing} NaN among its {site['value'].numel()} values; remove them, or "
                "say which are seen, pyro.sample(..., obs=y, obs_mask=seen): the others are inferred with the latents"
            )
    message = _without_density(tracer)
    if message and not (_begin_at_a_draw_of_the_prior(tracer, calls) and _without_density(tracer) is None):
        raise ValueError(
            f"fit: the ELBO is not finite at the start: {message}, nor has any of {NUM_PRIOR_DRAWS} draws of the prior a density "
            "to start from. Say where to start: fg.AutoFlow(model, init_loc_fn=init_to_value(values={...})), from "
            "pyro.infer.autoguide"
        )


@torch.no_grad()
def _without_density(tracer: Tracer) -> str | None:
    """A sentence about a site whose log-probability is not finite, where this is so in all of some draws."""
    message = None
    # Some draws may have no density, in a guide that has been trained too; the steps leave them out.
    for _ in range(NUM_START_DRAWS):
        with poutine.block(), pyro.validation_enabled(False):
            for guide_trace, model_trace, _ in tracer.traces(1):
                message = site_without_density(guide_trace, model_trace)
        if message is None:
            return None
    return message


def _begin_at_a_draw_of_the_prior(tracer: Tracer, calls: Sequence[Call]) -> bool:
    """Moves a flow guide that has not been trained to the best of some draws of the prior; whether one has a density."""
    guides = [call.guide for call in calls if isinstance(call.guide, AutoFlow) and not call.guide.is_trained()]
    if len(guides) != 1 or guides[0].latents.subsampled_plates:
        return False
    latents = guides[0].latents
    best, best_value = None, -torch.inf
    with quiet_trace(), unchanged_random_state(), pyro.validation_enabled(False):
        for _ in range(NUM_PRIOR_DRAWS):
            try:
                trace = poutine.trace(FillMissing()(tracer.call.model)).get_trace(
                    *tracer.call.args, **tracer.call.kwargs
                )
                value = float(trace.log_prob_sum())
            except (RuntimeError, ValueError, NotImplementedError):
                continue
            if value > best_value:
                best, best_value = latents.pack(trace), value
    if best is None or not bool(best.isfinite().all()):
        return False
    guides[0].put_map(best, guides[0].fixed_map.whole_scale)
    return True


# --- gradients -----------------------------------------------------------------------------------------------------------


def check_gradients(tracer: Tracer) -> None:
    """An error where no latent has a gradient; a warning that names a latent which moves log p by steps alone.

    Such a latent is a switch point in ``torch.where(index > point, ...)``: its gradient is zero almost everywhere.
    """
    with quiet_trace(), pyro.validation_enabled(False), unchanged_random_state():
        guide: Any = tracer.guide
        guide_traces = [
            poutine.trace(guide).get_trace(*tracer.call.args, **tracer.call.kwargs) for _ in range(1 + NUM_OTHER_VALUES)
        ]
        base = _run(tracer, guide_traces[0], {})
        nodes: list[dict[str, Any]] = [dict(trace.nodes) for trace in guide_traces]
        points = {
            name: site["value"].detach().clone()
            for name, site in latent_sites(base)
            if name in nodes[0] and site["value"].is_floating_point()
        }
        if not points:
            return
        with torch.enable_grad():
            suspects = list(_unreached(tracer, base, points))
        # All of them at once: most models have none that matters.
        if not suspects or not _moves(tracer, base, nodes, suspects):
            return
        for name in suspects:
            if _moves(tracer, base, nodes, [name]):
                warn(
                    f"fit: latent site '{name}' moves the log density by steps alone: its gradient is zero almost everywhere, so "
                    "that the training does not see it. Write a smooth switch, torch.sigmoid((index - point) / width) for "
                    "torch.where(index > point, ...), or make it a discrete site over the positions, which fit sums out"
                )
                return


def _moves(tracer: Tracer, base: Trace, nodes: Sequence[Mapping[str, Any]], names: Sequence[str]) -> bool:
    """Whether log p, without the priors of some latents, differs between their values in some draws."""
    others = [{name: each[name]["value"] for name in names} for each in nodes if all(name in each for name in names)]
    rests = [_rest(_run(tracer, base, values), names) for values in others]
    values = torch.stack([rest.detach() for rest in rests])
    # A wall, beyond which there is no density, is none of these steps.
    values = values[values.isfinite()]
    return not bool(torch.isclose(values, values[:1], rtol=1e-6, atol=1e-6).all())


def _unreached(tracer: Tracer, base: Trace, points: Mapping[str, Tensor]) -> Iterator[str]:
    """The latents whose whole gradient is that of their own prior."""
    for point in points.values():
        point.requires_grad_()
    trace = _run(tracer, base, points)
    log_p = torch.as_tensor(trace.log_prob_sum())
    if not log_p.requires_grad:
        raise ValueError(
            "fit: the log density does not depend on any latent: all priors are flat, and there are no data; is there an obs= "
            "in the model?"
        )
    nodes: dict[str, Any] = dict(trace.nodes)
    gradients = torch.autograd.grad(
        log_p, list(points.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    for (name, point), gradient in zip(points.items(), gradients, strict=True):
        own = nodes[name]["log_prob_sum"]
        expected = torch.zeros_like(point)
        if own.requires_grad:
            (expected,) = torch.autograd.grad(
                own, [point], retain_graph=True, allow_unused=True, materialize_grads=True
            )
        if bool(torch.isclose(gradient, expected, rtol=1e-6, atol=1e-9, equal_nan=True).all()):
            yield name


def _run(tracer: Tracer, base: Trace, values: Mapping[str, Tensor]) -> Trace:
    """A run of the model at the values of a trace but for some."""
    model = FillMissing()(poutine.condition(poutine.replay(tracer.call.model, trace=base), data=dict(values)))
    trace = poutine.trace(model).get_trace(*tracer.call.args, **tracer.call.kwargs)
    trace.compute_log_prob()
    return trace


def _rest(trace: Trace, names: Sequence[str]) -> Tensor:
    """log p without the priors of some latents."""
    # Not by a difference, whose rounding would be taken for a step.
    return torch.as_tensor(sum(site["log_prob_sum"] for name, site in tensor_sites(trace) if name not in names))
