"""The groups of an ArviZ container: from draws alone, and from running their model again."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from ..checks import warn
from ..model.call import ModelCall
from ..model.log_density import LogDensity
from .arviz import Dims, Group
from .draws import Draws, to_numpy
from .replay import predict


def draws_groups(
    chains: Sequence[Draws], dims: Dims, sample_stats: Mapping[str, np.ndarray] | None = None
) -> dict[str, Group]:
    """The groups posterior, unconstrained_posterior, sample_stats, log_likelihood and observed_data.

    The sample_stats are ``lp``; ``log_q`` where a guide has made the draws; and ``log_weight``, smoothed and normalised, where
    they have weights. There is a log_likelihood where it was computed.

    Arguments:
        chains: Draws of independent fits, all of the same number; they become chains.
        dims: Names of dimensions by site; a site that names fewer than it has keeps its own names for the others.
        sample_stats: More statistics of the draws, ``(chain, draw)``.

    Raises:
        ValueError: if the chains are of different models.
    """
    first = chains[0]
    for i, chain in enumerate(chains):
        if _shapes(chain) != _shapes(first):
            raise ValueError(
                f"to_arviz: chain {i} is a fit of another model than chain 0: its sites are {_shapes(chain)} instead of "
                f"{_shapes(first)}"
            )
    names = {**first.dims, **completed_dims(first, dims)}

    def stacked(field_name: str) -> dict[str, np.ndarray]:
        return {
            name: np.stack([to_numpy(getattr(chain, field_name)[name]) for chain in chains])
            for name in getattr(first, field_name)
        }

    posteriors = [chain.posterior() for chain in chains]
    posterior = {name: np.stack([each[name] for each in posteriors]) for name in posteriors[0]}
    groups = {
        "posterior": Group(posterior, names),
        "unconstrained_posterior": Group(
            stacked("unconstrained"),
            {
                name: _unconstrained_dims(
                    name, first.dims[name], names[name], first.values[name].shape[1:], value.shape[1:]
                )
                for name, value in first.unconstrained.items()
            },
        ),
        "sample_stats": Group({**_densities(chains), **(sample_stats or {})}),
    }
    if first.log_likelihood:
        groups["log_likelihood"] = Group(
            stacked("log_likelihood"),
            {name: names[name][: value.dim() - 1] for name, value in first.log_likelihood.items()},
        )
    if first.observed:
        groups["observed_data"] = Group({name: to_numpy(value) for name, value in first.observed.items()}, names, ())
    return groups


def completed_dims(draws: Draws, dims: Dims) -> dict[str, list[str]]:
    """The names that a user gives to dimensions, continued by the names from the plates where the user gives fewer."""
    return {name: [*given, *draws.dims.get(name, [])[len(given) :]] for name, given in dims.items()}


def model_groups(
    call: ModelCall, chains: Sequence[Draws], *, predictive: bool = True, prior: bool = True
) -> dict[str, Group]:
    """The groups posterior_predictive, prior, prior_predictive and constant_data.

    New data are sampled for masked entries too. Where the data are subsampled there are no sampled groups, since every run
    would take other elements. Groups that cannot be sampled, such as an improper prior, are left out with a warning.

    Arguments:
        call: The model with its arguments.
        chains: Draws of its posterior, all of the same number.
        predictive: Whether to sample new data at every draw.
        prior: Whether to sample as many draws as a chain has from the prior.
    """
    first = chains[0]
    groups = {}
    constant = constant_data(call, first.observed)
    if constant:
        groups["constant_data"] = Group(constant, sample_dims=())
    if first.minibatch_size is not None:
        return groups
    if predictive and first.observed:
        values = {name: torch.cat([chain.values[name] for chain in chains]) for name in first.values}
        _, data = _sample(call, values, len(first) * len(chains), "posterior_predictive", "predictive")
        if data:
            groups["posterior_predictive"] = _sampled_group(data, len(chains), first.dims)
    # A log density has no prior to draw from: its flat one has draws for the set-up of guides alone.
    if prior and not isinstance(call.as_written, LogDensity):
        latents, data = _sample(call, {}, len(first), "prior", "prior")
        groups |= {
            name: _sampled_group(sampled, 1, first.dims)
            for name, sampled in (("prior", latents), ("prior_predictive", data))
            if sampled
        }
    return groups


def stack_numbered(groups: Mapping[str, Group]) -> tuple[dict[str, Group], dict[str, list[int]]]:
    """Groups in which observed sites that are numbered are one variable, as leave-one-out cross-validation takes them.

    ``obs_0``, ``obs_1``, … of one shape, the sites of a loop over data, become ``obs`` with a dimension ``obs_number`` on the
    left, unless there is an ``obs`` already. This is done in log_likelihood, observed_data and the predictive groups.

    Arguments:
        groups: The groups by name.

    Returns:
        The groups, and the numbers along every new dimension.
    """
    observed = groups["observed_data"].variables if "observed_data" in groups else {}
    families: dict[str, dict[int, str]] = {}
    for name in observed:
        if match := re.fullmatch(r"(.+)_(\d+)", name):
            families.setdefault(match[1], {})[int(match[2])] = name
    taken = {name for group in groups.values() for name in group.variables}
    families = {
        base: {number: members[number] for number in sorted(members)}
        for base, members in families.items()
        if len(members) > 1 and base not in taken and len({observed[name].shape for name in members.values()}) == 1
    }
    result = dict(groups)
    for group_name in ("observed_data", "log_likelihood", "posterior_predictive", "prior_predictive"):
        if group_name in groups:
            result[group_name] = _with_stacked(groups[group_name], families)
    return result, {f"{base}_number": list(members) for base, members in families.items()}


def _with_stacked(group: Group, families: Mapping[str, Mapping[int, str]]) -> Group:
    variables, dims = dict(group.variables), dict(group.dims)
    for base, members in families.items():
        names = list(members.values())
        if all(name in variables for name in names):
            axis = len(group.sample_dims)
            dims[base] = [f"{base}_number", *dims.get(names[0], [])]
            variables[base] = np.stack([variables.pop(name) for name in names], axis)
    return replace(group, variables=variables, dims=dims)


def constant_data(call: ModelCall, observed: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The arguments of the model that are numbers and not observed, by the names of its parameters."""
    model: Any = call.as_written
    try:
        # The call of a module has no names for its arguments, its forward has.
        signature = inspect.signature(model.forward if isinstance(model, torch.nn.Module) else model)
        bound = signature.bind(*call.args, **call.kwargs).arguments
    except (TypeError, ValueError):
        bound = dict(call.kwargs)
    data = [to_numpy(value) for value in observed.values()]
    arrays = {
        name: to_numpy(value) if isinstance(value, Tensor) else np.asarray(value)
        for name, value in bound.items()
        if isinstance(value, (Tensor, np.ndarray, int, float))
    }
    return {
        name: array
        for name, array in arrays.items()
        if array.dtype.kind in "biuf" and not any(np.array_equal(array, value) for value in data)
    }


