"""Snapshots: by name, bit for bit, of what is trained and of nothing else; also in another object and from a file."""

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from models import conjugate
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides import CompiledSVI
from pyro_flowguides.compiled.snapshot import Snapshot


@pytest.fixture
def y(dtype):
    return torch.tensor([0.3, 1.4, 2.2, 0.7, 1.9], dtype=dtype)


class Counting(torch.nn.Module):
    """A model with parameters, buffers, and a buffer that nobody writes to."""

    def __init__(self, dtype):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(1, dtype=dtype)
        self.register_buffer("data", torch.arange(5.0, dtype=dtype))

    def forward(self, y):
        pyro.module("norm", self.norm)
        mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 1.0))
        with pyro.plate("plate", len(y)):
            pyro.sample("y", dist.Normal(mu + self.norm(self.data.unsqueeze(-1)).squeeze(-1), 1.0), obs=y)


def per_parameter(name):
    return {"lr": 0.1, "momentum": 0.9}


OPTIMIZERS = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.05}),
    "SGD on vectors": lambda: pyro.optim.SGD({"lr": 0.01, "momentum": 0.9}),
    "Pyro's own": lambda: pyro.optim.SGD(per_parameter),
    "several groups": lambda: (
        lambda leaves: torch.optim.SGD(
            [{"params": [leaf], "lr": 0.01 * (place + 1)} for place, leaf in enumerate(leaves)], momentum=0.9
        )
    ),
}


def training(y, optimizer="Adam", **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model = Counting(y.dtype)
    options = {"backend": "replay", **options}
    return CompiledSVI(model, AutoNormal(model), OPTIMIZERS[optimizer](), Trace_ELBO(), **options)


def everything(svi):
    values = dict(pyro.get_param_store().items())
    return {name: value.detach().clone() for name, value in (*values.items(), *svi.model.state_dict().items())}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("backend", ["replay", "eager"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_steps_again(optimizer, backend, y):
    svi = training(y, optimizer, backend=backend, ema_decay=0.9)
    svi.run(5, y)
    snapshot, random_state, before = svi.snapshot(), torch.random.get_rng_state(), everything(svi)
    losses = svi.run(5, y)
    after = everything(svi)
    assert not torch.equal(after["norm.running_mean"], before["norm.running_mean"])
    svi.restore(snapshot)
    assert_equal(everything(svi), before)
    torch.random.set_rng_state(random_state)
    assert torch.equal(svi.run(5, y), losses)
    assert_equal(everything(svi), after)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_in_another_object_from_a_file(optimizer, y, tmp_path):
    svi = training(y, optimizer)
    svi.run(5, y)
    torch.save(svi.snapshot().state_dict(), tmp_path / "snapshot.pt")
    random_state = torch.random.get_rng_state()
    losses = svi.run(5, y)
    after = everything(svi)

    again = training(y, optimizer)
    state = torch.load(tmp_path / "snapshot.pt", weights_only=True)
    again.restore(Snapshot.from_state_dict(state), y)
    torch.random.set_rng_state(random_state)
    assert torch.equal(again.run(5, y), losses)
    assert_equal(everything(again), after)


def test_a_snapshot_before_the_first_step_changes_nothing(y):
    svi = training(y)
    svi.guide(y)
    before = everything(svi)
    pyro.set_rng_seed(1)
    state = torch.random.get_rng_state()
    snapshot = svi.snapshot(y)
    assert_equal(everything(svi), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert svi.num_steps == 0
    svi.run(3, y)
    svi.restore(snapshot)
    assert_equal(everything(svi), before)


def test_of_the_store_it_holds_what_is_trained(y):
    svi = training(y)
    stranger = pyro.param("stranger", torch.tensor(1.0))
    svi.run(3, y)
    snapshot = svi.snapshot()
    assert set(snapshot.parameters) == {"AutoNormal.locs.mu", "AutoNormal.scales.mu", "norm$$$weight", "norm$$$bias"}
    assert set(snapshot.buffers) == {
        *("model.data", "model.norm.running_mean", "model.norm.running_var", "model.norm.num_batches_tracked"),
    }
    with torch.no_grad():
        stranger.fill_(2.0)
    svi.restore(snapshot)
    assert stranger.item() == 2.0


def test_parameters_in_another_order(y):
    """Which arguments come first decides about the order of the parameters in a vector."""

    def model(y, which):
        for name in which:
            pyro.factor(f"at {name}", -((pyro.param(name, y.new_tensor(0.0)) - ord(name)) ** 2))

    def guide(y, which):
        pass

    def steps(svi, order):
        for which in order:
            svi.step(y, which)

    svi = CompiledSVI(model, guide, pyro.optim.SGD({"lr": 0.1, "momentum": 0.9}), Trace_ELBO(), backend="eager")
    steps(svi, ["b", "a", "ab"])
    snapshot = svi.snapshot()
    assert list(snapshot.rows) == ["b", "a"]
    steps(svi, ["ab", "ab"])
    expected = svi.snapshot().parameters

    pyro.clear_param_store()
    other = CompiledSVI(model, guide, pyro.optim.SGD({"lr": 0.1, "momentum": 0.9}), Trace_ELBO(), backend="eager")
    other.restore(snapshot, y, "ab")
    steps(other, ["ab", "ab"])
    assert_equal(other.snapshot().parameters, expected)


def test_snapshots_that_do_not_fit(y):
    svi = training(y)
    svi.run(3, y)
    snapshot = svi.snapshot()
    before = everything(svi)

    other = CompiledSVI(
        conjugate, fg.AutoPlanar(conjugate, num_layers=1), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), backend="eager"
    )
    with pytest.raises(ValueError, match=r"parameter 'AutoNormal.locs.mu' has shape \[\] there and none here"):
        other.restore(snapshot, y)
    with pytest.raises(ValueError, match="of another optimiser, or one of both keeps an average"):
        training(y, ema_decay=0.9).restore(snapshot, y)
    svi = training(y)
    svi.run(3, y)
    wrong = Snapshot.from_state_dict(
        {**snapshot.state_dict(), "buffers": {**snapshot.buffers, "model.data": torch.zeros(3)}}
    )
    with pytest.raises(ValueError, match=r"buffer 'model.data' has shape \(3,\) there and \(5,\) here"):
        svi.restore(wrong)
    assert_equal(everything(svi), before)
