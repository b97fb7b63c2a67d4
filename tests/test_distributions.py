"""NormalizingFlow: sampling with density, memory of the last draw, the path gradient, contexts."""

import copy

import pyro.distributions as dist
import pytest
import torch
from recipe_cases import make_flow
from transform_cases import perturb

from pyro_flowguides import NormalizingFlow, flows

every_recipe = pytest.mark.parametrize("recipe", [flows.coupling, flows.planar], ids=["coupling", "planar"])
CONTEXT_DIM = 3


@every_recipe
@pytest.mark.parametrize("gradient", ["total", "path"])
def test_draws_come_with_their_density(recipe, gradient, dtype, tolerance):
    flow = make_flow(recipe, 3, dtype, gradient=gradient)
    assert flow.event_shape == (3,)
    for distribution in (flow, flow.expand((4,)), flow.expand((4, 1)).expand((4, 2))):
        shape = (5, *distribution.batch_shape)
        x, log_prob = distribution.rsample_and_log_prob((5,))
        assert x.shape == (*shape, 3)
        assert log_prob.shape == shape
        torch.testing.assert_close(distribution.log_prob(x), log_prob, rtol=tolerance(1e-8), atol=tolerance(1e-8))


def test_a_draw_is_scored_without_inverting(dtype, monkeypatch):
    flow = make_flow(flows.coupling, 3, dtype)
    x = flow.rsample((5,))
    elsewhere = flow.log_prob(x.clone())
    monkeypatch.setattr(type(flow.transform), "inverse_and_log_det", lambda *args: pytest.fail("inverted"))
    torch.testing.assert_close(flow.log_prob(x), elsewhere)


def test_another_distribution_scores_the_draw_by_itself(dtype):
    """The memory belongs to the object that drew: a copy with other parameters must not answer from it."""
    flow = make_flow(flows.coupling, 3, dtype)
    x = flow.rsample((5,))
    other = NormalizingFlow(flow.base_dist, perturb(copy.deepcopy(flow.transform)))
    assert not torch.allclose(other.log_prob(x), flow.log_prob(x))


def test_path_gradient_vanishes_where_the_flow_is_exact(dtype, tolerance):
    """The gradient of log q − log p is 0 for every single draw, not only on average."""
    flow = make_flow(flows.coupling, 3, dtype, gradient="path")
    fixed = copy.deepcopy(flow.transform).requires_grad_(False)
    x, log_prob = flow.rsample_and_log_prob((1,))
    loss = log_prob - NormalizingFlow(flow.base_dist, fixed).log_prob(x)
    for gradient in torch.autograd.grad(loss.sum(), list(flow.transform.parameters())):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=tolerance(1e-7))


# --- contexts ---------------------------------------------------------------------------------------------------------


@every_recipe
@pytest.mark.parametrize("gradient", ["total", "path"])
@pytest.mark.parametrize("batch_shape", [(), (4,), (4, 1)], ids=str)
def test_a_context_makes_a_batch_of_distributions(recipe, gradient, batch_shape, dtype, tolerance):
    flow = make_flow(recipe, 3, dtype, context_dim=CONTEXT_DIM, gradient=gradient)
    context = torch.randn(*batch_shape, CONTEXT_DIM, dtype=dtype)
    bound = flow.condition(context)
    assert isinstance(bound, NormalizingFlow)
    assert bound.batch_shape == batch_shape and bound.event_shape == (3,)
    assert bound.gradient == gradient
    wider = (2, *batch_shape[:-1], 5) if batch_shape == (4, 1) else (2, *batch_shape)
    for distribution in (bound, bound.expand(wider)):
        x, log_prob = distribution.rsample_and_log_prob((5,))
        assert x.shape == (5, *distribution.batch_shape, 3)
        assert log_prob.shape == (5, *distribution.batch_shape)
        torch.testing.assert_close(distribution.log_prob(x), log_prob, rtol=tolerance(1e-8), atol=tolerance(1e-8))
        # Every member of the batch is the distribution of its own context.
        contexts = context.expand(*distribution.batch_shape, CONTEXT_DIM).reshape(-1, CONTEXT_DIM)
        rows = x.reshape(5, -1, 3).unbind(1)
        for one_context, row, found in zip(contexts, rows, log_prob.reshape(5, -1).unbind(1), strict=True):
            expected = flow.condition(one_context).log_prob(row)
            torch.testing.assert_close(found, expected, rtol=tolerance(1e-8), atol=tolerance(1e-8))


