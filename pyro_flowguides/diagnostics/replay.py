"""Running a model at values that are at hand instead of a guide's: draws of MCMC, predictive draws, draws of the prior."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

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
from .sampling import batch_size_within_memory, draw_traced
from .tracer import Tracer


class ReplayTracer(Tracer):
    """Traces a model at given values of its latent sites, one draw after the other; sites not given are sampled.

    Arguments:
        model: The model.
        values: By site, ``(S,) + shape``.
        args: The positional arguments of the model.
        model_kwargs: The keyword arguments of the model.
    """

    def __init__(
        self, model: Callable, values: Mapping[str, Tensor], args: tuple, model_kwargs: Mapping[str, Any] | None
    ) -> None:
        self.values = values
        self._position = 0
        super().__init__(model, model, args, model_kwargs)
        # The runs that find out whether the model can be vectorised have taken some.
        self._position = 0

    def _trace_pair(self, num_draws: int | None = None) -> tuple[Trace, Trace]:
        given = {name: self._next(name, value, num_draws) for name, value in self.values.items()}
        self._position += num_draws or 1
        model = _Given(given)(self.model if num_draws is None else self._in_plate(self.model, num_draws))
        model_trace = poutine.trace(model).get_trace(*self.args, **self.model_kwargs)
        guide_trace = Trace()
        for name, site in latent_sites(model_trace):
            guide_trace.add_node(name, **site)
        return guide_trace, model_trace

    def _next(self, name: str, value: Tensor, num_draws: int | None) -> Tensor:
        """The values of the next draws, with room for all plates between the dimension of draws and the site's own."""
        # Around the end: a test of vectorisation may need more draws than there are.
        index = torch.arange(self._position, self._position + (num_draws or 1), device=value.device) % len(value)
        if num_draws is None:
            return value[index[0]]
        nodes: dict[str, Any] = dict(self.model_prototype.nodes)
        padding = self.max_plate_nesting - len(nodes[name]["fn"].batch_shape)
        return value[index].reshape(num_draws, *[1] * padding, *value.shape[1:])


class _Given(Messenger):
    """Gives latent sites values, which stay latent."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class _SampleAnew(Messenger):
    """Samples every site, data included, whatever has given it a value: Pyro's guides keep models that give initial values.

    Factors and deterministic sites are no draws.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if not is_deterministic(msg) and not isinstance(msg["fn"], Unit) and not is_subsample(msg):
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


@torch.no_grad()
def draws_at(
    model: Callable, values: Mapping[str, Tensor], args: tuple, model_kwargs: Mapping[str, Any] | None, origin: str
) -> Draws:
    """The model's side of :class:`Draws`, with log-likelihoods, at values that no guide of ours has drawn.

    Arguments:
        model: The model.
        values: By latent site, ``(S,) + shape``.
        args: The positional arguments of the model.
        model_kwargs: The keyword arguments of the model.
        origin: Where the values come from, in words that follow "they".

    Raises:
        ValueError: if a latent site has no values, or values have no site: they come from another model, or a discrete site
            has been summed out.
    """
    sites = {name for name, _ in latent_sites(_trace_at_first(model, values, args, model_kwargs))}
    if sites != set(values):
        missing, unknown = sorted(sites - set(values)), sorted(set(values) - sites)
        raise ValueError(
            "these values are not draws of this model: "
            + "; ".join(
                [f"site '{name}' has none" for name in missing]
                + [f"the model has no site '{name}'" for name in unknown]
            )
        )
    tracer = ReplayTracer(model, values, args, model_kwargs)
    num_draws = len(next(iter(values.values())))
    draws = draw_traced(tracer, num_draws, log_likelihood=True)
    return dataclasses.replace(draws, log_q=torch.full_like(draws.log_p, torch.nan), no_elbo=origin)


@torch.no_grad()
def predict(
    model: Callable,
    values: Mapping[str, Tensor],
    num_samples: int,
    args: tuple,
    model_kwargs: Mapping[str, Any] | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Runs the model with its data sampled anew: at draws of the posterior, or, with no values at all, from the prior.

    Arguments:
        model: The model.
        values: By latent site, ``(S,) + shape``, or empty.
        num_samples: How many runs, S.
        args: The positional arguments of the model.
        model_kwargs: The keyword arguments of the model.

    Returns:
        The latent and deterministic sites, and the data, all with the draws as their first dimension.
    """
    data = {name for name, _ in observed_sites(_trace_at_first(model, values, args, model_kwargs))}
    with warnings.catch_warnings():
        # Whoever made the values has been told already that the model is run draw by draw.
        warnings.filterwarnings("ignore", "The model cannot be vectorised", UserWarning)
        tracer = ReplayTracer(_SampleAnew()(model), values, args, model_kwargs)
    prototype: dict[str, Any] = dict(tracer.model_prototype.nodes)
    batch_size = batch_size_within_memory(tracer, num_samples)
    sampled: dict[str, list[Tensor]] = {}
    for start in range(0, num_samples, batch_size):
        for _, trace, count in tracer.traces(min(batch_size, num_samples - start)):
            for name, site in tensor_sites(trace):
                if not isinstance(site["fn"], Unit):
                    value = per_draw(site["value"], prototype[name]["value"].shape, count)
                    sampled.setdefault(name, []).append(value)
    together = {name: torch.cat(parts) for name, parts in sampled.items()}
    return (
        {name: value for name, value in together.items() if name not in data},
        {name: value for name, value in together.items() if name in data},
    )


@torch.no_grad()
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


def _trace_at_first(
    model: Callable, values: Mapping[str, Tensor], args: tuple, model_kwargs: Mapping[str, Any] | None
) -> Trace:
    """The model at the first of the values."""
    with quiet_trace():
        first = _Given({name: value[0] for name, value in values.items()})
        return poutine.trace(first(model)).get_trace(*args, **(model_kwargs or {}))
