"""Runs of a model at given values: log-densities of MCMC's draws, new data at every draw."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from draw_cases import nothing_observed, sum_of_latents
from pyro import poutine

from pyro_flowguides.diagnostics.replay import draws_at, predict, simulate
from pyro_flowguides.model import memory
from pyro_flowguides.model.call import ModelCall


def in_plates(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("outer", 2, dim=-2):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("inner", 3, dim=-1):
            pyro.sample("y", dist.Normal(level + weights[..., 0], 1e-3 * scale), obs=y)


def values_of_in_plates(num_samples):
    torch.manual_seed(0)
    return {
        "scale": torch.rand(num_samples) + 0.5,
        "weights": dist.Dirichlet(torch.ones(2)).sample((num_samples,)),
        "level": 10 * torch.arange(2.0 * num_samples).reshape(num_samples, 2, 1),
    }


@pytest.mark.parametrize("batch_elements", [2**24, 12])
def test_values_keep_their_order_and_have_the_density_of_single_runs(batch_elements, monkeypatch):
    monkeypatch.setattr(memory, "MAX_ELEMENTS", batch_elements)
    y, values = torch.zeros(2, 3), values_of_in_plates(5)
    draws = draws_at(ModelCall(in_plates, (y,)), values, "the draws come from elsewhere")
    for i in range(5):
        latents = {name: value[i] for name, value in values.items()}
        trace = poutine.trace(poutine.condition(in_plates, latents)).get_trace(y)
        torch.testing.assert_close(draws.log_p[i], trace.log_prob_sum())
        for name, value in latents.items():
            torch.testing.assert_close(draws.values[name][i], value, rtol=0, atol=0)
    assert draws.log_q.isnan().all()
    assert draws.elbo_error == "the draws come from elsewhere"
    assert str(draws.verdict) == "unknown: the draws come from elsewhere."


@pytest.mark.parametrize("batch_elements", [2**24, 12])
def test_new_data_belong_to_their_own_draw(batch_elements, monkeypatch):
    monkeypatch.setattr(memory, "MAX_ELEMENTS", batch_elements)
    values = values_of_in_plates(5)
    latents, data = predict(ModelCall(in_plates, (torch.zeros(2, 3),)), values, 5)
    assert set(latents) == set(values)
    assert set(data) == {"y"}
    expected = values["level"] + values["weights"][:, :1, None]
    # The noise has an sd of at most 0.0015, and levels of neighbouring draws are 20 apart.
    torch.testing.assert_close(data["y"], expected.expand(5, 2, 3), rtol=0, atol=0.01)


def test_new_data_of_a_model_that_is_run_draw_by_draw():
    def model(y):
        with pyro.plate("group", 3):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w.sum(), 1e-3), obs=y)

    w = torch.arange(12.0).reshape(4, 3)
    _, data = predict(ModelCall(model, (torch.tensor(0.0),)), {"w": w}, 4)
    torch.testing.assert_close(data["y"], w.sum(-1), rtol=0, atol=0.01)


def test_without_values_everything_comes_from_the_prior():
    torch.manual_seed(0)
    latents, data = predict(ModelCall(in_plates, (torch.zeros(2, 3),)), {}, 4000)
    assert latents["level"].shape == (4000, 2, 1)
    # 8000 draws know an sd to 0.8%.
    assert float(latents["level"].std()) == pytest.approx(1.0, abs=0.04)
    assert data["y"].shape == (4000, 2, 3)


def test_a_simulation_has_its_latents_and_its_data():
    latents, data = simulate(lambda: sum_of_latents(torch.tensor(50.0)))
    assert set(latents) == {"w"}
    # Normal(Σ w, 1), far from the data that the model was given.
    assert abs(float(data["y"] - latents["w"].sum())) < 6


def test_values_of_another_model():
    with pytest.raises(ValueError, match="not draws of this model: site 'x' has none; the model has no site 'mu'"):
        draws_at(ModelCall(nothing_observed, (None,)), {"mu": torch.zeros(5)}, "the draws come from elsewhere")


def test_a_single_draw_of_given_values():
    draws = draws_at(
        ModelCall(in_plates, (torch.zeros(2, 3),)), values_of_in_plates(1), "the draws come from elsewhere"
    )
    assert len(draws) == 1


def test_a_simulation_has_no_deterministic_sites_and_no_factors():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * x)
        pyro.factor("more", -x)
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.0))

    latents, data = simulate(model)
    assert (set(latents), set(data)) == ({"x"}, {"y"})


def test_a_discrete_site_without_values_is_summed_out():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        kind = pyro.sample("kind", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(mu + kind, 1.0), obs=torch.tensor(0.5))

    mu = torch.tensor([-1.0, 0.0, 2.0])
    draws = draws_at(ModelCall(model), {"mu": mu}, "the draws come from elsewhere")
    likelihood = 0.7 * dist.Normal(mu, 1.0).log_prob(torch.tensor(0.5)).exp()
    likelihood = likelihood + 0.3 * dist.Normal(mu + 1, 1.0).log_prob(torch.tensor(0.5)).exp()
    torch.testing.assert_close(draws.log_p, dist.Normal(0.0, 1.0).log_prob(mu) + likelihood.log())
