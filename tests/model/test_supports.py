"""Supports that depend on other latents."""

import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO

import pyro_flowguides as fg
from pyro_flowguides.model import supports
from pyro_flowguides.model.call import ModelCall
from pyro_flowguides.model.target import Target
from pyro_flowguides.testing.guides import check_elbos, check_estimates, check_sites

Y = torch.tensor([0.4, 0.9, 0.7])


def below(y):
    """p(b | y) has the density of a power times a normal one; b stays below a."""
    a = pyro.sample("a", dist.Gamma(3.0, 1.0))
    b = pyro.sample("b", dist.Uniform(0.0, a))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(b, 0.3), obs=y)


def change_points(y):
    first = pyro.sample("first", dist.Uniform(0.0, 1.0))
    second = pyro.sample("second", dist.Uniform(first, 1.0))
    with pyro.plate("three", 3):
        pyro.sample("tail", dist.Pareto(1.0 + second, 3.0))
    pyro.sample("y", dist.Normal(torch.stack([first, second]) @ torch.tensor([1.0, 2.0]), 0.3), obs=y[0])


def fixed(y):
    pyro.sample("b", dist.Uniform(torch.tensor(0.0), torch.tensor(2.0)))


@pytest.mark.parametrize(("model", "names"), [(below, {"b"}), (change_points, {"second", "tail"}), (fixed, set())])
def test_they_are_found(model, names):
    guide = fg.AutoFlow(model).setup(Y)
    assert {site.name for site in guide.latents.sites if site.varies} == names


def perturbed(model):
    guide = fg.AutoFlow(model, init_scale=1.0).setup(Y)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return guide


@pytest.mark.parametrize("model", [below, change_points])
def test_a_draw_of_the_guide_lies_in_the_support_of_its_own_run(model):
    guide = perturbed(model)
    for _ in range(20):
        traced = poutine.trace(guide).get_trace(Y)
        replayed = poutine.trace(poutine.replay(model, trace=traced)).get_trace(Y)
        point = traced.nodes["_AutoFlow_latent"]["value"]
        expected = 0.0
        for site, own in guide.latents.unpack(point):
            transform = torch.distributions.biject_to(replayed.nodes[site.name]["fn"].support)
            expected = expected - transform.log_abs_det_jacobian(own, transform(own)).sum()
            torch.testing.assert_close(traced.nodes[site.name]["value"], transform(own))
            assert bool(replayed.nodes[site.name]["fn"].support.check(transform(own)).all())
        traced.compute_log_prob()
        found = sum(traced.nodes[site.name]["log_prob_sum"] for site in guide.latents.sites)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("model", [below, change_points])
def test_target_and_guide_agree_draw_by_draw_and_together(model):
    guide = perturbed(model)
    points = torch.randn(6, guide.latent_dim)
    together, alone = (
        Target(ModelCall(model, (Y,)), guide.latents, vectorize=vectorize).log_prob(points)
        for vectorize in (model is below, False)
    )
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    values = Target(ModelCall(model, (Y,)), guide.latents).constrain(points)
    for site in guide.latents.sites:
        assert values[site.name].shape == (6, *site.shape)


@pytest.mark.slow
def test_the_fit_is_the_posterior():
    """Against quadrature over a and b."""
    fit = fg.fit(below, fg.AutoFlow(below), Y, num_steps=1000, seed=0, progress=False)
    a, b = (
        torch.linspace(0.001, 15, 4000, dtype=torch.float64).unsqueeze(-1),
        torch.linspace(-0.2, 2, 1200, dtype=torch.float64),
    )
    log_p = dist.Gamma(3.0, 1.0).log_prob(a) - a.log()
    log_p = log_p + dist.Normal(b, 0.3).log_prob(Y.double().unsqueeze(-1)).sum(0)
    p = torch.where((b > 0) & (b < a), log_p.exp(), 0.0)
    evidence = p.sum() * (a[1] - a[0]) * (b[1] - b[0])
    p = p / p.sum()
    for name, grid in (("a", a), ("b", b)):
        mean = (p * grid).sum()
        sd = ((p * (grid - mean) ** 2).sum()).sqrt()
        draws = fit.draws.values[name].double()
        assert abs(float(draws.mean() - mean)) < 0.05 * float(sd)
        assert float(draws.std() / sd) == pytest.approx(1.0, abs=0.05)
    assert float(fit.elbo) == pytest.approx(float(evidence.log()), abs=0.03)
    assert bool((fit.draws.values["b"] < fit.draws.values["a"]).all())
    assert fit.vectorization == "broadcast"


def test_a_model_that_is_recorded():
    fit = fg.fit(change_points, fg.AutoFlow(change_points), Y, num_steps=20, seed=0, progress=False)
    assert fit.vectorization == "recorded"
    values = fit.draws.values
    assert bool((values["first"] < values["second"]).all())
    assert bool((values["tail"] > 1 + values["second"].unsqueeze(-1)).all())
    assert np.isfinite(float(fit.elbo))


def test_plain_svi_predictive_medians_and_quantiles():
    guide = fg.AutoFlow(below)
    svi = SVI(below, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=8, vectorize_particles=True))
    assert np.isfinite([svi.step(Y) for _ in range(5)]).all()
    found = Predictive(below, guide=guide, num_samples=30)(Y)
    assert bool((found["b"] < found["a"]).all())
    assert float(guide.median(Y)["b"]) < float(guide.median(Y)["a"])
    assert guide.quantiles([0.1, 0.9], Y)["b"].shape == (2,)
    for check in (check_sites, check_elbos, check_estimates):
        check(guide, below, Y)


def test_a_guide_from_a_pickle_says_what_it_lacks():
    guide = pickle.loads(pickle.dumps(fg.AutoFlow(below).setup(Y)))
    with pytest.raises(RuntimeError, match="'b' depends on other latents.*a guide that comes from a pickle has none"):
        guide(Y)


def test_what_cannot_follow_says_so():
    def model(y):
        a = pyro.sample("a", dist.Gamma(3.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=2) as index:
            b = pyro.sample("b", dist.Uniform(0.0, a))
            pyro.sample("y", dist.Normal(b, 0.3), obs=y[index])

    with pytest.raises(ValueError, match="support of latent site 'b' depends on other latents"):
        fg.AutoFlow(model).setup(Y)
    with pytest.raises(ValueError, match="support of site 'b' depends on other latents"):
        fg.AutoFlow(below).setup(Y).get_transform()


def test_a_run_ends_at_the_last_site_that_is_asked_for():
    runs = []

    def model():
        a = pyro.sample("a", dist.Gamma(3.0, 1.0))
        pyro.sample("b", dist.Uniform(0.0, a))
        runs.append(1)

    guide = fg.AutoFlow(model).setup()
    before = len(runs)
    supports.at(guide.latents, ModelCall(model), torch.zeros(2))
    assert len(runs) == before
