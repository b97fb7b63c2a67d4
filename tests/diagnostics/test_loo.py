"""Leave-one-out cross-validation of a normal mean against its closed form."""

import numpy as np
import pytest
from draw_cases import exact_loo, scaled_draws

from pyro_flowguides.diagnostics.loo import loo


@pytest.mark.parametrize("corrected", [True, False])
def test_loo_of_a_guide_needs_its_correction(corrected):
    draws = scaled_draws(1.0, 1.3)
    log_ratios = draws.weights.log_ratios if corrected else None
    results = [loo(draws.log_likelihood["y"].cpu().numpy(), log_ratios)]
    # The Monte-Carlo error of one observation, from repeats of other seeds.
    for seed in range(1, 6):
        repeat = scaled_draws(1.0, 1.3, seed=seed)
        results.append(loo(repeat.log_likelihood["y"].cpu().numpy(), repeat.weights.log_ratios if corrected else None))
    error = np.std([result.pointwise for result in results], axis=0, ddof=1)
    distance = np.abs(results[0].pointwise - exact_loo()) / error
    # The sd of six repeats is known to 30%.
    assert (distance < 6).all() if corrected else (distance > 6).any()


def test_loo_of_posterior_draws():
    draws = scaled_draws(0.0, 1.0)
    result = loo(draws.log_likelihood["y"].cpu().numpy())
    np.testing.assert_allclose(result.pointwise, exact_loo(), atol=0.02)
    assert result.elpd == pytest.approx(exact_loo().sum(), abs=0.05)
    assert result.se == pytest.approx(len(exact_loo()) ** 0.5 * exact_loo().std(ddof=1), rel=0.05)
    assert (result.khats < 0.7).all()


def test_loo_in_batches_and_without_masked_entries(monkeypatch):
    log_likelihood = scaled_draws(0.0, 1.0, 500).log_likelihood["y"].cpu().numpy()
    whole = loo(log_likelihood)
    monkeypatch.setattr("pyro_flowguides.diagnostics.loo.MAX_ELEMENTS", 1000)
    with_masked = loo(np.insert(log_likelihood, 2, 0.0, axis=1))
    np.testing.assert_allclose(with_masked.pointwise, whole.pointwise)
    np.testing.assert_allclose(with_masked.khats, whole.khats)


def test_one_observation_has_no_standard_error():
    log_likelihood = np.random.default_rng(0).normal(size=(100, 1))
    result = loo(log_likelihood)
    assert result.pointwise.shape == result.khats.shape == (1,)
    assert result.elpd == result.pointwise[0]
    assert np.isnan(result.se)
