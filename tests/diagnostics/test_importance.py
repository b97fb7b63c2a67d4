"""Importance weights against closed forms: Pareto smoothing, bounds, estimates. Numpy alone."""

import math
import re

import numpy as np
import pytest
from draw_cases import data
from models import conjugate
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.diagnostics import importance
from pyro_flowguides.diagnostics.importance import Estimate, ImportanceWeights


@pytest.mark.parametrize(
    ("value", "se", "printed"),
    [
        (-31.31218, 0.00042, "-31.3122 ± 0.0004"),
        (-31.3271, 0.0042, "-31.327 ± 0.004"),
        (4096.6, 545.0, "4097 ± 545"),
        (0.25, 1.0, "0 ± 1"),
        (-1.23456, 0.0, "-1.235"),
        (-1.23456, math.nan, "-1.235"),
        (math.nan, math.nan, "nan"),
        (-math.inf, math.nan, "-inf"),
    ],
)
def test_an_estimate_prints_with_its_standard_error(value, se, printed):
    estimate = Estimate(value, se)
    assert str(estimate) == f"{estimate}" == printed
    assert f"{estimate:.2f}" == f"{value:.2f}"
    assert f"{estimate:>12.1e}" == f"{value:>12.1e}"
    assert float(estimate) == value or math.isnan(value)


