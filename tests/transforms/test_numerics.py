"""Functions without cancellation, derivatives and solvers that several families share."""

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_flowguides.transforms.numerics import (
    LOG_E_MINUS_1,
    implicit_root,
    linearize,
    log_one_plus,
    solve_increasing,
    solve_newton,
    sum_tensors,
    tanh_derivative,
)

F64 = torch.float64


def test_softplus_of_the_constant_is_one():
    assert torch.nn.functional.softplus(torch.tensor(LOG_E_MINUS_1, dtype=F64)).item() == pytest.approx(1, abs=1e-15)


def test_the_derivative_of_tanh_keeps_its_digits_in_float32():
    t = torch.linspace(-40, 40, 801)
    # sech² by its tails: 4·exp(−2|t|), where 1 − tanh² is exactly 0.
    expected = 1 / torch.cosh(t.double()).square()
    torch.testing.assert_close(tanh_derivative(t).double(), expected, rtol=2e-5, atol=0)


def test_the_logarithm_keeps_its_digits_near_zero_and_near_minus_one():
    for excess in (1e-12, -1e-12, 0.3, 5.0):
        found = log_one_plus(torch.tensor(excess), torch.tensor(1 + excess))
        assert float(found) == pytest.approx(math.log1p(excess), rel=1e-6)
    for total in (1e-12, 1e-3, 0.4):
        found = log_one_plus(torch.tensor(total - 1), torch.tensor(total))
        assert float(found) == pytest.approx(math.log(total), rel=1e-6)


def test_a_sum_of_tensors_broadcasts_and_keeps_the_dtype():
    total = sum_tensors([torch.ones(3, 1, dtype=torch.float16), torch.ones(2, dtype=torch.float16)])
    assert total.shape == (3, 2) and total.dtype == torch.float16
    assert (total == 2).all()


def test_linearize_gives_the_derivatives_of_both_results():
    matrix = torch.randn(3, 3, dtype=F64)

    def function(z):
        return (z @ matrix.mT).sin(), z.square().sum(-1)

    z = torch.randn(2, 4, 3, dtype=F64)
    x, log_det, jacobian, gradient = linearize(function, z)
    torch.testing.assert_close((x, log_det), function(z))
    torch.testing.assert_close(jacobian, (z @ matrix.mT).cos().unsqueeze(-1) * matrix)
    torch.testing.assert_close(gradient, 2 * z)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_a_root_of_an_increasing_function_is_found_to_the_last_digit(dtype):
    """A cubic, which is flat at 0, and an exponential, for which Newton's method alone overshoots."""
    target = torch.tensor([-20.0, -1e-3, 0.0, 1e-3, 20.0], dtype=dtype)
    eps = torch.finfo(dtype).eps
    for function, inverse in (
        (lambda a: (a**3 + a, 3 * a**2 + 1), None),
        (lambda a: (a.exp() - 1 / (a.exp()), a.exp() + 1 / a.exp()), lambda x: (x / 2).asinh()),
    ):
        root = solve_increasing(function, target, torch.full_like(target, -30.0), torch.full_like(target, 30.0))
        assert ((function(root)[0] - target).abs() <= 20 * eps * (1 + target.abs())).all()
        if inverse is not None:
            torch.testing.assert_close(root, inverse(target), rtol=20 * eps, atol=20 * eps)


def test_a_bracket_that_newtons_method_would_leave_is_halved_instead():
    def steep(a):
        return torch.atan(1e6 * a), 1e6 / (1 + (1e6 * a) ** 2)

    target = torch.tensor([-1.2, 0.7, 1.5], dtype=F64)
    root = solve_increasing(steep, target, torch.full_like(target, -1.0), torch.full_like(target, 1.0))
    torch.testing.assert_close(root, target.tan() / 1e6, rtol=1e-9, atol=0)


def test_the_gradient_of_a_root_is_that_of_the_implicit_function_theorem():
    scale = torch.tensor(1.5, dtype=F64, requires_grad=True)
    target = torch.tensor([-2.0, 0.5, 3.0], dtype=F64, requires_grad=True)

    def root_of(target, scale):
        def function(a):
            return scale * a + a.tanh(), scale + tanh_derivative(a)

        root = solve_increasing(function, target, torch.full_like(target, -10.0), torch.full_like(target, 10.0))
        return implicit_root(function, target, root)

    assert torch.autograd.gradcheck(root_of, (target, scale))


def test_newtons_method_solves_what_it_can_and_says_nan_elsewhere():
    def bounded(z):
        x = torch.tanh(z)
        return x, torch.diag_embed(1 - x**2)

    target = torch.tensor([[0.5, -0.99], [0.999, 0.0], [1.5, 0.0]], dtype=F64)
    z = solve_newton(bounded, target)
    torch.testing.assert_close(z[:2], target[:2].atanh(), rtol=1e-9, atol=1e-9)
    assert z[2].isnan().all()


def test_the_solvers_can_be_mapped_and_captured():
    def cubic(a):
        return a**3 + a, 3 * a**2 + 1

    def solve(target):
        return solve_increasing(cubic, target, torch.full_like(target, -5.0), torch.full_like(target, 5.0))

    target = torch.linspace(-3, 3, 7, dtype=F64)
    torch.testing.assert_close(torch.vmap(solve)(target), solve(target))
    torch.testing.assert_close(make_fx(solve)(torch.zeros_like(target))(target), solve(target))


@pytest.mark.parametrize("num_iterations", [1, 2, 3, 4, 7])
def test_the_best_iterate_is_returned(num_iterations):
    """Of a function so steep that iterates come and go."""
    visited = []

    def steep(a):
        visited.append(a)
        return torch.atan(50 * a) + 0.01 * a, 50 / (1 + (50 * a) ** 2) + 0.01

    target = torch.tensor([-1.5, -0.3, 0.0, 0.9, 1.58], dtype=torch.float64)
    root = solve_increasing(steep, target, torch.full_like(target, -3.0), torch.full_like(target, 4.0), num_iterations)
    roots = torch.stack(visited)
    residuals = (steep(roots)[0] - target).abs()
    assert torch.equal(root, roots.gather(0, residuals.argmin(0, keepdim=True))[0])


def test_the_derivatives_of_a_linearised_map_have_no_graph():
    z = torch.randn(3, 2, requires_grad=True)
    x, log_det, *derivatives = linearize(lambda z: (z.exp(), z.sum(-1)), z)
    assert x.requires_grad and log_det.requires_grad
    assert not any(derivative.requires_grad for derivative in derivatives)
