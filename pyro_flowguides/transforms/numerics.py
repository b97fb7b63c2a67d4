"""Numerics that several families share: functions without cancellation, vector-Jacobian products, numerical inverses.

Nothing here waits for the device or branches on a value: the solvers take a fixed number of steps, so that they run under
``torch.vmap``, ``torch.compile`` and ``make_fx``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

# softplus of this is 1: parameters that start at 0 stand for a scale of 1.
LOG_E_MINUS_1 = math.log(math.e - 1)


# --- functions without cancellation -----------------------------------------------------------------------------------


def tanh_derivative(t: Tensor) -> Tensor:
    """1 − tanh² as 4σ(2t)σ(−2t), without cancellation: in float32 the difference is exactly 0 from |t| = 10 on."""
    half = torch.sigmoid(-2 * t.abs())
    return 4 * torch.addcmul(half, half, half, value=-1)


def log_one_plus(excess: Tensor, total: Tensor) -> Tensor:
    """``log(1 + excess)``, given also ``total = 1 + excess > 0``, computed without cancellation.

    Near 0 the excess holds the digits, near −1 the total does. The excess must keep a margin from −1: the infinite gradient
    of the logarithm that is not used, multiplied by 0, would be NaN.
    """
    return torch.where(total > 0.5, torch.log1p(excess), total.log())


def sum_tensors(tensors: list[Tensor]) -> Tensor:
    """The sum of tensors that broadcast, without a zero to start from (it would fix a dtype and a device)."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


# --- derivatives ------------------------------------------------------------------------------------------------------


def value_and_pull_back(function: Callable, *points: Tensor) -> tuple[Any, Callable]:
    """The value of a function, and the map that pulls a cotangent back to the arguments (``torch.func.vjp``).

    Unlike ``torch.autograd.grad`` it works under ``vmap``, ``torch.compile`` and ``make_fx``. The value keeps its graph.
    """
    value, pull_back = torch.func.vjp(function, *points)[:2]
    return value, pull_back


def linearize(function: Callable, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A map of points with its log-determinant and, without graph, the derivatives of both at every point.

    Cost: one pass, and D + 1 vector-Jacobian products, of which D run at once.

    Arguments:
        function: Returns x of the shape of z, and log_det of its batch shape.
        z: Points, shape ``batch_shape + (D,)``.

    Returns:
        x, log_det, the Jacobian ``[..., output, input]``, and the gradient of log_det.
    """
    (x, log_det), pull_back = value_and_pull_back(function, z)
    with torch.no_grad():
        dim = z.shape[-1]
        basis = torch.eye(dim, dtype=z.dtype, device=z.device)
        basis = basis.reshape(dim, *[1] * (z.dim() - 1), dim).expand(dim, *z.shape)
        rows = torch.func.vmap(lambda row: pull_back((row, torch.zeros_like(log_det)))[0])(basis)
        (log_det_gradient,) = pull_back((torch.zeros_like(x), torch.ones_like(log_det)))
    return x, log_det, rows.movedim(0, -2), log_det_gradient


class Recomputed(NamedTuple):
    """What :meth:`~pyro_flowguides.transforms.FlowTransform.recompute` returns.

    Attributes:
        pieces: The point in pieces, leaves of a graph.
        images: Its image in pieces, with the graph.
        log_det: The log-determinant, likewise.
        split: Takes a point, or a gradient, to pieces.
        join: Makes a point, or a gradient, of pieces.
    """

    pieces: tuple[Tensor, ...]
    images: tuple[Tensor, ...]
    log_det: Tensor
    split: Callable[[Tensor], tuple[Tensor, ...]]
    join: Callable[..., Tensor]


# --- inverses ---------------------------------------------------------------------------------------------------------


def solve_increasing(
    function: Callable[[Tensor], tuple[Tensor, Tensor]],
    target: Tensor,
    lower: Tensor,
    upper: Tensor,
    num_iterations: int = 80,
) -> Tensor:
    """Solves ``function(a) = target`` elementwise for an increasing function, by Newton's method safeguarded by bisection.

    A Newton step that leaves the bracket, or that follows one which did not halve it, is replaced by the midpoint, so the
    bracket is at least halved every second iteration whatever the function. The result has no graph; :func:`implicit_root`
    attaches the gradient.

    Arguments:
        function: Returns the value and the (positive) derivative at a.
        target: The values to reach.
        lower, upper: A bracket of the solution.
        num_iterations: The default exhausts float64 from a bracket of any sensible width.

    Returns:
        The iterate of smallest residual.
    """
    with torch.no_grad():
        root = best = (lower + upper) / 2
        smallest = torch.full_like(root, torch.inf)
        for _ in range(num_iterations):
            value, slope = function(root)
            excess = value - target
            best = torch.where(excess.abs() < smallest, root, best)
            smallest = torch.minimum(excess.abs(), smallest)
            width = upper - lower
            upper = torch.where(excess > 0, root, upper)
            lower = torch.where(excess > 0, lower, root)
            newton = root - excess / slope
            trusted = (newton >= lower) & (newton <= upper) & (upper - lower <= width / 2)
            root = torch.where(trusted, newton, (lower + upper) / 2)
        return best


def implicit_root(function: Callable[[Tensor], tuple[Tensor, Tensor]], target: Tensor, root: Tensor) -> Tensor:
    """Attaches to a root of ``function(a) = target`` its gradient, ``da = (dtarget − ∂function)/function'(a)``.

    It is one Newton step with the slope held fixed: first derivatives are exact, and the value can only improve.
    """
    root = root.detach()
    value, slope = function(root)
    return root - (value - target) / slope.detach()


def solve_newton(
    linearize: Callable[[Tensor], tuple[Tensor, Tensor]], target: Tensor, num_iterations: int = 100
) -> Tensor:
    """Solves ``f(z) = target`` for a smooth bijection of R^D by Newton's method with a step length per point.

    A step that does not reduce the residual is refused and the step length quartered; an accepted one doubles it, up to the
    full Newton step. A point whose residual does not come below ``sqrt(eps)·max(1, |target|)`` is returned as NaN rather than
    as a wrong number. Each iteration costs one call of ``linearize`` and one solve of size D per point.

    Arguments:
        linearize: Returns f(z) and its Jacobian ``[..., output, input]``.
        target: The points to reach, shape ``batch_shape + (D,)``.
        num_iterations: The number of Newton steps tried.
    """
    z = target
    value, jacobian = linearize(z)
    step_length = torch.ones_like(target[..., :1])
    for _ in range(num_iterations):
        residual = value - target
        error = residual.abs().amax(-1, keepdim=True)
        # Plain solve would wait for the device, and raise where one point of the batch has a singular Jacobian.
        step = torch.linalg.solve_ex(jacobian, residual.unsqueeze(-1))[0].squeeze(-1)
        trial = z - step_length * step
        trial_value, trial_jacobian = linearize(trial)
        trial_error = (trial_value - target).abs().amax(-1, keepdim=True)
        accept = trial_error < error
        z = torch.where(accept, trial, z)
        value = torch.where(accept, trial_value, value)
        jacobian = torch.where(accept.unsqueeze(-1), trial_jacobian, jacobian)
        step_length = torch.where(accept, (2 * step_length).clamp(max=1.0), step_length / 4)
    error = (value - target).abs().amax(-1, keepdim=True)
    tolerance = torch.finfo(target.dtype).eps ** 0.5 * target.abs().amax(-1, keepdim=True).clamp(min=1.0)
    return torch.where(error <= tolerance, z, torch.full_like(z, torch.nan))
