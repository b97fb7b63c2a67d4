"""The contract of a transform, for every transform: exact log-determinants, inverses, scores and gradients."""

import copy
import pickle
import shutil
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transform_cases import (
    CASES,
    IDENTITY_AT_START,
    SCORE_OVERFLOWS,
    build,
    build_perturbed,
    case_id,
    jacobian_and_gradient,
    make_context,
)

from pyro_flowguides import transforms as T
from pyro_flowguides.transforms.univariate import ShiftScale

DIMS = [1, 2, 3, 7, 64]
# Some seconds of C++ each: one per structure.
INDUCTOR = ["lower_triangular_affine", "affine_coupling", "elementwise_spline"]
BATCH_SHAPES = [(), (5,), (2, 3)]
every_case = pytest.mark.parametrize("case", CASES, ids=case_id)
every_dim = pytest.mark.parametrize("dim", DIMS)


@every_case
@every_dim
def test_log_det_is_that_of_the_jacobian(case, dim, dtype, tolerance):
    transform = build_perturbed(case, dim, dtype)
    z, context = 2 * torch.randn(4, dim, dtype=dtype), make_context(case, (4,), dtype)
    _, log_det = transform.forward_and_log_det(z, context)
    jacobian, _ = jacobian_and_gradient(transform, z, context)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(log_det, expected, rtol=0, atol=tolerance(1e-10))


@every_case
@every_dim
def test_inverse_leaves_no_residual(case, dim, dtype, tolerance):
    transform = build_perturbed(case, dim, dtype)
    z, context = 20 * torch.rand(50, dim, dtype=dtype) - 10, make_context(case, (50,), dtype)
    x, log_det = transform.forward_and_log_det(z, context)
    z_back, inverse_log_det = transform.inverse_and_log_det(x, context)
    x_back, log_det_back = transform.forward_and_log_det(z_back, context)
    torch.testing.assert_close(x_back, x, rtol=tolerance(1e-12), atol=tolerance(1e-9))
    torch.testing.assert_close(inverse_log_det, -log_det_back, rtol=0, atol=tolerance(1e-9))


@every_case
@every_dim
def test_score_follows_the_change_of_variables(case, dim, dtype, tolerance):
    transform = build_perturbed(case, dim, dtype)
    z, context = torch.randn(4, dim, dtype=dtype), make_context(case, (4,), dtype)
    score = torch.randn(4, dim, dtype=dtype)
    x, log_det, score_at_x = transform.forward_with_score(z, score, context)
    jacobian, gradient = jacobian_and_gradient(transform, z, context)
    # Compared before the solve, relative to the terms that cancel: a random D = 64 map can be ill-conditioned.
    size = score_at_x.detach().abs().max().clamp(min=1.0).item()
    torch.testing.assert_close(
        (jacobian.mT @ score_at_x.unsqueeze(-1)).squeeze(-1) + gradient, score, rtol=0, atol=tolerance(1e-9) * size
    )
    expected_x, expected_log_det = transform.forward_and_log_det(z, context)
    torch.testing.assert_close(x, expected_x)
    torch.testing.assert_close(log_det, expected_log_det)
    assert not score_at_x.requires_grad


@every_case
@pytest.mark.parametrize("dim", [2, 3])
def test_generic_score_agrees_with_the_closed_form(case, dim, dtype, tolerance):
    transform = build_perturbed(case, dim, dtype)
    z, context = torch.randn(4, dim, dtype=dtype), make_context(case, (4,), dtype)
    score = torch.randn(4, dim, dtype=dtype)
    closed_form = transform.forward_with_score(z, score, context)
    generic = T.FlowTransform.forward_with_score(transform, z, score, context)
    for a, b in zip(closed_form, generic, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance(1e-8), atol=tolerance(1e-8))


@every_case
@pytest.mark.parametrize("dim", [1, 3])
def test_score_keeps_the_graph_of_the_draw(case, dim, dtype, tolerance):
    """x of forward_with_score has the same gradients as x of forward_and_log_det."""
    transform = build_perturbed(case, dim, dtype)
    z, context = torch.randn(4, dim, dtype=dtype, requires_grad=True), make_context(case, (4,), dtype)
    inputs = [z, *transform.parameters()]
    x, log_det, _ = transform.forward_with_score(z, torch.randn(4, dim, dtype=dtype), context)
    expected_x, expected_log_det = transform.forward_and_log_det(z, context)
    found = torch.autograd.grad(x.sin().sum() + log_det.sum(), inputs, allow_unused=True)
    expected = torch.autograd.grad(expected_x.sin().sum() + expected_log_det.sum(), inputs, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=tolerance(1e-9), atol=tolerance(1e-9))


