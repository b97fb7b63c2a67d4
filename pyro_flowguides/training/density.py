"""A density of data in the data's own units: the rows, a flow, and the fixed maps between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .. import transforms as T
from ..bases import StandardNormal
from ..checks import warn
from ..distributions import NormalizingFlow
from ..guides.whitening import MAX_FULL_RANK_DIM
from ..recipes import build, find_recipe
from .likelihood import Rows

# The smallest part of a column's standard deviation that the other columns may leave open.
SMALLEST_REST = 1e-5


@dataclass(frozen=True)
class Units:
    """What a row of data is, and what its context.

    Attributes:
        shape: The shape of a row: ``()``, ``(D,)``, or that of an image.
        context_shape: The shape of the context of a row, ``()`` or ``(C,)``; None where there is no context.
        num_levels: The number K of values 0, …, K − 1 of integers; None for continuous data.
        logit: The part α of the unit interval that is cut off at each end before the logit; None for no logit.
    """

    shape: tuple[int, ...]
    context_shape: tuple[int, ...] | None = None
    num_levels: int | None = None
    logit: float | None = None

    @property
    def dim(self) -> int:
        """The number D of numbers in a row."""
        return math.prod(self.shape)

    @property
    def context_dim(self) -> int:
        """The number of numbers in a context; 0 without one."""
        return 0 if self.context_shape is None else math.prod(self.context_shape)

    def rows(self, owner: str, x: Any, context: Any = None, *, like: Tensor | None = None, name: str = "data") -> Rows:
        """Rows as the flow takes them.

        Arguments:
            owner: The name that errors begin with.
            x: The rows, a tensor of shape ``(N,) + shape``.
            context: Their context, of shape ``(N,) + context_shape``.
            like: What has the dtype to work in; by default that of the rows, or torch's own for integers.
            name: What the rows are called in errors.

        Raises:
            TypeError: if they are no tensors.
            ValueError: if a shape is wrong, a number is not finite, or an integer is none of the levels.
        """
        x, context = _as_tensor(owner, name, x), None if context is None else _as_tensor(owner, "context", context)
        if x.dim() < 1 or tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"{owner}: {name} must have shape (rows, *{self.shape}), as the data have, got {tuple(x.shape)}"
            )
        if (context is None) != (self.context_shape is None):
            problem = "needs a context, one for each row" if context is None else "takes no context, and one was given"
            raise ValueError(f"{owner}: {name} {problem}")
        if context is not None and tuple(context.shape) != (len(x), *(self.context_shape or ())):
            raise ValueError(
                f"{owner}: the context must have shape {(len(x), *(self.context_shape or ()))}, one for each row of {name}, got "
                f"{tuple(context.shape)}"
            )
        if self.num_levels is not None:
            _check_levels(owner, name, x, self.num_levels)
        elif not x.is_floating_point():
            raise ValueError(
                f"{owner}: {name} holds integers ({x.dtype}), on which a density can grow without bound; give num_levels=K for "
                "values 0, …, K − 1 (uniform noise is added), or floats if they are measurements"
            )
        dtype = like.dtype if like is not None else x.dtype if x.is_floating_point() else torch.get_default_dtype()
        device = x.device if like is None else like.device
        flat = x.to(device, dtype).reshape(len(x), -1)
        _check_finite(owner, name, flat)
        if context is not None:
            context = context.to(device, dtype).reshape(len(x), -1)
            _check_finite(owner, "context", context)
        return Rows(flat, context, noisy=self.num_levels is not None)


class StandardContext(T.FlowTransform):
    """A flow whose context is standardised first: its networks see numbers around 0.

    Arguments:
        flow: The flow, with a context.
        loc: What is subtracted from the context, shape (C,).
        scale: What it is divided by then, shape (C,).
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, flow: T.FlowTransform, loc: Tensor, scale: Tensor) -> None:
        super().__init__(flow.dim, flow.context_dim)
        self.flow = flow
        self.register_buffer("loc", loc.clone())
        self.register_buffer("scale", scale.clone())

    @property
    def stochastic_log_det(self) -> bool:
        return self.flow.stochastic_log_det

    def _standard(self, context: Tensor | None) -> Tensor | None:
        return None if context is None else (context - self.loc) / self.scale

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.flow.forward_and_log_det(z, self._standard(context))

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.flow.inverse_and_log_det(x, self._standard(context))

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.flow.forward_with_score(z, score, self._standard(context))


