"""Comparison of posteriors, and leave-one-out cross-validation against closed forms."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import conjugate, conjugate_answer, correlated
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoDelta, AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.diagnostics.compare import comparison_table
from pyro_flowguides.diagnostics.loo import loo
from pyro_flowguides.diagnostics.posterior import posterior_from_tree

MEAN, SD, LOG_EVIDENCE = conjugate_answer(torch.tensor([0.3, 1.4, 2.2, 0.7, 1.9]))


def data():
    """On the default device of the test."""
    return torch.tensor([0.3, 1.4, 2.2, 0.7, 1.9])


def scaled_guide(shift, scale):
    """The conjugate posterior, moved by a number of its sds and stretched."""

    def guide(y):
        pyro.sample("mu", dist.Normal(torch.tensor(MEAN + shift * SD), scale * SD))

    return guide


def scaled_draws(shift, scale, num_samples=20_000, seed=0):
    return fg.draw(
        conjugate, scaled_guide(shift, scale), data(), num_samples=num_samples, seed=seed, log_likelihood=True
    )


def exact_loo():
    """The log predictive density of every observation given the others, in closed form."""
    y, result = data(), []
    for i in range(len(y)):
        mean, sd, _ = conjugate_answer(torch.cat([y[:i], y[i + 1 :]]))
        result.append(float(dist.Normal(mean, (sd**2 + 1) ** 0.5).log_prob(y[i])))
    return np.array(result)


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
    monkeypatch.setattr("pyro_flowguides.diagnostics.loo.MAX_BATCH_ELEMENTS", 1000)
    with_masked = loo(np.insert(log_likelihood, 2, 0.0, axis=1))
    np.testing.assert_allclose(with_masked.pointwise, whole.pointwise)
    np.testing.assert_allclose(with_masked.khats, whole.khats)


def test_table():
    posteriors = {
        "exact": scaled_draws(0.0, 1.0),
        "off": scaled_guide(0.5, 1.5),
        "point": fg.draw(conjugate, AutoDelta(conjugate), data(), num_samples=100, log_likelihood=True),
    }
    with pytest.raises(ValueError, match="does not know its model"):
        fg.compare(posteriors, data())
    table = fg.compare(posteriors, data(), model=conjugate, reference="exact", num_samples=20_000)
    assert list(table.index) == list(posteriors)
    assert list(table.columns) == [
        *("elbo", "elbo_se", "khat", "khat_se", "ess_fraction"),
        *("elpd_loo", "elpd_loo_se", "loo_khat", "seconds", "mean_error", "sd_error"),
    ]
    # KL(N(m + sd/2, (1.5 sd)²) ‖ N(m, sd²)).
    gap = -np.log(1.5) + (1.5**2 + 0.5**2) / 2 - 0.5
    assert table.loc["exact", "elbo"] == pytest.approx(LOG_EVIDENCE, abs=1e-4)
    assert table.loc["off", "elbo"] == pytest.approx(LOG_EVIDENCE - gap, abs=4 * table.loc["off", "elbo_se"])
    # 20,000 draws: the error of a mean is 0.01 sd, that of an sd 0.005, in both rows.
    assert table.loc["off", "mean_error"] == pytest.approx(0.5, abs=0.05)
    assert table.loc["off", "sd_error"] == pytest.approx(0.5, abs=0.05)
    assert table.loc["exact", ["mean_error", "sd_error"]].tolist() == [0.0, 0.0]
    assert np.isnan(table.loc["exact", "khat"])
    assert table.loc["exact", "ess_fraction"] == pytest.approx(1)
    assert 0.5 < table.loc["off", "ess_fraction"] < 0.95
    assert table.loc["off", "elpd_loo"] == pytest.approx(exact_loo().sum(), abs=0.1)
    assert table.loc["point", ["khat", "ess_fraction", "elpd_loo"]].isna().all()
    assert table.loc["point", "sd_error"] == pytest.approx(-1)
    assert "mean_error" not in fg.compare({"exact": posteriors["exact"]}, data())


def test_fits_guides_and_mcmc_together():
    options = {"num_steps": 5, "num_particles": 4, "progress": False, "seed": 0}
    fit = fg.fit(conjugate, fg.AutoCoupling(conjugate), data(), **options)
    mcmc = MCMC(NUTS(conjugate), num_samples=400, warmup_steps=100, disable_progbar=True)
    mcmc.run(data())
    posteriors = {"flow": fit, "normal": AutoNormal(conjugate, init_scale=0.4), "nuts": mcmc}
    table = fg.compare(posteriors, data(), reference="nuts", num_samples=1000, seed=0)
    assert table.loc["flow", "seconds"] == fit.wall_time
    assert np.isnan(table.loc["normal", "seconds"])
    assert table.loc["nuts", ["elbo", "khat", "ess_fraction"]].isna().all()
    # 400 draws of NUTS are worth some 150: their mean has an error of 0.08 sd, their sd one of 6%.
    assert abs(table.loc["flow", "mean_error"]) < 0.4
    assert abs(table.loc["flow", "sd_error"]) < 0.3
    np.testing.assert_allclose(table.loc[["flow", "nuts"], "elpd_loo"], exact_loo().sum(), atol=0.2)
    again = fg.compare(posteriors, data(), reference="nuts", num_samples=1000, seed=0)
    assert again.equals(table)


def test_from_files():
    """What is written to a file compares as what it was written from."""
    draws = {"one": scaled_draws(0.5, 1.5, 1000), "other": scaled_draws(0.0, 1.2, 1000)}
    from_trees = comparison_table({name: posterior_from_tree(fg.to_arviz(one)) for name, one in draws.items()}, "other")
    expected = fg.compare(draws, data(), reference="other")
    np.testing.assert_allclose(from_trees.to_numpy(float), expected[from_trees.columns].to_numpy(float))
    mcmc = MCMC(NUTS(conjugate), num_samples=50, warmup_steps=20, disable_progbar=True)
    mcmc.run(data())
    one = comparison_table({"nuts": posterior_from_tree(fg.to_arviz(mcmc))}, "nuts")
    np.testing.assert_allclose(
        one.to_numpy(float), fg.compare({"nuts": mcmc}, reference="nuts")[one.columns].to_numpy(float)
    )


def test_labels_make_scalars_comparable():
    def vector():
        with pyro.plate("group", 2):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    def scalars():
        pyro.sample("x[a]", dist.Normal(0.0, 1.0))
        pyro.sample("x[b]", dist.Normal(0.0, 2.0))

    draws = {model.__name__: fg.draw(model, model, num_samples=4000) for model in (vector, scalars)}
    table = fg.compare(draws, reference="vector", coords={"group": ["a", "b"]})
    assert table.loc["scalars", "sd_error"] == pytest.approx(1.0, abs=0.1)
    with pytest.raises(ValueError, match=r"'scalars' has no scalar in common with .* whose first are x\[0\], x\[1\]"):
        fg.compare(draws, reference="vector")


def test_posteriors_that_cannot_be_compared():
    draws = scaled_draws(0.0, 1.2, 100)
    with pytest.raises(ValueError, match="the reference 'nuts' is not among a"):
        fg.compare({"a": draws}, reference="nuts")
    other = fg.draw(conjugate, scaled_guide(0.0, 1.2), data() + 1, num_samples=100, log_likelihood=True)
    with pytest.raises(ValueError, match="'b' is a fit of another model or of other data than 'a': site 'y' has other"):
        fg.compare({"a": draws, "b": other})
    other = fg.draw(conjugate, scaled_guide(0.0, 1.2), data()[:3], num_samples=100, log_likelihood=True)
    with pytest.raises(ValueError, match=r"site 'y' has shape \(3,\) and \(5,\)"):
        fg.compare({"a": draws, "b": other})

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(mu, 1.0), obs=y)

    other = fg.draw(model, AutoNormal(model), torch.tensor(0.0), num_samples=100)
    with pytest.raises(ValueError, match="the observed sites are z and y"):
        fg.compare({"a": draws, "b": other})
    with pytest.raises(TypeError, match="not int"):
        fg.compare({"a": 3})


def test_no_data_no_cross_validation():
    table = fg.compare({"a": fg.AutoFlow(correlated).whiten()}, num_samples=100)
    assert np.isnan(table.loc["a", "elpd_loo"])