def _sample(
    call: ModelCall, values: Mapping[str, Tensor], num_samples: int, group: str, option: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    try:
        with pyro.validation_enabled(False):
            return predict(call, values, num_samples)
    # A model may raise anything at a draw of its prior; the fit is none the worse for it.
    except (Exception, SystemExit) as error:
        warn(
            f"to_arviz: there is no group {group}, since a site of the model cannot be sampled; {option}=False leaves it out "
            f"without a warning. The error was {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        )
        return {}, {}


def _sampled_group(values: Mapping[str, Tensor], num_chains: int, dims: Dims) -> Group:
    return Group(
        {
            name: to_numpy(value).reshape(num_chains, len(value) // num_chains, *value.shape[1:])
            for name, value in values.items()
        },
        {name: dims[name] for name in values if name in dims},
    )


def _shapes(draws: Draws) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape[1:]) for name, value in {**draws.values, **draws.deterministic}.items()}


def _densities(chains: Sequence[Draws]) -> dict[str, np.ndarray]:
    """The log-densities and log weights of every draw; the weights of a chain add up to 1."""
    statistics = {"lp": np.stack([to_numpy(chain.log_p) for chain in chains])}
    if not any(chain.elbo_error for chain in chains):
        statistics["log_q"] = np.stack([to_numpy(chain.log_q) for chain in chains])
        # Of a few draws alone there is no tail to smooth.
        if not any(chain.weights_error or chain.weights.error for chain in chains):
            statistics["log_weight"] = np.stack([chain.smoothed_log_weights for chain in chains])
    return statistics


def _unconstrained_dims(
    name: str, own: Sequence[str], dims: Sequence[str], shape: Sequence[int], unconstrained: Sequence[int]
) -> list[str]:
    """The names of an unconstrained value's dimensions: the names of its plates, and the site's own where the sizes agree."""
    kept = []
    for i, (size, unconstrained_size) in enumerate(zip(shape, unconstrained, strict=False)):
        is_plate = own[i] != f"{name}_dim_{i}"
        # A Cholesky factor has fewer dimensions as a vector: none of them is one of its own.
        if size != unconstrained_size or not (is_plate or len(shape) == len(unconstrained)):
            break
        kept.append(dims[i])
    return [*kept, *(f"{name}_unconstrained_dim_{i}" for i in range(len(kept), len(unconstrained)))]
