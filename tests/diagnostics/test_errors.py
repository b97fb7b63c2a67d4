"""Estimated errors of moments against errors that are known. Numpy alone."""

import numpy as np
import pytest
from scipy import stats

from pyro_flowguides.diagnostics.errors import Unseen, fit_pareto, hidden_mean, moment_errors
from pyro_flowguides.diagnostics.importance import ImportanceWeights


def normal_weights(x, mean, sd):
    """Of draws of a standard normal, for a normal posterior."""
    return ImportanceWeights(-0.5 * ((x - mean) / sd) ** 2, -0.5 * x**2)


@pytest.mark.parametrize(("mean", "sd"), [(0.0, 0.8), (0.5, 0.8), (-0.3, 1.0), (0.0, 1.2), (0.4, 1.25), (2.0, 0.5)])
def test_errors_of_a_normal_for_a_normal(mean, sd):
    """The draws are off by (0 − mean) / sd and 1 / sd − 1, the weighted ones by no more than their standard error."""
    x = np.random.default_rng(0).normal(size=(2, 20_000))
    found = moment_errors({"a": x[0], "b": 3 - 7 * x[0], "c": x[1]}, normal_weights(x[0], mean, sd))
    for sign, i in ((1, 0), (-1, 1)):
        assert found.raw.mean_bias[i] == pytest.approx(-sign * mean / sd, abs=4 * found.raw.mean_se[i])
        assert found.raw.sd_bias[i] == pytest.approx(1 / sd - 1, abs=4 * found.raw.sd_se[i])
    # Of the weighted draws, and of a scalar that the weights have nothing to do with, there is the Monte-Carlo error alone.
    for errors in (found.raw, found.weighted):
        assert errors.mean[2] < 0.06 and errors.sd[2] < 0.06
    np.testing.assert_array_equal(found.raw.mean, np.hypot(found.raw.mean_bias, found.raw.mean_se))


def test_expected_errors_are_those_of_repetitions():
    """Of 40 sets of draws: the root mean square of the errors is what is expected of them."""
    actual, expected = [], []
    for seed in range(40):
        x = np.random.default_rng(seed).normal(size=2000)
        weights = normal_weights(x, 0.2, 1.1)
        mean = weights.weights @ x
        sd = (weights.weights @ (x - mean) ** 2) ** 0.5
        errors = moment_errors({"x": x}, weights)
        actual.append([(x.mean() - 0.2) / 1.1, x.std() / 1.1 - 1, (mean - 0.2) / 1.1, sd / 1.1 - 1])
        expected.append([errors.raw.mean[0], errors.raw.sd[0], errors.weighted.mean[0], errors.weighted.sd[0]])
    # The root mean square of 40 normal errors is known to 11%; what is hidden is added to that of the weighted ones.
    ratio = np.sqrt(np.mean(np.square(expected), 0) / np.mean(np.square(actual), 0))
    assert (ratio > 0.6).all() and (ratio < 2).all()


@pytest.mark.parametrize("sd", [1.8, 2.0, 2.5])
def test_what_no_draw_has_reached_is_expected(sd):
    """A guide that is too narrow: the weighted sd is too small, and known to be so."""
    missing, expected = [], []
    for seed in range(9):
        x = np.random.default_rng(seed).normal(size=10_000)
        weights = normal_weights(x, 0.0, sd)
        errors = moment_errors({"x": x}, weights)
        missing.append((weights.weights @ x**2) ** 0.5 / sd - 1)
        expected.append(errors.weighted.sd[0])
        assert errors.raw.sd_bias[0] < -0.35
    assert np.median(missing) < -0.05
    # To an order of magnitude, and rather too large.
    assert 0.5 < np.median(expected) / -np.median(missing) < 3


def test_a_few_draws_with_all_the_weight_have_no_errors():
    rng = np.random.default_rng(0)
    errors = moment_errors({"x": rng.normal(size=1000)}, ImportanceWeights(100 * rng.normal(size=1000), np.zeros(1000)))
    assert np.isnan([errors.raw.mean, errors.raw.sd, errors.weighted.mean, errors.weighted.sd]).all()


