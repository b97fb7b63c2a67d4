"""What a trace says of a model: kinds of sites, their plates, and the log-probability of every draw."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution, Unit
from pyro.poutine import Trace
from torch import Tensor

from .. import internals

PLATE_NAME = "_flowguides_draws"


class SummedTrace(Trace):
    """A trace with draws of discrete latents that are summed out.

    Arguments:
        log_joint: The log joint density of everything else, of every draw.
    """

    def __init__(self, log_joint: Tensor) -> None:
        super().__init__()
        self.log_joint = log_joint


def latent_sites(trace: Trace) -> Iterator[tuple[str, Any]]:
    """The sites of a model that a guide has to supply."""
    for name, site in tensor_sites(trace):
        if not site["is_observed"]:
            yield name, site


def observed_sites(trace: Trace) -> Iterator[tuple[str, Any]]:
    """The sites that hold data."""
    for name, site in tensor_sites(trace):
        if site["is_observed"] and not is_deterministic(site) and not isinstance(site["fn"], Unit):
            yield name, site


def tensor_sites(trace: Trace) -> Iterator[tuple[str, Any]]:
    """All sample sites but the indices of plates."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not is_subsample(site):
            yield name, site


def subsampled_plate(trace: Trace) -> str | None:
    """The name of a plate that takes a part of its elements, if there is one."""
    for _, site in tensor_sites(trace):
        for frame in site["cond_indep_stack"]:
            if is_subsampled(frame):
                return frame.name
    return None


def is_subsampled(frame: Any) -> bool:
    """Whether a plate takes a part of its elements."""
    return full_size(frame) != frame.size


def full_size(frame: Any) -> int:
    """The number of elements of a whole plate."""
    return frame.size if frame.full_size is None else frame.full_size


def deterministic_sites(trace: Trace) -> Iterator[tuple[str, Any]]:
    """The sites whose values others determine, see :func:`is_deterministic`."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and is_deterministic(site):
            yield name, site


def is_subsample(site: Any) -> bool:
    """Whether a site holds the indices of a plate."""
    return type(site["fn"]).__name__ == "_Subsample"


def is_deterministic(site: Any) -> bool:
    """Whether a site was made by ``pyro.deterministic``, or is what a reparametriser leaves in the place of a site."""
    if site["infer"].get("_deterministic"):
        return True
    # Both are an observed point mass that does not count.
    fn = site["fn"]
    return (
        site["is_observed"]
        and isinstance(fn, MaskedDistribution)
        and isinstance(fn.base_dist, Delta)
        and internals.is_hidden(fn)
    )


def has_stochastic_log_prob(distribution: Any) -> bool:
    """Whether the log-density of a distribution goes through a transform whose log-determinant is a random estimate."""
    transforms = list(getattr(distribution, "transforms", []))
    while transforms:
        transform = transforms.pop()
        if getattr(transform, "stochastic_log_det", False):
            return True
        transforms += getattr(transform, "parts", [])
    # Independent, masked and transformed distributions all stand on another one.
    base = getattr(distribution, "base_dist", None)
    return base is not None and has_stochastic_log_prob(base)


def max_plate_nesting(*traces: Trace) -> int:
    """The number of batch dimensions that the plates of these traces take."""
    nestings = [
        -frame.dim
        for trace in traces
        for site in trace.nodes.values()
        if site["type"] == "sample"
        for frame in site["cond_indep_stack"]
        if frame.dim is not None
    ]
    return max(nestings, default=0)


@contextmanager
def quiet_trace() -> Iterator[None]:
    """Runs a model for inspection: without graph, and without leaving anything in the handlers outside."""
    with torch.no_grad(), poutine.block():
        yield


@contextmanager
def unchanged_random_state() -> Iterator[None]:
    """Whatever is drawn within leaves no trace in the generators of torch, numpy and Python."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)


def log_prob_per_draw(trace: Trace, num_draws: int) -> Tensor:
    """The log joint density of a trace, shape ``(num_draws,)``: the sum over its sample sites, with scales and masks applied."""
    if isinstance(trace, SummedTrace):
        return trace.log_joint
    trace.compute_log_prob()
    total: Tensor | float = 0.0
    for _, site in tensor_sites(trace):
        log_prob = site["log_prob"]
        total = total + (log_prob.reshape(num_draws, -1).sum(-1) if num_draws > 1 else log_prob.sum().reshape(1))
    return torch.as_tensor(total).expand(num_draws)


def per_draw(value: Tensor, shape: torch.Size, num_draws: int) -> Tensor:
    """A value of a vectorised trace, without the padding of plates it does not use: ``(num_draws, *shape)``.

    A value that does not depend on the draw is repeated.
    """
    if value.numel() == num_draws * shape.numel():
        return value.reshape(num_draws, *shape)
    return value.reshape(shape).expand(num_draws, *shape)


def site_without_density(guide_trace: Trace, model_trace: Trace) -> str | None:
    """A sentence about the first site whose log-probability is not finite."""
    for owner, trace in (("model", model_trace), ("guide", guide_trace)):
        trace.compute_log_prob()
        for name, site in tensor_sites(trace):
            if not math.isfinite(site["log_prob_sum"]):
                return f"site '{name}' of the {owner} has log-probability {float(site['log_prob_sum'])}"
    return None
