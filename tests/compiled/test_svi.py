"""CompiledSVI: the same steps as Pyro's SVI, wrong options, and steps that take no memory."""

import functools
import os

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from models import conjugate
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from svi_cases import OPTIMIZERS, compiled, observations, parameters, per_parameter

from pyro_flowguides import CompiledSVI


@pytest.fixture
def y(dtype):
    return observations(dtype)


def trajectory(make, num_steps, y):
    """Losses and parameters of some steps from the same start."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = make(AutoNormal(conjugate))
    losses = []
    for _ in range(num_steps):
        losses.append(svi.step(y))
        if isinstance(svi.optim, pyro.optim.PyroLRScheduler):
            svi.optim.step()
    return losses, parameters()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["replay", "eager"])
def test_the_same_steps_as_pyro(name, backend, y):
    optimizer = OPTIMIZERS[name]
    ours = trajectory(lambda guide: CompiledSVI(conjugate, guide, optimizer(), Trace_ELBO(), backend=backend), 12, y)
    theirs = trajectory(lambda guide: SVI(conjugate, guide, optimizer(), Trace_ELBO()), 12, y)
    tolerance = 1e-10 if y.dtype == torch.float64 else 1e-4
    np.testing.assert_allclose(ours[0], theirs[0], rtol=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for key, value in ours[1].items():
        torch.testing.assert_close(value, theirs[1][key], rtol=tolerance, atol=tolerance)


def test_steps_and_runs_are_the_same(y):
    def losses(advance):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        return advance(compiled(conjugate, backend="replay"))

    by_step = losses(lambda svi: [svi.step(y) for _ in range(60)])
    by_run = losses(lambda svi: svi.run(60, y).tolist())
    assert by_step == by_run


def test_the_step_leaves_buffers_as_pyro_does():
    """The running means of BatchNorm, and tensors that a model counts in, see each step once."""
    ends = []
    for make in (
        SVI,
        functools.partial(CompiledSVI, backend="replay"),
        functools.partial(CompiledSVI, backend="eager"),
    ):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        norm, calls = torch.nn.BatchNorm1d(2), torch.zeros(())

        def model(x, norm=norm, calls=calls):
            calls.add_(1)
            pyro.module("norm", norm)
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(mu, 1.0).expand([2]).to_event(1), obs=norm(x))

        x = torch.tensor([[0.1, 2.0], [0.7, -1.0], [0.4, 0.3]])
        svi = make(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        svi.guide(x)  # Runs the model once, for the shapes of its sites.
        for _ in range(4):
            svi.step(x)
        ends.append((norm.running_mean.clone(), norm.running_var.clone(), int(norm.num_batches_tracked), float(calls)))
    for end in ends[1:]:
        torch.testing.assert_close(end[:2], ends[0][:2])
        assert end[2:] == ends[0][2:]


def test_other_arguments_may_use_other_parameters():
    def model(y, shifted):
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc if shifted else 0.0, scale), obs=y)

    def guide(y, shifted):
        pass

    y = torch.tensor([1.0, 2.0, 4.0])
    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), backend="replay")
    for step in range(4):
        for shifted in (False, True):
            expected = Trace_ELBO().loss(model, guide, y, shifted)
            assert svi.step(y, shifted) == pytest.approx(expected, rel=1e-5)
            if step and shifted:
                assert svi.loss_and_gradients(y, True)[1]["loc"] != 0
                assert svi.loss_and_gradients(y, False)[1]["loc"] == 0
    assert len(svi.captures) == 2


@pytest.mark.parametrize("kind", ["backend", "ema_decay", "optim", "schedule", "no gradient"])
def test_wrong_options(kind, y):
    adam = pyro.optim.Adam({"lr": 0.1})
    if kind == "backend":
        with pytest.raises(ValueError, match="backend must be one of auto, replay, inductor, eager, got 'jit'"):
            CompiledSVI(conjugate, AutoNormal(conjugate), adam, Trace_ELBO(), backend="jit")
    elif kind == "ema_decay":
        with pytest.raises(ValueError, match="ema_decay must be between 0 and 1, got 1.5"):
            CompiledSVI(conjugate, AutoNormal(conjugate), adam, Trace_ELBO(), ema_decay=1.5)
    elif kind == "optim":
        with pytest.raises(TypeError, match="optim must be a Pyro optimiser or a function"):
            CompiledSVI(conjugate, AutoNormal(conjugate), 0.1, Trace_ELBO())
    elif kind == "schedule":
        with pytest.raises(ValueError, match="takes no schedule; use Pyro's own"):
            CompiledSVI(
                conjugate,
                AutoNormal(conjugate),
                pyro.optim.Adam(per_parameter),
                Trace_ELBO(),
                schedule=lambda step: 1.0,
            )
    else:
        svi = CompiledSVI(lambda: None, lambda: None, adam, Trace_ELBO())
        with pytest.raises(ValueError, match="no gradient to any parameter"):
            svi.step()


@pytest.mark.parametrize("backend", ["eager", "replay"])
def test_the_average_takes_the_place_of_the_parameters(backend, y):
    svi = compiled(conjugate, backend=backend, ema_decay=0.99)
    visited = []
    for _ in range(6):
        svi.step(y)
        visited.append(svi.snapshot().parameters)
    svi.use_ema()
    for name, value in svi.parameters.items():
        # A memory that long is the plain mean of a few steps.
        torch.testing.assert_close(value.detach(), torch.stack([each[name] for each in visited]).mean(0))


def test_no_average_without_a_decay(y):
    svi = compiled(conjugate, backend="eager")
    svi.step(y)
    before = parameters()
    with pytest.raises(ValueError, match="no average of the parameters is kept; give ema_decay="):
        svi.use_ema()
    assert all(torch.equal(before[name], value) for name, value in parameters().items())


def resident_megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_replays_take_no_memory(y):
    svi = compiled(conjugate, backend="replay")
    svi.run(2000, y)
    sizes = []
    for _ in range(10):
        svi.run(2000, y)
        sizes.append(resident_megabytes())
    # One number kept for each step would be half a megabyte.
    assert np.polyfit(np.arange(10), sizes, 1)[0] * 10 < 2.0
