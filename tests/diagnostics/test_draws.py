"""Draws, importance weights, verdicts, tables, ArviZ, plots."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import conjugate, conjugate_answer, kitchen_sink
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.diagnostics import importance
from pyro_flowguides.diagnostics.summary import summarize
from pyro_flowguides.examples import EIGHT_SCHOOLS

Y = [0.3, 1.4, 2.2, 0.7, 1.9]


def hierarchical(sigma, y):
    """Plates in plates, an event dimension, deterministic and observed sites."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("group", 2, dim=-2):
        effect = pyro.sample("effect", dist.Normal(mu, 1.0))
        with pyro.plate("unit", 4, dim=-1):
            total = pyro.deterministic("total", effect + mu)
            pyro.sample("y", dist.Normal(total, sigma), obs=y)
    pyro.deterministic("constant", torch.tensor(2.0))
    return weights


HIERARCHICAL = (torch.tensor(1.5), torch.arange(8.0).reshape(2, 4))


@pytest.mark.parametrize("Guide", [fg.AutoCoupling, AutoNormal, AutoMultivariateNormal])
@pytest.mark.parametrize("batch_size", [7, 1000])
def test_draws_have_the_shapes_of_their_sites(Guide, batch_size):
    guide = Guide(hierarchical)
    draws = fg.draw(hierarchical, guide, *HIERARCHICAL, num_samples=20, batch_size=batch_size, log_likelihood=True)
    shapes = {name: tuple(value.shape) for name, value in {**draws.values, **draws.deterministic}.items()}
    assert shapes == {
        "mu": (20,),
        "weights": (20, 3),
        "effect": (20, 2, 1),
        "total": (20, 2, 1),
        "constant": (20,),
    }
    assert draws.unconstrained["weights"].shape == (20, 2)
    assert draws.log_p.shape == draws.log_q.shape == (20,)
    assert draws.log_likelihood["y"].shape == (20, 2, 4)
    assert draws.observed["y"].shape == (2, 4)
    # A dimension of size 1 is not the plate of size 4.
    assert draws.dims["effect"] == ["group", "effect_dim_1"]
    assert draws.dims["total"] == ["group", "total_dim_1"]
    assert draws.dims["y"] == ["group", "unit"]
    assert len(draws) == 20


def test_densities_are_those_of_single_runs():
    guide = fg.AutoCoupling(hierarchical).setup(*HIERARCHICAL)
    draws = fg.draw(hierarchical, guide, *HIERARCHICAL, num_samples=3, log_likelihood=True)
    for i in range(3):
        latents = {name: value[i] for name, value in draws.values.items()}
        trace = pyro.poutine.trace(pyro.poutine.condition(hierarchical, latents)).get_trace(*HIERARCHICAL)
        torch.testing.assert_close(draws.log_p[i], trace.log_prob_sum())
        torch.testing.assert_close(
            draws.log_likelihood["y"][i], trace.nodes["y"]["fn"].log_prob(trace.nodes["y"]["value"])
        )
        torch.testing.assert_close(draws.deterministic["total"][i], trace.nodes["total"]["value"])


def test_every_support_can_be_drawn():
    draws = fg.draw(kitchen_sink, fg.AutoFlow(kitchen_sink), num_samples=5)
    assert draws.values["in_two_plates"].shape == (5, 3, 2)
    assert draws.unconstrained["simplex"].shape == (5, 2)
    assert draws.unconstrained["cholesky"].shape == (5, 1)
    assert draws.dims["in_two_plates"] == ["inner", "outer"]
    assert draws.dims["event_in_plate"] == ["outer", "event_in_plate_dim_1"]


def test_a_seed_makes_draws_repeatable():
    guide = fg.AutoCoupling(conjugate)
    first, second = (fg.draw(conjugate, guide, torch.tensor(Y), num_samples=5, seed=3) for _ in range(2))
    torch.testing.assert_close(first.log_q, second.log_q, rtol=0, atol=0)


def test_scales_and_masks_count():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with (
            pyro.plate("data", len(y)),
            pyro.poutine.scale(scale=2.0),
            pyro.poutine.mask(mask=torch.tensor([True, False])),
        ):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.tensor([1.0, 5.0])
    draws = fg.draw(model, fg.AutoFlow(model), y, num_samples=4)
    mu = draws.values["mu"]
    expected = dist.Normal(0.0, 1.0).log_prob(mu) + 2 * dist.Normal(mu, 1.0).log_prob(y[0])
    torch.testing.assert_close(draws.log_p, expected)


