"""One vectorised pass or a run per draw: which one a model gets, and the warning about it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from draw_cases import sum_of_latents
from models import conjugate, kitchen_sink
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.diagnostics.tracer import Tracer, check_vectorized, single_run
from pyro_flowguides.model.call import ModelCall


def test_a_model_in_plates_is_traced_in_one_pass():
    tracer = Tracer(ModelCall(kitchen_sink), AutoNormal(kitchen_sink))
    assert tracer.vectorizes
    assert tracer.max_plate_nesting == 2
    ((guide_trace, model_trace, count),) = tracer.traces(7)
    assert count == 7
    assert model_trace.nodes["in_two_plates"]["fn"].batch_shape == (7, 3, 2)
    for name in ("simplex", "in_two_plates"):
        assert model_trace.nodes[name]["value"] is guide_trace.nodes[name]["value"]


def test_a_site_without_the_dimension_of_draws_is_named():
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    tracer = Tracer(ModelCall(model), model)
    alone, _, _ = next(tracer.traces(1))
    with pytest.raises(ValueError, match=r"site 'x' has batch shape \(1,\) instead of \(2,\)"):
        check_vectorized(alone, tracer.model_prototype, 2, 0)


def random_walk(y):
    with pyro.plate("time", 4):
        step = pyro.sample("step", dist.Normal(0.0, 1.0))
    with pyro.plate("observed", 4):
        pyro.sample("y", dist.Normal(step.cumsum(0), 1.0), obs=y)


def mixing_deterministic(y):
    with pyro.plate("group", 3):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.deterministic("total", w.sum())
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "y"),
    [(sum_of_latents, [3.0]), (random_walk, [1.0, 2.0, 3.0, 4.0]), (mixing_deterministic, [0.0])],
    ids=["sum", "random walk", "deterministic"],
)
def test_a_model_that_mixes_draws_is_recorded(model, y):
    """All shapes are right when such a model is run with a plate of draws, and all numbers are wrong."""
    y = torch.tensor(y) if len(y) > 1 else torch.tensor(y[0])
    guide = fg.AutoFlow(model)
    guide.setup(y)
    assert Tracer(ModelCall(model, (y,)), guide).batched is not None
    draws = fg.draw(model, guide, y, num_samples=3)
    for i in range(3):
        latents = {name: value[i] for name, value in draws.values.items()}
        trace = poutine.trace(poutine.condition(model, latents)).get_trace(y)
        torch.testing.assert_close(draws.log_p[i], trace.log_prob_sum())
        for name, value in draws.deterministic.items():
            torch.testing.assert_close(value[i], trace.nodes[name]["value"])


def test_a_model_that_prints_a_latent_is_run_draw_by_draw(capsys):
    """A single number can be formatted, a batch of them is a TypeError."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        print(f"mu = {mu:.2f}")
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    message = r"cannot be vectorised over draws.*unsupported format string.*print\(f"
    with pytest.warns(UserWarning, match=message) as warned:
        draws = fg.draw(model, fg.AutoFlow(model), torch.tensor(1.0), num_samples=3)
    # The warning is about the line above.
    assert [warning.filename for warning in warned] == [__file__]
    assert len(draws) == 3
    assert capsys.readouterr().out.count("mu = ") >= 3


@pytest.mark.slow
def test_fit_of_a_model_that_mixes_draws():
    y = torch.tensor(3.0)
    fit = fg.fit(sum_of_latents, fg.AutoFlow(sum_of_latents), y, num_steps=20, num_particles=8, progress=False, seed=0)
    # log N(3; 0, 4): whitening finds the normal posterior, which some steps with few particles blur a little.
    assert fit.elbo.value == pytest.approx(float(dist.Normal(0.0, 2.0).log_prob(y)), abs=0.02)


def test_a_mask_that_depends_on_a_latent_is_that_of_each_draw():
    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        mean = torch.stack([w[0], w[1], w[2]])
        with pyro.plate("data", 3), poutine.mask(mask=mean > 0):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    y = torch.tensor([0.3, -0.2, 1.0])
    guide = AutoNormal(model, init_scale=1.0)
    assert Tracer(ModelCall(model, (y,)), guide).batched is not None
    draws = fg.draw(model, guide, y, num_samples=50, log_likelihood=True, seed=0)
    w = draws.values["w"]
    expected = torch.where(w > 0, dist.Normal(w, 1.0).log_prob(y), 0.0)
    assert 0 < int((w > 0).sum()) < w.numel()
    torch.testing.assert_close(draws.log_likelihood["y"], expected)


def recorded(y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(torch.stack([w[0], w[1], w[2]]), 1.0).to_event(1), obs=y)


def looped(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(float(mu), 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "shape", "vectorization"),
    [(conjugate, 3, "broadcast"), (recorded, 3, "recorded"), (looped, (), "looped")],
)
@pytest.mark.filterwarnings("ignore:The model cannot be vectorised")
def test_how_a_model_is_run_is_found_out_behind_the_handlers_outside(model, shape, vectorization):
    """A trace around it sees no runs of the model, and these have no graph."""
    y = torch.zeros(shape)
    guide = AutoNormal(model)
    guide(y)
    with poutine.trace() as outside:
        tracer = Tracer(ModelCall(model, (y,)), guide, differentiable=True)
    assert tracer.vectorization == vectorization
    assert not [name for name, site in outside.trace.nodes.items() if site["type"] == "sample"]
    assert not tracer.model_prototype.log_prob_sum().requires_grad


def test_a_single_run_is_that_of_the_first_draw_on_its_elements():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    y, guide = torch.arange(40.0), AutoNormal(model)
    call = ModelCall(model, (y,))
    tracer = Tracer(call, guide)
    ((guide_trace, _, _),) = tracer.traces(3)
    index = poutine.trace(model).get_trace(y).nodes["data"]
    guide_trace.add_node("data", **index)
    single = single_run(call, guide_trace, tracer.model_prototype)
    assert torch.equal(single.nodes["mu"]["value"], guide_trace.nodes["mu"]["value"][0].reshape(()))
    assert torch.equal(single.nodes["data"]["value"], index["value"])
    assert torch.equal(single.nodes["y"]["value"], y[index["value"]])
