"""Models as their users write them: for one draw, without a thought of batches."""

import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.transforms import CumulativeDistributionTransform
from pyro.infer.reparam import LinearHMMReparam, LocScaleReparam, StudentTReparam
from pyro.nn import PyroModule, PyroSample

torch_state = torch.Generator().manual_seed(20)


def normal(*shape):
    return torch.randn(*shape, generator=torch_state, dtype=torch.float32)


X = normal(40, 3)
GROUP = torch.randint(0, 4, (40,), generator=torch_state)
NOISE = normal(40)
Y = X @ torch.tensor([1.0, -0.5, 0.3]) + 0.5 * NOISE
BINARY = (Y > 0).float()
COUNTS = torch.poisson(torch.ones(40), generator=torch_state)
SERIES = 0.3 * NOISE.cumsum(0)[:12]


def matmul(X, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Bernoulli(logits=X @ beta), obs=y)


def linear(X, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    mean = pyro.deterministic("mean", X @ beta)
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def indexing(group, y):
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("group", 4):
        effect = pyro.sample("effect", dist.Normal(0.0, tau))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(effect[group], 1.0), obs=y)


class Regression(PyroModule):
    """The one of Pyro's tutorial."""

    def __init__(self, size):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](size, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, size]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

    def forward(self, X, y=None):
        sigma = pyro.sample("sigma", dist.Uniform(0.0, 10.0))
        mean = self.linear(X).squeeze(-1)
        with pyro.plate("data", len(X)):
            return pyro.sample("obs", dist.Normal(mean, sigma), obs=y)


def autoregression(y):
    phi, scale = pyro.sample("phi", dist.Uniform(-1.0, 1.0)), pyro.sample("scale", dist.HalfNormal(1.0))
    noise = pyro.sample("noise", dist.Normal(torch.zeros(len(y)), 1.0).to_event(1))
    states = [scale * noise[0]]
    for t in range(1, len(y)):
        states.append(phi * states[-1] + scale * noise[t])
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(torch.stack(states), 0.3), obs=y)


def local_level(y):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    level = torch.zeros(len(y))
    for t in range(1, len(y)):
        level[t] = pyro.sample(f"level_{t}", dist.Normal(level[t - 1], scale))
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(level, 0.5), obs=y)


def correlations(y):
    corr = pyro.sample("corr", dist.LKJCholesky(3, 2.0))
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(3)).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=torch.diag(scale) @ corr), obs=y)


def gaussian_process(x, y):
    length, scale = pyro.sample("length", dist.LogNormal(0.0, 1.0)), pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    cov = scale**2 * torch.exp(-((x - x.T) ** 2) / (2 * length**2)) + 0.1 * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), cov), obs=y)


def gp_regression(x, y):
    """Pyro's own, which writes in place into the diagonal."""
    kernel = gp.kernels.RBF(input_dim=1)
    kernel.lengthscale = PyroSample(dist.LogNormal(torch.zeros(()), 0.5))
    process = gp.models.GPRegression(x, y, kernel, noise=torch.tensor(0.1, dtype=x.dtype), jitter=1e-4)
    process.noise = PyroSample(dist.LogNormal(torch.full((), -2.0), 0.5))
    return process.model()


def kalman(y):
    scale, noise = pyro.sample("scale", dist.LogNormal(0.0, 1.0)), pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    step = dist.Normal(torch.zeros(2), scale).to_event(1)
    seen = dist.Normal(torch.zeros(1), noise).to_event(1)
    start = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    pyro.sample("y", dist.GaussianHMM(start, torch.eye(2), step, torch.ones(2, 1), seen), obs=y.unsqueeze(-1))


@poutine.reparam(config={"y": LinearHMMReparam(obs=StudentTReparam())})
def kalman_with_outliers(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    step = dist.Normal(torch.zeros(1), scale).to_event(1)
    seen = dist.StudentT(4.0, torch.zeros(1), 0.5).to_event(1)
    start = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    hmm = dist.LinearHMM(start, torch.eye(1), step, torch.eye(1), seen, duration=len(y))
    pyro.sample("y", hmm, obs=y.unsqueeze(-1))


def hidden_markov(y):
    step = pyro.sample("step", dist.Dirichlet(torch.ones(2, 2) + 1).to_event(1))
    mean = pyro.sample("mean", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    pyro.sample("y", dist.DiscreteHMM(torch.zeros(2), step.log(), dist.Normal(mean, 1.0)), obs=y)


def mixture(y):
    weight = pyro.sample("weight", dist.Dirichlet(torch.ones(2)))
    mean = pyro.sample("mean", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weight), dist.Normal(mean, 1.0)), obs=y)


def ordinal(x, y):
    cuts = pyro.sample(
        "cuts",
        dist.TransformedDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), dist.transforms.OrderedTransform()),
    )
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.OrderedLogistic(slope * x, cuts), obs=y)


def multinomial(counts):
    chances = pyro.sample("chances", dist.Dirichlet(torch.ones(4)))
    with pyro.plate("data", len(counts)):
        pyro.sample("counts", dist.Multinomial(20, chances), obs=counts)


def student(y):
    df = pyro.sample("df", dist.Gamma(2.0, 0.1))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MultivariateStudentT(df, loc, torch.eye(3)), obs=y)


