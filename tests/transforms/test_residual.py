"""Residual flows, beyond the contract that every transform keeps: the Lipschitz bound and the estimators of log_det."""

import pytest
import torch
from transform_cases import perturb

from pyro_flowguides import transforms as T
from pyro_flowguides.flows import residual
from pyro_flowguides.transforms.networks import LipschitzMLP


def make(dim, *, seed=0, **options):
    """A residual flow with perturbed weights; the same weights for the same seed and sizes."""
    torch.manual_seed(seed)
    return perturb(T.Residual(dim, **options).double())


def jacobian_of_g(transform, z, context=None):
    point_jacobian = torch.func.jacrev(lambda point: transform.g(point, context))
    return torch.vmap(point_jacobian)(z)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("lipschitz", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("dim", [1, 2, 7, 64])
def test_no_singular_value_exceeds_the_lipschitz_bound(dim, lipschitz, scale, dtype):
    transform = T.Residual(dim, lipschitz=lipschitz, context_dim=2)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    transform = transform.to(dtype)
    z, context = 3 * torch.randn(200, dim, dtype=dtype), 10 * torch.randn(2, dtype=dtype)
    largest = torch.linalg.matrix_norm(jacobian_of_g(transform, z, context), 2).max().item()
    assert 0 < largest <= lipschitz * (1 + 1e-5)


@pytest.mark.parametrize("value", [0.0, 1e-20, 1.0])
def test_gradients_are_finite_at_zero_and_repeated_singular_values(value):
    transform = T.Residual(3, hidden_dims=(3, 3)).double()
    with torch.no_grad():
        for layer in transform.g.layers:
            layer.weight.copy_(value * torch.eye(3))
    x, log_det = transform.forward_and_log_det(torch.randn(5, 3, dtype=torch.float64))
    (x.square().sum() + log_det.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in transform.parameters())


@pytest.mark.parametrize("hidden_dims", [(32,), (5, 9), (9, 5), (9, 5, 7)])
@pytest.mark.parametrize("dim", [1, 3, 12])
def test_exact_log_det_wherever_the_network_is_narrowest(dim, hidden_dims):
    transform = make(dim, hidden_dims=hidden_dims)
    assert transform.g.sizes[transform.cut] == min(dim, *hidden_dims)
    z = torch.randn(10, dim, dtype=torch.float64)
    matrix = torch.eye(dim, dtype=torch.float64) + jacobian_of_g(transform, z)
    _, log_det = transform.forward_and_log_det(z)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(matrix).logabsdet, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_terms", [1, 2, 5, 20, 100])
@pytest.mark.parametrize(("dim", "hidden_dims"), [(3, (16,)), (12, (6, 6))])
def test_series_is_within_its_bound_of_the_exact_log_det(dim, hidden_dims, num_terms):
    exact = make(dim, hidden_dims=hidden_dims, log_det="exact")
    series = make(dim, hidden_dims=hidden_dims, log_det="series", num_terms=num_terms)
    z = torch.randn(50, dim, dtype=torch.float64)
    error = (series.forward_and_log_det(z)[1] - exact.forward_and_log_det(z)[1]).abs().max().item()
    bound = min(dim, *hidden_dims) * 0.9 ** (num_terms + 1) / ((num_terms + 1) * 0.1)
    assert error <= bound
    # Score and inverse are exact whatever log_det is; only ∇ log_det differs.
    x = exact(z)
    torch.testing.assert_close(series.inverse_and_log_det(x)[0], z, rtol=0, atol=1e-10)


def test_default_number_of_terms_keeps_the_error_per_dimension_below_a_thousandth():
    for lipschitz in (0.5, 0.9, 0.97):
        num_terms = T.Residual(2, lipschitz=lipschitz).num_terms
        assert lipschitz ** (num_terms + 1) / ((num_terms + 1) * (1 - lipschitz)) <= 1e-3
        assert lipschitz**num_terms / (num_terms * (1 - lipschitz)) > 1e-3


@pytest.mark.parametrize("mode", ["hutchinson", "roulette"])
@pytest.mark.parametrize("num_terms", [3, 12])
def test_estimators_are_unbiased_for_the_truncated_series(mode, num_terms):
    """In their values, and in the gradients of a loss that weights the points unequally, at 4 standard errors."""
    options = {"hidden_dims": (8,), "num_terms": num_terms}
    series, estimator = make(3, log_det="series", **options), make(3, log_det=mode, **options)
    points = torch.randn(4, 3, dtype=torch.float64)
    point_weights = torch.tensor([2.0, 0.5, -1.0, 0.0], dtype=torch.float64)
    num_batches, batch = 200, 100

    def value_and_gradient(transform, z):
        """log_det, and the gradient of its weighted sum to the points and to every parameter but the last bias."""
        z = z.clone().requires_grad_()
        _, log_det = transform.forward_and_log_det(z)
        parameters = [parameter for name, parameter in transform.named_parameters() if name != "g.layers.1.bias"]
        to_z, *to_parameters = torch.autograd.grad((log_det * point_weights).sum(), [z, *parameters])
        return log_det.detach(), [to_z.reshape(-1, 4, 3).sum(0), *to_parameters]

    expected_value, expected_gradient = value_and_gradient(series, points)
    draws = [value_and_gradient(estimator, points.expand(batch, 4, 3)) for _ in range(num_batches)]
    values = torch.cat([value for value, _ in draws])
    standard_error = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - expected_value).abs() < 4 * standard_error).all()
    for expected, *estimates in zip(expected_gradient, *[gradient for _, gradient in draws], strict=True):
        estimates = torch.stack(estimates) / batch
        standard_error = estimates.std(0) / num_batches**0.5
        assert ((estimates.mean(0) - expected).abs() <= 4 * standard_error + 1e-12).all()


