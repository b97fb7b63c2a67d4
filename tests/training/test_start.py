"""The start of a fit: what is whitened, and the error where training could not even begin."""

import functools
import math
import types

import pyro
import pyro.distributions as dist
import pytest
import torch
from fits import Y, quick
from models import conjugate, correlated
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value
from pyro.nn import PyroModule

import pyro_flowguides as fg
from pyro_flowguides.diagnostics.importance import Estimate
from pyro_flowguides.guides.base import Call
from pyro_flowguides.model.call import ModelCall
from pyro_flowguides.training import start


def infinite(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("wall", torch.where(mu.isfinite(), -torch.inf, 0.0))


@pytest.mark.parametrize("Guide", [fg.AutoCoupling, AutoNormal])
def test_nan_in_the_data(Guide):
    y = torch.tensor([0.3, float("nan"), 1.0])
    for validate in (True, False):
        with (
            pyro.validation_enabled(validate),
            pytest.raises(ValueError, match="observed site 'y' holds 1 NaN among its 3 values"),
        ):
            quick(conjugate, Guide(conjugate), y)


def test_some_draws_at_the_start_may_have_no_density():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(mu < 0, -torch.inf, 0.0))

    skipped = [
        quick(model, AutoNormal(model, init_scale=1.0), num_steps=5, num_particles=1, seed=seed).num_skipped
        for seed in range(5)
    ]
    # A draw from either side of the wall, more or less.
    assert 0 < sum(skipped) < 25


@pytest.mark.parametrize("Guide", [fg.AutoCoupling, AutoNormal])
def test_no_finite_elbo_at_the_start(Guide):
    with pytest.raises(ValueError, match="not finite at the start: site 'wall' of the model has log-probability -inf"):
        quick(infinite, Guide(infinite), torch.tensor(Y))


def test_a_model_that_does_not_vectorise_is_looped_over():
    def model(x, y):
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = x @ slope if slope.sum() > 0 else x @ slope.abs()
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    x, y = torch.randn(5, 2), torch.randn(5)
    with pytest.warns(UserWarning, match="cannot be vectorised over draws") as caught:
        fit = quick(model, fg.AutoPlanar(model), x, y, num_steps=3, num_particles=2, whiten="init")
    (message,) = {str(warning.message) for warning in caught}
    assert "docs/how_to/vectorise.md" in message
    # Pyro's table of sites is no sentence.
    assert "Trace Shapes" not in message
    assert len(fit.draws) == 1000
    assert fit.draws.values["slope"].shape == (1000, 2)


def badly_scaled(x, y):
    """An intercept and a slope that depend on one another, at a scale far from that of their priors."""
    intercept = pyro.sample("intercept", dist.Normal(y.new_tensor(0.0), 100.0))
    slope = pyro.sample("slope", dist.Normal(y.new_tensor(0.0), 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(intercept + slope * x, 0.5), obs=y)


def test_parts_of_a_list_start_at_the_medians_of_a_whitened_flow():
    """A product cannot hold the correlation; its parts start at the posterior's means, and fit leaves their maps there."""
    x = torch.linspace(0.0, 10.0, 30, dtype=torch.float64)
    y = 87.0 + 3.0 * x + 0.5 * torch.randn(30, dtype=torch.float64)
    design = torch.stack([torch.ones_like(x), x], -1)
    precision = design.mT @ design / 0.25 + torch.diag(torch.tensor([1e-4, 1e-2], dtype=torch.float64))
    mean = torch.linalg.solve(precision, design.mT @ y / 0.25)
    whole = fg.AutoFlow(badly_scaled).whiten(x, y)
    start = init_to_value(values=whole.median(x, y))
    guide = AutoGuideList(badly_scaled)
    for site in ("intercept", "slope"):
        part = poutine.block(badly_scaled, expose=[site])
        guide.append(fg.AutoPlanar(part, num_layers=1, init_loc_fn=start, init_scale=0.01))
    guide(x, y)
    maps = [(part.flow.transforms[-1].loc.clone(), part.flow.transforms[-1].scale.clone()) for part in guide]
    medians = guide.median(x, y)
    sd = precision.inverse().diag().sqrt()
    for index, site in enumerate(("intercept", "slope")):
        assert abs(medians[site] - mean[index]) < 0.01 * sd[index]
    quick(badly_scaled, guide, x, y, num_steps=3)
    for part, (loc, scale) in zip(guide, maps, strict=True):
        torch.testing.assert_close(part.flow.transforms[-1].loc, loc, rtol=0, atol=0)
        torch.testing.assert_close(part.flow.transforms[-1].scale, scale, rtol=0, atol=0)


def test_another_guide_has_nothing_to_whiten():
    with pytest.raises(ValueError, match="needs a guide of this library; AutoNormal has no fixed map"):
        quick(correlated, AutoNormal(correlated), whiten="batch_and_match")


def test_a_fit_switches_off_damping_in_every_flow_guide():
    def model(data):
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=data)

    data = torch.randn(4, 2)
    guide = fg.AmortizedFlow(model, torch.nn.Linear(2, 3), damped=True).setup(data)
    couplings = [part for part in guide.modules() if isinstance(part, fg.transforms.Coupling)]
    assert all(coupling.damped for coupling in couplings)
    fitted = quick(model, guide, data).guide
    couplings = [part for part in fitted.modules() if isinstance(part, fg.transforms.Coupling)]
    assert couplings
    assert not any(coupling.damped for coupling in couplings)


