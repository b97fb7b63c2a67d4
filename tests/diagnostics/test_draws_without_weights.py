"""Cases in which a number would be easy to give and wrong: mixing models, point estimates, minibatches, missing sites, masks."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal

import pyro_flowguides as fg

QUICK = {"num_steps": 20, "num_particles": 8, "progress": False, "seed": 0}


def sum_of_latents(y):
    with pyro.plate("group", 3):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=y)


def random_walk(y):
    with pyro.plate("time", 4):
        step = pyro.sample("step", dist.Normal(0.0, 1.0))
    with pyro.plate("observed", 4):
        pyro.sample("y", dist.Normal(step.cumsum(0), 1.0), obs=y)


def mixing_deterministic(y):
    with pyro.plate("group", 3):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.deterministic("total", w.sum())
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "y"),
    [(sum_of_latents, [3.0]), (random_walk, [1.0, 2.0, 3.0, 4.0]), (mixing_deterministic, [0.0])],
    ids=["sum", "random walk", "deterministic"],
)
def test_a_model_that_mixes_draws_is_run_draw_by_draw(model, y):
    """All shapes are right when such a model is vectorised, and all numbers are wrong."""
    y = torch.tensor(y) if len(y) > 1 else torch.tensor(y[0])
    with pytest.warns(UserWarning, match="cannot be vectorised over draws.*(mixes the draws|other values among)"):
        draws = fg.draw(model, fg.AutoFlow(model), y, num_samples=3)
    for i in range(3):
        latents = {name: value[i] for name, value in draws.values.items()}
        trace = poutine.trace(poutine.condition(model, latents)).get_trace(y)
        torch.testing.assert_close(draws.log_p[i], trace.log_prob_sum())
        for name, value in draws.deterministic.items():
            torch.testing.assert_close(value[i], trace.nodes[name]["value"])


def test_a_model_that_prints_a_latent_is_run_draw_by_draw(capsys):
    """A single number can be formatted, a batch of them is a TypeError."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        print(f"mu = {mu:.2f}")
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.warns(UserWarning, match="cannot be vectorised over draws.*unsupported format string"):
        draws = fg.draw(model, fg.AutoFlow(model), torch.tensor(1.0), num_samples=3)
    assert len(draws) == 3
    assert capsys.readouterr().out.count("mu = ") >= 3


def test_fit_of_a_model_that_mixes_draws():
    y = torch.tensor(3.0)
    with pytest.warns(UserWarning, match="mixes the draws"):
        fit = fg.fit(sum_of_latents, fg.AutoFlow(sum_of_latents), y, **QUICK)
    # log N(3; 0, 4): whitening finds the normal posterior, which some steps with few particles blur a little.
    assert fit.elbo.value == pytest.approx(float(dist.Normal(0.0, 2.0).log_prob(y)), abs=0.02)


def normal_mean(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


def half_delta():
    guide = AutoGuideList(normal_mean)
    guide.append(fg.AutoCoupling(poutine.block(normal_mean, expose=["mu"])))
    guide.append(AutoDelta(poutine.block(normal_mean, expose=["sigma"])))
    return guide


@pytest.mark.parametrize("make_guide", [lambda: AutoDelta(normal_mean), half_delta], ids=["all", "one site"])
def test_a_point_estimate_has_no_verdict(make_guide):
    fit = fg.fit(normal_mean, make_guide(), torch.tensor([0.5, 1.5, 0.2]), **QUICK)
    assert str(fit.verdict).startswith("unknown: the guide gives site '")
    assert "a single point" in str(fit.verdict)
    assert np.isnan(fit.khat.value)
    assert np.isnan(fit.ess.value)
    with pytest.raises(ValueError, match="no importance weights: the guide gives site"):
        fit.draws.weights  # noqa: B018
    assert np.isfinite(fit.elbo.value)


def minibatch(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=20) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])


