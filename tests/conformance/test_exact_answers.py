"""The guides on targets whose log Z is known: never above it, and there where the family holds the answer."""

import pytest
import torch
from guide_cases import Y, every_guide, train
from models import conjugate, conjugate_answer, correlated, funnel

import pyro_flowguides as fg


@every_guide
def test_finds_a_conjugate_posterior(Guide):
    y = torch.tensor(Y, dtype=torch.float64)
    guide = Guide(conjugate, gradient="path", init_scale=0.3)
    train(conjugate, guide, y, steps=500, decay=0.03)
    mean, sd, log_evidence = conjugate_answer(y)
    draws = fg.draw(conjugate, guide, y, num_samples=20_000)
    # The family holds the posterior: four standard errors of 20,000 draws, plus what 600 steps leave.
    assert abs(float(draws.values["mu"].mean()) - mean) < 4 * sd / 20_000**0.5 + 0.02 * sd
    assert abs(float(draws.values["mu"].std()) / sd - 1) < 4 / 40_000**0.5 + 0.03
    elbo = draws.elbo()
    assert elbo.value < log_evidence + 4 * elbo.se + 1e-9
    assert elbo.value > log_evidence - 0.01


@every_guide
@pytest.mark.parametrize(("model", "log_evidence"), [(correlated, 0.0), (funnel, 0.0)], ids=["correlated", "funnel"])
def test_elbo_never_exceeds_the_log_evidence(Guide, model, log_evidence):
    """A wrong log-determinant shows here: training finds it and drives the ELBO above log Z."""
    guide = Guide(model)
    train(model, guide, steps=400, lr=0.005)
    elbo = fg.draw(model, guide, num_samples=20_000).elbo()
    assert elbo.value < log_evidence + 4 * elbo.se
    assert elbo.value > log_evidence - 1.5
