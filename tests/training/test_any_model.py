"""fit on models as their users write them: recorded and batched, captured, without a warning, and right.

A model that runs draw by draw, and a step that is not captured, warn; warnings are errors in this suite.
"""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from any_models import GROUP, MODELS, X, Y, linear, one_hot
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

import pyro_flowguides as fg
from pyro_flowguides.compiled.losses import KL
from pyro_flowguides.diagnostics.tracer import Tracer
from pyro_flowguides.model.call import ModelCall
from pyro_flowguides.training.start import batched_calls

# Their operations broadcast as they are written.
BROADCAST = ("mixture", "ordinal", "multinomial", "student", "copula", "if on data, in a model that broadcasts")
# Quick enough for every run.
QUICK = ("matmul", "indexing", "pyro module", "one-hot", "reparameterized")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in MODELS]
)
def test_it_is_fitted_as_it_is_written(name):
    model, args = MODELS[name]
    pyro.set_rng_seed(0)
    fit = fg.fit(model, fg.AutoCoupling(model), *args, num_steps=4, num_particles=8, whiten="init", progress=False)
    assert np.isfinite(fit.losses).all()
    assert fit.vectorization == ("broadcast" if name in BROADCAST else "recorded")
    # Of a model that runs draw by draw there are fewer.
    assert len(fit.draws) == 10_000


def test_mean_and_sd_are_those_of_the_exact_posterior():
    fit = fg.fit(one_hot, fg.AutoCoupling(one_hot), GROUP, Y, num_steps=300, num_particles=64, seed=0, progress=False)
    counts = torch.bincount(GROUP, minlength=4)
    sums = torch.zeros(4).index_add(0, GROUP, Y)
    sd = (1 + counts).rsqrt()
    effect = torch.as_tensor(fit.draws.values["effect"])
    assert ((effect.mean(0) - sums / (1 + counts)).abs() < 0.06 * sd).all()
    assert ((effect.std(0) / sd - 1).abs() < 0.06).all()
    assert fit.verdict.kind.name in ("EXACT", "GOOD", "GOOD_ONCE_WEIGHTED")


def test_deterministic_sites_log_likelihoods_and_predictions_are_those_of_each_draw():
    pyro.set_rng_seed(0)
    guide = fg.AutoCoupling(linear)
    draws = fg.draw(linear, guide, X, Y, num_samples=20, log_likelihood=True)
    beta = draws.values["beta"]
    torch.testing.assert_close(draws.deterministic["mean"], beta @ X.T)
    expected = dist.Normal(beta @ X.T, 0.5).log_prob(Y)
    torch.testing.assert_close(draws.log_likelihood["y"], expected)
    torch.testing.assert_close(
        draws.log_p, expected.sum(-1) + dist.Normal(0.0, 1.0).log_prob(beta).sum(-1), rtol=1e-5, atol=1e-4
    )


