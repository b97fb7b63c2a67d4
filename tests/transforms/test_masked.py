"""The masked network: what each coordinate depends on, and the products that are written by hand."""

import pytest
import torch
from torch.nn.functional import linear
from transform_cases import perturb

from pyro_flowguides import transforms as T
from pyro_flowguides.transforms.masked import MaskedMLP


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


@pytest.mark.parametrize(
    ("width", "context_dim", "units"), [(1, 2, (0, 0)), (2, 2, (0, 1)), (2, 0, (0, 0)), (9, 2, (0, 3))]
)
def test_some_units_see_the_context_alone(width, context_dim, units):
    """Through them the first coordinate depends on the context by more than a linear map, from two units on."""
    network = MaskedMLP(3, 2, (width,), context_dim=context_dim)
    assert network.units_of_degree[0][0] == units
