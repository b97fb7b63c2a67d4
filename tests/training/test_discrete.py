"""Fits of models with discrete latents: what is trained, whitened and judged is the marginal posterior."""

import warnings

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg

torch_state = torch.Generator().manual_seed(20)
Y = torch.cat([torch.randn(6, generator=torch_state) - 2.0, torch.randn(9, generator=torch_state) + 2.0])


@config_enumerate
def mixture(y, dim=None):
    """Half and half of N(−2, 1) and N(mu, 1)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y), dim=dim):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        shift = pyro.deterministic("shift", torch.where(z > 0, mu, torch.tensor(-2.0)))
        pyro.sample("y", dist.Normal(shift, 1.0), obs=y)


def exact():
    """Log evidence, posterior mean and sd of mu, and the mean of each z, by quadrature."""
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    parts = torch.stack(
        [dist.Normal(loc, 1.0).log_prob(Y) for loc in (torch.full_like(grid, -2.0)[:, None], grid[:, None])]
    )
    log_joint = (parts + np.log(0.5)).logsumexp(0).sum(-1) + dist.Normal(0.0, 3.0).log_prob(grid)
    weights = log_joint.softmax(0)
    evidence = log_joint.logsumexp(0) + torch.log(grid[1] - grid[0])
    mean = (weights * grid).sum()
    z = (weights[:, None] * parts.softmax(0)[1]).sum(0)
    return float(evidence), float(mean), float((weights * (grid - mean) ** 2).sum().sqrt()), z.numpy()


def quick(model, guide, *args, **options):
    settings = {"num_steps": 150, "num_particles": 64, "seed": 0, "progress": False, **options}
    return fg.fit(model, guide, *args, **settings)


@pytest.fixture(scope="module")
def fit():
    return quick(mixture, fg.AutoFlow(mixture), Y)


def exposed():
    return poutine.block(mixture, expose=["mu"])


FITS = {
    # With the explicit dimension of Pyro's examples, which a plate of draws would run into.
    "exposed": lambda: quick(mixture, fg.AutoFlow(exposed()), Y, -1),
    "normal": lambda: quick(mixture, AutoNormal(exposed()), Y, num_steps=400),
    "loss": lambda: quick(
        mixture,
        fg.AutoFlow(poutine.block(mixture, hide=["z"])),
        Y,
        num_particles=None,
        loss=TraceEnum_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1),
    ),
}


@pytest.mark.parametrize("name", ["whole", *FITS])
def test_the_fit_is_that_of_the_marginal_posterior(name, request):
    fit = request.getfixturevalue("fit") if name == "whole" else FITS[name]()
    evidence, mean, sd, z = exact()
    assert fit.elbo.value == pytest.approx(evidence, abs=0.05)
    # The exact posterior is no normal one.
    is_off = abs(float(fit.draws.mean(weighted=False)["mu"]) - mean) / sd > 0.1
    assert fit.verdict.kind is (fg.VerdictKind.GOOD_ONCE_WEIGHTED if is_off else fg.VerdictKind.GOOD)
    assert fit.ess.value > 8_500
    # Of 10,000 draws, weighted.
    assert float(fit.draws.mean()["mu"]) == pytest.approx(mean, abs=5 * sd / 100)
    assert float(fit.draws.sd()["mu"]) == pytest.approx(sd, rel=0.05)
    found = fit.draws.mean()["z"]
    assert np.all(np.abs(found - z) < 5 * np.sqrt(z * (1 - z) / 10_000) + 1e-3)
    assert "; discrete sites summed out: 1; " in repr(fit)


def test_draws_hold_the_discrete_sites(fit):
    posterior = fit.draws.posterior()
    assert posterior["z"].shape == (10_000, len(Y))
    assert posterior["z"].dtype == np.int64
    # What is computed from both belongs to the same draw.
    np.testing.assert_array_equal(posterior["shift"], np.where(posterior["z"] > 0, posterior["mu"][:, None], -2.0))
    assert fit.draws.summed_out == ("z",)
    assert {f"z[{i}]" for i in range(len(Y))} <= set(fit.summary().index)


def test_export(fit):
    tree = fit.to_arviz(400, seed=0)
    assert tree.posterior["z"].dims == ("chain", "draw", "data")
    assert tree.posterior["z"].dtype.kind == "i"
    mu = tree.posterior["mu"].values[0, :, None]
    y = Y.numpy()
    expected = np.logaddexp(-((y - mu) ** 2) / 2, -((y + 2.0) ** 2) / 2) - np.log(2) - np.log(2 * np.pi) / 2
    np.testing.assert_allclose(tree.log_likelihood["y"].values[0], expected, rtol=1e-4, atol=1e-4)
    assert az.loo(tree).elpd_loo == pytest.approx(-2.3 * len(Y), abs=8)
    # Data are predicted at the discrete sites of the draw.
    noise = tree.posterior_predictive["y"].values - tree.posterior["shift"].values
    assert noise.std() == pytest.approx(1.0, abs=0.05)
    assert {"z", "mu"} <= set(tree.prior.data_vars)


def test_compare_knows_the_log_likelihood(fit):
    assert fg.compare({"fit": fit}, num_samples=400).loc["fit", "elpd_loo"] < 0


def test_predictive_works(fit):
    draws = Predictive(mixture, guide=fit.guide, num_samples=30)(Y)
    assert draws["z"].shape == (30, len(Y))


def test_drawing_and_whitening_outside_of_a_fit():
    evidence, mean, sd, _ = exact()
    guide = fg.AutoFlow(mixture).whiten(Y)
    assert float(guide.median(Y)["mu"]) == pytest.approx(mean, abs=0.3 * sd)
    draws = fg.draw(mixture, guide, Y, num_samples=2000, seed=0, log_likelihood=True)
    weights = draws.log_weights.double()
    assert float(weights.logsumexp(0) - np.log(2000)) == pytest.approx(evidence, abs=0.05)


def test_whitening_of_a_blocked_model_sees_the_data():
    """Pyro's block hides them from the guide; a fit has the whole model."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("n", len(y), dim=-1):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    fit = quick(model, fg.AutoFlow(poutine.block(model, expose=["mu"])), Y, num_steps=1)
    precision = len(Y) + 0.01
    assert float(fit.guide.median(Y)["mu"]) == pytest.approx(float(Y.sum()) / precision, abs=0.01)
    assert fit.verdict.kind is fg.VerdictKind.GOOD


