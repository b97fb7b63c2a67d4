"""Schedules by name, the rounds, and when another round is worth its time."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flowguides as fg
from pyro_flowguides.training import schedules
from pyro_flowguides.training.schedules import (
    RoundScore,
    check_temper,
    doubling_rounds,
    find_schedule,
    find_temper,
    got_worse,
    is_worth_another,
)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("cosine", [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0]),
        (None, [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0]),
        (lambda progress: 1 - progress, [1, 0.75, 0.5, 0.25, 0]),
    ],
)
def test_schedules(schedule, expected):
    function = find_schedule(schedule)
    assert [function(progress) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["linear", "step", "warm_up"])
def test_an_unknown_schedule(name):
    with pytest.raises(ValueError, match=f"unknown schedule '{name}'; known are constant, cosine, or a function"):
        find_schedule(name)


@pytest.mark.parametrize(
    ("temper", "num_steps", "expected"),
    [
        ("linear", 1000, {0: 0.01, 100: 0.208, 250: 0.505, 499: 0.99802, 500: 1.0, 999: 1.0}),
        ("rezende_mohamed", 12_000, {0: 0.01, 100: 0.02, 5000: 0.51, 9900: 1.0, 11_999: 1.0}),
        (lambda progress: min(1.0, 0.5 + progress), 100, {0: 0.5, 25: 0.75, 50: 1.0, 99: 1.0}),
    ],
)
def test_inverse_temperatures(temper, num_steps, expected):
    function = find_temper(temper)
    assert {step: function(step, num_steps) for step in expected} == pytest.approx(expected, rel=1e-12)
    check_temper(function, num_steps)


@pytest.mark.parametrize(
    ("temper", "message"),
    [
        ("cosine", "unknown temper 'cosine'; known are linear, rezende_mohamed, or a function"),
        ("rezende_mohamed", r"must rise to 1 in the first round, and is 0.02 after its 100 steps; give more num_steps"),
        (lambda progress: 0.5, r"must rise to 1 in the first round, and is 0.5 after"),
        (lambda progress: progress, r"above 0 and at most 1, got 0.0 at step 0 of 100"),
        (lambda progress: 1.5 if 0.3 < progress < 0.4 else 1.0, r"got 1.5 at step 31 of 100"),
    ],
)
def test_wrong_inverse_temperatures(temper, message):
    with pytest.raises(ValueError, match=message):
        check_temper(find_temper(temper), 100)


def test_rounds_double():
    assert doubling_rounds(256, fixed=False, start_sd=0.41) == ((1000, 256), (2000, 512), (4000, 1024))
    assert doubling_rounds(64, fixed=True, start_sd=math.nan) == ((1000, 64), (2000, 64), (4000, 64))
    assert doubling_rounds(64, fixed=False, start_sd=0.39) == ((400, 64), (1000, 64), (2000, 128), (4000, 256))


def test_the_sd_of_log_weights_is_not_decided_by_a_few_draws():
    log_weights = torch.linspace(-0.1, 0.1, 10_000)
    expected = 0.2 / 12**0.5
    assert schedules.log_weight_sd(log_weights) == pytest.approx(expected, rel=3e-3)
    log_weights[0], log_weights[-2:] = -torch.inf, 20.0
    assert schedules.log_weight_sd(log_weights) == pytest.approx(expected, rel=3e-3)
    log_weights[:20] = -torch.inf
    assert not math.isfinite(schedules.log_weight_sd(log_weights))


def test_the_score_of_draws():
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def guide():
        pyro.sample("x", dist.Normal(torch.zeros(2), 0.8).to_event(1))

    draws = fg.draw(model, guide, num_samples=10_000)
    score = RoundScore.of(draws)
    log_weights = draws.log_weights.double()
    assert score.elbo == pytest.approx(float(log_weights.mean()), abs=1e-6)
    assert score.elbo_se == pytest.approx(float(log_weights.std()) / 100, rel=1e-3)
    assert score.log_weight_sd == schedules.log_weight_sd(draws.log_weights)


@pytest.mark.parametrize(("num_lost", "is_finite"), [(1, True), (49, True), (50, False), (51, False)])
def test_the_score_of_draws_of_which_some_have_no_density(num_lost, is_finite):
    """A few of them do not decide the ELBO, half of them do."""
    log_weights = torch.linspace(-1.0, 1.0, 100)
    log_weights[:num_lost] = -torch.inf
    nothing = {"values": {}, "unconstrained": {}, "deterministic": {}, "log_likelihood": {}, "observed": {}, "dims": {}}
    score = RoundScore.of(fg.Draws(log_p=log_weights + 3, log_q=torch.full((100,), 3.0), **nothing))
    kept = log_weights[num_lost:]
    assert score.lost == pytest.approx(num_lost / 100)
    assert math.isfinite(score.elbo) == math.isfinite(score.elbo_se) == is_finite
    if is_finite:
        assert score.elbo == pytest.approx(float(kept.mean()), abs=1e-6)
        assert score.elbo_se == pytest.approx(float(kept.std()) / len(kept) ** 0.5, rel=1e-5)


NOT_FINITE = RoundScore(-math.inf, math.nan, math.nan)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([RoundScore(-3.0, 0.01, 0.04)], False),
        ([RoundScore(-3.0, 0.01, 0.2)], True),
        ([RoundScore(-3.0, 0.01, 0.2), RoundScore(-2.9, 0.01, 0.1)], True),
        ([RoundScore(-3.0, 0.01, 0.2), RoundScore(-2.9, 0.01, 0.01)], False),
        ([RoundScore(-3.0, 0.01, 0.2), RoundScore(-2.99, 0.01, 0.1)], False),
        ([RoundScore(-3.0, 0.01, 0.2), RoundScore(-3.1, 0.01, 0.1)], False),
        ([RoundScore(-3.0, 0.1, 0.2), RoundScore(-2.95, 0.0, 0.1)], False),
        ([RoundScore(-3.0, 0.0, 0.2), RoundScore(-2.95, 0.1, 0.1)], False),
        ([RoundScore(-3.0, 0.03, 0.2), RoundScore(-2.952, 0.04, 0.1)], False),
        ([RoundScore(-3.0, 0.03, 0.2), RoundScore(-2.948, 0.04, 0.1)], True),
        ([NOT_FINITE], True),
        ([RoundScore(-3.0, 0.01, 0.2), NOT_FINITE], True),
        ([NOT_FINITE, RoundScore(-3.0, 0.01, 0.2)], True),
    ],
)
def test_when_another_round_may_help(scores, expected):
    assert is_worth_another(scores) is expected


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([RoundScore(-3.0, 0.01, 0.2)], False),
        ([RoundScore(-3.0, 0.01, 0.2), RoundScore(-3.02, 0.01, 0.2)], False),
        ([RoundScore(-3.0, 0.01, 0.2), RoundScore(-3.1, 0.01, 0.2)], True),
        ([RoundScore(-3.0, 0.03, 0.2), RoundScore(-3.098, 0.04, 0.2)], False),
        ([RoundScore(-3.0, 0.03, 0.2), RoundScore(-3.102, 0.04, 0.2)], True),
        ([RoundScore(-3.0, 0.01, 0.2), NOT_FINITE], True),
        ([NOT_FINITE, NOT_FINITE], False),
        # A hundredth of the draws may lose their density.
        ([RoundScore(-3.0, 0.01, 0.2), RoundScore(-2.0, 0.01, 0.2, 0.009)], False),
        ([RoundScore(-3.0, 0.01, 0.2), RoundScore(-2.0, 0.01, 0.2, 0.011)], True),
        ([RoundScore(-3.0, 0.01, 0.2, 0.1), RoundScore(-2.0, 0.01, 0.2, 0.109)], False),
        ([RoundScore(-3.0, 0.01, 0.2, 0.1), RoundScore(-2.0, 0.01, 0.2, 0.111)], True),
    ],
)
def test_when_a_round_did_harm(scores, expected):
    assert got_worse(scores) is expected
