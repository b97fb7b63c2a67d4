"""Chains of draws with all that belongs to them, as groups for ArviZ."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
from torch import Tensor

from .. import __version__
from .arviz import Coords, Dims, Group, to_tree

if TYPE_CHECKING:
    from .draws import Draws


def export(
    chains: Sequence[Draws],
    *,
    more_groups: Mapping[str, Group] | None = None,
    sample_stats: Mapping[str, np.ndarray] | None = None,
    coords: Coords | None = None,
    dims: Dims | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """Draws of one model as ArviZ's ``InferenceData`` (0.x) or ``DataTree`` (1.x).

    Groups: posterior, unconstrained_posterior, sample_stats (``lp``; ``log_q`` where the draws are those of a guide, and the
    smoothed, normalised ``log_weight`` where they have one), log_likelihood where it was computed, observed_data, and more where
    given.

    Arguments:
        chains: Draws of independent fits, all of the same number; they become chains.
        more_groups: Groups that are not in the draws.
        sample_stats: More statistics of the draws, ``(chain, draw)``.
        coords: Labels along a dimension, by the name of its plate.
        dims: Names of dimensions, by site, where the plates do not give them.
        attrs: More attributes.

    Raises:
        ValueError: if the chains are of different models, names are given for an unknown site, or names clash, see
            :func:`pyro_flowguides.diagnostics.arviz.to_tree`.
    """
    first = chains[0]
    for i, chain in enumerate(chains):
        if _shapes(chain) != _shapes(first):
            raise ValueError(
                f"to_arviz: chain {i} is a fit of another model than chain 0: its sites are {_shapes(chain)} instead of "
                f"{_shapes(first)}"
            )
    # Where the user names fewer dimensions than there are, the others keep their names.
    given = {name: [*own, *first.dims.get(name, [])[len(own) :]] for name, own in (dims or {}).items()}
    names = {**first.dims, **given}

    def stacked(field_name: str) -> dict[str, np.ndarray]:
        return {
            name: np.stack([_numpy(getattr(chain, field_name)[name]) for chain in chains])
            for name in getattr(first, field_name)
        }

    groups = {
        "posterior": Group({**stacked("values"), **stacked("deterministic")}, names),
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
        groups["observed_data"] = Group({name: _numpy(value) for name, value in first.observed.items()}, names, ())
    for name, group in (more_groups or {}).items():
        groups[name] = dataclasses.replace(group, dims={**group.dims, **given})
    unknown = set(dims or {}) - {name for group in groups.values() for name in group.variables}
    if unknown:
        raise ValueError(f"to_arviz: dims names '{min(unknown)}', which is no site; there are {', '.join(names)}")
    library = {
        "creation_library": "pyro_flowguides",
        "creation_library_version": __version__,
        "creation_library_language": "Python",
        "inference_library": "pyro-ppl",
        "inference_library_version": pyro.__version__,
        "modeling_interface": "pyro_flowguides",
        "modeling_interface_version": __version__,
        "sampled_variables": [name.replace("/", ".") for name in first.values],
    }
    return to_tree(groups, coords, {**library, **(attrs or {})})


def _shapes(draws: Draws) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape[1:]) for name, value in {**draws.values, **draws.deterministic}.items()}


def _densities(chains: Sequence[Draws]) -> dict[str, np.ndarray]:
    """The log-densities and log weights of every draw; the weights of a chain add up to 1."""
    statistics = {"lp": np.stack([_numpy(chain.log_p) for chain in chains])}
    if not any(chain.no_elbo for chain in chains):
        statistics["log_q"] = np.stack([_numpy(chain.log_q) for chain in chains])
    if not any(chain.no_elbo or chain.no_weights for chain in chains):
        statistics["log_weight"] = np.stack([chain.smoothed_log_weights for chain in chains])
    return statistics


def _unconstrained_dims(
    name: str, own: Sequence[str], dims: Sequence[str], shape: Sequence[int], unconstrained: Sequence[int]
) -> list[str]:
    """The names of an unconstrained value's dimensions: those of its plates, and its own where they are of the same size."""
    kept = []
    for i, (size, unconstrained_size) in enumerate(zip(shape, unconstrained, strict=False)):
        is_plate = own[i] != f"{name}_dim_{i}"
        # With fewer dimensions, as a Cholesky factor has as a vector, none of its own is the same one.
        if size != unconstrained_size or not (is_plate or len(shape) == len(unconstrained)):
            break
        kept.append(dims[i])
    return [*kept, *(f"{name}_unconstrained_dim_{i}" for i in range(len(kept), len(unconstrained)))]


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
