"""A guide that starts from draws of MCMC."""

import contextlib
import functools

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flowguides as fg
from pyro_flowguides import flows
from pyro_flowguides.training import from_draws
from pyro_flowguides.training.from_draws import unconstrained

small = functools.partial(flows.coupling, num_layers=2, hidden_dims=(8,))
QUICK = {"progress": False, "seed": 0}


def mixed(y=None):
    """A site that is positive, one on a simplex, and one in a plate."""
    tau = pyro.sample("tau", dist.LogNormal(1.0, 0.3))
    pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("groups", 2):
        pyro.sample("mu", dist.Normal(tau, 1.0))


def exact(num_draws, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tau = dist.LogNormal(1.0, 0.3).sample((num_draws,))
        p = dist.Dirichlet(torch.ones(3)).sample((num_draws,))
        mu = tau.unsqueeze(-1) + torch.randn(num_draws, 2)
    return {"tau": tau, "p": p, "mu": mu}


def test_the_guide_has_the_moments_of_the_draws_and_fit_goes_on():
    draws = exact(800)
    guide = fg.fit_to_draws(fg.AutoFlow(mixed, small), draws, num_steps=60, **QUICK)
    own = fg.draw(mixed, guide, num_samples=4000, seed=1)
    for name, value in draws.items():
        error = 5 * value.std(0) / 800**0.5
        assert bool(((own.values[name].mean(0) - value.mean(0)).abs() < error).all()), name
        torch.testing.assert_close(own.values[name].std(0), value.std(0), rtol=0.15, atol=0)
    loc, scale = guide.fixed_map.loc.clone(), guide.fixed_map.scale.clone()
    fit = fg.fit(mixed, guide, num_steps=60, num_particles=64, **QUICK)
    # Not whitened again.
    assert torch.equal(fit.guide.fixed_map.loc, loc)
    assert torch.equal(fit.guide.fixed_map.scale, scale)
    # The evidence of a model without data is 1.
    assert own.elbo.value < fit.elbo.value < 0.05


def ridge():
    tau = pyro.sample("tau", dist.LogNormal(1.0, 0.3))
    pyro.sample("mu", dist.Normal(5 * tau, 0.1))


def test_a_sharp_bent_ridge_keeps_its_width():
    """A normal law of these draws is ten times too wide across the ridge."""
    torch.manual_seed(0)
    tau = dist.LogNormal(1.0, 0.3).sample((800,))
    draws = {"tau": tau, "mu": 5 * tau + 0.1 * torch.randn(800)}
    guide = fg.fit_to_draws(fg.AutoCoupling(ridge), draws, num_steps=200, **QUICK)
    own = fg.draw(ridge, guide, num_samples=4000, seed=1)
    for name, value in draws.items():
        torch.testing.assert_close(own.values[name].std(0), value.std(0), rtol=0.1, atol=0)
    across = own.values["mu"] - 5 * own.values["tau"]
    assert 0.1 < float(across.std()) < 0.2
    # The evidence is 1.
    assert -0.5 < own.elbo.value < 0.02


@pytest.mark.parametrize("form", ["dict", "InferenceData", "vectors"])
def test_draws_come_in_three_forms(form):
    draws = exact(6)
    guide = fg.AutoFlow(mixed, small).setup()
    expected = unconstrained(guide.latents, draws)
    torch.testing.assert_close(expected[:, 0], draws["tau"].log())
    torch.testing.assert_close(expected[:, -2:], draws["mu"])
    given = {
        "dict": draws | {"other": torch.zeros(6)},
        "InferenceData": az.from_dict(
            **_posterior({name: value.reshape(2, 3, *value.shape[1:]).numpy() for name, value in draws.items()})
        ),
        "vectors": expected,
    }[form]
    torch.testing.assert_close(unconstrained(guide.latents, given), expected)


def test_draws_of_numpy_and_whole_numbers_are_taken():
    """In torch's default dtype where they have none of their own."""
    draws = exact(6)
    guide = fg.AutoFlow(mixed, small).setup()
    whole = draws | {"tau": torch.arange(1, 7), "mu": torch.arange(12).reshape(6, 2).numpy()}
    x = unconstrained(guide.latents, whole)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x[:, 0], torch.arange(1.0, 7.0).log())
    torch.testing.assert_close(x[:, -2:], torch.arange(12.0).reshape(6, 2))
    assert torch.equal(unconstrained(guide.latents, x.numpy()), x)


def _posterior(values):
    """As either generation of ArviZ takes it."""
    return {"posterior": values} if int(az.__version__.split(".")[0]) == 0 else {"data": {"posterior": values}}


