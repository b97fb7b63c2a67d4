"""Linear transforms: the units of their parameters, products, what cannot be built."""

import pytest
import torch
from transform_cases import perturb

from pyro_flowguides import transforms as T


def test_the_scale_of_a_triangular_map_multiplies_all_of_it(dtype, tolerance):
    """Its location and correlations are in units of its scale, so that a step of one size is as good for any scale."""
    transform = perturb(T.LowerTriangularAffine(4).to(dtype))
    z = torch.randn(5, 4, dtype=dtype)
    scale = torch.tensor([0.01, 1.0, 7.0, 100.0], dtype=dtype)
    expected = scale * transform(z)
    with torch.no_grad():
        transform.parameters_of.value[4:8] += scale.log()
    torch.testing.assert_close(transform(z), expected, rtol=tolerance(1e-12), atol=0)


def test_lu_maps_many_points_as_it_maps_each(dtype, tolerance):
    transform = perturb(T.LULinear(4).to(dtype))
    z = torch.randn(50, 4, dtype=dtype)
    x, _ = transform.forward_and_log_det(z)
    one_by_one = torch.stack([transform.forward_and_log_det(point)[0] for point in z])
    torch.testing.assert_close(x, one_by_one, rtol=0, atol=tolerance(1e-12))


def test_lu_reaches_a_given_matrix(dtype, tolerance):
    lower = torch.randn(4, 4, dtype=dtype).tril(-1) + torch.eye(4, dtype=dtype)
    scales = torch.rand(4, dtype=dtype) + 0.5
    unit_upper = torch.randn(4, 4, dtype=dtype).triu(1) + torch.eye(4, dtype=dtype)
    matrix = lower @ (scales.unsqueeze(-1) * unit_upper)
    transform = T.LULinear(4).to(dtype)
    # Off the diagonal in units of 1/√D.
    entries = 2 * (lower.tril(-1) + unit_upper.triu(1)) + scales.log().diag()
    with torch.no_grad():
        transform.parameters_of.value[4:] = entries.reshape(-1)
    z = torch.randn(5, 4, dtype=dtype)
    x, log_det = transform.forward_and_log_det(z)
    torch.testing.assert_close(x, z @ matrix.mT, rtol=0, atol=tolerance(1e-12))
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(matrix).logabsdet, rtol=0, atol=tolerance(1e-12))


def test_a_low_rank_map_has_no_more_directions_than_it_needs():
    assert [T.LowRankAffine(dim, 8).rank for dim in (1, 5, 9, 20)] == [0, 4, 8, 8]
    assert sum(parameter.numel() for parameter in T.LowRankAffine(1000, 3).parameters()) == 5 * 1000 + 6


def test_a_low_rank_map_stretches_and_mixes_its_directions_alone(dtype, tolerance):
    transform = perturb(T.LowRankAffine(6, 2).to(dtype))
    with torch.no_grad():
        jacobian = torch.autograd.functional.jacobian(lambda z: transform(z), torch.zeros(6, dtype=dtype))
        relative = jacobian / transform.parameters_of.value[6:12].exp().unsqueeze(-1)
        ranks = torch.linalg.svdvals(relative - torch.eye(6, dtype=dtype))
    assert float(ranks[1]) > 0.01
    torch.testing.assert_close(ranks[2:], torch.zeros_like(ranks[2:]), rtol=0, atol=tolerance(1e-12))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: T.Permutation([0, 0, 1]), "each of 0, …, D − 1 once"),
        (lambda: T.LowRankAffine(3, 0), "rank must be at least 1"),
        (lambda: T.FixedAffine(torch.zeros(2), torch.ones(3)), r"scale must have shape \(2,\)"),
        (lambda: T.FixedAffine(torch.zeros(2), torch.zeros(2)), "diagonal of the scale must be positive"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
