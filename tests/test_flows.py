"""The recipes: stacks that start as the identity, reach every coordinate, invert, and are densities."""

import copy
import functools
import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from pyro.nn.module import to_pyro_module_
from recipe_cases import RECIPE_CASES, make_flow, size_of_perturbation
from transform_cases import perturb

import pyro_flowguides as fg
from pyro_flowguides import NormalizingFlow, flows
from pyro_flowguides import transforms as T

every_recipe = pytest.mark.parametrize("recipe", RECIPE_CASES.values(), ids=RECIPE_CASES)


@pytest.mark.parametrize("name", flows.RECIPES)
def test_recipes_have_one_signature(name):
    recipe = flows.RECIPES[name]
    assert recipe is getattr(flows, name)
    (dim, *named, options) = inspect.signature(recipe).parameters.values()
    assert dim.name == "dim" and options.kind is inspect.Parameter.VAR_KEYWORD
    for option in named:
        assert option.kind is inspect.Parameter.KEYWORD_ONLY
        assert option.default is not inspect.Parameter.empty
    for option in (*named, options):
        assert f" {option.name}: " in inspect.getdoc(recipe)
    flow = recipe(3, num_layers=1, hidden_dims=(7,), context_dim=2)
    assert flow.context_dim == 2
    assert any(7 in parameter.shape for parameter in flow.parameters())


@pytest.mark.parametrize(
    ("name", "options", "found"),
    [
        ("coupling", {"log_scale_bound": 1.5, "mask": "checkerboard"}, "ShiftScale(log_scale_bound=1.5)"),
        ("glow", {"log_scale_bound": 1.5}, "ShiftScale(log_scale_bound=1.5)"),
        ("iaf", {"log_scale_bound": 1.5}, "ShiftScale(log_scale_bound=1.5)"),
        ("maf", {"activation": torch.nn.Tanh}, "Tanh()"),
        ("nice", {"activation": torch.nn.Tanh}, "Tanh()"),
        ("mixture_coupling", {"num_components": 4}, "MixtureOfLogistics(num_components=4"),
        ("spline_coupling", {"num_bins": 5, "tail_bound": 2.0}, "RationalQuadraticSpline(num_bins=5, tail_bound=2.0"),
        ("spline_autoregressive", {"num_bins": 5}, "RationalQuadraticSpline(num_bins=5"),
        ("sylvester", {"basis": "householder", "num_reflections": 3}, "basis='householder'"),
        ("residual", {"lipschitz": 0.8}, "lipschitz=0.8"),
        ("continuous_planar", {"num_steps": 3}, "FixedSteps(method='rk4', num_steps=3)"),
        ("continuous_sylvester", {"solver": "euler"}, "FixedSteps(method='euler', num_steps=8)"),
        ("ffjord", {"trace": "hutchinson"}, "trace='hutchinson'"),
    ],
)
def test_options_reach_the_layers(name, options, found):
    flow = flows.RECIPES[name](3, num_layers=2, **options)
    assert sum(found in repr(part) for part in flow.transforms) == 2


@pytest.mark.parametrize("name", flows.RECIPES)
def test_an_unknown_option_is_an_error_that_names_it(name):
    with pytest.raises(TypeError, match=r"\w+\.__init__\(\) got an unexpected keyword argument 'bound'"):
        flows.RECIPES[name](3, bound=1.0)


@pytest.mark.parametrize("name", ["coupling", "spline_coupling", "mixture_coupling", "nice", "glow"])
@pytest.mark.parametrize("dim", [1, 3, 31])
def test_damped_recipes_start_as_the_identity_and_can_be_undamped(name, dim):
    recipe = flows.RECIPES[name]
    torch.manual_seed(0)
    damped = recipe(dim, num_layers=3, damped=True)
    torch.manual_seed(0)
    plain = recipe(dim, num_layers=3)
    z = 4 * torch.randn(20, dim)
    torch.testing.assert_close(damped(z), z, rtol=1e-6, atol=1e-6)
    assert all(part.damped for part in damped.modules() if isinstance(part, T.Coupling))
    T.undamp(damped)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in damped.state_dict().items())
    torch.testing.assert_close(damped(z), plain(z), rtol=0, atol=0)


def test_every_recipe_has_a_name():
    found = {
        name
        for name, value in vars(flows).items()
        if inspect.isfunction(value) and not name.startswith("_") and value.__module__ == flows.__name__
    }
    assert set(flows.RECIPES) == found