@every_case
@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("direction", ["forward_and_log_det", "inverse_and_log_det"])
def test_gradients_against_finite_differences(case, dim, direction, dtype):
    if dtype == torch.float32:
        pytest.skip("finite differences need float64")
    transform = build_perturbed(case, dim, dtype)
    names = [name for name, _ in transform.named_parameters()]
    value, context = torch.randn(2, dim, dtype=dtype, requires_grad=True), make_context(case, (2,), dtype)

    def function(value, context, *parameters):
        return torch.func.functional_call(
            _Method(transform, direction),
            {f"transform.{name}": parameter for name, parameter in zip(names, parameters, strict=True)},
            (value, context),
        )

    context = None if context is None else context.requires_grad_()
    parameters = [parameter.detach().requires_grad_() for parameter in transform.parameters()]
    assert torch.autograd.gradcheck(function, (value, context, *parameters), atol=1e-6, rtol=1e-4, fast_mode=True)


class _Method(torch.nn.Module):
    """A method of a transform as a module, for functional_call."""

    def __init__(self, transform, method):
        super().__init__()
        self.transform = transform
        self.method = method

    def forward(self, value, context):
        return getattr(self.transform, self.method)(value, context)


@every_case
@pytest.mark.parametrize("batch_shape", BATCH_SHAPES, ids=str)
def test_batch_shapes(case, batch_shape, dtype, tolerance):
    transform = build_perturbed(case, 3, dtype)
    z, context = torch.randn(*batch_shape, 3, dtype=dtype), make_context(case, batch_shape, dtype)
    x, log_det = transform.forward_and_log_det(z, context)
    z_back, inverse_log_det = transform.inverse_and_log_det(x, context)
    *_, score = transform.forward_with_score(z, -z, context)
    assert x.shape == z_back.shape == score.shape == z.shape
    assert log_det.shape == inverse_log_det.shape == batch_shape
    flat_context = None if context is None else context.reshape(-1, context.shape[-1])
    for i, row in enumerate(z.reshape(-1, 3)):
        row_context = None if flat_context is None else flat_context[i]
        expected_x, expected_log_det = transform.forward_and_log_det(row, row_context)
        torch.testing.assert_close(x.reshape(-1, 3)[i], expected_x, rtol=0, atol=tolerance(1e-10))
        torch.testing.assert_close(log_det.reshape(-1)[i], expected_log_det, rtol=0, atol=tolerance(1e-10))


@pytest.mark.parametrize("case", [case for case in CASES if case[1]], ids=case_id)
def test_context_broadcasts_with_the_points(case, dtype, tolerance):
    transform = build_perturbed(case, 3, dtype)
    z, context = torch.randn(5, 1, 3, dtype=dtype), make_context(case, (4,), dtype)
    x, log_det = transform.forward_and_log_det(z, context)
    assert x.shape == (5, 4, 3) and log_det.shape == (5, 4)
    bound = transform.condition(context)
    assert bound.context_dim == 0
    for method, arguments in [("forward_and_log_det", (z,)), ("inverse_and_log_det", (x,))]:
        with_context = getattr(transform, method)(*arguments, context)
        for a, b in zip(getattr(bound, method)(*arguments), with_context, strict=True):
            torch.testing.assert_close(a, b)
    *_, score = bound.forward_with_score(z, -z)
    torch.testing.assert_close(score, transform.forward_with_score(z, -z, context)[2])
    other_x, _ = transform.forward_and_log_det(z, context + 1)
    assert not torch.allclose(other_x, x), "the context has no effect"


@every_case
def test_vmap_equals_batch(case, dtype, tolerance):
    transform = build_perturbed(case, 3, dtype)
    z, context = torch.randn(4, 3, dtype=dtype), make_context(case, (4,), dtype)
    in_dims = (0, None if context is None else 0)
    for method in ("forward_and_log_det", "inverse_and_log_det"):
        found = torch.vmap(getattr(transform, method), in_dims)(z, context)
        for a, b in zip(found, getattr(transform, method)(z, context), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance(1e-9), atol=tolerance(1e-9))
    found = torch.vmap(lambda z, c: transform.forward_with_score(z, -z, c), in_dims)(z, context)
    for a, b in zip(found, transform.forward_with_score(z, -z, context), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance(1e-9), atol=tolerance(1e-9))