def test_a_term_counts_for_one_on_average():
    """Each divided by the probability with which it is taken: the mean over all places where the roulette may stop."""
    stop = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    roulette, hutchinson = make(2, log_det="roulette", lipschitz=0.7), make(2, log_det="hutchinson")
    before = stop >= 0
    for k in range(1, 15):
        weight = roulette._term_weight(k, stop)
        assert float(weight.mean()) == pytest.approx(1, rel=1e-3)
        assert torch.equal(hutchinson._term_weight(k, stop), torch.ones_like(stop))
        # Four terms are always taken; after that, none without the one before it.
        taken = weight != 0
        assert bool(taken.all()) == (k <= 4)
        assert not (taken & ~before).any()
        before = taken


def test_estimators_agree_with_the_exact_log_det_on_average_by_default():
    exact = make(2, log_det="exact")
    z = torch.randn(1, 2, dtype=torch.float64).expand(20_000, 2)
    for mode in ("hutchinson", "roulette"):
        estimator = make(2, log_det=mode)
        _, log_det = estimator.forward_and_log_det(z)
        error = (log_det.mean() - exact.forward_and_log_det(z[0])[1]).abs()
        assert error < 4 * log_det.std() / len(z) ** 0.5 + 2e-3


@pytest.mark.parametrize("mode", ["hutchinson", "roulette"])
def test_solves_of_the_estimators_are_exact(mode):
    """The noise is that of log_det alone: the inverse, its gradient, and the score from a given ∇ log_det have none."""
    exact, estimator = make(3, log_det="exact"), make(3, log_det=mode)
    z = 20 * torch.rand(50, 3, dtype=torch.float64) - 10
    x, log_det = estimator.forward_and_log_det(z)
    solved, inverse_log_det = estimator.inverse_and_log_det(x)
    torch.testing.assert_close(solved, z, rtol=0, atol=1e-9)
    assert log_det.shape == inverse_log_det.shape == (50,)
    x = x.detach().requires_grad_()
    found, expected = [
        torch.autograd.grad(transform.inverse_and_log_det(x)[0].sin().sum(), [x, *transform.parameters()])
        for transform in (estimator, exact)
    ]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    *_, score = estimator.forward_with_score(z[:1].expand(20_000, 3), -z[:1])
    *_, expected_score = exact.forward_with_score(z[:1], -z[:1])
    standard_error = score.std(0) / len(score) ** 0.5
    assert ((score.mean(0) - expected_score).abs() < 4 * standard_error + 5e-3).all()


