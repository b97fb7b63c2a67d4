"""Parameters and their vectors: cleared, loaded, moved, frozen and cast parameters are the ones that steps train."""

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from models import conjugate
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from svi_cases import at_two, compiled, observations, parameters, scaled

import pyro_flowguides as fg
from pyro_flowguides import CompiledSVI


@pytest.fixture
def y(dtype):
    return observations(dtype)


def test_a_cleared_store_starts_again():
    for guide in (at_two, AutoDelta(scaled(lambda: 1.0))):
        pyro.clear_param_store()
        svi = compiled(scaled(lambda: 1.0), guide, backend="replay")
        svi.run(3)
        pyro.clear_param_store()
        svi.step()
        assert list(pyro.get_param_store().keys())
        before = parameters()
        svi.step()
        assert any(not torch.equal(before[name], value) for name, value in parameters().items())
    pyro.clear_param_store()
    svi = compiled(scaled(lambda: 1.0), at_two, backend="replay")
    first = svi.step()
    svi.step()
    pyro.clear_param_store()
    assert svi.step() == first


def test_a_loaded_store_is_trained_on(tmp_path, y):
    svi = compiled(conjugate, backend="replay")
    svi.run(3, y)
    path = tmp_path / "params.pt"
    pyro.get_param_store().save(path)
    saved = parameters()
    svi.run(3, y)
    pyro.get_param_store().load(path)
    svi.step(y)
    now = parameters()
    for name, value in now.items():
        assert not torch.equal(value, saved[name])
        torch.testing.assert_close(value, saved[name], atol=0.2, rtol=0.2)
    torch.testing.assert_close(svi.guide.median(y)["mu"], now["AutoNormal.locs.mu"])


def test_a_state_loaded_between_steps(y):
    guide = fg.AutoPlanar(conjugate, num_layers=1)
    svi = compiled(conjugate, guide, backend="replay", rate=0.0)
    svi.step(y)
    state = {name: value + 0.5 if value.is_floating_point() else value for name, value in guide.state_dict().items()}
    guide.load_state_dict(state)
    pyro.set_rng_seed(1)
    loss = svi.step(y)
    pyro.set_rng_seed(1)
    assert loss == pytest.approx(Trace_ELBO().loss(conjugate, guide, y), rel=1e-5)
    for name, value in guide.state_dict().items():
        torch.testing.assert_close(value, state[name])


def test_another_dtype_between_steps(y):
    with pyro.settings.context(module_local_params=True):
        guide = fg.AutoPlanar(conjugate, num_layers=1)
        svi = compiled(conjugate, guide, backend="replay")
        svi.run(3, y.float())
        guide.to(torch.float64)
        before = [parameter.detach().clone() for parameter in guide.parameters()]
        svi.run(3, y.double())
        for parameter, old in zip(guide.parameters(), before, strict=True):
            assert parameter.dtype == torch.float64
            assert not torch.equal(parameter, old)


def test_a_frozen_parameter_stays(y):
    svi = compiled(conjugate, backend="replay")
    svi.step(y)
    loc = svi.parameters["AutoNormal.locs.mu"]
    loc.requires_grad_(False)
    before = parameters()
    svi.run(3, y)
    after = parameters()
    assert torch.equal(after["AutoNormal.locs.mu"], before["AutoNormal.locs.mu"])
    assert not torch.equal(after["AutoNormal.scales.mu"], before["AutoNormal.scales.mu"])
    loc.requires_grad_(True)
    svi.run(3, y)
    assert not torch.equal(parameters()["AutoNormal.locs.mu"], before["AutoNormal.locs.mu"])


def test_parameters_on_several_devices():
    if not torch.cuda.is_available():
        pytest.skip("needs two devices")

    def guide():
        pyro.sample("x", dist.Delta(pyro.param("x_at", torch.zeros((), device="cpu"))))
        pyro.sample("z", dist.Delta(pyro.param("z_at", torch.zeros((), device="cuda"))))

    def model():
        pyro.sample("x", dist.Normal(torch.zeros((), device="cpu"), 1.0))
        pyro.sample("z", dist.Normal(torch.zeros((), device="cuda"), 1.0))

    with pytest.raises(ValueError, match="on several devices"):
        compiled(model, guide).step()


def test_a_parameter_that_comes_later_leaves_the_counts_as_they_are(y):
    def model(y, more):
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    def guide(y, more):
        loc = pyro.param("loc", torch.tensor(0.5))
        pyro.sample("mu", dist.Normal(loc + pyro.param("more", torch.tensor(0.1)) if more else loc, 1.0))

    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), backend="replay")
    for number, more in enumerate([False, False, False, True, True]):
        svi.step(y, more)
        assert svi.scalars.step == number + 1


@pytest.mark.parametrize("backend", ["eager", "replay"])
def test_values_that_were_given_other_memory_are_taken_over(backend, y):
    """As ``Module.to`` does it."""
    svi = compiled(conjugate, backend=backend, rate=0.0)
    svi.run(3, y)
    for number, leaf in enumerate(svi.parameters.values()):
        leaf.data = leaf.data.clone() + 1 + number
    moved = {name: leaf.detach().clone() for name, leaf in svi.parameters.items()}
    pyro.set_rng_seed(1)
    expected = Trace_ELBO().loss(conjugate, svi.guide, y)
    pyro.set_rng_seed(1)
    assert svi.step(y) == pytest.approx(expected, rel=1e-5)
    for name, value in svi.snapshot().parameters.items():
        assert torch.equal(value, moved[name])
        assert torch.equal(svi.parameters[name], moved[name])


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_parameter_that_comes_later_leaves_what_is_kept_for_the_others(ema_decay):
    """The moments of Adam, and the average: the steps of the first are those of a training without the second."""

    def model(with_second):
        pyro.factor("near 3", -((pyro.param("first", torch.tensor(0.0)) - 3) ** 2))
        if with_second:
            pyro.factor("near 5", -((pyro.param("second", torch.zeros(2)) - 5) ** 2).sum())

    ends = []
    for later in (False, True):
        pyro.clear_param_store()
        svi = CompiledSVI(
            model,
            lambda with_second: None,
            pyro.optim.Adam({"lr": 0.3}),
            Trace_ELBO(),
            backend="eager",
            ema_decay=ema_decay,
        )
        for step in range(8):
            svi.step(later and step >= 4)
        assert set(svi.parameters) == ({"first", "second"} if later else {"first"})
        ends.append(svi.snapshot().rows["first"])
    torch.testing.assert_close(*ends)
    assert len(ends[0]) == (3 if ema_decay is None else 4)
    assert bool((ends[0] != 0).all())
