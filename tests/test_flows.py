"""NormalizingFlow: sampling with density, memory of the last draw, the path gradient; the recipes."""

import copy

import pyro.distributions as dist
import pytest
import torch
from transform_cases import perturb

from pyro_flowguides import NormalizingFlow, flows

RECIPES = {"coupling": flows.coupling, "planar": flows.planar}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def make_flow(recipe, dim, dtype, **options):
    transform = perturb(recipe(dim, num_layers=2).to(dtype))
    base = dist.Normal(torch.zeros(dim, dtype=dtype), 1.0).to_event(1)
    return NormalizingFlow(base, transform, **options)


@every_recipe
@pytest.mark.parametrize("gradient", ["total", "path"])
def test_draws_come_with_their_density(recipe, gradient, dtype, tolerance):
    flow = make_flow(recipe, 3, dtype, gradient=gradient)
    assert flow.event_shape == (3,)
    for distribution in (flow, flow.expand((4,)), flow.expand((4, 1)).expand((4, 2))):
        shape = (5, *distribution.batch_shape)
        x, log_prob = distribution.rsample_and_log_prob((5,))
        assert x.shape == (*shape, 3)
        assert log_prob.shape == shape
        torch.testing.assert_close(distribution.log_prob(x), log_prob, rtol=tolerance(1e-8), atol=tolerance(1e-8))


def test_a_draw_is_scored_without_inverting(dtype, monkeypatch):
    flow = make_flow(flows.coupling, 3, dtype)
    x = flow.rsample((5,))
    elsewhere = flow.log_prob(x.clone())
    monkeypatch.setattr(type(flow.transform), "inverse_and_log_det", lambda *args: pytest.fail("inverted"))
    torch.testing.assert_close(flow.log_prob(x), elsewhere)


def test_another_distribution_scores_the_draw_by_itself(dtype):
    """The memory belongs to the object that drew: a copy with other parameters must not answer from it."""
    flow = make_flow(flows.coupling, 3, dtype)
    x = flow.rsample((5,))
    other = NormalizingFlow(flow.base_dist, perturb(copy.deepcopy(flow.transform)))
    assert not torch.allclose(other.log_prob(x), flow.log_prob(x))


@every_recipe
def test_density_integrates_to_one(recipe, dtype):
    flow = make_flow(recipe, 1, torch.float64)
    # The images of an even grid: dense where the flow compresses and the density is high.
    grid = flow.transform(torch.linspace(-9, 9, 20_001, dtype=torch.float64).unsqueeze(-1)).detach()
    mass = torch.trapezoid(flow.log_prob(grid).exp(), grid.squeeze(-1))
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-4)


@every_recipe
def test_path_gradient_leaves_out_the_score_function(recipe, dtype, tolerance):
    """It equals the gradient of log q(x(φ); φ₀) at φ = φ₀, computed here by inverting a copy with fixed parameters."""
    flow = make_flow(recipe, 3, dtype, gradient="path")
    fixed = copy.deepcopy(flow.transform).requires_grad_(False)
    parameters = list(flow.transform.parameters())
    torch.manual_seed(1)
    x, log_prob = flow.rsample_and_log_prob((6,))
    weights = torch.arange(1.0, 7.0, dtype=dtype)  # not the same for every draw, as in importance-weighted objectives
    found = torch.autograd.grad((weights * log_prob).sum(), parameters)
    torch.manual_seed(1)
    x = NormalizingFlow(flow.base_dist, flow.transform).rsample((6,))
    log_prob = NormalizingFlow(flow.base_dist, fixed).log_prob(x)
    expected = torch.autograd.grad((weights * log_prob).sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance(1e-6), atol=tolerance(1e-6) * max(1.0, float(b.abs().max())))


def test_path_gradient_vanishes_where_the_flow_is_exact(dtype, tolerance):
    """The gradient of log q − log p is 0 for every single draw, not only on average."""
    flow = make_flow(flows.coupling, 3, dtype, gradient="path")
    fixed = copy.deepcopy(flow.transform).requires_grad_(False)
    x, log_prob = flow.rsample_and_log_prob((1,))
    loss = log_prob - NormalizingFlow(flow.base_dist, fixed).log_prob(x)
    for gradient in torch.autograd.grad(loss.sum(), list(flow.transform.parameters())):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=tolerance(1e-7))


@every_recipe
@pytest.mark.parametrize("dim", [1, 2, 5, 31])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_recipes_start_as_the_identity(recipe, dim, context_dim):
    transform = recipe(dim, num_layers=3, context_dim=context_dim)
    z = torch.randn(10, dim)
    context = torch.randn(10, context_dim) if context_dim else None
    x, log_det = transform.forward_and_log_det(z, context)
    torch.testing.assert_close(x, z, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_det, torch.zeros(10), rtol=0, atol=1e-6)


def test_couplings_move_every_coordinate(dtype):
    transform = make_flow(flows.coupling, 5, dtype).transform
    z = torch.randn(10, 5, dtype=dtype)
    assert ((transform(z) - z).abs().amax(0) > 1e-3).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda base: NormalizingFlow(base, flows.coupling(2), gradient="score"), 'gradient must be "total" or "path"'),
        (lambda base: NormalizingFlow(base, flows.coupling(2, context_dim=3)), "needs a context of size 3"),
        (lambda base: flows.coupling(2, num_layers=0), "coupling: num_layers must be at least 1"),
        (lambda base: flows.planar(0), "dim must be at least 1"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make(dist.Normal(torch.zeros(2), 1.0).to_event(1))