def test_a_shape_error_comes_at_once_in_the_words_of_pyro(recwarn, monkeypatch):
    """A column of observations has one log-probability for every pair of elements, and another posterior."""

    def column(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    monkeypatch.setattr(fg.AutoFlow, "whiten", lambda *args, **kwargs: pytest.fail("whitened first"))
    with pytest.raises(ValueError, match=r'at site "y", invalid log_prob shape\s+Expected \[5\], actual \[5, 5\]'):
        quick(column, fg.AutoFlow(column), torch.ones(5, 1))
    assert not recwarn.list


def test_a_wrong_size_comes_at_once(recwarn):
    def sizes(x, y):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"site 'y' has batch shape \(5,\), and its value \(3,\)"):
        quick(sizes, fg.AutoFlow(sizes), torch.ones(5), torch.ones(3))
    assert not recwarn.list


class Wrapper:
    def __init__(self, guide):
        self.guide = guide

    def __call__(self, *args):
        return self.guide(*args)


class Module(PyroModule):
    def __init__(self, guide):
        super().__init__()
        self.inner = guide

    def forward(self, *args):
        return self.inner(*args)


WRAPPINGS = {
    "lambda": lambda guide: lambda *args: guide(*args),
    "partial": lambda guide: functools.partial(guide),
    "scale": lambda guide: poutine.scale(guide, scale=1.0),
    "mask": lambda guide: poutine.mask(guide, mask=True),
    "block": lambda guide: poutine.block(guide, hide=["nothing"]),
    "object": Wrapper,
    "PyroModule": Module,
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_a_flow_guide_inside_of_another_guide_is_whitened_and_captured(wrap):
    """A step that is not captured would warn, and warnings are errors here."""
    x = torch.linspace(-1, 1, 20, dtype=torch.float64)
    y = 500 + 30 * x
    guide = fg.AutoFlow(badly_scaled)
    fit = fg.fit(badly_scaled, wrap(guide), x, y, num_steps=4, num_particles=8, seed=0, progress=False)
    evidence = dist.MultivariateNormal(
        torch.zeros(20, dtype=torch.float64), 0.25 * torch.eye(20) + 100.0**2 + 100 * torch.outer(x, x)
    ).log_prob(y)
    assert float(fit.elbo) == pytest.approx(float(evidence), abs=0.01)
    assert float(fit.losses[0]) == pytest.approx(-float(evidence), abs=0.1)


def two_sites(y):
    a, b = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "ab")
    pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)


def subsampled_sites(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4, subsample_size=2):
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)


