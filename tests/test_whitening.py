"""The Gaussian found before training."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import COVARIANCE, conjugate, correlated, funnel, kitchen_sink
from pyro.infer import SVI, Trace_ELBO

import pyro_flowguides as fg
from pyro_flowguides.whitening import batch_and_match, best_gaussian, gaussian_elbo, quasi_newton_path


def gaussian_target(loc, covariance):
    target = dist.MultivariateNormal(loc, covariance)

    def log_density_and_score(points):
        points = points.detach().requires_grad_()
        log_density = target.log_prob(points)
        return log_density.detach(), torch.autograd.grad(log_density.sum(), points)[0]

    return log_density_and_score


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("start_scale", [0.1, 1.0, 100.0])
def test_finds_a_normal_posterior(dim, start_scale):
    loc = torch.linspace(-2, 3, dim, dtype=torch.float64)
    covariance = COVARIANCE.to(loc.device)[:dim, :dim]
    target = gaussian_target(loc, covariance)
    start = torch.zeros(dim, dtype=torch.float64), start_scale * torch.eye(dim, dtype=torch.float64)
    found_loc, found_tril = batch_and_match(target, *start)
    torch.testing.assert_close(found_loc, loc, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found_tril @ found_tril.mT, covariance, rtol=1e-5, atol=1e-6)
    assert gaussian_elbo(target, found_loc, found_tril) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("dim", [1, 3])
def test_finds_a_normal_posterior_that_is_narrow_and_far_away(dim):
    """Where batch and match from the start is lost, the path leads."""
    loc = torch.linspace(-50, 300, dim, dtype=torch.float64)
    covariance = 1e-4 * COVARIANCE.to(loc.device)[:dim, :dim]
    target = gaussian_target(loc, covariance)
    start = torch.zeros(dim, dtype=torch.float64), 0.1 * torch.eye(dim, dtype=torch.float64)
    assert gaussian_elbo(target, *batch_and_match(target, *start)) < -100
    found_loc, found_tril = best_gaussian(target, *start)
    assert gaussian_elbo(target, found_loc, found_tril) > -0.01
    torch.testing.assert_close(found_loc, loc, rtol=0, atol=1e-3)


def test_the_path_alone_finds_a_normal_posterior():
    loc = torch.linspace(-2, 3, 3, dtype=torch.float64)
    target = gaussian_target(loc, COVARIANCE.to(loc.device))
    found = quasi_newton_path(target, torch.zeros_like(loc), torch.eye(3, dtype=torch.float64))
    # The last steps of the path bring less than a millionth of a nat each.
    assert gaussian_elbo(target, *found) > -0.05


def test_survives_scores_that_are_not_finite():
    normal = gaussian_target(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))

    def target(points):
        log_density, score = normal(points)
        outside = points.norm(dim=-1, keepdim=True) > 5
        return log_density, torch.where(outside, torch.nan, score)

    start = torch.zeros(2, dtype=torch.float64), 100 * torch.eye(2, dtype=torch.float64)
    _, scale_tril = batch_and_match(target, *start)
    torch.testing.assert_close(scale_tril @ scale_tril.mT, torch.eye(2, dtype=torch.float64), rtol=0, atol=0.05)


@pytest.mark.parametrize("vectorize", [True, False])
def test_guide_moves_to_the_posterior(vectorize):
    guide = fg.AutoFlow(correlated).whiten(vectorize=vectorize)
    torch.testing.assert_close(guide._whitening.loc, torch.arange(3.0, dtype=torch.float64), rtol=0, atol=1e-6)
    covariance = guide._whitening.scale @ guide._whitening.scale.mT
    torch.testing.assert_close(covariance, COVARIANCE.to(covariance.device), rtol=0, atol=1e-6)
    assert fg.draw(correlated, guide, num_samples=1000).elbo().value == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("model", [funnel, kitchen_sink])
@pytest.mark.parametrize("method", ["auto", "batch_and_match"])
def test_improves_the_elbo(model, method):
    guide = fg.AutoFlow(model).setup()
    before = fg.draw(model, guide, num_samples=2000).elbo()
    guide.whiten(method=method)
    after = fg.draw(model, guide, num_samples=2000).elbo()
    assert after.value > before.value + 4 * (before.se + after.se)


def test_init_leaves_the_map():
    guide = fg.AutoFlow(correlated).setup()
    before = guide._whitening.scale.clone()
    guide.whiten(method="init")
    torch.testing.assert_close(guide._whitening.scale, before, rtol=0, atol=0)


def test_a_trained_guide_is_refused():
    y = torch.tensor([0.3, 1.4])
    guide = fg.AutoFlow(conjugate)
    guide.whiten(y)
    guide.whiten(y)  # not trained yet
    SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(y)
    with pytest.raises(ValueError, match="has been trained"):
        guide.whiten(y)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [("laplace", NotImplementedError, "not available yet"), ("mode", ValueError, "method must be")],
)
def test_methods_that_are_wrong(method, error, message):
    with pytest.raises(error, match=message):
        fg.AutoFlow(correlated).whiten(method=method)


def test_many_dimensions_keep_a_diagonal_map():
    def model():
        with pyro.plate("many", 300):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    guide = fg.AutoFlow(model, affine="diagonal").whiten()
    assert guide._whitening.scale.shape == (300,)
    with pytest.raises(ValueError, match="at most 200 latent dimensions, here 300"):
        guide.whiten(method="batch_and_match")
