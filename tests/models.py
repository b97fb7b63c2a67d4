"""Models that several tests use; all of them carry batch dimensions on the left through."""

import pyro
import pyro.distributions as dist
import torch


def conjugate(y):
    """Normal mean with known variance: the posterior is normal, in one dimension."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(1.0), 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def conjugate_answer(y):
    """Mean, standard deviation and log evidence of the conjugate model."""
    precision = 1 / 4 + len(y)
    mean = (1 / 4 + y.sum()) / precision
    covariance = torch.eye(len(y), dtype=y.dtype) + 4.0
    log_evidence = dist.MultivariateNormal(torch.ones_like(y), covariance).log_prob(y)
    return float(mean), float(precision) ** -0.5, float(log_evidence)


COVARIANCE = torch.tensor([[1.0, 0.9, 0.3], [0.9, 1.2, 0.1], [0.3, 0.1, 0.5]], dtype=torch.float64, device="cpu")


def correlated(dtype=torch.float64):
    """A correlated normal without data: log Z = 0."""
    pyro.sample(
        "x", dist.MultivariateNormal(torch.arange(3.0, dtype=dtype), COVARIANCE.to(torch.zeros(()).device, dtype))
    )


def kitchen_sink():
    """Sites of every common support, in plates and with event dimensions."""
    pyro.sample("real", dist.Normal(0.0, 1.0))
    pyro.sample("positive", dist.Gamma(2.0, 1.0))
    pyro.sample("interval", dist.Beta(2.0, 3.0))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    pyro.sample("cholesky", dist.LKJCholesky(2, 1.0))
    outer, inner = pyro.plate("outer", 2, dim=-1), pyro.plate("inner", 3, dim=-2)
    with outer:
        pyro.sample("in_plate", dist.LogNormal(0.0, 1.0))
        pyro.sample("event_in_plate", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with inner:
            pyro.sample("in_two_plates", dist.Exponential(1.0))


def funnel(dim=3):
    """Neal's funnel: log Z = 0."""
    v = pyro.sample("v", dist.Normal(torch.tensor(0.0), 3.0))
    with pyro.plate("coordinates", dim - 1):
        pyro.sample("x", dist.Normal(0.0, torch.exp(v / 2)))
