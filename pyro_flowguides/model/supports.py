"""Supports that depend on other latents, such as that of ``b ~ Uniform(0, a)``: they are those of the draw's own run.

The model is run as far as the last such site. Every latent gets its value from its unconstrained point, by the map to the support
that its site has in this run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to, constraints

from .call import ModelCall
from .latents import Latents
from .sites import quiet_trace, unchanged_random_state


class _Reached(Exception):
    """The run has come to the last site that is asked for."""


class _PointsInSupports(Messenger):
    """Gives every latent site the value that its own support makes of an unconstrained point.

    Arguments:
        points: The unconstrained values by site.
        wanted: The sites whose supports are kept in ``found``; the run ends when it has all of them.
    """

    def __init__(self, points: Mapping[str, Tensor], wanted: Collection[str]) -> None:
        super().__init__()
        self.points, self.wanted = points, wanted
        self.found: dict[str, constraints.Constraint] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if msg["is_observed"] or name not in self.points:
            return
        support = msg["fn"].support
        msg["value"], msg["done"] = biject_to(support)(self.points[name]), True
        if name in self.wanted:
            self.found[name] = support
        if len(self.found) == len(self.wanted):
            raise _Reached


def mark_varying(latents: Latents, call: ModelCall, trace: Any) -> Latents:
    """The same latents, which know whose support depends on other latents.

    Only a support with tensors for bounds can; where there is one, the model is run once more, at other values.

    Arguments:
        latents: All latents of the model.
        call: The model with its arguments.
        trace: The trace that the latents are of.

    Raises:
        ValueError: if such a site is in a plate that takes a part of its elements.
    """
    nodes = dict(trace.nodes)
    bounded = {site.name: nodes[site.name]["fn"].support for site in latents.sites}
    bounded = {name: support for name, support in bounded.items() if any(True for _ in _bounds(support))}
    if not bounded:
        return latents
    # Other values than those of the trace, of every latent.
    points = {site.name: point + 0.7 for site, point in latents.unpack(latents.init_loc)}
    with quiet_trace(), unchanged_random_state():
        found = _supports_at(call, points, bounded)
    varying = {name for name, support in found.items() if not _same(support, bounded[name])}
    if local := sorted(varying & set(latents.subsampled_plates.values())):
        raise ValueError(
            f"the support of latent site '{local[0]}' depends on other latents, and the site is in a plate that takes a part of "
            "its elements; give the site a common support, such as Uniform(0, 1), and map its value to the element's own inside "
            "the model"
        )
    return replace(latents, sites=tuple(replace(site, varies=site.name in varying) for site in latents.sites))


def at(latents: Latents, call: ModelCall, x: Tensor) -> Latents:
    """The same latents, whose maps are to the supports that they have at these points.

    Arguments:
        latents: All latents of the model.
        call: The model with its arguments.
        x: Points ``batch_shape + (dim,)``; the batch shape is that of :meth:`Latents.unpack`, without ``leading``, and so is that
            of the values that the maps take.

    Raises:
        RuntimeError: if the model is None, as in a guide that comes from a pickle.
    """
    varying = {site.name for site in latents.sites if site.varies}
    if not varying:
        return latents
    if call.model is None:
        raise RuntimeError(
            f"the support of site '{min(varying)}' depends on other latents, for which a guide runs its model; a guide that "
            "comes from a pickle has none. Make a guide of the model, guide.setup(*args), and load the state dict into it"
        )
    with poutine.block():
        found = _supports_at(call, {site.name: point for site, point in latents.unpack(x)}, varying)
    sites = [replace(site, transform=biject_to(found[site.name])) if site.varies else site for site in latents.sites]
    return replace(latents, sites=tuple(sites))


def _supports_at(
    call: ModelCall, points: Mapping[str, Tensor], wanted: Collection[str]
) -> dict[str, constraints.Constraint]:
    run = _PointsInSupports(points, wanted)
    try:
        with run:
            call.without_initial_values()
    except _Reached:
        pass
    return run.found


def _bounds(support: constraints.Constraint) -> Iterator[Tensor]:
    """The tensors that a support holds."""
    for value in vars(support).values():
        if isinstance(value, constraints.Constraint):
            yield from _bounds(value)
        elif isinstance(value, Tensor):
            yield value


def _same(first: constraints.Constraint, second: constraints.Constraint) -> bool:
    pairs = zip(_bounds(first), _bounds(second), strict=True)
    return all(torch.equal(*torch.broadcast_tensors(one, other)) for one, other in pairs)
