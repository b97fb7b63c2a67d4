"""Models with discrete latents, as users write them; by hand, the sum over their values."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex

from .likelihoods import mixture_by_hand, mixture_data
from .problem import Problem, product

_ENUMERATE = {"enumerate": "parallel"}

# --- a mixture -------------------------------------------------------------------------------------------------------------


def mixture(y):
    weight = pyro.sample("weight", dist.Dirichlet(torch.full((2,), 2.0)))
    mean = pyro.sample("mean", dist.Normal(torch.tensor([-1.0, 2.0]), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weight), infer=_ENUMERATE)
        pyro.sample("y", dist.Normal(mean[z], scale), obs=y)


# --- a hidden Markov chain -------------------------------------------------------------------------------------------------


def chain(y):
    stay = pyro.sample("stay", dist.Beta(4.0, 1.0))
    mean = pyro.sample("mean", dist.Normal(torch.tensor([-1.0, 1.0]), 0.5).to_event(1))
    z = 0
    for t in pyro.markov(range(len(y))):
        second = torch.stack([1 - stay, stay])
        z = pyro.sample(f"z_{t}", dist.Bernoulli(second[z]), infer=_ENUMERATE).long()
        pyro.sample(f"y_{t}", dist.Normal(mean[z], 0.8), obs=y[t])


def chain_by_hand(y):
    stay = pyro.sample("stay", dist.Beta(4.0, 1.0))
    mean = pyro.sample("mean", dist.Normal(torch.tensor([-1.0, 1.0]), 0.5).to_event(1))
    first = torch.stack([stay, 1 - stay], -1)
    step = torch.stack([first, first.flip(-1)], -2)
    observed = dist.Normal(mean.unsqueeze(-2), 0.8)
    # The state before the first observation is 0, so that the first one is distributed as the first row of a step.
    start = torch.tensor([0.0, -torch.inf])
    pyro.sample("y", dist.DiscreteHMM(start, step.log().unsqueeze(-3), observed), obs=y)


def _chain_data():
    rng = np.random.default_rng(51)
    state, y = 0, []
    for _ in range(15):
        state = state if rng.random() < 0.8 else 1 - state
        y.append((-1.0, 1.0)[state] + 0.8 * rng.normal())
    return (np.array(y),)


# --- zero inflation --------------------------------------------------------------------------------------------------------


def zeros(x, y):
    gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        none = pyro.sample("none", dist.Bernoulli(gate), infer=_ENUMERATE)
        rate = torch.exp(beta[0] + beta[1] * x)
        pyro.sample("y", dist.Poisson(torch.where(none > 0, 1e-8, rate)), obs=y)


def zeros_by_hand(x, y):
    gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        rate = torch.exp(beta[..., 0] + beta[..., 1] * x)
        pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate=gate), obs=y)


def _zero_data():
    rng = np.random.default_rng(52)
    x = rng.normal(size=60)
    return x, np.where(rng.random(60) < 0.35, 0, rng.poisson(np.exp(1.0 + 0.4 * x))).astype(float)


# --- occupancy -------------------------------------------------------------------------------------------------------------


def occupancy(X, seen):
    """Whether an animal lives at a site is not known where it was never seen in four visits."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.5).to_event(1))
    detection = pyro.sample("detection", dist.Beta(2.0, 2.0))
    with pyro.plate("site", len(seen)):
        lives = pyro.sample("lives", dist.Bernoulli(logits=X @ beta), infer=_ENUMERATE)
        pyro.sample("seen", dist.Binomial(4, lives * detection), obs=seen)


def occupancy_by_hand(X, seen):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.5).to_event(1))
    detection = pyro.sample("detection", dist.Beta(2.0, 2.0))
    with pyro.plate("site", len(seen)):
        logit = product(X, beta)
        lives = torch.nn.functional.logsigmoid(logit) + dist.Binomial(4, detection).log_prob(seen)
        absent = torch.nn.functional.logsigmoid(-logit)
        pyro.factor("seen", torch.where(seen > 0, lives, torch.logaddexp(lives, absent)))


def _occupancy_data():
    rng = np.random.default_rng(53)
    X = np.column_stack([np.ones(40), rng.normal(size=40)])
    lives = rng.random(40) < 1 / (1 + np.exp(-X @ np.array([0.3, 1.0])))
    return X, (lives * rng.binomial(4, 0.45, size=40)).astype(float)


# --- mixed membership ------------------------------------------------------------------------------------------------------


def membership(words):
    """Three texts of twelve words, each word from one of two topics over four words."""
    topics = pyro.sample("topics", dist.Dirichlet(_TOPIC_PRIOR.to(torch.get_default_dtype())).to_event(1))
    with pyro.plate("text", words.shape[1]):
        share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("word", words.shape[0]):
            z = pyro.sample("z", dist.Categorical(share), infer=_ENUMERATE)
            pyro.sample("words", dist.Categorical(Vindex(topics)[..., z, :]), obs=words)


def membership_by_hand(words):
    topics = pyro.sample("topics", dist.Dirichlet(_TOPIC_PRIOR.to(torch.get_default_dtype())).to_event(1))
    with pyro.plate("text", words.shape[1]):
        share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("word", words.shape[0]):
            chances = (share.unsqueeze(-2) @ topics).squeeze(-2)
            pyro.sample("words", dist.Categorical(chances), obs=words)


_TOPIC_PRIOR = torch.tensor([[4.0, 3.0, 1.0, 1.0], [1.0, 1.0, 3.0, 4.0]])


def _word_data():
    rng = np.random.default_rng(54)
    topics = np.array([[0.5, 0.35, 0.1, 0.05], [0.05, 0.1, 0.4, 0.45]])
    shares = np.array([0.85, 0.5, 0.15])
    return (np.stack([[rng.choice(4, p=topics[int(rng.random() > share)]) for share in shares] for _ in range(12)]),)


PROBLEMS = [
    Problem("mixture", "tutorial GMM, enumerated", mixture, mixture_data(), mixture_by_hand, discrete=True),
    Problem("hidden Markov chain", "example hmm, pyro.markov", chain, _chain_data(), chain_by_hand, discrete=True),
    Problem("zero inflation", "a zero of one of two kinds", zeros, _zero_data(), zeros_by_hand, discrete=True),
    Problem("occupancy", "sites never seen", occupancy, _occupancy_data(), occupancy_by_hand, discrete=True),
    Problem("mixed membership", "example lda, small", membership, _word_data(), membership_by_hand, discrete=True),
]
