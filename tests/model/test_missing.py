"""Data that are missing, by Pyro's ``obs_mask=``."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from fits import quick

import pyro_flowguides as fg

SEEN = torch.tensor([True, True, False, True, False])
DATA = torch.tensor([0.3, 1.4, math.nan, 0.7, math.nan])


def with_missing(y, seen):
    """The posterior of mu is that of what was seen: N(0.8, 1/3) with a flat prior; of missing ones N(mu, 1)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 100.0))
    with pyro.plate("n", len(seen)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=seen)


def test_missing_data_are_inferred():
    fit = quick(with_missing, fg.AutoCoupling(with_missing), DATA, SEEN)
    assert fit.guide.latent_dim == 3
    assert fit.elbo.value == pytest.approx(
        float(dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1e4).log_prob(DATA[SEEN])), abs=0.01
    )
    y = fit.draws.deterministic["y"]
    torch.testing.assert_close(y[:, SEEN], DATA[SEEN].expand(len(y), 3))
    torch.testing.assert_close(y[:, ~SEEN].mean(0), torch.full((2,), 0.8), rtol=0, atol=0.05)
    torch.testing.assert_close(y[:, ~SEEN].std(0), torch.full((2,), (4 / 3) ** 0.5), rtol=0, atol=0.05)


def test_the_export_knows_what_was_seen():
    fit = quick(with_missing, fg.AutoCoupling(with_missing), DATA, SEEN)
    tree = fit.to_arviz(100)
    torch.testing.assert_close(torch.as_tensor(tree["observed_data"]["y_observed"].values), DATA, equal_nan=True)
    log_likelihood = torch.as_tensor(tree["log_likelihood"]["y_observed"].values)
    assert (log_likelihood[..., ~SEEN] == 0).all() and (log_likelihood[..., SEEN] != 0).all()
    assert tree["posterior"]["y"].dims == ("chain", "draw", "n")


def test_nan_that_no_mask_hides_is_an_error():
    y = DATA.clone()
    y[0] = math.nan
    with pytest.raises(ValueError, match="'y_observed' holds 1 NaN among its 5 values.*obs_mask=seen"):
        quick(with_missing, fg.AutoCoupling(with_missing), y, SEEN)


def positive(y, seen):
    rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
    with pyro.plate("n", len(seen)):
        pyro.sample("y", dist.Exponential(rate), obs=y, obs_mask=seen)


@pytest.mark.parametrize("seen", [SEEN, torch.ones(5, dtype=torch.bool)], ids=["some", "all"])
def test_missing_data_with_bounds(seen):
    """log Z is that of the data seen; the Jacobian counts for the missing ones alone."""
    y = torch.tensor([0.5, 1.0, 2.0, 0.1, 0.4])
    fit = quick(positive, fg.AutoCoupling(positive), torch.where(seen, y, math.nan), seen)
    grid = torch.linspace(-8, 6, 20_001, dtype=torch.float64)
    log_joint = dist.Normal(0.0, 1.0).log_prob(grid) + int(seen.sum()) * grid - grid.exp() * y[seen].sum()
    log_evidence = float(torch.logsumexp(log_joint, 0) + math.log(14 / 20_000))
    assert fit.draws.weights_error is None
    # After a few steps the guide has not learnt how skewed missing ones are.
    assert fit.draws.iw_elbo(100).value == pytest.approx(log_evidence, abs=0.05)
