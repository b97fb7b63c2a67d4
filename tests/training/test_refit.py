"""A trained guide on other data: whitened again where it no longer fits, continued where it does."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from fits import quick

import pyro_flowguides as fg


def regression(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, 1.0), obs=y)


def data(number, shift=0.0):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(number, 2, generator=generator)
    return x, x @ torch.tensor([1.0 + shift, -0.5]) + torch.randn(number, generator=generator)


def exact(x, y):
    """Mean and standard deviation of the posterior in closed form."""
    covariance = (x.mT @ x + torch.eye(2) / 100).inverse()
    return covariance @ x.mT @ y, covariance.diagonal().sqrt()


@pytest.mark.parametrize(
    ("first", "second"),
    [((20,), (200,)), ((200,), (2000,)), ((2000,), (20,)), ((200,), (200, 5.0))],
    ids=["ten times more", "ten times more again", "a hundredth", "moved"],
)
def test_a_guide_that_no_longer_fits_is_whitened_again(first, second):
    guide = fg.AutoCoupling(regression)
    quick(regression, guide, *data(*first), num_particles=64)
    assert guide.is_trained()
    draws = quick(regression, guide, *data(*second), num_particles=64).draws
    mean, sd = exact(*data(*second))
    # 10,000 draws: the Monte-Carlo error of a mean is 0.01 sd, of a standard deviation 0.7%.
    torch.testing.assert_close((draws.values["beta"].mean(0) - mean) / sd, torch.zeros(2), rtol=0, atol=0.06)
    torch.testing.assert_close(draws.values["beta"].std(0) / sd, torch.ones(2), rtol=0, atol=0.05)


def banana():
    x = pyro.sample("x", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(x**2, 0.5))


@pytest.mark.parametrize(
    ("model", "args"),
    [pytest.param(regression, data(20), id="normal", marks=pytest.mark.slow), pytest.param(banana, (), id="banana")],
)
def test_the_same_data_continue_the_training(model, args):
    """Also from a guide that is far from the posterior, where no Gaussian is nearer."""
    guide = fg.AutoCoupling(model)
    quick(model, guide, *args, num_steps=100, num_particles=64)
    copies = [copy.deepcopy(guide) for _ in range(2)]
    losses = [
        quick(model, each, *args, num_steps=3, whiten=method, seed=7).losses.tolist()
        for each, method in zip(copies, ["auto", None], strict=True)
    ]
    assert losses[0] == losses[1]
