"""A training step waits for no value, copies nothing from another device, and is captured once.

On the CPU waiting shows as the operation that reads a value, ``_local_scalar_dense``. Placement shows on the device "meta", which
has no values at all: whatever a step reads, or takes from the host, is an error or a tensor on another device in its graph.
"""

import functools
from collections import Counter

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides import CompiledSVI, internals
from pyro_flowguides.compiled import capture, captures, cuda_graphs, rewrite, svi
from pyro_flowguides.compiled.arguments import Arguments
from pyro_flowguides.compiled.losses import KL
from pyro_flowguides.training.steps import CLIP_FACTOR

GUIDES = {
    # With the flow that AutoFlow has by default.
    "AutoCoupling": fg.AutoCoupling,
    "AutoIAF": fg.AutoIAF,
    "AutoMixture": functools.partial(fg.AutoMixture, num_components=2),
    "AutoNormal": AutoNormal,
}
META = torch.device("meta")
READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default}


def model(y):
    """Constrained latents, a plate of them, a likelihood."""
    zero = y.new_zeros(())
    mu = pyro.sample("mu", dist.Normal(zero, 5.0))
    scale = pyro.sample("scale", dist.HalfNormal(zero + 1.0))
    share = pyro.sample("share", dist.Beta(zero + 2.0, 1.0))
    with pyro.plate("groups", 2):
        effect = pyro.sample("effect", dist.Normal(zero, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.StudentT(4.0, mu + share + effect.sum(-1, keepdim=True), scale), obs=y)


def short(y):
    """Few sites: a mode that sees every operation is slow."""
    scale = pyro.sample("scale", dist.HalfNormal(y.new_ones(())))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, scale), obs=y)


class Operations(internals.TorchDispatchMode):
    """Counts operations, and those that move a tensor to another device."""

    def __init__(self):
        super().__init__()
        self.counts, self.num_moves = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function] += 1
        result = function(*args, **(kwargs or {}))
        devices = {
            leaf.device for leaf in internals.flatten((args, kwargs, result))[0] if isinstance(leaf, torch.Tensor)
        }
        self.num_moves += len(devices) > 1
        return result

    @property
    def num_reads(self):
        return sum(self.counts[function] for function in READS)


def small(model):
    return fg.AutoPlanar(model, num_layers=1)


def svi_of(model, make_guide, y, **options):
    guide = make_guide(model)
    guide(y)
    loss = KL(8, max_plate_nesting=1, temper=lambda step: min(1.0, 0.1 + 0.01 * step))
    optim = functools.partial(torch.optim.Adam, lr=1e-2)
    guards = {"clip_factor": CLIP_FACTOR, "clip_norm": 100.0, "ema_decay": 0.9, "schedule": lambda step: 1 / (1 + step)}
    return CompiledSVI(model, guide, optim, loss, **guards, **options)


@pytest.fixture
def on_the_cpu(device):
    if device.type != "cpu":
        pytest.skip("a CUDA graph is no operation that a mode sees")


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_step_reads_no_value(chunk_size, dtype, on_the_cpu):
    """Tempered, with clipping, guard, average and schedule: a mode sees every operation of steps, and of the check of five."""
    y = torch.randn(5, dtype=dtype)
    run = svi_of(short, small, y, chunk_size=chunk_size, backend="replay", max_nonfinite_steps=5)
    run.run(5, y)
    (captured,) = run.captures._steps.values()
    before = [graph.code for graph in captured.program.graphs]
    with Operations() as seen:
        run.run(10, y)
    assert seen.counts.total() > 10 * 50
    assert (seen.num_reads, seen.num_moves) == (0, 0)
    # Other temperatures and learning rates are no other graph.
    assert [graph.code for graph in captured.program.graphs] == before and len(run.captures) == 1


def test_an_eager_step_reads_no_value_after_the_first(dtype, on_the_cpu):
    y = torch.randn(5, dtype=dtype)
    run = svi_of(short, small, y, backend="eager")
    run.run(1, y)
    with Operations() as seen:
        run.run(2, y)
    assert (seen.num_reads, seen.num_moves) == (0, 0)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "AutoMixture" else []) for name in GUIDES]
)
def test_a_step_takes_nothing_from_another_device(name, monkeypatch):
    """A step is recorded without any value, and all of its tensors are where the parameters are."""
    monkeypatch.setattr(rewrite, "_uniform", lambda module, value: None)
    with pyro.settings.context(module_local_params=True):
        y = torch.randn(5, device="cpu")
        with torch.device("cpu"):
            run = svi_of(model, GUIDES[name], y)
        run.guide.to(META)
        y = y.to(META)
        trained = run._trained
        with capture.no_waiting(), torch.device(META):
            trained.prepare(3, (y,), {})
            # Finds the parameters, by a step of Pyro's without its looks at values.
            trained.differentiate((y,), {})
            trained.prepare(3, (y,), {})
        inputs = trained.step_inputs(1e-2, [y])
        module = capture.record(functools.partial(captures._step, trained, Arguments((y,), {})), inputs)
    rewrite.simplify(module)
    assert len(inputs) > 5 and {tensor.device for tensor in inputs} == {META}
    assert cuda_graphs.what_waits(module, META) == []
    values = [
        getattr(module, str(node.target)) if node.op == "get_attr" else node.meta.get("val")
        for node in module.graph.nodes
    ]
    assert {value.device for value in values if isinstance(value, torch.Tensor)} == {META}


def test_the_steps_of_a_fit_read_nothing_and_are_captured_once(monkeypatch, dtype, on_the_cpu):
    """With a clock, and with a callback, which gets its number after the step."""
    made, seen = [], []
    real_capture, real_step = svi.capture_step, CompiledSVI._take_step

    def take_step(self, arguments, captured):
        if captured is None:
            return real_step(self, arguments, captured)
        with Operations() as operations:
            result = real_step(self, arguments, captured)
        seen.append(operations.num_reads)
        return result

    monkeypatch.setattr(svi, "capture_step", lambda *args: made.append(args) or real_capture(*args))
    monkeypatch.setattr(CompiledSVI, "_take_step", take_step)
    y = torch.randn(5, dtype=dtype)
    options = {"num_steps": 21, "num_particles": 8, "whiten": None, "search_modes": False, "progress": False}
    callbacks = [lambda step, loss: None]
    fit = fg.fit(short, small(short), y, callbacks=callbacks, max_seconds=1e6, backend="replay", **options)
    assert len(fit.losses) == 21 and len(made) == 1
    assert len(seen) == 20 and not any(seen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["replay", "eager"])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_no_step_waits_for_a_gpu(backend, chunk_size):
    """Torch itself raises an error at whatever waits."""
    y = torch.randn(5, device="cuda")
    run = svi_of(model, fg.AutoCoupling, y, backend=backend, chunk_size=chunk_size)
    run.run(10, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.run(20, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if backend == "replay":
        (captured,) = run.captures._steps.values()
        assert not any(cuda_graphs.what_waits(graph, y.device) for graph in captured.program.graphs)
