"""A log q that is a random estimate never enters importance weights, k-hat, ESS or a verdict."""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import correlated
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoNormal

import pyro_flowguides as fg
from pyro_flowguides import transforms as T
from pyro_flowguides.model.sites import has_stochastic_log_prob


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
        (correlated, lambda: residual_guide(correlated, "exact"), False),
        (correlated, lambda: residual_guide(correlated, "series"), False),
        (correlated, lambda: fg.AutoCoupling(correlated), False),
        (correlated, lambda: AutoNormal(correlated), False),
        (correlated, lambda: function_guide, True),
        (two_sites, guide_list, True),
    ],
    ids=["hutchinson", "roulette", "exact", "series", "coupling", "AutoNormal", "function", "guide list"],
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
    result = fg.fit(correlated, residual_guide(correlated, log_det), num_steps=3, num_particles=8, progress=False)
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
