"""The networks: how far a step moves them, damping, the Lipschitz bound."""

import copy
import functools

import pyro
import pytest
import torch
from transform_cases import perturb

from pyro_flowguides.transforms.networks import MLP, ConvNet, LipschitzMLP


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


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (functools.partial(MLP, 3, 2, (5, 5)), [(64, 3)]),
        (functools.partial(ConvNet, 1, 2, 3, context_dim=2), [(64, 1, 4, 4), (64, 2)]),
    ],
    ids=["MLP", "ConvNet"],
)
def test_a_damped_network_is_the_same_function_and_moves_eight_times_less(make, sizes):
    plain, damped = perturb(make()).double(), make(damped=True).double()
    with torch.no_grad():
        for stored, used in zip(damped.parameters(), plain.parameters(), strict=True):
            stored.copy_(8 * used)
    inputs = [torch.randn(size, dtype=torch.float64) for size in sizes]
    torch.testing.assert_close(damped(*inputs), plain(*inputs), rtol=0, atol=0)
    steps = []
    for network in (plain, damped):
        before = [parameter.detach() / network.slowdown for parameter in network.parameters()]
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        network(*inputs).sum().backward()
        optimizer.step()
        steps.append([p.detach() / network.slowdown - b for p, b in zip(network.parameters(), before, strict=True)])
    for of_plain, of_damped in zip(*steps, strict=True):
        torch.testing.assert_close(8 * of_damped, of_plain, rtol=1e-4, atol=1e-9)


def test_a_number_that_is_state_follows_what_is_loaded():
    source, target = perturb(MLP(2, 2, (4,), damped=True)), MLP(2, 2, (4,))
    inputs = torch.randn(5, 2)
    buffer = target.slowdown
    target.load_state_dict(target.state_dict())
    assert target.slowdown is buffer, "the buffer was exchanged for nothing: a captured step would be captured again"
    target.load_state_dict(source.state_dict())
    assert target.slowdown is not buffer, "a captured step could not see the change"
    torch.testing.assert_close(target(inputs), source(inputs), rtol=0, atol=0)
    target = MLP(2, 2, (4,))
    target.load_state_dict(source.state_dict(), assign=True)
    torch.testing.assert_close(target(inputs), source(inputs), rtol=0, atol=0)
    state = copy.deepcopy(source.state_dict())
    state["slowdown"] = torch.ones(3)
    with pytest.raises(RuntimeError, match="size mismatch for slowdown"):
        target.load_state_dict(state)


@pytest.mark.parametrize("slowdown", [0.25, 0.5, 1.0, 8.0])
def test_the_scale_of_the_layers_is_that_of_their_outputs(slowdown):
    """Weights and biases over the slowdown; the last layer over the root of the width before it as well."""
    network = perturb(MLP(2, 3, (4, 16)))
    network.set_scalar("slowdown", slowdown)
    first, _, second, _, last = network.layers
    inputs = torch.randn(5, 2)
    hidden = torch.nn.functional.silu(first(inputs) / slowdown)
    hidden = torch.nn.functional.silu(second(hidden) / slowdown)
    torch.testing.assert_close(network(inputs), last(hidden) / slowdown / 4)
