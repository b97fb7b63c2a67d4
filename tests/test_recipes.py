"""The recipes: stacks that start as the identity, reach every coordinate, and invert."""

import pytest
import torch
from transform_cases import perturb

from pyro_flowguides import flows

RECIPES = {"nice": flows.nice, "glow": flows.glow, "residual": flows.residual}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@every_recipe
@pytest.mark.parametrize("dim", [1, 3, 40])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_recipes_start_as_the_identity_with_gradients(recipe, dim, context_dim):
    flow = recipe(dim, num_layers=2, context_dim=context_dim)
    assert flow.context_dim == context_dim
    z, context = torch.randn(20, dim), torch.randn(20, context_dim) if context_dim else None
    x, log_det = flow.forward_and_log_det(z, context)
    torch.testing.assert_close(x, z, rtol=0, atol=1e-5)
    torch.testing.assert_close(log_det, torch.zeros(20), rtol=0, atol=1e-5)
    (x.square().sum() + x.sin().sum() + log_det.sum()).backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@every_recipe
def test_recipes_bend_every_coordinate_and_invert(recipe):
    flow = perturb(recipe(4, num_layers=2, hidden_dims=(8,)).double())
    z = torch.randn(20, 4, dtype=torch.float64)
    x, log_det = flow.forward_and_log_det(z)
    assert ((x - z).abs().amax(0) > 1e-3).all()
    z_back, inverse_log_det = flow.inverse_and_log_det(x)
    torch.testing.assert_close(z_back, z, rtol=0, atol=1e-8)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-8)


def test_volume_of_nice_is_that_of_its_last_part():
    flow = perturb(flows.nice(4, num_layers=3).double())
    z = torch.randn(5, 4, dtype=torch.float64)
    _, log_det = flow.forward_and_log_det(z)
    _, expected = flow.transforms[-1].forward_and_log_det(z)
    torch.testing.assert_close(log_det, expected)


@every_recipe
def test_recipes_need_a_layer(recipe):
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        recipe(2, num_layers=0)
