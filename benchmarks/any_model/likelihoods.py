"""Kinds of data: multivariate, ordered, counted, directed, truncated and censored."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.transforms import CumulativeDistributionTransform, OrderedTransform
from scipy.stats import norm

from .problem import Problem, product

# --- multivariate normal ---------------------------------------------------------------------------------------------------


def correlations(y):
    corr = pyro.sample("corr", dist.LKJCholesky(3, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(3)).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=torch.diag(scale) @ corr), obs=y)


def correlations_by_hand(y):
    corr = pyro.sample("corr", dist.LKJCholesky(3, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(3)).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=scale.unsqueeze(-1) * corr), obs=y)


def _triples(seed, size):
    rng = np.random.default_rng(seed)
    cov = np.array([[1.0, 0.5, -0.2], [0.5, 0.8, 0.1], [-0.2, 0.1, 1.2]])
    return rng.multivariate_normal(np.zeros(3), cov, size=size)


# --- multivariate Student's t ----------------------------------------------------------------------------------------------


def student(y):
    df = pyro.sample("df", dist.Gamma(4.0, 0.5))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(3)).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateStudentT(df, loc, torch.diag(scale)), obs=y)


def student_by_hand(y):
    df = pyro.sample("df", dist.Gamma(4.0, 0.5))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(3)).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateStudentT(df, loc, torch.diag_embed(scale)), obs=y)


# --- a mixture -------------------------------------------------------------------------------------------------------------


def mixture(y):
    weight = pyro.sample("weight", dist.Dirichlet(torch.full((2,), 2.0)))
    mean = pyro.sample("mean", dist.Normal(torch.tensor([-1.0, 2.0]), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weight), dist.Normal(mean, scale)), obs=y)


def mixture_by_hand(y):
    weight = pyro.sample("weight", dist.Dirichlet(torch.full((2,), 2.0)))
    mean = pyro.sample("mean", dist.Normal(torch.tensor([-1.0, 2.0]), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y)):
        components = dist.Normal(mean, scale.unsqueeze(-1))
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weight), components), obs=y)


def mixture_data():
    rng = np.random.default_rng(32)
    second = rng.random(60) < 0.4
    return (np.where(second, 2.5, -1.0) + 0.8 * rng.normal(size=60),)


# --- ordered categories ----------------------------------------------------------------------------------------------------


def _cuts():
    normal = dist.Normal(torch.zeros(3), 1.5).to_event(1)
    return dist.TransformedDistribution(normal, OrderedTransform())


def ordinal(X, y):
    cuts = pyro.sample("cuts", _cuts())
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.OrderedLogistic(X @ beta, cuts), obs=y)


def ordinal_by_hand(X, y):
    cuts = pyro.sample("cuts", _cuts())
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.OrderedLogistic(product(X, beta), cuts), obs=y)


def _ordinal_data():
    rng = np.random.default_rng(33)
    X = rng.normal(size=(70, 2))
    return X, np.digitize(X @ np.array([1.0, -0.5]) + rng.logistic(size=70), [-1.0, 0.5, 1.5])


# --- a Gaussian copula -----------------------------------------------------------------------------------------------------


def copula(y):
    """Two exponential variables whose ranks are those of a bivariate normal."""
    corr = pyro.sample("corr", dist.LKJCholesky(2, 2.0))
    rate = pyro.sample("rate", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
    to_ranks = CumulativeDistributionTransform(dist.Normal(0.0, 1.0))
    from_ranks = CumulativeDistributionTransform(dist.Exponential(rate)).inv
    normal = dist.MultivariateNormal(torch.zeros(2), scale_tril=corr)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.TransformedDistribution(normal, [to_ranks, from_ranks]), obs=y)


def _copula_data():
    rng = np.random.default_rng(34)
    ranks = norm.cdf(rng.multivariate_normal(np.zeros(2), [[1.0, 0.6], [0.6, 1.0]], size=50))
    return (-np.log1p(-ranks) / np.array([0.5, 2.0]),)


# --- counts ----------------------------------------------------------------------------------------------------------------


def votes(counts):
    chances = pyro.sample("chances", dist.Dirichlet(torch.ones(4)))
    with pyro.plate("data", len(counts)):
        pyro.sample("counts", dist.Multinomial(20, chances), obs=counts)


def overdispersed_votes(counts):
    share = pyro.sample("share", dist.Dirichlet(torch.ones(4)))
    precision = pyro.sample("precision", dist.LogNormal(2.0, 1.0))
    with pyro.plate("data", len(counts)):
        pyro.sample("counts", dist.DirichletMultinomial(precision * share, total_count=20), obs=counts)


def overdispersed_votes_by_hand(counts):
    share = pyro.sample("share", dist.Dirichlet(torch.ones(4)))
    precision = pyro.sample("precision", dist.LogNormal(2.0, 1.0))
    with pyro.plate("data", len(counts)):
        concentration = precision.unsqueeze(-1) * share
        pyro.sample("counts", dist.DirichletMultinomial(concentration, total_count=20), obs=counts)


def _vote_data():
    rng = np.random.default_rng(35)
    chances = rng.dirichlet(8 * np.array([0.4, 0.3, 0.2, 0.1]), size=15)
    return (np.stack([rng.multinomial(20, row) for row in chances]).astype(float),)


def fishing(X, y):
    gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.ZeroInflatedPoisson(torch.exp(X @ beta), gate=gate), obs=y)


def fishing_by_hand(X, y):
    gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.ZeroInflatedPoisson(torch.exp(product(X, beta)), gate=gate), obs=y)


def _fishing_data():
    rng = np.random.default_rng(36)
    X = np.column_stack([np.ones(80), rng.normal(size=(80, 2))])
    return X, np.where(rng.random(80) < 0.3, 0, rng.poisson(np.exp(X @ np.array([0.8, 0.5, -0.3])))).astype(float)


def insects(group, y):
    gate, size = pyro.sample("gate", dist.Beta(1.0, 3.0)), pyro.sample("size", dist.LogNormal(1.0, 0.7))
    logit = pyro.sample("logit", dist.Normal(torch.zeros(3), 1.5).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.ZeroInflatedNegativeBinomial(size, logits=logit[group], gate=gate), obs=y)


def insects_by_hand(group, y):
    gate, size = pyro.sample("gate", dist.Beta(1.0, 3.0)), pyro.sample("size", dist.LogNormal(1.0, 0.7))
    logit = pyro.sample("logit", dist.Normal(torch.zeros(3), 1.5).to_event(1))
    with pyro.plate("data", len(y)):
        logits = logit[..., group].reshape(*logit.shape[:-2], len(y))
        pyro.sample("y", dist.ZeroInflatedNegativeBinomial(size, logits=logits, gate=gate), obs=y)


def visits(group, y):
    shape = pyro.sample("shape", dist.Gamma(torch.full((3,), 2.0), 0.5).to_event(1))
    rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.GammaPoisson(shape[group], rate), obs=y)


def visits_by_hand(group, y):
    shape = pyro.sample("shape", dist.Gamma(torch.full((3,), 2.0), 0.5).to_event(1))
    rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.GammaPoisson(shape[..., group].reshape(*shape.shape[:-2], len(y)), rate), obs=y)


def _group_counts(seed, zeros):
    rng = np.random.default_rng(seed)
    group = np.arange(90) % 3
    counts = rng.poisson(rng.gamma(np.array([2.0, 4.0, 7.0])[group], 1.0))
    return group, np.where(rng.random(90) < zeros, 0, counts).astype(float)


# --- directions ------------------------------------------------------------------------------------------------------------


def directions(group, angle):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    concentration = pyro.sample("concentration", dist.HalfNormal(5.0))
    with pyro.plate("data", len(angle)):
        pyro.sample("angle", dist.VonMises(loc[group], concentration), obs=angle)


def directions_by_hand(group, angle):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    concentration = pyro.sample("concentration", dist.HalfNormal(5.0))
    with pyro.plate("data", len(angle)):
        pyro.sample(
            "angle", dist.VonMises(loc[..., group].reshape(*loc.shape[:-2], len(angle)), concentration), obs=angle
        )


def _direction_data():
    rng = np.random.default_rng(38)
    group = np.arange(45) % 3
    return group, rng.vonmises(np.array([-1.0, 0.2, 1.2])[group], 3.0)


# --- truncated and censored ------------------------------------------------------------------------------------------------


def truncated(X, y):
    """A normal above 0 only, by its inverse distribution function."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.3))
    normal = dist.Normal(X @ beta, sigma)
    ranks = dist.Uniform(normal.cdf(torch.tensor(0.0)), 1.0)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.TransformedDistribution(ranks, [CumulativeDistributionTransform(normal).inv]), obs=y)


