"""Moments and quantiles of draws, weighted or not."""

import numpy as np

from pyro_flowguides.diagnostics import moments


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


def test_a_weighted_sd_is_unbiased_for_repeated_draws():
    """Weights 2/3 and 1/3 of two values: Σ w (x − mean)² / (1 − Σ w²)."""
    draws, weights = np.array([0.0, 3.0], dtype=np.float32), np.array([2 / 3, 1 / 3])
    np.testing.assert_allclose(moments.sd(draws, weights), (2 / (4 / 9)) ** 0.5)
    assert moments.sd(draws).dtype == np.float64
