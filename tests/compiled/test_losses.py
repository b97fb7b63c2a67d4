"""The importance-weighted bound and its gradients, Renyi bounds, and losses that cannot be differentiated."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import conjugate, conjugate_answer
from pyro.infer import ReweightedWakeSleep, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal

import pyro_flowguides as fg
from pyro_flowguides import IWELBO, CompiledSVI
from pyro_flowguides.compiled.losses import differentiable_loss

Y = [0.3, 1.4, 2.2, 0.7, 1.9]


@pytest.fixture
def y(dtype):
    return torch.tensor(Y, dtype=dtype)


def loose_guide(y):
    """A guide that is far from the posterior, at parameters that are not the optimum."""
    guide = fg.AutoPlanar(conjugate, num_layers=1, init_scale=0.9)
    guide.setup(y)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return guide


def evaluator(loss, guide, y):
    """Loss and flat gradient at fixed parameters, replayed: many repetitions take little time."""
    svi = CompiledSVI(conjugate, guide, pyro.optim.Adam({"lr": 0.0}), loss, backend="replay")
    svi.loss_and_gradients(y)
    assert not svi._captures

    def evaluate():
        value, gradients = svi.loss_and_gradients(y)
        return float(value), torch.cat([gradient.flatten() for gradient in gradients.values()])

    return evaluate


def losses(loss, guide, y, num_repeats=400):
    evaluate = evaluator(loss, guide, y)
    return np.array([evaluate()[0] for _ in range(num_repeats)])


def test_the_bound_rises_to_the_log_evidence(y):
    guide = loose_guide(y)
    _, _, log_evidence = conjugate_answer(y)
    elbo = -losses(Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1), guide, y)
    bounds = [elbo, *(-losses(IWELBO(k, max_plate_nesting=1), guide, y) for k in (2, 16, 256))]
    means = [bound.mean() for bound in bounds]
    errors = [bound.std() / len(bound) ** 0.5 for bound in bounds]
    for i in range(3):
        assert means[i + 1] > means[i] - 4 * math.hypot(errors[i], errors[i + 1])
    assert means[1] > means[0] + 4 * math.hypot(errors[0], errors[1])
    # Log of the mean weight: its expectation lies below by var(w) / 2K, its standard deviation is about 4 of those.
    assert abs(means[3] - log_evidence) < 4 * errors[3] + bounds[3].var()
    assert log_evidence - means[3] < 0.1 * (log_evidence - means[0])


@pytest.mark.parametrize("vectorize", [True, False])
def test_the_two_gradients_have_the_same_mean_and_less_variance(vectorize, y):
    guide = loose_guide(y)

    def gradients(kind):
        loss = IWELBO(8, gradient=kind, max_plate_nesting=1, vectorize_particles=vectorize)
        evaluate = evaluator(loss, guide, y)
        rows = [evaluate()[1] for _ in range(1000)]
        rows = torch.stack(rows)
        return rows.mean(0), rows.var(0), len(rows)

    pyro.set_rng_seed(0)
    plain, plain_variance, count = gradients("total")
    doubly, doubly_variance, _ = gradients("doubly_reparameterized")
    errors = ((plain_variance + doubly_variance) / count).sqrt()
    # Bonferroni over ten parameters or so: 4.5 standard errors are one false alarm in 15,000 runs.
    assert bool(((plain - doubly).abs() <= 4.5 * errors + 1e-9).all())
    assert doubly_variance.sum() < 0.5 * plain_variance.sum()


def test_the_gradient_of_an_exact_guide_is_zero(y):
    mean, sd, log_evidence = conjugate_answer(y)
    guide = fg.AutoFlow(conjugate, lambda dim: fg.transforms.Affine(dim), affine=None)
    guide.setup(y)
    guide.whiten(y, method="batch_and_match")
    value = differentiable_loss(IWELBO(8, max_plate_nesting=1), conjugate, guide, (y,), {})
    assert float(value.detach()) == pytest.approx(-log_evidence, abs=1e-5)
    for gradient in torch.autograd.grad(value, list(guide.parameters())):
        assert float(gradient.abs().max()) < 1e-4


def test_the_gradient_to_the_model_is_that_of_the_bound(y):
    """The model's parameters take the weights once, in both kinds of gradient."""

    def model(y):
        sigma = pyro.param("sigma", torch.tensor(1.3, dtype=y.dtype))
        mu = pyro.sample("mu", dist.Normal(y.new_tensor(1.0), 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, sigma), obs=y)

    guide = fg.AutoPlanar(model, num_layers=1)
    guide.setup(y)
    found = []
    for kind in ("total", "doubly_reparameterized"):
        pyro.set_rng_seed(0)
        value = differentiable_loss(IWELBO(8, gradient=kind, max_plate_nesting=1), model, guide, (y,), {})
        sigma = pyro.get_param_store()._params["sigma"]
        found.append((float(value.detach()), float(torch.autograd.grad(value, sigma)[0])))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    # By differences of the bound itself, under the same noise.
    ends = []
    for step in (-1e-3, 1e-3):
        with torch.no_grad():
            sigma.add_(step)
            pyro.set_rng_seed(0)
            ends.append(float(differentiable_loss(IWELBO(8, max_plate_nesting=1), model, guide, (y,), {})))
            sigma.sub_(step)
    assert found[0][1] == pytest.approx((ends[1] - ends[0]) / 2e-3, rel=1e-3 if y.dtype == torch.float64 else 0.05)


