"""Radial flows where they are delicate: limits of the parameters, the centre, far points."""

import pytest
import torch
from transform_cases import check_far_points_come_back, check_finite_with_gradients, perturb

from pyro_flowguides import transforms as T

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def set_radial(radial, centre, raw_alpha, raw_m):
    with torch.no_grad():
        value = radial.parameters_of.value
        value.copy_(torch.cat([centre, torch.tensor([raw_alpha, raw_m])]).to(value.dtype))


@both_dtypes
@pytest.mark.parametrize("dim", [1, 2, 64])
@pytest.mark.parametrize("raw_alpha", [-200.0, -8.0, 0.0, 200.0])
@pytest.mark.parametrize("raw_m", [-200.0, -20.0, -8.0, 0.0, 20.0, 200.0])
def test_radial_at_the_limits_of_its_parameters(dim, raw_alpha, raw_m, dtype):
    """For β near −α the naive log-determinant is −inf; for α near 0 so is its gradient at the centre."""
    radial = T.Radial(dim).to(dtype)
    centre = torch.randn(dim).to(dtype)
    set_radial(radial, centre, raw_alpha, raw_m)
    direction = torch.nn.functional.normalize(torch.randn(dim, dtype=dtype), dim=0)
    z = centre + torch.linspace(-10, 10, 41, dtype=dtype).unsqueeze(-1) * direction
    x, z_back = check_finite_with_gradients(radial, z)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(radial(z_back), x, rtol=tolerance, atol=tolerance)


@both_dtypes
@pytest.mark.parametrize("dim", [1, 3])
def test_radial_at_its_centre(dim, dtype):
    """There the map is a scaling by 1 + m; the distance has no derivative, and must not give NaN for one."""
    radial = perturb(T.Radial(dim)).to(dtype)
    centre = radial.parameters_of.value[:dim].detach().clone()
    x, z_back = check_finite_with_gradients(radial, centre.expand(2, dim))
    torch.testing.assert_close(x, centre.expand(2, dim))
    torch.testing.assert_close(z_back, x)
    jacobian = torch.func.jacrev(radial)(centre)
    torch.testing.assert_close(jacobian, jacobian[0, 0] * torch.eye(dim, dtype=dtype))
    log_det = radial.forward_and_log_det(centre)[1]
    torch.testing.assert_close(log_det, dim * jacobian[0, 0].log(), rtol=1e-5, atol=1e-5)


def test_radial_log_det_in_float32_is_that_of_float64():
    radial = T.Radial(5)
    z = torch.randn(200, 5) * torch.logspace(-4, 4, 200).unsqueeze(-1)
    for raw_m in (-8.0, -1.0, 1e-3, 5.0):
        # An α that both dtypes hold exactly leaves the error of the formula alone.
        set_radial(radial, torch.zeros(5), 0.0, raw_m)
        _, found = radial.float().forward_and_log_det(z)
        _, expected = radial.double().forward_and_log_det(z.double())
        torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=1e-9)


def test_radial_start_keeps_a_gradient_to_each_kind_of_parameter():
    radial = T.Radial(3)
    x, log_det = radial.forward_and_log_det(torch.randn(20, 3))
    (x.square().sum() + log_det.sum()).backward()
    assert (radial.parameters_of.value.grad != 0).all()


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_far_points_come_back(scale):
    check_far_points_come_back(perturb(T.Radial(64)), scale)


@pytest.mark.parametrize("raw_alpha", [0.0, 1.0])
def test_the_width_of_radial_is_in_units_of_the_norm_of_the_base(raw_alpha):
    """α starts at √D, where the norm of a draw is."""
    narrow, wide = T.Radial(1), T.Radial(9)
    for radial in (narrow, wide):
        set_radial(radial, torch.zeros(radial.dim), raw_alpha, 0.0)
    ours, theirs = (float(radial._radial_parameters(None)[1].detach()) for radial in (wide, narrow))
    assert ours == pytest.approx(3 * theirs)
    assert theirs == pytest.approx(1) if raw_alpha == 0 else theirs > 1.5