def by_hand(X, y):
    """``linear`` with batch dimensions carried through."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(X)):
        mean = pyro.deterministic("mean", (X * beta).sum(-1))
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def loss_and_gradients(model, guide, num_particles):
    tracer = Tracer(ModelCall(model, (X, Y)), guide)
    loss = KL(
        num_particles,
        vectorize_particles=tracer.vectorizes,
        max_plate_nesting=tracer.max_plate_nesting,
        batched=batched_calls(tracer, arguments_vary=False),
    )
    pyro.set_rng_seed(1)
    value = loss.loss(model, guide, (X, Y), {})
    parameters = list(guide.parameters())
    return tracer, value.detach(), torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)


def test_loss_and_gradient_are_those_of_the_model_vectorised_by_hand():
    pyro.set_rng_seed(0)
    guide = fg.AutoCoupling(by_hand)
    guide.setup(X, Y)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    found = loss_and_gradients(linear, guide, 16)
    expected = loss_and_gradients(by_hand, guide, 16)
    assert found[0].batched is not None
    assert expected[0].batched is None
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * (1 + float(theirs.abs().max())))


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoDelta])
def test_guides_of_pyro_take_the_recording_too(kind):
    pyro.set_rng_seed(0)
    guide = kind(by_hand)
    guide(X, Y)
    found, expected = (loss_and_gradients(model, guide, 16) for model in (linear, by_hand))
    assert found[0].batched is not None
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * (1 + float(theirs.abs().max())))
    fit = fg.fit(linear, kind(linear), X, Y, num_steps=4, num_particles=8, progress=False)
    # Of a model that runs draw by draw there are fewer.
    assert len(fit.draws) == 10_000


def test_whitening_finds_the_gaussian_by_the_recording():
    guide = fg.AutoCoupling(linear)
    fit = fg.fit(linear, guide, X, Y, num_steps=1, num_particles=4, whiten="batch_and_match", seed=0, progress=False)
    precision = X.T @ X / 0.25 + torch.eye(3)
    expected = torch.linalg.solve(precision, X.T @ Y / 0.25)
    torch.testing.assert_close(guide.fixed_map.loc, expected, rtol=1e-3, atol=1e-3)
    assert abs(float(fit.khat)) < 0.7 or fit.verdict.kind.name == "EXACT"


def test_parameters_of_the_model_are_trained():
    def model(X, y):
        scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(X @ beta, scale), obs=y)

    fit = fg.fit(model, fg.AutoCoupling(model), X, Y, num_steps=300, num_particles=16, seed=0, progress=False)
    residuals = Y - X @ torch.linalg.lstsq(X, Y.unsqueeze(-1)).solution.squeeze(-1)
    assert float(fit.parameters["scale"]) == pytest.approx(float(residuals.square().mean().sqrt()), rel=0.15)


def test_minibatches_as_arguments_are_inputs():
    def model(X, y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(X)), poutine.scale(scale=40 / len(X)):
            pyro.sample("y", dist.Normal(X @ beta, 0.5), obs=y)

    data = torch.utils.data.TensorDataset(X, Y)
    loader = torch.utils.data.DataLoader(data, batch_size=10, shuffle=True)
    fit = fg.fit(
        model, fg.AutoCoupling(model), X, Y, batches=loader, num_steps=400, num_particles=16, seed=0, progress=False
    )
    precision = X.T @ X / 0.25 + torch.eye(3)
    expected = torch.linalg.solve(precision, X.T @ Y / 0.25)
    torch.testing.assert_close(torch.as_tensor(fit.draws.values["beta"]).mean(0), expected, rtol=0, atol=0.05)


def test_a_look_at_a_latent_runs_draw_by_draw_after_a_warning_that_quotes_the_line():
    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        sign = 1.0 if loc > 0 else -1.0
        pyro.sample("y", dist.Normal(sign * loc, 1.0), obs=y)

    with pytest.warns(UserWarning, match=r"every draw is a run of its own.*sign = 1.0 if loc > 0"):
        draws = fg.draw(model, fg.AutoPlanar(model), torch.tensor(0.3), num_samples=5)
    loc = draws.values["loc"]
    expected = dist.Normal(0.0, 1.0).log_prob(loc) + dist.Normal(loc.abs(), 1.0).log_prob(torch.tensor(0.3))
    torch.testing.assert_close(draws.log_p, expected)


@pytest.mark.parametrize("backend", ["eager", "replay"])
def test_vectorized_particles_of_an_elbo_of_pyro(backend):
    """The steps are those of the model vectorised by hand, of which Pyro takes the first."""
    found = []
    for model in (linear, by_hand):
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
        svi = fg.CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), elbo, backend=backend)
        found.append(torch.cat([svi.run(3, X, Y), svi.run(2, X[:20], Y[:20])]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["matmul", "indexing", "pyro module", "one-hot"])
def test_whitening_by_hand_records_the_model(name):
    model, args = MODELS[name]
    # A list would be something that the recording depends on.
    runs = itertools.count()

    def counted(*args):
        next(runs)
        return model(*args)

    pyro.set_rng_seed(0)
    guide = fg.AutoFlow(counted).whiten(*args)
    assert next(runs) < 30
    assert fg.draw(model, guide, *args, num_samples=1000).ess.value > 200