@pytest.mark.parametrize("kind", ["total", "doubly_reparameterized"])
def test_captured_and_eager_bounds_agree(kind, y):
    guide = loose_guide(y)
    results = []
    for backend in ("replay", "eager"):
        svi = CompiledSVI(
            conjugate,
            guide,
            pyro.optim.Adam({"lr": 0.0}),
            IWELBO(4, gradient=kind, max_plate_nesting=1),
            backend=backend,
        )
        svi.loss_and_gradients(y)
        svi.loss_and_gradients(y)
        assert bool(svi._captures) == (backend == "replay")
        pyro.set_rng_seed(2)
        results.append(svi.loss_and_gradients(y))
    torch.testing.assert_close(results[0], results[1])


def test_one_bound_for_each_element_of_a_plate_that_holds_all_sites(dtype):
    """Data of a variational autoencoder: independent elements, whose bounds add up."""
    data = torch.tensor([0.3, -1.0, 2.0], dtype=dtype)

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros_like(y)), 0.9))

    def bounds(y, num_repeats=300):
        loss = IWELBO(4, gradient="total", max_plate_nesting=1)
        with torch.no_grad():
            pyro.clear_param_store()
            return np.array([float(differentiable_loss(loss, model, guide, (y,), {})) for _ in range(num_repeats)])

    together = bounds(data)
    apart = [bounds(data[i : i + 1]) for i in range(3)]
    error = math.sqrt((together.var() + sum(each.var() for each in apart)) / len(together))
    assert abs(together.mean() - sum(each.mean() for each in apart)) < 4 * error


def test_evaluated_and_trained_by_pyro(y):
    """IWELBO is an ELBO of Pyro: plain SVI can train with it."""
    guide = loose_guide(y)
    svi = pyro.infer.SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.02}), IWELBO(8, max_plate_nesting=1))
    before = np.mean([svi.evaluate_loss(y) for _ in range(50)])
    for _ in range(100):
        svi.step(y)
    assert np.mean([svi.evaluate_loss(y) for _ in range(50)]) < before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_particles": 1}, "num_particles must be at least 2, got 1"),
        ({"gradient": "path"}, 'gradient must be "doubly_reparameterized" or "total", got \'path\''),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        IWELBO(**options)


def test_guides_without_a_path_gradient(y):
    with pytest.raises(ValueError, match="needs a flow guide, which AutoNormal is not"):
        differentiable_loss(IWELBO(4, max_plate_nesting=1), conjugate, AutoNormal(conjugate), (y,), {})
    mixed = AutoGuideList(conjugate)
    mixed.append(AutoNormal(conjugate))
    with pytest.raises(ValueError, match="AutoGuideList is not"):
        differentiable_loss(IWELBO(4, max_plate_nesting=1), conjugate, mixed, (y,), {})


def test_losses_without_a_gradient(y):
    with pytest.raises(NotImplementedError, match="ReweightedWakeSleep has no differentiable loss"):
        CompiledSVI(
            conjugate, AutoNormal(conjugate), pyro.optim.Adam({"lr": 0.1}), ReweightedWakeSleep(num_particles=2)
        ).step(y)