def truncated_by_hand(X, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.3))
    normal = dist.Normal(product(X, beta), sigma)
    ranks = dist.Uniform(normal.cdf(torch.tensor(0.0)), 1.0)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.TransformedDistribution(ranks, [CumulativeDistributionTransform(normal).inv]), obs=y)


def _truncated_data():
    rng = np.random.default_rng(39)
    X = np.column_stack([np.ones(200), rng.normal(size=200)])
    y = X @ np.array([1.0, 0.6]) + rng.normal(size=200)
    return X[y > 0][:80], y[y > 0][:80]


def survival(X, time, event):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    shape = pyro.sample("shape", dist.LogNormal(0.0, 0.5))
    scale = torch.exp(X @ beta)
    with pyro.plate("patient", len(time)):
        log_survival = -((time / scale) ** shape)
        log_density = dist.Weibull(scale, shape).log_prob(time)
        pyro.factor("time", torch.where(event, log_density, log_survival))


def survival_by_hand(X, time, event):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    shape = pyro.sample("shape", dist.LogNormal(0.0, 0.5))
    scale = torch.exp(product(X, beta))
    with pyro.plate("patient", len(time)):
        log_survival = -((time / scale) ** shape)
        log_density = dist.Weibull(scale, shape).log_prob(time)
        pyro.factor("time", torch.where(event, log_density, log_survival))