@pytest.mark.parametrize(("name", "value"), [("num_samples", 0), ("batch_size", 0)])
def test_numbers_of_draws_that_are_wrong(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        fg.draw(conjugate, fg.AutoFlow(conjugate), torch.tensor(Y), **{name: value})


# --- importance weights -----------------------------------------------------------------------------------------------


def test_exact_guide():
    y = torch.tensor(Y)
    guide = fg.AutoFlow(conjugate).whiten(y)
    draws = fg.draw(conjugate, guide, y, num_samples=2000)
    _, _, log_evidence = conjugate_answer(y)
    assert draws.elbo.value == pytest.approx(log_evidence, abs=1e-4)
    assert np.isnan(draws.khat.value)
    assert draws.ess.value == pytest.approx(2000)
    assert str(draws.verdict).startswith("exact")
    np.testing.assert_allclose(np.exp(draws.smoothed_log_weights).sum(), 1)


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
    y = torch.tensor(Y)
    guide = AutoNormal(conjugate, init_scale=0.3)
    repeats = [fg.draw(conjugate, guide, y, num_samples=2000, seed=seed) for seed in range(20)]
    for name in ("elbo", "ess"):
        estimates = [getattr(draws, name) for draws in repeats]
        spread = np.std([estimate.value for estimate in estimates], ddof=1)
        # The sd of 20 values is known to 16%: a factor of 2.5 is beyond four standard errors, heavy tails included.
        assert np.median([estimate.se for estimate in estimates]) == pytest.approx(spread, rel=1.5)


def test_draws_without_probability_have_no_weight():
    log_weights, _ = importance.psis(np.array([0.0] * 50 + [0.1] * 49 + [-np.inf]))
    assert np.exp(log_weights[-1]) < 1e-10


@pytest.mark.parametrize(
    ("log_ratios", "message"),
    [
        (np.zeros(5), "needs at least 25 draws to fit the tail of their weights, got 5"),
        (np.array([0.0] * 30 + [np.nan] * 2), r"2 of 32 draws .* \(the first is draw 30\)"),
        (np.array([np.inf] + [0.0] * 30), "1 of 31 draws have a log weight that is NaN or infinite"),
    ],
)
def test_weights_that_cannot_be_smoothed(log_ratios, message):
    with pytest.raises(ValueError, match=message):
        importance.psis(log_ratios)


@pytest.mark.parametrize(
    ("khat", "ess", "start"),
    [
        (float("nan"), 1.0, "exact"),
        (0.3, 0.95, "good: k-hat 0.30 is below 0.70 and 95% of the draws are effective. A mode"),
        (0.3, 0.3, "good once the draws are weighted or resampled: k-hat 0.30 is below 0.70 and 30% of the draws"),
        (0.8, 0.9999, "good: 100.0% of the draws are effective"),
        (0.8, 0.5, "doubtful: k-hat 0.80 is not below 0.70: the guide misses part of the posterior. Neither"),
        (0.8, 0.95, "doubtful: k-hat 0.80 is not below 0.70: the guide misses part of the posterior, a small one: 95%"),
        (float("inf"), 0.001, "doubtful: k-hat inf"),
    ],
)
def test_verdicts(khat, ess, start):
    assert str(importance.judge(khat, ess, 10_000)).startswith(start)


def test_few_draws_lower_the_threshold():
    assert importance.khat_threshold(10_000) == 0.7
    assert importance.khat_threshold(1000) == pytest.approx(2 / 3)
    assert str(importance.judge(0.68, 0.5, 1000)).startswith("doubtful")


# --- tables -----------------------------------------------------------------------------------------------------------


def test_summary_has_labels_and_moments():
    rng = np.random.default_rng(0)
    values = {"mu": rng.normal(3, 2, size=1000), "theta": rng.normal(size=(1000, 2, 1))}
    table = summarize(values, {"theta": ["school", "term"]}, {"school": ["a", "b"]}, (0.05, 0.5))
    assert list(table.index) == ["mu", "theta[a, 0]", "theta[b, 0]"]
    assert list(table.columns) == ["mean", "sd", "5%", "50%"]
    assert isinstance(table, pd.DataFrame)
    assert table.loc["mu", "mean"] == values["mu"].mean()
    assert table.loc["theta[b, 0]", "sd"] == pytest.approx(values["theta"][:, 1, 0].std(ddof=1))
    assert table.loc["mu", "5%"] == np.quantile(values["mu"], 0.05)


def test_labels_that_do_not_fit():
    values = {"theta": np.zeros((10, 2))}
    with pytest.raises(ValueError, match="'theta' has 1 dimensions, and 2 names for them: school, term"):
        summarize(values, {"theta": ["school", "term"]}, {}, ())
    with pytest.raises(ValueError, match="dimension 'school' of 'theta' has 2 elements and 3 labels in coords"):
        summarize(values, {"theta": ["school"]}, {"school": ["a", "b", "c"]}, ())


def test_summary_of_draws():
    data = EIGHT_SCHOOLS.data()
    draws = fg.draw(EIGHT_SCHOOLS.model, fg.AutoFlow(EIGHT_SCHOOLS.model), model_kwargs=data, num_samples=50)
    table = draws.summary(coords=EIGHT_SCHOOLS.coords, quantiles=(0.1,))
    assert "theta[Choate]" in table.index
    assert "theta_tilde[Mt. Hermon]" in table.index
    assert len(table) == 2 + 2 * 8
