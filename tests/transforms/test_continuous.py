"""Continuous flows, beyond the contract: traces from the papers, orders of convergence, Hutchinson, solvers, penalties."""

import copy
import math
import sys

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from transform_cases import perturb

from pyro_flowguides import NormalizingFlow
from pyro_flowguides import transforms as T
from pyro_flowguides.flows import continuous_planar, ffjord
from pyro_flowguides.testing.law import jacobian_and_gradient
from pyro_flowguides.transforms.numerics import tanh_derivative

D, M = 3, 5
FIELDS = {
    "planar": lambda dim: T.PlanarField(dim, M),
    "sylvester": lambda dim: T.SylvesterField(dim, 2),
    "network": lambda dim: T.NetworkField(dim, (8,)),
}
every_field = pytest.mark.parametrize("kind", FIELDS)


class Linear(nn.Module):
    """A field of a user's own: f(t, x) = 2t A x, whose flow is exp(A)."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, t, x):
        return 2 * t * x @ self.matrix.mT


def make_field(kind, dim=D, seed=0):
    torch.manual_seed(seed)
    return perturb(FIELDS[kind](dim).double())


def make(kind, dim=D, **options):
    return T.Continuous(dim, make_field(kind, dim), **options)


def points(*shape):
    return torch.randn(*shape, D, dtype=torch.float64)


# --- fields -----------------------------------------------------------------------------------------------------------


def test_trace_of_a_planar_field_by_the_formula_of_chen_et_al():
    """(2018), section 4: f is a sum of u h(wᵀx + b), each with a gate of t, and so its trace one of h′(wᵀx + b) uᵀw."""
    field = make_field("planar")
    u, w, b, c, level, slope = field.parameters_of().split([D * M, D * M, M, M, M, M])
    x, t = points(7), 0.3
    velocity, trace = torch.zeros_like(x), torch.zeros(7, dtype=torch.float64)
    for m in range(M):
        u_m, w_m = u.reshape(D, M)[:, m], w.reshape(D, M)[:, m] / math.sqrt(D)
        gate = 2 / (1 + torch.exp(-level[m] - slope[m] * (t - 0.5)))
        h = torch.tanh(x @ w_m + b[m] + c[m] * t)
        velocity += gate * h.unsqueeze(-1) * u_m
        trace += gate * (1 - h**2) * (u_m @ w_m)
    for found, expected in zip(field.bind().rates(t, x), (velocity, trace), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(field(t, x), velocity, rtol=1e-12, atol=1e-12)


def test_trace_of_a_sylvester_field_by_the_cyclic_property():
    """f = A h(Bᵀx + b) with A = QR, B = QR̃ᵀ: tr A diag(h′) Bᵀ = Σ h′ (BᵀA) on the diagonal, and BᵀA = R̃R as QᵀQ = I."""
    field = make_field("sylvester")
    out, into, b, c, level, slope = field.parameters_of().split([4, 4, 2, 2, 2, 2])
    r, r_tilde = out.reshape(2, 2), into.reshape(2, 2).mT / math.sqrt(2)
    bound, x, t = field.bind(), points(7), 0.3
    q = bound.out @ torch.linalg.inv(r)
    torch.testing.assert_close(q.mT @ q, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-12)
    arguments = x @ q @ r_tilde.mT + b + c * t
    gate = 2 * torch.sigmoid(level + slope * (t - 0.5))
    velocity = (gate * torch.tanh(arguments)) @ (q @ r).mT
    trace = (gate * tanh_derivative(arguments)) @ (r_tilde @ r).diagonal()
    for found, expected in zip(bound.rates(t, x), (velocity, trace), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@every_field
def test_rates_of_trace_and_score_and_the_norm_by_autograd(kind):
    flow, x, t = make(kind), points(4), torch.tensor(0.7, dtype=torch.float64)
    bound, score = flow._bind(None), points(4)

    def trace_at(point):
        return torch.func.jacrev(lambda y: flow.field(t, y))(point).trace()

    jacobian = torch.vmap(torch.func.jacrev(lambda y: flow.field(t, y)))(x)
    velocity, trace, rate = bound.rates_with_score(t, x, score)
    torch.testing.assert_close(velocity, flow.field(t, x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(trace, torch.vmap(trace_at)(x), rtol=1e-12, atol=1e-12)
    expected = -(jacobian.mT @ score.unsqueeze(-1)).squeeze(-1) - torch.vmap(torch.func.grad(trace_at))(x)
    torch.testing.assert_close(rate, expected, rtol=1e-11, atol=1e-11)
    assert not rate.requires_grad
    torch.testing.assert_close(bound.squared_norm(t, x), jacobian.square().sum((-2, -1)), rtol=1e-11, atol=1e-11)


def test_bounded_fields_carry_no_point_to_infinity():
    for kind in FIELDS:
        flow = make(kind)
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.mul_(100.0)
        z = 1e6 * points(50)
        x, log_det = flow.forward_and_log_det(z)
        assert x.isfinite().all()
        assert log_det.isfinite().all()


# --- the solver -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_flow_of_a_linear_field_of_a_users_own_is_the_matrix_exponential(solver):
    torch.manual_seed(0)
    matrix = torch.randn(D, D, dtype=torch.float64) / 2
    flow = T.Continuous(D, Linear(matrix), solver=solver, num_steps=64, rtol=1e-8, atol=1e-8)
    z = points(6)
    x, log_det, score = flow.forward_with_score(z, -z)
    expected = torch.linalg.matrix_exp(matrix)
    torch.testing.assert_close(x, z @ expected.mT, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_det, matrix.trace().expand(6), rtol=0, atol=1e-6)
    torch.testing.assert_close(score, -z @ torch.linalg.inv(expected), rtol=0, atol=1e-6)
    z_back, inverse_log_det = flow.inverse_and_log_det(x)
    torch.testing.assert_close(z_back, z, rtol=0, atol=1e-6)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-6)


@every_field
@pytest.mark.parametrize(("solver", "order", "num_steps"), [("euler", 1, 128), ("midpoint", 2, 16), ("rk4", 4, 8)])
def test_log_det_and_score_differ_from_those_of_the_steps_by_the_order_of_the_method(kind, solver, order, num_steps):
    """The steps are a map with a Jacobian of its own: autograd has its log-determinant and its score."""
    field, z = make_field(kind), points(20)
    errors = []
    for steps in (num_steps, 2 * num_steps):
        flow = T.Continuous(D, field, solver=solver, num_steps=steps)
        jacobian, gradient = jacobian_and_gradient(flow, z, None)
        x, log_det, score = flow.forward_with_score(z, -z)
        exact_score = torch.linalg.solve(jacobian.mT, (-z - gradient).unsqueeze(-1)).squeeze(-1)
        errors.append(
            [
                (log_det.detach() - torch.linalg.slogdet(jacobian).logabsdet).square().mean().sqrt(),
                (score - exact_score).square().mean().sqrt(),
            ]
        )
    for coarse, fine in zip(*torch.tensor(errors).tolist(), strict=True):
        assert fine < 0.05
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.5)


@every_field
def test_inverse_is_that_of_the_steps_to_the_last_digit(kind):
    flow, z = make(kind), 3 * points(50)
    x, log_det = flow.forward_and_log_det(z)
    z_back, inverse_log_det = flow.inverse_and_log_det(x)
    torch.testing.assert_close(z_back, z, rtol=0, atol=1e-10)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-10)


def test_a_point_that_the_inverse_cannot_settle_is_nan():
    flow = make("planar", num_steps=1)
    with torch.no_grad():
        flow.field.parameters_of.value.mul_(20.0)
    z, log_det = flow.inverse_and_log_det(points(20))
    assert z.isnan().any()
    assert torch.equal(z.isnan().any(-1), log_det.isnan())


@every_field
@torch.no_grad()
def test_what_half_the_step_changes_is_the_error(kind):
    flow, z = make(kind, num_steps=4), points(200)
    error = T.ode_error(T.Compose([flow, T.Reverse(D)]), z)
    x, log_det = flow.forward_and_log_det(z)
    exact_x, exact_log_det = make(kind, num_steps=64).forward_and_log_det(z)
    assert error.x == pytest.approx(float((x - exact_x).abs().max()), rel=0.3)
    assert error.log_det == pytest.approx(float((log_det - exact_log_det).abs().mean()), rel=0.3)
    with pytest.raises(ValueError, match="no continuous flow in this Planar"):
        T.ode_error(T.Planar(D), z)


# --- Hutchinson -------------------------------------------------------------------------------------------------------


def test_hutchinson_is_unbiased_over_20_000_probes():
    """log_det, the score and the squared norm of the Jacobian, at 4 standard errors."""
    exact, estimator = (make("network", trace=trace, num_steps=4) for trace in ("exact", "hutchinson"))
    z = points()
    many = z.expand(20_000, D)
    x, log_det, score = estimator.forward_with_score(many, -many)
    exact_x, exact_log_det, exact_score = exact.forward_with_score(z, -z)
    torch.testing.assert_close(x, exact_x.expand_as(x))
    norm = estimator._bind(None, estimator._draw_probe(many)).squared_norm(0.5, many)
    for estimates, expected in (
        (log_det, exact_log_det),
        (score, exact_score),
        (norm, exact._bind(None).squared_norm(0.5, z)),
    ):
        assert estimates.std() > 0
        assert ((estimates.mean(0) - expected).abs() < 4 * estimates.std(0) / len(many) ** 0.5).all()


def test_a_random_log_det_is_declared_and_its_generator_is_its_only_source():
    flows = [ffjord(D, hidden_dims=(8,), trace="hutchinson", generator=torch.Generator().manual_seed(1)) for _ in "ab"]
    flows[1].load_state_dict(perturb(flows[0]).state_dict())
    assert flows[0].stochastic_log_det
    assert not ffjord(D).stochastic_log_det
    z = points(5).float()
    (_, first), (_, second) = (flow.forward_and_log_det(z) for flow in flows)
    assert torch.equal(first, second)
    assert not torch.equal(first, flows[0].forward_and_log_det(z)[1])
    # The same probes with either step.
    assert T.ode_error(flows[0], z).log_det < 1e-3 < (first - flows[0].forward_and_log_det(z)[1]).abs().mean()


# --- torchdiffeq ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_gradients_with_dopri5_are_those_with_many_fixed_steps(adjoint, context_dim):
    torch.manual_seed(0)
    field = perturb(T.PlanarField(D, M, context_dim=context_dim, hidden_dims=(4,)).double())
    context = torch.randn(context_dim, dtype=torch.float64, requires_grad=True) if context_dim else None
    z = points(4).requires_grad_()
    wanted = [z, *field.parameters(), *([context] if context_dim else [])]
    gradients = []
    for options in ({"num_steps": 32}, {"solver": "dopri5", "adjoint": adjoint, "rtol": 1e-8, "atol": 1e-8}):
        x, log_det, score = T.Continuous(D, field, **options).forward_with_score(z, -z.detach(), context)
        gradients.append(torch.autograd.grad(x.sin().sum() + log_det.sum(), wanted))
        assert not score.requires_grad
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_without_torchdiffeq_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-flowguides\[ode\]'"):
        continuous_planar(D, solver="dopri5")


# --- regularisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", ["total", "path"])
def test_regularisation_is_part_of_the_gradient_of_a_draw_and_of_no_value(gradient):
    """For f = 2t A x: the integral of ‖f‖² along the way of each point, and of 4t²‖A‖², which is 4/3 ‖A‖²."""
    kinetic, jacobian = 0.3, 0.7
    torch.manual_seed(0)
    matrix = torch.randn(D, D, dtype=torch.float64) / 2
    base = dist.Normal(torch.zeros(D, dtype=torch.float64), 1.0).to_event(1)
    draws, gradients = [], []
    for weights in ({}, {"kinetic": kinetic, "jacobian": jacobian}):
        flow = T.Continuous(D, Linear(matrix.clone()), num_steps=32, **weights)
        torch.manual_seed(1)
        x, log_q = NormalizingFlow(base, flow, gradient=gradient).rsample_and_log_prob((6,))
        draws.append((x.detach(), log_q.detach()))
        gradients.append(torch.autograd.grad(log_q.sum(), flow.field.matrix)[0])
    for a, b in zip(*draws, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    leaf = matrix.clone().requires_grad_()
    torch.manual_seed(1)
    z, times = base.sample((6,)), (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    maps = torch.linalg.matrix_exp(times[:, None, None] ** 2 * leaf)
    velocities = 2 * times[:, None, None] * (z @ maps.mT @ leaf.mT)
    penalty = kinetic * velocities.square().sum(-1).mean(0) + jacobian * 4 / 3 * leaf.square().sum()
    (expected,) = torch.autograd.grad(penalty.sum(), leaf)
    torch.testing.assert_close(gradients[1] - gradients[0], expected, rtol=1e-5, atol=1e-5)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: T.Continuous(2, T.PlanarField(3)), "dim is 2, and the field has dim = 3"),
        (lambda: T.Continuous(2, T.PlanarField(2), solver="rk5"), "solver must be one of 'euler', .* got 'rk5'"),
        (lambda: T.Continuous(2, T.PlanarField(2), num_steps=0), "num_steps must be at least 1"),
        (lambda: T.Continuous(2, T.PlanarField(2), trace="hutchinson"), "PlanarField has a closed form"),
        (lambda: T.Continuous(2, T.NetworkField(2), trace="roulette"), 'trace must be "exact" or "hutchinson"'),
        (lambda: T.Continuous(2, T.NetworkField(2), adjoint=True), "adjoint goes with 'dopri5', .* not with 'rk4'"),
        (lambda: T.Continuous(2, T.NetworkField(2), kinetic=-1.0), "kinetic and jacobian must be at least 0"),
        (lambda: T.PlanarField(2, 0), "PlanarField: num_units must be at least 1"),
        (lambda: T.SylvesterField(2, 3), "SylvesterField: num_units must be at most dim = 2, got 3"),
        (lambda: T.NetworkField(2, ()), "NetworkField: needs hidden_dims with at least one layer"),
    ],
)
def test_errors_say_what_is_wrong(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


def test_a_copy_keeps_its_field_and_its_steps():
    flow = make("planar", num_steps=3)
    z = points(4)
    assert torch.equal(copy.deepcopy(flow)(z), flow(z))
    assert "num_steps=3" in repr(flow)
