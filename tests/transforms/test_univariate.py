"""The scalar functions: the rational-quadratic spline at its knots, its limits and far out."""

import pytest
import torch

from pyro_flowguides.transforms import univariate
from pyro_flowguides.transforms.univariate import MixtureOfLogistics, RationalQuadraticSpline, ShiftScale


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


def test_zero_parameters_are_the_identity_of_a_univariate_function():
    z = torch.randn(5)
    x, log_derivative = ShiftScale().forward(z, torch.zeros(5, 2))
    torch.testing.assert_close(x, z)
    torch.testing.assert_close(log_derivative, torch.zeros(5))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ShiftScale(0.0), ValueError, "log_scale_bound must be positive or None, got 0.0"),
        (lambda: RationalQuadraticSpline(1), ValueError, "num_bins must be an integer of at least 2, got 1"),
        (lambda: RationalQuadraticSpline(2.5), ValueError, "num_bins must be an integer"),
        (
            lambda: RationalQuadraticSpline(tail_bound=0.0),
            ValueError,
            "tail_bound must be positive and finite, got 0.0",
        ),
        (
            lambda: RationalQuadraticSpline(10, min_width=0.2),
            ValueError,
            "min_width must be between 0 and 0.1, got 0.2",
        ),
        (lambda: RationalQuadraticSpline(min_height=0.0), ValueError, "min_height must be between 0 and 0.125"),
        (lambda: RationalQuadraticSpline(min_derivative=1.0), ValueError, "min_derivative must be between 0 and 1"),
    ],
)
def test_errors_say_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- the mixture of logistics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_components", [2, 8])
def test_the_mixture_is_the_formula_of_flow_plus_plus(num_components):
    """Logit, mixture and affine function as written in the paper, after the map whose inverse is the start's mixture."""
    count = num_components
    mixture = MixtureOfLogistics(count, log_scale_bound=2.0)
    parameters = torch.randn(50, mixture.num_parameters, dtype=torch.float64)
    u = torch.randn(50, dtype=torch.float64)
    z = torch.logit((torch.sigmoid(u - 1.5) + torch.sigmoid(u + 1.5)) / 2)
    logits, means, log_scales, outer = parameters.split([count, count, count, 2], -1)
    pace = torch.linspace(0.5, 1.5, count, dtype=torch.float64)
    means = torch.tensor([-1.5, 1.5], dtype=torch.float64).repeat(count // 2) + 4 * torch.tanh(pace * means / 4)
    scales = (2 * torch.tanh(pace.flip(0) * log_scales / 2)).exp()
    mixed = (logits.softmax(-1) * torch.sigmoid((u.unsqueeze(-1) - means) / scales)).sum(-1)
    expected = torch.logit(mixed) * (2 * torch.tanh(outer[:, 1] / 2)).exp() + outer[:, 0]
    x, log_derivative = mixture.forward(z, parameters)
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)
    derivative = torch.func.vmap(torch.func.grad(lambda z, p: mixture.forward(z, p)[0]))(z, parameters)
    torch.testing.assert_close(log_derivative, derivative.log(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_mixture_starts_as_the_identity_and_its_components_part(dtype):
    mixture = MixtureOfLogistics(6)
    z = torch.cat([torch.linspace(-7, 7, 1001, dtype=dtype), torch.tensor([-1e5, 1e5], dtype=dtype)])
    for function in (mixture.forward, mixture.inverse):
        parameters = torch.zeros(mixture.num_parameters, dtype=dtype, requires_grad=True)
        value, log_derivative = function(z, parameters)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(value, z, rtol=4 * eps, atol=40 * eps)
        torch.testing.assert_close(log_derivative, torch.zeros_like(z), rtol=0, atol=20 * eps)
        (gradient,) = torch.autograd.grad(value[:-2].square().sum() + value[:-2].sin().sum(), parameters)
        assert (gradient != 0).all()
        # No two means, and no two log-scales, move alike.
        assert len(gradient[6:12].round(decimals=3).unique()) == len(gradient[12:18].round(decimals=3).unique()) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_mixtures_round_trip_far_out_and_between_components_far_apart(dtype, scale):
    mixture = MixtureOfLogistics()
    parameters = scale * torch.randn(2000, mixture.num_parameters, dtype=dtype)
    for spread in (3.0, 1e3, 1e6):
        z = spread * torch.randn(2000, dtype=dtype)
        x, log_derivative = mixture.forward(z, parameters)
        z_back, inverse_log_derivative = mixture.inverse(x, parameters)
        x_back, log_derivative_back = mixture.forward(z_back, parameters)
        assert x.isfinite().all() and log_derivative.isfinite().all() and z_back.isfinite().all()
        eps = torch.finfo(dtype).eps
        # The slope at z lifts the rounding of u, which is read against the means and scales of its components.
        size = x.abs() + (log_derivative_back.exp() + 1) * (z_back.abs() + 10 * scale) + scale
        assert ((x_back - x).abs() <= 100 * eps * size).all()
        torch.testing.assert_close(inverse_log_derivative, -log_derivative_back, rtol=1e-2, atol=1e-2)


def test_the_tails_of_a_mixture_are_straight(dtype):
    """In the right tail the widest component decides, with weight w: logit F = (u − μ)/s − log w."""
    mixture = MixtureOfLogistics(2)
    parameters = torch.tensor([0.3, -0.4, 0.5, 0.2, 0.9, -0.7, 0.0, 0.0], dtype=dtype)
    z = torch.tensor([200.0, 400.0], dtype=dtype)
    x, log_derivative = mixture.forward(z, parameters)
    log_scale = 2 * torch.tanh(parameters[4] * 1.5 / 2)
    weight = parameters[:2].softmax(0)[0]
    u = z + torch.tensor(1.5, dtype=dtype).cosh().log()
    expected = (u - (4 * torch.tanh(0.5 * parameters[2] / 4) - 1.5)) / log_scale.exp() - weight.log()
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_derivative, -log_scale.expand(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_components": 3}, "num_components must be an even number of at least 2, got 3"),
        ({"num_components": True}, "num_components must be an even number of at least 2, got True"),
        ({"log_scale_bound": 0.0}, "log_scale_bound must be positive and finite, got 0.0"),
    ],
)
def test_a_mixture_that_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfLogistics(**options)
