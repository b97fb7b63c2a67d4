"""The contract of a transform: every law of :mod:`pyro_flowguides.testing`, for every transform; and that it finds errors."""

import shutil

import pytest
import torch
from torch import nn
from transform_cases import (
    CASES,
    IDENTITY_AT_START,
    SCORE_OVERFLOWS,
    SOLVED,
    build,
    build_perturbed,
    case_id,
    make_context,
)

from pyro_flowguides import transforms as T
from pyro_flowguides.testing import check_transform
from pyro_flowguides.testing import transforms as laws
from pyro_flowguides.testing.transforms import LAWS

# Some seconds of C++ each: one per structure.
INDUCTOR = ["lower_triangular_affine", "affine_coupling", "elementwise_spline"]
CASES_OF_LAW = {
    "start": IDENTITY_AT_START,
    "context": [case for case in CASES if case[1]],
    "distribution": [case for case in CASES if not case[1]],
}
# D = 1 is special in nearly every family, and many dimensions are where solves and sums lose digits; the rest is one path.
DIMS_OF_LAW = {
    "start": [1, 3, 64],
    "log_det": [1, 3, 64],
    "inverse": [1, 3, 64],
    "score": [1, 3, 64],
    "gradients": [1, 3],
}
# These laws record a graph for each case, which takes seconds; a family without a context stands for the others.
RECORDING_LAWS = ("capture", "dtypes")


def _marks(law, case):
    name, with_context = case
    another_form = with_context or name.startswith("inverse_of_") or name.endswith("_narrow")
    return pytest.mark.slow if law in RECORDING_LAWS and another_form else ()


