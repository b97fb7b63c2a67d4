"""The configurations of a run: guides with their defaults, and the default guide with one change."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pyro_flowguides as fg


@dataclass(frozen=True)
class Configuration:
    """A guide and the options of its fit."""

    guide: Callable
    options: dict[str, Any] = field(default_factory=dict)


def _with_flow(flow: Callable, **options: Any) -> Configuration:
    return Configuration(functools.partial(fg.AutoFlow, flow=flow), options)


def _coupling(**options: Any) -> Configuration:
    """Couplings for an ablation; every ablation has the same number of steps."""
    return _with_flow(functools.partial(fg.flows.coupling, **options), num_steps=3000)


def _mixed(dim: int) -> fg.transforms.FlowTransform:
    """Couplings, then an autoregressive layer in the order of the model."""
    return fg.transforms.Compose([fg.flows.coupling(dim, num_layers=8), fg.flows.iaf(dim, num_layers=1)])


def _same_halves(dim: int) -> fg.transforms.FlowTransform:
    """The couplings of the recipe for many dimensions, with the same halves in every layer."""
    return fg.transforms.Compose(
        fg.transforms.AffineCoupling(dim, flip=bool(layer % 2), hidden_dims=(64, 32)) for layer in range(16)
    )


GUIDES: dict[str, Configuration] = {
    "default": Configuration(fg.AutoFlow),
    "coupling": Configuration(fg.AutoCoupling),
    "iaf": Configuration(fg.AutoIAF),
    "planar": Configuration(fg.AutoPlanar),
    "radial": Configuration(fg.AutoRadial),
    "residual": Configuration(fg.AutoResidual),
    "spline": Configuration(fg.AutoSpline),
    "student_t": Configuration(functools.partial(fg.AutoFlow, base="student_t")),
    "sylvester": Configuration(fg.AutoSylvester),
    "normal": Configuration(AutoNormal),
    "mvn": Configuration(AutoMultivariateNormal),
}
ABLATIONS: dict[str, Configuration] = {
    "3000_steps": _coupling(),
    "6000_steps": Configuration(fg.AutoFlow, {"num_steps": 6000}),
    "1024_particles": Configuration(fg.AutoFlow, {"num_steps": 3000, "num_particles": 1024}),
    "64_particles": Configuration(fg.AutoFlow, {"num_steps": 3000, "num_particles": 64}),
    "no_whitening": Configuration(fg.AutoFlow, {"num_steps": 3000, "whiten": None}),
    "constant_rate": Configuration(fg.AutoFlow, {"num_steps": 3000, "schedule": "constant"}),
    "rate_3e-3": Configuration(fg.AutoFlow, {"num_steps": 3000, "optim": functools.partial(torch.optim.Adam, lr=3e-3)}),
    "6_layers": _coupling(num_layers=6),
    "14_layers": _coupling(num_layers=14),
    "64_wide": _coupling(hidden_dims=(64, 64)),
    "bound_5": _coupling(log_scale_bound=5.0),
    "same_halves": _with_flow(_same_halves, num_steps=3000),
    "mixed": _with_flow(_mixed, num_steps=3000),
    "glow": _with_flow(fg.flows.glow, num_steps=3000),
    "iaf_3000_steps": Configuration(fg.AutoIAF, {"num_steps": 3000}),
    "student_t_3000_steps": Configuration(functools.partial(fg.AutoFlow, base="student_t"), {"num_steps": 3000}),
}
CONFIGURATIONS = GUIDES | ABLATIONS