@pytest.mark.parametrize("num_draws", [9, 10])
def test_the_fixed_map_has_the_moments_of_the_draws(num_draws):
    """Correlations where there are twice as many draws as coordinates."""
    guide = fg.AutoFlow(mixed, small)
    draws = exact(num_draws)
    few = pytest.warns(UserWarning, match="fit_to_draws: 9 points are too few for the correlations of 5")
    with few if num_draws == 9 else contextlib.nullcontext():
        fg.fit_to_draws(guide, draws, validation=None, num_steps=1, optim=still, **QUICK)
    x = unconstrained(guide.latents, draws)
    torch.testing.assert_close(guide.fixed_map.loc, x.mean(0))
    scale = guide.fixed_map.scale
    if num_draws == 9:
        torch.testing.assert_close(scale, x.std(0).diag())
    else:
        torch.testing.assert_close(scale @ scale.mT, torch.cov(x.mT))


@pytest.mark.parametrize(("options", "expected"), [({"num_steps": 7}, 7), ({}, 1000)])
def test_steps_are_counted_one_by_one(options, expected, monkeypatch):
    monkeypatch.setattr(from_draws.MaximumLikelihood, "run", lambda training: trained.append(training.num_steps))
    trained = []
    fg.fit_to_draws(fg.AutoFlow(mixed, small), exact(600), **options, **QUICK)
    assert trained == [expected]


def still(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


def two_modes():
    x = pyro.sample("x", dist.Normal(0.0, 5.0))
    pyro.factor("modes", torch.logaddexp(*(dist.Normal(loc, 0.5).log_prob(x) for loc in (-5.0, 5.0))))


def test_both_modes_are_covered():
    """KL(p, q), which maximum likelihood minimises, is infinite where q lacks a mode."""
    draws = {"x": dist.Normal(torch.tensor([[-5.0, 5.0]]), 0.5).sample((300,)).reshape(-1)}
    spline = functools.partial(flows.spline_coupling, num_layers=1)
    guide = fg.fit_to_draws(fg.AutoFlow(two_modes, spline), draws, num_steps=600, **QUICK)
    x = fg.draw(two_modes, guide, num_samples=2000, seed=0).values["x"]
    assert float((x > 0).float().mean()) == pytest.approx(0.5, abs=0.06)
    assert float((x.abs() < 3).float().mean()) < 0.06


def test_a_guide_of_a_fit_stays_what_it_is():
    fit = fg.fit(mixed, fg.AutoFlow(mixed, small), num_steps=1, num_particles=8, **QUICK)
    with pytest.raises(ValueError, match="has been trained"):
        fg.fit_to_draws(fit.guide, exact(50), **QUICK)


WRONG = {
    "missing": (lambda draws: {"tau": draws["tau"]}, ValueError, "no draws of latent site 'p'"),
    "shape": (lambda draws: draws | {"mu": draws["tau"]}, ValueError, r"site 'mu' must have shape \(n, \*\(2,\)\)"),
    "support": (
        lambda draws: draws | {"tau": -draws["tau"]},
        ValueError,
        "site 'tau' is not finite, or outside of the support",
    ),
    "few": (lambda draws: {name: value[:1] for name, value in draws.items()}, ValueError, "at least two draws.* got 1"),
    "infinite vectors": (lambda draws: torch.full((50, 5), torch.inf), ValueError, "all of them finite; got 50"),
    "one vector": (lambda draws: torch.zeros(5), ValueError, r"must have shape \(n, 5\), got \(5,\)"),
    "three dimensions": (lambda draws: torch.zeros(2, 5, 5), ValueError, r"must have shape \(n, 5\)"),
    "vectors": (lambda draws: draws["mu"], ValueError, r"must have shape \(n, 5\)"),
    "kind": (lambda draws: 3, TypeError, "draws must be a dict"),
    "constant": (lambda draws: draws | {"tau": torch.ones(50)}, ValueError, "latent coordinate 0 is constant"),
}


@pytest.mark.parametrize(("make", "kind", "message"), WRONG.values(), ids=WRONG)
def test_wrong_draws_are_errors_that_say_why(make, kind, message):
    with pytest.raises(kind, match=message):
        fg.fit_to_draws(fg.AutoFlow(mixed, small), make(exact(50)), **QUICK)


def test_a_support_that_depends_on_another_latent_is_refused():
    def model():
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Uniform(0.0, top))

    guide = fg.AutoFlow(model, small).setup()
    with pytest.raises(
        ValueError, match="the support of site 'x' depends on other latents; give unconstrained vectors"
    ):
        unconstrained(guide.latents, {"top": torch.ones(5), "x": 0.5 * torch.ones(5)})


def test_a_plan_that_is_wrong_is_named():
    with pytest.raises(ValueError, match="fit_to_draws: batch_size must be at least 1"):
        fg.fit_to_draws(fg.AutoFlow(mixed, small), exact(50), batch_size=0)


def test_another_guide_is_refused():
    with pytest.raises(TypeError, match="must be an AutoFlow"):
        fg.fit_to_draws(mixed, exact(50))
