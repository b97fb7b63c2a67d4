"""A tempered loss: its value and gradient by hand, in every backend, without a new capture as the temperature changes."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides import CompiledSVI
from pyro_flowguides.compiled.losses import KL
from pyro_flowguides.compiled.recorded import BatchedCalls, find_recording
from pyro_flowguides.guides.base import path_gradient
from pyro_flowguides.model.call import ModelCall

DATA = torch.tensor([0.3, 1.4, 2.2], dtype=torch.float64)
NUM_DRAWS = 5


def model(y):
    """One latent with a constraint."""
    scale = pyro.sample("scale", dist.LogNormal(y.new_tensor(0.2), 0.7))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, scale), obs=y)


def looking(y):
    """The same model, written for one draw."""
    scale = pyro.sample("scale", dist.LogNormal(y.new_tensor(0.2), 0.7))
    scales = torch.eye(len(y), dtype=y.dtype) @ scale.expand(len(y))
    pyro.sample("y", dist.Normal(torch.zeros_like(y), scales).to_event(1), obs=y)


def log_joint(x, y):
    """log p of x = log scale, its Jacobian included, by hand."""
    scale = x.exp()
    prior = dist.LogNormal(y.new_tensor(0.2), 0.7).log_prob(scale) + x
    return prior + dist.Normal(0.0, scale.unsqueeze(-1)).log_prob(y).sum(-1)


def by_hand(guide, y, beta):
    """log q − β log p at draws of the guide, with the gradient that the guide gives log q."""
    with path_gradient(), pyro.plate("draws", NUM_DRAWS, dim=-2):
        trace = poutine.trace(guide).get_trace(y)
    trace.compute_log_prob()
    (site,) = [site for site in trace.nodes.values() if site["type"] == "sample" and site["infer"].get("is_auxiliary")]
    return (site["log_prob"].reshape(-1) - beta * log_joint(site["value"].reshape(-1), y)).mean()


def flow_guide(model):
    return fg.AutoFlow(model, fg.transforms.Affine, affine=None, init_scale=0.6)


def gradients_of(value, guide):
    return [value.detach(), *torch.autograd.grad(value, list(guide.parameters()), allow_unused=True)]


@pytest.mark.parametrize("beta", [0.01, 0.4, 1.0])
@pytest.mark.parametrize("Guide", [flow_guide, AutoNormal], ids=["flow", "AutoNormal"])
@pytest.mark.parametrize("written", [model, looking], ids=["broadcast", "recorded"])
def test_value_and_gradient_are_those_by_hand(written, Guide, beta):
    guide = Guide(written)
    guide(DATA)
    recording = find_recording(ModelCall(written, (DATA,)), guide)
    assert isinstance(recording, BatchedCalls) == (written is looking)
    objective = KL(NUM_DRAWS, max_plate_nesting=1, batched=recording)
    pyro.set_rng_seed(1)
    found = gradients_of(objective.loss(written, guide, (DATA,), {}, torch.tensor(beta, dtype=torch.float64)), guide)
    pyro.set_rng_seed(1)
    torch.testing.assert_close(found, gradients_of(by_hand(guide, DATA, beta), guide), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["eager", "replay", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_captured_step_reads_the_temperature(backend):
    """Over the whole rise there is one capture, and each step is the one by hand."""
    guide, seen = flow_guide(model), []

    def temper(step):
        # What it changes itself is no part of the step.
        seen.append(step)
        return min(1.0, 0.1 + 0.2 * step)

    objective = KL(NUM_DRAWS, max_plate_nesting=1, temper=temper)
    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.05}), objective, backend=backend)
    pyro.set_rng_seed(0)
    svi.step(DATA)
    for step in range(1, 7):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pyro.set_rng_seed(step)
            loss, gradients = svi.loss_and_gradients(DATA)
            pyro.set_rng_seed(step)
            expected = gradients_of(by_hand(guide, DATA, min(1.0, 0.1 + 0.2 * step)), guide)
            torch.testing.assert_close([loss, *gradients.values()], expected, rtol=1e-9, atol=1e-9)
            pyro.set_rng_seed(step)
            assert svi.step(DATA) == pytest.approx(float(expected[0]), rel=1e-9)
    assert len(svi.captures) == (backend != "eager")
    assert svi.captures.num_compiled == (backend == "inductor")


def test_a_rising_loss_is_no_explosion_while_the_temperature_changes():
    """A jump of the temperature multiplies the loss by a hundred, which is an explosion where the temperature is one."""

    def jump(step):
        return 0.01 if step < 60 else 1.0

    def rolled_back(objective):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 1e-6}), objective, backend="eager")
        losses = svi.run(200, 20 * DATA)
        assert float(losses[60]) > 10 * abs(float(losses[59]))
        return svi.num_rolled_back

    tempered = KL(NUM_DRAWS, max_plate_nesting=1, temper=jump)
    assert rolled_back(tempered) == 0
    tempered.is_comparable = lambda first, last: True
    assert rolled_back(tempered) > 0
