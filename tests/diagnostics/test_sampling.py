"""Draws of every kind of guide and model: shapes, densities, and which draws have no weights."""

import functools
import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from draw_cases import Y
from models import conjugate, correlated, kitchen_sink
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal

import pyro_flowguides as fg
from pyro_flowguides import transforms as T
from pyro_flowguides.model import memory
from pyro_flowguides.model.sites import has_stochastic_log_prob

QUICK = {"num_steps": 20, "num_particles": 8, "backend": "eager", "progress": False, "seed": 0}


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


def test_masked_entries_are_no_observations():
    def model(y, mask):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", 4), poutine.mask(mask=mask):
            pyro.sample("y", dist.Gamma(2.0, rate), obs=y)

    y = torch.tensor([1.0, 2.0, 3.0, 0.0])  # the last has log-probability −inf
    fit = fg.fit(model, fg.AutoCoupling(model), y, y > 0, **QUICK)
    assert np.isfinite(fit.elbo.value)
    draws = fg.draw(model, fit.guide, y, y > 0, num_samples=5, log_likelihood=True)
    assert (draws.log_likelihood["y"][:, 3] == 0).all()
    assert (draws.log_likelihood["y"][:, :3] != 0).all()


def test_a_single_draw_and_batches_of_one():
    guide, y = fg.AutoFlow(conjugate), torch.tensor(Y)
    assert len(fg.draw(conjugate, guide, y, num_samples=1)) == 1
    assert len(fg.draw(conjugate, guide, y, num_samples=3, batch_size=1).values["mu"].unique()) == 3


def masked(mask):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(Y)), poutine.mask(mask=mask):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(Y))


def masked_and_recorded(mask):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0)).reshape(1)
    with pyro.plate("data", len(Y)), poutine.mask(mask=mask):
        pyro.sample("y", dist.Normal(mu.expand(len(Y)), 1.0), obs=torch.tensor(Y))


def masked_and_looped(mask):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(Y)), poutine.mask(mask=mask):
        pyro.sample("y", dist.Normal(float(mu), 1.0), obs=torch.tensor(Y))


