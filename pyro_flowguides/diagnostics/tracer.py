"""Running a model with its guide many times at once: one vectorised pass, or a loop where that is impossible."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace

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
