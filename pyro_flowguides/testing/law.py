"""What the laws share: a law at work, perturbed parameters, Jacobians by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from ..transforms import FlowTransform


class Law:
    """A law at work on a transform: makes its points, compares, and words what is wrong."""

    def __init__(self, name: str, transform: FlowTransform, tolerance: float, relative: float = 0.0) -> None:
        self.name, self.transform, self.tolerance, self.relative = name, transform, tolerance, relative
        tensors = [*transform.parameters(), *transform.buffers()]
        self.like = next((t for t in tensors if t.is_floating_point()), torch.zeros((), dtype=torch.float64))
        self.z: Tensor | None = None

    def points(self, batch_shape: tuple[int, ...], scale: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """Points of the domain, and their contexts where there are any."""
        like = {"dtype": self.like.dtype, "device": self.like.device}
        z = scale * torch.randn(*batch_shape, self.transform.dim, **like)  # type: ignore[call-overload]
        if self.transform.domain is not constraints.real_vector:
            z = biject_to(self.transform.domain)(z)
        self.z, size = z, self.transform.context_dim
        return z, torch.randn(*batch_shape, size, **like) if size else None  # type: ignore[call-overload]

    def compare(
        self,
        broken: str,
        found: Tensor,
        expected: Tensor,
        advice: str,
        *,
        z: Tensor | None = None,
        at_point: bool = True,
    ) -> None:
        """An error at the largest difference, if it is not allowed; NaN is never allowed."""
        found, expected = found.detach(), expected.detach()
        if found.shape != expected.shape:
            raise self.broken(f"{broken}: shapes {tuple(found.shape)} and {tuple(expected.shape)}", advice)
        difference = (found - expected).abs()
        allowed = self.tolerance + self.relative * expected.abs()
        if bool((difference <= allowed).all()):
            return
        flat = (difference - allowed).nan_to_num(nan=torch.inf).flatten().argmax()
        index = tuple(int(i) for i in torch.unravel_index(flat, difference.shape))
        z = self.z if z is None else z
        place = f"At z = {z[index[: z.dim() - 1]].detach().tolist()}: " if at_point and z is not None else ""
        numbers = f"found {float(found[index]):.9g}, expected {float(expected[index]):.9g}"
        raise self.broken(
            f"{broken}. {place}{numbers}, a difference of {float(difference[index]):.2g} where "
            f"{float(allowed[index]):.2g} is allowed",
            advice,
        )

    def broken(self, message: str, advice: str) -> AssertionError:
        return AssertionError(
            f'{type(self.transform).__name__} breaks the law "{self.name}": {message}. {advice}'.strip()
        )


def perturb(transform: Any, scale: float = 1.0) -> Any:
    """Moves every parameter away from its start, in place: by noise of sd 1, in a matrix of sd 1/√fan-in, times scale."""
    with torch.no_grad():
        for parameter in transform.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
            parameter.add_(scale * torch.randn_like(parameter) / fan_in**0.5)
    return transform


def jacobian_and_gradient(transform: FlowTransform, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """The Jacobian and the gradient of log_det, at every point of a batch, by autograd one row at a time."""
    z = z.detach().requires_grad_()
    x, log_det = transform.forward_and_log_det(z, context)
    rows = [torch.autograd.grad(x[..., i].sum(), z, retain_graph=True)[0] for i in range(transform.dim)]
    (gradient,) = torch.autograd.grad(log_det.sum(), z, allow_unused=True) if log_det.requires_grad else (None,)
    return torch.stack(rows, -2), torch.zeros_like(z) if gradient is None else gradient


def gradients_by_name(of: FlowTransform | dict[str, Any], loss: Tensor) -> dict[str, Tensor | None]:
    """The gradient to each tensor that wants one, by name; None where the loss does not depend on it."""
    named = of if isinstance(of, dict) else dict(of.named_parameters())
    wanted = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
    if not wanted or not loss.requires_grad:
        return dict.fromkeys(wanted)
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()), allow_unused=True), strict=True))