@pytest.mark.parametrize(
    ("case", "how"),
    [
        *(pytest.param(case, "make_fx", id=f"make_fx-{case_id(case)}") for case in CASES),
        *(pytest.param(case, "aot_eager", id=f"aot_eager-{case_id(case)}", marks=pytest.mark.slow) for case in CASES),
        *(pytest.param((name, 0), "inductor", id=f"inductor-{name}", marks=pytest.mark.slow) for name in INDUCTOR),
    ],
)
def test_captured_equals_eager(case, how, dtype, tolerance):
    if how == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    transform = build_perturbed(case, 3, dtype)
    z, context = torch.randn(4, 3, dtype=dtype), make_context(case, (4,), dtype)

    def step(z):
        x, log_det, score = transform.forward_with_score(z, -z, context)
        return x, log_det, score, *transform.inverse_and_log_det(x, context)

    if how == "make_fx":
        captured = make_fx(step)(z)
    else:
        torch._dynamo.reset()
        captured = torch.compile(step, backend=how, fullgraph=True)
    z = torch.randn(4, 3, dtype=dtype)
    for a, b in zip(captured(z), step(z), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance(1e-9), atol=tolerance(1e-9))


@pytest.mark.parametrize("case", IDENTITY_AT_START, ids=case_id)
@every_dim
def test_starts_as_the_identity_with_gradients(case, dim):
    transform = build(case, dim, torch.float32)
    z, context = torch.randn(20, dim), make_context(case, (20,), torch.float32)
    x, log_det = transform.forward_and_log_det(z, context)
    torch.testing.assert_close(x, z, rtol=0, atol=1e-6)
    torch.testing.assert_close(log_det, torch.zeros(20), rtol=0, atol=1e-6)
    (x.square().sum() + x.sin().sum() + log_det.sum()).backward()
    for name, parameter in transform.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"no gradient to {name}"


@every_case
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_far_points_stay_finite_in_float32(case, scale):
    transform = build_perturbed(case, 3, torch.float32)
    z, context = scale * torch.randn(50, 3), make_context(case, (50,), torch.float32)
    x, log_det, score = transform.forward_with_score(z, -z, context)
    for value in (x, log_det) if case[0] in SCORE_OVERFLOWS else (x, log_det, score):
        assert value.isfinite().all()
    for value in transform.inverse_and_log_det(z, context):
        assert value.isfinite().all()


@every_case
def test_copies_pickles_and_state_dicts(case, dtype):
    transform = build_perturbed(case, 3, dtype)
    z, context = torch.randn(4, 3, dtype=dtype), make_context(case, (4,), dtype)
    expected, _ = transform.forward_and_log_det(z, context)
    copies = [copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))]
    fresh = build(case, 3, dtype)
    fresh.load_state_dict(transform.state_dict())
    for other in [*copies, fresh]:
        torch.testing.assert_close(other.forward_and_log_det(z, context)[0], expected, rtol=0, atol=0)
    assert "dim=3" in repr(transform)


@every_case
def test_dtype_and_device_follow_the_transform(case):
    for dtype in (torch.float32, torch.float64):
        transform = build_perturbed(case, 3, dtype).to("meta")
        z = torch.randn(4, 3, dtype=dtype, device="meta")
        context = torch.randn(4, case[1], dtype=dtype, device="meta") if case[1] else None
        results = [*transform.forward_with_score(z, z, context), *transform.inverse_and_log_det(z, context)]
        assert all(value.device.type == "meta" and value.dtype == dtype for value in results)


@pytest.mark.parametrize("case", [case for case in CASES if not case[1]], ids=case_id)
def test_works_in_a_transformed_distribution(case, dtype, tolerance):
    transform = build_perturbed(case, 3, dtype)
    base = dist.Normal(torch.zeros(3, dtype=dtype), 1.0).to_event(1)
    distribution = dist.TransformedDistribution(base, [transform])
    z = base.sample((5,))
    x = transform(z)
    expected = base.log_prob(z) - transform.log_abs_det_jacobian(z, x)
    torch.testing.assert_close(distribution.log_prob(x), expected, rtol=tolerance(1e-8), atol=tolerance(1e-8))
    torch.testing.assert_close(transform.inv(x), z, rtol=tolerance(1e-8), atol=tolerance(1e-8))
    assert transform.inv.inv is transform or isinstance(transform, T.Inverse)
    assert transform.sign == 1 and transform.with_cache() is transform


def test_intermediates_are_every_step(dtype):
    flow = build_perturbed(("compose", 0), 3, dtype)
    z = torch.randn(4, 3, dtype=dtype)
    steps = flow.intermediates(z)
    assert len(steps) == len(flow.transforms) + 1
    torch.testing.assert_close(steps[0], z)
    torch.testing.assert_close(steps[-1], flow(z))


