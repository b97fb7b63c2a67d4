"""What runs a graph: the same random numbers from each backend."""

import warnings

import pyro
import pyro.optim
import pytest
import torch
from models import conjugate
from svi_cases import compiled, observations, parameters

import pyro_flowguides as fg
from pyro_flowguides import internals
from pyro_flowguides.compiled import backends, captures
from pyro_flowguides.compiled.cuda_graphs import Graphed


@pytest.fixture
def y(dtype):
    return observations(dtype)


def test_replay_draws_what_the_graph_draws():
    def function(x):
        return [x + torch.randn(100).sum()]

    x = torch.zeros(3)
    module = internals.record(function, [x])
    run = backends.replay(module, [x])
    values = []
    for call in (module, run):
        torch.manual_seed(3)
        with torch.inference_mode():
            values.append(torch.stack([*call(x), *call(x)]))
    assert torch.equal(*values)
    assert not torch.equal(*values[0])


def test_replay_draws_what_nobody_uses():
    """Such as the indices of a plate whose minibatch is an argument; without them the next draw would be another one."""

    def function(x):
        torch.randperm(5)
        return x + torch.randn(3), x - torch.rand(3)

    x = torch.zeros(3)
    module = internals.record(function, [x])
    run = backends.replay(module, [x])
    torch.manual_seed(3)
    expected = function(x)
    torch.manual_seed(3)
    with torch.inference_mode():
        drawn = run(x)
    assert len(drawn) == 2
    for ours, theirs in zip(drawn, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_inductor_draws_the_same_numbers(y):
    if not backends.has_compiler(y.device):
        pytest.skip("no compiler")
    runs = {}
    for backend in ("replay", "inductor"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = compiled(conjugate, fg.AutoPlanar(conjugate, num_layers=1), backend=backend)
        runs[backend] = svi.run(20, y), parameters()
        assert svi.captures.num_compiled == (backend == "inductor")
    torch.testing.assert_close(runs["inductor"][0], runs["replay"][0], rtol=1e-4, atol=1e-4)
    for key, value in runs["inductor"][1].items():
        torch.testing.assert_close(value, runs["replay"][1][key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "inductor"])
def test_without_a_compiler_the_graph_is_replayed(backend, monkeypatch, y):
    monkeypatch.setattr(backends, "has_compiler", lambda device: False)
    monkeypatch.setattr(captures, "PAYBACK", 0.0)
    svi = compiled(conjugate, backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        svi.run(3 * captures.MIN_NUM_RUNS, y)
    # Only who has asked for the compiler is told that there is none, and once.
    assert [str(warning.message) for warning in caught] == (
        ["CompiledSVI: no compiler was found for inductor; the graph is replayed instead"]
        if backend == "inductor"
        else []
    )
    assert len(svi.captures) == 1
    assert svi.captures.num_compiled == 0


def test_where_inductor_fails_the_graph_is_replayed(monkeypatch, y):
    def fail(module, inputs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(backends, "has_compiler", lambda device: True)
    monkeypatch.setattr(backends, "compile_with_inductor", fail)
    svi = compiled(conjugate, backend="inductor")
    with pytest.warns(
        UserWarning, match="inductor failed, the graph is replayed instead: no such instruction"
    ) as caught:
        svi.run(60, y)
    assert len(caught) == 1
    assert svi.captures.num_compiled == 0


@pytest.mark.parametrize(
    ("kind", "inductor", "triton", "found", "expected"),
    [
        ("cpu", True, False, {"g++"}, True),
        ("cpu", True, False, {"clang++"}, True),
        ("cpu", True, False, {"cl"}, True),
        ("cpu", True, True, {"gcc"}, False),
        ("cpu", False, True, {"g++"}, False),
        ("cuda", True, True, set(), True),
        ("cuda", True, False, {"g++"}, False),
        ("cuda", False, True, {"g++"}, False),
    ],
)
def test_what_a_compiler_needs(kind, inductor, triton, found, expected, monkeypatch):
    monkeypatch.setattr(internals, "has_standalone_compile", lambda: inductor)
    monkeypatch.setattr(internals, "has_triton", lambda: triton)
    monkeypatch.setattr(backends.shutil, "which", lambda name: name if name in found else None)
    assert backends.has_compiler(torch.device(kind)) is expected


def test_inductor_takes_the_random_numbers_of_the_graph(monkeypatch):
    given = []
    monkeypatch.setattr(internals, "standalone_compile", lambda *args: given.append((*args, torch.is_grad_enabled())))
    example = [torch.zeros(2)]
    backends.compile_with_inductor("module", example)
    assert given == [("module", example, {"fallback_random": True, "cpp_wrapper": True}, False)]


class _OnGPU:
    is_cuda = True


@pytest.mark.parametrize("can_be_graph", [True, False])
def test_on_a_gpu_what_inductor_compiles_is_one_launch_where_nothing_waits(can_be_graph, monkeypatch):
    given = []
    monkeypatch.setattr(
        internals, "standalone_compile", lambda module, inputs, config: given.append(config) or "compiled"
    )
    monkeypatch.setattr(backends, "can_record", lambda module, inputs: can_be_graph)
    run = backends.compile_with_inductor("module", [_OnGPU()])
    # By our own CUDA graph, whose outputs stay what they are.
    assert given == [{"fallback_random": True}]
    assert isinstance(run, Graphed) if can_be_graph else run == "compiled"


def test_on_a_gpu_a_replayed_step_is_one_launch_of_the_graph_itself(monkeypatch):
    """And nothing that torch.jit has joined to other kernels."""
    module = internals.record(lambda x: [x + torch.rand(3)], [torch.zeros(3)])
    monkeypatch.setattr(backends, "can_record", lambda module, inputs: True)
    run = backends.replay(module, [torch.zeros(3)])
    assert isinstance(run, Graphed) and run._run is module


@pytest.mark.parametrize("error", [RuntimeError, AttributeError])
def test_a_graph_that_cannot_be_traced_runs_itself(error, monkeypatch):
    def refuse(function, inputs):
        raise error("no such operation")

    module = internals.record(lambda x: [x + 1], [torch.zeros(3)])
    monkeypatch.setattr(internals, "jit_function", refuse)
    assert backends.replay(module, [torch.zeros(3)]) is module
