"""Draws, guides and models that several tests of the diagnostics use."""

import dataclasses

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from models import conjugate, conjugate_answer

import pyro_flowguides as fg

# Few steps, each run as it is: capturing them would take most of the time.
QUICK = {"num_steps": 5, "num_particles": 4, "backend": "eager", "progress": False, "seed": 0}
Y = [0.3, 1.4, 2.2, 0.7, 1.9]
MEAN, SD, LOG_EVIDENCE = conjugate_answer(torch.tensor(Y))


def data():
    """On the default device of the test."""
    return torch.tensor(Y)


def scaled_guide(shift, scale):
    """The conjugate posterior, moved by a number of its sds and stretched."""

    def guide(y):
        pyro.sample("mu", dist.Normal(torch.tensor(MEAN + shift * SD), scale * SD))

    return guide


def scaled_draws(shift, scale, num_samples=20_000, seed=0):
    return fg.draw(
        conjugate, scaled_guide(shift, scale), data(), num_samples=num_samples, seed=seed, log_likelihood=True
    )


def exact_loo():
    """The log predictive density of every observation given the others, in closed form."""
    y, result = data(), []
    for i in range(len(y)):
        mean, sd, _ = conjugate_answer(torch.cat([y[:i], y[i + 1 :]]))
        result.append(float(dist.Normal(mean, (sd**2 + 1) ** 0.5).log_prob(y[i])))
    return np.array(result)


def scalar_model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def nothing_observed(y):
    with pyro.plate("group", 2):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def sum_of_latents(y):
    """A model that mixes draws: all shapes are right when it is vectorised, and all numbers are wrong."""
    with pyro.plate("group", 3):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=y)


def group_names(tree):
    """The groups of an ArviZ container of either generation."""
    return {name.strip("/") for name in (tree.groups if hasattr(tree, "children") else tree.groups())} - {""}


def fit_example(example, **changes):
    pyro.clear_param_store()
    fit = fg.fit(example.model, fg.AutoCoupling(example.model), model_kwargs=example.data(), **QUICK)
    return dataclasses.replace(fit, **changes)
