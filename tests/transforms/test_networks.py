"""The networks: how far a step moves them, damping, the Lipschitz bound."""

import pyro
import torch

from pyro_flowguides.transforms.networks import MLP, LipschitzMLP


def test_a_step_moves_a_wide_network_about_as_far_as_a_narrow_one():
    def change(width):
        pyro.set_rng_seed(0)
        network = MLP(3, 1, (width, width)).double()
        inputs = torch.randn(64, 3, dtype=torch.float64)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        network(inputs).sum().backward()
        optimizer.step()
        return float(network(inputs).mean().detach())

    # Adam moves every weight by the rate, so that what is not divided moves six times as far.
    assert change(16 * 16) / change(16) < 3
    assert change(16) < 0


def test_a_linear_map_of_the_context_is_not_divided():
    linear_map = MLP(9, 2, ())
    torch.nn.init.ones_(linear_map.layers[0].weight)
    assert torch.equal(linear_map(torch.ones(9)), torch.full((2,), 9.0))


def test_the_lipschitz_bound_is_reached():
    """Were the bound never near, the flow would give away what it may bend."""
    network = LipschitzMLP(1, 1, (4,), lipschitz=0.9).double()
    with torch.no_grad():
        for layer in network.layers:
            layer.weight.fill_(100.0)
    z = torch.linspace(-50, 50, 10_001, dtype=torch.float64)
    slopes = torch.vmap(torch.func.grad(lambda point: network(point.unsqueeze(-1)).squeeze(-1)))(z)
    assert 0.89 < slopes.max().item() <= 0.9
