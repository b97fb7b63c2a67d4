"""Rotations and reflections: orthogonality, the start, vectors of any size."""

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
    # Reflections there and back round like the size of z.
    torch.testing.assert_close(x, z, rtol=1e-6, atol=1e-6)
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
