"""Several independent fits, of which the best is kept."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from fits import Y, faulty, quick
from models import conjugate
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg


@pytest.mark.parametrize(
    "Guide", [lambda model: fg.AutoPlanar(model, num_layers=2), AutoNormal], ids=["flow", "normal"]
)
def test_the_best_of_several_restarts_is_kept(Guide):
    y = torch.tensor(Y)
    guide = Guide(conjugate)
    options = {"whiten": None} if isinstance(guide, fg.AutoFlow) else {}
    fit = quick(conjugate, guide, y, num_restarts=3, num_steps=15, **options)
    elbos = [float(draws.elbo()) for draws in fit.restarts]
    assert len(elbos) == 3
    assert len({round(elbo, 9) for elbo in elbos}) == 3
    assert float(fit.elbo) == max(elbos)
    # The guide of the result is the best one, and the user's own guide is as well.
    for best in (fit.guide, guide):
        again = fg.draw(conjugate, best, y, num_samples=10_000).elbo()
        assert abs(again.value - fit.elbo.value) < 4 * (again.se**2 + fit.elbo.se**2) ** 0.5 + 1e-6
        assert abs(again.value - min(elbos)) > abs(again.value - fit.elbo.value)
    own = guide.state_dict()
    for name, value in fit.guide.state_dict().items():
        assert torch.equal(own[name], value), name


def test_a_restart_is_the_fit_of_its_seed():
    y = torch.tensor(Y)
    several = quick(conjugate, fg.AutoPlanar(conjugate, num_layers=2), y, num_restarts=2, seed=5, whiten=None)
    for index in (0, 1):
        pyro.set_rng_seed(77)  # What was drawn before does not matter.
        single = quick(conjugate, fg.AutoPlanar(conjugate, num_layers=2), y, seed=5 + index, whiten=None)
        torch.testing.assert_close(several.restarts[index].values["mu"], single.draws.values["mu"])


def test_restarts_of_a_model_with_a_network():
    torch.manual_seed(0)
    network = torch.nn.Linear(1, 1)

    def model(y):
        pyro.module("network", network)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(network(mu.unsqueeze(-1)).squeeze(-1), 1.0), obs=y)

    y = torch.tensor(Y)
    guide = fg.AutoPlanar(model, num_layers=1)
    fit = quick(model, guide, y, num_restarts=2, whiten=None, num_steps=60)
    again = fg.draw(model, guide, y, num_samples=10_000).elbo()
    assert abs(again.value - fit.elbo.value) < 4 * (again.se**2 + fit.elbo.se**2) ** 0.5 + 1e-6
    for name, leaf in network.named_parameters():
        assert torch.equal(fit.parameters[f"network$$${name}"], leaf)


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
    assert caught[0].filename == __file__
