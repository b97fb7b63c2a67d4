"""Several independent fits, of which the best is kept."""

import fits
import pyro
import pyro.distributions as dist
import pytest
import torch
from fits import Y, faulty, quick
from models import conjugate
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.training import loop


def ready(Guide, model):
    """A guide; AutoNormal, whose restarts begin with the parameters it has, is set up."""
    guide = Guide(model)
    if not isinstance(guide, fg.AutoFlow):
        pyro.set_rng_seed(5)
        with pyro.get_param_store().scope():
            guide(torch.tensor(Y))
    return guide


@pytest.mark.parametrize(
    "Guide", [lambda model: fg.AutoPlanar(model, num_layers=2), AutoNormal], ids=["flow", "normal"]
)
def test_the_best_of_several_restarts_is_kept(Guide):
    y = torch.tensor(Y)
    guide, start = ready(Guide, conjugate), ready(Guide, conjugate)
    options = {"whiten": None} if isinstance(guide, fg.AutoFlow) else {}
    fit = quick(conjugate, guide, y, num_restarts=3, num_steps=15, **options)
    elbos = [float(draws.elbo) for draws in fit.restarts]
    assert len(elbos) == 3
    assert len({round(elbo, 9) for elbo in elbos}) == 3
    assert float(fit.elbo) == max(elbos)
    # The guide of the result is the guide of the best seed, and the user's own guide has its parameters.
    seed = elbos.index(max(elbos))
    expected = quick(conjugate, start, y, seed=seed, num_steps=15, **options).guide.state_dict()
    for own in (fit.guide.state_dict(), guide.state_dict()):
        for name, value in expected.items():
            assert torch.equal(own[name], value), name


def test_a_restart_is_the_fit_of_its_seed():
    y = torch.tensor(Y)
    several = quick(conjugate, fg.AutoPlanar(conjugate, num_layers=2), y, num_restarts=2, seed=5, whiten=None)
    for index in (0, 1):
        pyro.set_rng_seed(77)  # What was drawn before does not matter.
        single = quick(conjugate, fg.AutoPlanar(conjugate, num_layers=2), y, seed=5 + index, whiten=None)
        assert torch.equal(several.restarts[index].values["mu"], single.draws.values["mu"])


def with_network():
    """A model with a network that it closes over, and a parameter."""
    torch.manual_seed(0)
    network = torch.nn.Linear(1, 1)

    def model(y):
        pyro.module("network", network)
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(network(mu.unsqueeze(-1)).squeeze(-1), scale), obs=y)

    return model, network


@pytest.mark.parametrize(
    "Guide", [lambda model: fg.AutoPlanar(model, num_layers=1), AutoNormal], ids=["flow", "normal"]
)
def test_every_restart_begins_with_the_same_model(Guide):
    """Each restart is the fit of its seed from the same network, and the network ends with the parameters of the best."""
    y = torch.tensor(Y)
    model, network = with_network()
    guide = ready(Guide, model)
    options = {"whiten": "init"} if isinstance(guide, fg.AutoFlow) else {}
    several = quick(model, guide, y, num_restarts=3, **options)
    singles = []
    for seed in range(3):
        model = with_network()[0]
        singles.append(quick(model, ready(Guide, model), y, seed=seed, **options))
    for draws, single in zip(several.restarts, singles, strict=True):
        assert torch.equal(draws.values["mu"], single.draws.values["mu"])
    best = max(singles, key=lambda fit: float(fit.elbo))
    assert len({float(single.elbo) for single in singles}) == 3
    assert several.parameters.keys() == {"network$$$weight", "network$$$bias", "scale"}
    for name, value in best.parameters.items():
        assert torch.equal(several.parameters[name], value)
    for name, leaf in network.named_parameters():
        assert torch.equal(best.parameters[f"network$$${name}"], leaf)


def test_a_second_fit_continues_with_the_best_of_the_restarts():
    y = torch.tensor(Y)
    model, network = with_network()
    guide = AutoNormal(model)
    several = quick(model, guide, y, num_restarts=2)
    again = quick(model, guide, y, num_steps=1, optim=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    assert again.parameters.keys() == several.parameters.keys()
    for name, value in several.parameters.items():
        assert torch.equal(again.parameters[name], value), name
    assert torch.equal(again.guide.locs.mu, several.guide.locs.mu)


def test_an_interrupt_ends_the_restarts():
    calls = []

    def interrupt(step, loss):
        calls.append(step)
        if len(calls) == 8:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted after 3 of 5 steps"):
        fit = quick(
            conjugate, AutoNormal(conjugate), torch.tensor(Y), num_steps=5, num_restarts=4, callbacks=[interrupt]
        )
    assert len(fit.restarts) == 2


def test_where_all_restarts_fail_the_first_error_is_raised():
    broken = torch.tensor(False)
    model = faulty(broken)

    def break_three(step, loss):
        broken.fill_(step < 3)

    with (
        pytest.warns(UserWarning, match="restart . of 2 failed"),
        pytest.raises(RuntimeError, match="3 steps in a row .* up to step 6;"),
    ):
        quick(model, AutoNormal(model), torch.tensor(Y), num_restarts=2, max_nonfinite_steps=3, callbacks=[break_three])


def test_an_interrupt_before_the_first_restart_is_through_is_raised(monkeypatch):
    def interrupt(self, saved):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Loop, "_choose_rounds", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quick(conjugate, AutoNormal(conjugate), torch.tensor(Y), num_restarts=2)


def test_a_restart_that_is_interrupted_outside_of_its_steps_is_left_out(monkeypatch):
    real, runs = loop.Loop._choose_rounds, []

    def interrupt_second(self, saved):
        runs.append(1)
        if len(runs) == 2:
            raise KeyboardInterrupt
        return real(self, saved)

    monkeypatch.setattr(loop.Loop, "_choose_rounds", interrupt_second)
    fit = quick(conjugate, AutoNormal(conjugate), torch.tensor(Y), num_steps=2, num_restarts=4)
    assert (len(fit.restarts), fit.interrupted) == (1, True)
    whole = quick(conjugate, AutoNormal(conjugate), torch.tensor(Y), num_steps=2, num_restarts=2)
    assert (len(whole.restarts), whole.interrupted) == (2, False)


def test_a_restart_that_fails_is_left_out():
    broken = torch.tensor(False)
    model = faulty(broken)
    steps = []

    def break_second(step, loss):
        steps.append(step)
        broken.fill_(7 <= len(steps) < 11)

    with pytest.warns(UserWarning, match="restart 1 of 3 failed: .* in a row") as caught:
        fit = quick(
            model,
            AutoNormal(model),
            torch.tensor(Y),
            num_steps=6,
            num_restarts=3,
            max_nonfinite_steps=3,
            callbacks=[break_second],
        )
    assert len(fit.restarts) == 2
    # At the line that calls fit.
    assert caught[0].filename == fits.__file__
