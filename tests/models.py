"""Models, data and training that several tests use; all models carry batch dimensions on the left through."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam

Y = [0.3, 1.4, 2.2, 0.7, 1.9]


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


def eight_schools():
    """Centred: log Z = −31.311."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0)))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        effect = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
        error = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
        pyro.sample("obs", dist.Normal(theta, error), obs=effect)


def train(model, guide, *args, steps=200, lr=0.02, decay=1.0, num_particles=32, loss=None, batches=None):
    """Steps of Pyro's SVI on the arguments, or on those that ``batches`` gives for a step; returns their losses."""
    loss = loss or Trace_ELBO(num_particles=num_particles, vectorize_particles=True)
    rate = decay ** (1 / steps) if steps else 1.0
    svi = SVI(model, guide, ClippedAdam({"lr": lr, "lrd": rate, "clip_norm": 1e9}), loss)
    return [svi.step(*(batches(step) if batches else args)) for step in range(steps)]
