"""Draws and densities over large data: in passes whose largest tensor is bounded, with the numbers of a single pass."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flowguides as fg
from pyro_flowguides.diagnostics.replay import predict
from pyro_flowguides.model import memory
from pyro_flowguides.model.call import ModelCall
from pyro_flowguides.model.recording import LargestTensor
from pyro_flowguides.model.target import Target, value_and_score

NUM_ROWS, NUM_COLUMNS = 300, 5
X = torch.randn(NUM_ROWS, NUM_COLUMNS, generator=torch.Generator().manual_seed(0))
Y = X.sum(-1)


def broadcast(x, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([NUM_COLUMNS]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((beta.unsqueeze(-2) * x).sum(-1), 1.0), obs=y)


def for_one_draw(x, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([NUM_COLUMNS]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((beta * x).sum(-1), 1.0), obs=y)


MODELS = pytest.mark.parametrize("model", [broadcast, for_one_draw])
LIMIT = 20 * NUM_ROWS * NUM_COLUMNS


def test_what_does_not_depend_on_the_draws_does_not_count():
    constant = torch.ones(1000)
    assert memory.elements_per_draw(lambda number: (constant.exp(), torch.ones(number, 7).exp())) == 7


@MODELS
def test_the_log_density_of_many_points_in_blocks(model, monkeypatch):
    target = Target(ModelCall(model, (X, Y)), fg.AutoFlow(model).setup(X, Y).latents, vectorize=None)
    points = torch.randn(100, NUM_COLUMNS, dtype=torch.float64)
    expected = value_and_score(target.log_prob, points)
    monkeypatch.setattr(memory, "MAX_ELEMENTS", LIMIT)
    with LargestTensor() as seen:
        found = value_and_score(target.log_prob, points)
    torch.testing.assert_close(found, expected)
    assert LIMIT / 2 <= seen.largest <= LIMIT


@MODELS
def test_draws_log_likelihoods_and_predictions_in_blocks(model, monkeypatch):
    monkeypatch.setattr(memory, "MAX_ELEMENTS", LIMIT)
    guide = fg.AutoFlow(model).setup(X, Y)
    # The results are of all draws.
    limit = max(LIMIT, 100 * NUM_ROWS)
    with LargestTensor() as seen:
        draws = fg.draw(model, guide, X, Y, num_samples=100, log_likelihood=True)
        _, data = predict(ModelCall(model, (X, Y)), draws.values, 100)
    assert LIMIT / 2 <= seen.largest <= limit
    mean = draws.values["beta"] @ X.mT
    torch.testing.assert_close(draws.log_likelihood["y"], dist.Normal(mean, 1.0).log_prob(Y))
    # Standard normal noise: its sd over 30,000 numbers has an error of 0.004.
    assert (data["y"] - mean).std() == pytest.approx(1.0, abs=0.02)
