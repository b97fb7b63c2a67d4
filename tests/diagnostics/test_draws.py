"""What draws know about the posterior: moments, resampling, tables, and the attributes that judge the guide."""

import copy
import dataclasses
import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from draw_cases import LOG_EVIDENCE, MEAN, SD, data, scaled_draws
from models import conjugate
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.diagnostics.draws import concatenate
from pyro_flowguides.examples import EIGHT_SCHOOLS


@pytest.fixture
def off():
    """Draws of a guide that is off by one sd of the posterior, and half as wide again."""
    return scaled_draws(1.0, 1.5, seed=1)


def test_exact_guide():
    y = data()
    guide = fg.AutoFlow(conjugate).whiten(y)
    draws = fg.draw(conjugate, guide, y, num_samples=2000)
    assert draws.elbo.value == pytest.approx(LOG_EVIDENCE, abs=1e-4)
    assert np.isnan(draws.khat.value)
    assert draws.ess.value == pytest.approx(2000)
    assert draws.verdict.kind is fg.VerdictKind.EXACT
    np.testing.assert_allclose(np.exp(draws.smoothed_log_weights).sum(), 1)


@pytest.mark.parametrize("s", [1.5, 2.0])
def test_khat_of_draws_from_a_guide_that_is_too_narrow(s):
    """For p = N(0, s²) and q = N(0, 1) the shape is 1 − 1/s²; at 20,000 draws its estimate has an sd of about 0.1."""

    def model():
        pyro.sample("x", dist.Normal(torch.tensor(0.0), s))

    def guide():
        pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))

    draws = fg.draw(model, guide, num_samples=20_000, seed=0)
    khat = draws.khat
    assert khat.value == pytest.approx(1 - 1 / s**2, abs=0.3)
    assert 0.03 < khat.se < 0.3
    # log w = x² (1 − 1/s²) / 2 − log s, and E[x²] = 1.
    assert draws.elbo.value == pytest.approx((1 - 1 / s**2) / 2 - np.log(s), abs=4 * draws.elbo.se)


def test_the_attributes_are_computed_once_and_travel_with_the_draws(off):
    assert off.elbo is off.elbo and off.khat is off.khat and off.ess is off.ess and off.verdict is off.verdict
    assert off.verdict.khat == off.khat.value
    assert off.verdict.ess_fraction == off.ess.value / len(off)
    assert off.verdict.num_draws == len(off) == 20_000
    for other in (copy.deepcopy(off), pickle.loads(pickle.dumps(off))):
        assert (other.elbo, other.khat, other.ess, other.verdict) == (off.elbo, off.khat, off.ess, off.verdict)
    # A part of the draws is judged anew.
    assert off[:1000].verdict.num_draws == 1000
    assert off[:1000].khat != off.khat


def test_weighted_moments_are_those_of_the_posterior(off):
    draws, mean, sd = off, MEAN, SD
    # The error of a weighted mean is that of ESS draws.
    error = sd / draws.ess.value**0.5
    assert draws.mean()["mu"] == pytest.approx(mean, abs=4 * error)
    assert draws.sd()["mu"] == pytest.approx(sd, abs=4 * error)
    assert draws.mean(weighted=False)["mu"] == pytest.approx(mean + sd, abs=4 * 1.5 * sd / 20_000**0.5)
    assert draws.sd(weighted=False)["mu"] == pytest.approx(1.5 * sd, rel=0.03)
    # The density at the 5% quantile is a fifth of that at the mean times sd: an error of about 2.1 of the mean's.
    levels = [0.05, 0.5, 0.95]
    expected = dist.Normal(mean, sd).icdf(torch.tensor(levels)).cpu()
    np.testing.assert_allclose(draws.quantiles(levels)["mu"], expected, atol=4 * 2.2 * error)


@pytest.mark.parametrize(("replace", "number"), [(True, 20_000), (False, 1000)])
def test_resampled_moments_are_those_of_the_posterior(off, replace, number):
    draws, mean, sd = off, MEAN, SD
    resampled = draws.resample(number, replace=replace, seed=0)
    error = sd * (1 / draws.ess.value + 1 / number) ** 0.5
    # Without replacement, 5% of the draws use up the best ones a little: the bias is of the order of 5% of the shift.
    bias = 0.0 if replace else 0.05 * sd
    assert len(resampled) == number
    assert resampled.mean(weighted=False)["mu"] == pytest.approx(mean, abs=4 * error + bias)
    assert resampled.sd(weighted=False)["mu"] == pytest.approx(sd, abs=4 * error + bias)
    distinct = len(np.unique(resampled.posterior()["mu"]))
    assert distinct == number if not replace else distinct < number
    for estimate in (resampled.elbo, resampled.khat, resampled.ess):
        assert np.isnan(estimate.value) and np.isnan(estimate.se)
    assert str(resampled.verdict).startswith("unknown: the draws have been resampled")
    for refused in (resampled.iw_elbo, lambda: resampled.smoothed_log_weights):
        with pytest.raises(ValueError, match="have been resampled"):
            refused()
    assert "log_weight" not in resampled.to_dataframe()


def test_resampling_keeps_the_parts_of_a_draw_together(off):
    draws = dataclasses.replace(off, deterministic={"log_p": off.log_p}, log_likelihood={"y": off.log_q})
    resampled = draws.resample(50, seed=3)
    torch.testing.assert_close(resampled.deterministic["log_p"], resampled.log_p)
    torch.testing.assert_close(resampled.log_likelihood["y"], resampled.log_q)
    torch.testing.assert_close(resampled.values["mu"], resampled.unconstrained["mu"])
    torch.testing.assert_close(draws.resample(50, seed=3).log_p, resampled.log_p)
    pyro.set_rng_seed(5)
    first = draws.resample(50).log_p
    pyro.set_rng_seed(5)
    torch.testing.assert_close(draws.resample(50).log_p, first)