class Cubic(T.FlowTransform):
    """A transform that writes forward alone: inverse and score are those of the base class."""

    def __init__(self, dim):
        super().__init__(dim)
        self.mixing = torch.nn.Parameter(torch.zeros(dim, dim))

    def forward_and_log_det(self, z, context=None):
        z, _ = self.check_input(z, context)
        mixed = z @ torch.linalg.matrix_exp(self.mixing)
        return mixed + mixed**3, (1 + 3 * mixed**2).log().sum(-1) + self.mixing.diagonal().sum()


def test_defaults_of_the_base_class(dtype, tolerance):
    transform = Cubic(3).to(dtype)
    torch.nn.init.normal_(transform.mixing, std=0.5)
    z = 3 * torch.randn(20, 3, dtype=dtype)
    x, log_det = transform.forward_and_log_det(z)
    z_back, inverse_log_det = transform.inverse_and_log_det(x)
    torch.testing.assert_close(z_back, z, rtol=0, atol=tolerance(1e-9))
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=tolerance(1e-8))
    jacobian, gradient = jacobian_and_gradient(transform, z, None)
    *_, score = transform.forward_with_score(z, -z)
    torch.testing.assert_close(
        (jacobian.mT @ score.unsqueeze(-1)).squeeze(-1) + gradient, -z, rtol=0, atol=tolerance(1e-8)
    )
    if dtype == torch.float64:
        x = x[:3].detach().requires_grad_()
        assert torch.autograd.gradcheck(transform.inverse_and_log_det, (x,), atol=1e-6, rtol=1e-4)


def test_an_unsolved_inverse_is_nan_and_never_a_wrong_number(dtype):
    class Bounded(T.FlowTransform):
        def forward_and_log_det(self, z, context=None):
            return torch.tanh(z), (1 - torch.tanh(z) ** 2).log().sum(-1)

    z, _ = Bounded(2).inverse_and_log_det(torch.tensor([[0.5, 0.5], [2.0, 0.0]], dtype=dtype))
    torch.testing.assert_close(z[0], torch.atanh(torch.tensor([0.5, 0.5], dtype=dtype)))
    assert z[1].isnan().all()


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


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: T.Planar(0), ValueError, "Planar: dim must be at least 1, got 0"),
        (lambda: T.AffineCoupling(2.5), TypeError, "AffineCoupling: dim must be an integer, got 2.5"),
        (lambda: T.Planar(2, context_dim=-1), ValueError, "context_dim must be at least 0"),
        (lambda: T.AffineCoupling(3, hidden_dims=(4, 0)), ValueError, "all sizes at least 1"),
        (lambda: T.AffineCoupling(3, mask="thirds"), ValueError, 'mask must be "half", "checkerboard"'),
        (lambda: T.AffineCoupling(3, mask=torch.ones(2, dtype=torch.bool)), ValueError, r"boolean of shape \(3,\)"),
        (lambda: T.AffineCoupling(3, mask=torch.ones(3, dtype=torch.bool)), ValueError, "keeps every coordinate"),
        (lambda: T.AffineCoupling(3, log_scale_bound=0.0), ValueError, "log_scale_bound must be positive"),
        (lambda: T.Permutation([0, 0, 1]), ValueError, "each of 0, …, D − 1 once"),
        (lambda: T.Compose([]), ValueError, "at least one transform"),
        (lambda: T.Compose([T.Planar(2), T.Planar(3)]), ValueError, r"same dim, got \[2, 3\]"),
        (
            lambda: T.Compose([T.Planar(2, context_dim=1), T.Planar(2, context_dim=2)]),
            ValueError,
            r"different sizes, \[1, 2\]",
        ),
        (lambda: T.FixedAffine(torch.zeros(2), torch.ones(3)), ValueError, r"scale must have shape \(2,\)"),
        (lambda: T.FixedAffine(torch.zeros(2), torch.zeros(2)), ValueError, "diagonal of the scale must be positive"),
        (lambda: T.Planar(3)(torch.zeros(4)), ValueError, r"must be dim = 3, got shape \(4,\)"),
        (lambda: T.Planar(3)(torch.zeros(3, dtype=torch.int64)), TypeError, "floating-point tensors, got torch.int64"),
        (lambda: T.Planar(3).forward_and_log_det(torch.zeros(3), torch.zeros(1)), ValueError, "has no context"),
        (lambda: T.Planar(3, context_dim=2)(torch.zeros(3)), ValueError, "needs a context of size 2"),
        (
            lambda: T.Planar(3, context_dim=2).forward_and_log_det(torch.zeros(3), torch.zeros(3)),
            ValueError,
            "must be context_dim = 2",
        ),
    ],
)
def test_errors_say_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- NaN --------------------------------------------------------------------------------------------------------------