def test_infinite_draws_and_constants():
    rng = np.random.default_rng(0)
    x, log_p = rng.normal(size=(3, 1000)), 0.1 * rng.normal(size=1000)
    x[0, 4], x[1], log_p[4] = np.inf, 5.0, -np.inf
    errors = moment_errors(dict(zip("abc", x, strict=True)), ImportanceWeights(log_p, np.zeros(1000)))
    assert np.isinf([errors.raw.mean[0], errors.raw.sd[0]]).all() and errors.weighted.mean[0] < 0.1
    assert errors.raw.mean[1] == errors.raw.sd[1] == errors.sampling_sd[1] == 0
    assert 0 < errors.raw.mean[2] < 0.1


def test_sampling_error_of_an_sd():
    """It is √((κ − 1) / 4S) with the kurtosis κ: 3 of a normal, 9 of an exponential distribution."""
    rng = np.random.default_rng(0)
    columns = {"a": rng.normal(size=40_000), "b": rng.exponential(size=40_000), "c": rng.standard_t(1.5, size=40_000)}
    found = moment_errors(columns, ImportanceWeights(0.1 * rng.normal(size=40_000), np.zeros(40_000))).sampling_sd
    np.testing.assert_allclose(found[:2], [80_000**-0.5, 20_000**-0.5], rtol=0.15)
    assert found[2] > 0.1


def test_many_scalars_are_those_one_by_one():
    rng = np.random.default_rng(0)
    columns, weights = (
        {str(i): x for i, x in enumerate(rng.normal(size=(35, 500)))},
        ImportanceWeights(rng.normal(size=500), np.zeros(500)),
    )
    together = moment_errors(columns, weights)
    alone = [moment_errors({"x": column}, weights) for column in columns.values()]
    np.testing.assert_allclose(together.raw.mean, [each.raw.mean[0] for each in alone])
    np.testing.assert_allclose(together.weighted.sd, [each.weighted.sd[0] for each in alone])
    assert moment_errors({}, weights).raw.mean.shape == (0,)


@pytest.mark.parametrize("shape", [-0.3, 0.2, 0.6, 1.2])
def test_shape_and_scale_of_a_pareto_tail(shape):
    excess = np.sort(stats.genpareto.rvs(shape, scale=3.0, size=(2, 4000), random_state=0), axis=1)
    shapes, scales = fit_pareto(excess)
    # The standard error is about (1 + k) / √M.
    np.testing.assert_allclose(shapes, shape, atol=4 * (1 + max(shape, 0)) / 4000**0.5)
    np.testing.assert_allclose(scales, 3.0, rtol=0.15)


def test_the_mean_beyond_the_largest_value():
    """Of a Pareto distribution with shape k, the mean has S^(k − 1) / (1 − k) above its quantile 1 − 1/S."""
    values = stats.pareto.rvs(1 / 0.6, size=(200, 10_000), random_state=0)
    expected = (2 * 10_000) ** (0.6 - 1) / (1 - 0.6)
    # An estimate is known to a factor of two or three, the median of 200 to a tenth of that.
    assert np.median(hidden_mean(values)) == pytest.approx(expected, rel=0.3)
    np.testing.assert_array_equal(hidden_mean(np.ones((2, 100))), 0)


def test_errors_of_a_guide_of_one_mode_of_two():
    """The draws are of N(1, 2²), the posterior is 0.6 N(1.2, 2²) + 0.4 N(9, 1)."""
    x = 1 + 2 * np.random.default_rng(0).normal(size=10_000)
    weights = ImportanceWeights(-((x - 1.2) ** 2) / 8, -((x - 1.0) ** 2) / 8)
    unseen = Unseen(0.4, 0.01, {"x": (9.0, 1.0)})
    errors = moment_errors({"x": x, "y": -x}, weights, unseen)
    mean, sd = 0.6 * 1.2 + 0.4 * 9, (0.6 * 4 + 0.4 + 0.24 * (9 - 1.2) ** 2) ** 0.5
    found = [errors.raw.mean_bias[0], errors.raw.sd_bias[0], errors.weighted.mean_bias[0], errors.weighted.sd_bias[0]]
    expected = [(1 - mean) / sd, 2 / sd - 1, (1.2 - mean) / sd, 2 / sd - 1]
    np.testing.assert_allclose(found, expected, atol=0.02)
    # By 0.01 of the distance of the modes at least.
    assert 0.01 * (9 - 1.2) / sd < errors.raw.mean_se[0] < 0.03
    assert 0 < errors.raw.sd_se[0] < 0.03
    # Of y nothing is known.
    assert np.isnan([errors.raw.mean_bias[1], errors.raw.sd_bias[1], errors.weighted.mean_bias[1]]).all()
