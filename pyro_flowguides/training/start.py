"""The start of a fit: a guide that is set up and whitened, and a clear error if training could not even begin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine

from ..compiled.recorded import BatchedCalls
from ..diagnostics.tracer import Tracer
from ..guides.auto import AutoFlow
from ..guides.base import FlowGuide
from ..model.call import ModelCall
from ..model.missing import as_given, num_nan
from ..model.sites import observed_sites, site_without_density

NUM_START_DRAWS = 10


def set_up(call: ModelCall, guide: Callable) -> Tracer:
    """Builds a guide that is not built yet; returns what traces it with its model."""
    if isinstance(guide, AutoFlow):
        guide.setup(*call.args, **call.kwargs)
    return Tracer(call, guide, differentiable=True)


def check_start(tracer: Tracer) -> None:
    """An error that names the site, if the data hold NaN or no draw at the start has a density."""
    for name, site in observed_sites(tracer.model_prototype):
        if missing := num_nan(site):
            raise ValueError(
                f"fit: observed site '{name}' holds {missing} NaN among its {site['value'].numel()} values; remove them, or "
                "say which are seen, pyro.sample(..., obs=y, obs_mask=seen): the others are inferred with the latents"
            )
    # Some draws may have no density, in a guide that has been trained too; the steps leave them out.
    for _ in range(NUM_START_DRAWS):
        message = _first_site_without_density(tracer)
        if message is None:
            return
    raise ValueError(f"fit: the ELBO is not finite at the start: {message}")


def has_missing(tracer: Tracer) -> bool:
    """Whether the data hold NaN that a mask hides."""
    return any(
        bool(as_given(site).isnan().any())
        for _, site in observed_sites(tracer.model_prototype)
        if as_given(site).is_floating_point()
    )


@torch.no_grad()
def _first_site_without_density(tracer: Tracer) -> str | None:
    """A sentence about the first site of a fresh draw whose log-probability is not finite."""
    with poutine.block(), pyro.validation_enabled(False):
        for guide_trace, model_trace, _ in tracer.traces(1):
            return site_without_density(guide_trace, model_trace)
    return None


def batched_calls(tracer: Tracer, *, arguments_vary: bool) -> BatchedCalls | None:
    """The recordings of the model for training, where one run of it is recorded for many draws."""
    if tracer.batched is None:
        return None
    return BatchedCalls(tracer.batched, tracer.model_prototype, tracer.max_plate_nesting, arguments_vary=arguments_vary)


def record(tracer: Tracer) -> BatchedCalls | None:
    """The recording of a model that broadcasts; None if it cannot be recorded."""
    recorded = tracer.try_to_record()
    if recorded is None:
        return None
    batched, nesting = recorded
    return BatchedCalls(batched, tracer.model_prototype, nesting, arguments_vary=False)


def whiten(call: ModelCall, guide: Callable, method: str | None, tracer: Tracer) -> None:
    """Whitens a flow guide by this method; ``"auto"`` leaves a trained guide, and any other guide, as it is."""
    if not isinstance(guide, AutoFlow):
        if method not in ("auto", None):
            raise ValueError(
                f"fit: whiten={method!r} needs a guide of this library; {type(guide).__name__} has no fixed map"
            )
    elif method is not None and not (method == "auto" and guide.is_trained()):
        options: dict[str, Any] = {"model_kwargs": call.kwargs, "model": call.model, "vectorize": tracer.vectorizes}
        guide.whiten(*call.args, method=method, batched=tracer.batched, **options)
    for part in guide.modules() if isinstance(guide, torch.nn.Module) else ():
        if isinstance(part, FlowGuide) and part.prototype_trace is not None:
            part.undamp()
