"""What is particular to the flow guides; the contract that they share with Pyro's is in conformance/."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from guide_cases import StudentTFlow, every_guide
from models import Y, conjugate, correlated, train
from pyro import poutine
from pyro.infer import (
    Trace_ELBO,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value
from pyro.infer.reparam import NeuTraReparam

import pyro_flowguides as fg


def no_latents():
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))


def discrete():
    pyro.sample("k", dist.Poisson(0.5))


def projected_normal():
    pyro.sample("direction", dist.ProjectedNormal(torch.ones(3)))


def sequential_plate():
    for i in pyro.plate("loop", 2):
        pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0))


def plate_without_size():
    with pyro.plate("rows"):
        pyro.sample("local", dist.Normal(torch.zeros(3), 1.0))


def given_indices():
    with pyro.plate("rows", 10, subsample=torch.tensor([1, 4])):
        pyro.sample("local", dist.Normal(0.0, 1.0))


def support_of_its_own():
    upper = torch.arange(1.0, 11.0)
    with pyro.plate("rows", 10, subsample_size=3) as index:
        pyro.sample("local", dist.Uniform(0.0, upper[index]))


def two_dtypes():
    pyro.sample("single", dist.Normal(torch.zeros((), dtype=torch.float32), 1.0))
    pyro.sample("double", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (no_latents, RuntimeError, "found no latent variables"),
        (discrete, ValueError, "'k' is discrete, Poisson, and has infinitely many values.*Ways out"),
        (projected_normal, ValueError, "site 'direction'"),
        (sequential_plate, NotImplementedError, "sequential"),
        (
            plate_without_size,
            ValueError,
            "latent site 'local' is inside plate 'rows', whose size is not known.*Ways out",
        ),
        (
            given_indices,
            ValueError,
            "latent site 'local' is inside plate 'rows', which gets its indices.*create_plates",
        ),
        (
            support_of_its_own,
            ValueError,
            "support of latent site 'local'.*not the same for all elements of plate 'rows'",
        ),
        (two_dtypes, ValueError, "site 'single' is torch.float32 on .* and site 'double' is torch.float64"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_models_that_cannot_be_guided(model, error, message):
    guide = fg.AutoFlow(model)
    for _ in range(2):  # a failed set-up leaves nothing behind that the next call would take for done
        with pytest.raises(error, match=f"(?is){message}"):
            guide()


def test_latents_on_two_devices():
    def model():
        pyro.sample("here", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("there", dist.Normal(torch.zeros((), device="meta"), 1.0, validate_args=False))

    values = {"here": torch.zeros(()), "there": torch.zeros((), device="meta")}
    guide = fg.AutoFlow(model, init_loc_fn=lambda site: values[site["name"]])
    with pytest.raises(
        ValueError, match="site 'here' is .* on .* and site 'there' is torch.float32 on meta.*AutoGuideList"
    ):
        guide()


def local_latents(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        local = pyro.sample("local", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(local, 1.0), obs=y)


def test_plate_whose_size_changes():
    guide = fg.AutoFlow(local_latents).setup(torch.zeros(5))
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"site 'local' is inside plate 'rows' of size 3.*of size 5.*create_plates"
        ):
            guide(torch.zeros(3))
    guide(torch.zeros(5))


def test_site_whose_event_size_changes():
    def model(x):
        pyro.sample("weight", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))

    guide = fg.AutoFlow(model).setup(torch.zeros(7, 2))
    with pytest.raises(ValueError, match=r"site 'weight' has shape \(3,\).*had \(2,\) at set-up"):
        guide(torch.zeros(7, 3))


def test_site_that_appears_only_sometimes():
    def model(with_slope):
        pyro.sample("intercept", dist.Normal(0.0, 1.0))
        if with_slope:
            pyro.sample("slope", dist.Normal(0.0, 1.0))

    guide = fg.AutoFlow(model).setup(True)
    with pytest.raises(ValueError, match=r"latent site 'slope' was in the model at set-up and is not with these"):
        guide(False)
    # The other way round Pyro itself names the site.
    pyro.clear_param_store()
    guide = fg.AutoFlow(model).setup(False)
    with pytest.warns(UserWarning, match="Found vars in model but not guide: {'slope'}"):
        Trace_ELBO().loss(model, guide, True)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda y: pyro.plate("rows", 7, subsample_size=2),
            ValueError,
            "plate 'rows' with size 7.*inside one of size 5",
        ),
        (lambda y: [len(y)], AssertionError, "create_plates.. returned a non-plate"),
    ],
)
def test_create_plates_that_are_wrong(make, error, message):
    with pytest.raises(error, match=message):
        fg.AutoFlow(local_latents, create_plates=make).setup(torch.zeros(5))


def test_part_of_a_list_with_plates_of_its_own():
    guide = AutoGuideList(local_latents)
    guide.append(AutoNormal(poutine.block(local_latents, expose=["mu"])))
    part = fg.AutoFlow(poutine.block(local_latents, hide=["mu"]), create_plates=lambda y: pyro.plate("rows", len(y)))
    guide.append(part)
    with pytest.raises(AssertionError, match="non-master guide"):
        guide(torch.zeros(5))


def test_minibatch_in_the_arguments_of_whitening():
    def model(index):
        with pyro.plate("rows", 6, subsample=index):
            pyro.sample("local", dist.Normal(0.0, 1.0))

    guide = fg.AutoFlow(model, create_plates=lambda index: pyro.plate("rows", 6, subsample=index))
    with pytest.raises(
        ValueError, match=r"site 'local' is inside plate 'rows', of which these arguments.*one minibatch"
    ):
        guide.whiten(torch.tensor([1, 2]))
    guide.whiten(torch.tensor([1, 2]), method="init")


def test_what_needs_a_guide_that_is_set_up():
    state = fg.AutoCoupling(conjugate).setup(torch.tensor(Y)).state_dict()
    pyro.clear_param_store()
    guide = fg.AutoCoupling(conjugate)
    for use in (guide.median, lambda: guide.quantiles([0.5]), lambda: guide.load_state_dict(state)):
        with pytest.raises(RuntimeError, match=r"AutoCoupling is not set up.*call guide.setup\(\*args\)"):
            use()


def test_start_that_is_not_finite():
    guide = fg.AutoFlow(conjugate, init_loc_fn=init_to_value(values={"mu": torch.tensor(float("inf"))}))
    with pytest.raises(ValueError, match="init_loc_fn gives site 'mu' a value that is not finite"):
        guide(torch.tensor(Y))


def test_affine_that_is_wrong():
    with pytest.raises(
        ValueError,
        match='AutoFlow: affine must be "auto", "lower_triangular", "low_rank", "diagonal" or None, got \'full\'',
    ):
        fg.AutoFlow(conjugate, affine="full")


def test_flow_of_the_wrong_size():
    guide = fg.AutoFlow(conjugate, lambda dim: fg.flows.planar(dim + 1))
    with pytest.raises(ValueError, match=r"flow\(1\) must return a FlowTransform with dim = 1"):
        guide(torch.tensor(Y))


@pytest.mark.parametrize("affine", ["lower_triangular", "low_rank", "diagonal", None])
def test_any_recipe_and_affine_map(affine):
    guide = fg.AutoFlow(correlated, lambda dim: fg.transforms.AffineCoupling(dim), affine=affine)
    train(correlated, guide, steps=5)
    maps = {
        "lower_triangular": fg.transforms.LowerTriangularAffine,
        "low_rank": fg.transforms.LowRankAffine,
        "diagonal": fg.transforms.Affine,
        None: None,
    }
    kinds = [kind for kind in (fg.transforms.AffineCoupling, maps[affine], fg.transforms.FixedAffine) if kind]
    for part, kind in zip(guide.flow.transforms, kinds, strict=True):
        assert isinstance(part, kind)
    # All but the fixed map have moved.
    z = torch.randn(5, 3, dtype=torch.float64)
    for part in guide.flow.transforms[:-1]:
        assert not torch.allclose(part(z), z, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", fg.flows.RECIPES)
def test_every_recipe_by_its_name(name):
    guide = fg.AutoFlow(correlated, name)
    losses = train(correlated, guide, steps=3, num_particles=4)
    assert all(math.isfinite(loss) for loss in losses)
    assert guide.is_trained()
    assert repr(guide.flow.transforms[0]) == repr(
        fg.AutoFlow(correlated, fg.flows.RECIPES[name]).setup().flow.transforms[0]
    )


def test_quantiles_follow_the_degrees_of_freedom():
    """The fixed draws are those of the base as it is now, and 10,001 of them know its 5% quantile to 4%."""
    guide = StudentTFlow(correlated).setup()
    for df in (10.0, 2.5):
        with torch.no_grad():
            guide.base.log_excess.fill_(df - 2).log_()
        half_width = (df - 2) ** 0.5 / df**0.5 * scipy.stats.t(df).ppf(0.95)
        low, high = (guide.quantiles([0.05, 0.95])["x"] - guide.fixed_map.loc) / 0.1
        torch.testing.assert_close(high, torch.full_like(high, half_width), rtol=0.04, atol=0)
        torch.testing.assert_close(low, -high, rtol=1e-2, atol=0)


def test_starts_with_the_scale_it_is_told_whatever_the_tails():
    guide = StudentTFlow(conjugate, init_scale=0.01)
    scale = guide.setup(torch.tensor(Y)).get_posterior().sample((10_000,)).std()
    # The variance of 10,000 draws with 10 degrees of freedom has a standard error of 2%.
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
    assert results[StudentTFlow].elbo.value > -0.01 > results[fg.AutoFlow].elbo.value
    assert results[StudentTFlow].ess.value > results[fg.AutoFlow].ess.value


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