def masked_and_summed_out(mask):
    """A discrete site that is certain changes nothing."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(Y)):
        shift = pyro.sample("shift", dist.Bernoulli(0.0, validate_args=False))
        with poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(mu + shift, 1.0), obs=torch.tensor(Y))


@pytest.mark.parametrize(
    "mask", [torch.tensor([True, False, True, True, False]), torch.tensor(False), False, True], ids=str
)
@pytest.mark.parametrize("model", [masked, masked_and_recorded, masked_and_looped, masked_and_summed_out])
@pytest.mark.filterwarnings("ignore:The model cannot be vectorised")
def test_what_is_masked_has_no_log_likelihood(model, mask):
    """However the model is run: the log-likelihoods and the prior add up to the log density."""
    guide = AutoNormal(poutine.block(model, expose=["mu"]))
    draws = fg.draw(model, guide, mask, num_samples=3, log_likelihood=True)
    mu = draws.values["mu"]
    expected = torch.where(torch.as_tensor(mask), dist.Normal(mu[:, None], 1.0).log_prob(torch.tensor(Y)), 0.0)
    torch.testing.assert_close(draws.log_likelihood["y"], expected)
    torch.testing.assert_close(draws.log_p, dist.Normal(0.0, 1.0).log_prob(mu) + expected.sum(-1))


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


def test_memory_is_bounded_by_the_largest_site():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    sizes = []

    class Spy(poutine.messenger.Messenger):
        def _pyro_post_sample(self, msg):
            if msg["name"] == "y":
                sizes.append(msg["fn"].batch_shape.numel())

    y = torch.randn(20_000)
    guide = fg.AutoFlow(model).setup(y)
    with Spy():
        fg.draw(model, guide, y, num_samples=2000)
    assert memory.MAX_ELEMENTS / 2 < max(sizes) <= memory.MAX_ELEMENTS


def test_quantiles_of_a_simplex_are_those_of_its_coordinates():
    def model():
        pyro.sample("p", dist.Dirichlet(torch.tensor([2.0, 3.0, 8.0])))

    guide = fg.AutoFlow(model).whiten()
    low, middle, high = guide.quantiles([0.05, 0.5, 0.95])["p"]
    assert (low < middle).all()
    assert (middle < high).all()
    values = fg.draw(model, guide, num_samples=20_000).values["p"]
    for level, found in ((0.05, low), (0.5, middle), (0.95, high)):
        torch.testing.assert_close(found, values.quantile(level, 0), rtol=0, atol=0.02)


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
    assert re.search(
        rf"{int(wrong.sum())} of 200 draws have no density \(site 'y' of the model\)", draws.verdict.reason
    )
    np.testing.assert_array_equal(np.exp(draws.smoothed_log_weights) == 0, wrong.numpy())


# --- without weights --------------------------------------------------------------------------------------------------


def normal_mean(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, sigma), obs=y)


def half_delta():
    guide = AutoGuideList(normal_mean)
    guide.append(fg.AutoCoupling(poutine.block(normal_mean, expose=["mu"])))
    guide.append(AutoDelta(poutine.block(normal_mean, expose=["sigma"])))
    return guide


@pytest.mark.parametrize("make_guide", [lambda: AutoDelta(normal_mean), half_delta], ids=["all", "one site"])
def test_a_point_estimate_has_no_verdict(make_guide):
    fit = fg.fit(normal_mean, make_guide(), torch.tensor([0.5, 1.5, 0.2]), **QUICK)
    assert str(fit.verdict).startswith("unknown: the guide gives site '")
    assert "a single point" in str(fit.verdict)
    assert np.isnan(fit.khat.value)
    assert np.isnan(fit.ess.value)
    with pytest.raises(ValueError, match="no importance weights: the guide gives site"):
        fit.draws.weights  # noqa: B018
    assert np.isfinite(fit.elbo.value)


def minibatch(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=20) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])


def test_subsampled_data_have_no_verdict_and_an_elbo_over_minibatches():
    y = torch.randn(1000) + 1
    guide = AutoNormal(minibatch, init_scale=0.05)
    guide(y)
    repeats = [fg.draw(minibatch, guide, y, num_samples=1000, seed=seed).elbo for seed in range(8)]
    spread = np.std([estimate.value for estimate in repeats], ddof=1)
    # The sd of 8 values is known to 25%; if every draw counted as one with a minibatch of its own it would be three times theirs.
    assert 0.5 < np.mean([estimate.se for estimate in repeats]) / spread < 2
    draws = fg.draw(minibatch, guide, y, num_samples=1000, log_likelihood=True)
    assert draws.minibatch_size == 10
    means = draws.log_weights.double().reshape(100, 10).mean(-1)
    assert draws.elbo.se == pytest.approx(float(means.std()) / 10)
    with pytest.raises(ValueError, match="subsampled by plate 'data'"):
        draws.smoothed_log_weights  # noqa: B018
    assert np.isnan(draws.khat.value)
    assert draws.verdict.kind is fg.VerdictKind.UNKNOWN
    tree = fg.to_arviz(draws)
    assert set(tree["sample_stats"].data_vars) == {"lp", "log_q"}
    assert "observed_data" not in tree
    assert "log_likelihood" not in tree


def test_a_site_that_the_guide_leaves_out_is_drawn_from_its_prior():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu + shift, 1.0), obs=y)

    y = torch.tensor([0.3, 1.4, 2.2])
    guide = AutoNormal(poutine.block(model, expose=["mu"]), init_scale=1.0)
    with pytest.warns(UserWarning, match="The guide leaves out site 'shift': it is drawn from its prior") as warned:
        draws = fg.draw(model, guide, y, num_samples=20_000)
    assert [warning.filename for warning in warned] == [__file__]
    # Then the ratios are weights of a proposal, and their mean is the evidence.
    evidence = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 2).log_prob(y).exp()
    weights = draws.log_weights.double().exp()
    se = float(weights.std() / len(weights) ** 0.5)
    assert float(weights.mean()) == pytest.approx(float(evidence), abs=5 * se)


def residual_guide(model, log_det="hutchinson"):
    return fg.AutoFlow(model, functools.partial(fg.flows.residual, num_layers=1, hidden_dims=(8,), log_det=log_det))


def function_guide():
    """A guide without a class, whose flow is known from its site alone."""
    torch.manual_seed(0)
    flow = T.Residual(3, hidden_dims=(8,), log_det="roulette").double()
    base = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)
    pyro.sample("x", dist.TransformedDistribution(base, [flow]))


def two_sites():
    pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("b", dist.Normal(0.0, 1.0))


def guide_list():
    guide = AutoGuideList(two_sites)
    guide.append(residual_guide(poutine.block(two_sites, expose=["a"])))
    guide.append(AutoNormal(poutine.block(two_sites, expose=["b"])))
    return guide


@pytest.mark.parametrize(
    ("model", "make_guide", "expected"),
    [
        (correlated, lambda: residual_guide(correlated), True),
        (correlated, lambda: residual_guide(correlated, "roulette"), True),
        (correlated, lambda: fg.AutoContinuousFlow(correlated, field="network", trace="hutchinson"), True),
        (correlated, lambda: residual_guide(correlated, "exact"), False),
        (correlated, lambda: residual_guide(correlated, "series"), False),
        (correlated, lambda: fg.AutoCoupling(correlated), False),
        (correlated, lambda: AutoNormal(correlated), False),
        (correlated, lambda: function_guide, True),
        (two_sites, guide_list, True),
    ],
    ids=["hutchinson", "roulette", "continuous", "exact", "series", "coupling", "AutoNormal", "function", "guide list"],
)
def test_draws_know_whether_their_density_is_random(model, make_guide, expected):
    draws = fg.draw(model, make_guide(), num_samples=100)
    assert (draws.weights_error is not None) is expected
    assert math.isfinite(draws.elbo.value)
    assert (draws.verdict.kind is fg.VerdictKind.UNKNOWN) is expected
    assert math.isnan(draws.ess.value) is expected
    for use in (lambda: draws.weights, lambda: draws.smoothed_log_weights, lambda: draws.resample(2)):
        if expected:
            with pytest.raises(ValueError, match=r"random estimate.*log_det='exact'"):
                use()
        else:
            use()
    assert not draws.summary().empty
    sample_stats = fg.to_arviz(draws)["sample_stats"]
    assert {"lp", "log_q"} <= set(sample_stats)
    assert ("log_weight" in sample_stats) is not expected


def test_the_estimate_does_differ_from_call_to_call():
    """Otherwise there would be nothing to refuse."""
    guide = residual_guide(correlated).setup()
    with torch.no_grad():
        for parameter in guide.flow.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = guide.get_posterior().sample((3,))
    first, second = (guide.get_posterior().log_prob(x) for _ in range(2))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("log_det", ["hutchinson", "exact"])
def test_fit_reports_a_sentence(log_det):
    result = fg.fit(
        correlated, residual_guide(correlated, log_det), num_steps=3, num_particles=8, backend="eager", progress=False
    )
    assert math.isfinite(result.elbo.value) and math.isfinite(result.elbo.se)
    sample_stats = result.to_arviz(50)["sample_stats"]
    if log_det == "exact":
        assert not str(result.verdict).startswith("unknown")
        assert "log_weight" in sample_stats
    else:
        assert np.isnan(result.khat.value)
        assert str(result.verdict).startswith("unknown: the log-density of the guide is a random estimate")
        assert "log_weight" not in sample_stats


@pytest.mark.parametrize(
    "wrap",
    [
        lambda flow: flow,
        lambda flow: flow.expand((4,)),
        lambda flow: flow.expand((4,)).mask(False),
        lambda flow: flow.expand((4,)).to_event(1),
        lambda flow: dist.TransformedDistribution(flow, [dist.transforms.AffineTransform(0.0, 2.0)]),
        lambda flow: dist.TransformedDistribution(
            flow.base_dist, [dist.transforms.ComposeTransform([*flow.transforms, T.Reverse(2)])]
        ),
    ],
    ids=["bare", "expanded", "masked", "independent", "base", "composed"],
)
@pytest.mark.parametrize("log_det", ["hutchinson", "exact"])
def test_a_random_density_shows_through_what_wraps_it(wrap, log_det):
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    flow = fg.NormalizingFlow(base, T.Compose([T.Reverse(2), T.Residual(2, log_det=log_det)]))
    assert has_stochastic_log_prob(wrap(flow)) is (log_det == "hutchinson")
