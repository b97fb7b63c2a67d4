"""Sylvester flows where they are delicate: limits of the diagonals, the sign of Q, wide flows."""

import pytest
import torch
from transform_cases import check_far_points_come_back, check_finite_with_gradients, perturb

from pyro_flowguides import transforms as T

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.mark.parametrize(("basis", "num_vectors"), [("qr", 3), ("householder", 4), ("triangular", 4)])
def test_sylvester_start_keeps_a_gradient_to_each_parameter(basis, num_vectors):
    sylvester = T.Sylvester(4, num_vectors, basis=basis)
    x, log_det = sylvester.forward_and_log_det(torch.randn(20, 4))
    (x.square().sum() + x.sin().sum() + log_det.sum()).backward()
    assert (sylvester.parameters_of.value.grad != 0).all()


@pytest.mark.parametrize("num_vectors", [1, 2, 5])
@pytest.mark.parametrize("basis", ["qr", "householder"])
def test_columns_of_q_are_orthonormal(basis, num_vectors):
    sylvester = perturb(T.Sylvester(5, num_vectors, basis=basis)).double()
    q = sylvester._ridge_parameters(None).q
    assert q.shape == (5, num_vectors)
    torch.testing.assert_close(q.mT @ q, torch.eye(num_vectors, dtype=torch.float64))


@pytest.mark.parametrize("leading", [0.0, -0.0])
def test_q_is_continuous_where_the_leading_entry_crosses_zero(leading):
    sylvester = perturb(T.Sylvester(4, 2)).double()
    z, draws = torch.randn(6, 4, dtype=torch.float64), []
    for entry in (-1e-9, leading, 1e-9):
        with torch.no_grad():
            sylvester.parameters_of.value[0] = entry
        draws.append(sylvester(z))
    torch.testing.assert_close(draws[0], draws[2], rtol=0, atol=1e-7)
    torch.testing.assert_close(draws[1], draws[2], rtol=0, atol=1e-7)


@both_dtypes
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, -1)], ids=str)
@pytest.mark.parametrize("size", [5.0, 9.5, 200.0])
@pytest.mark.parametrize("basis", ["qr", "householder", "triangular"])
def test_sylvester_at_the_limits_of_its_diagonals(basis, size, signs, dtype):
    """tanh is 1 in float32 from 9.5 on: without a margin log_det is −inf at u = 0, where r·r̃ = −1."""
    sylvester = perturb(T.Sylvester(3, basis=basis)).to(dtype)
    start, above = sylvester._sizes[0], sylvester._sizes[2]
    with torch.no_grad():
        sylvester.parameters_of.value[start : start + 3] = signs[0] * size
        sylvester.parameters_of.value[start + 3 + above : start + 6 + above] = signs[1] * size
        sylvester.parameters_of.value[-3:] = 0.0
    z = torch.linspace(-10, 10, 41, dtype=dtype).unsqueeze(-1) * torch.randn(3, dtype=dtype)
    x, z_back = check_finite_with_gradients(sylvester, z)
    tolerance = 2e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(sylvester(z_back), x, rtol=tolerance, atol=tolerance)


def test_a_householder_vector_of_zero_reflects_nothing():
    sylvester = T.Sylvester(3, basis="householder", num_reflections=1)
    with torch.no_grad():
        sylvester.parameters_of.value[:3] = 0.0
    torch.testing.assert_close(sylvester._ridge_parameters(None).q, torch.eye(3))
    check_finite_with_gradients(sylvester, torch.randn(4, 3))


@pytest.mark.parametrize("scale", [1e2, 1e4])
@pytest.mark.parametrize("basis", ["qr", "triangular"])
def test_far_points_come_back(basis, scale):
    check_far_points_come_back(perturb(T.Sylvester(64, basis=basis)), scale)


@pytest.mark.parametrize("basis", ["qr", "householder", "triangular"])
def test_sylvester_inverse_in_the_middle_of_a_wide_flow(basis):
    sylvester = perturb(T.Sylvester(40, basis=basis)).double()
    z = torch.randn(30, 40, dtype=torch.float64)
    x, log_det = sylvester.forward_and_log_det(z)
    z_back, inverse_log_det = sylvester.inverse_and_log_det(x)
    torch.testing.assert_close(z_back, z, rtol=0, atol=1e-9)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: T.Sylvester(3, basis="svd"),
            ValueError,
            'basis must be "qr", "householder" or "triangular", got \'svd\'',
        ),
        (lambda: T.Sylvester(3, 4), ValueError, "num_vectors must be at most dim = 3, got 4"),
        (lambda: T.Sylvester(3, 0), ValueError, "num_vectors must be at least 1"),
        (lambda: T.Sylvester(3, 2, basis="triangular"), ValueError, "has num_vectors = dim = 3, got 2"),
        (lambda: T.Sylvester(3, num_reflections=2), ValueError, "num_reflections is an option of .*householder"),
        (
            lambda: T.Sylvester(3, basis="householder", num_reflections=0),
            ValueError,
            "num_reflections must be at least 1",
        ),
        (lambda: T.Sylvester(3, reverse=True), ValueError, "reverse is an option of .*triangular"),
    ],
)
def test_errors_say_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_entries_above_the_diagonal_are_in_units_of_the_root_of_their_number():
    matrix = T.Sylvester(4, 4)._upper_triangular(torch.zeros(4), torch.ones(6))
    torch.testing.assert_close(matrix, torch.ones(4, 4).triu(1) / 2)


def test_the_ridges_of_sylvester_start_at_the_centre_of_the_base():
    assert not T.Sylvester(4, 2)._ridge_parameters(None).shift.any()
