"""CUDA graphs: what can be one, and that it reads and writes the right memory; without a GPU, with a graph in Python."""

import pytest
import torch

from pyro_flowguides import internals
from pyro_flowguides.compiled import backends, cuda_graphs

META = torch.device("meta")


def module_of(function, *inputs):
    return internals.record(function, inputs)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x: [torch.where(x > 0, x, 0.0) * 2.0**x + torch.randn(3, device=META)], []),
        (lambda x: [x * torch.tensor(3.0, device="cpu")], []),
        (lambda x: [torch.where(x > 0, x, torch.tensor(3.0, device="cpu"))], ["lift_fresh_copy.default is on cpu"]),
        (lambda x: [torch.zeros(3, device="cpu").to(META) + x], ["is on cpu", "copies from cpu to meta"]),
        (lambda x: [torch.linalg.cholesky_ex(torch.diag(x))[0]], ["cholesky_ex.default waits"]),
        (lambda x: [torch.linalg.vector_norm(x)], []),
        (lambda x: [x[torch.randperm(3, device=META)[:2]]], []),
        (lambda x: [x[torch.tensor([0, 2], device=META)]], []),
    ],
)
def test_what_waits(function, found):
    waiting = cuda_graphs.what_waits(module_of(function, torch.zeros(3, device=META)), META)
    assert len(waiting) == len(found)
    for ours, expected in zip(waiting, found, strict=True):
        assert expected in ours


def test_elements_by_a_condition_are_waited_for():
    mask = torch.tensor([True, False, True], device="cpu")
    module = module_of(lambda x: [x[mask]], torch.zeros(3, device="cpu"))
    assert cuda_graphs.what_waits(module, torch.device("cpu")) == ["aten.index.Tensor by a condition waits"]


def test_only_what_is_on_a_gpu_is_recorded():
    x = torch.zeros(3, device="cpu")
    module = module_of(lambda x: [x + 1], x)
    assert not cuda_graphs.can_record(module, [x]) and not cuda_graphs.can_record(module, [])
    assert not isinstance(backends.replay(module, [x]), cuda_graphs.Graphed)


class _Recorder:
    """Runs a function again, on the same inputs, and writes into the same outputs, as a CUDA graph does."""

    def __init__(self, fails=False):
        self.num_recorded, self.fails = 0, fails

    def __call__(self, function, device):
        if self.fails:
            raise RuntimeError("operation not permitted when\nstream is capturing")
        self.num_recorded += 1
        outputs = [torch.full_like(output, torch.nan) for output in function()]

        def replay():
            for output, new in zip(outputs, function(), strict=True):
                output.copy_(new)

        return outputs, replay


def graphed(fails=False):
    recorder = _Recorder(fails)
    launched = []

    def run(state, rate):
        launched.append(state)
        return [state + rate, (state * rate).sum()]

    return cuda_graphs.Graphed(run, recorder), recorder, launched


@pytest.mark.parametrize("inference", [True, False])
def test_fixed_inputs_are_read_in_place_and_others_copied(inference):
    run, recorder, launched = graphed()
    state, kept, rates = torch.ones(4), [], []
    with torch.inference_mode(inference), torch.no_grad():
        for number in range(10):
            # In other memory each time.
            rates.append(torch.full((), float(number)))
            outputs = run(state, rates[-1])
            assert torch.equal(outputs[0], state + number)
            kept.append((outputs[1], (state * number).sum()))
            state.add_(1)
    # Outputs of earlier calls are not written over.
    for ours, expected in kept:
        assert torch.equal(ours, expected)
    assert recorder.num_recorded == 1
    # Launched one by one at first.
    assert all(each is state for each in launched)


def test_an_input_that_moves_later_is_copied_from_then_on():
    run, recorder, _ = graphed()
    first, rate = torch.ones(4), torch.full((), 2.0)
    for _ in range(5):
        run(first, rate)
    second = torch.full((4,), 5.0)
    for state in (second, first, second, torch.zeros(4)):
        assert torch.equal(run(state, rate)[0], state + 2)
    assert recorder.num_recorded == 2
    # Nobody has written to them.
    assert torch.equal(first, torch.ones(4)) and torch.equal(second, torch.full((4,), 5.0))


def test_where_nothing_can_be_recorded_kernels_are_launched():
    run, _, _ = graphed(fails=True)
    state, rate = torch.ones(4), torch.full((), 2.0)
    for _ in range(cuda_graphs.NUM_WARM):
        run(state, rate)
    with pytest.warns(
        UserWarning, match="no CUDA graph .* one by one: operation not permitted when stream is capturing"
    ):
        assert torch.equal(run(state, rate)[0], state + 2)
    assert torch.equal(run(state, rate)[0], state + 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_draws_what_the_graph_draws():
    x = torch.ones(3, device="cuda")
    module = module_of(lambda x: [x + torch.randn(3, device="cuda"), torch.rand(2, device="cuda")], x)
    run = backends.replay(module, [x])
    assert isinstance(run, cuda_graphs.Graphed)
    torch.manual_seed(3)
    expected = [module(x) for _ in range(6)]
    torch.manual_seed(3)
    for theirs in expected:
        for own, other in zip(run(x), theirs, strict=True):
            assert torch.equal(own, other)