@pytest.mark.parametrize(
    ("law", "case", "dim"),
    [
        pytest.param(law, case, dim, id=f"{law}-{case_id(case)}-{dim}", marks=_marks(law, case))
        for law in LAWS
        for case in CASES_OF_LAW.get(law, CASES)
        for dim in DIMS_OF_LAW.get(law, [3])
        if dim < 64 or not case[1]
    ],
)
def test_law(law, case, dim, dtype):
    if law == "gradients" and dtype == torch.float32:
        pytest.skip("finite differences need float64")
    transform = build(case, dim, dtype) if law == "start" else build_perturbed(case, dim, dtype)
    options = {"with_score": False} if law == "far_points" and case[0] in SCORE_OVERFLOWS else {}
    if law in ("log_det", "score") and case[0] in SOLVED:
        options["tolerance"] = 5e-3
    elif dtype == torch.float32 and law not in ("start", "copies", "far_points"):
        options["tolerance"] = 2e-3
    LAWS[law](transform, 4 if dim == 64 else 10, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "backend"),
    [
        *(pytest.param(case, "aot_eager", id=f"aot_eager-{case_id(case)}") for case in CASES),
        *(pytest.param((name, 0), "inductor", id=f"inductor-{name}") for name in INDUCTOR),
    ],
)
def test_compiled_equals_eager(case, backend, dtype, tolerance):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    laws.check_capture(
        build_perturbed(case, 3, dtype),
        tolerance=tolerance(1e-9),
        capture=lambda step, z: torch.compile(step, backend=backend, fullgraph=True),
    )


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_state_dict_makes_a_fresh_transform_the_same(case, dtype):
    transform, fresh = build_perturbed(case, 3, dtype), build(case, 3, dtype)
    z, context = torch.randn(4, 3, dtype=dtype), make_context(case, (4,), dtype)
    fresh.load_state_dict(transform.state_dict())
    for a, b in zip(fresh.forward_and_log_det(z, context), transform.forward_and_log_det(z, context), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert "dim=3" in repr(transform)


# --- transforms that break a law ----------------------------------------------------------------------------------------


class Scale(T.FlowTransform):
    """An elementwise scale, for the subclasses to spoil."""

    def __init__(self, dim, context_dim=0):
        super().__init__(dim, context_dim)
        self.log_scale = nn.Parameter(torch.zeros(dim))

    def forward_and_log_det(self, z, context=None):
        return z * self.log_scale.exp(), self.log_scale.sum().expand(z.shape[:-1])

    def inverse_and_log_det(self, x, context=None):
        return x * (-self.log_scale).exp(), -self.log_scale.sum().expand(x.shape[:-1])


class WrongLogDet(Scale):
    def forward_and_log_det(self, z, context=None):
        x, log_det = super().forward_and_log_det(z)
        return x, log_det + self.log_scale[0]


class RoughInverse(Scale):
    def inverse_and_log_det(self, x, context=None):
        z, log_det = super().inverse_and_log_det(x)
        return z + 1e-7, log_det


class WrongInverseLogDet(Scale):
    def inverse_and_log_det(self, x, context=None):
        z, log_det = super().inverse_and_log_det(x)
        return z, -log_det


class WrongScore(Scale):
    def forward_with_score(self, z, score, context=None):
        return *self.forward_and_log_det(z), (score * self.log_scale.exp()).detach()


class ScoreWithGraph(Scale):
    def forward_with_score(self, z, score, context=None):
        return *self.forward_and_log_det(z), score * (-self.log_scale).exp()


class DetachedDraw(Scale):
    def forward_with_score(self, z, score, context=None):
        x, log_det, score = super().forward_with_score(z, score)
        return x.detach(), log_det, score


class Doubled(Scale):
    def forward_and_log_det(self, z, context=None):
        x, log_det = super().forward_and_log_det(z)
        return 2 * x, log_det + self.dim * torch.tensor(2.0, dtype=z.dtype).log()

    def inverse_and_log_det(self, x, context=None):
        return T.FlowTransform.inverse_and_log_det(self, x)


class Saddle(Scale):
    """Both factors start at 0, which leaves neither a gradient."""

    def __init__(self, dim):
        super().__init__(dim)
        self.factor = nn.Parameter(torch.zeros(dim))

    def forward_and_log_det(self, z, context=None):
        log_scale = self.log_scale * self.factor
        return z * log_scale.exp(), log_scale.sum().expand(z.shape[:-1])

    inverse_and_log_det = T.FlowTransform.inverse_and_log_det


class Unused(Scale):
    def __init__(self, dim):
        super().__init__(dim)
        self.unused = nn.Parameter(torch.zeros(dim))


class DetachedScale(Scale):
    def inverse_and_log_det(self, x, context=None):
        return x * (-self.log_scale.detach()).exp(), -self.log_scale.sum().expand(x.shape[:-1])


class OneLogDet(Scale):
    def forward_and_log_det(self, z, context=None):
        return z * self.log_scale.exp(), self.log_scale.sum()


class Centred(Scale):
    """What it does to a point depends on the others of its batch."""

    def forward_and_log_det(self, z, context=None):
        x, log_det = super().forward_and_log_det(z)
        return (x - x.detach().reshape(-1, self.dim).mean(0), log_det)


class Branch(Scale):
    def forward_and_log_det(self, z, context=None):
        assert float(z.detach().abs().sum()) >= 0
        return super().forward_and_log_det(z)


class Sinh(Scale):
    """sinh(z) with a scale: exact, but beyond the range of float32 far out."""

    def forward_and_log_det(self, z, context=None):
        return z.sinh() * self.log_scale.exp(), (z.cosh().log() + self.log_scale).sum(-1)

    def inverse_and_log_det(self, x, context=None):
        z = (x * (-self.log_scale).exp()).asinh()
        return z, -(z.cosh().log() + self.log_scale).sum(-1)


class Float64Log(Scale):
    def forward_and_log_det(self, z, context=None):
        x, log_det = super().forward_and_log_det(z)
        return x, log_det.double()


class Counting(Scale):
    """What it does depends on a number that is no part of its state."""

    calls = 0

    def forward_and_log_det(self, z, context=None):
        self.calls += 1
        x, log_det = super().forward_and_log_det(z)
        return x + self.calls, log_det


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            WrongLogDet,
            {},
            r'"log_det": log_det of forward_and_log_det is not log.* At z = \[.*a difference of .* is allowed',
        ),
        (RoughInverse, {}, r'"inverse": forward\(inverse\(x\)\) is not x.* At z = '),
        (WrongInverseLogDet, {}, '"inverse": log_det of inverse_and_log_det is not minus log_det of forward'),
        (WrongScore, {}, '"score": Jᵀ·score .* is not the score that went in'),
        (ScoreWithGraph, {}, '"score": the score has a graph'),
        (DetachedDraw, {}, '"score": forward_with_score loses the gradient to z'),
        (Doubled, {}, '"start": x is not z before training.* pass starts_as_identity=False'),
        (Saddle, {}, "\"start\": the gradient to the parameter 'log_scale' is 0 at the start"),
        (Unused, {"starts_as_identity": False}, "\"gradients\": the parameter 'unused' has no gradient"),
        (DetachedScale, {}, '"gradients": a gradient of inverse_and_log_det differs from finite differences'),
        (
            OneLogDet,
            {"skip": ["start", "log_det", "inverse", "score", "gradients"]},
            '"batch_shapes": log_det has shape',
        ),
        (
            Centred,
            {"skip": ["start", "log_det", "inverse", "score", "gradients"]},
            '"batch_shapes": x of a point in a batch',
        ),
        (lambda dim: Scale(dim, 2), {}, '"context": the context has no effect'),
        (Branch, {}, r'"vmap" \(..torch.vmap.. over points is the batch.\) with RuntimeError'),
        (Branch, {"skip": ["vmap"]}, r'"capture" \(.*\) with '),
        (Counting, {"skip": [law for law in LAWS if law != "copies"]}, '"copies": after copy.deepcopy x is another'),
        (Sinh, {"starts_as_identity": False}, '"far_points": in float32 x is not finite at the point'),
        (
            Float64Log,
            {"skip": ["start"]},
            '"dtypes": a transform in torch.float32 on the meta device returns torch.float64',
        ),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_broken_law_is_found_and_named(make, options, message):
    with pytest.raises(AssertionError, match=message):
        check_transform(make(2), **options)


@pytest.mark.slow
def test_a_law_that_is_kept_passes_and_nothing_is_touched():
    transform = T.Compose([Scale(2), T.AffineCoupling(2, context_dim=1), T.Sigmoid(2)])
    before = {name: value.clone() for name, value in transform.state_dict().items()}
    random_state = torch.get_rng_state()
    check_transform(transform, starts_as_identity=False, skip=["far_points"])
    check_transform(Scale(1))
    check_transform(Doubled(2), starts_as_identity=False)
    assert all(torch.equal(value, before[name]) for name, value in transform.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_tolerance_holds_for_every_law():
    check_transform(RoughInverse(2), tolerance=1e-5)
    with pytest.raises(AssertionError, match="inverse"):
        check_transform(RoughInverse(2), tolerance=1e-8)


@pytest.mark.parametrize(
    ("transform", "options", "message"),
    [
        (Scale(2), {"skip": ["speed"]}, "unknown law 'speed' in skip; the laws are start, log_det, "),
        (T.Residual(2, log_det="roulette"), {}, "log_det of this Residual is a random estimate"),
    ],
)
def test_what_cannot_be_checked_is_an_error(transform, options, message):
    with pytest.raises(ValueError, match=message):
        check_transform(transform, **options)
