"""Couplings that are held back until their guide is whitened, or trained by ``fit``.

A guide that was not whitened starts far too narrow. All of its couplings widen it at once, the more so the more there are; before
long each sends a draw far out further than the one before it, and one gradient from there holds Adam up for a thousand steps.
So their networks see the bulk of their inputs alone, and move more slowly than location, scale and correlations do.

Behind a map that was fitted there is nothing to catch up with, and ``fit`` clips gradients from far out. There nothing is held
back: the tails of a posterior want networks without limits.
"""

from __future__ import annotations

import math

import torch

from .. import transforms as T
from ..transforms.coupling import REACH
from ..transforms.networks import MLP, SLOWDOWN, scale_parameters


def hold_back(flow: T.FlowTransform, held_back: bool) -> None:
    """Holds the couplings of a flow that has not been trained back, or lets them go; the flow stays the identity."""
    for coupling in _couplings(flow):
        if isinstance(coupling.conditioner, MLP):
            scale_parameters(
                coupling.conditioner, (SLOWDOWN if held_back else 1.0) / float(coupling.conditioner.slowdown)
            )
    follow(flow, held_back)


def follow(flow: T.FlowTransform, held_back: bool) -> None:
    """Takes the parameters of a flow, which came from elsewhere, for those of one that was held back, or was not."""
    reach, slowdown = torch.tensor(REACH if held_back else math.inf), torch.tensor(SLOWDOWN if held_back else 1.0)
    for coupling in _couplings(flow):
        coupling.load_state_dict({"reach": reach, "conditioner.slowdown": slowdown}, strict=False)


def _couplings(flow: T.FlowTransform) -> list[T.Coupling]:
    return [module for module in flow.modules() if isinstance(module, T.Coupling)]
