"""Base distributions with parameters: densities, draws, gradients through a flow, copies."""

import copy
import pickle

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transform_cases import perturb

from pyro_flowguides import NormalizingFlow, bases, flows

BASES = {
    "standard_normal": bases.StandardNormal,
    "diagonal_normal": bases.DiagonalNormal,
    "student_t": bases.StudentT,
    "student_t_unit_variance": lambda dim: bases.StudentT(dim, df=5.0, unit_variance=True),
}
WITH_PARAMETERS = {name: make for name, make in BASES.items() if name != "standard_normal"}
every_base = pytest.mark.parametrize("make", BASES.values(), ids=BASES)
every_base_with_parameters = pytest.mark.parametrize("make", WITH_PARAMETERS.values(), ids=WITH_PARAMETERS)


@every_base
def test_draws_follow_the_density(make, dtype):
    base = perturb(make(1).to(dtype))
    z = base().rsample((40_000,))
    assert z.dtype == dtype
    points = torch.linspace(-100, 100, 100_001, dtype=torch.float64)
    density = base.double()().log_prob(points.to(z.device).unsqueeze(-1)).exp().detach().cpu()
    probability = torch.cumulative_trapezoid(density, points)
    # Of two degrees of freedom a ten-thousandth lies outside.
    assert float(probability[-1]) == pytest.approx(1, abs=2e-4)
    z = z.detach().double().cpu().squeeze(-1).numpy()
    assert scipy.stats.kstest(z, lambda q: np.interp(q, points[1:], probability)).pvalue > 1e-4


@every_base
@pytest.mark.parametrize("batch_shape", [(), (4,), (3, 1)], ids=str)
def test_shapes(make, batch_shape, dtype):
    distribution = make(3).to(dtype)().expand(batch_shape)
    assert distribution.batch_shape == batch_shape and distribution.event_shape == (3,)
    z = distribution.rsample((5,))
    assert z.shape == (5, *batch_shape, 3)
    assert distribution.log_prob(z).shape == (5, *batch_shape)
    assert distribution.mean.shape == distribution.variance.shape == (*batch_shape, 3)


def test_density_of_the_normals(dtype, tolerance):
    z = 3 * torch.randn(10, 2, dtype=dtype)
    standard = bases.StandardNormal(2).to(dtype)().log_prob(z)
    torch.testing.assert_close(standard, dist.Normal(torch.zeros_like(z), 1.0).log_prob(z).sum(-1))
    base = bases.DiagonalNormal(2).to(dtype)
    torch.testing.assert_close(base().log_prob(z), standard)
    perturb(base)
    expected = dist.Normal(base.loc, base.log_scale.exp()).log_prob(z).sum(-1)
    torch.testing.assert_close(base().log_prob(z), expected)


@pytest.mark.parametrize("df", [1.001, 2.5, 10.0, 39.9, 40.1, 1e3, 1e6])
@pytest.mark.parametrize("unit_variance", [False, True])
def test_density_of_student_t(df, unit_variance, dtype, tolerance):
    if unit_variance and df < 2:
        pytest.skip("no variance")
    base = bases.StudentT(1, df, min_df=2.0 if df > 2 else 1.0, unit_variance=unit_variance).to(dtype)
    torch.testing.assert_close(float(base.df.detach()), df, rtol=1e-6, atol=0)
    df = float(base.df.detach())
    scale = ((df - 2) / df) ** 0.5 if unit_variance else 1.0
    z = torch.tensor([0.0, 1e-3, -0.7, 5.0, -300.0, 1e6], dtype=dtype).unsqueeze(-1)
    expected = z.new_tensor(scipy.stats.t(df, scale=scale).logpdf(z.squeeze(-1).cpu().numpy()))
    # scipy takes the difference of two log Γ, whose last digits are gone at 1e6.
    torch.testing.assert_close(base().log_prob(z), expected, rtol=tolerance(1e-6), atol=tolerance(1e-8))
    if unit_variance:
        torch.testing.assert_close(base().variance, torch.ones(1, dtype=dtype), rtol=1e-4, atol=0)


def test_variance_of_student_t_is_infinite_up_to_two_degrees_of_freedom(dtype):
    base = bases.StudentT(3, torch.tensor([1.5, 3.0, 4.0]), min_df=1.0).to(dtype)
    torch.testing.assert_close(base().variance, torch.tensor([torch.inf, 3.0, 2.0], dtype=dtype))


@pytest.mark.parametrize("df", [1.01, 3.0, 100.0, 1e5])
def test_draws_of_student_t_are_those_of_scipy(df, dtype):
    z = bases.StudentT(1, df, min_df=1.0).to(dtype)().rsample((50_000,))
    assert scipy.stats.kstest(z.detach().double().cpu().numpy()[:, 0], scipy.stats.t(df).cdf).pvalue > 1e-4


def test_tails_of_student_t_are_heavy(dtype):
    """Beyond 10 standard deviations a normal has no draw in 10²³, three degrees of freedom have one in a thousand."""
    z = bases.StudentT(1, 3.0).to(dtype)().sample((200_000,))
    expected = 2 * scipy.stats.t(3).sf(10)
    found = float((z.abs() > 10).double().mean())
    assert abs(found - expected) < 4 * (expected / 200_000) ** 0.5


def test_polar_draws_stay_finite_at_the_ends_of_the_uniforms(dtype):
    eps = torch.finfo(dtype).eps
    uniforms = torch.tensor([0.0, eps, 0.5, 1 - eps], dtype=dtype)
    df = torch.tensor([1.0, 2.0, 1e6], dtype=dtype).unsqueeze(-1).requires_grad_()
    z = bases._polar(df, uniforms, torch.full_like(uniforms, 0.1))
    z.sum().backward()
    assert z.isfinite().all() and df.grad.isfinite().all()