def with_discrete(y):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    which = pyro.sample("which", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    pyro.sample("y", dist.Normal(a + which, 1.0), obs=y)


def flow_list(model):
    guide = AutoGuideList(model)
    for name in "ab":
        guide.append(fg.AutoFlow(poutine.block(model, expose=[name])))
    return guide


def flow_and_normal(model):
    guide = AutoGuideList(model)
    guide.append(fg.AutoFlow(poutine.block(model, expose=["a"])))
    guide.append(AutoNormal(poutine.block(model, expose=["b"])))
    return guide


@pytest.mark.parametrize(
    ("model", "Guide", "method", "trained", "may_start_over", "expected"),
    [
        (two_sites, fg.AutoFlow, "auto", False, True, "auto"),
        (two_sites, fg.AutoFlow, "init", False, False, "init"),
        (two_sites, fg.AutoFlow, None, False, True, None),
        (two_sites, lambda model: Wrapper(fg.AutoFlow(model)), "auto", False, True, "auto"),
        (two_sites, flow_list, "auto", False, True, None),
        (two_sites, flow_and_normal, "auto", False, True, None),
        (with_discrete, fg.AutoFlow, "auto", False, True, "auto"),
        (with_discrete, lambda model: Wrapper(fg.AutoFlow(model)), "auto", False, True, "auto"),
        (two_sites, fg.AutoFlow, "auto", True, True, "if better"),
        (two_sites, fg.AutoFlow, "auto", True, False, None),
        (two_sites, fg.AutoFlow, None, True, True, None),
        (two_sites, fg.AutoFlow, "init", True, True, "init"),
        (subsampled_sites, fg.AutoFlow, "auto", True, True, None),
        (subsampled_sites, fg.AutoFlow, "auto", False, True, "auto"),
    ],
)
def test_what_is_whitened(model, Guide, method, trained, may_start_over, expected, monkeypatch):
    """The flow guide that draws all latents that are not summed out, by itself or inside of another guide."""
    done, undamped = [], []

    def whiten(self, *args, method, model_kwargs, **options):
        done.append((method, args, dict(model_kwargs)))

    def start_over(self, target):
        done.append(("if better", target.call.args, dict(target.call.kwargs)))
        torch.rand(3)

    monkeypatch.setattr(fg.AutoFlow, "whiten", whiten)
    monkeypatch.setattr(fg.AutoFlow, "start_over_if_better", start_over)
    monkeypatch.setattr(fg.AutoFlow, "is_trained", lambda self: trained)
    monkeypatch.setattr(fg.AutoFlow, "undamp", lambda self: undamped.append(self))
    y = torch.tensor([0.3, 0.1]) if model is subsampled_sites else torch.tensor(0.3)
    guide = Guide(model)
    tracer, calls = start.set_up(ModelCall(model, (y,)), guide)
    state = torch.random.get_rng_state()
    start.whiten(calls, guide, method, tracer, may_start_over=may_start_over)
    assert done == ([] if expected is None else [(expected, (y,), {})])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert undamped == [each.guide for each in calls]
    assert len(undamped) == (2 if Guide is flow_list else 1)


@pytest.mark.parametrize(("worth", "inside"), [(10**9, 1), (10, 2)])
def test_small_steps_take_one_thread(worth, inside, monkeypatch):
    """The autouse fixture sets one thread again."""
    monkeypatch.setattr(start, "WORTH_THREADS", worth)
    torch.set_num_threads(2)
    seen = []
    quick(
        conjugate,
        fg.AutoFlow(conjugate),
        torch.tensor(Y),
        num_steps=3,
        callbacks=[lambda *_: seen.append(torch.get_num_threads())],
    )
    assert seen == [inside] * 3
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("error", "se", "continuous", "is_told"),
    [
        (0.3, 0.2, True, True),
        (0.2, 0.2, True, False),
        (0.1, 0.2, True, False),
        (0.3, 0.2, False, False),
        (0.3, math.nan, True, False),
        (math.nan, 0.2, True, True),
    ],
)
def test_an_error_of_a_solver_is_told_where_it_is_above_that_of_the_elbo(
    error, se, continuous, is_told, recwarn, monkeypatch
):
    class Solved:
        flow = object()

        def get_posterior(self, *args, **kwargs):
            assert (args, kwargs) == ((1,), {"two": 2})
            assert not torch.is_grad_enabled()
            torch.rand(3)
            return types.SimpleNamespace(ode_error=lambda: types.SimpleNamespace(log_det=error))

    monkeypatch.setattr(start, "is_continuous", lambda flow: continuous)
    state = torch.random.get_rng_state()
    start.warn_of_ode_error([Call(Solved(), (1,), {"two": 2})], Estimate(-3.0, se))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(recwarn) == is_told
    assert all("flow of Solved leaves an error of" in str(each.message) for each in recwarn)


@pytest.mark.parametrize(("num_elements", "inside"), [(10**6, 1), (2 * 10**6, 2)])
def test_a_million_elements_are_worth_a_second_thread(num_elements, inside):
    torch.set_num_threads(2)
    with start.threads_for(num_elements):
        assert torch.get_num_threads() == inside
    assert torch.get_num_threads() == 2


def test_the_largest_tensor_counts():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal((x.unsqueeze(-1) * torch.ones(50)).sum(), 1.0), obs=torch.tensor(0.0))

    tracer, _ = start.set_up(ModelCall(model), AutoNormal(model))
    assert tracer.elements_per_draw == 150