class Root(T.FlowTransform):
    """NaN for negative numbers, in the direction and the result that it is told."""

    def __init__(self, dim, where):
        super().__init__(dim)
        self.where = where

    def _spoil(self, value, name):
        return value + 0 * value.sqrt() if self.where == name else value

    def forward_and_log_det(self, z, context=None):
        z, _ = self.check_input(z, context)
        return self._spoil(z, "x"), self._spoil(z, "log_det").sum(-1) * 0

    def inverse_and_log_det(self, x, context=None):
        x, _ = self.check_input(x, context)
        return self._spoil(x, "z, going back"), self._spoil(x, "log_det, going back").sum(-1) * 0

    def forward_with_score(self, z, score, context=None):
        return *self.forward_and_log_det(z, context), self._spoil(z, "score")


@every_case
def test_nan_is_an_error_within_debug_alone(case, dtype):
    transform = build_perturbed(case, 3, dtype)
    z, context = torch.rand(5, 3, dtype=dtype), make_context(case, (5,), dtype)
    z[0, 0] = z[3, 2] = torch.nan
    # Not with the validation of Pyro and torch either, which is on by default: the check waits for the device.
    with pyro.validation_enabled():
        transform.forward_and_log_det(z, context)
    message = r"^\w+: 2 of the 15 numbers of its input are NaN$"
    with T.detect_nan():
        for call in (
            lambda: transform.forward_and_log_det(z, context),
            lambda: transform.inverse_and_log_det(z, context),
            lambda: transform.forward_with_score(z, z, context),
        ):
            with pytest.raises(ValueError, match=message):
                call()
        with T.detect_nan(False):
            transform.forward_and_log_det(z, context)
        good = torch.rand(5, 3, dtype=dtype)
        x, *_ = transform.forward_with_score(good, -good, context)
        transform.inverse_and_log_det(x, context)
        if case[1]:
            with pytest.raises(ValueError, match="1 of the 15 numbers of its context is NaN"):
                transform.forward_and_log_det(good, context.index_fill(0, torch.tensor(0), 1.0) * _one_nan(context))
    transform.forward_and_log_det(z, context)


def _one_nan(tensor):
    factor = torch.ones_like(tensor)
    factor.view(-1)[4] = torch.nan
    return factor


@pytest.mark.parametrize("where", ["x", "log_det", "score", "z, going back", "log_det, going back"])
def test_debug_names_the_part_that_made_the_first_nan(where, dtype):
    inner = T.Compose([T.Reverse(2), Root(2, where), T.Planar(2).to(dtype)])
    flow = T.Compose([T.Reverse(2), inner, T.Planar(2).to(dtype)])
    z = torch.tensor([[1.0, 2.0], [-1.0, 1.0], [2.0, -3.0]], dtype=dtype)
    call = flow.inverse_and_log_det if "back" in where else lambda z: flow.forward_with_score(z, z)
    assert any(value.isnan().any() for value in call(z))
    total = 3 if "log_det" in where else 6
    message = f"^Root, part 1 of Compose: 2 of the {total} numbers of the {where} it returned are NaN$"
    with T.detect_nan(), pytest.raises(ValueError, match=message):
        call(z)
    with T.detect_nan():
        call(z.abs() + 10)


def test_debug_looks_at_nothing_that_cannot_be_read(dtype):
    flow = build_perturbed(("compose", 0), 3, dtype).requires_grad_(False)
    z = torch.full((4, 3), torch.nan, dtype=dtype)

    def step(z):
        return flow.forward_with_score(z, -z)[0]

    torch._dynamo.reset()
    with T.detect_nan():
        assert torch.vmap(step)(z).isnan().all()
        assert torch.func.grad(lambda z: step(z).sum())(z).isnan().all()
        assert make_fx(step)(torch.zeros_like(z))(z).isnan().all()
        assert torch.compile(step, backend="aot_eager", fullgraph=True)(z).isnan().all()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(lambda z: flow.forward_and_log_det(z)[0], torch.zeros_like(z), check_trace=False)
        assert traced(z).isnan().all()
        flow.to("meta").forward_and_log_det(z.to("meta"))


def test_zero_parameters_are_the_identity_of_a_univariate_function():
    z = torch.randn(5)
    x, log_derivative = ShiftScale().forward(z, torch.zeros(5, 2))
    torch.testing.assert_close(x, z)
    torch.testing.assert_close(log_derivative, torch.zeros(5))
