"""A fit that goes on in rounds."""

import functools
import importlib
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import conjugate
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.training import rounds
from pyro_flowguides.training.rounds import Standing, doubling_rounds, is_worth_another

# The package has a function of that name.
FIT = importlib.import_module("pyro_flowguides.training.fit")
Y = [0.3, 1.4, 2.2, 0.7, 1.9]


@pytest.fixture
def short_rounds(monkeypatch):
    monkeypatch.setattr(rounds, "FIRST_NUM_STEPS", 10)
    monkeypatch.setattr(FIT, "NUM_STEPS", 15)


def skewed():
    """What no short training of a diagonal map reaches."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(0.0, (1.5 * mu).exp()))


def subsampled(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])


def fit(model, guide, *args, **options):
    return fg.fit(model, guide, *args, **{"seed": 0, "progress": False, "backend": "eager", **options})


def scale_only(model):
    return fg.AutoFlow(model, fg.transforms.Affine, affine=None)


def test_rounds_double():
    assert doubling_rounds(256, fixed=False) == ((1000, 256), (2000, 512), (4000, 1024))
    assert doubling_rounds(64, fixed=True) == ((1000, 64), (2000, 64), (4000, 64))


def test_spread_is_not_decided_by_a_few_draws():
    log_weights = torch.linspace(-0.1, 0.1, 10_000)
    expected = 0.2 / 12**0.5
    assert rounds.spread(log_weights) == pytest.approx(expected, rel=3e-3)
    log_weights[0], log_weights[-2:] = -torch.inf, 20.0
    assert rounds.spread(log_weights) == pytest.approx(expected, rel=3e-3)
    log_weights[:20] = -torch.inf
    assert not math.isfinite(rounds.spread(log_weights))


@pytest.mark.parametrize(
    ("standings", "expected"),
    [
        ([Standing(-3.0, 0.01, 0.04)], False),
        ([Standing(-3.0, 0.01, 0.2)], True),
        ([Standing(-3.0, 0.01, 0.2), Standing(-2.9, 0.01, 0.1)], True),
        ([Standing(-3.0, 0.01, 0.2), Standing(-2.9, 0.01, 0.01)], False),
        ([Standing(-3.0, 0.01, 0.2), Standing(-2.99, 0.01, 0.1)], False),
        ([Standing(-3.0, 0.01, 0.2), Standing(-3.1, 0.01, 0.1)], False),
        ([Standing(-math.inf, math.nan, math.nan)], True),
        ([Standing(-3.0, 0.01, 0.2), Standing(-math.inf, math.nan, math.nan)], True),
        ([Standing(-math.inf, math.nan, math.nan), Standing(-3.0, 0.01, 0.2)], True),
    ],
)
def test_when_another_round_may_help(standings, expected):
    assert is_worth_another(standings) is expected


@pytest.mark.usefixtures("short_rounds")
def test_an_exact_guide_has_one_round():
    assert fit(conjugate, fg.AutoFlow(conjugate), torch.tensor(Y)).losses.shape == (10,)


@pytest.mark.usefixtures("short_rounds")
def test_a_poor_guide_has_all_rounds_while_it_gains():
    steps, particles = [], []

    def watched():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        particles.append(mu.numel())
        pyro.sample("x", dist.Normal(0.0, (1.5 * mu).exp()))

    result = fit(watched, fg.AutoFlow(watched), whiten=None, callbacks=[lambda step, loss: steps.append(step)])
    assert steps == list(range(70))
    assert result.losses.shape == (70,)
    assert [particles.count(number) for number in (256, 512, 1024)] == [10, 20, 40]


@pytest.mark.usefixtures("short_rounds")
def test_a_guide_that_gains_nothing_stops_after_two_rounds(monkeypatch):
    monkeypatch.setattr(FIT, "LEARNING_RATE", 0.0)
    assert fit(skewed, scale_only(skewed), num_particles=4).losses.shape == (30,)


def test_the_learning_rate_is_back_at_the_start_of_a_round(short_rounds):
    progress = []

    def schedule(fraction):
        progress.append(fraction)
        return 1.0

    fit(skewed, fg.AutoFlow(skewed), num_particles=4, whiten=None, schedule=schedule)
    assert progress.count(0.0) >= 3
    assert max(progress) < 1


@pytest.mark.usefixtures("short_rounds")
@pytest.mark.parametrize(
    ("make", "args", "options"),
    [
        (AutoNormal, (), {"loss": Trace_ELBO()}),
        (AutoNormal, (), {"optim": pyro.optim.Adam({"lr": 0.01})}),
        (AutoNormal, (), {"tolerance": 0.0}),
        (AutoNormal, (), {"num_steps": 15}),
        (AutoNormal, (torch.tensor(Y),), {"batches": [torch.tensor(Y)]}),
        (AutoNormal, (torch.tensor(Y),), {}),
        (functools.partial(fg.AutoFlow, flow=lambda dim: fg.transforms.Residual(dim, log_det="roulette")), (), {}),
    ],
    ids=["loss", "Pyro's optimiser", "tolerance", "num_steps", "batches", "subsampled", "random log q"],
)
def test_one_round_where_the_weights_cannot_end_it(make, args, options):
    model = subsampled if args else skewed
    assert fit(model, make(model), *args, **options).losses.shape == (15,)


def test_when_a_round_did_harm():
    assert not rounds.got_worse([Standing(-3.0, 0.01, 0.2)])
    assert not rounds.got_worse([Standing(-3.0, 0.01, 0.2), Standing(-3.02, 0.01, 0.2)])
    assert rounds.got_worse([Standing(-3.0, 0.01, 0.2), Standing(-3.1, 0.01, 0.2)])
    assert rounds.got_worse([Standing(-3.0, 0.01, 0.2), Standing(-math.inf, math.nan, math.nan)])
    assert not rounds.got_worse([Standing(-math.inf, math.nan, math.nan), Standing(-math.inf, math.nan, math.nan)])


@pytest.mark.usefixtures("short_rounds")
def test_a_round_that_does_harm_is_taken_back():
    values = []

    def schedule(progress):
        return 1.0 if len(values) < 10 else 30.0

    def remember(step, loss):
        values.append([parameter.detach().clone() for parameter in guide.parameters()])

    guide = fg.AutoFlow(skewed)
    result = fit(skewed, guide, num_particles=4, schedule=schedule, callbacks=[remember])
    assert len(result.losses) == 30
    for parameter, expected, last in zip(guide.parameters(), values[9], values[-1], strict=True):
        assert torch.equal(parameter, expected)
        assert not torch.equal(parameter, last)
    assert abs(result.elbo.value - fg.draw(skewed, guide, num_samples=10_000, seed=1).elbo.value) < 0.1


@pytest.mark.usefixtures("short_rounds")
def test_a_callback_ends_all_rounds():
    result = fit(skewed, scale_only(skewed), callbacks=[lambda step, loss: step == 12])
    assert result.losses.shape == (13,)


class Killed(Exception):
    pass


@pytest.mark.usefixtures("short_rounds")
@pytest.mark.parametrize(
    ("kill_at", "harm"), [(5, False), (10, False), (17, False), (29, False), (35, False), (17, True)]
)
def test_a_resumed_fit_has_the_rounds_of_one_without_interruption(kill_at, harm, tmp_path, monkeypatch):
    if harm:
        monkeypatch.setattr(FIT, "got_worse", lambda standings: len(standings) == 2)

    def run(path, kill_at=None, **options):
        def kill(step, loss):
            if step == kill_at:
                raise Killed

        pyro.clear_param_store()
        guide = scale_only(skewed)
        options = {"checkpoint": path, "checkpoint_every": 4, "whiten": None, "num_particles": 4, **options}
        return fit(skewed, guide, callbacks=[kill], **options)

    whole = run(tmp_path / "whole.pt")
    path = tmp_path / "killed.pt"
    with pytest.raises(Killed):
        run(path, kill_at)
    resumed = run(path, resume=True)
    assert len(whole.losses) > (25 if harm else 35)
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    assert resumed.elbo == whole.elbo
    with pytest.raises(ValueError, match=r"of a fit with num_steps = 10 \+ 20 \+ 40, here it is 50"):
        run(path, resume=True, num_steps=50)
