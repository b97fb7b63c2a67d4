"""AutoMixture: its estimator against quadrature, its start at the modes, its components."""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_cases import Mixture, small
from models import Y
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import init_to_uniform

import pyro_flowguides as fg
from pyro_flowguides.compiled.losses import KL, as_objective
from pyro_flowguides.diagnostics.tracer import Tracer
from pyro_flowguides.distributions import systematic
from pyro_flowguides.model.call import ModelCall
from pyro_flowguides.testing.guides import check_guide
from pyro_flowguides.training.start import batched_calls


def two_modes(x):
    """Normals of mass 0.7 and 0.3 at −3 and 3, not normalised: log Z = 50."""
    first = math.log(0.7) - (x[..., 0] + 3).square() / 2
    second = math.log(0.3) - (x[..., 0] - 3).square() / (2 * 0.8**2) - math.log(0.8)
    return torch.logaddexp(first, second) - 0.5 * math.log(2 * math.pi) + 50.0


TWO = fg.LogDensity(two_modes, 1)


def set_up(model=TWO, **options):
    pyro.set_rng_seed(0)
    return fg.AutoMixture(model, fg.transforms.Affine, affine=None, **options).setup()


@pytest.fixture
def in_double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def moved(guide):
    """Overlapping components away from the optimum, where every part of the gradient differs from 0."""
    shifts = torch.linspace(-0.5, 0.8, sum(parameter.numel() for parameter in guide.parameters()))
    with torch.no_grad():
        for parameter, shift in zip(
            guide.parameters(), shifts.split([p.numel() for p in guide.parameters()]), strict=True
        ):
            parameter += shift.reshape(parameter.shape)
        for flow, loc in zip(guide.flow.components, (-1.0, 1.0), strict=True):
            flow.transforms[-1].loc.fill_(loc)
    return guide


def quadrature_gradient(guide):
    """The ELBO as an integral over a grid, differentiated."""
    x = torch.linspace(-25, 25, 20001).unsqueeze(-1)
    log_q = guide.get_posterior().log_prob(x)
    elbo = (log_q.exp() * (two_modes(x) - log_q)).sum() * (x[1, 0] - x[0, 0])
    return torch.cat([part.reshape(-1) for part in torch.autograd.grad(-elbo, list(guide.parameters()))])


@pytest.mark.parametrize(
    ("Loss", "gradient"),
    [(Trace_ELBO, "total"), (Trace_ELBO, "path"), (KL, "path"), (TraceGraph_ELBO, "path"), (TraceEnum_ELBO, "path")],
)
def test_gradient_is_that_of_the_integral(Loss, gradient, in_double):
    guide = moved(set_up(gradient=gradient))
    expected = quadrature_gradient(guide)
    options = {"num_particles": 5, "vectorize_particles": True, "max_plate_nesting": 0}
    if Loss is TraceEnum_ELBO:
        options["strict_enumeration_warning"] = False
    objective = Loss(**options) if Loss is KL else as_objective(Loss(**options))
    found = []
    pyro.set_rng_seed(1)
    for _ in range(200):
        guide.zero_grad()
        objective.loss(TWO, guide, (), {}).backward()
        found.append(torch.cat([parameter.grad.reshape(-1) for parameter in guide.parameters()]))
    found = torch.stack(found)
    error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - expected).abs() < 4.5 * error + 1e-9).all()), (found.mean(0), expected, error)


def test_constants_in_the_density_add_no_noise(in_double):
    """With two particles and more, log Z takes no part in the gradient of the weights."""
    guide = moved(set_up(gradient="path"))
    gradients = []
    for constant in (0.0, 1e6):
        pyro.set_rng_seed(3)
        model = fg.LogDensity(lambda x, constant=constant: two_modes(x) + constant, 1)
        guide.zero_grad()
        Trace_ELBO(num_particles=3, vectorize_particles=True).differentiable_loss(model, guide).backward()
        gradients.append(guide.flow.logits.grad.clone())
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-7)


