"""Couplings, beyond the contract of every transform: masks, and damping as part of their state."""

import copy
import pickle

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transform_cases import perturb

from pyro_flowguides import flows
from pyro_flowguides import transforms as T


def trained_while_damped(dim=3, context_dim=0):
    """A damped flow whose parameters have moved, and points that reach well beyond what its networks see."""
    flow = perturb(flows.coupling(dim, num_layers=3, context_dim=context_dim, damped=True), 4.0)
    return flow, 4 * torch.randn(20, dim), torch.randn(20, context_dim) if context_dim else None


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("dim", [1, 3])
def test_the_state_dict_of_a_damped_flow_determines_its_function(dim, context_dim):
    flow, z, context = trained_while_damped(dim, context_dim)
    expected = flow.forward_and_log_det(z, context)
    fresh = flows.coupling(dim, num_layers=3, context_dim=context_dim)
    fresh.load_state_dict(flow.state_dict())
    within = torch.nn.ModuleDict({"flow": flows.coupling(dim, num_layers=3, context_dim=context_dim)})
    within.load_state_dict({f"flow.{name}": value for name, value in flow.state_dict().items()})
    for other in (fresh, within["flow"], copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        for a, b in zip(other.forward_and_log_det(z, context), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    # And back: an undamped state undamps.
    plain = perturb(flows.coupling(dim, num_layers=3, context_dim=context_dim))
    fresh.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fresh.forward_and_log_det(z, context)[0], plain.forward_and_log_det(z, context)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_damping_survives_another_dtype(dtype):
    flow, z, _ = trained_while_damped()
    there_and_back = copy.deepcopy(flow).to(dtype)
    assert all(buffer.dtype == dtype for name, buffer in there_and_back.named_buffers() if "order" not in name)
    fresh = flows.coupling(3, num_layers=3).to(dtype)
    fresh.load_state_dict(there_and_back.state_dict())
    torch.testing.assert_close(fresh(z.to(dtype)), there_and_back(z.to(dtype)), rtol=0, atol=0)
    if dtype == torch.float64:
        torch.testing.assert_close(there_and_back(z.double()).float(), flow(z))


def test_the_network_of_a_damped_coupling_sees_three_standard_deviations():
    """Far out its shift stops changing; without damping it goes on."""
    z = torch.tensor([[1e3, 0.0], [1e6, 0.0]])
    for damped in (True, False):
        coupling = perturb(T.AdditiveCoupling(2, damped=damped), 4.0)
        near, far = coupling(z)[:, 1].tolist()
        assert (abs(near - far) < 1e-3) == damped


def test_undamping_keeps_a_flow_that_is_still_the_identity():
    torch.manual_seed(0)
    plain = flows.coupling(3, num_layers=3)
    torch.manual_seed(0)
    flow = flows.coupling(3, num_layers=3, damped=True)
    for name, parameter in flow.named_parameters():
        torch.testing.assert_close(parameter, 8 * plain.get_parameter(name), rtol=0, atol=0)
    T.undamp(flow)
    for name, value in flow.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=0, atol=0)
    # Nothing is left to undamp.
    T.undamp(flow)
    torch.testing.assert_close(flow.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert "damped" not in repr(flow)


def test_undamping_leaves_what_is_not_damped_and_what_is_no_coupling():
    coupling = perturb(T.AffineCoupling(3))
    flow = T.Compose([perturb(T.AffineCoupling(3, damped=True)), T.Planar(3), coupling])
    before = copy.deepcopy(flow.state_dict())
    T.undamp(flow)
    changed = {name for name, value in flow.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("transforms.0.") and "order" not in name}


def test_damping_costs_an_undamped_flow_no_operation():
    def operations(coupling):
        nodes = make_fx(lambda z: coupling.forward_and_log_det(z))(torch.zeros(4, 3)).graph.nodes
        return [str(node.target) for node in nodes if node.op == "call_function"]

    damped, plain = operations(T.AffineCoupling(3, damped=True)), operations(T.AffineCoupling(3))
    assert sum("rsqrt" in name for name in damped) == 1
    assert not any("rsqrt" in name for name in plain)
    # No number is read from a buffer either.
    assert not any("local_scalar_dense" in name for name in damped + plain)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: T.AffineCoupling(2.5), TypeError, "AffineCoupling: dim must be an integer, got 2.5"),
        (lambda: T.AffineCoupling(3, hidden_dims=(4, 0)), ValueError, "all sizes at least 1"),
        (lambda: T.AffineCoupling(3, mask="thirds"), ValueError, 'mask must be "half", "checkerboard"'),
        (lambda: T.AffineCoupling(3, mask=torch.ones(2, dtype=torch.bool)), ValueError, r"boolean of shape \(3,\)"),
        (lambda: T.AffineCoupling(3, mask=torch.tensor([1, 0, 1])), ValueError, "must be boolean .*, got torch.int64"),
        (lambda: T.AffineCoupling(3, mask=torch.ones(3, dtype=torch.bool)), ValueError, "keeps every coordinate"),
        (lambda: T.AffineCoupling(3, log_scale_bound=0.0), ValueError, "log_scale_bound must be positive"),
        (lambda: T.AffineCoupling(3, bound=1.0), TypeError, r"Coupling.__init__\(\) got an unexpected .* 'bound'"),
        (lambda: T.SplineCoupling(3, tail_bound=0.0), ValueError, "tail_bound must be positive and finite, got 0.0"),
    ],
)
def test_errors_say_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()
