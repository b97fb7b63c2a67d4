"""What a trace says of its sites."""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_flowguides as fg
from pyro_flowguides.model import sites


def model(y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("twice", 2 * mu)
    pyro.factor("factor", -mu.square())
    with pyro.plate("outer", 2, dim=-2), pyro.plate("rows", 6, subsample_size=3, dim=-1):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(()))


def test_kinds_of_sites():
    trace = poutine.trace(model).get_trace()
    assert [name for name, _ in sites.latent_sites(trace)] == ["mu", "z"]
    assert [name for name, _ in sites.observed_sites(trace)] == ["y"]
    assert [name for name, _ in sites.deterministic_sites(trace)] == ["twice"]
    assert [name for name, _ in sites.tensor_sites(trace)] == ["mu", "twice", "factor", "z", "y"]
    indices = [name for name, site in trace.nodes.items() if site["type"] == "sample" and sites.is_subsample(site)]
    assert indices == ["outer", "rows"]


def test_plates_of_a_trace():
    trace = poutine.trace(model).get_trace()
    frames = {frame.name: frame for frame in trace.nodes["z"]["cond_indep_stack"]}
    assert sites.is_subsampled(frames["rows"])
    assert not sites.is_subsampled(frames["outer"])
    assert (sites.full_size(frames["rows"]), sites.full_size(frames["outer"])) == (6, 2)
    assert sites.subsampled_plate(trace) == "rows"
    assert sites.max_plate_nesting(trace) == 2
    assert sites.subsampled_plate(poutine.trace(poutine.block(model, hide=["z", "y"])).get_trace()) is None


def test_log_prob_of_every_draw():
    """With the scale of the plate, and nothing of one draw in another."""

    def vectorized():
        with pyro.plate("draws", 4, dim=-3):
            model()

    trace = poutine.trace(vectorized).get_trace()
    together = sites.log_prob_per_draw(trace, 4)
    assert together.shape == (4,)
    for i in range(4):
        given = {name: trace.nodes[name]["value"][i].reshape(shape) for name, shape in (("mu", ()), ("z", (2, 3)))}
        given["rows"] = trace.nodes["rows"]["value"]
        alone = poutine.trace(poutine.condition(model, data=given)).get_trace()
        torch.testing.assert_close(together[i], sites.log_prob_per_draw(alone, 1)[0])


def test_values_of_every_draw():
    value = torch.randn(4, 1, 1, 3)
    torch.testing.assert_close(sites.per_draw(value, torch.Size([3]), 4), value.reshape(4, 3))
    same = sites.per_draw(torch.ones(1, 3), torch.Size([3]), 4)
    assert same.shape == (4, 3)


def test_the_random_state_is_put_back():
    def numbers():
        return float(torch.rand(())), float(np.random.rand()), random.random()

    pyro.set_rng_seed(0)
    expected = numbers()
    pyro.set_rng_seed(0)

    def fail():
        with sites.unchanged_random_state():
            numbers()
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        fail()
    assert numbers() == expected


def test_random_log_densities_are_seen_through_wrappers():
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    exact, estimate = (
        fg.NormalizingFlow(base, fg.flows.residual(2, num_layers=1, log_det=kind)) for kind in ("exact", "hutchinson")
    )
    assert not sites.has_stochastic_log_prob(exact)
    assert sites.has_stochastic_log_prob(estimate)
    assert sites.has_stochastic_log_prob(estimate.expand([3]).mask(False))


def test_the_site_without_a_density():
    def broken():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(float("inf")))

    trace = poutine.trace(broken).get_trace()
    message = sites.site_without_density(poutine.Trace(), trace)
    assert message == "site 'y' of the model has log-probability -inf"
    assert sites.site_without_density(poutine.Trace(), poutine.trace(model).get_trace()) is None
