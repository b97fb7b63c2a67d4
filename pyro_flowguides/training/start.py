"""The start of a fit: a guide that is set up and whitened, and a clear error if training could not even begin."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyro
import torch

from ..checks import warn
from ..compiled.recorded import BatchedCalls
from ..diagnostics.importance import Estimate
from ..diagnostics.tracer import Tracer
from ..guides.auto import AutoFlow
from ..guides.base import Call, calls_of_flow_guides
from ..guides.mixture import AutoMixture
from ..model.call import ModelCall
from ..model.missing import as_given
from ..model.sites import latent_sites, observed_sites, subsampled_plate, unchanged_random_state
from ..model.target import Target
from ..transforms.continuous import is_continuous

# The number of elements of a tensor from which on a second thread pays.
WORTH_THREADS = 2**20


def set_up(call: ModelCall, guide: Callable) -> tuple[Tracer, list[Call]]:
    """Builds a guide that is not built yet; returns what traces it with its model, and the calls of flow guides in one run."""
    with call.explaining("fit"), calls_of_flow_guides() as calls:
        try:
            if isinstance(guide, AutoFlow):
                guide.setup(*call.args, **call.kwargs)
            tracer = Tracer(call, guide, differentiable=True)
        except ZeroDivisionError as error:
            if "size cannot be zero" not in str(error):
                raise
            raise ValueError(
                "fit: a plate of the model has size 0, which Pyro has not; leave the plate out where it has no elements"
            ) from error
    return tracer, list({id(each.guide): each for each in calls}.values())


def has_missing(tracer: Tracer) -> bool:
    """Whether the data hold NaN that a mask hides."""
    return any(
        bool(as_given(site).isnan().any())
        for _, site in observed_sites(tracer.model_prototype)
        if as_given(site).is_floating_point()
    )


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


def whiten(
    calls: Sequence[Call], guide: Callable, method: str | None, tracer: Tracer, *, may_start_over: bool = False
) -> None:
    """Whitens the flow guide that draws all latents by this method; ``"auto"`` leaves every other guide as it is.

    A trained guide is left as it is, too, unless it may start over and no longer fits.

    Arguments:
        calls: The calls of flow guides in a run of the guide.
        guide: The guide, which is a flow guide or has one inside.
        method: The method.
        tracer: What traces the guide with its model.
        may_start_over: Whether the ELBO of these arguments says how good a trained guide is.
    """
    alone = [
        each for each in calls if isinstance(each.guide, AutoFlow) and (each.guide is guide or _is_alone(each, tracer))
    ]
    if not alone:
        if method not in ("auto", None):
            raise ValueError(
                f"fit: whiten={method!r} needs a guide of this library; {type(guide).__name__} has no fixed map"
            )
    elif method is not None:
        flow_guide, args, kwargs = alone[0]
        # The guide may be of a part of the model only.
        is_whole = list(map(id, args)) == list(map(id, tracer.call.args))
        model = tracer.call.model if is_whole else flow_guide.model
        how: dict[str, Any] = {"vectorize": tracer.vectorizes, "batched": tracer.batched}
        if method != "auto" or not flow_guide.is_trained():
            flow_guide.whiten(*args, method=method, model_kwargs=kwargs, model=model, **how)
        elif may_start_over and subsampled_plate(tracer.model_prototype) is None:
            # What is drawn here is of no use to a guide that is kept.
            with unchanged_random_state():
                flow_guide.start_over_if_better(Target(ModelCall(model, args, kwargs), flow_guide.latents, **how))
    for each in calls:
        each.guide.undamp()


def simplify(calls: Sequence[Call]) -> bool:
    """Merges and drops components of mixtures after the training; returns whether a guide has changed."""
    mixtures = [each.guide for each in calls if isinstance(each.guide, AutoMixture)]
    with unchanged_random_state():
        # Several processes come to the same end.
        pyro.set_rng_seed(0)
        return sum(mixture.simplify() for mixture in mixtures) > 0


def _is_alone(call: Call, tracer: Tracer) -> bool:
    """Whether one flow guide inside of another guide draws all latents that are not discrete."""
    latents = {name for name, site in latent_sites(tracer.model_prototype) if not site["fn"].support.is_discrete}
    return call.guide.master is None and {site.name for site in call.guide.latents.sites} >= latents


def warn_of_ode_error(calls: Sequence[Call], elbo: Estimate) -> None:
    """Warns where the steps of a continuous flow leave more of log q than the standard error of the ELBO."""
    for guide, args, kwargs in calls:
        if not is_continuous(guide.flow):
            continue
        with torch.no_grad(), unchanged_random_state():
            error = guide.get_posterior(*args, **kwargs).ode_error()
        if not (error.log_det <= elbo.se or math.isnan(elbo.se)):
            warn(
                f"fit: the solver of the continuous flow of {type(guide).__name__} leaves an error of {error.log_det:.2g} in "
                f"log q (against half the step), more than the standard error {elbo.se:.2g} of the ELBO, and the ELBO is off "
                "by about as much; make the guide with twice the num_steps, or with kinetic and jacobian regularisation"
            )


# --- threads -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def threads_for(num_elements: int) -> Iterator[None]:
    """One thread within, where no tensor is large enough to be worth a second one.

    Threads that wait for one another make a small step many times slower on a machine that does other work as well. The choice is
    by size, so that it is the same in every run.

    Arguments:
        num_elements: The number of elements of the largest tensor.
    """
    before = torch.get_num_threads()
    if num_elements < WORTH_THREADS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
