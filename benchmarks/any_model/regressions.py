"""Regressions, a neural network and Gaussian processes."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample

from .problem import Problem, product

# --- logistic regression -------------------------------------------------------------------------------------------------


def logistic(X, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(X.shape[1]), 2.0).to_event(1))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Bernoulli(logits=X @ beta), obs=y)


def logistic_by_hand(X, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(X.shape[1]), 2.0).to_event(1))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Bernoulli(logits=product(X, beta)), obs=y)


def _logistic_data():
    rng = np.random.default_rng(1)
    X = np.column_stack([np.ones(80), rng.normal(size=(80, 4))])
    chances = 1 / (1 + np.exp(-X @ np.array([0.3, 1.0, -0.8, 0.4, 0.0])))
    return X, (rng.random(80) < chances).astype(float)


# --- a regression as a module ----------------------------------------------------------------------------------------------


class Regression(PyroModule):
    """A linear layer whose weights are random."""

    def __init__(self, size):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](size, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, size]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, X, y=None):
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(X).squeeze(-1)
        with pyro.plate("data", X.shape[0]):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


def module_by_hand(X, y):
    sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
    weight = pyro.sample("linear.weight", dist.Normal(0.0, 1.0).expand([1, X.shape[1]]).to_event(2))
    bias = pyro.sample("linear.bias", dist.Normal(0.0, 10.0).expand([1]).to_event(1))
    mean = product(X, weight.squeeze(-2)) + bias.squeeze(-1)
    with pyro.plate("data", len(X)):
        pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


def _ruggedness_data():
    """As in the tutorial: log GDP, by whether a nation is in Africa, its ruggedness, and both together."""
    rng = np.random.default_rng(2)
    africa, rugged = (rng.random(60) < 0.3).astype(float), rng.gamma(1.5, 0.9, size=60)
    X = np.column_stack([africa, rugged, africa * rugged])
    return X, 9.2 + X @ np.array([-1.9, -0.2, 0.35]) + 0.95 * rng.normal(size=60)


# --- a neural network ------------------------------------------------------------------------------------------------------


class Network(PyroModule):
    """Three units, each with a place of its own, so that they cannot be exchanged."""

    def __init__(self):
        super().__init__()
        self.hidden = PyroModule[torch.nn.Linear](1, 3)
        self.hidden.weight = PyroSample(dist.Normal(2.0, 0.5).expand([3, 1]).to_event(2))
        self.hidden.bias = PyroSample(dist.Normal(torch.tensor([-2.0, 0.0, 2.0]), 0.5).to_event(1))
        self.out = PyroModule[torch.nn.Linear](3, 1)
        self.out.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.out.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        mean = self.out(torch.tanh(self.hidden(x))).squeeze(-1)
        with pyro.plate("data", len(x)):
            return pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


def network_by_hand(x, y):
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    slope = pyro.sample("hidden.weight", dist.Normal(2.0, 0.5).expand([3, 1]).to_event(2))
    place = pyro.sample("hidden.bias", dist.Normal(torch.tensor([-2.0, 0.0, 2.0]), 0.5).to_event(1))
    units = torch.tanh(x * slope.squeeze(-1) + place)
    weight = pyro.sample("out.weight", dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
    bias = pyro.sample("out.bias", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
    mean = (units * weight.squeeze(-2)).sum(-1) + bias.squeeze(-1)
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


def _curve_data():
    rng = np.random.default_rng(3)
    x = np.sort(rng.uniform(-2, 2, size=40))
    return x[:, None], np.sin(1.5 * x) + 0.2 * rng.normal(size=40)


# --- counts with a one-hot design ------------------------------------------------------------------------------------------


def quarterly(quarter, y):
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
    effect = pyro.sample("effect", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    design = torch.nn.functional.one_hot(quarter, 4).to(effect.dtype)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(torch.exp(intercept + design @ effect)), obs=y)


def quarterly_by_hand(quarter, y):
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
    effect = pyro.sample("effect", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    design = torch.nn.functional.one_hot(quarter, 4).to(effect.dtype)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(torch.exp(intercept + product(design, effect))), obs=y)


def _quarterly_data():
    rng = np.random.default_rng(4)
    quarter = np.arange(48) % 4
    return quarter, rng.poisson(np.exp(1.0 + np.array([0.5, -0.3, 0.0, -0.6])[quarter])).astype(float)


# --- robust regression -----------------------------------------------------------------------------------------------------


def robust(x, y):
    intercept, slope = pyro.sample("intercept", dist.Normal(0.0, 5.0)), pyro.sample("slope", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.StudentT(4.0, intercept + slope * x, sigma), obs=y)


def _robust_data():
    rng = np.random.default_rng(5)
    x = rng.normal(size=50)
    return x, 1.0 + 0.7 * x + 0.5 * rng.standard_t(3, size=50)


# --- Gaussian processes ----------------------------------------------------------------------------------------------------


def gaussian_process(x, y):
    length, scale = pyro.sample("length", dist.LogNormal(0.0, 0.5)), pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    noise = pyro.sample("noise", dist.LogNormal(-1.5, 0.5))
    distance = (x - x.T) ** 2
    cov = scale**2 * torch.exp(-distance / (2 * length**2)) + noise**2 * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), cov), obs=y)


def gaussian_process_by_hand(x, y):
    length, scale = pyro.sample("length", dist.LogNormal(0.0, 0.5)), pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    noise = pyro.sample("noise", dist.LogNormal(-1.5, 0.5))
    distance = (x - x.T) ** 2
    length, scale, noise = (each[..., None, None] for each in (length, scale, noise))
    cov = scale**2 * torch.exp(-distance / (2 * length**2)) + noise**2 * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), cov), obs=y)


def gp_regression(X, y):
    """The model of Pyro's own Gaussian process, with priors on the parameters of its kernel."""
    process = gp.models.GPRegression(X, y, gp.kernels.RBF(input_dim=1), noise=torch.tensor(0.1), jitter=1e-5)
    process.kernel.lengthscale = PyroSample(dist.LogNormal(0.0, 0.5))
    process.kernel.variance = PyroSample(dist.LogNormal(0.0, 0.5))
    process.noise = PyroSample(dist.LogNormal(-3.0, 0.5))
    return process.model