def test_draws_move_with_the_degrees_of_freedom(dtype, tolerance):
    """The derivative of a quantile: −∂F/∂ν / f, by finite differences of scipy, averaged over an odd function of z."""
    base = bases.StudentT(1, 4.0, min_df=1.0).to(dtype)
    z = base().rsample((400_000,))
    # E[log(1 + z²)] as a function of ν.
    (gradient,) = torch.autograd.grad(torch.log1p(z.square()).mean(), base.log_excess)

    def expectation(df):
        return scipy.stats.t(df).expect(lambda x: torch.log1p(torch.as_tensor(x) ** 2).item(), epsrel=1e-10)

    expected = (expectation(4.01) - expectation(3.99)) / 0.02 * 3.0  # ν − 1 = exp(log_excess)
    assert float(gradient) == pytest.approx(expected, rel=0.05)


@every_base_with_parameters
@pytest.mark.parametrize("gradient", ["total", "path"])
def test_gradients_reach_the_base_through_a_flow(make, gradient, dtype, tolerance):
    base = perturb(make(3).to(dtype))
    transform = perturb(flows.coupling(3, num_layers=2).to(dtype))
    parameters = list(base.parameters())
    torch.manual_seed(1)
    x, log_prob = NormalizingFlow(base(), transform, gradient=gradient).rsample_and_log_prob((6,))
    weights = torch.arange(1.0, 7.0, dtype=dtype)
    found = torch.autograd.grad((weights * log_prob).sum(), parameters)
    torch.manual_seed(1)
    x = NormalizingFlow(base(), transform).rsample((6,))
    scored_by = base if gradient == "total" else copy.deepcopy(base).requires_grad_(False)
    log_prob = NormalizingFlow(scored_by(), copy.deepcopy(transform).requires_grad_(False)).log_prob(x)
    expected = torch.autograd.grad((weights * log_prob).sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=tolerance(1e-6), atol=tolerance(1e-6) * max(1.0, float(b.abs().max())))


@every_base
@pytest.mark.parametrize("gradient", ["total", "path"])
def test_draws_can_be_captured(make, gradient, dtype):
    base = perturb(make(3).to(dtype))
    transform = perturb(flows.coupling(3, num_layers=2).to(dtype))

    def draw(scale):
        x, log_prob = NormalizingFlow(base(), transform, gradient=gradient).rsample_and_log_prob((4,))
        return scale * x, log_prob

    one = torch.ones((), dtype=dtype)
    captured = make_fx(draw)(one)
    draws = [draw(one), captured(one), captured(one)]
    assert not torch.allclose(draws[1][0], draws[2][0])
    for x, log_prob in draws:
        expected = NormalizingFlow(base(), transform).log_prob(x)
        torch.testing.assert_close(log_prob, expected, rtol=1e-3, atol=1e-3)


@every_base
def test_fixed_draws_are_antithetic_and_follow_the_parameters(make, dtype, tolerance):
    base = perturb(make(2).to(dtype))
    z = base.fixed_draws(2000)
    assert z.shape == (4001, 2) and z.dtype == dtype
    torch.testing.assert_close(base.fixed_draws(2000), z, rtol=0, atol=0)
    centre = base().mean
    torch.testing.assert_close(z[0], centre)
    torch.testing.assert_close(z[1:2001] - centre, centre - z[2001:], rtol=tolerance(1e-9), atol=tolerance(1e-9))
    draws = base().sample((20_000,))
    # The median of |z − centre| of 2000 pairs has a standard error below 3%.
    torch.testing.assert_close(
        (z - centre).abs().median(0).values, (draws - centre).abs().median(0).values, rtol=0.12, atol=0
    )


@every_base
def test_copies_pickles_state_dicts_and_devices(make, dtype):
    base = perturb(make(3).to(dtype))
    fresh = make(3).to(dtype)
    fresh.load_state_dict(base.state_dict())
    z = torch.randn(4, 3, dtype=dtype)
    for other in (copy.deepcopy(base), pickle.loads(pickle.dumps(base)), fresh):
        torch.testing.assert_close(other().log_prob(z), base().log_prob(z), rtol=0, atol=0)
    assert "dim=3" in repr(base)
    on_meta = base.to("meta")()
    assert on_meta.rsample().device.type == "meta"
    assert on_meta.log_prob(z.to("meta")).dtype == dtype


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: bases.StandardNormal(0), ValueError, "StandardNormal: dim must be at least 1, got 0"),
        (lambda: bases.DiagonalNormal(2.0), TypeError, "DiagonalNormal: dim must be an integer, got 2.0"),
        (lambda: bases.StudentT(-1), ValueError, "StudentT: dim must be at least 1"),
        (lambda: bases.StudentT(2, 2.0), ValueError, "df must be finite and above min_df = 2.0, got 2.0"),
        (lambda: bases.StudentT(2, 0.5, min_df=1.0), ValueError, "above min_df = 1.0, got 0.5"),
        (lambda: bases.StudentT(2, float("inf")), ValueError, "df must be finite"),
        (lambda: bases.StudentT(2, float("nan")), ValueError, "df must be finite"),
        (lambda: bases.StudentT(2, torch.tensor([3.0, 1.0])), ValueError, "above min_df = 2.0"),
        (lambda: bases.StudentT(2, torch.full((3,), 5.0)), ValueError, r"have shape \(2,\), got shape \(3,\)"),
        (lambda: bases.StudentT(2, min_df=0.5), ValueError, "min_df must be at least 1, got 0.5"),
        (lambda: bases.StudentT(2, min_df=1.0, unit_variance=True), ValueError, "min_df must be at least 2, for a var"),
    ],
)
def test_errors_say_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()
