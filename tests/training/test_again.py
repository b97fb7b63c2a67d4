"""The call that makes a fit again, as text."""

import functools

import pyro
import pytest
import torch
from models import conjugate
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.training.again import call_text


def guide(y):
    pass


class Callable:
    __slots__ = ()

    def __call__(self, y):
        pass


class Module(torch.nn.Module):
    def forward(self, x, y):
        pass


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"model": conjugate, "guide": guide, "args": (1,)}, "fit(conjugate, guide, y)"),
        (
            {"model": conjugate, "guide": AutoNormal(conjugate), "args": (1,)},
            "fit(conjugate, AutoNormal(conjugate), y)",
        ),
        (
            {
                "model": conjugate,
                "guide": fg.AutoCoupling(conjugate, num_layers=4, base="student_t"),
                "args": (1,),
                "seed": 3,
            },
            "fit(conjugate, AutoCoupling(conjugate, num_layers=4, base='student_t'), y, seed=3)",
        ),
        (
            {
                "model": conjugate,
                "guide": fg.AutoSpline(conjugate),
                "args": (),
                "model_kwargs": {"y": 1},
                "num_restarts": 2,
            },
            "fit(conjugate, AutoSpline(conjugate), model_kwargs={'y': y}, num_restarts=2)",
        ),
        (
            {
                "model": Module(),
                "guide": Callable(),
                "args": (1, 2),
                "schedule": guide,
                "progress": False,
                "temper": "linear",
            },
            "fit(Module, Callable(Module), x, y, schedule=guide, temper='linear')",
        ),
        (
            {"model": functools.partial(conjugate), "guide": guide, "args": (1, 2), "loss": pyro.infer.Trace_ELBO()},
            "fit(partial, guide, y, argument_2, loss=Trace_ELBO(…))",
        ),
    ],
)
def test_calls(given, text):
    assert call_text(fg.fit, given) == text
