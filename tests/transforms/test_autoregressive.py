"""The autoregressive structure, beyond the contract of every transform."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transform_cases import perturb

from pyro_flowguides import transforms as T
from pyro_flowguides.transforms import autoregressive


@pytest.mark.parametrize("make", [T.AffineAutoregressive, T.SplineAutoregressive])
@pytest.mark.parametrize("dim", [2, 7])
def test_the_jacobian_is_lower_triangular(make, dim, dtype):
    transform = perturb(make(dim)).to(dtype)
    jacobian = torch.func.jacrev(transform)(torch.randn(dim, dtype=dtype))
    assert (jacobian.triu(1) == 0).all()
    assert (jacobian.diagonal() > 0).all()
    assert (jacobian.tril(-1) != 0).any()


@pytest.mark.parametrize("make", [T.AffineAutoregressive, T.SplineAutoregressive])
@pytest.mark.parametrize("dim", [1, 2, 10, 64])
@pytest.mark.parametrize("largest_dense", [0, 1000], ids=["substitution", "dense"])
def test_both_ways_to_the_score_are_exact(make, dim, largest_dense, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(autoregressive, "_LARGEST_DENSE_JACOBIAN", largest_dense)
    transform = perturb(make(dim, hidden_dims=(2 * dim, 5))).to(dtype)
    z, score = torch.randn(3, dim, dtype=dtype), torch.randn(3, dim, dtype=dtype)
    *_, found = transform.forward_with_score(z, score)
    *_, expected = T.FlowTransform.forward_with_score(transform, z, score)
    size = expected.abs().max().clamp(min=1.0).item()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance(1e-9) * size)


@pytest.mark.parametrize("how", ["vmap", "make_fx", "aot_eager"])
def test_the_score_by_substitution_can_be_captured(how, dtype, tolerance):
    transform = perturb(T.AffineAutoregressive(autoregressive._LARGEST_DENSE_JACOBIAN + 2, hidden_dims=(9,))).to(dtype)
    z = torch.randn(4, transform.dim, dtype=dtype)

    def step(z):
        return transform.forward_with_score(z, -z)

    expected = step(z)
    if how == "vmap":
        found = torch.vmap(step)(z)
    elif how == "make_fx":
        found = make_fx(step)(torch.randn_like(z))(z)
    else:
        torch._dynamo.reset()
        found = torch.compile(step, backend="aot_eager", fullgraph=True)(z)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance(1e-9), atol=tolerance(1e-9))


@pytest.mark.parametrize("make", [T.AffineAutoregressive, T.SplineAutoregressive])
def test_the_inverse_is_the_same_with_and_without_gradients(make, dtype, tolerance):
    transform = perturb(make(6, context_dim=2)).to(dtype)
    x, context = 3 * torch.randn(7, 6, dtype=dtype), torch.randn(7, 2, dtype=dtype)
    z, log_det = transform.inverse_and_log_det(x, context)
    assert z.requires_grad
    assert log_det.requires_grad
    with torch.no_grad():
        for a, b in zip(transform.inverse_and_log_det(x, context), (z, log_det), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance(1e-12))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: T.AffineAutoregressive(0), ValueError, "AffineAutoregressive: dim must be at least 1, got 0"),
        (
            lambda: T.AffineAutoregressive(3, hidden_dims=()),
            ValueError,
            "MaskedMLP: needs hidden_dims with at least one",
        ),
        (lambda: T.AffineAutoregressive(3, hidden_dims=(4, 0)), ValueError, "all sizes at least 1"),
        (lambda: T.AffineAutoregressive(3, log_scale_bound=-1.0), ValueError, "log_scale_bound must be positive"),
        (lambda: T.SplineAutoregressive(3, num_bins=1), ValueError, "num_bins must be an integer of at least 2, got 1"),
        (
            lambda: T.SplineAutoregressive(3, width=1),
            TypeError,
            r"Autoregressive.__init__\(\) got an unexpected .* 'width'",
        ),
    ],
)
def test_errors_say_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()
