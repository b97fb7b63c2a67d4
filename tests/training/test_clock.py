"""A fit that has to end in time."""

import types

import pytest
import torch

import pyro_flowguides as fg
from pyro_flowguides.examples import EIGHT_SCHOOLS
from pyro_flowguides.training import clock
from pyro_flowguides.training.clock import Clock, Limit, has_time

MODEL, DATA = EIGHT_SCHOOLS.model, EIGHT_SCHOOLS.data()
OPTIONS = {"seed": 0, "progress": False, "search_modes": False}


def fit(**options):
    return fg.fit(MODEL, fg.AutoPlanar(MODEL, num_layers=2), model_kwargs=DATA, **OPTIONS, **options)


@pytest.fixture
def now(monkeypatch):
    """The time, which a test sets."""
    now = types.SimpleNamespace(value=100.0)
    monkeypatch.setattr(clock, "time", types.SimpleNamespace(perf_counter=lambda: now.value))
    return now


def test_progress_is_that_of_the_steps_or_of_the_time(now):
    watch = Clock(1000, end=110.0)
    for time, step, progress, seconds_left in [
        (100.0, 0, 0.0, 10.0),
        (101.0, 500, 0.5, 9.0),
        (107.0, 600, 0.7, 3.0),
        (111.0, 601, 1.0, 0.0),
    ]:
        now.value = time
        watch.look(step)
        assert watch.progress == pytest.approx(progress) and watch.seconds_left == pytest.approx(seconds_left)


def test_steps_that_there_is_time_for(now):
    watch = Clock(1000, end=110.0)
    assert watch.steps_left(0) == 0
    now.value = 104.0
    watch.look(40)
    assert watch.steps_left(40) == 60
    now.value = 104.4
    watch.look(900)
    assert watch.steps_left(900) == 100


def test_a_clock_whose_time_is_up_before_it_begins(now):
    watch = Clock(1000, end=99.0)
    watch.look(0)
    assert (watch.progress, watch.seconds_left, watch.steps_left(1)) == (1.0, 0.0, 0)


def test_with_more_time_than_it_takes_a_fit_is_the_same():
    limited, free = (fit(num_steps=60, num_particles=8, max_seconds=limit) for limit in (1e6, None))
    for ours, theirs in zip(limited.guide.parameters(), free.guide.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert len(limited.losses) == 60


def test_callbacks_see_every_step():
    seen = []
    fit(num_steps=20, num_particles=8, max_seconds=1e6, callbacks=[lambda step, loss: seen.append(step)])
    assert seen == list(range(20))


def test_without_time_there_is_a_step_and_a_verdict():
    result = fit(max_seconds=1e-3)
    assert len(result.losses) == 1
    assert not result.interrupted
    assert len(result.draws) == 10_000 and str(result.verdict)


def test_no_round_is_begun_that_cannot_be_made(now):
    limit = Limit(110.0)
    now.value = 107.0
    assert has_time(limit, 12.0) and not has_time(limit, 12.1)
    now.value = 111.0
    assert not has_time(limit, 0.1)
    assert has_time(None, 1e9)
    assert limit.clock(5).progress == 0


def test_restarts_share_the_time():
    result = fit(max_seconds=2e-3, num_restarts=2)
    assert len(result.restarts) == 2 and len(result.losses) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_seconds": 0}, ValueError, "max_seconds must be above 0, got 0"),
        ({"max_seconds": float("nan")}, ValueError, "max_seconds must be above 0, got nan"),
        ({"max_seconds": "60"}, TypeError, "max_seconds must be a number of seconds, got '60'"),
        ({"max_seconds": 9, "temper": "linear"}, ValueError, "give num_steps in place of max_seconds"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        fit(**options)
