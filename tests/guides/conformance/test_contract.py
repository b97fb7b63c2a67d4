"""What a Pyro autoguide is: its methods, sites, shapes, start and point estimates."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_cases import every_flow, every_guide, every_normal_guide, small
from models import Y, conjugate, correlated, kitchen_sink, train
from pyro import poutine
from pyro.infer import (
    SVI,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
)
from pyro.infer.autoguide import (
    init_to_feasible,
    init_to_mean,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.reparam import ProjectedNormalReparam
from pyro.nn import PyroModule, PyroSample
from pyro.util import check_model_guide_match
from torch.distributions import biject_to, constraints
from transform_cases import perturb

import pyro_flowguides as fg
from pyro_flowguides.testing.guides import (
    check_copies,
    check_densities,
    check_estimates,
    check_guide,
    check_particles,
    check_sites,
)


def mixed(y):
    """A site of each kind: real, positive, simplex, in a plate, with an event dimension; and data."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
    with pyro.plate("rows", len(y)):
        pair = pyro.sample("pair", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(pair.sum(-1) + weights[..., 0], scale), obs=y)


@every_guide
def test_keeps_the_contract(Guide):
    check_guide(small(Guide)(mixed), mixed, torch.tensor(Y[:2]))


@pytest.mark.parametrize("options", [{"gradient": "path"}, {"affine": "diagonal", "damped": False}], ids=str)
def test_keeps_the_contract_with_other_options(options):
    y = torch.tensor(Y[:2])
    check_guide(small(fg.AutoFlow)(mixed, **options).whiten(y, method="batch_and_match"), mixed, y)


@pytest.mark.parametrize("check", [check_sites, check_densities, check_particles, check_estimates, check_copies])
def test_every_support(check):
    guide = fg.AutoFlow(kitchen_sink)
    guide()
    perturb(guide.flow.transforms[0], 0.3)
    check(guide, kitchen_sink)


@every_normal_guide
def test_starts_where_it_is_told(Guide):
    guide = Guide(conjugate, init_loc_fn=init_to_value(values={"mu": torch.tensor(7.0)}), init_scale=0.01)
    guide(torch.tensor(Y))
    torch.testing.assert_close(guide.median()["mu"], torch.tensor(7.0))
    low, high = guide.quantiles([0.16, 0.84])["mu"]
    assert float(high - low) == pytest.approx(0.02, rel=0.05)


def test_quantiles_of_a_normal():
    guide = fg.AutoFlow(correlated)
    guide.setup()
    levels = [0.05, 0.25, 0.5, 0.75, 0.95]
    expected = guide.fixed_map.loc + 0.1 * dist.Normal(0.0, 1.0).icdf(torch.tensor(levels)).unsqueeze(-1)
    # The standard error of the 5% quantile of 10,001 draws is 2% of the sd.
    torch.testing.assert_close(guide.quantiles(levels)["x"], expected.double(), rtol=0, atol=0.1 * 4 * 0.021)


def test_setup_builds_everything():
    y = torch.tensor(Y)
    guide = fg.AutoFlow(conjugate)
    assert guide.setup(y) is guide
    names = [name for name, _ in guide.named_parameters()]
    assert names
    assert len(names) == len(set(names)) == len({id(parameter) for parameter in guide.parameters()})
    guide.setup(y)
    assert [name for name, _ in guide.named_parameters()] == names


def test_sites_scores_and_names():
    """One auxiliary site holds log q; the latent sites are Deltas without density of their own where the map is the identity."""

    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    guide = fg.AutoFlow(model)
    assert guide.prototype_trace is None
    guide_trace = poutine.trace(guide).get_trace()
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    latent = guide_trace.nodes["_AutoFlow_latent"]
    assert latent["infer"]["is_auxiliary"]
    assert latent["fn"].has_rsample
    assert latent["log_prob_sum"].item() != 0.0
    assert guide_trace.nodes["x"]["log_prob_sum"].item() == 0.0
    assert isinstance(guide_trace.nodes["x"]["fn"], dist.Delta)
    check_model_guide_match(model_trace, guide_trace)
    with poutine.trace() as capture:
        latent = guide.sample_latent()
    assert list(capture.trace.stochastic_nodes) == ["_AutoFlow_latent"]
    ((site, value),) = guide.latents.unpack(latent)
    assert site.name == "x"
    torch.testing.assert_close(value, latent)


