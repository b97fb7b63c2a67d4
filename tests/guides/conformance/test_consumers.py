"""What Pyro builds on guides: predictions, importance sampling, NeuTra, forecasts, lists of guides, handlers."""

import io
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_cases import every_flow, small
from models import Y, conjugate, conjugate_answer, funnel, train
from pyro import poutine
from pyro.contrib.forecast import Forecaster, ForecastingModel
from pyro.infer import (
    MCMC,
    NUTS,
    Importance,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    WeighedPredictive,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiscreteParallel,
    AutoGuideList,
    AutoNormal,
)
from pyro.infer.importance import psis_diagnostic
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam
from pyro.util import check_model_guide_match
from transform_cases import perturb

import pyro_flowguides as fg


def test_neutra():
    guide = fg.AutoFlow(funnel).setup()
    train(funnel, guide, steps=20, lr=0.005)
    guide.requires_grad_(False)
    neutra = NeuTraReparam(guide)
    mcmc = MCMC(NUTS(neutra.reparam(funnel), max_tree_depth=3), num_samples=5, warmup_steps=5, disable_progbar=True)
    mcmc.run()
    latent = mcmc.get_samples()["v_shared_latent"]
    assert neutra.transform_sample(latent.unsqueeze(-2))["v"].shape[0] == 5


def test_in_a_guide_list_with_other_guides():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a, b), obs=y)

    y = torch.tensor(Y)
    guide = AutoGuideList(model)
    guide.append(fg.AutoCoupling(poutine.block(model, expose=["a"])))
    guide.append(AutoNormal(poutine.block(model, expose=["b"])))
    losses = train(model, guide, y, steps=5)
    assert all(loss == loss for loss in losses)
    assert set(guide.median(y)) == {"a", "b"}
    assert set(guide.quantiles([0.5], y)) == {"a", "b"}


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel):
    def model(x, y=None):
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
        pyro.deterministic("doubled", 2 * weight)
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(weight * x, sigma), obs=y)

    x = torch.randn(3)
    guide = fg.AutoFlow(model)
    guide(x, torch.randn(3))
    draws = Predictive(model, guide=guide, num_samples=7, parallel=parallel)(x)
    assert draws["y"].shape == (7, 3)
    torch.testing.assert_close(draws["doubled"], 2 * draws["weight"])
    # Other data than those of the set-up.
    draws = Predictive(model, guide=guide, num_samples=7, parallel=parallel)(torch.randn(5))
    assert draws["y"].shape == (7, 5)


def test_predictive_serves_from_a_file():
    def model(x, y=None):
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            return pyro.sample("y", dist.Normal(weight * x, 1.0), obs=y)

    x = torch.randn(3)
    guide = small(fg.AutoFlow)(model)
    guide(x, y=torch.randn(3))
    predictive = Predictive(model, guide=guide, num_samples=5)
    expected = predictive(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace_module(predictive, {"call": (x,)}, check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    assert len(torch.jit.load(buffer).call(x)) == len(expected)


def test_importance_sampling():
    y = torch.tensor(Y)
    guide = small(fg.AutoFlow)(conjugate).whiten(y)
    perturb(guide.flow.transforms[0], 0.1)
    _, _, log_evidence = conjugate_answer(y)
    # The weights are those of a proposal near the posterior.
    importance = Importance(conjugate, guide=guide, num_samples=200).run(y)
    weights = torch.stack(importance.log_weights)
    estimate = float(torch.logsumexp(weights, 0)) - math.log(200)
    relative = (weights - weights.max()).exp()
    error = float(relative.std() / relative.mean() / 200**0.5)
    assert estimate == pytest.approx(log_evidence, abs=4 * error + 1e-6)
    weighed = WeighedPredictive(conjugate, guide=guide, num_samples=50, parallel=True)(y)
    assert weighed.log_weights.shape == (50,)
    assert weighed.log_weights.isfinite().all()
    khat = psis_diagnostic(conjugate, guide, y, num_particles=1000, max_plate_nesting=1)
    assert khat < 0.7


@every_flow
@pytest.mark.parametrize("with_data", [False, True])
def test_neutra_has_the_density_of_the_model(Guide, with_data):
    def model(y=None):
        v = pyro.sample("v", dist.Normal(0.0, 3.0))
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("coordinates", 4):
            pyro.sample("x", dist.Normal(0.0, torch.exp(v / 2)))
        if y is not None:
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Categorical(p), obs=y)

    arguments = {"y": torch.tensor([0, 1, 1])} if with_data else {}
    guide = Guide(model).setup(**arguments)  # not trained, and not called
    perturb(guide.flow, 0.3)
    neutra = NeuTraReparam(guide)
    _, energy, transforms, _ = initialize_model(model, model_kwargs=arguments)
    start, energy_of_neutra, _, _ = initialize_model(neutra.reparam(model), model_kwargs=arguments)
    ((_, z),) = start.items()
    values = neutra.transform_sample(z)
    transform = torch.distributions.ComposeTransform(guide.get_posterior(**arguments).transforms)
    log_det = transform.log_abs_det_jacobian(z, transform(z))
    expected = energy({name: transforms[name](value) for name, value in values.items()}) - log_det
    torch.testing.assert_close(energy_of_neutra(start), expected)


def test_discrete_sites_in_parallel():
    data = torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0])

    def model(data):
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(2)))
        locs = pyro.sample("locs", dist.Normal(0, 10).expand_by([2]).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0, 1))
        with pyro.plate("data", len(data)):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)

    guide = AutoGuideList(model)
    guide.append(fg.AutoFlow(poutine.block(model, hide=["assignment"])))
    guide.append(AutoDiscreteParallel(poutine.block(model, expose=["assignment"])))
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss_and_grads(model, guide, data)
    assert math.isfinite(loss)


