"""Comparison of posteriors: of fits, guides, draws, MCMC, files."""

import dataclasses

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from draw_cases import LOG_EVIDENCE, QUICK, data, exact_loo, scaled_draws, scaled_guide
from models import conjugate, correlated
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoDelta, AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.diagnostics.compare import comparison_table
from pyro_flowguides.diagnostics.posterior import posterior_from_tree


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
    fit = fg.fit(conjugate, fg.AutoCoupling(conjugate), data(), **QUICK)
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


def test_the_worst_error_counts_with_its_sign():
    draws, (a, b, c) = scaled_draws(0.0, 1.2, 1000), torch.randn(3, 1000, dtype=torch.float64)
    exact = {"a": a, "b": b, "c": c, "constant": torch.ones(1000)}
    moved = {"a": a + 0.1, "b": 0.5 * b - 0.9, "c": 1.2 * c + 0.2, "constant": torch.zeros(1000)}
    posteriors = {
        name: dataclasses.replace(draws, values=values) for name, values in (("exact", exact), ("moved", moved))
    }
    table = fg.compare(posteriors, reference="exact")
    assert table.loc["moved", "mean_error"] == pytest.approx(float((moved["b"].mean() - b.mean()) / b.std()))
    assert table.loc["moved", "sd_error"] == pytest.approx(-0.5)
    constant = {"constant": dataclasses.replace(draws, values={"constant": torch.ones(1000)})}
    assert fg.compare(constant, reference="constant").loc["constant", ["mean_error", "sd_error"]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("order", [1, -1])
def test_draws_of_minibatches_are_compared_without_their_data(order):
    whole = scaled_draws(0.0, 1.2, 100)
    posteriors = {"whole": whole, "minibatches": dataclasses.replace(whole, observed={})}
    assert len(fg.compare(dict(list(posteriors.items())[::order]))) == 2


def test_data_that_are_all_masked_have_nothing_to_leave_out():
    draws = scaled_draws(0.0, 1.2, 100)
    masked = dataclasses.replace(draws, log_likelihood={"y": torch.zeros_like(draws.log_likelihood["y"])})
    assert fg.compare({"masked": masked}).loc["masked", ["elpd_loo", "loo_khat"]].tolist() == [0.0, -np.inf]
