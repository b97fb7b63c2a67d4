"""The guides that every test of a guide runs over; a new guide adds its row here."""

import functools

import pytest
from pyro.infer import (
    SVI,
    Trace_ELBO,
)
from pyro.optim import ClippedAdam

import pyro_flowguides as fg


class StudentTFlow(fg.AutoFlow):
    """The base with parameters of its own, as a guide among the others."""

    def __init__(self, model, **options):
        super().__init__(model, base="student_t", **options)


NORMAL_GUIDES = {
    "flow": fg.AutoFlow,
    "coupling": fg.AutoCoupling,
    "iaf": fg.AutoIAF,
    "planar": fg.AutoPlanar,
    "radial": fg.AutoRadial,
    "residual": fg.AutoResidual,
    "spline": fg.AutoSpline,
    "sylvester": fg.AutoSylvester,
}


GUIDES = {**NORMAL_GUIDES, "student_t": StudentTFlow}


every_guide = pytest.mark.parametrize("Guide", GUIDES.values(), ids=GUIDES)


every_normal_guide = pytest.mark.parametrize("Guide", NORMAL_GUIDES.values(), ids=NORMAL_GUIDES)


Y = [0.3, 1.4, 2.2, 0.7, 1.9]


def small(Guide):
    """The guide with two layers, where the time is that of recording or of running them one by one."""
    if Guide in (fg.AutoFlow, StudentTFlow):
        return functools.partial(Guide, flow=functools.partial(fg.flows.coupling, num_layers=2))
    return functools.partial(Guide, num_layers=2)


def train(model, guide, *args, steps=200, lr=0.02, decay=1.0, loss=None):
    loss = loss or Trace_ELBO(num_particles=32, vectorize_particles=True)
    svi = SVI(
        model, guide, ClippedAdam({"lr": lr, "lrd": decay ** (1 / steps) if steps else 1.0, "clip_norm": 1e9}), loss
    )
    return [svi.step(*args) for _ in range(steps)]