def test_lists_of_guides():
    """With a guide that is a function, with others of the same class, and nested."""

    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("plate", 3):
            pyro.sample("y", dist.LogNormal(0.0, 1.0))
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide_of_z():
        return {"z": pyro.sample("z", dist.Delta(pyro.param("z_loc", torch.tensor(0.0))))}

    guide = AutoGuideList(model)
    first = fg.AutoFlow(poutine.block(model, expose=["x"]))
    assert first.master is None
    guide.append(first)
    inner = AutoGuideList(poutine.block(model, expose=["y"]))
    inner.second = fg.AutoFlow(poutine.block(model, expose=["y"]))
    guide.append(inner)
    guide.append(guide_of_z)
    assert all(part.master() is guide for part in guide.modules() if part is not guide and hasattr(part, "master"))
    losses = train(model, guide, steps=2)
    assert all(math.isfinite(loss) for loss in losses)
    assert inner.second.plates is guide.plates
    trace = poutine.trace(guide).get_trace()
    assert {"_AutoGuideList.0_latent", "_AutoGuideList.1.second_latent"} < set(trace.stochastic_nodes)
    check_model_guide_match(poutine.trace(model).get_trace(), trace)
    assert set(guide()) == {"x", "y", "z"}
    with pytest.raises(RuntimeError, match="already added"):
        AutoGuideList(model).append(first)


def test_set_up_before_the_list_is_called():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("plate", 3):
            pyro.sample("y", dist.Normal(0.0, 1.0))

    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["x"])))
    part = fg.AutoFlow(poutine.block(model, expose=["y"]))
    guide.append(part)
    # A part has no prototype of the list to be compared with yet.
    with pytest.raises(ValueError, match=r"part of an AutoGuideList.*call the list"):
        part.setup()
    guide()
    assert part.setup().latent_dim == 3


def test_handlers():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.LogNormal(x, 1.0))

    guide = fg.AutoFlow(model).setup()
    trace = poutine.trace(guide).get_trace()
    replayed = poutine.trace(poutine.replay(guide, trace=trace)).get_trace()
    for name in ("x", "y"):
        torch.testing.assert_close(replayed.nodes[name]["value"], trace.nodes[name]["value"])
    torch.testing.assert_close(replayed.log_prob_sum(), trace.log_prob_sum())
    blocked = poutine.trace(poutine.block(guide, hide=["x"])).get_trace()
    assert "x" not in blocked.nodes
    pyro.clear_param_store()
    conditioned = poutine.condition(model, data={"x": torch.tensor(1.0)})
    part = fg.AutoFlow(conditioned).setup()
    assert part.latent_dim == 1
    pyro.clear_param_store()
    guide = fg.AutoFlow(model)
    scaled = Trace_ELBO().loss(poutine.scale(model, scale=3.0), poutine.scale(guide, scale=3.0))
    assert math.isfinite(scaled)
    latent = "_AutoFlow_latent"
    assert poutine.trace(poutine.scale(guide, scale=3.0)).get_trace().nodes[latent]["scale"] == 3.0
    with poutine.mask(mask=False):
        assert poutine.trace(guide).get_trace().log_prob_sum() == 0


class Forecasting(ForecastingModel):
    def model(self, zero_data, covariates):
        bias = pyro.sample("bias", dist.Normal(0.0, 10.0))
        drift_scale = pyro.sample("drift_scale", dist.LogNormal(-1.0, 1.0))
        with self.time_plate:
            drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
        prediction = (bias + drift_scale * drift.cumsum(-1)).unsqueeze(-1) + 0 * covariates
        self.predict(dist.Normal(0.0, 0.5), prediction)


def test_forecasts():
    data = torch.linspace(0.0, 1.0, 5).unsqueeze(-1)
    covariates = torch.zeros(7, 1)
    model = Forecasting()
    guide = fg.AutoFlow(model)
    forecaster = Forecaster(model, data, covariates[:5], guide=guide, num_steps=3, log_every=0)
    samples = forecaster(data, covariates, num_samples=4)
    assert samples.shape == (4, 2, 1)
    assert guide.latent_dim == 2 + 5
