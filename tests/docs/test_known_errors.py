"""Mistakes that tutorials repeat, beside the truth: what docs/known_errors.md refers to."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import Sylvester as PyroSylvester
from torch.nn.functional import conv2d, softplus
from transform_cases import perturb

from pyro_flowguides import NormalizingFlow
from pyro_flowguides import transforms as T


def jacobian_log_det(function, point):
    return torch.autograd.functional.jacobian(function, point).det().abs().log()


def test_no_layers_have_log_determinant_zero(dtype):
    z = torch.randn(3, 2, dtype=dtype)
    first, second = perturb(T.AffineCoupling(2).to(dtype)), perturb(T.Planar(2).to(dtype))
    x, log_det = T.Compose([first, second])(z[0]), T.Compose([first, second]).forward_and_log_det(z[0])[1]
    torch.testing.assert_close(log_det, jacobian_log_det(lambda point: second(first(point)), z[0]))
    # Started at 1, the sum would be off by this much.
    total = 1 + first.forward_and_log_det(z[0])[1] + second.forward_and_log_det(first(z[0]))[1]
    torch.testing.assert_close(total - log_det, torch.ones_like(log_det))
    assert torch.equal(x, second(first(z[0])))


def test_a_log_determinant_belongs_to_its_point(dtype):
    transform = perturb(T.AffineCoupling(3).to(dtype))
    z = torch.randn(4, 3, dtype=dtype)
    log_det = transform.forward_and_log_det(z)[1]
    assert log_det.shape == (4,)
    torch.testing.assert_close(log_det[0], jacobian_log_det(transform, z[0]))
    assert abs(log_det.sum() - log_det[0]) > 0.01


def test_the_inverse_convolution_has_the_opposite_log_determinant(dtype):
    linear = perturb(T.LULinear(3).to(dtype))
    x = torch.randn(3, dtype=dtype)
    log_det = linear.inverse_and_log_det(x)[1]
    torch.testing.assert_close(log_det, jacobian_log_det(lambda point: linear.inverse_and_log_det(point)[0], x))
    torch.testing.assert_close(log_det, -linear.forward_and_log_det(x)[1])
    assert log_det.abs() > 0.01


def test_a_convolution_takes_a_kernel_of_four_dimensions(dtype):
    matrix = torch.randn(2, 2, dtype=dtype)
    image = torch.randn(2, 3, 3, dtype=dtype)
    with pytest.raises(RuntimeError):
        conv2d(image.unsqueeze(0), matrix)

    def convolve(pixels):
        return conv2d(pixels.reshape(1, 2, 3, 3), matrix[..., None, None]).reshape(-1)

    expected = 9 * matrix.det().abs().log()
    torch.testing.assert_close(jacobian_log_det(convolve, image.reshape(-1)), expected, rtol=1e-4, atol=1e-4)


def test_the_log_determinant_of_pyros_sylvester_is_wrong(dtype):
    """Once this fails, Pyro has mended it, and the page should say from which version on."""
    theirs = perturb(PyroSylvester(3, count_transforms=2).to(dtype))
    z = torch.randn(3, dtype=dtype)
    truth = jacobian_log_det(theirs._call, z)
    reported = theirs.log_abs_det_jacobian(z, theirs(z)).detach()
    assert abs(reported - truth) > 0.01
    ours = perturb(T.Sylvester(3, 2).to(dtype))
    torch.testing.assert_close(ours.forward_and_log_det(z)[1], jacobian_log_det(ours, z))


def test_planar_is_invertible_above_minus_one(dtype):
    """In one dimension, x = z + u tanh(w z) increases for uw = −0.9, and does not for uw = −1.1."""
    z = torch.linspace(-2, 2, 101, dtype=dtype)
    assert (torch.diff(z - 0.9 * z.tanh()) > 0).all()
    assert (torch.diff(z - 1.1 * z.tanh()) < 0).any()


def test_planar_at_zero_is_the_identity_with_the_shift(dtype):
    zero = torch.zeros((), dtype=dtype)
    assert abs(softplus(zero) - 1) > 0.3
    torch.testing.assert_close(softplus(zero + math.log(math.e - 1)), torch.ones_like(zero))


def test_act_norm_divides_by_the_standard_deviation(dtype):
    draws = 5 + 3 * torch.randn(1000, 2, dtype=dtype)
    norm = T.ActNorm(2).to(dtype)
    norm.initialize(draws)
    standardised = norm(draws)
    torch.testing.assert_close(standardised.std(0), torch.ones(2, dtype=dtype), rtol=1e-2, atol=1e-2)
    assert ((draws - draws.mean(0)) / draws.var(0)).std(0).max() < 0.5


def test_the_logarithm_of_a_sigmoid_underflows():
    far = torch.tensor(-110.0, dtype=torch.float32)
    assert far.sigmoid().log() == -math.inf
    coupling = T.AffineCoupling(2)
    with torch.no_grad():
        for parameter in coupling.parameters():
            parameter.fill_(-100.0)
    assert coupling.forward_and_log_det(torch.ones(2))[1].isfinite()


def test_gradients_reach_the_input(dtype):
    transform = perturb(T.AffineCoupling(3).to(dtype))
    z = torch.randn(3, dtype=dtype, requires_grad=True)
    x, log_det = transform.forward_and_log_det(z)
    (x.sum() + log_det).backward()
    assert z.grad is not None and (z.grad != 0).all()


class CachedScale(torch.distributions.Transform):
    """x = 2 z, with an inverse that only looks up what it was last asked for."""

    bijective = True
    domain = codomain = torch.distributions.constraints.real

    def _call(self, z):
        self.last = z
        return 2 * z

    def _inverse(self, x):
        return self.last


def test_an_inverse_that_reads_a_cache_is_no_inverse(dtype):
    cached = CachedScale()
    z, elsewhere = torch.randn(3, dtype=dtype), torch.randn(3, dtype=dtype)
    assert torch.equal(cached.inv(cached(z)), z)  # the usual test passes
    assert not torch.allclose(2 * cached.inv(elsewhere), elsewhere)

    transform = perturb(T.AffineCoupling(3).to(dtype))
    flow = NormalizingFlow(dist.Normal(torch.zeros(3, dtype=dtype), 1.0).to_event(1), transform)
    flow.sample()
    torch.testing.assert_close(transform(transform.inv(elsewhere)), elsewhere)
    z, log_det = transform.inverse_and_log_det(elsewhere)
    torch.testing.assert_close(flow.log_prob(elsewhere), flow.base_dist.log_prob(z) + log_det)