def test_resampling_that_cannot_be(off):
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        off.resample(0)
    with pytest.raises(ValueError, match="20001 draws without replacement, of 20000 that have a weight"):
        off.resample(20_001, replace=False)


def test_iw_elbo_is_between_elbo_and_evidence(off):
    bound = off.iw_elbo(50)
    assert off.elbo.value + 0.1 < bound.value < LOG_EVIDENCE + 4 * bound.se


def test_too_few_draws():
    draws = scaled_draws(1.0, 1.5, num_samples=24)
    with pytest.raises(ValueError, match="needs at least 25 draws to fit the tail of their weights, got 24"):
        draws.smoothed_log_weights  # noqa: B018
    assert np.isnan(draws.ess.value)
    assert str(draws.verdict) == "unknown: PSIS needs at least 25 draws to fit the tail of their weights, got 24."


def test_draws_one_after_the_other(off):
    parts = [off[:7], off[7:20]]
    together = concatenate(parts)
    torch.testing.assert_close(together.values["mu"], off.values["mu"][:20], rtol=0, atol=0)
    torch.testing.assert_close(together.log_likelihood["y"], off.log_likelihood["y"][:20], rtol=0, atol=0)
    torch.testing.assert_close(together.log_weights, off.log_weights[:20], rtol=0, atol=0)
    assert together.dims == off.dims
    wrong = dataclasses.replace(parts[1], non_finite_site="site 'y' of the model")
    assert concatenate([parts[0], wrong]).non_finite_site == "site 'y' of the model"


def test_summary_kinds(off):
    draws, mean, sd = off, MEAN, SD
    stats, diagnostics = draws.summary(weighted=True), draws.summary(kind="diagnostics")
    both = draws.summary(kind="all")
    errors = ["mean_error", "mean_error_se", "sd_error", "sd_error_se"]
    assert list(diagnostics.columns) == ["khat", "shift", "ess", "mcse_mean", *errors]
    assert list(both.columns) == [*stats.columns, *diagnostics.columns]
    assert stats.loc["mu", "mean"] == pytest.approx(draws.mean()["mu"])
    assert both.loc["mu", "mean"] == pytest.approx(draws.mean(weighted=False)["mu"])
    # The guide is one sd of the posterior above it.
    assert diagnostics.loc["mu", "shift"] == pytest.approx(-1.0, abs=0.05)
    assert diagnostics.loc["mu", "mean_error"] == pytest.approx(1.0, abs=4 * diagnostics.loc["mu", "mean_error_se"])
    assert diagnostics.loc["mu", "sd_error"] == pytest.approx(0.5, abs=4 * diagnostics.loc["mu", "sd_error_se"])
    weighted = draws.summary(kind="diagnostics", weighted=True).loc["mu"]
    assert abs(weighted["mean_error"]) < 4 * weighted["mean_error_se"] < 0.1
    assert draws.mean()["mu"] == pytest.approx(mean, abs=4 * diagnostics.loc["mu", "mcse_mean"])
    assert diagnostics.loc["mu", "ess"] == pytest.approx((sd / diagnostics.loc["mu", "mcse_mean"]) ** 2, rel=0.05)
    with pytest.raises(ValueError, match='"stats", "diagnostics" or "all", got \'statistics\''):
        draws.summary(kind="statistics")


def test_standard_error_of_a_weighted_mean_covers_its_spread():
    tables = []
    for seed in range(20):
        draws = scaled_draws(1.0, 1.5, 1000, seed)
        tables.append((draws.mean()["mu"], draws.summary(kind="diagnostics").loc["mu", "mcse_mean"]))
    means, errors = np.array(tables).T
    # The sd of 20 values is known to 16%.
    assert np.median(errors) == pytest.approx(means.std(ddof=1), rel=0.65)


def test_summary_of_draws():
    data = EIGHT_SCHOOLS.data()
    draws = fg.draw(EIGHT_SCHOOLS.model, fg.AutoFlow(EIGHT_SCHOOLS.model), model_kwargs=data, num_samples=50)
    table = draws.summary(coords=EIGHT_SCHOOLS.coords, quantiles=(0.1,))
    assert "theta[Choate]" in table.index
    assert "theta_tilde[Mt. Hermon]" in table.index
    assert len(table) == 2 + 2 * 8


def test_dataframe_of_draws():
    def model():
        pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("group", 2):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    draws = fg.draw(model, AutoNormal(model), num_samples=100)
    table = draws.to_dataframe(coords={"group": ["a", "b"], "topic": ["u", "v", "w"]}, dims={"p": ["topic"]})
    assert list(table.columns) == ["p[u]", "p[v]", "p[w]", "x[a]", "x[b]", "log_p", "log_q", "log_weight"]
    np.testing.assert_array_equal(table["x[b]"], draws.values["x"][:, 1].cpu())
    assert np.exp(table["log_weight"]).sum() == pytest.approx(1)
    clash = dataclasses.replace(draws, deterministic={"log_q": draws.log_q})
    with pytest.raises(ValueError, match="a site is called 'log_q', as a column of the table is"):
        clash.to_dataframe()
    with pytest.raises(ValueError, match="dimension 'group' of 'x' has 2 elements and 1 labels"):
        draws.to_dataframe(coords={"group": ["a"]})
