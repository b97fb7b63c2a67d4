"""One recorded run of a model for many draws: the loss and gradient of a model that broadcasts, and what makes a recording."""

import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from any_models import X, Y, linear
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_flowguides.compiled.losses import KL, PyroELBO, as_objective
from pyro_flowguides.compiled.recorded import BatchedCalls, find_recording
from pyro_flowguides.model.call import ModelCall


def product(x, y):
    """It does not broadcast: a matrix product, of which draws would be further columns."""
    return with_slopes(x, y, lambda slopes: x @ slopes)


def sum_of_products(x, y):
    """The same, with draws in front."""
    return with_slopes(x, y, lambda slopes: (x * slopes).sum(-1))


def with_slopes(x, y, predict):
    slopes = pyro.sample("slopes", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(predict(slopes) + level, scale), obs=y)


def guide_of(*laws):
    """Each of the two sites reparameterised or not."""

    def guide(x, y):
        first, second = laws
        loc = pyro.param("loc", torch.tensor([0.3, -0.2, 0.1]))
        pyro.sample("slopes", first(loc, pyro.param("width", torch.tensor(0.6))).to_event(1))
        pyro.sample("level", second(pyro.param("at", torch.tensor(0.2)), 0.9))

    return guide


@pytest.mark.parametrize(
    "laws",
    [
        (dist.Normal, dist.Normal),
        (NonreparameterizedNormal, NonreparameterizedNormal),
        (NonreparameterizedNormal, dist.Normal),
        (dist.Normal, NonreparameterizedNormal),
    ],
    ids=["reparameterised", "not", "the second", "the first"],
)
def test_loss_and_gradient_are_those_of_a_model_that_broadcasts(laws):
    """Under the same draws, score functions included; also at other data than those of the recording."""
    guide = guide_of(*laws)
    objective = as_objective(Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1))
    objective.find_recording(product, guide, (X, Y), {})
    plain = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    for x, y in ((X, Y), (X + 1, Y - 1), (X[:7], Y[:7])):
        found = []
        for loss in (
            lambda: objective.loss(product, guide, (x, y), {}),  # noqa: B023
            lambda: plain.differentiable_loss(sum_of_products, guide, x, y),  # noqa: B023
        ):
            pyro.set_rng_seed(1)
            value = loss()
            leaves = {name: pyro.param(name).unconstrained() for name in ("loc", "width", "at", "scale")}
            gradients = torch.autograd.grad(value, list(leaves.values()))
            found.append((value.detach(), dict(zip(leaves, gradients, strict=True))))
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-3)


def test_the_search_for_a_recording_leaves_nothing_behind():
    guide = AutoNormal(linear)
    state = torch.random.get_rng_state()
    calls = find_recording(ModelCall(linear, (X, Y)), guide)
    assert isinstance(calls, BatchedCalls)
    assert calls.arguments_vary
    assert calls.max_plate_nesting == 1
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not list(pyro.get_param_store().keys())
    assert guide.prototype_trace is None


def test_there_is_no_recording_of_what_broadcasts_or_cannot_be_copied():
    guide = guide_of(dist.Normal, dist.Normal)
    assert find_recording(ModelCall(sum_of_products, (X, Y)), guide) is None
    held = AutoNormal(linear)
    held.lock = threading.Lock()
    assert find_recording(ModelCall(linear, (X, Y)), held) is None


class Own(Trace_ELBO):
    pass


@pytest.mark.parametrize(
    ("elbo", "options", "is_recorded"),
    [
        (Trace_ELBO, {"num_particles": 2, "vectorize_particles": True}, True),
        (Trace_ELBO, {"num_particles": 1, "vectorize_particles": True}, False),
        (Trace_ELBO, {"num_particles": 2, "vectorize_particles": False}, False),
        (Own, {"num_particles": 2, "vectorize_particles": True}, False),
    ],
)
def test_which_losses_take_a_recording(elbo, options, is_recorded, monkeypatch):
    objective = PyroELBO(elbo(max_plate_nesting=1, **options))
    objective.find_recording(product, guide_of(dist.Normal, dist.Normal), (X, Y), {})
    assert (objective._batched is not None) is is_recorded


def test_a_recording_is_taken_once():
    made = []
    objective = KL(3, otherwise=lambda: made.append(1) or "recording")
    assert objective.take_recording()
    assert objective.batched == "recording"
    assert not objective.take_recording()
    assert made == [1]
    assert not KL(3, otherwise=lambda: None).take_recording()
    assert not KL(3).take_recording()
    assert not KL(3, batched="recording", otherwise=lambda: "another").take_recording()


def test_each_kind_of_arguments_has_one_recording():
    guide = guide_of(dist.Normal, dist.Normal)
    calls = find_recording(ModelCall(product, (X, Y)), guide)
    with pyro.plate("particles", 4, dim=-2):
        trace = poutine.trace(guide).get_trace(X, Y)
    first, prototype, call = calls.find((X, Y), {}, trace)
    again, same, _ = calls.find((X + 1, Y), {}, trace)
    other, shorter, _ = calls.find((X[:5], Y[:5]), {}, trace)
    assert first is again
    assert same is prototype
    assert other is not first
    assert len(shorter.nodes["y"]["value"]) == 5
    assert torch.equal(call.args[0], X)
    fixed = BatchedCalls(first, prototype, 1, arguments_vary=False)
    assert fixed.find((X[:5], Y[:5]), {}, trace)[:2] == (first, prototype)
