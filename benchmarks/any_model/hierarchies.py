"""Groups of observations that share a population."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam

from .problem import Problem

# --- eight schools ---------------------------------------------------------------------------------------------------------


@poutine.reparam(config={"theta": LocScaleReparam(0.0)})
def schools(y, sigma):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


_SCHOOLS = np.array([28.0, 8, -3, 7, -1, 1, 18, 12]), np.array([15.0, 10, 16, 11, 9, 11, 10, 18])

# --- effect[group] ---------------------------------------------------------------------------------------------------------


def counties(county, floor, y):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfNormal(1.0))
    slope, sigma = pyro.sample("slope", dist.Normal(0.0, 2.0)), pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("county", 10):
        effect = pyro.sample("effect", dist.Normal(mu, tau))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(effect[county] + slope * floor, sigma), obs=y)


def counties_by_hand(county, floor, y):
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfNormal(1.0))
    slope, sigma = pyro.sample("slope", dist.Normal(0.0, 2.0)), pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("county", 10):
        effect = pyro.sample("effect", dist.Normal(mu, tau))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(effect[..., county] + slope * floor, sigma), obs=y)


def _county_data():
    rng = np.random.default_rng(11)
    county, floor = np.arange(100) % 10, (rng.random(100) < 0.3).astype(float)
    effect = 1.5 + 0.8 * rng.normal(size=10)
    return county, floor, effect[county] - 0.6 * floor + 0.7 * rng.normal(size=100)


# --- varying slopes --------------------------------------------------------------------------------------------------------


def cafes(cafe, afternoon, wait):
    mean = pyro.sample("mean", dist.Normal(torch.tensor([3.0, -1.0]), 2.0).to_event(1))
    scale = pyro.sample("scale", dist.Exponential(torch.ones(2)).to_event(1))
    corr = pyro.sample("corr", dist.LKJCholesky(2, 2.0))
    sigma = pyro.sample("sigma", dist.Exponential(1.0))
    with pyro.plate("cafe", 8):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    effects = mean + z @ (torch.diag(scale) @ corr).T
    with pyro.plate("visit", len(wait)):
        pyro.sample("wait", dist.Normal(effects[cafe, 0] + effects[cafe, 1] * afternoon, sigma), obs=wait)


def cafes_by_hand(cafe, afternoon, wait):
    mean = pyro.sample("mean", dist.Normal(torch.tensor([3.0, -1.0]), 2.0).to_event(1))
    scale = pyro.sample("scale", dist.Exponential(torch.ones(2)).to_event(1))
    corr = pyro.sample("corr", dist.LKJCholesky(2, 2.0))
    sigma = pyro.sample("sigma", dist.Exponential(1.0))
    with pyro.plate("cafe", 8):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    effects = mean + ((scale.unsqueeze(-1) * corr) @ z.unsqueeze(-1)).squeeze(-1)
    with pyro.plate("visit", len(wait)):
        pyro.sample("wait", dist.Normal(effects[..., cafe, 0] + effects[..., cafe, 1] * afternoon, sigma), obs=wait)


def _cafe_data():
    rng = np.random.default_rng(12)
    effects = np.array([3.5, -1.0]) + rng.normal(size=(8, 2)) @ np.linalg.cholesky([[1.0, -0.4], [-0.4, 0.6]]).T
    cafe, afternoon = np.repeat(np.arange(8), 10), np.tile([0.0, 1.0], 40)
    return cafe, afternoon, effects[cafe, 0] + effects[cafe, 1] * afternoon + 0.5 * rng.normal(size=80)


# --- baseball --------------------------------------------------------------------------------------------------------------


def baseball(at_bats, hits):
    loc, scale = pyro.sample("loc", dist.Normal(-1.0, 1.0)), pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("player", len(hits)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        logit = pyro.deterministic("logit", loc + scale * z)
        pyro.sample("hits", dist.Binomial(at_bats, logits=logit), obs=hits)


# Efron and Morris (1975): the first 45 at-bats of 18 players in 1970.
_BASEBALL = np.full(18, 45.0), np.array([18.0, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 10, 10, 10, 9, 8, 7])

# --- item response ---------------------------------------------------------------------------------------------------------


def item_response(person, item, y):
    with pyro.plate("person", 14):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with pyro.plate("item", 7):
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
        discrimination = pyro.sample("discrimination", dist.LogNormal(0.0, 0.5))
    with pyro.plate("answer", len(y)):
        logit = discrimination[item] * (ability[person] - difficulty[item])
        pyro.sample("y", dist.Bernoulli(logits=logit), obs=y)


def item_response_by_hand(person, item, y):
    with pyro.plate("person", 14):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with pyro.plate("item", 7):
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
        discrimination = pyro.sample("discrimination", dist.LogNormal(0.0, 0.5))
    with pyro.plate("answer", len(y)):
        logit = discrimination[..., item] * (ability[..., person] - difficulty[..., item])
        pyro.sample("y", dist.Bernoulli(logits=logit), obs=y)


def _answer_data():
    rng = np.random.default_rng(13)
    person, item = np.repeat(np.arange(14), 7), np.tile(np.arange(7), 14)
    ability, difficulty = rng.normal(size=14), rng.normal(size=7)
    chances = 1 / (1 + np.exp(-1.2 * (ability[person] - difficulty[item])))
    return person, item, (rng.random(98) < chances).astype(float)


PROBLEMS = [
    Problem("eight schools", "introduction to MCMC, LocScaleReparam", schools, _SCHOOLS),
    Problem("varying intercepts", "radon, effect[group]", counties, _county_data(), counties_by_hand),
    Problem("varying slopes", "Statistical Rethinking in Pyro: cafés", cafes, _cafe_data(), cafes_by_hand),
    Problem("baseball", "example baseball: partial pooling of logits", baseball, _BASEBALL),
    Problem("item response", "two-parameter item response", item_response, _answer_data(), item_response_by_hand),
]
