"""The importance-weighted bound and its gradients, Renyi bounds, and losses that cannot be differentiated."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import conjugate, conjugate_answer
from pyro.infer import EnergyDistance, ReweightedWakeSleep, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal

import pyro_flowguides as fg
from pyro_flowguides import IWELBO, CompiledSVI
from pyro_flowguides.compiled.losses import KL, as_objective

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
    assert not len(svi.captures)

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


@pytest.mark.parametrize("vectorize", [True, pytest.param(False, marks=pytest.mark.slow)])
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
    value = as_objective(IWELBO(8, max_plate_nesting=1)).loss(conjugate, guide, (y,), {})
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
        value = as_objective(IWELBO(8, gradient=kind, max_plate_nesting=1)).loss(model, guide, (y,), {})
        sigma = pyro.param("sigma").unconstrained()
        found.append((float(value.detach()), float(torch.autograd.grad(value, sigma)[0])))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    # By differences of the bound itself, under the same noise.
    ends = []
    for step in (-1e-3, 1e-3):
        with torch.no_grad():
            sigma.add_(step)
            pyro.set_rng_seed(0)
            ends.append(float(as_objective(IWELBO(8, max_plate_nesting=1)).loss(model, guide, (y,), {})))
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
        assert bool(len(svi.captures)) == (backend == "replay")
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
            return np.array([float(as_objective(loss).loss(model, guide, (y,), {})) for _ in range(num_repeats)])

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
    with pytest.raises(ValueError, match="needs a flow guide, and site 'mu' comes from another one"):
        as_objective(IWELBO(4, max_plate_nesting=1)).loss(conjugate, AutoNormal(conjugate), (y,), {})
    mixed = AutoGuideList(conjugate)
    mixed.append(AutoNormal(conjugate))
    with pytest.raises(ValueError, match="site 'mu' comes from another one"):
        as_objective(IWELBO(4, max_plate_nesting=1)).loss(conjugate, mixed, (y,), {})


# --- objectives -------------------------------------------------------------------------------------------------------


def test_kl_is_the_elbo_by_the_path_gradient(y):
    guide = loose_guide(y)
    parameters = list(guide.parameters())
    found = {}
    for kind in ("path", "total", "KL"):
        elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
        guide.gradient = "total" if kind == "KL" else kind
        pyro.set_rng_seed(0)
        objective = KL(4, max_plate_nesting=1) if kind == "KL" else as_objective(elbo)
        value = objective.loss(conjugate, guide, (y,), {})
        gradients = torch.autograd.grad(value, parameters)
        found[kind] = float(value.detach()), torch.cat([gradient.flatten() for gradient in gradients])
    assert guide.gradient == "total"
    assert found["KL"][0] == found["path"][0]
    assert torch.equal(found["KL"][1], found["path"][1])
    assert not torch.allclose(found["KL"][1], found["total"][1], rtol=1e-2)


def test_kl_takes_any_guide_and_draws_one_by_one(y):
    guide = AutoNormal(conjugate)
    guide(y)
    for vectorize in (True, False):
        elbo = Trace_ELBO(num_particles=3, vectorize_particles=vectorize, max_plate_nesting=1)
        pyro.set_rng_seed(0)
        expected = elbo.loss(conjugate, guide, y)
        pyro.set_rng_seed(0)
        objective = KL(3, vectorize_particles=vectorize, max_plate_nesting=1)
        assert float(objective.loss(conjugate, guide, (y,), {}).detach()) == pytest.approx(expected, rel=1e-6)


class Doubled:
    """An objective of one's own."""

    factor = 2.0

    def loss(self, model, guide, args, kwargs):
        return self.factor * Trace_ELBO().differentiable_loss(model, guide, *args, **kwargs)


@pytest.mark.parametrize("backend", ["replay", "eager"])
def test_an_objective_of_ones_own(backend, y):
    guide, objective = AutoNormal(conjugate), Doubled()
    svi = CompiledSVI(conjugate, guide, pyro.optim.Adam({"lr": 0.0}), objective, backend=backend)
    svi.step(y)
    for factor in (2.0, 3.0):
        # A graph that was captured with another factor is no longer this step.
        objective.factor = factor
        pyro.set_rng_seed(0)
        expected = factor * Trace_ELBO().loss(conjugate, guide, y)
        for evaluate in (svi.step, svi.evaluate_loss):
            pyro.set_rng_seed(0)
            assert evaluate(y) == pytest.approx(expected, rel=1e-5)


def test_a_differentiable_loss_of_ones_own(y):
    class Tripled(Trace_ELBO):
        def differentiable_loss(self, model, guide, *args, **kwargs):
            return 3 * super().differentiable_loss(model, guide, *args, **kwargs)

    guide = AutoNormal(conjugate)
    guide(y)
    pyro.set_rng_seed(0)
    expected = 3 * Trace_ELBO().loss(conjugate, guide, y)
    pyro.set_rng_seed(0)
    assert float(as_objective(Tripled()).loss(conjugate, guide, (y,), {}).detach()) == pytest.approx(expected)


def test_losses_that_are_called(y):
    """EnergyDistance is no ELBO, and its method ``loss`` takes other arguments than an objective's."""
    guide = AutoNormal(conjugate)
    guide(y)
    pyro.set_rng_seed(0)
    expected = EnergyDistance()(conjugate, guide, y)
    pyro.set_rng_seed(0)
    assert torch.equal(as_objective(EnergyDistance()).loss(conjugate, guide, (y,), {}), expected)


def test_losses_without_a_gradient(y):
    with pytest.raises(NotImplementedError, match="ReweightedWakeSleep has no differentiable loss"):
        as_objective(ReweightedWakeSleep(num_particles=2))
    with pytest.raises(TypeError, match="loss must be an ELBO of Pyro, an objective .*, or a function .*, got 'elbo'"):
        as_objective("elbo")