def test_call_returns_a_tuple_in_the_order_of_the_names():
    def model():
        pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("a", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))

    guide = fg.AutoFlow(model)
    guide()
    pyro.set_rng_seed(1)
    values = guide()
    assert list(values) == ["b", "a"]
    pyro.set_rng_seed(1)
    a, b = guide.call()
    torch.testing.assert_close(a, values["a"])
    torch.testing.assert_close(b, values["b"])


def unpacking():
    return pyro.sample("x", dist.LKJCholesky(2, torch.tensor(1.0)))


def test_event_shapes_that_the_map_to_the_real_line_changes():
    guide = fg.AutoFlow(unpacking)
    assert guide()["x"].shape == unpacking().shape
    ((_, value),) = guide.latents.unpack(guide.sample_latent())
    assert value.shape == (1,)


def every_shape():
    pyro.sample("scalar", dist.Normal(0.0, 1.0))
    pyro.sample("vector", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("plate", 3):
        pyro.sample("in_plate", dist.Normal(torch.zeros(3), 1.0))
    pyro.sample("normal", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    pyro.sample("masked", dist.Normal(0, 1).expand((2,)).mask(torch.arange(2) > 0).to_event(1))
    pyro.sample("cholesky", dist.LKJCholesky(2, torch.tensor(1.0)))


@pytest.mark.parametrize("sample_shape", [(), (6,), (5, 4)], ids=str)
def test_plates_outside(sample_shape):
    def model():
        a = pyro.sample("a", dist.Normal(0, 1))
        b = pyro.sample("b", dist.Normal(a[..., None], torch.ones(3)).to_event(1))
        with pyro.plate("i", 2):
            c = pyro.sample("c", dist.Dirichlet(b.exp()))
        return a, b, c

    guide = fg.AutoFlow(model)
    with pyro.plate_stack("particles", sample_shape, rightmost_dim=-2):
        trace = poutine.trace(guide).get_trace()
        a, b, c = poutine.replay(model, trace=trace)()
    extra = (*sample_shape, 1) if sample_shape else ()
    assert a.shape == extra
    assert b.shape == (*extra, 3)
    assert c.shape == (*sample_shape, 2, 3)
    log_q = trace.nodes["_AutoFlow_latent"]["fn"].batch_shape
    assert log_q == extra


def test_factors_enter_the_loss():
    def model(log_factor):
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.factor("single", log_factor)
        with pyro.plate("plate", 3):
            pyro.factor("in_plate", log_factor)
            pyro.sample("b", dist.Normal(torch.zeros(3), 1.0))

    guide = fg.AutoFlow(model)
    for Loss in (Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO):
        loss = Loss(strict_enumeration_warning=False)
        loss.loss(model, guide, torch.tensor(0.0))
        values = []
        for log_factor in (5.0, 4.0):
            pyro.set_rng_seed(1)
            values.append(loss.loss(model, guide, torch.tensor(log_factor)))
        assert values[0] - values[1] == pytest.approx(-4.0, abs=1e-6)


def test_posterior_is_the_transformed_base():
    guide = fg.AutoFlow(correlated).setup()
    perturb(guide.flow)
    posterior = guide.get_posterior()
    assert isinstance(posterior, dist.TransformedDistribution)
    z = guide.get_base_dist().sample((4,))
    transform = torch.distributions.ComposeTransform(posterior.transforms)
    x = transform(z)
    torch.testing.assert_close(x, guide.get_transform()(z))
    log_det = transform.log_abs_det_jacobian(z, x)
    torch.testing.assert_close(log_det, guide.get_transform().log_abs_det_jacobian(z, x))
    # A point that the distribution has not drawn itself.
    expected = guide.get_base_dist().log_prob(z) - log_det
    torch.testing.assert_close(guide.get_posterior().log_prob(x.clone()), expected, rtol=1e-6, atol=1e-6)


def test_mask_false_has_no_jacobian():
    def model():
        pyro.sample("x", dist.LogNormal(0.0, 1.0))

    guide = fg.AutoFlow(model).setup()
    with poutine.mask(mask=False):
        site = poutine.trace(guide).get_trace().nodes["x"]
    assert site["fn"].log_density.item() == 0.0
    site = poutine.trace(guide).get_trace().nodes["x"]
    # log N(log x) / x: the density of the Delta is 1/x.
    torch.testing.assert_close(site["fn"].log_density, -site["value"].log())


@every_flow
@pytest.mark.parametrize("init_scale", [1e-1, 1e-8])
def test_init_scale(Guide, init_scale):
    guide = Guide(every_shape, init_scale=init_scale).setup()
    scale = guide.get_posterior().sample((10_000,)).std(0)
    assert scale.shape == (guide.latent_dim,)
    # The standard error of the deviation of 10,000 draws is 1%; of heavier tails, 2%.
    torch.testing.assert_close(scale, torch.full_like(scale, init_scale), rtol=0.08, atol=0)


def in_unconstrained_space(values, prototype):
    return {name: biject_to(prototype[name]["fn"].support).inv(value) for name, value in values.items()}


def test_every_function_of_pyro_for_the_start():
    """The guide starts where the function says: at 0 in unconstrained space, at the prior's mean, within the range."""
    for init_loc_fn in (init_to_feasible, init_to_mean, init_to_uniform, init_to_sample):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        guide = fg.AutoFlow(every_shape, init_loc_fn=init_loc_fn).setup()
        prototype = guide.prototype_trace.nodes
        start = in_unconstrained_space(guide.median(), prototype)
        # The same numbers, drawn in the same order.
        pyro.set_rng_seed(3)
        traced = poutine.trace(InitMessenger(init_loc_fn)(every_shape)).get_trace().nodes
        for name, value in start.items():
            expected = biject_to(traced[name]["fn"].support).inv(traced[name]["value"])
            torch.testing.assert_close(value, expected)
            if init_loc_fn is init_to_feasible and name not in ("simplex", "cholesky"):
                torch.testing.assert_close(value, torch.zeros_like(value))
            if init_loc_fn is init_to_uniform:
                assert value.abs().max() <= 2


def test_learns_the_scale_of_a_prior():
    def model():
        pyro.sample("y", dist.LogNormal(0.0, 1.0))
        pyro.sample("z", dist.Beta(2.0, 2.0).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(0.0, 1.0))

    guide = fg.AutoFlow(model)
    train(model, guide, steps=200, lr=0.02, loss=Trace_ELBO(num_particles=64, vectorize_particles=True))
    low, middle, high = guide.quantiles([0.1, 0.5, 0.9])["x"]
    # ±1.28, with the noise that 200 steps leave.
    assert float(high - middle) == pytest.approx(1.28, abs=0.25)
    assert float(middle - low) == pytest.approx(1.28, abs=0.25)
    low, middle, high = guide.quantiles([0.1, 0.5, 0.9])["y"]
    assert 2.0 < float(high / middle) < 6.0
    assert 2.0 < float(middle / low) < 6.0


def dict_and_tuple(data, pair, *, scale):
    mu = pyro.sample("mu", dist.Normal(0.0, scale))
    with pyro.plate("data", len(data["y"])):
        pyro.sample("y", dist.Normal(mu + pair[0] * data["x"], pair[1]), obs=data["y"])


def test_arguments_of_every_kind():
    data = {"x": torch.arange(3.0), "y": torch.tensor([0.5, 1.0, 2.0])}
    guide = fg.AutoFlow(dict_and_tuple)
    losses = []
    for scale in (1.0, 2.0):
        pyro.set_rng_seed(0)
        guide.setup(data, (torch.tensor(0.5), 1.0), scale=scale)
        losses.append(Trace_ELBO().loss(dict_and_tuple, guide, data, (torch.tensor(0.5), 1.0), scale=scale))
    # Near 1 the narrower prior is the higher one.
    assert abs(losses[0] - losses[1]) > 0.05
    assert set(guide.median(data, (torch.tensor(0.5), 1.0), scale=1.0)) == {"mu"}


class RandomLinear(torch.nn.Linear, PyroModule):
    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([out_features, in_features]).to_event(2))
        self.bias = PyroSample(dist.Normal(0.0, 10.0).expand([out_features]).to_event(1))


class LinearRegression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = RandomLinear(3, 1)
        self.log_scale = torch.nn.Parameter(torch.tensor(0.0))

    def forward(self, x, y=None):
        mean = self.linear(x).squeeze(-1)
        sigma = pyro.sample("sigma", dist.LogNormal(self.log_scale, 1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, sigma), obs=y)


def test_nested_modules_with_parameters_of_their_own():
    x, y = torch.randn(10, 3), torch.randn(10)
    model = LinearRegression()
    guide = fg.AutoFlow(model)
    for Loss in (Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO):
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Loss(strict_enumeration_warning=False))
        assert math.isfinite(svi.step(x, y))
    assert set(guide.median(x, y)) == {"linear.weight", "linear.bias", "sigma"}
    assert model.log_scale.item() != 0.0
    assert not any(name.startswith("_model") or "log_scale" in name for name, _ in guide.named_parameters())


