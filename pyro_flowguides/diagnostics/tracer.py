"""Running a model with its guide for many draws at once: one vectorised pass, or a loop where that is impossible."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.poutine import Trace
from torch import Tensor

from ..checks import warn
from ..model.call import ModelCall
from ..model.missing import FillMissing
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
)


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

    Whether the pair can be vectorised over draws (an extra plate on the left) is found out once, by comparing two draws with
    runs of their own. Where it cannot, every draw is a run of its own, and one warning says so.

    Arguments:
        call: The model with the arguments of model and guide.
        guide: The guide, or values in its place.

    Attributes:
        guide_prototype: The trace of one run of the guide.
        model_prototype: The trace of one run of the model.
        max_plate_nesting: The number of batch dimensions that the plates of both take.
        vectorizes: Whether many draws are made in one pass.
    """

    def __init__(self, call: ModelCall, guide: Callable | GivenValues) -> None:
        self.call = call
        self.guide = guide
        self.max_plate_nesting = 0
        with quiet_trace():
            self.guide_prototype, self.model_prototype = self._trace_pair()
        self.max_plate_nesting = max_plate_nesting(self.guide_prototype, self.model_prototype)
        self.vectorizes = self._try_to_vectorize()

    def traces(self, num_samples: int, first: int = 0) -> Iterator[tuple[Trace, Trace, int]]:
        """Pairs of guide and model trace with the number of draws in each; together ``num_samples``.

        Arguments:
            num_samples: The number of draws.
            first: The number of the first draw, which selects among given values.
        """
        if self.vectorizes:
            yield *self._trace_pair(num_samples, first), num_samples
        else:
            for i in range(first, first + num_samples):
                yield *self._trace_pair(first=i), 1

    def _trace_pair(self, num_samples: int | None = None, first: int = 0) -> tuple[Trace, Trace]:
        args, kwargs = self.call.args, self.call.kwargs
        if isinstance(self.guide, GivenValues):
            guide = self.guide.guide(first, num_samples, self.max_plate_nesting)
        else:
            guide = self._in_plate(self.guide, num_samples)
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        # The plate is inside replay: it does not expand a value that is given already.
        model = FillMissing()(poutine.replay(self._in_plate(self.call.model, num_samples), trace=guide_trace))
        return guide_trace, poutine.trace(model).get_trace(*args, **kwargs)

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
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            # Pyro appends a table of all sites to an error within a model.
            reason = " ".join(str(error).split("Trace Shapes:")[0].split())
            warn(
                "The model cannot be vectorised over draws, so that every draw is a run of its own, which is slow. Write it "
                "so that extra batch dimensions on the left of every latent are carried through: a[..., group] for a[group], "
                "beta @ X.T for X @ beta, and data in a plate; see docs/how_to/vectorise.md. The first "
                f"error was: {reason[:300]}"
            )
            return False
        return True

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
            if not torch.allclose(together[i], log_prob, rtol=1e-4, atol=1e-3, equal_nan=True):
                raise ValueError(
                    f"a draw has log-probability {together[i].item():.6g} among others and {log_prob.item():.6g} alone: the "
                    "model mixes the draws"
                )
            for name, site in deterministic_sites(alone):
                value = per_draw(nodes[name]["value"], site["value"].shape, num_samples)[i]
                if not torch.allclose(value.double(), site["value"].double(), rtol=1e-3, atol=1e-4, equal_nan=True):
                    raise ValueError(f"deterministic site '{name}' has other values among other draws than alone")


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