@pytest.mark.parametrize("s", [1.5, 2.0])
def test_khat_of_a_guide_that_is_too_narrow(s):
    """For p = N(0, s²) and q = N(0, 1) the shape is 1 − 1/s²; at 20,000 draws its estimate has an sd of about 0.1."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=20_000)
    log_ratios = -0.5 * x**2 / s**2 - np.log(s) + 0.5 * x**2
    log_weights, khat = importance.psis(log_ratios)
    assert khat == pytest.approx(1 - 1 / s**2, abs=0.3)
    np.testing.assert_allclose(np.exp(log_weights).sum(), 1)
    assert (np.exp(log_weights) * x**2).sum() == pytest.approx(s**2, rel=0.4)


def test_standard_errors_cover_their_spread():
    guide = AutoNormal(conjugate, init_scale=0.3)
    repeats = [fg.draw(conjugate, guide, data(), num_samples=2000, seed=seed) for seed in range(20)]
    for name in ("elbo", "ess"):
        estimates = [getattr(draws, name) for draws in repeats]
        spread = np.std([estimate.value for estimate in estimates], ddof=1)
        # The sd of 20 values is known to 16%: a factor of 2.5 is beyond four standard errors, heavy tails included.
        assert np.median([estimate.se for estimate in estimates]) == pytest.approx(spread, rel=1.5)


@pytest.mark.parametrize("num_draws", [40, 43])
def test_draws_of_one_minibatch_are_one_observation_of_its_noise(num_draws):
    """The mean is that of all draws; its standard error comes from the whole minibatches, here 10 of 4."""
    shared = np.random.default_rng(0).normal(size=11)
    log_ratios = np.repeat(shared, 4)[:num_draws]
    estimate = importance.elbo(log_ratios, 4)
    assert estimate.value == pytest.approx(log_ratios.mean())
    assert estimate.se == pytest.approx(shared[:10].std(ddof=1) / 10**0.5)
    assert importance.elbo(log_ratios).se == pytest.approx(log_ratios.std(ddof=1) / num_draws**0.5)
    assert math.isnan(importance.elbo(log_ratios[:5], 4).se)


def test_draws_without_probability_have_no_weight():
    log_weights, _ = importance.psis(np.array([0.0] * 50 + [0.1] * 49 + [-np.inf]))
    assert np.exp(log_weights[-1]) < 1e-10


@pytest.mark.parametrize(
    ("log_ratios", "message"),
    [
        (np.zeros(5), "needs at least 25 draws to fit the tail of their weights, got 5"),
        (np.array([0.0] * 30 + [np.inf] * 2), r"2 of 32 draws .* \(the first is draw 30\)"),
        (np.array([np.inf] + [0.0] * 30), "1 of 31 draws have a log weight that is NaN or infinite"),
    ],
)
def test_weights_that_cannot_be_smoothed(log_ratios, message):
    with pytest.raises(ValueError, match=message):
        importance.psis(log_ratios)
    weights = ImportanceWeights(log_ratios + np.linspace(0, 1, len(log_ratios)), np.zeros(len(log_ratios)))
    assert re.search(message, weights.error)
    assert math.isnan(weights.khat.value) and math.isnan(weights.ess.value)
    assert math.isnan(weights.shape)


def test_few_draws_lower_the_threshold():
    assert importance.khat_threshold(10_000) == 0.7
    assert importance.khat_threshold(1000) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("weight", "expected"), [(1.0, 0.0), (5e4, 1 / 3)])
def test_the_smoothing_takes_weight_from_a_draw_that_stands_alone(weight, expected):
    log_ratios = 0.1 * np.random.default_rng(0).normal(size=100_000)
    log_ratios[7] = np.log(weight)
    weights = ImportanceWeights(log_ratios, np.zeros(100_000))
    assert weights.unexplained_mass == pytest.approx(expected, abs=0.01)
    # Elsewhere the smoothed weights are the weights.
    middle = np.argsort(log_ratios)[1000:90_000]
    np.testing.assert_allclose(weights.scaled_weights[middle], 100_000 * weights.weights[middle])


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


def test_draws_without_probability_are_not_an_exact_fit():
    log_p = np.zeros(100)
    log_p[:50] = -np.inf
    weights = ImportanceWeights(log_p, np.zeros(100))
    assert not weights.are_constant
    assert weights.ess.value == pytest.approx(50)
    with pytest.raises(ValueError, match="51 draws without replacement, of 50 that have"):
        weights.resample(51, False, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"50 of 100 draws .*the first is draw 0\)"):
        ImportanceWeights(-log_p, np.zeros(100)).weights  # noqa: B018


def test_one_row_of_many_that_cannot_be_smoothed():
    log_ratios = np.random.default_rng(0).normal(size=(3, 40))
    log_ratios[1, 7] = np.nan
    with pytest.raises(ValueError, match=r"1 of 40 draws .*\(the first is draw 7\)"):
        importance.psis(log_ratios)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("offset", [-5e4, 0.0, 5e4, 1e5])
def test_weights_are_constant_up_to_the_rounding_of_the_largest_density(offset, sign):
    log_q = sign * np.linspace(0.0, 1e5, 50)
    size = max(1e5, np.abs(log_q + offset).max())
    for units, expected in [(0, True), (40, True), (65, False)]:
        log_p = log_q + offset
        log_p[20] += units * np.finfo(float).eps * size
        assert ImportanceWeights(log_p, log_q).are_constant is expected, units
    assert not ImportanceWeights(np.array([0.0] * 30 + [1e-13]), np.zeros(31)).are_constant
    assert ImportanceWeights(np.array([0.0] * 30 + [1e-14]), np.zeros(31)).are_constant


def test_resampling_takes_any_number_with_replacement():
    weights, rng = ImportanceWeights(np.zeros(30), np.zeros(30)), np.random.default_rng(0)
    assert len(weights.resample(100, True, rng)) == 100
    assert len(set(weights.resample(30, False, rng))) == 30
    assert len(weights.resample(1, False, rng)) == len(weights.resample(1, True, rng)) == 1
    for replace in (True, False):
        with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
            weights.resample(0, replace, rng)


def test_a_tail_that_overflows_is_smoothed_without_a_warning():
    log_weights, khat = importance.psis(np.random.default_rng(0).normal(size=200) * 1e4)
    assert np.exp(log_weights).sum() == pytest.approx(1)
    assert khat > 10
