"""Densities of data by maximum likelihood: what they are, in the data's own units, and what goes wrong."""

import torch
from torch.distributions import MultivariateNormal

import pyro_flowguides as fg
from pyro_flowguides import flows
from pyro_flowguides import transforms as T

QUICK = {"progress": False, "seed": 0, "backend": "replay"}


def small(dim, context_dim=0):
    """A flow with few parameters, whose density takes one pass."""
    return flows.coupling(dim, num_layers=2, hidden_dims=(8,), context_dim=context_dim)


def affine(dim):
    return T.LowerTriangularAffine(dim)


def eager(flow, data, **options):
    """A fit too short to be worth a captured step."""
    return fg.fit_density(flow, data, **{**QUICK, "backend": "eager", "num_steps": 5, **options})


def normal_rows(num_rows=400, dim=2, seed=0, dtype=None):
    return torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- what is fitted ---------------------------------------------------------------------------------------------------


def test_a_normal_law_is_recovered():
    """The maximum of the likelihood of a normal law is known: mean and covariance of the rows."""
    tril = torch.tensor([[2.0, 0.0], [1.5, 0.5]])
    x = torch.tensor([100.0, -3.0]) + normal_rows(1000) @ tril.mT
    fit = fg.fit_density(
        affine, x, validation=None, whiten="diagonal", num_steps=500, batch_size=1000, optim=adam(0.1), **QUICK
    )
    law = MultivariateNormal(x.mean(0), torch.cov(x.mT, correction=0))
    torch.testing.assert_close(fit.log_prob(x[:50]), law.log_prob(x[:50]), atol=0.02, rtol=0)
    assert fit.num_steps == fit.best_step == 500
    assert len(fit.validation_losses) == 0


def adam(rate):
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


def test_whitening_alone_is_the_normal_law_of_the_rows():
    x = torch.tensor([1e4, -3.0]) + normal_rows(1000, dtype=torch.float64) * torch.tensor([300.0, 1e-3]).double()
    fit = eager(small, x, num_steps=1, validation=None, optim=adam(0.0))
    law = MultivariateNormal(x.mean(0), torch.cov(x.mT))
    torch.testing.assert_close(fit.log_prob(x), law.log_prob(x), atol=1e-3, rtol=0)
    assert fit.log_prob(x).dtype == fit.sample(2).dtype == torch.float64