def _survival_data():
    rng = np.random.default_rng(40)
    X = np.column_stack([np.ones(60), rng.normal(size=(60, 2))])
    time, end = np.exp(X @ np.array([0.5, 0.4, -0.3])) * rng.weibull(1.5, size=60), rng.uniform(0.5, 4, size=60)
    return X, np.minimum(time, end), time <= end


# --- sums over discrete states by hand -------------------------------------------------------------------------------------


def recaptures(counts):
    """Cormack, Jolly and Seber: the table of first recaptures by occasion, for each occasion of release."""
    survives = pyro.sample("survives", dist.Beta(2.0, 1.0))
    seen = pyro.sample("seen", dist.Beta(torch.full((5,), 2.0), 2.0).to_event(1))
    cells = torch.zeros(5, 6)
    for i in range(5):
        unseen = 1.0
        for j in range(i, 5):
            cells[i, j] = unseen * survives * seen[j]
            unseen = unseen * survives * (1 - seen[j])
        cells[i, 5] = 1 - cells[i, :5].sum()
    with pyro.plate("release", 5):
        pyro.sample("counts", dist.Multinomial(60, cells, validate_args=False), obs=counts)


def recaptures_by_hand(counts):
    survives = pyro.sample("survives", dist.Beta(2.0, 1.0))
    seen = pyro.sample("seen", dist.Beta(torch.full((5,), 2.0), 2.0).to_event(1))
    shape = seen.shape[:-2] if seen.dim() > 1 else ()
    phi, p = survives.reshape(shape), seen.reshape(*shape, 5)
    cells = torch.zeros(*shape, 5, 6)
    for i in range(5):
        unseen = 1.0
        for j in range(i, 5):
            cells[..., i, j] = unseen * phi * p[..., j]
            unseen = unseen * phi * (1 - p[..., j])
        cells[..., i, 5] = 1 - cells[..., i, :5].sum(-1)
    with pyro.plate("release", 5):
        pyro.sample("counts", dist.Multinomial(60, cells, validate_args=False), obs=counts)


