"""Hamiltonian Monte Carlo of the benchmark's references, on posteriors whose moments are known."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from benchmarks.any_model import hmc as hmc_module
from benchmarks.any_model.density import Density
from benchmarks.any_model.hmc import hmc
from benchmarks.any_model.problem import Problem

COV = torch.tensor([[4.0, 1.8, 0.0], [1.8, 1.0, 0.0], [0.0, 0.0, 0.01]])


@pytest.fixture(autouse=True)
def double():
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(previous)


def known():
    pyro.sample("normal", dist.MultivariateNormal(torch.tensor([1.0, -2.0, 3.0]), COV.double()))
    with pyro.plate("two", 2):
        pyro.sample("gamma", dist.Gamma(3.0, torch.tensor([0.5, 2.0])))


def far_apart():
    x = pyro.sample("x", dist.Normal(0.0, 100.0))
    pyro.factor("modes", torch.logaddexp(-((x - 8) ** 2) / 2, -((x + 8) ** 2) / 2))


@pytest.mark.slow
def test_moments_of_a_correlated_normal_and_gammas():
    row = hmc(Density(Problem("known", "", known, ())))
    assert row["kind"] == "HMC"
    assert row["divergences"] == 0
    assert row["min_ess"] >= 8000
    assert row["max_rhat"] <= 1.01
    exact = {
        "normal": ([1.0, -2.0, 3.0], COV.diagonal().double().sqrt().tolist()),
        "gamma": ([6.0, 1.5], [math.sqrt(3) / 0.5, math.sqrt(3) / 2]),
    }
    for name, (mean, sd) in exact.items():
        # Four standard errors, 1 / sqrt(8000) sd and about as much relative to an sd.
        np.testing.assert_array_less(np.abs(np.subtract(row["mean"][name], mean)) / sd, 0.045)
        np.testing.assert_allclose(row["sd"][name], sd, rtol=0.045)


@pytest.mark.slow
def test_chains_that_disagree_are_an_error(monkeypatch):
    monkeypatch.setattr(hmc_module, "MAX_DRAWS", hmc_module.BLOCK)
    with pytest.raises(RuntimeError, match=r"R-hat 1\.\d+.*acceptance 0\.\d+"):
        hmc(Density(Problem("far apart", "", far_apart, ())))