def test_a_bound_flow_broadcasts_with_the_batch_of_the_base(dtype):
    base = dist.Normal(torch.zeros(4, 1, 3, dtype=dtype), 1.0).to_event(1)
    flow = NormalizingFlow(base, perturb(flows.coupling(3, context_dim=2).to(dtype)))
    bound = flow.condition(torch.randn(5, 2, dtype=dtype))
    assert bound.batch_shape == (4, 5)
    assert bound.rsample((6,)).shape == (6, 4, 5, 3)


def test_a_bound_flow_remembers_its_draw(dtype, monkeypatch):
    flow = make_flow(flows.coupling, 3, dtype, context_dim=CONTEXT_DIM)
    bound, other = (flow.condition(torch.randn(4, CONTEXT_DIM, dtype=dtype)) for _ in range(2))
    x = bound.rsample((5,))
    elsewhere = bound.log_prob(x.clone())
    assert not torch.allclose(other.log_prob(x), elsewhere), "another context answered from the memory"
    monkeypatch.setattr(type(bound.transform), "inverse_and_log_det", lambda *args: pytest.fail("inverted"))
    torch.testing.assert_close(bound.log_prob(x), elsewhere)


@pytest.mark.parametrize("gradient", ["total", "path"])
@every_recipe
def test_gradients_reach_the_context(recipe, gradient, dtype, tolerance):
    """The path gradient of the context too leaves out the dependence of the density on it."""
    flow = make_flow(recipe, 3, dtype, context_dim=CONTEXT_DIM, gradient=gradient)
    context = torch.randn(6, CONTEXT_DIM, dtype=dtype, requires_grad=True)
    inputs = [context, *flow.transform.parameters()]
    torch.manual_seed(1)
    _, log_prob = flow.condition(context).rsample_and_log_prob()
    weights = torch.arange(1.0, 7.0, dtype=dtype)
    found = torch.autograd.grad((weights * log_prob).sum(), inputs)
    torch.manual_seed(1)
    x = NormalizingFlow(flow.base_dist, flow.transform).condition(context).rsample()
    scored_by = flow.transform if gradient == "total" else copy.deepcopy(flow.transform).requires_grad_(False)
    scored_at = context if gradient == "total" else context.detach()
    log_prob = NormalizingFlow(flow.base_dist, scored_by).condition(scored_at).log_prob(x.clone())
    expected = torch.autograd.grad((weights * log_prob).sum(), inputs)
    assert expected[0].abs().max() > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance(1e-6), atol=tolerance(1e-6) * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize(
    "use",
    [
        lambda flow: flow.rsample((2,)),
        lambda flow: flow.sample(),
        lambda flow: flow.rsample_and_log_prob(),
        lambda flow: flow.log_prob(torch.zeros(2)),
        lambda flow: flow.expand((3,)).rsample(),
    ],
    ids=["rsample", "sample", "rsample_and_log_prob", "log_prob", "expanded"],
)
@pytest.mark.parametrize("gradient", ["total", "path"])
def test_an_unbound_context_is_an_error_at_the_first_use(use, gradient):
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    flow = NormalizingFlow(base, flows.coupling(2, context_dim=3), gradient=gradient)
    with pytest.raises(ValueError, match=r"needs a context of size 3; call condition\(context\) first"):
        use(flow)


def make_bound(base, context_dim, context):
    return NormalizingFlow(base, flows.coupling(2, context_dim=context_dim)).condition(context)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda base: NormalizingFlow(base, flows.coupling(2), gradient="score"), 'gradient must be "total" or "path"'),
        (lambda base: make_bound(base, 0, torch.zeros(3)), "takes no context"),
        (lambda base: make_bound(base, 3, torch.zeros(5, 2)), r"must be context_dim = 3, got shape \(5, 2\)"),
        (lambda base: make_bound(base, 3, torch.tensor(1.0)), r"must be context_dim = 3, got shape \(\)"),
        (lambda base: make_bound(base, 3, torch.zeros(5, 3)).condition(torch.zeros(3)), "takes no context"),
        (lambda base: flows.coupling(2, num_layers=0), "coupling: num_layers must be at least 1"),
        (lambda base: flows.planar(0), "dim must be at least 1"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make(dist.Normal(torch.zeros(2), 1.0).to_event(1))
