"""What autoregressive transforms and rational-quadratic splines promise beyond the contract of every transform."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear
from transform_cases import perturb

from pyro_flowguides import flows
from pyro_flowguides import transforms as T
from pyro_flowguides.transforms import autoregressive, univariate
from pyro_flowguides.transforms.masked import MaskedMLP
from pyro_flowguides.transforms.univariate import RationalQuadraticSpline

RECIPES = ["iaf", "maf", "spline_coupling", "spline_autoregressive"]


# --- the masked network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 5, 9])
@pytest.mark.parametrize("hidden_dims", [(1,), (2,), (7, 1, 3), (32, 32)], ids=str)
@pytest.mark.parametrize("context_dim", [0, 2])
def test_a_coordinate_depends_on_those_before_it_alone(dim, hidden_dims, context_dim, dtype):
    network = perturb(MaskedMLP(dim, 3, hidden_dims, context_dim=context_dim)).to(dtype)
    context = torch.randn(context_dim, dtype=dtype) if context_dim else None
    z = torch.randn(dim, dtype=dtype)
    jacobian = torch.func.jacrev(lambda z: network(z, context))(z)
    assert jacobian.shape == (dim, 3, dim)
    for i in range(dim):
        assert (jacobian[i, :, i:] == 0).all()
    # Coordinate 0 is free, every other one depends on something.
    assert all((jacobian[i] != 0).any() for i in range(1, dim))
    if max(hidden_dims) >= dim and min(hidden_dims) >= dim:
        assert all((jacobian[i, :, j] != 0).all() for i in range(dim) for j in range(i))
    if context_dim:
        by_context = torch.func.jacrev(lambda context: network(z, context))(context)
        assert (by_context != 0).any(-1).all(), "the context does not reach every coordinate"


@pytest.mark.parametrize("dim", [1, 4])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_products_of_the_masked_network(dim, context_dim, dtype, tolerance):
    """The hand-written products agree with autograd, and one coordinate with all of them."""
    network = perturb(MaskedMLP(dim, 3, (6, 2, 5), torch.nn.Tanh, context_dim)).to(dtype)
    context = torch.randn(8, context_dim, dtype=dtype) if context_dim else None
    z = torch.randn(8, dim, dtype=dtype)
    bound = network.at(context)
    parameters, slopes = bound.linearize(z)
    torch.testing.assert_close(parameters, network(z, context))
    for i in range(dim):
        torch.testing.assert_close(bound.of_coordinate(z, i), parameters[..., i, :])
    gradient = torch.randn(8, dim, 3, dtype=dtype)
    _, pull_back = torch.func.vjp(lambda z: network(z, context).expand(8, dim, 3), z)
    torch.testing.assert_close(bound.pull_back(slopes, gradient), pull_back(gradient)[0])
    rows = bound.pull_back_rows(slopes, gradient)
    for i in range(dim):
        only_i = torch.zeros_like(gradient)
        only_i[:, i] = gradient[:, i]
        torch.testing.assert_close(rows[:, i], pull_back(only_i)[0])
    diagonal, right = torch.rand(8, dim, dtype=dtype) + 0.5, torch.randn(8, dim, dtype=dtype)
    expected = torch.linalg.solve(rows.mT + torch.diag_embed(diagonal), right.unsqueeze(-1)).squeeze(-1)
    found = bound.back_substitute(slopes, gradient, diagonal, right)
    torch.testing.assert_close(found, expected, rtol=tolerance(1e-9), atol=tolerance(1e-9))


def test_the_weights_are_masked_once_per_call(monkeypatch):
    network = perturb(MaskedMLP(4, 2, (8, 8)))
    calls = []
    layer = type(network.layers[0])
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, context: calls.append(self) or forward(self, context))
    transform = T.AffineAutoregressive(4, hidden_dims=(8, 8))
    transform.conditioner = network
    with torch.no_grad():
        transform.inverse_and_log_det(torch.randn(5, 4))
    assert len(calls) == 3


# --- the autoregressive structure -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [T.AffineAutoregressive, T.SplineAutoregressive])
@pytest.mark.parametrize("dim", [2, 7])
def test_the_jacobian_is_lower_triangular(make, dim, dtype):
    transform = perturb(make(dim)).to(dtype)
    jacobian = torch.func.jacrev(transform)(torch.randn(dim, dtype=dtype))
    assert (jacobian.triu(1) == 0).all()
    assert (jacobian.diagonal() > 0).all()
    assert (jacobian.tril(-1) != 0).any()


@pytest.mark.parametrize("make", [T.AffineAutoregressive, T.SplineAutoregressive])
@pytest.mark.parametrize("dim", [1, 2, 10, 64])
@pytest.mark.parametrize("largest_dense", [0, 1000], ids=["substitution", "dense"])
def test_both_ways_to_the_score_are_exact(make, dim, largest_dense, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(autoregressive, "_LARGEST_DENSE_JACOBIAN", largest_dense)
    transform = perturb(make(dim, hidden_dims=(2 * dim, 5))).to(dtype)
    z, score = torch.randn(3, dim, dtype=dtype), torch.randn(3, dim, dtype=dtype)
    *_, found = transform.forward_with_score(z, score)
    *_, expected = T.FlowTransform.forward_with_score(transform, z, score)
    size = expected.abs().max().clamp(min=1.0).item()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance(1e-9) * size)


@pytest.mark.parametrize("how", ["vmap", "make_fx", "aot_eager"])
def test_the_score_by_substitution_can_be_captured(how, dtype, tolerance):
    transform = perturb(T.AffineAutoregressive(autoregressive._LARGEST_DENSE_JACOBIAN + 2, hidden_dims=(9,))).to(dtype)
    z = torch.randn(4, transform.dim, dtype=dtype)

    def step(z):
        return transform.forward_with_score(z, -z)

    expected = step(z)
    if how == "vmap":
        found = torch.vmap(step)(z)
    elif how == "make_fx":
        found = make_fx(step)(torch.randn_like(z))(z)
    else:
        torch._dynamo.reset()
        found = torch.compile(step, backend="aot_eager", fullgraph=True)(z)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance(1e-9), atol=tolerance(1e-9))


@pytest.mark.parametrize("make", [T.AffineAutoregressive, T.SplineAutoregressive])
def test_the_inverse_is_the_same_with_and_without_gradients(make, dtype, tolerance):
    transform = perturb(make(6, context_dim=2)).to(dtype)
    x, context = 3 * torch.randn(7, 6, dtype=dtype), torch.randn(7, 2, dtype=dtype)
    z, log_det = transform.inverse_and_log_det(x, context)
    assert z.requires_grad
    assert log_det.requires_grad
    with torch.no_grad():
        for a, b in zip(transform.inverse_and_log_det(x, context), (z, log_det), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance(1e-12))


# --- the spline -----------------------------------------------------------------------------------------------------


def spline_and_parameters(shape, dtype, scale=1.0, **options):
    spline = RationalQuadraticSpline(**options)
    return spline, scale * torch.randn(*shape, spline.num_parameters, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_parameters_are_the_identity_with_a_gradient(dtype):
    spline = RationalQuadraticSpline()
    z = torch.linspace(-7, 7, 1001, dtype=dtype)
    parameters = torch.zeros(spline.num_parameters, dtype=dtype, requires_grad=True)
    for function in (spline.forward, spline.inverse):
        value, log_derivative = function(z, parameters)
        torch.testing.assert_close(value, z, rtol=0, atol=4 * torch.finfo(dtype).eps * 5)
        torch.testing.assert_close(log_derivative, torch.zeros_like(z), rtol=0, atol=torch.finfo(dtype).eps)
        (gradient,) = torch.autograd.grad(value.square().sum() + value.sin().sum(), parameters)
        assert (gradient != 0).all()


def test_the_spline_goes_through_its_knots_with_its_derivatives(dtype, tolerance):
    spline, parameters = spline_and_parameters((), dtype, num_bins=6, tail_bound=2.0)
    z = torch.linspace(-2, 2, 6 + 1, dtype=dtype)
    widths = 1e-3 + (1 - 6e-3) * parameters[:6].softmax(-1)
    heights = 1e-3 + (1 - 6e-3) * parameters[6:12].softmax(-1)
    z = -2 + 4 * torch.cat([torch.zeros(1, dtype=dtype), widths.cumsum(-1)])[1:-1]
    expected = -2 + 4 * torch.cat([torch.zeros(1, dtype=dtype), heights.cumsum(-1)])[1:-1]
    for shift in (-1e-9, 0.0, 1e-9):
        x, log_derivative = spline.forward(z + shift, parameters)
        torch.testing.assert_close(x, expected, rtol=0, atol=tolerance(1e-7))
        one = torch.nn.functional.softplus(torch.tensor(torch.e - 1, dtype=dtype).log())
        slopes = torch.nn.functional.softplus(parameters[12:] + torch.tensor(torch.e - 1, dtype=dtype).log()) / one
        torch.testing.assert_close(log_derivative, (1e-3 + 0.999 * slopes).log(), rtol=0, atol=tolerance(1e-5))


def test_the_spline_is_the_identity_from_its_boundary_on(dtype, tolerance):
    spline, parameters = spline_and_parameters((), dtype, scale=3.0, tail_bound=2.0)
    z = torch.tensor([-1e6, -2.5, -2.0, 2.0, 2.5, 1e6], dtype=dtype)
    for function in (spline.forward, spline.inverse):
        value, log_derivative = function(z, parameters)
        torch.testing.assert_close(value, z, rtol=0, atol=0)
        assert (log_derivative == 0).all()
    # Value and derivative are continuous there.
    just_inside = torch.tensor([-2.0, 2.0], dtype=dtype) * (1 - 2e-7)
    x, log_derivative = spline.forward(just_inside, parameters)
    torch.testing.assert_close(x, just_inside, rtol=0, atol=1e-5)
    torch.testing.assert_close(log_derivative, torch.zeros_like(x), rtol=0, atol=max(tolerance(1e-2), 1e-2))


def test_outside_points_give_no_gradient_and_no_nan(dtype):
    spline, parameters = spline_and_parameters((4,), dtype, tail_bound=2.0)
    for function in (spline.forward, spline.inverse):
        z = torch.tensor([-1e30, -3.0, 2.0, 1e30], dtype=dtype, requires_grad=True)
        leaf = parameters.clone().requires_grad_()
        value, log_derivative = function(z, leaf)
        (value.sum() + log_derivative.sum()).backward()
        torch.testing.assert_close(z.grad, torch.ones_like(z))
        assert (leaf.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("num_bins", [2, 8, 20])
def test_round_trip_of_many_points(dtype, num_bins):
    spline, parameters = spline_and_parameters((10_000,), dtype, num_bins=num_bins, tail_bound=3.0)
    z = 3 * (2 * torch.rand(10_000, dtype=dtype) - 1)
    x, log_derivative = spline.forward(z, parameters)
    z_back, inverse_log_derivative = spline.inverse(x, parameters)
    x_back, log_derivative_back = spline.forward(z_back, parameters)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(x_back, x, rtol=0, atol=40 * eps)
    torch.testing.assert_close(inverse_log_derivative, -log_derivative_back, rtol=0, atol=2000 * eps)
    # What a rounded x says about z is worse by the derivative.
    assert ((z_back - z).abs() <= 100 * eps * (1 + (-log_derivative).exp())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [10.0, 50.0, 1e4])
def test_parameters_at_their_limits(dtype, size):
    """Pieces a thousand times steeper or flatter than their neighbours: still increasing, finite and inverted."""
    spline = RationalQuadraticSpline(tail_bound=3.0)
    signs = torch.randint(0, 3, (500, 1, spline.num_parameters)).to(dtype) - 1
    z = torch.linspace(-3.5, 3.5, 401, dtype=dtype, requires_grad=True)
    leaf = (size * signs).requires_grad_()
    x, log_derivative = spline.forward(z.expand(500, -1), leaf)
    eps = torch.finfo(dtype).eps
    assert (x.diff(dim=-1) >= -20 * eps).all()
    z_back, inverse_log_derivative = spline.inverse(x.detach(), leaf)
    x_back, _ = spline.forward(z_back, leaf)
    # A rounding of z is worth its size times the derivative; the discriminant rounds at the size of the derivatives.
    rounding = eps * (1 + (-inverse_log_derivative).exp())
    assert ((x_back - x).abs() <= max(200, size) * rounding).all(), ((x_back - x).abs() / rounding).max()
    (x.sum() + log_derivative.sum() + z_back.sum() + inverse_log_derivative.sum()).backward()
    for value in (x, log_derivative, z_back, inverse_log_derivative, z.grad, leaf.grad):
        assert value.isfinite().all()


def test_the_log_derivative_keeps_its_digits_in_float32():
    """Against float64 on the same pieces: slopes from 1e-2 to 1e2 beside derivatives from 1e-3 on."""
    spline = RationalQuadraticSpline(tail_bound=3.0)
    parameters = 6 * torch.randn(20_000, spline.num_parameters)
    z = 3 * (2 * torch.rand(20_000) - 1)
    piece = spline._piece(z, parameters, axis=0)
    x, log_derivative = univariate._evaluate_piece(piece, z)
    expected_x, expected_log_derivative = univariate._evaluate_piece(piece.double(), z.double())
    torch.testing.assert_close(x.double(), expected_x, rtol=0, atol=1e-5)
    torch.testing.assert_close(log_derivative.double(), expected_log_derivative, rtol=0, atol=1e-5)


def test_a_vanishing_discriminant_is_not_negative_in_float32():
    """Flat ends beside a steep middle: the quadratic has nearly a double root."""
    spline = RationalQuadraticSpline(num_bins=3, tail_bound=3.0)
    parameters = torch.tensor([0.0, -20.0, 0.0, 0.0, 20.0, 0.0, -50.0, -50.0]).requires_grad_()
    x = torch.linspace(-3, 3, 100_001)
    z, log_derivative = spline.inverse(x, parameters)
    assert (z.diff() >= -1e-6).all()
    (z.sum() + log_derivative.sum()).backward()
    assert parameters.grad.isfinite().all()


def test_spline_gradients_in_both_directions(dtype):
    if dtype == torch.float32:
        pytest.skip("finite differences need float64")
    spline, parameters = spline_and_parameters((20,), dtype, tail_bound=3.0)
    z = (2 * torch.randn(20, dtype=dtype)).requires_grad_()
    parameters.requires_grad_()
    for function in (spline.forward, spline.inverse):
        assert torch.autograd.gradcheck(function, (z, parameters), atol=1e-6, rtol=1e-4)


# --- the recipes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_recipes_start_as_the_identity(name, num_layers, context_dim):
    flow = getattr(flows, name)(3, num_layers=num_layers, context_dim=context_dim)
    z = torch.randn(10, 3)
    context = torch.randn(10, context_dim) if context_dim else None
    x, log_det = flow.forward_and_log_det(z, context)
    torch.testing.assert_close(x, z, rtol=0, atol=2e-6)
    torch.testing.assert_close(log_det, torch.zeros(10), rtol=0, atol=2e-6)
    assert sum(type(part).__name__ not in ("Reverse",) for part in flow.transforms) == num_layers


@pytest.mark.parametrize("name", RECIPES)
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


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: T.AffineAutoregressive(0), ValueError, "AffineAutoregressive: dim must be at least 1, got 0"),
        (
            lambda: T.AffineAutoregressive(3, hidden_dims=()),
            ValueError,
            "MaskedMLP: needs hidden_dims with at least one",
        ),
        (lambda: T.AffineAutoregressive(3, hidden_dims=(4, 0)), ValueError, "all sizes at least 1"),
        (lambda: T.AffineAutoregressive(3, log_scale_bound=-1.0), ValueError, "log_scale_bound must be positive"),
        (lambda: T.SplineAutoregressive(3, num_bins=1), ValueError, "num_bins must be an integer of at least 2, got 1"),
        (lambda: T.SplineCoupling(3, tail_bound=0.0), ValueError, "tail_bound must be positive and finite, got 0.0"),
        (lambda: T.ElementwiseSpline(3, num_bins=2.5), ValueError, "num_bins must be an integer"),
        (
            lambda: RationalQuadraticSpline(10, min_width=0.2),
            ValueError,
            "min_width must be between 0 and 0.1, got 0.2",
        ),
        (lambda: RationalQuadraticSpline(min_height=0.0), ValueError, "min_height must be between 0 and 0.125"),
        (lambda: RationalQuadraticSpline(min_derivative=1.0), ValueError, "min_derivative must be between 0 and 1"),
        (lambda: flows.iaf(3, num_layers=0), ValueError, "iaf: num_layers must be at least 1"),
        (lambda: flows.spline_coupling(3, num_layers=0), ValueError, "spline_coupling: num_layers must be at least 1"),
    ],
)
def test_errors_say_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_bias_may_have_batch_dimensions_of_its_own():
    """Points and contexts of different batch shapes: the part of the context is computed once per context."""
    network = perturb(MaskedMLP(3, 2, (5,), context_dim=2))
    z, context = torch.randn(6, 1, 3), torch.randn(4, 2)
    bound = network.at(context)
    assert bound.biases[0].shape == (4, 5)
    found = bound(z)
    assert found.shape == (6, 4, 3, 2)
    first = linear(z.expand(6, 4, 3), bound.weights[0]) + bound.biases[0]
    last = linear(torch.nn.functional.silu(first), bound.weights[1]) + bound.biases[1]
    torch.testing.assert_close(found, last.reshape(6, 4, 2, 3).mT)
