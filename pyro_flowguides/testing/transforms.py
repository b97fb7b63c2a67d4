"""The contract of a transform, law by law.

:func:`check_transform` runs all laws on a transform. Every law is also a function of its own, ``law(transform, num_points,
tolerance)``, which takes the transform with the parameters, the dtype and the device that it has, and raises an
AssertionError that names the law, the point, the difference and what to look at.
"""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Collection
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.distributions import constraints
from torch.fx.experimental.proxy_tensor import make_fx

from ..transforms import FlowTransform
from .law import Law, gradients_by_name, jacobian_and_gradient, perturb

_BATCH_SHAPES: tuple[tuple[int, ...], ...] = ((), (5,), (2, 3))


def check_transform(
    transform: FlowTransform,
    *,
    starts_as_identity: bool = True,
    num_points: int = 10,
    tolerance: float | None = None,
    skip: Collection[str] = (),
    seed: int = 0,
) -> None:
    r"""Checks that a transform keeps the contract of :class:`~pyro_flowguides.transforms.FlowTransform`.

    The start is checked as it is, in float32. For everything else a copy in float64 is taken and every parameter moved by
    noise of order 1: at the start even a wrong log-determinant can pass for right. The transform itself and torch's random
    state are left alone. It takes some tens of seconds of gradients at most, O(D) passes through the transform for a law.

    Arguments:
        transform: The transform as its constructor returns it. Use few dimensions: 1, 2 and 3 show nearly every error.
        starts_as_identity: Whether the start must be the identity, with a gradient to every parameter that is not 0. A
            transform that cannot start so passes False.
        num_points: The number of points that a law is checked at.
        tolerance: The largest difference that is allowed, for all laws. By default every law has its own, 1e-8 to 1e-10,
            which suits formulas and solvers that go to the last digit.
        skip: Names of laws to leave out, of those in ``LAWS``.
        seed: The seed of the noise and the points.

    Raises:
        AssertionError: if a law is broken; the message says which, at which point, by how much, and what to look at.
        ValueError: if a name in ``skip`` is unknown, or log_det is a random estimate, which has no value to compare with.

    Example:
        >>> from pyro_flowguides.transforms import Planar
        >>> check_transform(Planar(2))
        >>> class Stretch(FlowTransform):
        ...     def __init__(self, dim):
        ...         super().__init__(dim)
        ...         self.log_scale = nn.Parameter(torch.zeros(dim))
        ...
        ...     def forward_and_log_det(self, z, context=None):
        ...         return z * self.log_scale.exp(), self.log_scale.mean().expand(z.shape[:-1])
        >>> check_transform(Stretch(2))
        Traceback (most recent call last):
            ...
        AssertionError: Stretch breaks the law "log_det": log_det of forward_and_log_det is not log|det ∂x/∂z|, by autograd. ...
    """
    unknown = sorted(set(skip) - set(LAWS))
    if unknown:
        raise ValueError(f"check_transform: unknown law {unknown[0]!r} in skip; the laws are {', '.join(LAWS)}")
    if transform.stochastic_log_det:
        raise ValueError(
            f"check_transform: log_det of this {type(transform).__name__} is a random estimate; check the transform with an "
            "exact log_det"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        perturbed = perturb(copy.deepcopy(transform).double())
        for name, law in LAWS.items():
            if name in skip or (law is check_start and not starts_as_identity):
                continue
            options: dict[str, Any] = {} if tolerance is None else {"tolerance": tolerance}
            try:
                law(transform if law is check_start else perturbed, num_points, **options)
            except AssertionError:
                raise
            except Exception as error:
                raise AssertionError(
                    f'{type(transform).__name__} breaks the law "{name}" ({(law.__doc__ or "").splitlines()[0]}) with '
                    f"{type(error).__name__}: {error}"
                ) from error


# --- the laws ---------------------------------------------------------------------------------------------------------


def check_start(transform: FlowTransform, num_points: int = 10, tolerance: float = 1e-6) -> None:
    """The start is the identity in float32, and the gradient to every parameter is not 0."""
    transform = copy.deepcopy(transform).float()
    law = Law("start", transform, tolerance=max(tolerance, 1e-6))
    z, context = law.points((2 * num_points,))
    x, log_det = transform.forward_and_log_det(z, context)
    advice = "Choose parameters whose start is the identity, or pass starts_as_identity=False."
    law.compare("x is not z before training", x, z, advice)
    # A sum over the coordinates, each with a rounding error of its own.
    law.tolerance *= transform.dim**0.5
    law.compare("log_det is not 0 before training", log_det, torch.zeros_like(log_det), advice)
    for name, gradient in gradients_by_name(transform, x.square().sum() + x.sin().sum() + log_det.sum()).items():
        if gradient is None or not gradient.any():
            raise law.broken(
                f"the gradient to the parameter {name!r} is 0 at the start",
                "Training would never move it: start one of two factors away from 0.",
            )


def check_log_det(transform: FlowTransform, num_points: int = 10, tolerance: float = 1e-10) -> None:
    """log_det of forward is log|det| of the Jacobian."""
    law = Law("log_det", transform, tolerance, relative=tolerance)
    z, context = law.points((num_points,), 2.0)
    _, log_det = transform.forward_and_log_det(z, context)
    jacobian, _ = jacobian_and_gradient(transform, z, context)
    law.compare(
        "log_det of forward_and_log_det is not log|det ∂x/∂z|, by autograd",
        log_det,
        torch.linalg.slogdet(jacobian).logabsdet,
        "Compare it with its formula; it is a sum over the coordinates, one number per point.",
    )


def check_inverse(transform: FlowTransform, num_points: int = 10, tolerance: float = 1e-9) -> None:
    """The inverse leads back, and its log_det is the opposite."""
    law = Law("inverse", transform, tolerance, relative=tolerance / 1000)
    z, context = law.points((5 * num_points,), 5.0)
    x, _ = transform.forward_and_log_det(z, context)
    z_back, inverse_log_det = transform.inverse_and_log_det(x, context)
    # By the residual in x: what a steep inverse makes of the rounding of x is not its fault.
    x_back, log_det = transform.forward_and_log_det(z_back, context)
    law.compare(
        "forward(inverse(x)) is not x",
        x_back,
        x,
        "Solve the inverse to the last digit; NaN says that the solver did not converge, or that no z is mapped to x.",
    )
    law.compare(
        "log_det of inverse_and_log_det is not minus log_det of forward_and_log_det",
        inverse_log_det,
        -log_det,
        "It is log|det ∂z/∂x|, at the point that the inverse returns.",
    )


def check_score(transform: FlowTransform, num_points: int = 10, tolerance: float = 1e-9) -> None:
    """The score follows the change of variables; x and log_det equal the results of forward, with the same graph."""
    law = Law("score", transform, tolerance)
    z, context = law.points((num_points,))
    score = torch.randn_like(z)
    leaf = z.clone().requires_grad_()
    x, log_det, score_at_x = transform.forward_with_score(leaf, score, context)
    if score_at_x.requires_grad:
        raise law.broken("the score has a graph", "Return it detached: the path gradient takes it for a constant.")
    jacobian, gradient = jacobian_and_gradient(transform, z, context)
    # Compared before the solve, relative to the terms that cancel: a random map of many dimensions can be ill-conditioned.
    size = float(score_at_x.abs().max().clamp(min=1.0))
    law.compare(
        "Jᵀ·score + ∇ log_det, with the score and log_det of forward_with_score, is not the score that went in",
        ((jacobian.mT @ score_at_x.unsqueeze(-1)).squeeze(-1) + gradient) / size,
        score / size,
        "The score at x is J⁻ᵀ(s − ∇_z log_det); leave forward_with_score to the base class to see whether it is at fault.",
    )
    expected = transform.forward_and_log_det(leaf, context)
    advice = "Both methods compute the same x and log_det."
    law.compare("x of forward_with_score differs from x of forward_and_log_det", x, expected[0], advice)
    law.compare(
        "log_det of forward_with_score differs from log_det of forward_and_log_det", log_det, expected[1], advice
    )
    named = {"z": leaf, **dict(transform.named_parameters())}
    found_gradients = gradients_by_name(named, x.sin().sum() + log_det.sum())
    for name, b in gradients_by_name(named, expected[0].sin().sum() + expected[1].sum()).items():
        a = found_gradients[name]
        if (a is None) != (b is None):
            raise law.broken(f"forward_with_score loses the gradient to {name}", "Detach the score alone, not x.")
        if a is not None and b is not None:
            scale = float(b.abs().max().clamp(min=1.0))
            law.compare(
                f"forward_with_score has another gradient to {name}", a / scale, b / scale, advice, at_point=False
            )


def check_gradients(transform: FlowTransform, num_points: int = 2, tolerance: float = 1e-6) -> None:
    """Gradients of both directions to points, context and every parameter agree with finite differences, in float64."""
    transform = copy.deepcopy(transform).double()
    law = Law("gradients", transform, tolerance)
    z, context = law.points((2,))
    x, log_det = transform.forward_and_log_det(z, context)
    for name, gradient in gradients_by_name(transform, x.sin().sum() + log_det.sum()).items():
        if gradient is None:
            raise law.broken(f"the parameter {name!r} has no gradient", "It is not used, or detached on the way.")
    parameters = {name: parameter.detach().requires_grad_() for name, parameter in transform.named_parameters()}
    context = None if context is None else context.requires_grad_()
    for method, value in (("forward_and_log_det", z), ("inverse_and_log_det", x.detach())):

        def function(value: Tensor, context: Tensor | None, *leaves: Tensor, method: str = method) -> Any:
            state = {f"transform.{name}": leaf for name, leaf in zip(parameters, leaves, strict=True)}
            return torch.func.functional_call(_Method(transform, method), state, (value, context))

        inputs: Any = (value.requires_grad_(), context, *parameters.values())
        try:
            torch.autograd.gradcheck(function, inputs, atol=max(tolerance, 1e-6), rtol=1e-4, fast_mode=True)
        except GradcheckError as error:
            names = ", ".join(["the point", *(["the context"] if context is not None else []), *parameters])
            first = str(error).partition("\n\n")[0].replace("\n", " ")
            raise law.broken(
                f"a gradient of {method} differs from finite differences ({first}); its inputs are {names}",
                "Look for detach, no_grad, in-place operations and parts that are not differentiable.",
            ) from error


def check_batch_shapes(transform: FlowTransform, num_points: int = 10, tolerance: float = 1e-10) -> None:
    """Any batch shape, and a batch is its points one by one."""
    law = Law("batch_shapes", transform, tolerance)
    for batch_shape in _BATCH_SHAPES:
        z, context = law.points(batch_shape)
        x, log_det = transform.forward_and_log_det(z, context)
        z_back, inverse_log_det = transform.inverse_and_log_det(x, context)
        *_, score = transform.forward_with_score(z, -z, context)
        advice = "Work on the last dimension alone (sum(-1), not sum()), and let all others broadcast."
        for name, value in (("x", x), ("z of the inverse", z_back), ("score", score)):
            if value.shape != z.shape:
                raise law.broken(f"{name} has shape {tuple(value.shape)} for z of shape {tuple(z.shape)}", advice)
        for name, value in (("log_det", log_det), ("log_det of the inverse", inverse_log_det)):
            if value.shape != batch_shape:
                raise law.broken(f"{name} has shape {tuple(value.shape)} for a batch of shape {batch_shape}", advice)
        points = z.reshape(-1, transform.dim)
        contexts = [None] * len(points) if context is None else list(context.reshape(-1, transform.context_dim))
        alone = [transform.forward_and_log_det(point, own) for point, own in zip(points, contexts, strict=True)]
        rows = torch.stack([x_alone for x_alone, _ in alone]).reshape(x.shape)
        log_dets = torch.stack([log_det_alone for _, log_det_alone in alone]).reshape(log_det.shape)
        law.compare(f"x of a point in a batch of shape {batch_shape} differs from the point alone", x, rows, advice)
        law.compare("log_det of a point in a batch differs from the point alone", log_det, log_dets, advice)


def check_context(transform: FlowTransform, num_points: int = 10, tolerance: float = 1e-9) -> None:
    """The context broadcasts with the points, can be bound, and has an effect. Without a context there is nothing to check."""
    if not transform.context_dim:
        return
    law = Law("context", transform, tolerance, relative=tolerance)
    z, context = law.points((5, 1))[0], law.points((4,))[1]
    assert context is not None
    x, log_det = transform.forward_and_log_det(z, context)
    if x.shape != (5, 4, transform.dim) or log_det.shape != (5, 4):
        raise law.broken(
            f"points of batch shape (5, 1) and contexts of (4,) give x of shape {tuple(x.shape)} and log_det of "
            f"{tuple(log_det.shape)}",
            "The batch shapes broadcast, here to (5, 4).",
        )
    if torch.allclose(transform.forward_and_log_det(z, context + 1)[0], x):
        raise law.broken("the context has no effect", "Let the parameters depend on it, or set context_dim=0.")
    bound = transform.condition(context)
    pairs = [(bound.forward_and_log_det(z), (x, log_det))]
    pairs += [(bound.inverse_and_log_det(x), transform.inverse_and_log_det(x, context))]
    pairs += [(bound.forward_with_score(z, -z), transform.forward_with_score(z, -z, context))]  # type: ignore[list-item]
    for found, expected in pairs:
        for a, b in zip(found, expected, strict=True):
            law.compare("condition(context) is another map than the context given", a, b, "", at_point=False)


def check_vmap(transform: FlowTransform, num_points: int = 10, tolerance: float = 1e-9) -> None:
    """``torch.vmap`` over points is the batch."""
    law = Law("vmap", transform, tolerance, relative=tolerance)
    z, context = law.points((4,))
    x, _ = transform.forward_and_log_det(z, context)
    in_dims = (0, None if context is None else 0)
    for method, value in (
        (transform.forward_and_log_det, z),
        (transform.inverse_and_log_det, x.detach()),
        (lambda z, context: transform.forward_with_score(z, -z, context), z),
    ):
        for a, b in zip(torch.vmap(method, in_dims)(value, context), method(value, context), strict=True):
            law.compare("torch.vmap gives another result than a batch", a, b, "No shape may be fixed in the code.")


def check_capture(
    transform: FlowTransform,
    num_points: int = 10,
    tolerance: float = 1e-9,
    capture: Callable[[Callable, Tensor], Callable] = lambda step, z: make_fx(step)(z),
) -> None:
    """A pass in both directions, captured at some points, gives what an eager pass gives at others."""
    law = Law("capture", transform, tolerance, relative=tolerance)
    z, context = law.points((4,))

    def step(z: Tensor) -> tuple[Tensor, ...]:
        x, log_det, score = transform.forward_with_score(z, -z, context)
        return x, log_det, score, *transform.inverse_and_log_det(x, context)

    captured = capture(step, z)
    other = law.points((4,))[0]
    for a, b in zip(captured(other), step(other), strict=True):
        law.compare(
            "a captured pass gives another result at other points", a, b, "No branch on a value, no .item().", z=other
        )


def check_far_points(
    transform: FlowTransform, num_points: int = 10, tolerance: float = 0.0, with_score: bool = True
) -> None:
    """In float32 points far out have finite images and log-determinants and, unless told otherwise, finite scores.

    It is for transforms of the whole of ℝᴰ.
    """
    if transform.domain is not constraints.real_vector:
        return
    transform = copy.deepcopy(transform).float()
    law = Law("far_points", transform, tolerance)
    for scale in (1e2, 1e4):
        z, context = law.points((5 * num_points,), scale)
        x, log_det, score = transform.forward_with_score(z, -z, context)
        x_far = z if transform.codomain is constraints.real_vector else x
        z_back, inverse_log_det = transform.inverse_and_log_det(x_far, context)
        results = {"x": x, "log_det": log_det, "z of the inverse": z_back, "log_det of the inverse": inverse_log_det}
        for name, value in {**results, **({"the score": score} if with_score else {})}.items():
            if not bool(value.isfinite().all()):
                point = int((~value.isfinite()).nonzero()[0, 0])
                raise law.broken(
                    f"in float32 {name} is not finite at the point {z[point].tolist()}",
                    "Rewrite the formula so that nothing overflows or cancels (log1p, softplus, a floor for denominators).",
                )


def check_copies(transform: FlowTransform, num_points: int = 10, tolerance: float = 0.0) -> None:
    """A copy, a pickle and a ``state_dict`` give the same map, to the last digit."""
    law = Law("copies", transform, tolerance)
    z, context = law.points((4,))
    expected, _ = transform.forward_and_log_det(z, context)
    loaded = perturb(copy.deepcopy(transform))
    loaded.load_state_dict(transform.state_dict())
    copies = {"copy.deepcopy": copy.deepcopy(transform), "load_state_dict": loaded}
    # A class within a function cannot be pickled, whatever it does.
    kinds = {type(module) for module in transform.modules()}
    if all(getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is kind for kind in kinds):
        copies["pickle"] = pickle.loads(pickle.dumps(transform))
    for name, other in copies.items():
        law.compare(
            f"after {name} x is another",
            other.forward_and_log_det(z, context)[0],
            expected,
            "All that the map depends on must be a parameter, a buffer or an argument of the constructor.",
        )


def check_dtypes(transform: FlowTransform, num_points: int = 10, tolerance: float = 0.0) -> None:
    """The results have the dtype and the device of the transform, on the meta device too, where no value can be read."""
    law = Law("dtypes", transform, tolerance)
    for dtype in (torch.float32, torch.float64):
        moved = copy.deepcopy(transform).to(dtype).to("meta")
        z = torch.randn(4, moved.dim, dtype=dtype, device="meta")
        context = z.new_empty(4, moved.context_dim) if moved.context_dim else None
        for value in (*moved.forward_with_score(z, z, context), *moved.inverse_and_log_det(z, context)):
            if value.dtype != dtype or value.device.type != "meta":
                raise law.broken(
                    f"a transform in {dtype} on the meta device returns {value.dtype} on {value.device}",
                    "Make new tensors with the dtype and device of the input, constants as buffers.",
                )


def check_distribution(transform: FlowTransform, num_points: int = 10, tolerance: float = 1e-8) -> None:
    """Pyro's ``TransformedDistribution`` takes it. With an unbound context there is nothing to check."""
    if transform.context_dim:
        return
    law = Law("distribution", transform, tolerance, relative=tolerance)
    z, _ = law.points((num_points,))
    x = transform(z)
    base = dist.Normal(torch.zeros_like(z[0]), 1.0).to_event(1)
    log_prob = dist.TransformedDistribution(base, [transform], validate_args=False).log_prob(x)
    expected = base.log_prob(z) - transform.log_abs_det_jacobian(z, x)
    advice = "Leave _call, _inverse, inv and log_abs_det_jacobian to the base class."
    law.compare("log_prob of a TransformedDistribution is not log q₀(z) − log_det", log_prob, expected, advice)
    law.compare("inv is not the inverse", transform.inv(x), transform.inverse_and_log_det(x)[0], advice)


# Every law by its name.
LAWS: dict[str, Callable[..., None]] = {
    "start": check_start,
    "log_det": check_log_det,
    "inverse": check_inverse,
    "score": check_score,
    "gradients": check_gradients,
    "batch_shapes": check_batch_shapes,
    "context": check_context,
    "vmap": check_vmap,
    "capture": check_capture,
    "far_points": check_far_points,
    "copies": check_copies,
    "dtypes": check_dtypes,
    "distribution": check_distribution,
}


class _Method(nn.Module):
    """A method of a transform as a module, for ``functional_call``."""

    def __init__(self, transform: FlowTransform, method: str) -> None:
        super().__init__()
        self.transform = transform
        self.method = method

    def forward(self, value: Tensor, context: Tensor | None) -> Any:
        return getattr(self.transform, self.method)(value, context)
