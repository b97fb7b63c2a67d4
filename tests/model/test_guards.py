"""Nothing that a graph has baked in goes stale: all that a model can see outside of its arguments may change."""

import types

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from svi_cases import at_two, compiled, scaled

from pyro_flowguides import CompiledSVI

SCALE = 1.0
settings = types.ModuleType("settings_of_the_test")
settings.scale = 1.0


class WithAttribute:
    scale = 1.0

    def __init__(self):
        self.own = 1.0

    def by_class(self):
        pyro.sample("x", dist.Normal(0.0, self.scale))

    def by_instance(self):
        pyro.sample("x", dist.Normal(0.0, self.own))

    def __call__(self):
        pyro.sample("x", dist.Normal(0.0, SCALE))


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self):
        pyro.sample("x", dist.Normal(0.0, self.scale if self.training else 3.0))


def closure_float():
    scale = 1.0

    def change():
        nonlocal scale
        scale = 3.0

    return scaled(lambda: scale), change


def closure_list():
    values = [1.0]
    return scaled(lambda: values[0]), lambda: values.__setitem__(0, 3.0)


def closure_dict():
    values = {"scale": 1.0}
    return scaled(lambda: values["scale"]), lambda: values.update(scale=3.0)


def closure_array():
    values = np.ones(1)
    return scaled(lambda: torch.as_tensor(values[0]).clone()), lambda: values.fill(3.0)


def closure_tensor_rebound():
    scale = torch.tensor(1.0)

    def change():
        nonlocal scale
        scale = torch.tensor(3.0)

    return scaled(lambda: scale), change


def closure_tensor_edited():
    scale = torch.tensor(1.0)
    return scaled(lambda: scale), lambda: scale.fill_(3.0)


def closure_tensor_folded():
    """The function of the tensor is a constant of the graph, computed once."""
    log_scale = torch.tensor(0.0)
    return scaled(lambda: log_scale.exp()), lambda: log_scale.fill_(np.log(3.0))


def global_variable():
    def change():
        global SCALE
        SCALE = 3.0

    return scaled(lambda: SCALE), change


def global_seen_by_a_method():
    def change():
        global SCALE
        SCALE = 3.0

    return WithAttribute(), change


def attribute_of_a_module_of_python():
    return scaled(lambda: settings.scale), lambda: setattr(settings, "scale", 3.0)


def attribute_of_the_instance():
    owner = WithAttribute()
    return owner.by_instance, lambda: setattr(owner, "own", 3.0)


def attribute_of_the_class():
    return WithAttribute().by_class, lambda: setattr(WithAttribute, "scale", 3.0)


def scale_of_a_handler():
    handler = poutine.scale(scale=1.0)

    def model():
        with handler:
            pyro.sample("x", dist.Normal(0.0, 1.0))

    return model, lambda: setattr(handler, "scale", 3.0)


def wrapped_in_a_handler():
    model = poutine.scale(scaled(lambda: 1.0), scale=1.0)
    handler = next(part for part in model.args if isinstance(part, poutine.scale_messenger.ScaleMessenger))
    return model, lambda: setattr(handler, "scale", 3.0)


def train_and_eval():
    module = Module()
    return module, lambda: module.eval()


def rebound_buffer():
    module = Module()
    return module, lambda: module.register_buffer("scale", torch.tensor(3.0))


CHANGES = [
    closure_float,
    closure_list,
    closure_dict,
    closure_array,
    closure_tensor_rebound,
    closure_tensor_edited,
    closure_tensor_folded,
    global_variable,
    global_seen_by_a_method,
    attribute_of_a_module_of_python,
    attribute_of_the_instance,
    attribute_of_the_class,
    scale_of_a_handler,
    wrapped_in_a_handler,
    train_and_eval,
    rebound_buffer,
]


@pytest.fixture
def restored(monkeypatch):
    monkeypatch.setitem(globals(), "SCALE", 1.0)
    monkeypatch.setattr(settings, "scale", 1.0)
    monkeypatch.setattr(WithAttribute, "scale", 1.0)


@pytest.mark.parametrize("make", CHANGES, ids=lambda make: make.__name__)
def test_what_changes_is_seen(make, restored):
    model, change = make()
    svi = CompiledSVI(model, at_two, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(), backend="replay")
    before = svi.step()
    assert before == pytest.approx(-float(dist.Normal(0.0, 1.0).log_prob(torch.tensor(2.0))))
    assert svi.step() == before
    change()
    changed = svi.step()
    assert changed == pytest.approx(Trace_ELBO().loss(model, at_two))
    assert changed != pytest.approx(before)
    assert svi.step() == changed
    assert svi.backend == "replay"


def test_an_object_given_as_an_argument_is_looked_into():
    given = types.SimpleNamespace(scale=1.0)

    def model(given):
        pyro.sample("x", dist.Normal(0.0, given.scale))

    svi = compiled(model, lambda given: at_two(), rate=0.0, backend="replay")
    before = svi.step(given)
    given.scale = 3.0
    assert svi.step(given) != pytest.approx(before)