def test_the_gradient_of_a_recorded_model_is_the_same(in_double):
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(1), 10.0).to_event(1))
        pyro.factor("density", two_modes(x))

    def for_one_draw():
        x = pyro.sample("x", dist.Normal(torch.zeros(1), 10.0).to_event(1))
        pyro.factor("density", two_modes(x[0].reshape(1)))

    guide = moved(set_up(model))
    tracer = Tracer(ModelCall(for_one_draw, (), {}), guide, differentiable=True)
    recorded = batched_calls(tracer, arguments_vary=False)
    assert recorded is not None
    gradients = []
    for objective, of in ((KL(5, max_plate_nesting=0), model), (KL(5, batched=recorded), for_one_draw)):
        pyro.set_rng_seed(2)
        guide.zero_grad()
        objective.loss(of, guide, (), {}).backward()
        gradients.append([parameter.grad.clone() for parameter in guide.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("number", [1, 2, 7, 256])
def test_draws_are_stratified(number):
    """Every half of a batch has each component as often as its weight says, up to one draw."""
    weights = torch.tensor([0.55, 0.3, 0.149, 0.001])
    for offset in (0.0, 0.3, 0.999):
        counts = systematic(weights, number, offset).bincount(minlength=4)
        assert bool(((counts - number * weights).abs() < 1 + 1e-3).all())
        assert len(systematic(weights, number, offset)) == number


def test_one_component_at_each_mode():
    guide = set_up().whiten()
    torch.testing.assert_close(guide.weights.sort().values, torch.tensor([0.3, 0.7]), rtol=0, atol=0.01)
    locs = sorted(float(flow.transforms[-1].loc) for flow in guide.flow.components)
    assert locs == pytest.approx([-3, 3], abs=0.1)
    assert not guide.is_trained()
    quantiles = guide.quantiles([0.1, 0.65, 0.75, 0.9])["x"].reshape(-1)
    # The quantiles of −3 + z at 0.1/0.7 and 0.65/0.7, and of 3 + 0.8 z at 0.05/0.3 and 0.2/0.3.
    expected = torch.tensor([-4.068, -1.535, 2.226, 3.345])
    torch.testing.assert_close(quantiles.float(), expected, rtol=0, atol=0.06)
    torch.testing.assert_close(float(guide.median()["x"]), -2.434, rtol=0, atol=0.05)


def test_fit_learns_the_weights():
    """From wrong weights to the right ones; the verdict is good, and the state holds all of it."""
    guide = set_up()
    with torch.no_grad():
        guide.flow.logits.copy_(torch.zeros(2))
    fit = fg.fit(TWO, guide, seed=0, num_steps=300, num_particles=64, whiten=None, progress=False, search_modes=False)
    torch.testing.assert_close(fit.guide.weights.sort().values, torch.tensor([0.3, 0.7]), rtol=0, atol=0.01)
    assert float(fit.elbo) == pytest.approx(50, abs=0.005)
    pyro.clear_param_store()
    other = fg.AutoMixture(TWO, fg.transforms.Affine, affine=None, num_components=3).setup()
    other.load_state_dict(fit.guide.state_dict())
    x = torch.linspace(-6, 6, 20).unsqueeze(-1)
    torch.testing.assert_close(other.log_prob(x), fit.guide.log_prob(x))


def test_keeps_the_contract_with_two_components():
    def model():
        pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        with pyro.plate("rows", 2):
            pyro.sample("pair", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    check_guide(small(Mixture)(model, gradient="path"), model)


def test_simplify_merges_and_drops():
    guide = set_up(num_components=2)
    flow, base = guide._pairs()[0]
    other = guide._pairs()[1]
    guide._replace_components(
        [(flow, base), other, (flow, base), other], torch.tensor([0.5, 0.29995, 0.2, 0.00005]).log()
    )
    x = torch.linspace(-6, 6, 20).unsqueeze(-1)
    before = guide.log_prob(x)
    assert guide.simplify()
    torch.testing.assert_close(guide.weights.sort().values, torch.tensor([0.3, 0.7]))
    torch.testing.assert_close(guide.log_prob(x), before, rtol=0, atol=1e-3)
    assert not guide.simplify()
    names = [name for name in pyro.get_param_store() if "flow" in name]
    assert {name.split(".")[3] for name in names if ".components." in name} == {"0", "1"}
    draws = pyro.infer.Predictive(TWO, guide=guide, num_samples=4)()
    assert draws["x"].shape == (4, 1, 1) or draws["x"].shape == (4, 1)


def test_light_components_are_dropped():
    guide = set_up(num_components=2)
    guide._replace_components(guide._pairs(), torch.tensor([0.0, -12.0]))
    assert guide.simplify()
    assert guide.weights.tolist() == [1.0]


def test_what_a_mixture_refuses():
    guide = set_up()
    with pytest.raises(ValueError, match="NeuTra"):
        guide.get_transform()
    with pytest.raises(ValueError, match="no transform of one base"):
        guide.get_base_dist()
    with pytest.raises(ValueError, match="num_components"):
        fg.AutoMixture(TWO, num_components="many")
    with pytest.raises(ValueError, match="at least 1"):
        fg.AutoMixture(TWO, num_components=0)
    with pytest.raises(ValueError, match="no gradient for the weights"):
        fg.fit(TWO, guide, num_steps=1, loss=fg.IWELBO(4), progress=False)
    random = fg.AutoMixture(TWO, functools.partial(fg.flows.residual, log_det="hutchinson"), num_components=1)
    with pytest.raises(ValueError, match="random estimate"):
        random.setup()


def test_restarts_as_a_mixture():
    """Each restart finds one of two modes; the mixture has both, with their masses, and each once."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1000.0))
        pyro.factor("density", two_modes(x.unsqueeze(-1)))

    fit = fg.fit(
        model,
        fg.AutoFlow(model, fg.transforms.Affine, affine=None, init_loc_fn=init_to_uniform(radius=4.0)),
        num_restarts=5,
        restarts="mixture",
        seed=0,
        num_steps=200,
        progress=False,
        whiten="batch_and_match",
        search_modes=False,
    )
    assert isinstance(fit.guide, fg.AutoMixture)
    assert len(fit.restarts) == 5
    torch.testing.assert_close(fit.guide.weights.sort().values, torch.tensor([0.3, 0.7]), rtol=0, atol=0.02)
    assert float(fit.elbo) == pytest.approx(50 - math.log(1000 * (2 * math.pi) ** 0.5), abs=0.01)


def mirrored(y):
    """Two modes, of which one is the image of the other."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu.abs(), 1.0), obs=y)


def test_what_a_fit_of_a_mixture_can_do(tmp_path):
    """Summary, export, predictions, comparison, a file; a second fit of the same mixture continues."""
    y = torch.tensor(Y)

    def new():
        return fg.AutoMixture(mirrored, fg.transforms.Affine, affine=None)

    options = {"num_particles": 16, "progress": False, "seed": 0, "search_modes": False}
    fit = fg.fit(mirrored, new(), y, num_steps=20, **options)
    torch.testing.assert_close(fit.guide.weights, torch.tensor([0.5, 0.5]), rtol=0, atol=0.02)
    # The square root of the mean of mu²: the posterior of |mu| is about N(1.3, 0.45²).
    assert float(fit.summary().loc["mu", "sd"]) == pytest.approx((1.3**2 + 0.2) ** 0.5, abs=0.1)
    assert fit.to_arviz(num_samples=50).posterior["mu"].shape == (1, 50)
    draws = fg.draw(mirrored, fit.guide, y, num_samples=200, seed=0)
    assert float((draws.values["mu"] > 0).float().mean()) == pytest.approx(0.5, abs=0.05)
    assert len(fg.compare({"mixture": fit, "draws": draws}, y, num_samples=200, seed=0)) == 2
    fit.save(tmp_path / "fit")
    loaded = fg.FitResult.load(tmp_path / "fit", mirrored, new())
    x = torch.linspace(-3, 3, 7).unsqueeze(-1)
    torch.testing.assert_close(loaded.guide.log_prob(x), fit.guide.log_prob(x))
    again = fg.fit(mirrored, fit.guide, y, num_steps=5, **options)
    assert len(again.guide.weights) == 2