@every_recipe
@pytest.mark.parametrize("dim", [1, 3, 31])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_recipes_start_as_the_identity_with_gradients(recipe, dim, context_dim):
    transform = recipe(dim, num_layers=3, context_dim=context_dim)
    assert isinstance(transform, T.FlowTransform)
    assert transform.dim == dim and transform.context_dim == context_dim
    z, context = torch.randn(20, dim), torch.randn(20, context_dim) if context_dim else None
    x, log_det = transform.forward_and_log_det(z, context)
    torch.testing.assert_close(x, z, rtol=0, atol=2e-6)
    # A sum over the coordinates, each with a rounding error of its own.
    torch.testing.assert_close(log_det, torch.zeros(20), rtol=0, atol=1e-6 * dim**0.5)
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
@pytest.mark.parametrize("dim", [1, 5])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_recipes_bend_every_coordinate_and_invert(recipe, dim, context_dim, dtype, tolerance):
    flow = recipe(dim, num_layers=2, hidden_dims=(8,), context_dim=context_dim).to(dtype)
    perturb(flow, size_of_perturbation(recipe))
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
    grid = flow.transform(torch.linspace(-9, 9, 5001, dtype=torch.float64).unsqueeze(-1)).detach()
    with torch.no_grad():
        mass = torch.trapezoid(flow.log_prob(grid).exp(), grid.squeeze(-1))
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-4)


@every_recipe
def test_path_gradient_leaves_out_the_score_function(recipe, dtype, tolerance):
    """It equals the gradient of log q(x(φ); φ₀) at φ = φ₀, computed here by inverting a copy with fixed parameters."""
    # In float32 the inversion of steep splines would have no digits to compare with.
    scale = (1.0 if dtype == torch.float64 else 0.3) * size_of_perturbation(recipe)
    if recipe in (flows.continuous_planar, flows.continuous_sylvester, flows.ffjord):
        # Their score is that of the exact solution, from which steps of size h differ by O(h⁴).
        recipe = functools.partial(recipe, num_steps=32)
    flow = make_flow(recipe, 3, dtype, gradient="path", scale=scale)
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


@pytest.mark.parametrize("name", ["iaf", "maf", "spline_autoregressive"])
@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_reversals_cancel_whatever_the_number_of_layers(name, num_layers):
    flow = getattr(flows, name)(3, num_layers=num_layers)
    z = torch.randn(10, 3)
    torch.testing.assert_close(flow(z), z, rtol=0, atol=2e-6)
    assert sum(not isinstance(part, T.Reverse) for part in flow.transforms) == num_layers


@pytest.mark.parametrize("name", ["iaf", "maf", "spline_coupling", "spline_autoregressive"])
@pytest.mark.parametrize("dim", [2, 3])
def test_recipes_mix_every_pair_of_coordinates(name, dim):
    # In float64 whatever the run: some of these Jacobians are too ill-conditioned for a determinant in float32.
    flow = perturb(getattr(flows, name)(dim)).double()
    z = torch.randn(4, dim, dtype=torch.float64)
    x, log_det = flow.forward_and_log_det(z)
    jacobian = torch.func.vmap(torch.func.jacrev(flow))(z)
    assert (jacobian.abs().amax(0) > 0).all()
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(log_det, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(flow.inverse_and_log_det(x)[0], z, rtol=0, atol=1e-7)


def test_layers_of_the_recipes():
    assert len(flows.radial(3, num_layers=5).transforms) == 5
    assert [layer.num_vectors for layer in flows.sylvester(3, num_layers=2).transforms] == [3, 3]
    assert [layer.num_vectors for layer in flows.sylvester(20, num_layers=2, num_vectors=4).transforms] == [4, 4]
    triangular = flows.sylvester(20, num_layers=3, basis="triangular")
    assert [layer.reverse for layer in triangular.transforms] == [False, True, False]
    assert "num_vectors=20, basis='triangular', reverse=True" in repr(triangular)


@pytest.mark.parametrize("name", flows.RECIPES)
def test_one_coordinate_is_bent(name):
    """Affine layers alone would leave a normal law normal."""
    torch.manual_seed(0)
    flow = perturb(flows.RECIPES[name](1, num_layers=2))
    z = torch.linspace(-2.0, 2.0, 9).unsqueeze(-1)
    second_differences = flow(z).squeeze(-1).detach().diff(n=2)
    assert float(second_differences.abs().max()) > 1e-4


def test_the_law_of_one_coordinate_is_learnt():
    """A Gamma(2, 1) has sd 1.414, a log-normal fitted to it 1.65."""

    def model():
        pyro.sample("x", dist.Gamma(2.0, 1.0))

    fit = fg.fit(model, fg.AutoCoupling(model), num_steps=300, num_particles=64, seed=0, progress=False)
    assert fit.summary().loc["x", "sd"] == pytest.approx(2**0.5, abs=0.05)
    assert abs(fit.elbo.value) < 0.01
