"""Annealed importance sampling: unbiased weights, transitions that leave a density as it is, step sizes."""

import math

import pytest
import torch

from pyro_flowguides.model.annealing import ACCEPTANCE, ADAPTATION, Particles, anneal, hmc_step
from pyro_flowguides.model.target import value_and_score

NUM = 20_000
MEAN, SD, FACTOR = torch.tensor([1.0, -1.0], dtype=torch.float64), 0.7, 3.0


def log_q(x):
    return -0.5 * (x / 1.5).square().sum(-1) - 2 * math.log(1.5) - math.log(2 * math.pi)


def log_g(x):
    """Three times a normal density."""
    return -0.5 * ((x - MEAN) / SD).square().sum(-1) - 2 * math.log(SD) - math.log(2 * math.pi) + math.log(FACTOR)


def log_g_of_a_half(x):
    """A density that is 0 where the first coordinate is not positive."""
    return torch.where(x[..., 0] > 0, log_g(x), -torch.inf)


def evaluator(log_g):
    def evaluate(x):
        values = [value_and_score(density, x) for density in (log_q, log_g)]
        (log_q_x, score_q), (log_g_x, score_g) = values
        return Particles(x, log_q_x, log_g_x, score_q, score_g)

    return evaluate


def run(log_g, num_between=3, step_size=0.5, num_hmc_steps=2):
    torch.manual_seed(0)
    start = evaluator(log_g)(1.5 * torch.randn(NUM, 2, dtype=torch.float64))
    steps = torch.full((num_between,), step_size, dtype=torch.float64)
    return anneal(start, evaluator(log_g), steps, torch.ones(2, dtype=torch.float64), num_hmc_steps, 3)


@pytest.mark.parametrize(("num_between", "step_size"), [(1, 0.5), (3, 0.5), (3, 1.5)])
def test_weights_are_unbiased(num_between, step_size):
    particles, log_weights, _ = run(log_g, num_between, step_size)
    weights = log_weights.exp()
    for values, expected in ((weights, FACTOR), (weights * particles.x[:, 0], FACTOR * float(MEAN[0]))):
        assert float(values.mean()) == pytest.approx(expected, abs=5 * float(values.std()) / NUM**0.5)
    draws = 1.5 * torch.randn(NUM, 2, dtype=torch.float64)
    assert float(weights.std()) < 0.9 * float((log_g(draws) - log_q(draws)).exp().std())


def test_points_without_density_weigh_nothing():
    particles, log_weights, _ = run(log_g_of_a_half)
    weights = log_weights.exp()
    inside = particles.x[:, 0] > 0
    assert bool((weights[~inside] == 0).all())
    assert bool(inside.any() and (~inside).any())
    expected = FACTOR * 0.5 * (1 + math.erf(float(MEAN[0]) / SD / 2**0.5))
    assert float(weights.mean()) == pytest.approx(expected, abs=5 * float(weights.std()) / NUM**0.5)


@pytest.mark.parametrize("step_size", [0.3, 1.0])
def test_a_step_leaves_the_density_as_it_is(step_size):
    torch.manual_seed(1)
    start = evaluator(log_g)(MEAN + SD * torch.randn(NUM, 2, dtype=torch.float64))
    steps = torch.full((2,), step_size, dtype=torch.float64)
    end, rate = hmc_step(start, 1.0, evaluator(log_g), steps, 3)
    standard = (end.x - MEAN) / SD
    assert float(standard.mean()) == pytest.approx(0, abs=5 / (2 * NUM) ** 0.5)
    assert float(standard.square().mean()) == pytest.approx(1, abs=5 * (2 / (2 * NUM)) ** 0.5)
    moved = (end.x != start.x).any(-1)
    assert float(moved.double().mean()) == pytest.approx(float(rate), abs=5 / NUM**0.5)
    assert 0.5 < float(rate) < 1
    torch.testing.assert_close(end, evaluator(log_g)(end.x))


@pytest.mark.parametrize(("step_size", "grows"), [(1e-3, True), (4.0, False)])
def test_step_sizes_are_led_to_the_rate_of_acceptance(step_size, grows):
    _, _, steps = run(log_g, step_size=step_size, num_hmc_steps=1)
    most = math.exp(ADAPTATION * ((1.0 if grows else 0.0) - ACCEPTANCE))
    assert torch.allclose(steps / step_size, torch.full_like(steps, most), atol=0.02)
