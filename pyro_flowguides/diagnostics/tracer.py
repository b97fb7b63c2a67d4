"""Running a model with its guide for many draws at once: one vectorised pass, or a loop where that is impossible."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.poutine import Trace
from pyro.util import check_site_shape
from torch import Tensor

from ..checks import warn
from ..model.batched import BatchedModel, given_names
from ..model.call import ModelCall
from ..model.data import check_observed
from ..model.enumeration import Enumeration
from ..model.memory import elements_per_draw
from ..model.missing import FillMissing
from ..model.ownership import values_in_place
from ..model.sites import (
    PLATE_NAME,
    deterministic_sites,
    is_deterministic,
    is_subsample,
    latent_sites,
    log_prob_per_draw,
    max_plate_nesting,
    per_draw,
    quiet_trace,
    tensor_sites,
    unchanged_random_state,
)
from ..model.target import ERRORS_OF_MODELS, draw_by_draw


class GivenValues:
    """Values that are at hand, in the place of a guide.

    Arguments:
        values: The values of latent sites, ``(S,) + shape`` each.
        event_dims: The number of event dimensions of each site.
    """

    def __init__(self, values: Mapping[str, Tensor], event_dims: Mapping[str, int]) -> None:
        self.values = values
        self.event_dims = event_dims

    def guide(self, first: int, num_samples: int | None, max_plate_nesting: int) -> Callable:
        """A guide with a point mass at each of the values of some draws.

        Arguments:
            first: The number of the first draw. The values are taken around the end: a test of vectorisation may need more
                draws than there are.
            num_samples: The number of draws, as a dimension on the left; None for a single one without that dimension.
            max_plate_nesting: The number of batch dimensions between the dimension of draws and the event dimensions.
        """

        def guide(*args: Any, **kwargs: Any) -> None:
            for name, value in self.values.items():
                indices = torch.arange(first, first + (num_samples or 1), device=value.device) % len(value)
                event_dim, shape = self.event_dims[name], tuple(value.shape[1:])
                if num_samples is not None:
                    padding = max_plate_nesting - (len(shape) - event_dim)
                    shape = (num_samples, *[1] * padding, *shape)
                pyro.sample(name, Delta(value[indices].reshape(shape), event_dim=event_dim))

        return guide


class Tracer:
    """Traces a model and its guide on fixed arguments, for many draws at a time.

    How many draws are run together is found out once, by comparing two draws with runs of their own:

    1. The pair is run with an extra plate on the left, where all its operations broadcast.
    2. One run of the model is recorded, and the recording is batched over the draws of the guide.
    3. Every draw is a run of its own, after one warning.

    Arguments:
        call: The model with the arguments of model and guide.
        guide: The guide, or values in its place.
        differentiable: Whether a recording is needed for its gradient, which is compared too then.
        sum_out: Whether discrete latents that the guide leaves out are summed out; otherwise they are drawn from their prior.

    Attributes:
        guide_prototype: The trace of one run of the guide.
        model_prototype: The trace of one run of the model.
        max_plate_nesting: The number of batch dimensions that the plates of both take.
        vectorizes: Whether many draws are made in one pass.
        batched: The recording of the model, where that is how many draws are made in one pass; else None. Where discrete latents
            are summed out, there always is one, or what takes its place draw by draw.
        enumeration: The discrete latents that are summed out; None if there are none.

    Raises:
        ValueError: if discrete latents are to be summed out and cannot be, see
            :class:`pyro_flowguides.model.enumeration.Enumeration`.
    """

    def __init__(
        self,
        call: ModelCall,
        guide: Callable | GivenValues,
        *,
        differentiable: bool = False,
        sum_out: bool = True,
    ) -> None:
        self.call = call
        self.guide = guide
        self.differentiable = differentiable
        self.max_plate_nesting = 0
        self.batched: BatchedModel | None = None
        with values_in_place(call.model, guide):
            with quiet_trace():
                self.guide_prototype, self.model_prototype = self._trace_pair()
                check_observed(self.model_prototype)
                self.max_plate_nesting = max_plate_nesting(self.guide_prototype, self.model_prototype)
                check_plates(self.model_prototype)
            given = self.guide_prototype.nodes
            self.enumeration = Enumeration.of(self.model_prototype, given) if sum_out else None
            self.vectorizes = self._try_to_sum_out() if self.enumeration else self._try_to_vectorize()

    @property
    def vectorization(self) -> str:
        """How many draws are run: ``"broadcast"``, ``"recorded"``, or ``"looped"`` for draw by draw."""
        if not self.vectorizes:
            return "looped"
        return "broadcast" if self.batched is None else "recorded"

    @functools.cached_property
    def elements_per_draw(self) -> int:
        """The number of elements that a draw of guide and model adds to the largest tensor of a pass."""

        def run(number: int) -> None:
            for guide_trace, model_trace, count in self.traces(number):
                log_prob_per_draw(guide_trace, count)
                log_prob_per_draw(model_trace, count)

        with torch.no_grad(), poutine.block(), pyro.validation_enabled(False), unchanged_random_state():
            return elements_per_draw(run)

    def traces(self, num_samples: int, first: int = 0) -> Iterator[tuple[Trace, Trace, int]]:
        """Pairs of guide and model trace with the number of draws in each; together ``num_samples``.

        Arguments:
            num_samples: The number of draws.
            first: The number of the first draw, which selects among given values.
        """
        # Until the caller is done with a trace: densities are computed from it after the model has returned.
        with values_in_place(self.call.model, self.guide):
            if self.vectorizes:
                yield *self._pair(num_samples, first), num_samples
            else:
                for i in range(first, first + num_samples):
                    yield *self._pair(None, i), 1

    def _pair(self, num_samples: int | None, first: int) -> tuple[Trace, Trace]:
        if self.batched is not None:
            return self._batched_pair(self.batched, num_samples, first)
        return self._trace_pair(num_samples, first)

    def _trace_pair(self, num_samples: int | None = None, first: int = 0) -> tuple[Trace, Trace]:
        args, kwargs = self.call.args, self.call.kwargs
        guide_trace = self._trace_guide(num_samples, first)
        # The plate is inside replay: it does not expand a value that is given already.
        model = FillMissing()(poutine.replay(self._in_plate(self.call.model, num_samples), trace=guide_trace))
        return guide_trace, poutine.trace(model).get_trace(*args, **kwargs)

    def _trace_guide(self, num_samples: int | None, first: int) -> Trace:
        if isinstance(self.guide, GivenValues):
            guide = self.guide.guide(first, num_samples, self.max_plate_nesting)
        else:
            guide = self._in_plate(self.guide, num_samples)
        return poutine.trace(guide).get_trace(*self.call.args, **self.call.kwargs)

    def _batched_pair(self, batched: BatchedModel, num_samples: int | None, first: int = 0) -> tuple[Trace, Trace]:
        guide_trace = self._trace_guide(num_samples, first)
        values, indices = given_by(guide_trace, self.model_prototype, num_samples or 1)
        return guide_trace, batched.trace(values, num_samples or 1, indices)

    def _in_plate(self, function: Callable, num_samples: int | None) -> Callable:
        if num_samples is None:
            return function

        def in_plate(*args: Any, **kwargs: Any) -> Any:
            with pyro.plate(PLATE_NAME, num_samples, dim=-1 - self.max_plate_nesting):
                return function(*args, **kwargs)

        return in_plate

    def _try_to_vectorize(self) -> bool:
        try:
            # Without validation: invalid data are an error elsewhere.
            with quiet_trace(), warnings.catch_warnings(), pyro.validation_enabled(False):
                warnings.simplefilter("ignore")
                guide_trace, model_trace = self._trace_pair(2)
                check_vectorized(guide_trace, self.guide_prototype, 2, self.max_plate_nesting)
                check_vectorized(model_trace, self.model_prototype, 2, self.max_plate_nesting)
                self._check_against_single_runs(model_trace, 2)
            return True
        except ERRORS_OF_MODELS as error:
            first_error = error
        try:
            self.batched, self.max_plate_nesting = self._record()
            return True
        except ERRORS_OF_MODELS as error:
            warn(draw_by_draw(first_error, error))
            return False

    def _try_to_sum_out(self) -> bool:
        unrecorded = self._make_batched(is_recorded=False)
        unrecorded.check_sum()
        try:
            self.batched, self.max_plate_nesting = self._record()
            return True
        except ERRORS_OF_MODELS as error:
            self.batched = unrecorded
            warn(
                "Discrete latents are summed out draw by draw, which is slow: a run of the model cannot be recorded and "
                f"repeated for many draws ({' '.join(str(error).split())[:400] or type(error).__name__}); see "
                "docs/how_to/discrete.md"
            )
            return False

    def _make_batched(self, *, is_recorded: bool = True) -> BatchedModel:
        given = given_names(self.model_prototype, self.guide_prototype)
        return BatchedModel(
            self.call, self.model_prototype, given, enumeration=self.enumeration, is_recorded=is_recorded
        )

    def try_to_record(self) -> tuple[BatchedModel, int] | None:
        """The model, recorded and batched, and the number of batch dimensions of its plates; None if that cannot be."""
        try:
            return self._record()
        except ERRORS_OF_MODELS:
            return None

    def _record(self) -> tuple[BatchedModel, int]:
        """Records the model.

        Raises:
            CaptureError: if it cannot be recorded.
            ValueError: if two draws together have other values than each of them alone, or the guide cannot be vectorised.
        """
        before = self.max_plate_nesting
        # A batch dimension without a plate takes its place beside those of plates.
        shapes = [site["fn"].batch_shape for _, site in latent_sites(self.model_prototype)]
        self.max_plate_nesting = nesting = max([before, *map(len, shapes)])
        try:
            with quiet_trace(), warnings.catch_warnings(), pyro.validation_enabled(False), unchanged_random_state():
                warnings.simplefilter("ignore")
                batched = self._make_batched()
                guide_trace, model_trace = self._batched_pair(batched, 2)
                check_vectorized(guide_trace, self.guide_prototype, 2, nesting)
                self._check_against_single_runs(model_trace, 2)
                if self.differentiable:
                    batched.check(given_by(guide_trace, self.model_prototype, 2)[0])
        finally:
            self.max_plate_nesting = before
        return batched, nesting

    def _check_against_single_runs(self, model_trace: Trace, num_samples: int) -> None:
        """Raises ValueError unless every draw has the density and the values that a run of its own gives.

        Shapes alone do not reveal a model that mixes the draws, by a sum over a latent for example.
        """
        together = log_prob_per_draw(model_trace, num_samples)
        originals: dict[str, Any] = dict(self.model_prototype.nodes)
        nodes: dict[str, Any] = dict(model_trace.nodes)
        given = dict(latent_sites(model_trace))
        indices = {
            name: site["value"] for name, site in nodes.items() if site["type"] == "sample" and is_subsample(site)
        }
        for i in range(num_samples):
            values = {
                name: per_draw(site["value"], originals[name]["value"].shape, num_samples)[i]
                for name, site in given.items()
            }
            conditioned = FillMissing()(poutine.condition(self.call.model, data={**values, **indices}))
            alone = poutine.trace(conditioned).get_trace(*self.call.args, **self.call.kwargs)
            log_prob = log_prob_per_draw(alone, 1)[0]
            if self.enumeration:
                others = {name: value for name, value in values.items() if name not in self.enumeration.names}
                conditioned = FillMissing()(poutine.condition(self.call.model, data={**others, **indices}))
                log_prob = self.enumeration.log_joint(dataclasses.replace(self.call, model=conditioned))
            if not torch.allclose(together[i], log_prob, rtol=1e-4, atol=1e-3, equal_nan=True):
                raise ValueError(
                    f"a draw has log-probability {together[i].item():.6g} among others and {log_prob.item():.6g} alone: the "
                    "model mixes the draws"
                )
            for name, site in deterministic_sites(alone):
                value = per_draw(nodes[name]["value"], site["value"].shape, num_samples)[i]
                if not torch.allclose(value.double(), site["value"].double(), rtol=1e-3, atol=1e-4, equal_nan=True):
                    raise ValueError(f"deterministic site '{name}' has other values among other draws than alone")


def check_plates(trace: Trace) -> None:
    """Raises a ValueError, Pyro's own where it has one, for a site whose log-probability has not the shape of its plates.

    Observations of shape ``(N, 1)`` in a plate of N elements have a log-probability of shape ``(N, N)``: another posterior, not
    an error of torch. Sites outside of plates may have batch dimensions, as in Pyro's MCMC.
    """
    for name, site in tensor_sites(trace):
        if site["cond_indep_stack"]:
            own, value = site["fn"].batch_shape, site["value"].shape
            value = value[: len(value) - site["fn"].event_dim]
            try:
                shape = torch.broadcast_shapes(own, value)
            except RuntimeError as error:
                raise ValueError(f"site '{name}' has batch shape {tuple(own)}, and its value {tuple(value)}") from error
            with_shape: Any = {**site, "log_prob": torch.empty(()).expand(shape)}
            check_site_shape(with_shape, len(shape))


def check_vectorized(trace: Trace, prototype: Trace, num_samples: int, nesting: int) -> None:
    """Checks that every site has the batch shape of its prototype behind a dimension of draws.

    Arguments:
        trace: Of several draws at once.
        prototype: Of a single run.
        num_samples: The number of draws in the trace.
        nesting: The number of batch dimensions between the dimension of draws and the event dimensions.

    Raises:
        ValueError: if a site has another batch shape.
    """
    nodes: dict[str, Any] = dict(trace.nodes)
    expected_nodes: dict[str, Any] = dict(prototype.nodes)
    for name, site in nodes.items():
        if site["type"] != "sample" or name not in expected_nodes or is_subsample(site) or is_deterministic(site):
            continue
        shape, expected = site["fn"].batch_shape, expected_nodes[name]["fn"].batch_shape
        full = (num_samples, *[1] * (nesting - len(expected)), *expected)
        if tuple(shape) != full:
            raise ValueError(f"site '{name}' has batch shape {tuple(shape)} instead of {full}")


def given_by(guide_trace: Trace, prototype: Trace, num_samples: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a trace of a guide gives to the model: the values of latent sites, ``(draws,) + shape``, and indices of plates.

    Arguments:
        guide_trace: A trace of the guide with the draws on the left.
        prototype: A trace of a single run of the model.
        num_samples: The number of draws.
    """
    nodes: dict[str, Any] = dict(guide_trace.nodes)
    originals: dict[str, Any] = dict(prototype.nodes)
    values = {
        name: per_draw(nodes[name]["value"], originals[name]["value"].shape, num_samples)
        for name in given_names(prototype, guide_trace)
    }
    indices = {name: site["value"] for name, site in nodes.items() if site["type"] == "sample" and is_subsample(site)}
    return values, indices


def single_run(call: ModelCall, guide_trace: Trace, prototype: Trace) -> Trace:
    """A run of the model at the first of the draws in a trace of its guide.

    Arguments:
        call: The model, perhaps with other arguments than those of the prototype.
        guide_trace: With the draws on the left.
        prototype: A trace of a single run, of which a site may have had another size.
    """
    nodes: dict[str, Any] = dict(guide_trace.nodes)
    originals: dict[str, Any] = dict(prototype.nodes)
    first = Trace()
    for name in given_names(prototype, guide_trace):
        site, shape = nodes[name], originals[name]["value"].shape
        value = site["value"][0]
        # The dimensions on the left that plates of other sites take are 1.
        value = value.reshape(value.shape[value.dim() - len(shape) :])
        first.add_node(name, **{**site, "value": value})
    for name, site in nodes.items():
        if site["type"] == "sample" and is_subsample(site):
            first.add_node(name, **site)
    with quiet_trace():
        return poutine.trace(poutine.replay(call.model, trace=first)).get_trace(*call.args, **call.kwargs)
