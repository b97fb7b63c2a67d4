"""What is fitted: guides with their defaults, and the default guide with one thing changed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pyro_flowguides as fg


@dataclass(frozen=True)
class Recipe:
    """A guide and the options of its fit."""

    guide: Callable
    options: dict[str, Any] = field(default_factory=dict)


def _with_flow(flow: Callable, **options: Any) -> Recipe:
    return Recipe(functools.partial(fg.AutoFlow, flow=flow), options)


def _coupling(**options: Any) -> Recipe:
    """For ablations: a budget that is the same for all."""
    return _with_flow(functools.partial(fg.flows.coupling, **options), num_steps=3000)


def _mixed(dim: int) -> fg.transforms.FlowTransform:
    """Couplings, then an autoregressive layer in the order of the model."""
    return fg.transforms.Compose([fg.flows.coupling(dim, num_layers=8), fg.flows.iaf(dim, num_layers=1)])


def _same_halves(dim: int) -> fg.transforms.FlowTransform:
    """The couplings of many dimensions with the same halves throughout."""
    return fg.transforms.Compose(
        fg.transforms.AffineCoupling(dim, flip=bool(layer % 2), hidden_dims=(64, 32)) for layer in range(16)
    )


GUIDES: dict[str, Recipe] = {
    "default": Recipe(fg.AutoFlow),
    "coupling": Recipe(fg.AutoCoupling),
    "iaf": Recipe(fg.AutoIAF),
    "planar": Recipe(fg.AutoPlanar),
    "radial": Recipe(fg.AutoRadial),
    "residual": Recipe(fg.AutoResidual),
    "spline": Recipe(fg.AutoSpline),
    "student_t": Recipe(functools.partial(fg.AutoFlow, base="student_t")),
    "sylvester": Recipe(fg.AutoSylvester),
    "normal": Recipe(AutoNormal),
    "mvn": Recipe(AutoMultivariateNormal),
}
ABLATIONS: dict[str, Recipe] = {
    "3000_steps": _coupling(),
    "6000_steps": Recipe(fg.AutoFlow, {"num_steps": 6000}),
    "1024_particles": Recipe(fg.AutoFlow, {"num_steps": 3000, "num_particles": 1024}),
    "64_particles": Recipe(fg.AutoFlow, {"num_steps": 3000, "num_particles": 64}),
    "no_whitening": Recipe(fg.AutoFlow, {"num_steps": 3000, "whiten": None}),
    "constant_rate": Recipe(fg.AutoFlow, {"num_steps": 3000, "schedule": "constant"}),
    "rate_3e-3": Recipe(fg.AutoFlow, {"num_steps": 3000, "optim": functools.partial(torch.optim.Adam, lr=3e-3)}),
    "6_layers": _coupling(num_layers=6),
    "14_layers": _coupling(num_layers=14),
    "64_wide": _coupling(hidden_dims=(64, 64)),
    "bound_5": _coupling(bound=5.0),
    "same_halves": _with_flow(_same_halves, num_steps=3000),
    "mixed": _with_flow(_mixed, num_steps=3000),
    "glow": _with_flow(fg.flows.glow, num_steps=3000),
    "iaf_3000_steps": Recipe(fg.AutoIAF, {"num_steps": 3000}),
    "student_t_3000_steps": Recipe(functools.partial(fg.AutoFlow, base="student_t"), {"num_steps": 3000}),
}
RECIPES = GUIDES | ABLATIONS