def _recapture_data():
    rng = np.random.default_rng(41)
    seen, counts = np.array([0.4, 0.6, 0.5, 0.3, 0.5]), np.zeros((5, 6))
    for i in range(5):
        for _ in range(25 + 5 * i):
            first = 5
            for j in range(i, 5):
                if rng.random() > 0.75:
                    break
                if rng.random() < seen[j]:
                    first = j
                    break
            counts[i, first] += 1
    return (counts,)


def disasters(y):
    """The year in which the rate changes is summed out: every year is as likely."""
    rate = pyro.sample("rate", dist.Exponential(torch.ones(2)).to_event(1))
    log_prob = dist.Poisson(rate.unsqueeze(-1)).log_prob(y)
    until, since = log_prob[0].cumsum(0), log_prob[1].flip(0).cumsum(0).flip(0)
    pyro.factor("y", torch.logsumexp(until[:-1] + since[1:], 0))


def disasters_by_hand(y):
    rate = pyro.sample("rate", dist.Exponential(torch.ones(2)).to_event(1))
    log_prob = dist.Poisson(rate.unsqueeze(-1)).log_prob(y)
    until, since = log_prob[..., 0, :].cumsum(-1), log_prob[..., 1, :].flip(-1).cumsum(-1).flip(-1)
    pyro.factor("y", torch.logsumexp(until[..., :-1] + since[..., 1:], -1))


# Jarrett (1979): accidents in British coal mines by year, 1851 to 1961.
_BY_YEAR = (
    "454014340633402633545314415534252234213221111300101100310322011101010002100011023311211112420014000100000100101"
)
_DISASTERS = np.array([float(digit) for digit in _BY_YEAR])


PROBLEMS = [
    Problem("LKJ", "LKJCholesky with MultivariateNormal", correlations, (_triples(31, 60),), correlations_by_hand),
    Problem("multivariate t", "MultivariateStudentT", student, (_triples(37, 50),), student_by_hand),
    Problem("mixture, marginal", "MixtureSameFamily", mixture, mixture_data(), mixture_by_hand),
    Problem("ordinal regression", "OrderedLogistic with OrderedTransform", ordinal, _ordinal_data(), ordinal_by_hand),
    Problem("copula", "CumulativeDistributionTransform", copula, _copula_data()),
    Problem("multinomial", "Dirichlet and Multinomial", votes, _vote_data()),
    Problem(
        "Dirichlet-multinomial", "over-dispersed votes", overdispersed_votes, _vote_data(), overdispersed_votes_by_hand
    ),
    Problem("zero-inflated Poisson", "fish caught", fishing, _fishing_data(), fishing_by_hand),
    Problem("zero-inflated negative binomial", "insects", insects, _group_counts(42, 0.2), insects_by_hand),
    Problem("gamma-Poisson", "visits by group", visits, _group_counts(43, 0.0), visits_by_hand),
    Problem("von Mises", "directions by group", directions, _direction_data(), directions_by_hand),
    Problem("truncated normal", "a regression above 0", truncated, _truncated_data(), truncated_by_hand),
    Problem("survival", "Weibull, censored by pyro.factor", survival, _survival_data(), survival_by_hand),
    Problem(
        "capture-recapture", "example capture-recapture, marginal", recaptures, _recapture_data(), recaptures_by_hand
    ),
    Problem("change point", "coal-mining disasters", disasters, (_DISASTERS,), disasters_by_hand),
]
