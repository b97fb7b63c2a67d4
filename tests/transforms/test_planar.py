"""Planar flows at the limits of their parameters."""

import pytest
import torch

from pyro_flowguides import transforms as T


@pytest.mark.parametrize("a", [-200.0, -50.0, -20.0, -8.0, 0.0, 20.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_planar_at_the_limits_of_its_parameters(a, dtype):
    """wᵀu far below −1 is where the unconstrained flow is not invertible and where naive formulas give −inf or NaN."""
    planar = T.Planar(2).to(dtype)
    with torch.no_grad():
        planar.parameters_of.value.copy_(torch.tensor([a, 0.3, 1.0, 0.0, 0.0]))
    z = torch.linspace(-10, 10, 41, dtype=dtype).unsqueeze(-1).expand(-1, 2)
    x, log_det, score = planar.forward_with_score(z, -z)
    assert x.isfinite().all() and log_det.isfinite().all() and score.isfinite().all()
    z_back, _ = planar.inverse_and_log_det(x)
    torch.testing.assert_close(planar(z_back), x, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-9)
    log_det.sum().backward()
    assert planar.parameters_of.value.grad.isfinite().all()


def test_planar_without_direction_is_finite():
    planar = T.Planar(2)
    with torch.no_grad():
        planar.parameters_of.value.zero_()
    x, log_det = planar.forward_and_log_det(torch.randn(3, 2))
    (x.sum() + log_det.sum()).backward()
    assert planar.parameters_of.value.grad.isfinite().all()


def test_the_start_of_planar_varies_by_one_over_the_base():
    """w has about the norm 1 in every dimension, so that wᵀz has variance 1."""
    _, w, *_ = T.Planar(400)._ridge_parameters(None)
    # The norm has an sd of 1/√(2 D), 0.035.
    assert float(w.detach().norm()) == pytest.approx(1, abs=0.15)
