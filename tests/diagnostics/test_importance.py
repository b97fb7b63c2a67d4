"""Importance weights against closed forms: bounds, resampling, weighted moments, diagnostics by scalar, messages."""

import dataclasses
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import conjugate, conjugate_answer
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.diagnostics import importance, moments
from pyro_flowguides.diagnostics.importance import ImportanceWeights

Y = [0.3, 1.4, 2.2, 0.7, 1.9]


def off_guide():
    """A normal guide of the conjugate model that is off by one sd of the posterior, and half as wide again."""
    mean, sd, _ = conjugate_answer(torch.tensor(Y))

    def guide(y):
        pyro.sample("mu", dist.Normal(torch.tensor(mean + sd), 1.5 * sd))

    return guide, mean, sd


@pytest.fixture
def off():
    guide, mean, sd = off_guide()
    return fg.draw(conjugate, guide, torch.tensor(Y), num_samples=20_000, seed=1), mean, sd


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


def test_weighted_moments_are_those_of_the_posterior(off):
    draws, mean, sd = off
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
    draws, mean, sd = off
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
    draws, *_ = off
    draws = dataclasses.replace(draws, deterministic={"log_p": draws.log_p}, log_likelihood={"y": draws.log_q})
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
    draws, *_ = off
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        draws.resample(0)
    with pytest.raises(ValueError, match="20001 draws without replacement, of 20000 that have a weight"):
        draws.resample(20_001, replace=False)


def test_iw_elbo_against_quadrature():
    r"""For log w ~ N(m, s²) and K = 2 the bound is :math:`m + E \log\cosh(d / 2)` with d ~ N(0, 2 s²)."""
    rng = np.random.default_rng(0)
    log_ratios = rng.normal(-3.0, 1.5, size=40_000)
    d = np.linspace(-20, 20, 20_001)
    density = np.exp(-(d**2) / (4 * 1.5**2)) / np.sqrt(4 * np.pi * 1.5**2)
    expected = -3.0 + (density * np.log(np.cosh(d / 2))).sum() * (d[1] - d[0])
    estimate = importance.iw_elbo(log_ratios, 2)
    assert estimate.value == pytest.approx(expected, abs=4 * estimate.se)
    bounds = [importance.iw_elbo(log_ratios, k).value for k in (1, 2, 10, 100)]
    assert bounds == sorted(bounds)
    assert bounds[0] == pytest.approx(importance.elbo(log_ratios).value)
    assert bounds[-1] < -3.0 + 1.5**2 / 2
    spread = np.std([importance.iw_elbo(part, 2).value for part in log_ratios.reshape(40, -1)], ddof=1)
    # The sd of 40 values is known to 11%.
    assert importance.iw_elbo(log_ratios[:1000], 2).se == pytest.approx(spread, rel=0.45)


@pytest.mark.parametrize("number", [0, 15])
def test_iw_elbo_needs_two_groups(number):
    with pytest.raises(ValueError, match=f"between 1 and half of the 20 draws, got {number}"):
        importance.iw_elbo(np.zeros(20), number)


def test_elbo_of_a_draw_without_density():
    estimate = importance.elbo(np.array([-np.inf, 0.0, 1.0]))
    assert estimate.value == -np.inf
    assert np.isnan(estimate.se)


def test_iw_elbo_is_between_elbo_and_evidence(off):
    draws, *_ = off
    *_, log_evidence = conjugate_answer(torch.tensor(Y))
    bound = draws.iw_elbo(50)
    assert draws.elbo.value + 0.1 < bound.value < log_evidence + 4 * bound.se


def test_khat_of_one_scalar():
    """Bounded weights are harmless, the mean of a scalar with Student's tails (k = 1 / degrees of freedom) is not."""
    rng = np.random.default_rng(0)
    weights = ImportanceWeights(np.log(rng.uniform(0.5, 1.5, size=20_000)), np.zeros(20_000))
    heavy, light = rng.standard_t(1.5, size=20_000), rng.normal(size=20_000)
    # The sd of a shape at 20,000 draws is about 0.1.
    assert weights.khat.value < 0
    assert weights.khat_of_mean(heavy) == pytest.approx(2 / 3, abs=0.3)
    assert weights.khat_of_mean(light) < 0.3
    assert weights.khat_of_mean(light + 1e3) == pytest.approx(weights.khat_of_mean(light), abs=1e-6)
    assert weights.khat_of_mean(np.ones(20_000)) == pytest.approx(weights.khat.value)
    assert np.isnan(ImportanceWeights(np.zeros(50), np.zeros(50)).khat_of_mean(light[:50]))


