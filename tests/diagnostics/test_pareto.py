"""Pareto smoothing of many sets of weights at once against ArviZ, which takes one after the other."""

import arviz as az
import numpy as np
import pytest

from pyro_flowguides.diagnostics import pareto

RNG = np.random.default_rng(0)
MAKERS = {
    "light": lambda shape: RNG.normal(size=shape),
    "heavy": lambda shape: 40 * RNG.standard_t(2, size=shape),
    "nearly equal": lambda shape: 1e-9 * RNG.normal(size=shape),
    "ties": lambda shape: RNG.normal(size=shape).round(1),
    "without density": lambda shape: np.where(RNG.random(shape) < 0.9, -1e30, RNG.normal(size=shape)),
    "equal": np.zeros,
}


@pytest.mark.parametrize("num_draws", [25, 200, 4000])
@pytest.mark.parametrize("kind", MAKERS)
def test_the_numbers_are_those_of_arviz(kind, num_draws, monkeypatch):
    monkeypatch.setattr(pareto, "MAX_ELEMENTS", 3 * num_draws)
    log_ratios = MAKERS[kind]((2, 4, num_draws))
    # Of heavy weights a quantile overflows, in both.
    with np.errstate(over="ignore"):
        expected, expected_shapes = az.psislw(log_ratios)
        found, shapes = pareto.smooth(log_ratios)
    np.testing.assert_allclose(shapes, expected_shapes, rtol=1e-9, atol=1e-9)
    # Draws with equal weights may change places.
    np.testing.assert_allclose(np.sort(found), np.sort(expected), rtol=1e-9, atol=1e-9)
    if kind != "ties":
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