def gp_regression_by_hand(X, y):
    variance = pyro.sample("kernel.variance", dist.LogNormal(0.0, 0.5))
    length = pyro.sample("kernel.lengthscale", dist.LogNormal(0.0, 0.5))
    noise = pyro.sample("noise", dist.LogNormal(-3.0, 0.5))
    variance, length, noise = (each[..., None, None] for each in (variance, length, noise))
    cov = variance * torch.exp(-0.5 * (X - X.T) ** 2 / length**2) + (noise + 1e-5) * torch.eye(len(X))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(X)), cov), obs=y)


def _process_data():
    rng = np.random.default_rng(6)
    x = np.sort(rng.uniform(0, 5, size=20))
    return x[:, None], np.sin(1.3 * x) + 0.2 * rng.normal(size=20)


PROBLEMS = [
    Problem(
        "logistic regression",
        "Bayesian logistic regression (HMC example)",
        logistic,
        _logistic_data(),
        logistic_by_hand,
    ),
    Problem(
        "regression module",
        "tutorial Bayesian Regression: PyroModule with PyroSample",
        lambda X, y: Regression(X.shape[1]),
        _ruggedness_data(),
        module_by_hand,
        is_built=True,
    ),
    Problem(
        "neural network",
        "tutorial Modules in Pyro: a Bayesian neural network",
        lambda x, y: Network(),
        _curve_data(),
        network_by_hand,
        is_built=True,
    ),
    Problem("quarterly counts", "one-hot design, Poisson", quarterly, _quarterly_data(), quarterly_by_hand),
    Problem("robust regression", "Student's t likelihood", robust, _robust_data()),
    Problem("Gaussian process", "a kernel by hand", gaussian_process, _process_data(), gaussian_process_by_hand),
    Problem(
        "contrib.gp",
        "tutorial Gaussian Processes: GPRegression with priors",
        gp_regression,
        _process_data(),
        gp_regression_by_hand,
        is_built=True,
        given=False,
    ),
]
