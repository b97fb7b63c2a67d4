"""Running a model, with or without its guide, many times at once: one vectorised pass, or a loop where that is impossible."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine import Trace
from torch import Tensor

PLATE_NAME = "_flowguides_draws"


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
            if frame.full_size is not None and frame.full_size != frame.size:
                return frame.name
    return None


def deterministic_sites(trace: Trace) -> Iterator[tuple[str, Any]]:
    """The sites made by ``pyro.deterministic``."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and is_deterministic(site):
            yield name, site


def is_subsample(site: Any) -> bool:
    """Whether a site holds the indices of a plate."""
    return type(site["fn"]).__name__ == "_Subsample"


def is_deterministic(site: Any) -> bool:
    """Whether a site was made by ``pyro.deterministic``."""
    return bool(site["infer"].get("_deterministic"))


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


class Tracer:
    """Traces a model and its guide on fixed arguments, for many draws at a time.

    Whether the pair can be vectorised over draws (an extra plate on the left) is found out once, by trying two draws; where it
    cannot, every draw is a run of its own, and one warning says so.

    Arguments:
        model: The model.
        guide: The guide.
        args: The positional arguments of both.
        model_kwargs: The keyword arguments of both.
    """

    def __init__(self, model: Callable, guide: Callable, args: tuple, model_kwargs: Mapping[str, Any] | None) -> None:
        self.model = model
        self.guide = guide
        self.args = args
        self.model_kwargs = dict(model_kwargs or {})
        with quiet_trace():
            self.guide_prototype, self.model_prototype = self._trace_pair()
        self.max_plate_nesting = max_plate_nesting(self.guide_prototype, self.model_prototype)
        self.vectorizes = self._try_to_vectorize()

    def _trace_pair(self, num_draws: int | None = None) -> tuple[Trace, Trace]:
        guide, model = self.guide, self.model
        if num_draws is not None:
            # Inside replay: a site whose value is given already is not expanded by a plate further out.
            guide, model = self._in_plate(guide, num_draws), self._in_plate(model, num_draws)
        guide_trace = poutine.trace(guide).get_trace(*self.args, **self.model_kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*self.args, **self.model_kwargs)
        return guide_trace, model_trace

    def _check_against_single_runs(self, model_trace: Trace, num_draws: int) -> None:
        """Raises ValueError unless every draw has the density and the values that a run of its own gives.

        Shapes alone do not show a model that mixes the draws, by a sum over a latent for example.
        """
        together = log_prob_per_draw(model_trace, num_draws)
        originals: dict[str, Any] = dict(self.model_prototype.nodes)
        nodes: dict[str, Any] = dict(model_trace.nodes)
        given = dict(latent_sites(model_trace))
        indices = {
            name: site["value"] for name, site in nodes.items() if site["type"] == "sample" and is_subsample(site)
        }
        for i in range(num_draws):
            values = {
                name: per_draw(site["value"], originals[name]["value"].shape, num_draws)[i]
                for name, site in given.items()
            }
            conditioned = poutine.condition(self.model, data={**values, **indices})
            alone = poutine.trace(conditioned).get_trace(*self.args, **self.model_kwargs)
            log_prob = log_prob_per_draw(alone, 1)[0]
            if not torch.allclose(together[i], log_prob, rtol=1e-4, atol=1e-3, equal_nan=True):
                raise ValueError(
                    f"a draw has log-probability {together[i].item():.6g} among others and {log_prob.item():.6g} alone: the "
                    "model mixes the draws"
                )
            for name, site in deterministic_sites(alone):
                value = per_draw(nodes[name]["value"], site["value"].shape, num_draws)[i]
                if not torch.allclose(value.double(), site["value"].double(), rtol=1e-3, atol=1e-4, equal_nan=True):
                    raise ValueError(f"deterministic site '{name}' has other values among other draws than alone")

    def _in_plate(self, function: Callable, num_draws: int) -> Callable:
        def in_plate(*args: Any, **kwargs: Any) -> Any:
            with pyro.plate(PLATE_NAME, num_draws, dim=-1 - self.max_plate_nesting):
                return function(*args, **kwargs)

        return in_plate

    def _try_to_vectorize(self) -> bool:
        try:
            # Without validation: data that are not valid are not what is asked here.
            with quiet_trace(), warnings.catch_warnings(), pyro.validation_enabled(False):
                warnings.simplefilter("ignore")
                guide_trace, model_trace = self._trace_pair(2)
                check_vectorized(guide_trace, self.guide_prototype, 2, self.max_plate_nesting)
                check_vectorized(model_trace, self.model_prototype, 2, self.max_plate_nesting)
                self._check_against_single_runs(model_trace, 2)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            # Pyro appends a table of all sites to an error within a model.
            reason = " ".join(str(error).split("Trace Shapes:")[0].split())
            warnings.warn(
                "The model cannot be vectorised over draws, so that every draw is a run of its own, which is slow. Write it "
                "so that extra batch dimensions on the left of every latent are carried through: a[..., group] for a[group], "
                "beta @ X.T for X @ beta, and data in a plate; see docs/how_to/vectorise.md. The first "
                f"error was: {reason[:300]}",
                stacklevel=4,
            )
            return False
        return True

    def traces(self, num_draws: int) -> Iterator[tuple[Trace, Trace, int]]:
        """Pairs of guide and model trace with the number of draws in each; together ``num_draws``."""
        if self.vectorizes:
            yield *self._trace_pair(num_draws), num_draws
        else:
            for _ in range(num_draws):
                yield *self._trace_pair(), 1


def check_vectorized(trace: Trace, prototype: Trace, num_draws: int, nesting: int) -> None:
    """Raises ValueError unless every site has the shape of its prototype behind a dimension of draws."""
    nodes: dict[str, Any] = dict(trace.nodes)
    expected_nodes: dict[str, Any] = dict(prototype.nodes)
    for name, site in nodes.items():
        if site["type"] != "sample" or name not in expected_nodes or is_subsample(site) or is_deterministic(site):
            continue
        shape, expected = site["fn"].batch_shape, expected_nodes[name]["fn"].batch_shape
        full = (num_draws, *[1] * (nesting - len(expected)), *expected)
        if tuple(shape) != full:
            raise ValueError(f"site '{name}' has batch shape {tuple(shape)} instead of {full}")


def log_prob_per_draw(trace: Trace, num_draws: int) -> Tensor:
    """The sum of the log-probabilities of a trace's sample sites, shape ``(num_draws,)``, with scales and masks applied."""
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