class FixedBase(nn.Module):
    """A base distribution that is not trained.

    Arguments:
        distribution: The distribution.
    """

    def __init__(self, distribution: dist.TorchDistribution) -> None:
        super().__init__()
        self.distribution = distribution

    def forward(self) -> dist.TorchDistribution:
        """The distribution."""
        return self.distribution


class Density(nn.Module):
    """A flow with its base and its fixed maps.

    Arguments:
        base: A module that returns the base distribution.
        transform: The map from the base to the data.
    """

    def __init__(self, base: nn.Module, transform: T.FlowTransform) -> None:
        super().__init__()
        self.base, self.transform = base, transform

    def distribution(self, context: Tensor | None = None) -> NormalizingFlow:
        """The distribution of a flat row, given its context if there is one."""
        flow = NormalizingFlow(self.base(), self.transform)
        return flow if context is None else flow.condition(context)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log q of flat rows."""
        return self.distribution(context).log_prob(x)


AnyFlow = str | T.FlowTransform | NormalizingFlow | Callable[..., T.FlowTransform]


def flow_and_base(owner: str, flow: AnyFlow, units: Units) -> tuple[T.FlowTransform, nn.Module]:
    """The flow for rows of these sizes, and its base distribution.

    Raises:
        TypeError: if it is no flow and no recipe.
        ValueError: if it is one of other sizes.
    """
    base: nn.Module = StandardNormal(units.dim)
    if isinstance(flow, NormalizingFlow):
        base, flow = FixedBase(flow.base_dist), flow.transform
    if isinstance(flow, T.FlowTransform):
        if (flow.dim, flow.context_dim) != (units.dim, units.context_dim):
            raise ValueError(
                f"{owner}: the flow has dim = {flow.dim} and context_dim = {flow.context_dim}; the data need dim = "
                f"{units.dim} and context_dim = {units.context_dim}"
            )
        return flow, base
    if not isinstance(flow, str) and not callable(flow):
        raise TypeError(
            f"{owner}: flow must be the name of a recipe, a recipe, a FlowTransform or a NormalizingFlow, got {flow!r}"
        )
    made = build(owner, find_recipe(owner, flow), units.dim, units.context_dim)
    if made.context_dim != units.context_dim:
        raise ValueError(f"{owner}: the flow of this recipe takes no context, and the data have one")
    return made, base


def with_fixed_maps(
    flow: T.FlowTransform, units: Units, gaussian: tuple[Tensor, Tensor], of_context: tuple[Tensor, Tensor] | None
) -> T.FlowTransform:
    """The flow between the maps that are not trained, from the base to the data.

    Arguments:
        flow: The flow.
        units: Those of the data.
        gaussian: Location and scale of the data, in logit space where there is a logit.
        of_context: Location and scale of the context, if there is one.
    """
    parts = [flow if of_context is None else StandardContext(flow, *of_context), T.FixedAffine(*gaussian)]
    return T.Compose([*parts, *_logit_maps(units, gaussian[0])])


def _logit_maps(units: Units, like: Tensor) -> list[T.FlowTransform]:
    """From the real line to the interval of the levels, a little more than that at both ends."""
    if units.logit is None or units.num_levels is None:
        return []
    width = units.num_levels / (1 - 2 * units.logit)
    whole = torch.full((units.dim,), width, dtype=like.dtype, device=like.device)
    return [T.Sigmoid(units.dim), T.FixedAffine(-units.logit * whole, whole)]


def gaussian_of(owner: str, rows: Rows, units: Units, whiten: str | None) -> tuple[Tensor, Tensor]:
    """Location and scale of rows, in the space where the flow works.

    Arguments:
        owner: The name that errors begin with.
        rows: The rows, continuous.
        units: Those of the data.
        whiten: ``"auto"`` for the Cholesky factor of the covariance, up to 200 dimensions and where there are twice as many rows;
            ``"diagonal"`` for standard deviations; None for 0 and 1.

    Raises:
        ValueError: if a column is constant, or columns determine one another.
    """
    x = rows.x
    for part in reversed(_logit_maps(units, x)):
        x = part.inverse_and_log_det(x)[0]
    if whiten is None:
        return torch.zeros_like(x[0]), torch.ones_like(x[0])
    loc, scale = location_and_scale(owner, x, full=whiten == "auto")
    return loc.to(x), scale.to(x)


def location_and_scale(owner: str, x: Tensor, full: bool, what: str = "column") -> tuple[Tensor, Tensor]:
    """Mean, and the Cholesky factor of the covariance or, where that is not known well, standard deviations; in float64.

    Arguments:
        owner: The name that errors begin with.
        x: Points, shape (N, D).
        full: Whether correlations are wanted.
        what: What errors call a coordinate.

    Raises:
        ValueError: if a coordinate is constant, or coordinates determine one another.
    """
    # What rounding leaves of a constant.
    rounding = 4 * torch.finfo(x.dtype).eps
    x = x.double()
    loc, sd = x.mean(0), x.std(0)
    constant = ~(sd > rounding * loc.abs())
    if bool(constant.any()):
        raise ValueError(
            f"{owner}: {what} {int(constant.nonzero()[0])} is constant ({int(constant.sum())} of {len(sd)} are) and has no "
            "density; leave it out"
        )
    dim = len(loc)
    if not full or dim > MAX_FULL_RANK_DIM:
        return loc, sd
    if len(x) < 2 * dim:
        warn(
            f"{owner}: {len(x)} points are too few for the correlations of {dim} coordinates, which start as if they were "
            "independent"
        )
        return loc, sd
    correlation = torch.corrcoef(x.mT).reshape(dim, dim)
    factor, failed = torch.linalg.cholesky_ex(correlation)
    rest = factor.diagonal()
    if int(failed) or not bool((rest > SMALLEST_REST).all()):
        index = int(failed) - 1 if int(failed) else int(rest.argmin())
        raise ValueError(
            f"{owner}: {what} {index} is a linear function of those before it, so that there is no density; leave it out"
        )
    return loc, sd.unsqueeze(-1) * factor


def context_scale_of(context: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a context; 1 in place of a standard deviation of 0."""
    sd = context.std(0)
    return context.mean(0), torch.where(sd > 0, sd, 1.0)


# --- checks ---------------------------------------------------------------------------------------------------------------


def _as_tensor(owner: str, name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: {name} must be an array, a frame, a list of numbers or a tensor, got {value!r}")
    return value


def _check_finite(owner: str, name: str, x: Tensor) -> None:
    wrong = ~x.isfinite()
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{owner}: {name} holds {int(wrong.sum())} NaN or infinite numbers among its {x.numel()}, the first in row {row}, "
            f"column {column}; remove these rows, or fill them in"
        )


def _check_levels(owner: str, name: str, x: Tensor, num_levels: int) -> None:
    wrong = (x != x.floor()) | (x < 0) | (x >= num_levels) if x.is_floating_point() else (x < 0) | (x >= num_levels)
    if bool(wrong.any()):
        raise ValueError(
            f"{owner}: with num_levels={num_levels} {name} must hold whole numbers from 0 to {num_levels - 1}, got "
            f"{x[wrong].reshape(-1)[0].item():g}"
        )
