"""Properties of transforms at sizes, shapes, seeds and parameters that nobody chose; see test_transforms.py for the chosen."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transform_cases import CONDITIONAL, CONTEXT_DIM, build, jacobian_and_gradient, make_context, perturb

FAMILIES = [
    "planar",
    "radial",
    "sylvester_qr",
    "sylvester_householder",
    "sylvester_triangular_reversed",
    "affine_coupling",
    "affine_autoregressive",
    "inverse_of_affine_autoregressive",
    "spline_coupling",
    "spline_autoregressive",
    "lu_linear",
    "residual",
    "inverse_of_planar",
    "compose",
]
assert set(FAMILIES) <= set(CONDITIONAL)
every_family = pytest.mark.parametrize("family", FAMILIES)
# The same examples in every run: a failure is then one of the change at hand.
few_examples = settings(max_examples=10, deadline=None, derandomize=True)
cases = given(
    dim=st.integers(1, 6),
    batch_shape=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    with_context=st.booleans(),
    scale=st.floats(0.0, 1.5),
    seed=st.integers(0, 2**31),
)


def make(family, dim, batch_shape, with_context, scale, seed, dtype):
    """A transform with its points and its context."""
    torch.manual_seed(seed)
    case = (family, CONTEXT_DIM if with_context else 0)
    transform = perturb(build(case, dim, dtype), scale)
    return transform, 2 * torch.randn(*batch_shape, dim, dtype=dtype), make_context(case, batch_shape, dtype)


def assert_close(found, expected, dtype, size=1.0):
    """To the rounding of numbers of the given size, or of their own where that is larger."""
    tolerance = 1e-8 if dtype == torch.float64 else 5e-3
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * max(1.0, float(size)))


@every_family
@few_examples
@cases
def test_log_det_is_that_of_the_jacobian(family, dtype, **case):
    transform, z, context = make(family, **case, dtype=dtype)
    x, log_det = transform.forward_and_log_det(z, context)
    assert x.shape == z.shape and log_det.shape == z.shape[:-1]
    jacobian, _ = jacobian_and_gradient(transform, z, context)
    assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet, dtype)


@every_family
@few_examples
@cases
def test_inverse_leads_back_with_the_opposite_log_det(family, dtype, **case):
    transform, z, context = make(family, **case, dtype=dtype)
    x, _ = transform.forward_and_log_det(z, context)
    z_back, inverse_log_det = transform.inverse_and_log_det(x, context)
    assert z_back.shape == z.shape and inverse_log_det.shape == z.shape[:-1]
    # By the residual in x: what a steep inverse makes of the rounding of x is not its fault.
    x_back, log_det = transform.forward_and_log_det(z_back, context)
    assert_close(x_back, x, dtype, size=x.detach().abs().max())
    assert_close(inverse_log_det, -log_det, dtype)


@every_family
@few_examples
@cases
def test_score_follows_the_change_of_variables(family, dtype, **case):
    transform, z, context = make(family, **case, dtype=dtype)
    score = torch.randn_like(z)
    x, log_det, score_at_x = transform.forward_with_score(z, score, context)
    for found, expected in zip((x, log_det), transform.forward_and_log_det(z, context), strict=True):
        assert_close(found, expected, dtype)
    jacobian, gradient = jacobian_and_gradient(transform, z, context)
    # J^T s_x + ∇ log_det = s_z, compared before the solve and to the size of the terms that cancel.
    size = (jacobian.mT.abs() @ score_at_x.abs().unsqueeze(-1)).max()
    assert_close((jacobian.mT @ score_at_x.unsqueeze(-1)).squeeze(-1) + gradient, score, dtype, size)


@every_family
@few_examples
@cases
def test_a_batch_is_its_points(family, dtype, **case):
    transform, z, context = make(family, **case, dtype=dtype)
    x, log_det = transform.forward_and_log_det(z, context)
    index = tuple(size - 1 for size in case["batch_shape"])
    one_x, one_log_det = transform.forward_and_log_det(z[index], None if context is None else context[index])
    assert_close(x[index], one_x, dtype)
    assert_close(log_det[index], one_log_det, dtype)