def test_summary_kinds(off):
    draws, mean, sd = off
    stats, diagnostics = draws.summary(weighted=True), draws.summary(kind="diagnostics")
    both = draws.summary(kind="all")
    assert list(diagnostics.columns) == ["khat", "shift", "ess", "mcse_mean"]
    assert list(both.columns) == [*stats.columns, *diagnostics.columns]
    assert stats.loc["mu", "mean"] == pytest.approx(draws.mean()["mu"])
    assert both.loc["mu", "mean"] == pytest.approx(draws.mean(weighted=False)["mu"])
    # The guide is one sd of the posterior above it.
    assert diagnostics.loc["mu", "shift"] == pytest.approx(-1.0, abs=0.05)
    assert draws.mean()["mu"] == pytest.approx(mean, abs=4 * diagnostics.loc["mu", "mcse_mean"])
    assert diagnostics.loc["mu", "ess"] == pytest.approx((sd / diagnostics.loc["mu", "mcse_mean"]) ** 2, rel=0.05)
    with pytest.raises(ValueError, match='"stats", "diagnostics" or "all", got \'statistics\''):
        draws.summary(kind="statistics")


def test_standard_error_of_a_weighted_mean_covers_its_spread():
    guide, *_ = off_guide()
    tables = []
    for seed in range(20):
        draws = fg.draw(conjugate, guide, torch.tensor(Y), num_samples=1000, seed=seed)
        tables.append((draws.mean()["mu"], draws.summary(kind="diagnostics").loc["mu", "mcse_mean"]))
    means, errors = np.array(tables).T
    # The sd of 20 values is known to 16%.
    assert np.median(errors) == pytest.approx(means.std(ddof=1), rel=0.65)


def test_equal_weights_change_nothing():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(500, 2, 1))
    weights = np.full(500, 1 / 500)
    np.testing.assert_allclose(moments.mean(draws, weights), moments.mean(draws))
    np.testing.assert_allclose(moments.sd(draws, weights), moments.sd(draws))
    # Two usual definitions of a quantile: they differ by less than the gap to the next draw.
    np.testing.assert_allclose(
        moments.quantiles(draws, [0.3, 0.5], weights), moments.quantiles(draws, [0.3, 0.5]), atol=0.05
    )
    np.testing.assert_allclose(moments.quantiles(draws > 0, [0.5], weights).shape, (1, 2, 1))


def test_weights_pick_draws():
    draws = np.array([[1.0], [2.0], [10.0]])
    assert moments.mean(draws, np.array([0.5, 0.5, 0.0])) == 1.5
    assert moments.quantiles(draws, [0.25, 0.75], np.array([0.5, 0.5, 0.0])).ravel().tolist() == [1.0, 2.0]


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


def test_the_first_site_without_density_is_named():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Normal(x.log(), 1.0), obs=torch.zeros(2))

    def guide():
        pyro.sample("x", dist.Normal(0.5, 1.0))

    with pyro.validation_enabled(False):
        draws = fg.draw(model, guide, num_samples=200)
    wrong = draws.values["x"] < 0
    message = (
        f"{int(wrong.sum())} of 200 draws .*the first is draw {int(wrong.int().argmax())}, at site 'y' of the model"
    )
    with pytest.raises(ValueError, match=message):
        draws.smoothed_log_weights  # noqa: B018
    assert np.isnan(draws.khat.value)
    assert re.search(message, draws.verdict.reason)


def test_draws_without_probability_are_not_an_exact_fit():
    log_p = np.zeros(100)
    log_p[:50] = -np.inf
    weights = ImportanceWeights(log_p, np.zeros(100))
    assert not weights.are_constant
    assert weights.ess.value == pytest.approx(50)
    assert not str(weights.verdict).startswith("exact")
    with pytest.raises(ValueError, match="51 draws without replacement, of 50 that have"):
        weights.resample(51, False, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"50 of 100 draws .*the first is draw 0\)"):
        ImportanceWeights(-log_p, np.zeros(100)).weights  # noqa: B018


def test_too_few_draws():
    draws = fg.draw(conjugate, off_guide()[0], torch.tensor(Y), num_samples=24)
    with pytest.raises(ValueError, match="needs at least 25 draws to fit the tail of their weights, got 24"):
        draws.smoothed_log_weights  # noqa: B018
    assert np.isnan(draws.ess.value)
    assert str(draws.verdict) == "unknown: PSIS needs at least 25 draws to fit the tail of their weights, got 24."


def test_sites_in_a_minibatch_are_not_draws_of_one_thing():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 50, subsample_size=10) as index:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    guide = AutoNormal(model, create_plates=lambda y: pyro.plate("data", 50, subsample_size=10))
    draws = fg.draw(model, guide, torch.zeros(50), num_samples=30)
    assert set(draws.posterior()) == {"mu"}
    assert set(draws.unconstrained) == {"mu"}
