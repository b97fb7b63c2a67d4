"""What running the model adds to its posterior: new data at every draw, the prior with its data, the model's arguments."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .arviz import Group
from .draws import Draws
from .replay import predict


@dataclass(frozen=True)
class Conditioned:
    """A model with the arguments that it was fitted on."""

    model: Callable
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the model as it was written."""
        model = _as_written(self.model)
        return getattr(model, "__name__", type(model).__name__)


def _as_written(model: Callable) -> Callable:
    """The user's function or module under the handlers of Pyro that are wrapped around it, by a guide for example."""
    while isinstance(model, functools.partial) and model.args and isinstance(model.args[0], Messenger):
        model = model.args[1]
    return model


def model_groups(
    conditioned: Conditioned, chains: Sequence[Draws], *, predictive: bool = True, prior: bool = True
) -> dict[str, Group]:
    """The groups posterior_predictive, prior, prior_predictive and constant_data.

    New data are sampled for masked entries too. Where the data are subsampled there are no sampled groups, since every run
    would take other elements. What cannot be sampled, an improper prior for example, is left out with a warning.

    Arguments:
        conditioned: The model.
        chains: Draws of its posterior, all of the same number.
        predictive: Whether to sample new data at every draw.
        prior: Whether to sample as many draws as a chain has from the prior.
    """
    first = chains[0]
    groups = {}
    constant = constant_data(conditioned, first.observed)
    if constant:
        groups["constant_data"] = Group(constant, sample_dims=())
    if first.minibatch_size is not None:
        return groups
    if predictive and first.observed:
        values = {name: torch.cat([chain.values[name] for chain in chains]) for name in first.values}
        _, data = _sample(conditioned, values, len(first) * len(chains), "posterior_predictive", "predictive")
        if data:
            groups["posterior_predictive"] = _group(data, len(chains), first.dims)
    if prior:
        latents, data = _sample(conditioned, {}, len(first), "prior", "prior")
        groups |= {
            name: _group(sampled, 1, first.dims)
            for name, sampled in (("prior", latents), ("prior_predictive", data))
            if sampled
        }
    return groups


def constant_data(conditioned: Conditioned, observed: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The arguments of the model that are numbers and not observed, by the names of its parameters."""
    model = _as_written(conditioned.model)
    try:
        # The call of a module has no names for its arguments, its forward has.
        signature = inspect.signature(model.forward if isinstance(model, torch.nn.Module) else model)
        bound = signature.bind(*conditioned.args, **conditioned.kwargs).arguments
    except (TypeError, ValueError):
        bound = dict(conditioned.kwargs)
    data = [_numpy(value) for value in observed.values()]
    arrays = {
        name: _numpy(value) if isinstance(value, Tensor) else np.asarray(value)
        for name, value in bound.items()
        if isinstance(value, (Tensor, np.ndarray, int, float))
    }
    return {
        name: array
        for name, array in arrays.items()
        if array.dtype.kind in "biuf" and not any(np.array_equal(array, value) for value in data)
    }


def _sample(
    conditioned: Conditioned, values: Mapping[str, Tensor], num_samples: int, group: str, option: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    try:
        with pyro.validation_enabled(False):
            return predict(conditioned.model, values, num_samples, conditioned.args, conditioned.kwargs)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        warnings.warn(
            f"to_arviz: there is no group {group}, since a site of the model cannot be sampled; {option}=False leaves it out "
            f"without a warning. The error was {type(error).__name__}: {' '.join(str(error).split())[:200]}",
            stacklevel=5,
        )
        return {}, {}


def _group(values: Mapping[str, Tensor], num_chains: int, dims: Mapping[str, Sequence[str]]) -> Group:
    return Group(
        {name: _numpy(value).reshape(num_chains, -1, *value.shape[1:]) for name, value in values.items()},
        {name: dims[name] for name in values if name in dims},
    )


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
