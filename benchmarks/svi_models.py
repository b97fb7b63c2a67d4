"""Three models for the benchmarks of training, each in Pyro and in NumPyro.

This file does not import this library, and imports NumPyro only where it is used: one benchmark starts its clock before the
imports, and no side should wait for the library of another.

- Eight schools (Rubin 1981), non-centred: 10 latent dimensions, 8 observations.
- Logistic regression on the sonar data (Gorman & Sejnowski 1988): 61 latent dimensions, 208 observations.
- A hierarchical regression: 1000 observations, an intercept for each of 20 groups, and 3 slopes; 26 latent dimensions. The data
  are simulated with a fixed seed.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch

NUM_GROUPS, NUM_OBSERVATIONS, NUM_SLOPES = 20, 1000, 3


@dataclass(frozen=True)
class Problem:
    """A model with its arguments, for Pyro and for NumPyro.

    Attributes:
        name: Its name.
        model: The Pyro model.
        numpyro_model: The same model in NumPyro.
        arguments: Arrays, the positional arguments of both.
        hidden_dims: The hidden layers of autoregressive networks; in Pyro and NumPyro they must be as wide as the latent vector.
    """

    name: str
    model: Callable
    numpyro_model: Callable
    arguments: tuple[np.ndarray, ...]
    hidden_dims: tuple[int, ...] = (32, 32)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(torch.as_tensor(array) for array in self.arguments)

    def jax_arrays(self) -> tuple[Any, ...]:
        import jax.numpy as jnp

        return tuple(jnp.asarray(array) for array in self.arguments)


def problems(sonar: Path) -> list[Problem]:
    """The three problems.

    Arguments:
        sonar: A CSV file of the sonar data: 60 columns of numbers and the class, 0 or 1, with a header.
    """
    return [
        Problem("eight schools", eight_schools, numpyro_eight_schools, _eight_schools_data()),
        Problem("sonar", logistic_regression, numpyro_logistic_regression, _sonar_data(sonar), (64, 64)),
        Problem("hierarchical", hierarchical, numpyro_hierarchical, _hierarchical_data()),
    ]


# --- eight schools -----------------------------------------------------------------------------------------------------


def eight_schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_full((), 5.0)))
    with pyro.plate("school", 8):
        offset = pyro.sample("offset", dist.Normal(y.new_zeros(()), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * offset, sigma), obs=y)


def numpyro_eight_schools(y, sigma):
    import numpyro
    import numpyro.distributions as npd

    mu = numpyro.sample("mu", npd.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", npd.HalfCauchy(5.0))
    with numpyro.plate("school", 8):
        offset = numpyro.sample("offset", npd.Normal(0.0, 1.0))
        numpyro.sample("y", npd.Normal(mu + tau * offset, sigma), obs=y)


def _eight_schools_data() -> tuple[np.ndarray, ...]:
    y = np.array([28, 8, -3, 7, -1, 1, 18, 12], dtype=np.float32)
    sigma = np.array([15, 10, 16, 11, 9, 11, 10, 18], dtype=np.float32)
    return y, sigma


# --- logistic regression -----------------------------------------------------------------------------------------------


def logistic_regression(x, y):
    weights = pyro.sample("weights", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        logits = (x @ weights.unsqueeze(-1)).squeeze(-1).reshape(*weights.shape[:-2], len(y))
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def numpyro_logistic_regression(x, y):
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as npd

    weights = numpyro.sample("weights", npd.Normal(jnp.zeros(x.shape[-1]), 1.0).to_event(1))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", npd.Bernoulli(logits=x @ weights), obs=y)


def _sonar_data(path: Path) -> tuple[np.ndarray, ...]:
    with path.open() as file:
        rows = list(csv.reader(file))[1:]
    table = np.array(rows, dtype=np.float64)
    x, y = table[:, :-1], table[:, -1]
    x = (x - x.mean(0)) / x.std(0)
    x = np.concatenate([np.ones((len(x), 1)), x], axis=1)
    return x.astype(np.float32), (y > 0).astype(np.float32)


# --- hierarchical regression -------------------------------------------------------------------------------------------


def hierarchical(x, group, y):
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfNormal(x.new_ones(())))
    sigma = pyro.sample("sigma", dist.HalfNormal(x.new_ones(())))
    slopes = pyro.sample("slopes", dist.Normal(x.new_zeros(NUM_SLOPES), 1.0).to_event(1))
    with pyro.plate("groups", NUM_GROUPS):
        offset = pyro.sample("offset", dist.Normal(x.new_zeros(()), 1.0))
    intercept = mu + tau * offset
    with pyro.plate("data", len(y)):
        trend = (x @ slopes.unsqueeze(-1)).squeeze(-1).reshape(*slopes.shape[:-2], len(y))
        pyro.sample("y", dist.Normal(intercept[..., group] + trend, sigma), obs=y)


def numpyro_hierarchical(x, group, y):
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as npd

    mu = numpyro.sample("mu", npd.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", npd.HalfNormal(1.0))
    sigma = numpyro.sample("sigma", npd.HalfNormal(1.0))
    slopes = numpyro.sample("slopes", npd.Normal(jnp.zeros(NUM_SLOPES), 1.0).to_event(1))
    with numpyro.plate("groups", NUM_GROUPS):
        offset = numpyro.sample("offset", npd.Normal(0.0, 1.0))
    intercept = mu + tau * offset
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", npd.Normal(intercept[group] + x @ slopes, sigma), obs=y)


def _hierarchical_data() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(NUM_OBSERVATIONS, NUM_SLOPES))
    group = rng.integers(NUM_GROUPS, size=NUM_OBSERVATIONS)
    intercept = 1.0 + 0.7 * rng.normal(size=NUM_GROUPS)
    y = intercept[group] + x @ np.array([0.5, -1.0, 0.2]) + 0.8 * rng.normal(size=NUM_OBSERVATIONS)
    return x.astype(np.float32), group.astype(np.int64), y.astype(np.float32)
