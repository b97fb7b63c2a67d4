"""The recipes: stacks that start as the identity, reach every coordinate, invert, and are densities."""

import copy
import inspect

import pyro
import pytest
import torch
from pyro.nn import PyroModule
from pyro.nn.module import to_pyro_module_
from recipe_cases import RECIPE_CASES, make_flow
from transform_cases import perturb

from pyro_flowguides import NormalizingFlow, flows
from pyro_flowguides import transforms as T
from pyro_flowguides.transforms.networks import MLP

every_recipe = pytest.mark.parametrize("recipe", RECIPE_CASES.values(), ids=RECIPE_CASES)


@pytest.mark.parametrize("name", flows.RECIPES)
def test_recipes_have_one_signature(name):
    recipe = flows.RECIPES[name]
    assert recipe is getattr(flows, name)
    (dim, *options) = inspect.signature(recipe).parameters.values()
    assert dim.name == "dim"
    assert {"num_layers", "hidden_dims", "context_dim"} <= {option.name for option in options}
    for option in options:
        assert option.kind is inspect.Parameter.KEYWORD_ONLY
        assert option.default is not inspect.Parameter.empty
        assert f" {option.name}: " in inspect.getdoc(recipe)


def test_every_recipe_has_a_name():
    found = {
        name
        for name, value in vars(flows).items()
        if inspect.isfunction(value) and not name.startswith("_") and value.__module__ == flows.__name__
    }
    assert set(flows.RECIPES) == found


@every_recipe
@pytest.mark.parametrize("dim", [1, 2, 3, 5, 31, 40])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_recipes_start_as_the_identity_with_gradients(recipe, dim, context_dim):
    transform = recipe(dim, num_layers=3, context_dim=context_dim)
    assert isinstance(transform, T.FlowTransform)
    assert transform.dim == dim and transform.context_dim == context_dim
    z, context = torch.randn(20, dim), torch.randn(20, context_dim) if context_dim else None
    x, log_det = transform.forward_and_log_det(z, context)
    torch.testing.assert_close(x, z, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_det, torch.zeros(20), rtol=0, atol=1e-6)
    (x.square().sum() + x.sin().sum() + log_det.sum()).backward()
    for name, parameter in transform.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@every_recipe
@pytest.mark.parametrize("dim", [1, 5, 40])
def test_recipes_with_their_own_sizes_start_as_the_identity(recipe, dim):
    """The defaults are what a guide uses."""
    z = torch.randn(20, dim)
    x, log_det = recipe(dim).forward_and_log_det(z)
    torch.testing.assert_close(x, z, rtol=0, atol=1e-5)
    torch.testing.assert_close(log_det, torch.zeros(20), rtol=0, atol=1e-5)


@every_recipe
@pytest.mark.parametrize("dim", [1, 4, 5])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_recipes_bend_every_coordinate_and_invert(recipe, dim, context_dim, dtype, tolerance):
    flow = perturb(recipe(dim, num_layers=2, hidden_dims=(8,), context_dim=context_dim).to(dtype))
    z = torch.randn(20, dim, dtype=dtype)
    context = torch.randn(20, context_dim, dtype=dtype) if context_dim else None
    x, _ = flow.forward_and_log_det(z, context)
    assert ((x - z).abs().amax(0) > 1e-3).all()
    # A shift would do for the line above: the distance of two points changes in every coordinate too.
    moved, _ = flow.forward_and_log_det(z + 1, context)
    assert (((moved - x) - 1).abs().amax(0) > 1e-3).all()
    z_back, inverse_log_det = flow.inverse_and_log_det(x, context)
    # By the residual: perturbed splines have slopes of 1e-8 and less, through which no z is found again to the last digits.
    x_back, log_det_back = flow.forward_and_log_det(z_back, context)
    torch.testing.assert_close(x_back, x, rtol=tolerance(1e-9), atol=tolerance(1e-9))
    torch.testing.assert_close(inverse_log_det, -log_det_back, rtol=tolerance(1e-9), atol=tolerance(1e-9))


@every_recipe
def test_density_integrates_to_one(recipe):
    flow = make_flow(recipe, 1, torch.float64)
    # The images of an even grid: dense where the flow compresses and the density is high.
    grid = flow.transform(torch.linspace(-9, 9, 20_001, dtype=torch.float64).unsqueeze(-1)).detach()
    mass = torch.trapezoid(flow.log_prob(grid).exp(), grid.squeeze(-1))
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-4)


