"""Linear transforms, beyond the contract that every transform keeps: orthogonality, initialisation, the unit cube."""

import pytest
import torch
from transform_cases import perturb

from pyro_flowguides import transforms as T

ORTHOGONAL = {
    "orthogonal": lambda dim, **kwargs: T.Orthogonal(dim, **kwargs),
    "householder": lambda dim, **kwargs: T.Householder(dim, num_reflections=4, **kwargs),
    "householder_odd": lambda dim, **kwargs: T.Householder(dim, num_reflections=5, **kwargs),
}
every_orthogonal = pytest.mark.parametrize("make", ORTHOGONAL.values(), ids=ORTHOGONAL)


@every_orthogonal
@pytest.mark.parametrize("dim", [1, 2, 7, 64])
def test_orthogonal_maps_are_orthogonal(make, dim, dtype, tolerance):
    transform = perturb(make(dim).to(dtype))
    identity = torch.eye(dim, dtype=dtype)
    rows, log_det = transform.forward_and_log_det(identity)
    torch.testing.assert_close(rows.mT @ rows, identity, rtol=0, atol=tolerance(1e-12))
    assert (log_det == 0).all()


@pytest.mark.parametrize("name", ["orthogonal", "householder"])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_orthogonal_maps_start_as_the_identity_with_gradients(name, context_dim):
    transform = ORTHOGONAL[name](3, context_dim=context_dim)
    z, context = torch.randn(20, 3), torch.randn(20, 2) if context_dim else None
    x, _ = transform.forward_and_log_det(z, context)
    torch.testing.assert_close(x, z, rtol=0, atol=1e-6)
    # A rotation keeps |x|: the loss has to tell directions apart.
    (x * torch.tensor([1.0, 2.0, 3.0])).square().sum().backward()
    for parameter_name, parameter in transform.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


def test_cayley_reaches_almost_half_turns_and_stays_orthogonal():
    transform = T.Orthogonal(2).double()
    with torch.no_grad():
        transform.parameters_of.value.fill_(1e8)
    x = transform(torch.eye(2).double())
    torch.testing.assert_close(x, -torch.eye(2).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(x.mT @ x, torch.eye(2).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e30])
def test_householder_is_an_exact_reflection_whatever_the_size_of_its_vector(size):
    transform = T.Householder(3, num_reflections=1)
    with torch.no_grad():
        transform.parameters_of.value.mul_(size)
    x = transform(torch.eye(3))
    torch.testing.assert_close(x @ x, torch.eye(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.linalg.det(x), torch.tensor(-1.0))
    x.sin().sum().backward()
    assert not transform.parameters_of.value.grad.isnan().any()


def test_the_scale_of_a_triangular_map_multiplies_all_of_it(dtype, tolerance):
    """Its location and correlations are in units of its scale, so that a step of one size is as good for any scale."""
    transform = perturb(T.LowerTriangularAffine(4).to(dtype))
    z = torch.randn(5, 4, dtype=dtype)
    scale = torch.tensor([0.01, 1.0, 7.0, 100.0], dtype=dtype)
    expected = scale * transform(z)
    with torch.no_grad():
        transform.parameters_of.value[4:8] += scale.log()
    torch.testing.assert_close(transform(z), expected, rtol=tolerance(1e-12), atol=0)


def test_lu_maps_many_points_as_it_maps_each(dtype, tolerance):
    transform = perturb(T.LULinear(4).to(dtype))
    z = torch.randn(50, 4, dtype=dtype)
    x, _ = transform.forward_and_log_det(z)
    one_by_one = torch.stack([transform.forward_and_log_det(point)[0] for point in z])
    torch.testing.assert_close(x, one_by_one, rtol=0, atol=tolerance(1e-12))


def test_lu_reaches_a_given_matrix(dtype, tolerance):
    lower = torch.randn(4, 4, dtype=dtype).tril(-1) + torch.eye(4, dtype=dtype)
    scales = torch.rand(4, dtype=dtype) + 0.5
    unit_upper = torch.randn(4, 4, dtype=dtype).triu(1) + torch.eye(4, dtype=dtype)
    matrix = lower @ (scales.unsqueeze(-1) * unit_upper)
    transform = T.LULinear(4).to(dtype)
    # Off the diagonal in units of 1/√D.
    entries = 2 * (lower.tril(-1) + unit_upper.triu(1)) + scales.log().diag()
    with torch.no_grad():
        transform.parameters_of.value[4:] = entries.reshape(-1)
    z = torch.randn(5, 4, dtype=dtype)
    x, log_det = transform.forward_and_log_det(z)
    torch.testing.assert_close(x, z @ matrix.mT, rtol=0, atol=tolerance(1e-12))
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(matrix).logabsdet, rtol=0, atol=tolerance(1e-12))


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("batch_shape", [(500,), (20, 25)], ids=str)
def test_act_norm_standardises_the_draws_it_was_given(context_dim, batch_shape, dtype, tolerance):
    transform = T.ActNorm(3, context_dim=context_dim).to(dtype)
    z = 5 + torch.tensor([0.1, 1.0, 30.0], dtype=dtype) * torch.randn(*batch_shape, 3, dtype=dtype)
    transform.initialize(z)
    context = torch.zeros(context_dim, dtype=dtype) if context_dim else None
    x, log_det = transform.forward_and_log_det(z, context)
    x = x.reshape(-1, 3)
    torch.testing.assert_close(x.mean(0), torch.zeros(3, dtype=dtype), rtol=0, atol=tolerance(1e-6))
    torch.testing.assert_close(x.std(0), torch.ones(3, dtype=dtype), rtol=0, atol=tolerance(1e-6))
    expected = -z.reshape(-1, 3).std(0).log().sum().expand(batch_shape)
    torch.testing.assert_close(log_det, expected, rtol=0, atol=tolerance(1e-6))
    assert transform.parameters_of.value.requires_grad