def zero_inflated(counts):
    gate, rate = (
        pyro.sample("gate", dist.Beta(1.0, 1.0)),
        pyro.sample("rate", dist.Gamma(torch.ones(4), 1.0).to_event(1)),
    )
    with pyro.plate("data", len(counts)):
        pyro.sample("counts", dist.ZeroInflatedPoisson(rate[GROUP], gate=gate), obs=counts)


def overdispersed(counts):
    shape, rate = (
        pyro.sample("shape", dist.Gamma(torch.ones(4), 1.0).to_event(1)),
        pyro.sample("rate", dist.Gamma(1.0, 1.0)),
    )
    with pyro.plate("data", len(counts)):
        pyro.sample("counts", dist.GammaPoisson(shape[GROUP], rate), obs=counts)


def overdispersed_with_zeros(counts):
    gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
    logit = pyro.sample("logit", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(counts)):
        pyro.sample("counts", dist.ZeroInflatedNegativeBinomial(3.0, logits=logit[GROUP], gate=gate), obs=counts)


def truncated(X, y):
    """A normal above -3 only, by its inverse distribution function."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 0.3).to_event(1))
    normal = dist.Normal(X @ beta, 1.0)
    ranks = dist.Uniform(normal.cdf(torch.full((), -3.0)), 1.0)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.TransformedDistribution(ranks, [CumulativeDistributionTransform(normal).inv]), obs=y)


def copula(y):
    corr = pyro.sample("corr", dist.LKJCholesky(3, 2.0))
    rate = pyro.sample("rate", dist.LogNormal(torch.zeros(3), 0.3).to_event(1))
    to_ranks = CumulativeDistributionTransform(dist.Normal(torch.zeros(3), 1.0))
    from_ranks = CumulativeDistributionTransform(dist.Exponential(rate)).inv
    normal = dist.MultivariateNormal(torch.zeros(3), scale_tril=corr)
    for i in pyro.plate("data", 5):
        pyro.sample(f"y_{i}", dist.TransformedDistribution(normal, [to_ranks, from_ranks]), obs=y[i])


def directions(angles):
    loc = pyro.sample("loc", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    concentration = pyro.sample("concentration", dist.HalfNormal(2.0))
    with pyro.plate("data", len(angles)):
        pyro.sample("angles", dist.VonMises(loc[GROUP], concentration), obs=angles)


@poutine.reparam(config={"effect": LocScaleReparam(0.0)})
def reparameterized(group, y):
    loc, scale = pyro.sample("loc", dist.Normal(0.0, 5.0)), pyro.sample("scale", dist.HalfCauchy(5.0))
    with pyro.plate("group", 4):
        effect = pyro.sample("effect", dist.Normal(loc, scale))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(effect[group], 1.0), obs=y)


def one_hot(group, y):
    effect = pyro.sample("effect", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        design = torch.nn.functional.one_hot(group, 4).to(effect.dtype)
        pyro.sample("y", dist.Normal(design @ effect, 1.0), obs=y)


def looks_at_data(x, y):
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    for i in pyro.plate("data", 6):
        if not torch.isnan(y[i]):
            pyro.sample(f"y_{i}", dist.Normal(slope[0] + slope[1] * x[i], 1.0), obs=y[i])


def without_plates(group, y):
    effect = pyro.sample("effect", dist.Normal(0.0, torch.ones(4)))
    pyro.sample("y", dist.Normal(effect[group], 1.0), obs=y)


def broadcasts_and_looks_at_data(y):
    """Its operations broadcast, but what it does depends on the data."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    for i in pyro.plate("data", 6):
        if not torch.isnan(y[i]):
            pyro.sample(f"y_{i}", dist.Normal(loc, 1.0), obs=y[i])


MODELS = {
    "matmul": (matmul, (X, BINARY)),
    "linear": (linear, (X, Y)),
    "indexing": (indexing, (GROUP, Y)),
    "pyro module": (Regression(3), (X, Y)),
    "autoregression": (autoregression, (SERIES,)),
    "local level": (local_level, (SERIES,)),
    "LKJ": (correlations, (X,)),
    "Gaussian process": (gaussian_process, (X[:15, :1], Y[:15])),
    "GPRegression": (gp_regression, (X[:10, :1], Y[:10])),
    "GaussianHMM": (kalman, (SERIES,)),
    "LinearHMM": (kalman_with_outliers, (SERIES,)),
    "hidden Markov": (hidden_markov, (Y[:20],)),
    "mixture": (mixture, (Y,)),
    "ordinal": (ordinal, (X[:, 0], GROUP)),
    "multinomial": (multinomial, (torch.tensor([[5.0, 8.0, 0.0, 7.0], [2.0, 9.0, 9.0, 0.0]]),)),
    "student": (student, (X,)),
    "zero-inflated": (zero_inflated, (COUNTS,)),
    "overdispersed": (overdispersed, (COUNTS,)),
    "overdispersed, with zeros": (overdispersed_with_zeros, (COUNTS,)),
    "truncated": (truncated, (X, Y.clamp(min=-2.9))),
    "copula": (copula, (X[:5].abs() + 0.1,)),
    "directions": (directions, (NOISE.clamp(-3, 3),)),
    "reparameterized": (reparameterized, (GROUP, Y)),
    "one-hot": (one_hot, (GROUP, Y)),
    "if on data, in a model that broadcasts": (
        broadcasts_and_looks_at_data,
        (torch.cat([Y[:5], torch.tensor([torch.nan])]),),
    ),
    "if on data": (looks_at_data, (X[:, 0], torch.cat([Y[:5], torch.tensor([torch.nan])]))),
}
