"""Time series: loops over time, state-space distributions of Pyro, and data with gaps."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LinearHMMReparam, StudentTReparam

from .problem import Problem

# --- autoregression --------------------------------------------------------------------------------------------------------


def autoregression(y):
    level, sigma = pyro.sample("level", dist.Normal(0.0, 1.0)), pyro.sample("sigma", dist.HalfNormal(1.0))
    phi = pyro.sample("phi", dist.Normal(torch.zeros(2), 0.5).to_event(1))
    for t in range(2, len(y)):
        mean = level + phi[0] * y[t - 1] + phi[1] * y[t - 2]
        pyro.sample(f"y_{t}", dist.Normal(mean, sigma), obs=y[t])


def autoregression_by_hand(y):
    level, sigma = pyro.sample("level", dist.Normal(0.0, 1.0)), pyro.sample("sigma", dist.HalfNormal(1.0))
    phi = pyro.sample("phi", dist.Normal(torch.zeros(2), 0.5).to_event(1))
    for t in range(2, len(y)):
        mean = level + phi[..., 0] * y[t - 1] + phi[..., 1] * y[t - 2]
        pyro.sample(f"y_{t}", dist.Normal(mean, sigma), obs=y[t])


def _lynx_data():
    """Lynx trapped in Canada, 1821 to 1860, on a logarithmic scale."""
    lynx = [269, 321, 585, 871, 1475, 2821, 3928, 5943, 4950, 2577, 523, 98, 184, 279, 409, 2285, 2685, 3409, 1824, 409]
    lynx += [151, 45, 68, 213, 546, 1033, 2129, 2536, 957, 361, 377, 225, 360, 731, 1638, 2725, 2871, 2119, 684, 299]
    log = np.log10(np.array(lynx, dtype=float))
    return (log - log.mean(),)


# --- a local level, written in place ---------------------------------------------------------------------------------------


def local_level(y):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    level = torch.zeros(len(y))
    level[0] = pyro.sample("level_0", dist.Normal(0.0, 2.0))
    for t in range(1, len(y)):
        level[t] = pyro.sample(f"level_{t}", dist.Normal(level[t - 1], scale))
    pyro.sample("y", dist.Normal(level, 0.5).to_event(1), obs=y)


def local_level_by_hand(y):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    level = [pyro.sample("level_0", dist.Normal(0.0, 2.0))]
    for t in range(1, len(y)):
        level.append(pyro.sample(f"level_{t}", dist.Normal(level[t - 1], scale)))
    pyro.sample("y", dist.Normal(torch.stack(level, -1), 0.5).to_event(1), obs=y)


def _level_data():
    rng = np.random.default_rng(21)
    return (rng.normal(size=25).cumsum() + 0.5 * rng.normal(size=25),)


# --- stochastic volatility -------------------------------------------------------------------------------------------------


def volatility(y):
    mu, phi = pyro.sample("mu", dist.Normal(-1.0, 1.0)), pyro.sample("phi", dist.Beta(8.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(0.5))
    noise = pyro.sample("noise", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
    h, log_variances = mu, []
    for t in range(len(y)):
        h = mu + phi * (h - mu) + sigma * noise[t]
        log_variances.append(h)
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(0.0, torch.exp(torch.stack(log_variances) / 2)), obs=y)


def volatility_by_hand(y):
    mu, phi = pyro.sample("mu", dist.Normal(-1.0, 1.0)), pyro.sample("phi", dist.Beta(8.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(0.5))
    noise = pyro.sample("noise", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
    h, log_variances = mu, []
    for t in range(len(y)):
        h = mu + phi * (h - mu) + sigma * noise[..., t]
        log_variances.append(h)
    scale = torch.exp(torch.stack(log_variances, -1) / 2)
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(0.0, scale.reshape(*mu.shape[:-1], len(y))), obs=y)


def _return_data():
    rng = np.random.default_rng(22)
    h, y = -1.0, []
    for _ in range(25):
        h = -1.0 + 0.9 * (h + 1.0) + 0.5 * rng.normal()
        y.append(np.exp(h / 2) * rng.normal())
    return (np.array(y),)


# --- hidden Markov models of Pyro ------------------------------------------------------------------------------------------


def trend(y):
    """A level whose slope drifts, both integrated out by a Kalman filter."""
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(2)).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    hmm = dist.GaussianHMM(
        dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
        torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
        dist.MultivariateNormal(torch.zeros(2), scale_tril=torch.diag(scale)),
        torch.tensor([[1.0], [0.0]]),
        dist.Normal(torch.zeros(1), noise).to_event(1),
    )
    pyro.sample("y", hmm, obs=y)


def trend_by_hand(y):
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(2)).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    hmm = dist.GaussianHMM(
        dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
        torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
        dist.MultivariateNormal(torch.zeros(2), scale_tril=torch.diag_embed(scale).unsqueeze(-3)),
        torch.tensor([[1.0], [0.0]]),
        dist.Normal(torch.zeros(1), noise[..., None, None]).to_event(1),
    )
    pyro.sample("y", hmm, obs=y)


def _trend_data():
    rng = np.random.default_rng(23)
    slope = 0.3 + 0.3 * rng.normal(size=30).cumsum()
    return ((slope.cumsum() + 0.5 * rng.normal(size=30))[:, None],)


@poutine.reparam(config={"y": LinearHMMReparam(obs=StudentTReparam())})
def outliers(y):
    """A random walk seen through noise with outliers."""
    scale, noise = pyro.sample("scale", dist.LogNormal(-1.0, 0.5)), pyro.sample("noise", dist.LogNormal(-1.0, 0.5))
    hmm = dist.LinearHMM(
        dist.Normal(torch.zeros(1), 1.0).to_event(1),
        torch.eye(1),
        dist.Normal(torch.zeros(1), scale).to_event(1),
        torch.eye(1),
        dist.StudentT(4.0, torch.zeros(1), noise).to_event(1),
        duration=len(y),
    )
    pyro.sample("y", hmm, obs=y)


def outliers_by_hand(y):
    scale, noise = pyro.sample("scale", dist.LogNormal(-1.0, 0.5)), pyro.sample("noise", dist.LogNormal(-1.0, 0.5))
    precision = pyro.sample("y_obs_gamma", dist.Gamma(torch.full((len(y), 1), 2.0), 2.0).to_event(2))
    hmm = dist.GaussianHMM(
        dist.Normal(torch.zeros(1), 1.0).to_event(1),
        torch.eye(1),
        dist.Normal(torch.zeros(1), scale[..., None, None]).to_event(1),
        torch.eye(1),
        dist.Normal(torch.zeros(1), noise[..., None, None] * precision.rsqrt()).to_event(1),
        duration=len(y),
    )
    pyro.sample("y", hmm, obs=y)


def _outlier_data():
    rng = np.random.default_rng(24)
    return ((0.4 * rng.normal(size=20).cumsum() + 0.4 * rng.standard_t(4, size=20))[:, None],)


def regimes(y):
    step = pyro.sample("step", dist.Dirichlet(torch.tensor([[4.0, 1.0], [1.0, 4.0]])).to_event(1))
    mean = pyro.sample("mean", dist.Normal(torch.tensor([-1.0, 1.0]), 0.5).to_event(1))
    pyro.sample("y", dist.DiscreteHMM(torch.zeros(2), step.log(), dist.Normal(mean, 1.0)), obs=y)


def regimes_by_hand(y):
    step = pyro.sample("step", dist.Dirichlet(torch.tensor([[4.0, 1.0], [1.0, 4.0]])).to_event(1))
    mean = pyro.sample("mean", dist.Normal(torch.tensor([-1.0, 1.0]), 0.5).to_event(1))
    observed = dist.Normal(mean.unsqueeze(-2), 1.0)
    pyro.sample("y", dist.DiscreteHMM(torch.zeros(2), step.log().unsqueeze(-3), observed), obs=y)


def _regime_data():
    rng = np.random.default_rng(25)
    state, y = 0, []
    for _ in range(40):
        state = state if rng.random() < 0.85 else 1 - state
        y.append((-1.2, 1.2)[state] + rng.normal())
    return (np.array(y),)


# --- an epidemic, step by step ---------------------------------------------------------------------------------------------


def epidemic(cases):
    contact = pyro.sample("contact", dist.LogNormal(-0.5, 0.5))
    recovery = pyro.sample("recovery", dist.LogNormal(-1.5, 0.3))
    reported = pyro.sample("reported", dist.Beta(4.0, 4.0))
    susceptible, infected = torch.tensor(990.0), torch.tensor(10.0)
    expected = torch.zeros(len(cases))
    for t in range(len(cases)):
        new = susceptible * (1 - torch.exp(-contact * infected / 1000.0))
        susceptible, infected = susceptible - new, infected * torch.exp(-recovery) + new
        expected[t] = reported * new
    with pyro.plate("day", len(cases)):
        pyro.sample("cases", dist.Poisson(expected), obs=cases)


def epidemic_by_hand(cases):
    contact = pyro.sample("contact", dist.LogNormal(-0.5, 0.5))
    recovery = pyro.sample("recovery", dist.LogNormal(-1.5, 0.3))
    reported = pyro.sample("reported", dist.Beta(4.0, 4.0))
    susceptible, infected = torch.tensor(990.0), torch.tensor(10.0)
    expected = []
    for _ in range(len(cases)):
        new = susceptible * (1 - torch.exp(-contact * infected / 1000.0))
        susceptible, infected = susceptible - new, infected * torch.exp(-recovery) + new
        expected.append(reported * new)
    with pyro.plate("day", len(cases)):
        mean = torch.stack(expected, -1).reshape(*contact.shape[:-1], len(cases))
        pyro.sample("cases", dist.Poisson(mean), obs=cases)


def _epidemic_data():
    rng = np.random.default_rng(26)
    susceptible, infected, cases = 990.0, 10.0, []
    for _ in range(20):
        new = susceptible * (1 - np.exp(-0.6 * infected / 1000))
        susceptible, infected = susceptible - new, infected * np.exp(-0.2) + new
        cases.append(rng.poisson(0.5 * new))
    return (np.array(cases, dtype=float),)


# --- gaps in the data ------------------------------------------------------------------------------------------------------


def gaps(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    for i in pyro.plate("data", len(y)):
        if not torch.isnan(y[i]):
            pyro.sample(f"y_{i}", dist.Normal(beta[0] + beta[1] * x[i], sigma), obs=y[i])


def gaps_by_hand(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    for i in pyro.plate("data", len(y)):
        if not torch.isnan(y[i]):
            pyro.sample(f"y_{i}", dist.Normal(beta[..., 0] + beta[..., 1] * x[i], sigma), obs=y[i])


def _gap_data():
    rng = np.random.default_rng(27)
    x = rng.normal(size=24)
    y = 0.5 + x + 0.6 * rng.normal(size=24)
    y[rng.random(24) < 0.25] = np.nan
    return x, y


PROBLEMS = [
    Problem("autoregression", "a loop over observed time", autoregression, _lynx_data(), autoregression_by_hand),
    Problem("local level", "states written in place", local_level, _level_data(), local_level_by_hand),
    Problem("stochastic volatility", "example stochastic volatility", volatility, _return_data(), volatility_by_hand),
    Problem("GaussianHMM", "a local linear trend", trend, _trend_data(), trend_by_hand),
    Problem("LinearHMM", "LinearHMMReparam with StudentTReparam", outliers, _outlier_data(), outliers_by_hand),
    Problem("DiscreteHMM", "hidden regimes, summed out by Pyro", regimes, _regime_data(), regimes_by_hand),
    Problem("epidemic", "an SIR model in steps of a day", epidemic, _epidemic_data(), epidemic_by_hand),
    Problem("missing data", "an if on data in a sequential plate", gaps, _gap_data(), gaps_by_hand),
]
