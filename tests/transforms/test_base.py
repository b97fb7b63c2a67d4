"""What the base class, composition and inversion do, beyond the contract of every transform."""

import copy
import inspect
import pickle
import warnings

import pyro
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transform_cases import build_perturbed, case_id, make_context

from pyro_flowguides import transforms as T
from pyro_flowguides.testing.law import jacobian_and_gradient


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


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: T.Planar(0), ValueError, "Planar: dim must be at least 1, got 0"),
        (lambda: T.Planar(2, context_dim=-1), ValueError, "context_dim must be at least 0"),
        (lambda: T.Compose([]), ValueError, "at least one transform"),
        (lambda: T.Compose([T.Planar(2), T.Planar(3)]), ValueError, r"same dim, got \[2, 3\]"),
        (
            lambda: T.Compose([T.Planar(2, context_dim=1), T.Planar(2, context_dim=2)]),
            ValueError,
            r"different sizes, \[1, 2\]",
        ),
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


class Root(T.FlowTransform):
    """NaN for negative numbers, in the direction and the result that it is told."""

    def __init__(self, dim, where):
        super().__init__(dim)
        self.where = where

    def _spoil(self, value, name):
        return value + 0 * value.sqrt() if self.where == name else value

    def forward_and_log_det(self, z, context=None):
        return self._spoil(z, "x"), self._spoil(z, "log_det").sum(-1) * 0

    def inverse_and_log_det(self, x, context=None):
        return self._spoil(x, "z, going back"), self._spoil(x, "log_det, going back").sum(-1) * 0

    def forward_with_score(self, z, score, context=None):
        return *self.forward_and_log_det(z, context), self._spoil(z, "score")


@pytest.mark.parametrize(
    "case",
    [
        ("planar", 0),
        ("affine_coupling", 3),
        ("inverse_of_planar", 0),
        ("compose", 3),
        ("permutation", 0),
        ("sigmoid", 0),
    ],
    ids=case_id,
)
def test_nan_is_an_error_within_detect_nan_alone(case, dtype):
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
def test_detect_nan_names_the_part_that_made_the_first_nan(where, dtype):
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


def test_detect_nan_looks_at_nothing_that_cannot_be_read(dtype):
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


def test_the_codomain_of_a_stack_is_that_of_its_last_part():
    stack = T.Compose([T.Affine(2, context_dim=1), T.Sigmoid(2)])
    for transform in (stack, stack.condition(torch.zeros(1))):
        assert transform.codomain is T.Sigmoid.codomain
        assert transform.inv.domain is T.Sigmoid.codomain
        assert transform.domain is T.Affine.domain


# --- the check of inputs ----------------------------------------------------------------------------------------------


class Shifted(T.Planar):
    """A subclass of a family that calls its method, and that documents its own."""

    def forward_and_log_det(self, z, context=None):
        """Planar, one further."""
        x, log_det = super().forward_and_log_det(z, context)
        return x + 1, log_det


def test_a_subclass_gets_checked_and_broadcast_inputs():
    seen = []

    class Watching(T.Affine):
        def forward_and_log_det(self, z, context=None):
            seen.append((z.shape, context.shape))
            return super().forward_and_log_det(z, context)

    watching = Watching(3, context_dim=2)
    watching.forward_and_log_det(torch.zeros(5, 1, 3), torch.zeros(4, 2))
    assert seen == [((5, 4, 3), (4, 2))]
    for wrong in (torch.zeros(2), torch.tensor(0.0)):
        with pytest.raises(ValueError, match="Watching: the last dimension of its input must be dim = 3"):
            watching.forward_and_log_det(wrong, torch.zeros(2))
    assert len(seen) == 1, "the method ran on an input that was refused"


def test_the_methods_of_a_subclass_keep_their_names_and_documentation():
    assert Shifted.forward_and_log_det.__doc__ == "Planar, one further."
    assert list(inspect.signature(Shifted.forward_and_log_det).parameters) == ["self", "z", "context"]
    assert list(inspect.signature(T.Planar.inverse_and_log_det).parameters) == ["self", "x", "context"]
    planar = Shifted(2)
    z = torch.randn(3, 2)
    torch.testing.assert_close(planar.forward_and_log_det(z=z)[0], z + 1)
    torch.testing.assert_close(planar.inverse_and_log_det(x=z, context=None)[0], z)
    for other in (copy.deepcopy(planar), pickle.loads(pickle.dumps(planar))):
        torch.testing.assert_close(other(z), planar(z), rtol=0, atol=0)


def test_a_check_by_hand_does_no_harm():
    class ByHand(T.FlowTransform):
        def forward_and_log_det(self, z, context=None):
            z, context = self.check_input(z, context)
            return z + context.sum(-1, keepdim=True), z.new_zeros(z.shape[:-1])

    transform = ByHand(3, context_dim=2)
    x, log_det = transform.forward_and_log_det(torch.zeros(5, 1, 3), torch.ones(4, 2))
    assert log_det.shape == (5, 4)
    torch.testing.assert_close(x, torch.full((5, 4, 3), 2.0))
    with pytest.raises(ValueError, match="ByHand needs a context of size 2"):
        transform.inverse_and_log_det(x)


@pytest.mark.parametrize(
    "name", ["affine", "planar", "affine_coupling", "affine_autoregressive", "residual", "compose"]
)
def test_the_default_score_agrees_with_that_of_the_family(name, dtype, tolerance):
    transform = build_perturbed((name, 0), 3, dtype)
    z, score = torch.randn(4, 3, dtype=dtype), torch.randn(4, 3, dtype=dtype)
    default = T.FlowTransform.forward_with_score(transform, z, score)
    for a, b in zip(transform.forward_with_score(z, score), default, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance(1e-8), atol=tolerance(1e-8))


def test_what_a_transform_is_to_torch(dtype):
    transform = build_perturbed(("planar", 0), 3, dtype)
    assert transform.inv.inv is transform
    assert transform.sign == 1
    assert transform.with_cache() is transform


SIZES = {
    "Affine": (6, 1356),
    "AffineAutoregressive": (2694, 2834),
    "AffineCoupling": (1258, 1322),
    "ElementwiseSpline": (69, 3498),
    "Householder": (12, 1560),
    "LULinear": (12, 1560),
    "Planar": (7, 1390),
    "Radial": (5, 1322),
    "Residual": (1285, 1349),
    "SplineAutoregressive": (6789, 7055),
    "SplineCoupling": (2644, 2708),
    "Sylvester": (30, 1974),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_defaults_have_the_sizes_of_saved_flows(name):
    """A saved flow is loaded into one that is built by the same call: other widths or numbers of bins would refuse it."""
    flows = [getattr(T, name)(3, context_dim=context_dim) for context_dim in (0, 2)]
    assert (
        tuple(sum(value.numel() for value in flow.state_dict().values() if value.dim()) for flow in flows)
        == SIZES[name]
    )


@pytest.mark.parametrize("name", ["ElementwiseSpline", "SplineAutoregressive", "SplineCoupling"])
def test_a_spline_bends_the_box_of_its_default(name):
    """Where a saved flow was trained on it: from −5 to 5."""
    assert getattr(T, name)(3).univariate.tail_bound == 5.0
