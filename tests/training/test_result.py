"""What a fit returns."""

import time

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from fits import Y, quick
from models import conjugate
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg


def test_reports_what_happened():
    before = time.perf_counter()
    fit = quick(conjugate, fg.AutoCoupling(conjugate), torch.tensor(Y))
    seconds = time.perf_counter() - before
    assert fit.losses.shape == (20,)
    assert (fit.num_skipped, fit.num_rolled_back) == (0, 0)
    assert len(fit.draws) == 10_000
    # Nearly all of the time of the call, whatever the machine.
    assert 0.2 * seconds < fit.wall_time <= seconds
    assert fit.restarts == ()
    assert fit.parameters == {}


def test_a_fit_has_the_estimates_of_its_draws():
    fit = quick(conjugate, AutoNormal(conjugate), torch.tensor(Y))
    assert fit.elbo == fit.draws.elbo
    assert fit.khat == fit.draws.khat
    assert fit.ess == fit.draws.ess
    assert fit.verdict == fit.draws.verdict
    assert 1 < float(fit.ess) < 10_000


def test_a_fit_prints_what_one_wants_to_know():
    fit = quick(conjugate, fg.AutoCoupling(conjugate), torch.tensor(Y))
    assert repr(fit) == (
        f"FitResult of AutoCoupling: ELBO {fit.elbo} after 20 steps, {fit.wall_time:.1f} s; {fit.verdict}"
    )
    assert "±" in str(fit.elbo)


@pytest.mark.parametrize(("number", "shown"), [(1, "p0"), (4, "p0, p1, p2, p3"), (6, "p0, p1, p2, p3 and 2 more")])
def test_a_fit_prints_the_first_parameters_of_its_model(number, shown):
    def model():
        shift = sum(pyro.param(f"p{index}", torch.tensor(0.0)) for index in range(number))
        pyro.sample("x", dist.Normal(shift, 1.0))

    fit = quick(model, AutoNormal(model), num_steps=1)
    assert f"; owns the parameters {shown} of the model; {fit.verdict}" in repr(fit)


def test_summary_is_that_of_the_draws():
    fit = quick(conjugate, AutoNormal(conjugate), torch.tensor(Y))
    summary = fit.summary(quantiles=[0.5], kind="stats")
    assert summary.loc["mu", "mean"] == pytest.approx(fit.draws.values["mu"].mean().item(), rel=1e-6)
    weighted = fit.summary(weighted=True)
    assert weighted.loc["mu", "mean"] == pytest.approx(float(fit.draws.mean()["mu"]), rel=1e-6)
    assert weighted.loc["mu", "mean"] != summary.loc["mu", "mean"]


def test_the_options_of_an_export_reach_it():
    y = torch.tensor(Y)
    fit = quick(conjugate, AutoNormal(conjugate), y, num_steps=1)
    names = {"coords": {"person": list("abcde")}, "dims": {"y": ["person"]}}
    tree = fit.to_arviz(30, prior=False, seed=1, **names)
    assert tree["posterior_predictive"]["y"].shape == (1, 30, 5)
    assert list(tree["observed_data"]["y"].coords["person"]) == list("abcde")
    assert not hasattr(tree, "prior")
    again, bare = fit.to_arviz(30, prior=False, seed=1), fit.to_arviz(30, predictive=False, seed=1)
    for group in ("posterior", "posterior_predictive"):
        for name in tree[group].data_vars:
            assert (tree[group][name].values == again[group][name].values).all()
    assert not hasattr(bare, "posterior_predictive")
    np.testing.assert_array_equal(tree["variational_fit"]["elbo"], -fit.losses)


@pytest.mark.parametrize("kind", ["stats", "diagnostics", "all"])
def test_the_options_of_a_summary_reach_the_draws(kind):
    fit = quick(vector, AutoNormal(vector), num_steps=1)
    options = {"quantiles": [0.25], "weighted": True, "coords": {"side": ["left", "right"]}, "dims": {"x": ["side"]}}
    pd.testing.assert_frame_equal(fit.summary(kind=kind, **options), fit.draws.summary(kind=kind, **options))
    assert "x[left]" in fit.summary(kind=kind, **options).index


def vector():
    pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))


# --- predictions on new arguments -------------------------------------------------------------------------------------


def grouped(x, group, num_groups, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    loc, scale = pyro.sample("loc", dist.Normal(0.0, 5.0)), pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("groups", num_groups):
        effect = pyro.sample("effect", dist.Normal(loc, scale))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(effect[group] + slope * x, 0.1), obs=y)


@pytest.fixture(scope="module")
def grouped_fit():
    pyro.set_rng_seed(0)
    x, group = torch.linspace(-1, 1, 60), torch.arange(60) % 5
    y = torch.tensor([2.0, 3.0, 4.0, 5.0, 6.0])[group] + x
    return fg.fit(grouped, fg.AutoFlow(grouped), x, group, 5, y, num_steps=300, progress=False, seed=0)


def test_new_rows_of_known_groups(grouped_fit):
    new = grouped_fit.predict(torch.tensor([0.5, -0.5]), torch.tensor([4, 0]), 5, num_samples=2000, seed=0)
    assert set(new) == {"y"}
    assert new["y"].shape == (2000, 2)
    torch.testing.assert_close(new["y"].mean(0), torch.tensor([6.5, 1.5]), rtol=0, atol=0.1)
    assert float(new["y"].std(0).max()) < 0.2


@pytest.mark.parametrize(("num_groups", "options"), [(2, {}), (5, {"new_plates": ["groups"]})])
def test_new_groups_have_effects_of_their_own(grouped_fit, num_groups, options):
    group = torch.zeros(3, dtype=torch.long)
    new = grouped_fit.predict(torch.zeros(3), group, num_groups, num_samples=3000, seed=0, **options)
    assert new["effect"].shape == (3000, num_groups)
    draws = grouped_fit.draws.values
    sd = float((draws["scale"].square().mean() + draws["loc"].var()).sqrt())
    assert float(new["effect"].std()) == pytest.approx(sd, rel=0.1)
    # Rows of one group share its effect.
    torch.testing.assert_close(new["y"][:, 0], new["y"][:, 1], rtol=0, atol=1.0)


def test_what_predictions_cannot_be_made_of(grouped_fit):
    rows = torch.zeros(2), torch.zeros(2, dtype=torch.long), 5
    with pytest.raises(ValueError, match="no plate 'group'; its plates are"):
        grouped_fit.predict(*rows, new_plates=["group"])

    def vector(size):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(size), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(beta.sum(-1), 1.0), obs=torch.tensor(0.0))

    fit = fg.fit(vector, fg.AutoFlow(vector), 3, num_steps=2, progress=False, whiten="init")
    with pytest.raises(ValueError, match=r"'beta' has shape \(4,\) with these arguments, and had \(3,\)"):
        fit.predict(4)