def test_reparametrised_model():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        y = pyro.sample("y", dist.ProjectedNormal(x))
        pyro.sample("obs", dist.Normal(y, 1).to_event(1), obs=torch.tensor([1.0, 0.0, 0.0]))

    model = poutine.reparam(model, {"y": ProjectedNormalReparam()})
    guide = fg.AutoFlow(model).setup()
    assert [site.name for site in guide.latents.sites] == ["x", "y_normal"]
    check_sites(guide, model)


# --- the start --------------------------------------------------------------------------------------------------------


def flat_priors():
    with pyro.plate("plate", 2):
        location = pyro.sample("location", dist.ImproperUniform(constraints.real, (), ()))
    scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
    weights = pyro.sample("weights", dist.ImproperUniform(constraints.simplex, (), (3,)))
    pyro.sample("x", dist.Normal(location.sum(-1), scale), obs=torch.tensor(0.5))
    pyro.factor("proper", -scale - location.square().sum(-1) + weights.log().sum(-1))


@pytest.mark.parametrize("options", [{}, {"init_loc_fn": init_to_feasible}], ids=["default", "feasible"])
def test_flat_priors_start_at_a_feasible_point(options):
    guide = fg.AutoFlow(flat_priors, **options).setup()
    median = guide.median()
    torch.testing.assert_close(median["location"], torch.zeros(2))
    torch.testing.assert_close(median["scale"], torch.tensor(1.0))
    torch.testing.assert_close(median["weights"], torch.full((3,), 1 / 3))
    assert all(math.isfinite(loss) for loss in train(flat_priors, guide, steps=2))


def test_starts_at_every_site_where_it_is_told():
    values = {"x": torch.randn(()), "y": torch.randn(5), "z": torch.tensor([0.2, 0.5, 0.3])}

    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(5), torch.eye(5)))
        pyro.sample("z", dist.Dirichlet(torch.ones(3)))

    guide = fg.AutoFlow(model, init_loc_fn=lambda site: values[site["name"]])
    guide()
    for name, value in guide.median().items():
        torch.testing.assert_close(value, values[name])
