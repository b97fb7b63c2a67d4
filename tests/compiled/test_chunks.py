"""Particles taken in chunks: the same loss, gradient and training as all of them together, with the memory of a chunk."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

import pyro_flowguides as fg
from pyro_flowguides import IWELBO, CompiledSVI
from pyro_flowguides.compiled import chunks, memory
from pyro_flowguides.compiled.losses import KL
from pyro_flowguides.compiled.recorded import find_recording
from pyro_flowguides.internals import TorchDispatchMode
from pyro_flowguides.model.call import ModelCall

DATA = torch.tensor([0.3, 1.4, 2.2, 0.7], dtype=torch.float64)
# Draws of two coordinates: chunks of 16, 16 and 8 take as many random numbers as torch makes at a time, 16.
NUMBER, SIZE = 40, 16


def model(y):
    """Two latents, the second with a constraint."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(1.0), 2.0))
    scale = pyro.sample("scale", dist.LogNormal(y.new_tensor(0.2), 0.7))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


def looking(y):
    """The same model, written for one draw."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(1.0), 2.0))
    scale = pyro.sample("scale", dist.LogNormal(y.new_tensor(0.2), 0.7))
    scales = torch.eye(len(y), dtype=y.dtype) @ scale.expand(len(y))
    pyro.sample("y", dist.Normal(mu.expand(len(y)), scales).to_event(1), obs=y)


def planar(model):
    return fg.AutoPlanar(model, num_layers=1, init_scale=0.5)


def vectorized(kind, **options):
    return lambda model, guide: kind(num_particles=NUMBER, vectorize_particles=True, max_plate_nesting=1, **options)


def path(temper=None):
    return lambda model, guide: KL(NUMBER, max_plate_nesting=1, temper=temper)


def recorded(model, guide):
    return KL(NUMBER, batched=find_recording(ModelCall(model, (DATA,), {}), guide))


CASES = {
    "Trace_ELBO": (model, AutoDiagonalNormal, vectorized(Trace_ELBO)),
    "Trace_ELBO, a plate nesting to guess": (
        model,
        planar,
        lambda *_: Trace_ELBO(num_particles=NUMBER, vectorize_particles=True),
    ),
    "TraceMeanField_ELBO": (model, AutoDiagonalNormal, vectorized(TraceMeanField_ELBO)),
    "TraceEnum_ELBO": (model, AutoDiagonalNormal, vectorized(TraceEnum_ELBO, strict_enumeration_warning=False)),
    "path gradient": (model, planar, path()),
    "tempered": (model, planar, path(lambda step: min(1.0, 0.3 + 0.1 * step))),
    "recorded": (looking, planar, recorded),
}


def svi_of(case, chunk_size, *, backend="replay", optim=None, **options):
    model, make_guide, make_loss = CASES[case]
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = make_guide(model)
    guide(DATA)
    optim = optim or (lambda parameters: torch.optim.Adam(parameters, lr=0.05))
    return CompiledSVI(
        model, guide, optim, make_loss(model, guide), backend=backend, chunk_size=chunk_size, clip_factor=2.0, **options
    )


def trained(case, chunk_size, **options):
    svi = svi_of(case, chunk_size, **options)
    pyro.set_rng_seed(1)
    losses = svi.run(6, DATA)
    return svi, [losses, *(value.detach().clone() for value in svi.parameters.values())]


@pytest.fixture(autouse=True)
def on_the_cpu(device):
    if device.type != "cpu":
        pytest.skip("another device takes other random numbers for other shapes")


@pytest.mark.parametrize("case", CASES)
def test_a_seed_gives_the_same_training_in_chunks(case):
    """Where a draw takes one tensor of noise, and the sizes are multiples of 16: first step eager, the others captured."""
    svi, ours = trained(case, SIZE)
    _, whole = trained(case, None, backend="eager")
    assert svi.backend == "replay" and len(svi.captures) == 1
    for own, expected in zip(ours, whole, strict=True):
        # Adam's first steps divide rounding by small gradients.
        torch.testing.assert_close(own, expected, rtol=1e-8, atol=1e-8)


def test_an_optimiser_outside_of_the_graph_and_eager_steps():
    options = {"optim": lambda parameters: torch.optim.SGD(parameters, lr=1e-3), "backend": "eager"}
    for own, expected in zip(*(trained("path gradient", size, **options)[1] for size in (SIZE, None)), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-11, atol=1e-11)


class _GivenNoise(TorchDispatchMode):
    """Normal noise from a table, row after row."""

    def __init__(self, table):
        super().__init__()
        self.table, self.start = table, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.randn.default, torch.ops.aten.normal_.default):
            result.copy_(self.table[self.start : self.start + result.numel()].reshape(result.shape))
            self.start += result.numel()
        return result


@pytest.mark.parametrize(
    ("case", "size"),
    [
        *[(case, size) for case in ("path gradient", "tempered", "recorded") for size in (1, 7)],
        ("Trace_ELBO, a plate nesting to guess", 39),
    ],
)
def test_the_same_noise_gives_the_same_loss_and_gradient(case, size):
    svi, whole = svi_of(case, size, backend="eager"), svi_of(case, None, backend="eager")
    torch.manual_seed(2)
    table = torch.randn(2 * NUMBER, dtype=torch.float64)
    found = []
    for each in (svi, whole):
        # The parameters, and the nesting of the plates.
        each.loss_and_gradients(DATA)
        with _GivenNoise(table) as noise:
            loss, gradients = each.loss_and_gradients(DATA)
        assert noise.start == len(table)
        found.append([loss, *gradients.values()])
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-11, atol=1e-11)


def test_batches_and_a_captured_step_for_each_of_their_shapes():
    results = []
    for size, backend, num_captures in ((SIZE, "replay", 2), (None, "eager", 0)):
        svi = svi_of("path gradient", size, backend=backend)
        pyro.set_rng_seed(1)
        losses = [svi.step(batch) for batch in [DATA, DATA + 1, DATA[:3], DATA, DATA[:3] - 1]]
        assert len(svi.captures) == num_captures
        results.append(torch.tensor(losses, dtype=DATA.dtype))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


def test_fresh_noise_for_every_chunk():
    svi = svi_of("path gradient", 20, backend="eager")
    svi.loss_and_gradients(DATA)
    losses = []
    real = svi.objective.loss
    svi.objective.loss = lambda *args: losses.append(real(*args)) or losses[-1]
    svi.loss_and_gradients(DATA)
    assert len(losses) == 2 and not torch.equal(*losses)


def test_the_tensors_of_a_step_are_those_of_a_chunk():
    """Nothing in the graph of a chunk has a row for each particle."""
    svi, _ = trained("path gradient", 20)
    (step,) = svi.captures._steps.values()
    chunk, update = step.program.graphs
    assert step.program.counts == (2,)
    values = [node.meta.get("val") for node in chunk.graph.nodes]
    rows = {value.shape[0] for value in values if isinstance(value, torch.Tensor) and value.dim()}
    assert 20 in rows and NUMBER not in rows
    assert not any(torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) for node in update.graph.nodes)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(None, [(None, 1.0)]), (40, [(None, 1.0)]), (64, [(None, 1.0)]), (20, [(20, 0.5)] * 2)],
)
def test_the_parts_of_a_step(size, expected):
    assert chunks.Chunks(KL(40), size).parts == expected


def test_the_last_chunk_may_be_smaller():
    parts = chunks.Chunks(KL(40), 16)
    assert parts.parts == [(16, 0.4), (16, 0.4), (8, 0.2)]
    assert parts.counted == [(16, 0.4, 2), (8, 0.2, 1)]


class _OwnELBO(Trace_ELBO):
    def differentiable_loss(self, model, guide, *args, **kwargs):
        return super().differentiable_loss(model, guide, *args, **kwargs) ** 2


def _function(model, guide, y):
    return torch.zeros(())


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (IWELBO(16), "IWELBO"),
        (RenyiELBO(num_particles=4), "RenyiELBO"),
        (TraceGraph_ELBO(num_particles=4), "TraceGraph_ELBO"),
        (_OwnELBO(num_particles=4), "_OwnELBO"),
        (fg.FlowAnnealedBootstrap(), "FlowAnnealedBootstrap"),
        (_function, "LossFunction"),
    ],
)
def test_a_loss_that_is_no_mean_over_particles_is_refused(loss, name):
    with pytest.raises(
        ValueError, match=f"mean over particles, such as Trace_ELBO, and {name} is not.*Leave chunk_size"
    ):
        CompiledSVI(model, planar(model), pyro.optim.Adam({}), loss, chunk_size=2)
    assert CompiledSVI(model, planar(model), pyro.optim.Adam({}), loss, chunk_size="auto").chunk_size is None


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (0, ValueError, "chunk_size must be at least 1, got 0"),
        (2.5, TypeError, "chunk_size must be an integer, got 2.5"),
        ("all", ValueError, "chunk_size must be a number, \"auto\" or None, got 'all'"),
    ],
)
def test_sizes_that_are_none(size, error, message):
    with pytest.raises(error, match=message):
        CompiledSVI(model, planar(model), pyro.optim.Adam({}), Trace_ELBO(), chunk_size=size)


# --- the choice of a size ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "free", "is_split"),
    [
        ("path gradient", 1e12, False),
        ("path gradient", 8e3, True),
        ("recorded", 8e3, True),
        ("TraceEnum_ELBO", 8e3, True),
    ],
)
def test_auto_splits_where_the_memory_is_too_small(case, free, is_split, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    if not is_split:
        # Where there is plenty, one forward pass tells.
        monkeypatch.delattr(memory, "predict")
    svi = svi_of(case, "auto")
    assert svi.chunk_size == "auto"
    state = torch.random.get_rng_state()
    svi._trained._settle_chunks((DATA,), {})
    assert torch.equal(state, torch.random.get_rng_state())
    assert (svi.chunk_size is not None) is is_split
    svi.run(3, DATA)
    assert len(svi.captures) == 1 and svi.objective.elbo.num_particles == NUMBER


def test_a_guide_that_is_not_set_up_is_measured():
    pyro.clear_param_store()
    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), KL(64), chunk_size="auto")
    svi.run(3, DATA)
    assert svi.chunk_size is None


def test_what_was_chosen_is_kept_with_the_state(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 8e3)
    svi, _ = trained("path gradient", "auto")
    state = svi.state_dict()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1e12)
    other = svi_of("path gradient", "auto")
    other.load_state_dict(state, DATA)
    assert other.chunk_size == svi.chunk_size < NUMBER


def test_a_fit_says_how_it_was_split(monkeypatch):
    fit = functools.partial(fg.fit, model, num_steps=3, num_particles=32, whiten=None, seed=0, progress=False)
    assert fit(planar(model), DATA).chunk_size is None
    assert fit(planar(model), DATA, chunk_size=10).chunk_size == 10
    monkeypatch.setattr(memory, "free_bytes", lambda device: 8e3)
    assert fit(planar(model), DATA).chunk_size < 32


# --- the prediction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(1100, None), (1099, 50), (600, 50), (599, 34), (111, 1), (0, 1)],
)
def test_as_many_particles_as_fit(limit, expected):
    """100 particles, of which each takes 10 bytes beside 100 for all: in chunks of nearly the same size."""
    assert memory.fitting(memory.Prediction([0, 100], [1, 10]), 100, limit) == expected


def test_the_peak_is_predicted_operation_by_operation():
    """Where one number of particles decides here, and another there: 5 + 3n bytes against 20 + n."""
    prediction = memory.Prediction([5, 20], [3, 1])
    assert [prediction.of(number) for number in (2, 10)] == [22, 35]
    assert [prediction.most(limit) for limit in (22, 35)] == [2, 10]


def test_what_is_freed_does_not_count():
    """Three tensors of 100 doubles a particle at the most, and one of 1000 that is there whatever their number."""

    def run(number):
        kept = torch.zeros(1000, dtype=torch.float64)
        x = torch.zeros(number, 100, dtype=torch.float64)
        for _ in range(5):
            x = x + 1.0
        y = x * 2
        z = y.view(-1) * 3
        del y
        return z.sum() + x.sum() + kept.sum()

    prediction = memory.predict(run)
    assert prediction.of(50) == 8000 + 3 * 50 * 800


def test_the_memory_of_a_step_is_what_was_predicted():
    """For many particles, by steps with few."""
    svi = svi_of("path gradient", None, backend="eager")
    run = functools.partial(svi._trained._gradients_of, args=(DATA,), kwargs={})
    with memory._HeldBytes() as held:
        run(200)
    assert memory.predict(run).of(200) == pytest.approx(max(held.series), rel=0.01)


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("max", "5", float("inf")), ("1000", "400", 600.0), ("1000", "2000", 0.0), (None, None, float("inf"))],
)
def test_what_a_container_leaves(limit, used, expected, tmp_path):
    for name, value in (("max", limit), ("current", used)):
        if value is not None:
            (tmp_path / f"memory.{name}").write_text(value + "\n")
    assert memory._left_to_group(tmp_path) == expected


def test_free_memory_of_devices():
    assert memory.free_bytes(torch.device("cpu")) > 0
    assert memory.free_bytes(torch.device("meta")) == float("inf")
