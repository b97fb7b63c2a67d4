"""Elementwise transforms: the initialisation of ActNorm, the unit cube."""

import pytest
import torch

from pyro_flowguides import transforms as T


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("batch_shape", [(500,), (20, 25)], ids=str)
def test_act_norm_standardises_the_draws_it_was_given(context_dim, batch_shape, dtype, tolerance):
    transform = T.ActNorm(3, context_dim=context_dim).to(dtype)
    z = 5 + torch.tensor([0.1, 1.0, 30.0], dtype=dtype) * torch.randn(*batch_shape, 3, dtype=dtype)
    transform.initialize(z)
    context = torch.zeros(context_dim, dtype=dtype) if context_dim else None
    x, log_det = transform.forward_and_log_det(z, context)
    x = x.reshape(-1, 3)
    torch.testing.assert_close(x.mean(0), torch.zeros(3, dtype=dtype), rtol=0, atol=tolerance(1e-6))
    torch.testing.assert_close(x.std(0), torch.ones(3, dtype=dtype), rtol=0, atol=tolerance(1e-6))
    expected = -z.reshape(-1, 3).std(0).log().sum().expand(batch_shape)
    torch.testing.assert_close(log_det, expected, rtol=0, atol=tolerance(1e-6))
    assert transform.parameters_of.value.requires_grad


def test_act_norm_does_not_initialise_itself():
    transform = T.ActNorm(2)
    z = 5 + 3 * torch.randn(100, 2)
    torch.testing.assert_close(transform(z), z)
    torch.testing.assert_close(transform(z), z)


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        (torch.zeros(1, 2), "needs at least 2 draws, got 1"),
        (torch.zeros(2), "needs at least 2 draws, got 1"),
        (torch.zeros(0, 2), "needs at least 2 draws, got 0"),
        (torch.tensor([[0.0, 1.0], [1.0, 1.0]]), r"do not vary in the coordinates \[1\]"),
        (torch.tensor([[0.0, 1.0], [1.0, torch.nan]]), r"do not vary in the coordinates \[1\]"),
        (torch.zeros(5, 3), r"draws of shape \(…, 2\), got \(5, 3\)"),
    ],
)
def test_act_norm_says_which_draws_it_cannot_use(draws, message):
    transform = T.ActNorm(2)
    with pytest.raises(ValueError, match=message):
        transform.initialize(draws)
    assert (transform.parameters_of.value == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sigmoid_in_the_tails(dtype):
    z = torch.tensor([-1e4, -200.0, -40.0, 0.0, 40.0, 200.0, 1e4], dtype=dtype).unsqueeze(-1)
    transform = T.Sigmoid(1)
    x, log_det = transform.forward_and_log_det(z)
    assert transform.codomain.check(x).all()
    assert ((x > 0) & (x < 1)).all()
    expected = -z.squeeze(-1).abs()
    expected[3] = -2 * torch.tensor(2.0, dtype=dtype).log()
    torch.testing.assert_close(log_det, expected)
    for boundary in (0.0, 1.0, -1.0, 2.0):
        for value in transform.inverse_and_log_det(torch.full((1,), boundary, dtype=dtype)):
            assert value.isfinite().all()
