"""Radial and Sylvester flows where they are delicate: limits of the parameters, the centre, the sign of Q."""

import pytest
import torch
from transform_cases import perturb

from pyro_flowguides import flows
from pyro_flowguides import transforms as T

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def set_radial(radial, centre, raw_alpha, raw_m):
    with torch.no_grad():
        value = radial.parameters_of.value
        value.copy_(torch.cat([centre, torch.tensor([raw_alpha, raw_m])]).to(value.dtype))


def check_finite_with_gradients(transform, z):
    """Forward, inverse and score have finite values, and finite gradients to the points and the parameters."""
    z = z.clone().requires_grad_()
    x, log_det, score = transform.forward_with_score(z, -z.detach())
    z_back, inverse_log_det = transform.inverse_and_log_det(x.detach().requires_grad_())
    for value in (x, log_det, score, z_back, inverse_log_det):
        assert value.isfinite().all()
    (x.sum() + log_det.sum() + z_back.sum() + inverse_log_det.sum()).backward()
    assert z.grad.isfinite().all()
    for parameter in transform.parameters():
        assert parameter.grad.isfinite().all()
    return x.detach(), z_back.detach()


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
@pytest.mark.parametrize(
    "make", [lambda: T.Radial(64), lambda: T.Sylvester(64), lambda: T.Sylvester(64, basis="triangular")]
)
def test_far_points_come_back(make, scale):
    transform = perturb(make())
    z = scale * torch.randn(20, 64)
    x, z_back = check_finite_with_gradients(transform, z)
    torch.testing.assert_close(transform(z_back), x, rtol=2e-4, atol=1e-5 * scale)
    exact, _ = transform.double().inverse_and_log_det(transform(z.double()))
    torch.testing.assert_close(exact, z.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("basis", ["qr", "householder", "triangular"])
def test_sylvester_inverse_in_the_middle_of_a_wide_flow(basis):
    sylvester = perturb(T.Sylvester(40, basis=basis)).double()
    z = torch.randn(30, 40, dtype=torch.float64)
    x, log_det = sylvester.forward_and_log_det(z)
    z_back, inverse_log_det = sylvester.inverse_and_log_det(x)
    torch.testing.assert_close(z_back, z, rtol=0, atol=1e-9)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-9)


def test_layers_of_the_recipes():
    assert len(flows.radial(3, num_layers=5).transforms) == 5
    assert [layer.num_vectors for layer in flows.sylvester(3, num_layers=2).transforms] == [3, 3]
    assert [layer.num_vectors for layer in flows.sylvester(20, num_layers=2, num_vectors=4).transforms] == [4, 4]
    triangular = flows.sylvester(20, num_layers=3, basis="triangular")
    assert [layer.reverse for layer in triangular.transforms] == [False, True, False]
    assert "num_vectors=20, basis='triangular', reverse=True" in repr(triangular)


@pytest.mark.parametrize(
    "make",
    [
        lambda context_dim: flows.radial(3, context_dim=context_dim),
        lambda context_dim: flows.sylvester(3, context_dim=context_dim),
        lambda context_dim: flows.sylvester(3, basis="householder", context_dim=context_dim),
        lambda context_dim: flows.sylvester(3, basis="triangular", context_dim=context_dim),
    ],
)
@pytest.mark.parametrize("context_dim", [0, 2])
def test_recipes_start_as_the_identity_and_invert(make, context_dim):
    flow = make(context_dim)
    z, context = torch.randn(5, 3), torch.randn(5, context_dim) if context_dim else None
    x, log_det = flow.forward_and_log_det(z, context)
    torch.testing.assert_close(x, z, rtol=0, atol=5e-6)
    torch.testing.assert_close(log_det, torch.zeros(5), rtol=0, atol=5e-6)
    flow, z = perturb(flow).double(), z.double()
    context = None if context is None else context.double()
    x, log_det = flow.forward_and_log_det(z, context)
    z_back, inverse_log_det = flow.inverse_and_log_det(x, context)
    torch.testing.assert_close(z_back, z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-6, atol=1e-6)


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
        (lambda: flows.sylvester(3, num_vectors=0), ValueError, "sylvester: num_vectors must be at least 1"),
        (lambda: flows.radial(3, num_layers=0), ValueError, "radial: num_layers must be at least 1"),
        (lambda: T.Radial(0), ValueError, "Radial: dim must be at least 1, got 0"),
    ],
)
def test_errors_say_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()
