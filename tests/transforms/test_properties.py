"""Laws of transforms at sizes, shapes, seeds and parameters that nobody chose; see test_contract.py for the chosen.

A run takes the same few examples every time; ``pytest --hypothesis-profile nightly`` takes many others.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transform_cases import CONDITIONAL, CONTEXT_DIM, build, make_context

from pyro_flowguides.testing import transforms as laws
from pyro_flowguides.testing.law import perturb

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
CASE = {
    "dim": st.integers(1, 6),
    "with_context": st.booleans(),
    "scale": st.floats(0.0, 1.5),
    "seed": st.integers(0, 2**31),
}


def make(family, dim, with_context, scale, seed, dtype):
    torch.manual_seed(seed)
    return perturb(build((family, CONTEXT_DIM if with_context else 0), dim, dtype), scale)


@every_family
@given(**CASE)
def test_log_det_inverse_and_score(family, dtype, **case):
    transform = make(family, **case, dtype=dtype)
    tolerance = 1e-8 if dtype == torch.float64 else 5e-3
    laws.check_log_det(transform, 3, tolerance)
    laws.check_inverse(transform, 3, tolerance)
    laws.check_score(transform, 3, tolerance)


@every_family
@given(batch_shape=st.lists(st.integers(1, 3), max_size=2).map(tuple), **CASE)
def test_a_batch_is_its_points(family, batch_shape, dtype, **case):
    transform = make(family, **case, dtype=dtype)
    z = 2 * torch.randn(*batch_shape, transform.dim, dtype=dtype)
    context = make_context((family, transform.context_dim), batch_shape, dtype)
    x, log_det = transform.forward_and_log_det(z, context)
    assert log_det.shape == batch_shape
    last = tuple(size - 1 for size in batch_shape)
    alone = transform.forward_and_log_det(z[last], None if context is None else context[last])
    tolerance = 1e-8 if dtype == torch.float64 else 5e-3
    for a, b in zip((x[last], log_det[last]), alone, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