@every_recipe
def test_path_gradient_leaves_out_the_score_function(recipe, dtype, tolerance):
    """It equals the gradient of log q(x(φ); φ₀) at φ = φ₀, computed here by inverting a copy with fixed parameters."""
    # In float32 the inversion of steep splines would have no digits to compare with.
    flow = make_flow(recipe, 3, dtype, gradient="path", scale=1.0 if dtype == torch.float64 else 0.3)
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


@every_recipe
def test_recipes_become_pyro_modules(recipe):
    """Every parameter then has one name in the store, and the values are those of before."""
    flow = perturb(recipe(3, num_layers=2))
    z = torch.randn(5, 3)
    expected, _ = flow.forward_and_log_det(z)
    names = {name for name, _ in flow.named_parameters()}
    to_pyro_module_(flow)
    assert isinstance(flow, PyroModule)

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self):
            return self.flow.forward_and_log_det(z)[0]

    torch.testing.assert_close(Guide()(), expected)
    assert {name.removeprefix("flow.") for name in pyro.get_param_store()} == names


def test_volume_of_nice_is_that_of_its_last_part():
    flow = perturb(flows.nice(4, num_layers=3).double())
    z = torch.randn(5, 4, dtype=torch.float64)
    _, log_det = flow.forward_and_log_det(z)
    _, expected = flow.transforms[-1].forward_and_log_det(z)
    torch.testing.assert_close(log_det, expected)


@every_recipe
@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_layers": 0}, "num_layers must be at least 1, got 0"), ({"dim": 0}, "dim must be at least 1, got 0")],
    ids=["num_layers", "dim"],
)
def test_sizes_that_are_wrong(recipe, options, message):
    with pytest.raises(ValueError, match=message):
        recipe(**{"dim": 2, **options})


def test_a_step_moves_a_wide_network_about_as_far_as_a_narrow_one():
    def change(width):
        pyro.set_rng_seed(0)
        network = MLP(3, 1, (width, width)).double()
        inputs = torch.randn(64, 3, dtype=torch.float64)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        network(inputs).sum().backward()
        optimizer.step()
        return float(network(inputs).mean().detach())

    # Adam moves every weight by the rate, so that what is not divided moves six times as far.
    assert change(16 * 16) / change(16) < 3
    assert change(16) < 0


def test_a_linear_map_of_the_context_is_not_divided():
    linear_map = MLP(9, 2, ())
    torch.nn.init.ones_(linear_map.layers[0].weight)
    assert torch.equal(linear_map(torch.ones(9)), torch.full((2,), 9.0))


@pytest.mark.parametrize("dim", [31, 40, 61, 200])
def test_couplings_of_many_coordinates_part_nearly_every_two(dim):
    """Two coordinates that are in one half throughout would depend on each other through the other half alone."""
    parted = torch.zeros(dim, dim, dtype=torch.bool)
    order = torch.arange(dim)
    for part in flows.coupling(dim).transforms:
        if isinstance(part, T.Permutation):
            order = order[part.permutation]
        else:
            kept = torch.zeros(dim, dtype=torch.bool)
            kept[order[part.order[: part.num_kept]]] = True
            parted |= kept.unsqueeze(-1) ^ kept
    assert parted.sum() / (dim * (dim - 1)) > 0.97
    assert not any(isinstance(part, T.Permutation) for part in flows.coupling(30).transforms)


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_shuffled_couplings_have_the_density_of_their_jacobian(num_layers):
    flow = perturb(flows.coupling(31, num_layers=num_layers, hidden_dims=(8,)).double())
    z, score = torch.randn(2, 31, dtype=torch.float64), torch.randn(2, 31, dtype=torch.float64)
    x, log_det, moved = flow.forward_with_score(z, score)
    jacobian = torch.stack([torch.func.jacrev(flow)(row) for row in z]).detach()
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-9, atol=1e-9)
    log_det_gradient = torch.func.grad(lambda z: flow.forward_and_log_det(z)[1].sum())(z)
    expected = torch.linalg.solve(jacobian.mT, (score - log_det_gradient).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(moved, expected.detach(), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(flow.inverse_and_log_det(x)[0], z, rtol=1e-7, atol=1e-7)