def test_estimators_draw_anew_for_every_point_and_call():
    transform = make(3, log_det="hutchinson")
    z = torch.zeros(5, 3, dtype=torch.float64)
    first, second = (transform.forward_and_log_det(z)[1] for _ in range(2))
    assert len(first.unique()) > 1
    assert not torch.equal(first, second)
    mapped = torch.vmap(lambda point: transform.forward_and_log_det(point)[1], randomness="different")(z)
    assert len(mapped.unique()) > 1


def test_estimators_can_be_captured():
    transform = make(3, log_det="roulette", lipschitz=0.5, num_terms=4)

    def step(z):
        return transform.forward_with_score(z, -z)

    z = torch.randn(4, 3, dtype=torch.float64)
    captured = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(captured(z)[0], step(z)[0])
    assert not torch.equal(captured(z)[1], captured(z)[1])


def test_auto_is_exact_up_to_the_threshold():
    assert T.Residual(200).log_det == "exact"
    assert T.Residual(8, hidden_dims=(64, 64)).log_det == "exact"
    assert T.Residual(8, hidden_dims=(64, 64), exact_threshold=4).log_det == "hutchinson"
    assert T.Residual(200, hidden_dims=(200,)).log_det == "hutchinson"


def test_a_random_log_det_is_declared():
    exact, noisy = T.Residual(2, context_dim=1), T.Residual(2, log_det="roulette", context_dim=1)
    assert not exact.stochastic_log_det
    assert not T.Residual(2, log_det="series").stochastic_log_det
    assert not T.Planar(2).stochastic_log_det
    assert noisy.stochastic_log_det
    assert noisy.inv.stochastic_log_det
    assert noisy.condition(torch.zeros(1)).stochastic_log_det
    assert T.Compose([exact, noisy]).stochastic_log_det
    assert not T.Compose([exact, exact]).stochastic_log_det
    assert residual(2, num_layers=2, log_det="hutchinson").stochastic_log_det


def test_an_unsolved_inverse_is_nan():
    z, _ = T.Residual(2).inverse_and_log_det(torch.tensor([[0.5, 0.5], [torch.inf, 0.0]]))
    assert z[0].isfinite().all()
    assert z[1].isnan().all()


@pytest.mark.parametrize("sharpness", [0.5, 100.0, 1e4])
@pytest.mark.parametrize("lipschitz", [0.9, 0.97])
def test_inverse_of_sharp_networks(lipschitz, sharpness):
    transform = T.Residual(2, lipschitz=lipschitz).double()
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(30 * torch.randn_like(parameter))
        transform.g.sharpness.fill_(sharpness)
        transform.g.layers[0].bias.mul_(0.1)
    z = 20 * torch.rand(2000, 2, dtype=torch.float64) - 10
    x = transform(z)
    torch.testing.assert_close(transform(transform.inverse_and_log_det(x)[0]), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: T.Residual(2, lipschitz=1.0), r"Residual: lipschitz must be in \(0, 1\) .* got 1.0"),
        (lambda: T.Residual(2, lipschitz=0.0), r"must be in \(0, 1\)"),
        (lambda: T.Residual(2, log_det="trace"), "log_det must be one of 'auto', 'exact', .* got 'trace'"),
        (lambda: T.Residual(2, num_terms=0), "num_terms must be at least 1"),
        (lambda: T.Residual(2, hidden_dims=()), "LipschitzMLP: needs hidden_dims with at least one layer"),
        (lambda: LipschitzMLP(2, 2, lipschitz=1.5), r"lipschitz must be in \(0, 1\], got 1.5"),
    ],
)
def test_errors_say_what_is_wrong(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


@pytest.mark.parametrize("lipschitz", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_series_of_the_solves_ends_at_the_rounding_of_the_dtype(lipschitz, dtype):
    steps, eps = T.Residual(2, lipschitz=lipschitz)._steps_to_the_last_digit(dtype), torch.finfo(dtype).eps
    assert lipschitz**steps <= eps * (1 + 1e-9)
    assert lipschitz ** (steps - 1) > eps
