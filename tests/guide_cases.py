"""The guides that every test of a guide runs over; a new guide adds its row here."""

import functools

import pytest

import pyro_flowguides as fg


class StudentTFlow(fg.AutoFlow):
    """The base with parameters of its own, as a guide among the others."""

    def __init__(self, model, **options):
        super().__init__(model, base="student_t", **options)


class ShortContinuousFlow(fg.AutoContinuousFlow):
    """Few ridges and steps, as many as a small model needs."""

    def __init__(self, model, *, num_layers=1, num_steps=2, **options):
        super().__init__(model, num_units=8, num_steps=num_steps, **options)


class Mixture(fg.AutoMixture):
    """Two components, whatever the number of modes."""

    def __init__(self, model, **options):
        super().__init__(model, num_components=2, **options)


NORMAL_GUIDES = {
    "flow": fg.AutoFlow,
    "continuous": ShortContinuousFlow,
    "coupling": fg.AutoCoupling,
    "iaf": fg.AutoIAF,
    "planar": fg.AutoPlanar,
    "radial": fg.AutoRadial,
    "residual": fg.AutoResidual,
    "spline": fg.AutoSpline,
    "sylvester": fg.AutoSylvester,
}


FLOWS = {**NORMAL_GUIDES, "student_t": StudentTFlow}
GUIDES = {**FLOWS, "mixture": Mixture}


every_guide = pytest.mark.parametrize("Guide", GUIDES.values(), ids=GUIDES)
# Guides that are one flow.
every_flow = pytest.mark.parametrize("Guide", FLOWS.values(), ids=FLOWS)


every_normal_guide = pytest.mark.parametrize("Guide", NORMAL_GUIDES.values(), ids=NORMAL_GUIDES)


def small(Guide):
    """The guide with two layers, where the time goes into recording them or running them one by one."""
    if Guide in (fg.AutoFlow, StudentTFlow, Mixture):
        return functools.partial(Guide, flow=functools.partial(fg.flows.coupling, num_layers=2))
    return functools.partial(Guide, num_layers=2)
