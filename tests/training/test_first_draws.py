"""What is found out before the first step: no density, no gradient, a start in the wrong place."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from fits import quick
from pyro import poutine
from pyro.infer import TraceGraph_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value
from torch.distributions import constraints

import pyro_flowguides as fg
from pyro_flowguides.model.call import ModelCall
from pyro_flowguides.training import first_draws, start


def test_another_start_is_tried_where_the_first_has_no_density():
    """The posterior is N(5, 0.01) but for a wall far from it, behind which the guide would begin."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 10.0))
        pyro.factor("wall", torch.where(x > 1.0, 0.0, -torch.inf))
        pyro.sample("y", dist.Normal(x, 0.1), obs=torch.tensor(5.0))

    fit = quick(model, fg.AutoFlow(model), num_steps=50, num_particles=16)
    assert float(torch.as_tensor(fit.draws.values["x"]).mean()) == pytest.approx(5.0, abs=0.02)


@pytest.mark.filterwarnings("ignore:The model cannot be vectorised")
def test_the_start_is_the_best_draw_of_the_prior():
    """Of a hundred draws of N(0, 10) the nearest to 5 is 0.14 from it in the mean, beyond 1.5 once in 100,000 times."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 10.0))
        if x < 1.0:
            raise ValueError("there is no such x")
        pyro.sample("y", dist.Normal(x, 0.1), obs=torch.tensor(5.0))

    guide = fg.AutoFlow(model, init_loc_fn=init_to_value(values={"x": torch.tensor(2.0)}))
    guide.setup()
    tracer, calls = start.set_up(ModelCall(model), guide)
    state = torch.random.get_rng_state()
    assert first_draws._begin_at_a_draw_of_the_prior(tracer, calls)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert float(guide.fixed_map.loc) == pytest.approx(5.0, abs=1.5)


@pytest.mark.parametrize("what", ["trained", "two guides", "another guide", "subsampled"])
def test_only_one_new_flow_guide_of_the_whole_model_is_moved(what):
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("plate", 4, subsample_size=2 if what == "subsampled" else None):
            pyro.sample("b", dist.Normal(a, 1.0))

    if what in ("two guides", "another guide"):
        guide = AutoGuideList(model)
        kinds = (fg.AutoFlow, fg.AutoFlow) if what == "two guides" else (AutoNormal, AutoNormal)
        for name, kind in zip("ab", kinds, strict=True):
            guide.append(kind(poutine.block(model, expose=[name])))
    else:
        guide = fg.AutoFlow(model)
        guide.setup()
    if what == "trained":
        with torch.no_grad():
            next(guide.parameters()).add_(0.1)
    tracer, calls = start.set_up(ModelCall(model), guide)
    before = [call.guide.fixed_map.loc.clone() for call in calls]
    assert not first_draws._begin_at_a_draw_of_the_prior(tracer, calls)
    assert all(torch.equal(call.guide.fixed_map.loc, loc) for call, loc in zip(calls, before, strict=True))


def test_a_start_that_nobody_finds_says_what_init_loc_fn_is_for():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x > 50.0, 0.0, -torch.inf))

    with pytest.raises(
        ValueError, match="site 'wall' of the model.*nor has any of 100 draws of the prior.*init_loc_fn"
    ):
        quick(model, fg.AutoFlow(model))


def test_flat_priors_without_data():
    def model():
        pyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))

    with pytest.raises(ValueError, match="does not depend on any latent"):
        quick(model, fg.AutoFlow(model))


def switch(y):
    point = pyro.sample("point", dist.Uniform(0.0, 10.0))
    before, after = pyro.sample("before", dist.Normal(0.0, 3.0)), pyro.sample("after", dist.Normal(0.0, 3.0))
    with pyro.plate("time", len(y)):
        level = torch.where(torch.arange(len(y)) < point, before, after)
        pyro.sample("y", dist.Normal(level, 1.0), obs=y)


def test_a_switch_point_whose_gradient_is_zero_is_named():
    y = torch.cat([torch.zeros(6), 4 * torch.ones(4)])
    with pytest.warns(UserWarning, match="site 'point' moves the log density by steps alone"):
        quick(switch, fg.AutoFlow(switch), y, num_steps=2)
    # Its own gradient is none of the path, and is asked for by the user.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*cannot be vectorised.*")
        quick(switch, fg.AutoFlow(switch), y, num_steps=2, num_particles=None, loss=TraceGraph_ELBO())


def test_latents_without_data_are_no_switch_points():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("new", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x > -30.0, 0.0, -torch.inf))

    quick(model, fg.AutoFlow(model), num_steps=2)


def test_a_plate_without_elements():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("none", 0):
            pyro.sample("y", dist.Normal(x, 1.0), obs=torch.zeros(0))

    with pytest.raises(ValueError, match="a plate of the model has size 0"):
        quick(model, fg.AutoFlow(model))


def test_a_site_without_elements_gets_through_to_arviz():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        none = pyro.sample("none", dist.Normal(torch.zeros(0), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x + none.sum(-1), 1.0), obs=torch.tensor(0.3))

    fit = quick(model, fg.AutoFlow(model), num_steps=3)
    assert fit.verdict.kind.name != "UNKNOWN"
    tree = fg.to_arviz(fit)
    assert tree["posterior"]["none"].shape[-1] == 0
    assert tree["posterior"]["x"].shape == (1, 4000)


def test_a_gradient_that_is_not_finite_is_named_with_a_value_and_the_line():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        mean = torch.where(x > 0, x.sqrt(), torch.zeros(()))
        pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.tensor(0.3))

    message = r"gradient to site 'x' is nan, for example where x = -\d.*test_first_draws.py.*mean = torch.where\(x > 0"
    with pytest.raises(RuntimeError, match=message):
        quick(model, fg.AutoFlow(model, init_scale=1.0), num_steps=60, num_particles=64, whiten="init")
