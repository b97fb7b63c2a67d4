"""Latents inside plates: whole plates in a guide, the indices of a minibatch in the model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.tensor_utils import periodic_repeat
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import constraints

from .sites import is_subsample, is_subsampled, quiet_trace


def plate_indices(plates: Mapping[str, pyro.plate]) -> dict[str, Tensor]:
    """The elements that each subsampled plate takes."""
    return {
        name: plate.indices
        for name, plate in plates.items()
        if plate.subsample_size is not None and plate.subsample_size != plate.size
    }


def select(value: Tensor, frames: Sequence[Any], indices: Mapping[str, Tensor], event_dim: int) -> Tensor:
    """The part of a value over whole plates that lies at these indices.

    Arguments:
        value: Of shape ``batch_shape + event_shape``, with whole plates in the batch shape.
        frames: The plates of the site.
        indices: Elements to take, by the name of the plate; plates without any stay whole.
        event_dim: The number of event dimensions.
    """
    for frame in frames:
        if frame.name in indices:
            value = value.index_select(frame.dim - event_dim, indices[frame.name].to(value.device))
    return value


def cover_whole_plates(site: Any) -> None:
    """Extends a traced latent site, in place, from a minibatch to all elements of its plates.

    The value is repeated; of the distribution, what holds for every element is kept: its support and its shape.

    Raises:
        ValueError: if the support is another one for every element.
    """
    frames = [frame for frame in site["cond_indep_stack"] if is_subsampled(frame)]
    if not frames:
        return
    fn, value = site["fn"], site["value"]
    support, batch_shape = fn.support, list(fn.batch_shape)
    for frame in frames:
        axis = frame.dim - fn.event_dim
        value = periodic_repeat(value, frame.full_size, axis)
        batch_shape[frame.dim] = frame.full_size
        try:
            support = same_along(support, axis)
        except ValueError as error:
            raise ValueError(
                f"the support of latent site '{site['name']}' ({fn.support}) is not the same for all elements of plate "
                f"'{frame.name}', of which a minibatch shows only {frame.size} of {frame.full_size}; give the site a common "
                "support and map its value to the element's own inside the model, or run the model on the whole plate"
            ) from error
    site["value"] = value.contiguous()
    site["fn"] = dist.ImproperUniform(support, torch.Size(batch_shape), fn.event_shape)


def same_along(support: constraints.Constraint, axis: int) -> constraints.Constraint:
    """A constraint whose bounds have a single entry along an axis.

    Raises:
        ValueError: if a bound has different entries there.
    """
    new = copy.copy(support)
    for name, bound in vars(support).items():
        if isinstance(bound, constraints.Constraint):
            setattr(new, name, same_along(bound, axis))
        elif isinstance(bound, Tensor) and bound.dim() >= -axis:
            first = bound.narrow(axis, 0, 1)
            if not bool((bound == first).all()):
                raise ValueError(f"the bounds differ along dimension {axis}")
            setattr(new, name, first)
    return new


def trace_plates(model: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The sites that hold the indices of a model's plates, by the name of the plate."""
    with quiet_trace():
        trace = poutine.trace(model).get_trace(*args, **kwargs)
    return subsample_sites(trace)


def subsample_sites(trace: Trace) -> dict[str, Any]:
    """The sites of a trace that hold the indices of subsampled plates."""
    nodes: dict[str, Any] = dict(trace.nodes)
    return {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample" and is_subsample(site) and len(site["value"]) != site["fn"].size
    }


def has_given_indices(site: Any) -> bool:
    """Whether the indices of a plate are an argument of it (``subsample=``), rather than drawn by it."""
    return site["fn"].subsample_size is None


def minibatches(sites: Mapping[str, Any], whole: Collection[str]) -> list[dict[str, Tensor]]:
    """Fixed sets of indices at which the mean of a subsampled log-density is to be taken.

    Plates named in ``whole`` are covered by consecutive blocks, the last of which overlaps the one before where the sizes do
    not divide; every other plate keeps the indices it has.
    """
    choices = []
    for name, site in sites.items():
        if has_given_indices(site):
            continue
        blocks = [site["value"]]
        if name in whole:
            size, count = site["fn"].size, len(site["value"])
            starts = [*range(0, size - count, count), size - count]
            blocks = [torch.arange(start, start + count, device=site["value"].device) for start in starts]
        choices.append([(name, block) for block in blocks])
    return [dict(combination) for combination in itertools.product(*choices)]


def signature(*arguments: Any) -> Any:
    """What the structure of a model may depend on in its arguments: shapes, dtypes, devices, whole numbers and strings."""
    return tuple(_signature(argument) for argument in arguments)


def _signature(argument: Any) -> Any:
    if isinstance(argument, Mapping):
        return tuple(
            (name, _signature(value)) for name, value in sorted(argument.items(), key=lambda item: str(item[0]))
        )
    if isinstance(argument, (list, tuple)):
        return tuple(_signature(value) for value in argument)
    if hasattr(argument, "shape"):
        return tuple(argument.shape), getattr(argument, "dtype", None), getattr(argument, "device", None)
    return argument if isinstance(argument, (int, str)) else type(argument)