def test_act_norm_does_not_initialise_itself():
    transform = T.ActNorm(2)
    z = 5 + 3 * torch.randn(100, 2)
    torch.testing.assert_close(transform(z), z)
    torch.testing.assert_close(transform(z), z)


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        (torch.zeros(1, 2), "needs at least 2 draws, got 1"),
        (torch.zeros(2), "needs at least 2 draws, got 1"),
        (torch.zeros(0, 2), "needs at least 2 draws, got 0"),
        (torch.tensor([[0.0, 1.0], [1.0, 1.0]]), r"do not vary in the coordinates \[1\]"),
        (torch.tensor([[0.0, 1.0], [1.0, torch.nan]]), r"do not vary in the coordinates \[1\]"),
        (torch.zeros(5, 3), r"draws of shape \(…, 2\), got \(5, 3\)"),
    ],
)
def test_act_norm_says_which_draws_it_cannot_use(draws, message):
    transform = T.ActNorm(2)
    with pytest.raises(ValueError, match=message):
        transform.initialize(draws)
    assert (transform.parameters_of.value == 0).all()


@pytest.mark.parametrize("num_reflections", [1, 4, 9])
def test_householder_reflects_along_each_vector_in_turn(num_reflections, dtype, tolerance):
    transform = perturb(T.Householder(4, num_reflections=num_reflections).to(dtype))
    z = torch.randn(6, 4, dtype=dtype)
    x = z
    for vector in transform.parameters_of.value.reshape(-1, 4):
        x = x - 2 * (x @ vector).unsqueeze(-1) * vector / (vector @ vector)
    torch.testing.assert_close(transform.forward_and_log_det(z)[0], x, rtol=0, atol=tolerance(1e-12))


def test_householder_needs_a_reflection():
    with pytest.raises(ValueError, match="Householder: num_reflections must be at least 1, got 0"):
        T.Householder(2, num_reflections=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sigmoid_in_the_tails(dtype):
    z = torch.tensor([-1e4, -200.0, -40.0, 0.0, 40.0, 200.0, 1e4], dtype=dtype).unsqueeze(-1)
    transform = T.Sigmoid(1)
    x, log_det = transform.forward_and_log_det(z)
    assert transform.codomain.check(x).all()
    assert ((x > 0) & (x < 1)).all()
    expected = -z.squeeze(-1).abs()
    expected[3] = -2 * torch.tensor(2.0, dtype=dtype).log()
    torch.testing.assert_close(log_det, expected)
    for boundary in (0.0, 1.0, -1.0, 2.0):
        for value in transform.inverse_and_log_det(torch.full((1,), boundary, dtype=dtype)):
            assert value.isfinite().all()


def test_the_codomain_of_a_stack_is_that_of_its_last_part():
    stack = T.Compose([T.Affine(2, context_dim=1), T.Sigmoid(2)])
    for transform in (stack, stack.condition(torch.zeros(1))):
        assert transform.codomain is T.Sigmoid.codomain
        assert transform.inv.domain is T.Sigmoid.codomain
        assert transform.domain is T.Affine.domain
