"""Draws for the tests of reports, made without any fit."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import pyro_flowguides as fg
from pyro_flowguides.diagnostics.posterior import Posterior
from pyro_flowguides.model.call import ModelCall

Y = torch.tensor([0.3, 1.4, 2.2, 0.7])


def model(y=None):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)


def draws_of(values, *, noise=0.1, observed=None, **changes):
    """Draws of sites, with weights whose logs have the noise as their sd."""
    values = {name: torch.as_tensor(value) for name, value in values.items()}
    num_draws = len(next(iter(values.values())))
    rng = np.random.default_rng(1)
    fields = {
        "values": values,
        "unconstrained": values,
        "deterministic": {},
        "log_p": torch.as_tensor(noise * rng.normal(size=num_draws)),
        "log_q": torch.zeros(num_draws, dtype=torch.float64),
        "log_likelihood": {},
        "observed": observed or {},
        "dims": {name: ["group"] * (value.dim() - 1) for name, value in values.items()},
    }
    return fg.Draws(**{**fields, **changes})


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def correlated(num_draws=300):
    x = normal(num_draws, 2)
    return {"a": x[:, 0], "b": 0.9 * x[:, 0] + 0.4 * x[:, 1]}


def posterior_with_model(**changes):
    return Posterior([draws_of(correlated(), **{"observed": {"y": Y}, **changes})], ModelCall(model, (Y,)))
