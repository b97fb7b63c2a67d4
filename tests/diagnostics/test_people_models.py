"""Models as people write them: reparametrised sites, bounds that are tensors, draws without a density."""

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from draw_cases import group_names
from fits import quick
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam

import pyro_flowguides as fg
from pyro_flowguides.diagnostics.importance import ImportanceWeights
from pyro_flowguides.diagnostics.verdicts import VerdictKind


@poutine.reparam(config={"theta": LocScaleReparam(0.0)})
def decentered(sd, y):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sd), obs=y)


def test_a_reparametrised_site_belongs_to_the_posterior():
    """Its reparametriser leaves an observed point mass in its place, which is no data."""
    sd, y = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, -1.0, 2.0])
    fit = quick(decentered, fg.AutoCoupling(decentered), sd, y)
    theta, mu, tau = fit.draws.deterministic["theta"], fit.draws.values["mu"], fit.draws.values["tau"]
    expected = mu.unsqueeze(-1) + tau.unsqueeze(-1) * fit.draws.values["theta_decentered"]
    torch.testing.assert_close(theta, expected)
    assert {"theta[0]", "theta[2]"} <= set(fit.summary().index)
    tree = fit.to_arviz(100)
    assert set(tree["observed_data"].data_vars) == {"y"}
    assert set(tree["log_likelihood"].data_vars) == {"y"}
    assert set(tree["posterior_predictive"].data_vars) == {"y"}
    assert tree["posterior"]["theta"].dims == ("chain", "draw", "groups")
    # Of the prior too: another theta for every draw.
    assert "posterior_predictive" in group_names(tree)
    assert tree["prior"]["theta"].values.std() > 1.0


def pareto(y):
    kappa = pyro.sample("kappa", dist.Pareto(1.0, 1.5))
    with pyro.plate("n", len(y)):
        phi = pyro.sample("phi", dist.Uniform(torch.zeros(()), torch.tensor(2.0)))
        pyro.sample("y", dist.Normal(phi * kappa, 1.0), obs=y)


def test_bounds_that_are_tensors():
    """A run of many draws expands them to the draws."""
    draws = quick(pareto, fg.AutoFlow(pareto), torch.arange(3.0)).draws
    for name, shape in (("kappa", ()), ("phi", (3,))):
        assert draws.values[name].shape == draws.unconstrained[name].shape == (len(draws), *shape)
    assert draws.weights_error is None
    torch.testing.assert_close(draws.unconstrained["kappa"].exp() + 1, draws.values["kappa"])


def overflowing(y):
    a = pyro.sample("a", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
    pyro.sample("y", dist.Normal(a.sum(-1), 1.0), obs=y)


def test_a_poor_fit_is_judged():
    """A few of its draws underflow to the edge of the support, where the model has no density."""
    guide = fg.AutoFlow(overflowing, init_scale=45.0)
    fit = quick(overflowing, guide, torch.tensor(1.0), whiten=None, num_steps=1, num_particles=2)
    num_lost = int((~fit.draws.log_weights.isfinite()).sum())
    assert 0 < num_lost < len(fit.draws)
    assert f"{num_lost:,} of 10,000 draws have no density" in str(fit.verdict)
    assert fit.verdict.kind is VerdictKind.DOUBTFUL
    assert fit.draws.weights.weights[(~fit.draws.log_weights.isfinite()).numpy()].max() < 1e-12
    assert "posterior" in group_names(fit.to_arviz(100))


def test_draws_without_density_weigh_nothing():
    log_q = np.random.default_rng(0).normal(size=1000)
    log_p = log_q + 0.01 * np.random.default_rng(1).normal(size=1000)
    whole = ImportanceWeights(log_p[3:], log_q[3:])
    log_p[:3] = [np.nan, -np.inf, np.nan]
    weights = ImportanceWeights(log_p, log_q, "site 'a' of the model")
    assert weights.weights[:3].max() < 1e-12
    assert weights.ess.value == pytest.approx(whole.ess.value, rel=1e-3)
    assert weights.num_without_density == 3 and whole.num_without_density == 0


def test_a_few_draws_are_exported_without_smoothed_weights():
    fit = quick(overflowing, fg.AutoFlow(overflowing), torch.tensor(1.0))
    statistics = fit.to_arviz(10)["sample_stats"]
    assert {"lp", "log_q"} <= set(statistics.data_vars) and "log_weight" not in statistics
    assert "log_weight" in fit.to_arviz(30)["sample_stats"]
    assert "log_weight" not in fit.draws[:10].to_dataframe()


def test_numbered_observations_are_one_variable_for_leave_one_out():
    def looped(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", len(y)):
            pyro.sample(f"obs_{i}", dist.Normal(loc, 1.0), obs=y[i])

    def at_once(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(loc, 1.0), obs=y)

    y = torch.linspace(-1, 2, 12)
    guide = fg.AutoPlanar(at_once, num_layers=1, init_scale=0.3)
    trees = []
    for model in (at_once, looped):
        draws = fg.draw(model, guide, y, num_samples=400, log_likelihood=True, seed=0)
        trees.append(fg.to_arviz(draws, y, model=model, prior=False))
    assert trees[1]["observed_data"]["obs"].dims == ("obs_number",)
    assert list(trees[1]["posterior_predictive"]["obs"].dims) == ["chain", "draw", "obs_number"]
    assert trees[1]["log_likelihood"]["obs_number"].values.tolist() == list(range(12))
    results = [az.loo(tree, pointwise=True) for tree in trees]
    np.testing.assert_allclose(results[1].elpd_loo, results[0].elpd_loo, rtol=1e-5)


def test_numbered_sites_of_other_shapes_or_beside_one_without_a_number_stay():
    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("a_0", dist.Normal(loc, 1.0), obs=y[0])
        pyro.sample("a_1", dist.Normal(loc, 1.0).expand([2]).to_event(1), obs=y[:2])
        pyro.sample("b", dist.Normal(loc, 1.0), obs=y[0])
        pyro.sample("b_1", dist.Normal(loc, 1.0), obs=y[0])
        pyro.sample("b_2", dist.Normal(loc, 1.0), obs=y[0])
        pyro.sample("c_3", dist.Normal(loc, 1.0), obs=y[0])

    tree = fg.to_arviz(fg.AutoPlanar(model, num_layers=1), torch.ones(2), num_samples=30, prior=False)
    assert set(tree["observed_data"].data_vars) == {"a_0", "a_1", "b", "b_1", "b_2", "c_3"}
