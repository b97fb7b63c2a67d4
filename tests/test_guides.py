"""What is particular to the flow guides; the contract that they share with Pyro's is in conformance/."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from guide_cases import StudentTFlow, Y, every_guide, train
from models import conjugate, correlated
from pyro import poutine
from pyro.infer import (
    Trace_ELBO,
)
from pyro.infer.autoguide import init_to_value
from pyro.infer.reparam import NeuTraReparam

import pyro_flowguides as fg


def no_latents():
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))


def discrete():
    pyro.sample("k", dist.Bernoulli(0.5))


def projected_normal():
    pyro.sample("direction", dist.ProjectedNormal(torch.ones(3)))


def sequential_plate():
    for i in pyro.plate("loop", 2):
        pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0))


def local_latents():
    with pyro.plate("rows", 10, subsample_size=3):
        pyro.sample("local", dist.Normal(0.0, 1.0))


@every_guide
@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (no_latents, RuntimeError, "found no latent variables"),
        (discrete, ValueError, "discrete.*site 'k'"),
        (projected_normal, ValueError, "site 'direction'"),
        (sequential_plate, NotImplementedError, "sequential"),
        (local_latents, NotImplementedError, "latent site 'local' is inside plate 'rows', which takes 3 of its 10"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_models_that_cannot_be_guided(Guide, model, error, message):
    guide = Guide(model)
    for _ in range(2):  # a failed set-up leaves nothing behind that the next call would take for done
        with pytest.raises(error, match=f"(?is){message}"):
            guide()


def test_start_that_is_not_finite():
    guide = fg.AutoFlow(conjugate, init_loc_fn=init_to_value(values={"mu": torch.tensor(float("inf"))}))
    with pytest.raises(ValueError, match="init_loc_fn gives site 'mu' a value that is not finite"):
        guide(torch.tensor(Y))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"flow": "copula"}, ValueError, "unknown flow 'copula'; known recipes are coupling"),
        ({"init_scale": 0.0}, ValueError, "init_scale must be a positive number, got 0.0"),
        ({"init_scale": "wide"}, ValueError, "init_scale must be a positive number"),
        ({"affine": "full"}, ValueError, 'affine must be "lower_triangular"'),
        ({"gradient": "score"}, ValueError, 'gradient must be "total" or "path"'),
        ({"base": "cauchy"}, ValueError, 'base must be "normal" or "student_t"'),
    ],
)
def test_options_that_are_wrong(options, error, message):
    with pytest.raises(error, match=message):
        fg.AutoFlow(conjugate, **options)


def test_flow_of_the_wrong_size():
    guide = fg.AutoFlow(conjugate, lambda dim: fg.flows.planar(dim + 1))
    with pytest.raises(ValueError, match=r"flow\(1\) must return a FlowTransform with dim = 1"):
        guide(torch.tensor(Y))


@pytest.mark.parametrize("affine", ["lower_triangular", "diagonal", None])
def test_any_recipe_and_affine_map(affine):
    guide = fg.AutoFlow(correlated, lambda dim: fg.transforms.AffineCoupling(dim), affine=affine)
    losses = train(correlated, guide, steps=5)
    assert all(loss == loss for loss in losses)


@pytest.mark.parametrize("name", fg.flows.RECIPES)
def test_every_recipe_by_its_name(name):
    guide = fg.AutoFlow(correlated, name)
    losses = train(correlated, guide, steps=3, loss=Trace_ELBO(num_particles=4, vectorize_particles=True))
    assert all(loss == loss for loss in losses)
    assert guide.is_trained()


def test_quantiles_follow_the_degrees_of_freedom():
    """The fixed draws are those of the base as it is now, and 10,001 of them know its 5% quantile to 4%."""
    guide = StudentTFlow(correlated).setup()
    for df in (10.0, 2.5):
        with torch.no_grad():
            guide.base.log_excess.fill_(df - 2).log_()
        half_width = (df - 2) ** 0.5 / df**0.5 * scipy.stats.t(df).ppf(0.95)
        low, high = (guide.quantiles([0.05, 0.95])["x"] - guide._whitening.loc) / 0.1
        torch.testing.assert_close(high, torch.full_like(high, half_width), rtol=0.04, atol=0)
        torch.testing.assert_close(low, -high, rtol=1e-2, atol=0)


def test_starts_with_the_scale_it_is_told_whatever_the_tails():
    guide = StudentTFlow(conjugate, init_scale=0.01)
    guide(torch.tensor(Y))
    _, scale = guide._loc_scale()
    # The variance of 10,001 draws with 10 degrees of freedom has a standard error of 2%.
    assert float(scale) == pytest.approx(0.01, rel=0.04)


def test_heavy_tails_are_learnt():
    """A guide with a normal base cannot follow these tails: its importance weights have none or infinite variance."""

    def heavy():
        pyro.sample("x", dist.StudentT(torch.full((2,), 3.0, dtype=torch.float64), 0.0, 1.0).to_event(1))

    two_planar = functools.partial(fg.flows.planar, num_layers=2)
    results = {}
    for Guide in (fg.AutoFlow, StudentTFlow):
        guide = Guide(heavy, flow=two_planar, gradient="path", init_scale=1.0)
        train(heavy, guide, steps=400, lr=0.02)
        results[Guide] = fg.draw(heavy, guide, num_samples=5000, seed=0)
    assert (guide.base.df < 5).all()
    assert results[StudentTFlow].elbo().value > -0.01 > results[fg.AutoFlow].elbo().value
    assert results[StudentTFlow].ess().value > results[fg.AutoFlow].ess().value


def test_base_of_neutra_is_that_of_the_guide():
    guide = StudentTFlow(correlated).setup()
    assert guide.get_base_dist().event_shape == (3,)
    torch.testing.assert_close(guide.get_base_dist().base_dist.df, guide.base.df)


@pytest.mark.parametrize("log_det", ["hutchinson", "roulette"])
def test_neutra_with_a_random_log_det_is_refused(log_det):
    recipe = functools.partial(fg.flows.residual, num_layers=1, log_det=log_det)
    guide = fg.AutoFlow(correlated, recipe).setup()
    train(correlated, guide, steps=1)
    with pytest.raises(ValueError, match=r"random estimate.*NeuTra.*log_det='exact'"):
        poutine.trace(NeuTraReparam(guide).reparam(correlated)).get_trace()


@every_guide
def test_float64_model_under_a_float32_default(Guide):
    y = torch.tensor(Y, dtype=torch.float64)
    guide = Guide(conjugate)
    losses = train(conjugate, guide, y, steps=3)
    assert all(parameter.dtype == torch.float64 for parameter in guide.parameters())
    assert guide(y)["mu"].dtype == torch.float64
    assert guide.median()["mu"].dtype == torch.float64
    assert all(loss == loss for loss in losses)