def test_minibatches():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(Y), subsample_size=len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(torch.where(z > 0, mu, torch.tensor(-2.0)), 1.0), obs=y)

    batches = [Y[i::3] for i in range(3)]
    fit = quick(model, fg.AutoFlow(model), Y, batches=batches, num_steps=300)
    evidence, mean, sd, _ = exact()
    assert fit.elbo.value == pytest.approx(evidence, abs=0.1)
    assert float(fit.draws.mean()["mu"]) == pytest.approx(mean, abs=0.1)


def test_subsampled_data():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(Y), subsample_size=5) as chosen:
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(torch.where(z > 0, mu, torch.tensor(-2.0)), 1.0), obs=Y[chosen])

    fit = quick(model, fg.AutoFlow(model), num_steps=400)
    _, mean, sd, _ = exact()
    assert float(fit.draws.mean(weighted=False)["mu"]) == pytest.approx(mean, abs=0.3)
    assert float(fit.draws.sd(weighted=False)["mu"]) == pytest.approx(sd, rel=0.3)
    assert fit.draws.posterior().keys() == {"mu"}


def test_a_model_that_cannot_be_recorded_is_summed_draw_by_draw():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        if float(mu) > 100:
            raise OverflowError
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(torch.where(z > 0, mu, torch.tensor(-2.0)), 1.0), obs=y)

    guide = AutoNormal(poutine.block(model, expose=["mu"]), init_scale=0.4)
    guide(Y)
    _, mean, *_ = exact()
    pyro.param("AutoNormal.locs.mu").data.fill_(mean)
    with pytest.warns(UserWarning, match="Discrete latents are summed out draw by draw.*looks at the value"):
        draws = fg.draw(model, guide, Y, num_samples=200, seed=0)
    together = fg.draw(mixture, guide, Y, num_samples=200, seed=0)
    torch.testing.assert_close(draws.log_weights.mean(), together.log_weights.mean(), rtol=0, atol=0.1)
    assert draws.posterior()["z"].shape == (200, len(Y))


@config_enumerate
def chain(y):
    stay = pyro.sample("stay", dist.Beta(2.0, 2.0))
    z = torch.tensor(1)
    transition = torch.stack([torch.stack([stay, 1 - stay]), torch.stack([1 - stay, stay])])
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
        pyro.sample(f"y_{t}", dist.Normal(torch.tensor([-1.0, 1.0])[z], 1.0), obs=y[t])


@pytest.mark.slow
def test_a_chain():
    fit = quick(chain, fg.AutoFlow(chain), Y[4:8])
    assert "discrete sites summed out: 4" in repr(fit)
    assert fit.verdict.kind is fg.VerdictKind.GOOD
    with pytest.warns(UserWarning, match="'y_0' has no log-likelihood for each observation.*does not factorise"):
        tree = fit.to_arviz(100)
    assert "log_likelihood" not in tree
    assert tree.posterior["z_3"].shape == (1, 100)


def test_errors_come_at_once():
    def infinite(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Poisson(2.0))
        pyro.sample("y", dist.Normal(mu + k, 1.0), obs=y)

    for make in (lambda: fg.AutoFlow(infinite), lambda: fg.AutoFlow(poutine.block(infinite, hide=["k"]))):
        with pytest.raises(ValueError, match="'k' is discrete, Poisson, .* Ways out"), warnings.catch_warnings():
            quick(infinite, make(), Y[0])
