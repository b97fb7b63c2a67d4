"""Whatever stands for a posterior: a fit, draws, any guide, MCMC, a file, and what is none."""

import dataclasses

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from draw_cases import fit_example, group_names, scaled_draws
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import (
    AutoDelta,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoStructured,
)

import pyro_flowguides as fg
from pyro_flowguides.diagnostics.posterior import Posterior, posterior_from_tree, posterior_of
from pyro_flowguides.examples import EIGHT_SCHOOLS

az = pytest.importorskip("arviz")


def test_any_guide_and_draws_give_the_same():
    guide = AutoMultivariateNormal(EIGHT_SCHOOLS.model)
    data = EIGHT_SCHOOLS.data()
    tree = fg.to_arviz(guide, model_kwargs=data, num_samples=50, seed=1)
    again = fg.to_arviz(guide, model_kwargs=data, num_samples=50, seed=1)
    np.testing.assert_array_equal(tree["posterior_predictive"]["y"], again["posterior_predictive"]["y"])
    draws = fg.draw(EIGHT_SCHOOLS.model, guide, model_kwargs=data, num_samples=50, seed=1, log_likelihood=True)
    alone, with_model = fg.to_arviz(draws), fg.to_arviz(draws, model=EIGHT_SCHOOLS.model, model_kwargs=data)
    np.testing.assert_array_equal(tree["posterior"]["theta"], alone["posterior"]["theta"])
    assert "prior" not in alone
    assert group_names(with_model) == group_names(tree)
    assert "posterior_predictive" not in fg.to_arviz(guide, model_kwargs=data, num_samples=30, predictive=False)
    # Resampled draws are no longer those of the guide.
    assert set(fg.to_arviz(draws.resample(20))["sample_stats"].data_vars) == {"lp"}


def test_a_fit_is_a_posterior_with_its_own_arguments():
    fit = fit_example(EIGHT_SCHOOLS)
    posterior = posterior_of(fit, num_samples=30, seed=1)
    assert [len(chain) for chain in posterior.chains] == [30]
    assert posterior.call.model is fit.model
    assert posterior.call.kwargs == fit.model_kwargs
    assert posterior.seconds == fit.wall_time
    torch.testing.assert_close(posterior_of(fit, num_samples=30, seed=1).chains[0].log_p, posterior.chains[0].log_p)
    ours, theirs = fit.to_arviz(30, seed=1), fg.to_arviz(fit, num_samples=30, seed=1)
    assert group_names(ours) == group_names(theirs)
    for name in ("posterior", "posterior_predictive", "prior", "variational_fit"):
        for variable in ours[name].data_vars:
            np.testing.assert_array_equal(ours[name][variable], theirs[name][variable])


def test_anything_that_hands_out_a_posterior_is_one():
    class Source:
        def to_posterior(self, num_samples):
            return Posterior([scaled_draws(0.0, 1.2, num_samples)], seconds=3.0)

    tree = fg.to_arviz(Source(), num_samples=40)
    assert tree["posterior"]["mu"].shape == (1, 40)
    assert "prior" not in tree
    assert fg.compare({"mine": Source()}, num_samples=40).loc["mine", "seconds"] == 3.0


def test_the_best_chain_is_the_one_with_the_highest_elbo():
    worse, better = scaled_draws(1.0, 1.5, 100), scaled_draws(0.1, 1.1, 100)
    assert Posterior([worse, better]).best() is better
    exact = [dataclasses.replace(draws, elbo_error="the draws come from MCMC") for draws in (worse, better)]
    together = Posterior(exact).best()
    assert len(together) == 200
    torch.testing.assert_close(together.values["mu"], torch.cat([worse.values["mu"], better.values["mu"]]))


