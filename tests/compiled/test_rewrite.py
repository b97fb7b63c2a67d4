"""Rewriting captured graphs: the same numbers from fewer operations, and nothing that was written to is taken for constant."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_flowguides.compiled import rewrite

DATA = torch.arange(1.0, 7.0).reshape(2, 3)


def operations(module):
    return [node for node in module.graph.nodes if node.op == "call_function"]


def captured(function, *inputs):
    module = make_fx(function)(*inputs)
    before = len(operations(module))
    rewrite.simplify(module)
    return module, before


def gradient(function):
    def value_and_gradient(x):
        x = x.detach().requires_grad_()
        value = function(x)
        return value.detach(), *torch.autograd.grad(value.sum(), x)

    return value_and_gradient


# Name: the function, and how many operations are left of it at most.
CASES = {
    "sum with 0": (lambda x: x + 0.0 - torch.zeros(2, 3), 0),
    "product with 1": (lambda x: 1.0 * x * torch.ones(2, 3) / 1, 0),
    "power 1": (lambda x: x**1.0, 1),
    "transposed twice": (lambda x: x.t().t() + x.mT.mT, 1),
    "negative of a negative": (lambda x: x.neg().neg(), 0),
    "minus a negative": (lambda x: x - (-x.exp()), 2),
    "view of a view": (lambda x: x.reshape(6).reshape(3, 2).reshape(2, 3), 0),
    "views around an operation": (lambda x: x.reshape(2, 1, 3).exp().reshape(2, 3), 1),
    "expanded to its own shape": (lambda x: x.expand(2, 3).exp(), 1),
    "the same twice": (lambda x: x.exp() * x.exp(), 2),
    "constants": (lambda x: x * (DATA.log() + 2).exp(), 1),
    "shape alone": (lambda x: x + torch.zeros_like(x).exp() - 1, 2),
    "halves joined and split": (lambda x: torch.cat([x.exp(), x.sin()], -1)[:, 3:] * 2, 2),
    "rows of a view": (lambda x: torch.cat([x, x], -1).reshape(2, 2, 3).unbind(-2)[1] * 2, 1),
    "stacked and flattened": (lambda x: torch.stack([x, x.exp()], -2).reshape(2, 6), 2),
    "sum that keeps a dimension": (lambda x: x.sum(0, keepdim=True).reshape(3), 1),
    "unused": (lambda x: (x.exp(), x)[1] * 2, 1),
    "gradient of slices": (gradient(lambda x: x[:, :1].exp() * x[:, 1:].sin()), 11),
    "gradient of a clipped value": (gradient(lambda x: (3 * torch.tanh(x / 3)).exp()), 5),
    "transposed, then flattened": (lambda x: (x.t() + 0.0).reshape(6), 3),
    "expanded, then flattened": (lambda x: (x[:, :1].expand(2, 3) * 1.0).reshape(6), 4),
}


def test_a_sum_over_thousands_of_steps_is_no_recursion():
    graph = torch.fx.Graph()
    x = total = graph.placeholder("x")
    for _ in range(2000):
        total = graph.call_function(torch.ops.aten.add.Tensor, (total, x))
    graph.output(total)
    for node in graph.nodes:
        node.meta["val"] = DATA
    module = torch.fx.GraphModule({}, graph)
    rewrite.simplify(module)
    torch.testing.assert_close(module(DATA), 2001 * DATA)


@pytest.mark.parametrize("name", CASES)
def test_same_numbers_from_fewer_operations(name):
    function, most = CASES[name]
    module, before = captured(function, torch.randn(2, 3))
    assert len(operations(module)) <= min(most, before)
    for x in (torch.randn(2, 3), torch.randn(3, 2).t(), 100 * torch.randn(2, 3)):
        ours, theirs = module(x.contiguous()), function(x.contiguous())
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_random_numbers_are_neither_merged_nor_dropped():
    def function(x):
        torch.randn(3)
        return x + torch.rand(3) - torch.rand(3)

    module, _ = captured(function, torch.zeros(3))
    torch.manual_seed(1)
    expected = function(torch.zeros(3))
    torch.manual_seed(1)
    torch.testing.assert_close(module(torch.zeros(3)), expected)
    assert expected.abs().max() > 0.01


def test_uninitialised_memory_is_not_shared():
    def function(x):
        return x + torch.empty(3).normal_() * torch.empty(3).normal_()

    module, _ = captured(function, torch.zeros(3))
    torch.manual_seed(2)
    expected = function(torch.zeros(3))
    torch.manual_seed(2)
    torch.testing.assert_close(module(torch.zeros(3)), expected)


def test_what_the_graph_writes_to_is_no_constant():
    counter = torch.zeros(3)

    def function(x):
        counter.add_(1)
        return x + counter.exp() - counter[1:2]

    module, _ = captured(function, torch.zeros(3))
    assert rewrite.constants(module) == []
    for _ in range(2):
        before = counter.clone()
        value = module(torch.zeros(3))
        torch.testing.assert_close(value, (before + 1).exp() - (before + 1)[1:2])


def test_what_others_write_to_is_read_every_time():
    data = torch.ones(3)

    def function(x):
        return x + data[1:].exp().sum()

    module = make_fx(function)(torch.zeros(3))
    assert [constant is data for constant in rewrite.constants(module)] == [True]
    assert rewrite.constants(module, [data]) == []
    rewrite.simplify(module, [data])
    data.fill_(2.0)
    torch.testing.assert_close(module(torch.zeros(3)), function(torch.zeros(3)))


def test_not_a_number_stays_one():
    module, _ = captured(lambda x: x - x + 0.0 * x.exp(), torch.zeros(3))
    assert module(torch.tensor([torch.nan, torch.inf, 0.0])).isnan().tolist() == [True, True, False]


def test_dtypes_are_kept():
    module, _ = captured(lambda x: (x.double() + 0.0) * torch.ones(3), torch.zeros(3))
    assert module(torch.zeros(3)).dtype == torch.float64
    module, _ = captured(lambda x: x + torch.zeros(3, dtype=torch.float64), torch.zeros(3))
    assert module(torch.zeros(3)).dtype == torch.float64