def test_subsampled_data_have_no_verdict_and_an_elbo_over_minibatches():
    y = torch.randn(1000) + 1
    guide = AutoNormal(minibatch, init_scale=0.05)
    guide(y)
    repeats = [fg.draw(minibatch, guide, y, num_samples=1000, seed=seed).elbo for seed in range(8)]
    spread = np.std([estimate.value for estimate in repeats], ddof=1)
    # The sd of 8 values is known to 25%.
    assert np.mean([estimate.se for estimate in repeats]) == pytest.approx(spread, rel=1.0)
    draws = fg.draw(minibatch, guide, y, num_samples=1000, log_likelihood=True)
    with pytest.raises(ValueError, match="subsampled by plate 'data'"):
        draws.smoothed_log_weights  # noqa: B018
    assert np.isnan(draws.khat.value)
    assert draws.verdict.kind is fg.VerdictKind.UNKNOWN
    tree = fg.to_arviz(draws)
    assert set(tree["sample_stats"].data_vars) == {"lp", "log_q"}
    assert "observed_data" not in tree
    assert "log_likelihood" not in tree


def test_a_site_that_the_guide_leaves_out_is_drawn_from_its_prior():
    @config_enumerate
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(mu + k, 1.0), obs=y)

    y = torch.tensor([0.3, 1.4, 2.2])
    guide = AutoNormal(poutine.block(model, expose=["mu"]), init_scale=0.5)
    with pytest.warns(UserWarning, match="The guide leaves out site 'k'.*summed out"):
        draws = fg.draw(model, guide, y, num_samples=20_000)
    # Then the ratios are weights of a proposal, and their mean is the evidence, here by quadrature.
    grid = torch.linspace(-8, 8, 4001)
    likelihood = sum(0.5 * dist.Normal(grid.unsqueeze(-1) + k, 1.0).log_prob(y).exp() for k in (0.0, 1.0))
    evidence = torch.trapezoid(dist.Normal(0.0, 1.0).log_prob(grid).exp() * likelihood.prod(-1), grid)
    weights = draws.log_weights.double().exp()
    se = float(weights.std() / len(weights) ** 0.5)
    assert float(weights.mean()) == pytest.approx(float(evidence), abs=5 * se)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, y)
    assert np.isfinite(loss)


def test_masked_entries_are_no_observations():
    def model(y, mask):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", 4), poutine.mask(mask=mask):
            pyro.sample("y", dist.Gamma(2.0, rate), obs=y)

    y = torch.tensor([1.0, 2.0, 3.0, 0.0])  # the last has log-probability −inf
    fit = fg.fit(model, fg.AutoCoupling(model), y, y > 0, **QUICK)
    assert np.isfinite(fit.elbo.value)
    draws = fg.draw(model, fit.guide, y, y > 0, num_samples=5, log_likelihood=True)
    assert (draws.log_likelihood["y"][:, 3] == 0).all()
    assert (draws.log_likelihood["y"][:, :3] != 0).all()


def test_factors_flags_and_scopes_can_be_reported():
    def model(y):
        mu = pyro.sample("scope/mu", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", -(mu**2))
        pyro.deterministic("positive", mu > 0)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    fit = fg.fit(model, fg.AutoCoupling(model), torch.tensor([0.5, 1.0]), **QUICK)
    summary = fit.summary()
    assert 0 < summary.loc["positive", "mean"] < 1
    tree = fit.to_arviz(50)
    assert set(tree["observed_data"].data_vars) == {"y"}
    assert "scope.mu" in tree["posterior"].data_vars


def test_memory_is_bounded_by_the_largest_site():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    sizes = []

    class Spy(poutine.messenger.Messenger):
        def _pyro_post_sample(self, msg):
            if msg["name"] == "y":
                sizes.append(msg["fn"].batch_shape.numel())

    y = torch.randn(20_000)
    guide = fg.AutoFlow(model).setup(y)
    with Spy():
        fg.draw(model, guide, y, num_samples=2000)
    assert max(sizes) <= 2**24


def test_quantiles_of_a_simplex_are_those_of_its_coordinates():
    def model():
        pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 3.0, 8.0])))

    guide = fg.AutoFlow(model).whiten()
    low, middle, high = guide.quantiles([0.05, 0.5, 0.95])["p"]
    assert (low < middle).all()
    assert (middle < high).all()
    values = fg.draw(model, guide, num_samples=20_000).values["p"]
    for level, found in ((0.05, low), (0.5, middle), (0.95, high)):
        torch.testing.assert_close(found, values.quantile(level, 0), rtol=0, atol=0.02)