def test_a_file_holds_the_posterior_that_was_written(tmp_path):
    draws = scaled_draws(0.5, 1.5, 1000)
    fg.to_arviz(draws).to_netcdf(str(tmp_path / "draws.nc"))
    (again,) = posterior_from_tree(az.from_netcdf(str(tmp_path / "draws.nc"))).chains
    for field in ("values", "unconstrained", "log_likelihood", "observed"):
        for name, value in getattr(draws, field).items():
            torch.testing.assert_close(getattr(again, field)[name].cpu(), value.cpu(), rtol=0, atol=0)
    assert (again.elbo, again.khat, again.verdict) == (draws.elbo, draws.khat, draws.verdict)
    assert again.dims["mu"] == draws.dims["mu"] == []


@pytest.mark.parametrize("Guide", [AutoDelta, AutoIAFNormal, AutoLaplaceApproximation, AutoStructured])
def test_every_guide_of_pyro(Guide):
    tree = fg.to_arviz(Guide(EIGHT_SCHOOLS.model), model_kwargs=EIGHT_SCHOOLS.data(), num_samples=30)
    assert tree["posterior"]["theta"].shape == tree["prior"]["theta"].shape == (1, 30, 8)
    # A point has no weights; the Laplace approximation is one until it has been asked for its covariance.
    point = Guide in (AutoDelta, AutoLaplaceApproximation)
    assert set(tree["sample_stats"].data_vars) == {"lp", "log_q"} | (set() if point else {"log_weight"})


def test_mcmc():
    data = EIGHT_SCHOOLS.data()
    mcmc = MCMC(NUTS(EIGHT_SCHOOLS.model, max_tree_depth=3), num_samples=30, warmup_steps=20, disable_progbar=True)
    with pytest.raises(ValueError, match="has not been run yet"):
        fg.to_arviz(mcmc)
    mcmc.run(**data)
    tree = fg.to_arviz(mcmc, coords=EIGHT_SCHOOLS.coords)
    samples = {name: value.cpu() for name, value in mcmc.get_samples().items()}
    np.testing.assert_array_equal(tree["posterior"]["mu"][0], samples["mu"])
    theta = samples["mu"].unsqueeze(-1) + samples["tau"].unsqueeze(-1) * samples["theta_tilde"]
    np.testing.assert_allclose(tree["posterior"]["theta"][0], theta, rtol=1e-4, atol=1e-4)
    trace = poutine.trace(
        poutine.condition(EIGHT_SCHOOLS.model, {name: value[3] for name, value in mcmc.get_samples().items()})
    ).get_trace(**data)
    assert float(tree["sample_stats"]["lp"][0, 3]) == pytest.approx(float(trace.log_prob_sum()), rel=1e-4)
    assert set(tree["sample_stats"].data_vars) == {"lp", "diverging"}
    assert tree["sample_stats"]["diverging"].dtype == bool
    assert tree["log_likelihood"]["y"].shape == tree["posterior_predictive"]["y"].shape == (1, 30, 8)


def looks_at_a_value(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0 if mu > 0 else 2.0), obs=y)


def test_a_warning_about_mcmc_points_at_the_users_line():
    mcmc = MCMC(NUTS(looks_at_a_value), num_samples=30, warmup_steps=10, disable_progbar=True)
    mcmc.run(torch.tensor(1.0))
    with pytest.warns(UserWarning, match="if mu > 0") as warned:
        fg.to_arviz(mcmc)
    assert [warning.filename for warning in warned] == [__file__]


def test_sources_that_are_none():
    with pytest.raises(TypeError, match="a fit, Draws, a guide or a pyro.infer.MCMC, not dict"):
        fg.to_arviz({})
    with pytest.raises(ValueError, match="does not know its model: give it with model="):
        fg.to_arviz(lambda: None)


def test_mcmc_of_a_potential_function():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    kernel = NUTS(potential_fn=lambda values: 0.5 * values["x"] ** 2)
    mcmc = MCMC(kernel, num_samples=5, warmup_steps=5, initial_params={"x": torch.tensor(0.0)}, disable_progbar=True)
    mcmc.run()
    with pytest.raises(ValueError, match="a potential function and no model: give the model with model="):
        fg.to_arviz(mcmc)
    tree = fg.to_arviz(mcmc, model=model)
    np.testing.assert_array_equal(tree["posterior"]["x"][0], mcmc.get_samples()["x"].cpu())
