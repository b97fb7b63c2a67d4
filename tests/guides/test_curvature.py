"""Gaussians from the curvature of log p."""

import pyro.distributions as dist
import pytest
import torch

from pyro_flowguides.guides import curvature
from pyro_flowguides.guides.gaussians import gaussian_elbo
from pyro_flowguides.transforms.fixed import scaled

DIM = 40


def normal(covariance):
    loc = torch.linspace(-1, 2, len(covariance), dtype=torch.float64)
    return loc, dist.MultivariateNormal(loc, covariance).log_prob


def with_directions(*stretches):
    """A covariance of a diagonal over four powers of ten, and of random directions."""
    units = torch.logspace(-2, 2, DIM, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(DIM, len(stretches), dtype=torch.float64)).Q
    inner = torch.eye(DIM, dtype=torch.float64) + (basis * (torch.tensor(stretches).double() - 1)) @ basis.mT
    return units.unsqueeze(-1) * inner * units


def skewed(points):
    """log p of independent coordinates, the logarithms of gamma variates with a mean of about 4 and more."""
    shape = torch.linspace(4, 20, points.shape[-1], dtype=points.dtype)
    return (shape * points - points.exp() - shape.lgamma()).sum(-1)


def test_the_diagonal_of_the_curvature():
    covariance = with_directions(4.0, 0.1)
    loc, log_density = normal(covariance)
    found = curvature.diagonal_of_curvature(log_density, loc + 1, covariance.diagonal().sqrt())
    torch.testing.assert_close(found, covariance.inverse().diagonal(), rtol=1e-6, atol=0)


def test_laplace_finds_a_normal_law():
    covariance = with_directions(4.0, 0.1)
    loc, log_density = normal(covariance)
    found_loc, scale_tril = curvature.laplace(log_density, loc, torch.ones_like(loc))
    assert gaussian_elbo(log_density, found_loc, scale_tril) == pytest.approx(0.0, abs=1e-4)


def test_laplace_says_where_there_is_no_maximum():
    assert curvature.laplace(lambda x: x.square().sum(-1), torch.zeros(3).double(), torch.ones(3).double()) is None


def test_regression_finds_a_normal_law_in_one_update():
    covariance = with_directions(4.0, 0.1)
    loc, log_density = normal(covariance)
    start = torch.zeros_like(loc), torch.eye(DIM, dtype=torch.float64)
    found = next(curvature.regression_updates(log_density, *start, 2 * DIM))
    assert gaussian_elbo(log_density, *found) == pytest.approx(0.0, abs=1e-6)


def test_regression_finds_the_gaussian_of_highest_elbo():
    """For log-gamma laws it is known: E[exp x] = k and the variance 1/k."""
    shape = torch.linspace(4, 20, 5, dtype=torch.float64)
    gaussian = shape.log(), shape.rsqrt().diag()
    for num_pairs in (500, 500, 20_000):
        gaussian = next(curvature.regression_updates(skewed, *gaussian, num_pairs))
    torch.testing.assert_close(gaussian[0], shape.log() - 0.5 / shape, rtol=0, atol=0.02)
    torch.testing.assert_close(gaussian[1] @ gaussian[1].mT, (1 / shape).diag(), rtol=0.05, atol=0.01)


def test_shorter_updates_move_less():
    loc, log_density = normal(with_directions(4.0, 0.1))
    start = torch.zeros_like(loc), torch.eye(DIM, dtype=torch.float64)
    found = curvature.regression_updates(log_density, *start, 2 * DIM)
    distances = [float((each - loc).norm()) for each, _ in found]
    assert len(distances) == 3
    assert distances == sorted(distances)


def test_draws_without_a_score_are_left_out_of_a_regression():
    loc, log_density = normal(torch.eye(3, dtype=torch.float64))

    def of_a_half(points):
        return log_density(points) + 0 * (3 - points[:, 0]).sqrt()

    start = loc, torch.eye(3, dtype=torch.float64)
    assert gaussian_elbo(log_density, *next(curvature.regression_updates(of_a_half, *start, 200))) > -1e-6
    assert list(curvature.regression_updates(lambda x: (x - 1e9).sqrt().sum(-1), *start, 200)) == []


@pytest.mark.parametrize("stretches", [(), (100.0,), (0.01,), (50.0, 9.0, 0.02)])
def test_directions_far_from_the_diagonal_are_found(stretches):
    covariance = with_directions(*stretches)
    loc, log_density = normal(covariance)
    scale = curvature.low_rank(log_density, loc, torch.ones_like(loc))
    # All directions of so few dimensions are searched; those that are worth little are left out.
    assert scale.directions.shape[1] <= DIM
    assert gaussian_elbo(log_density, loc, scale) > -1.0
    half = scaled(scale, torch.eye(DIM, dtype=torch.float64))
    relative = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), half.mT, upper=False)
    assert float(relative.square().sum() / DIM) == pytest.approx(1.0, abs=0.1)


def test_the_mean_follows_the_average_score():
    covariance = with_directions(9.0)
    loc, log_density = normal(covariance)
    scale = curvature.low_rank(log_density, loc, torch.ones_like(loc))
    moved = curvature.centred(log_density, torch.zeros_like(loc), scale)
    before = gaussian_elbo(log_density, torch.zeros_like(loc), scale)
    # The covariance is not exact, and so neither is a single step.
    assert gaussian_elbo(log_density, moved, scale) > 0.05 * before
