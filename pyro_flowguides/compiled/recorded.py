"""The default loss where one run of the model is recorded for many draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from .. import internals
from ..diagnostics.tracer import Tracer, given_by, single_run
from ..model.batched import BatchedModel
from ..model.call import ModelCall
from ..model.sites import PLATE_NAME, unchanged_random_state
from .arguments import Arguments, Key


class BatchedCalls:
    """A recording of a model for each kind of arguments that it is called with.

    Arguments:
        first: The recording for the arguments at hand, whose tensors are constants of it.
        prototype: A trace of one run of the model.
        max_plate_nesting: The number of batch dimensions that the plates of model and guide take.
        arguments_vary: Whether there will be other arguments.
    """

    def __init__(
        self, first: BatchedModel, prototype: poutine.Trace, max_plate_nesting: int, *, arguments_vary: bool
    ) -> None:
        self._first = first
        self._prototype = prototype
        self.max_plate_nesting = max_plate_nesting
        self.arguments_vary = arguments_vary
        self._known: dict[Key, tuple[BatchedModel, poutine.Trace]] = {}

    def find(
        self, args: tuple, kwargs: dict[str, Any], guide_trace: poutine.Trace
    ) -> tuple[BatchedModel, poutine.Trace, ModelCall]:
        """The recording for these arguments, with a trace of one run.

        Arguments:
            args: The positional arguments.
            kwargs: The keyword arguments.
            guide_trace: A trace of the guide at them, with all draws in it.
        """
        call = ModelCall(self._first.call.model, args, kwargs)
        if not self.arguments_vary:
            return self._first, self._prototype, call
        key = Arguments(args, kwargs).key()
        if key not in self._known:
            prototype = single_run(call, guide_trace, self._prototype)
            self._known[key] = self._first.at(call, prototype), prototype
        return *self._known[key], call


def find_recording(call: ModelCall, guide: Callable) -> BatchedCalls | None:
    """Recordings of a model that does not broadcast; None if it does, or if it cannot be recorded either.

    Nothing is set up or drawn by the search: it has a copy of the guide and a parameter store of its own.

    Arguments:
        call: The model with its first arguments.
        guide: The guide.
    """
    if isinstance(guide, torch.nn.Module):
        try:
            guide = internals.copy_with_models(guide, {})
        except (TypeError, RuntimeError):
            # What holds a generator or a graph has no copy.
            return None
    with unchanged_random_state(), pyro.get_param_store().scope(), warnings.catch_warnings():
        # Of a model that can neither broadcast nor be recorded, which the step itself refuses.
        warnings.simplefilter("ignore")
        tracer = Tracer(call, guide, differentiable=True)
    if tracer.batched is None:
        return None
    return BatchedCalls(tracer.batched, tracer.model_prototype, tracer.max_plate_nesting, arguments_vary=True)


def recorded_loss(
    calls: BatchedCalls,
    num_particles: int,
    guide: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    beta: Tensor | None = None,
) -> Tensor:
    """The loss of ``Trace_ELBO`` with its surrogate, where a recording gives log p.

    Arguments:
        calls: The recordings.
        num_particles: The number of draws.
        guide: The guide.
        args: The positional arguments of model and guide.
        kwargs: Their keyword arguments.
        beta: What log p is multiplied by; None for nothing.
    """

    def in_plate(*args: Any, **kwargs: Any) -> None:
        with pyro.plate(PLATE_NAME, num_particles, dim=-1 - calls.max_plate_nesting):
            guide(*args, **kwargs)

    traced = poutine.trace(in_plate).get_trace(*args, **kwargs)
    batched, prototype, call = calls.find(args, kwargs, traced)
    log_p = batched.log_prob(*given_by(traced, prototype, num_particles), call)
    if beta is not None:
        log_p = beta * log_p
    guide_trace = prune_subsample_sites(traced)
    guide_trace.compute_score_parts()
    nodes: list[Any] = list(guide_trace.nodes.values())
    sites = [site for site in nodes if site["type"] == "sample"]
    log_q: Any = 0.0
    surrogate: Any = log_p.sum()
    for site in sites:
        log_q = log_q + site["log_prob"].reshape(num_particles, -1).sum(-1)
        if not is_identically_zero(site["score_parts"].entropy_term):
            surrogate = surrogate - site["score_parts"].entropy_term.sum()
    log_weight = (log_p - log_q).detach()
    # As in Trace_ELBO, without the density of auxiliary sites.
    cost = log_weight + sum(
        site["log_prob"].detach().reshape(num_particles, -1).sum(-1)
        for site in sites
        if site["infer"].get("is_auxiliary")
    )
    for site in sites:
        score = site["score_parts"].score_function
        if not is_identically_zero(score):
            surrogate = surrogate + (cost * score.reshape(num_particles, -1).sum(-1)).sum()
    return (surrogate.detach() - surrogate - log_weight.sum()) / num_particles
