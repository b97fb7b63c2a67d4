"""What happens to the parameters once a gradient is there: guard, clipping, optimiser, average. All of it is tensor arithmetic
without a look at a value, so that it goes into the graph of a step.

The parameters are one vector (one for each dtype). Together with what the optimiser keeps for each parameter it is a matrix,
whose rows are the parameters, the optimiser's moments, and the average of the parameters if one is kept.

A step whose loss or gradient is not finite changes nothing, and is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyro.optim.clipped_adam
import torch
from torch import Tensor

# The weight of the last norm of the gradient in its running mean.
NORM_RATE = 0.01


class Scalars(NamedTuple):
    """The numbers that go from step to step, packed in one tensor."""

    step: Any = 0.0
    norm: Any = 0.0
    norm_mean: Any = 0.0
    num_skipped: Any = 0.0


NUM_SKIPPED = Scalars._fields.index("num_skipped")


class State(NamedTuple):
    """Everything that a step changes.

    Attributes:
        vectors: For each dtype a matrix: the parameters in its first row, behind it what optimiser and average keep.
        scalars: The numbers of :class:`Scalars`.
    """

    vectors: tuple[Tensor, ...]
    scalars: Tensor


@dataclass(frozen=True)
class Adam:
    r"""Adam on a vector, as ``torch.optim.Adam``, ``torch.optim.AdamW`` and Pyro's ``ClippedAdam`` do it.

    Kingma & Ba (2015), arXiv:1412.6980; decoupled decay: Loshchilov & Hutter (2019), arXiv:1711.05101.

    Attributes:
        betas: The decay of the two moments.
        eps: What is added to the root of the second.
        weight_decay: The weight of the decay.
        decoupled: Whether the decay goes around the moments (AdamW).
        clip_value: Every coordinate of the gradient is clipped at this; None for no clipping.
        learning_rate_decay: The learning rate is multiplied with this at every step.
        corrects_eps: Whether the second moment is corrected before eps is added, as in torch, or after, as in Pyro.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    clip_value: float | None = None
    learning_rate_decay: float = 1.0
    corrects_eps: bool = True

    num_moments = 2

    @classmethod
    def like(cls, optimizer: torch.optim.Optimizer) -> Adam | None:
        """The same optimiser, if it is one of these; None if it is another or has options that this one lacks."""
        options: Mapping[str, Any] = optimizer.defaults
        if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW):
            if options["amsgrad"] or options["maximize"] or options["differentiable"]:
                return None
            decoupled = type(optimizer) is torch.optim.AdamW or bool(options.get("decoupled_weight_decay"))
            return cls(_floats(options["betas"]), options["eps"], options["weight_decay"], decoupled)
        if type(optimizer) is pyro.optim.clipped_adam.ClippedAdam and not options["centered_variance"]:
            return cls(
                _floats(options["betas"]),
                options["eps"],
                options["weight_decay"],
                clip_value=options["clip_norm"],
                learning_rate_decay=options["lrd"],
                corrects_eps=False,
            )
        return None

    def __call__(
        self, rows: Sequence[Tensor], gradient: Tensor, step: Tensor, learning_rate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The new parameters and moments.

        Arguments:
            rows: The parameters and the two moments.
            gradient: The gradient.
            step: The number of this step, from 1.
            learning_rate: A scalar.
        """
        parameters, first, second = rows
        if self.clip_value is not None:
            gradient = gradient.clamp(-self.clip_value, self.clip_value)
        if self.learning_rate_decay != 1:
            learning_rate = learning_rate * self.learning_rate_decay**step
        if self.weight_decay and self.decoupled:
            parameters = parameters * (1 - learning_rate * self.weight_decay)
        elif self.weight_decay:
            gradient = gradient.add(parameters, alpha=self.weight_decay)
        first = first.lerp(gradient, 1 - self.betas[0])
        second = (self.betas[1] * second).addcmul(gradient, gradient, value=1 - self.betas[1])
        first_correction, root_correction = 1 - self.betas[0] ** step, (1 - self.betas[1] ** step).sqrt()
        if self.corrects_eps:
            scale = second.sqrt() / root_correction + self.eps
            rate = learning_rate / first_correction
        else:
            scale = second.sqrt() + self.eps
            rate = learning_rate * root_correction / first_correction
        return parameters - rate * (first / scale), first, second


def _floats(betas: Sequence[Any]) -> tuple[float, float]:
    return float(betas[0]), float(betas[1])


@dataclass(frozen=True)
class Update:
    """The rule that makes the next state out of a gradient.

    Attributes:
        optimizer: The optimiser, or None if the parameters are moved by one outside.
        clip_norm: The gradient is scaled down to this norm; None for no such bound.
        clip_factor: The gradient is scaled down to this multiple of the running mean of its norm; None for no such bound.
        ema_decay: The decay of the exponential moving average of the parameters; None to keep none.
    """

    optimizer: Adam | None
    clip_norm: float | None = None
    clip_factor: float | None = None
    ema_decay: float | None = None

    def start(self, parameters: Sequence[Tensor]) -> State:
        """The state before the first step, from a vector of parameters for each dtype."""
        num_moments = self.optimizer.num_moments if self.optimizer else 0
        vectors = []
        for vector in parameters:
            rows = [vector, *[torch.zeros_like(vector)] * num_moments]
            vectors.append(torch.stack([*rows, vector] if self.ema_decay is not None else rows))
        scalars = torch.tensor(Scalars(), dtype=vectors[0].dtype, device=vectors[0].device)
        return State(tuple(vectors), scalars)

    def __call__(
        self, state: State, loss: Tensor, gradients: Sequence[Tensor], learning_rate: Tensor
    ) -> tuple[State, Sequence[Tensor], Tensor]:
        """The next state, the clipped gradients, and whether this step was finite.

        Arguments:
            state: The state.
            loss: The loss, a scalar.
            gradients: One vector for each dtype.
            learning_rate: A scalar.
        """
        now = Scalars(*state.scalars.unbind())
        norm = _norm(gradients).to(state.scalars.dtype)
        finite = _is_finite(loss.to(norm.dtype) + norm)
        gradients, norm_mean = self._clip(gradients, norm, now)
        step = now.step + finite
        vectors = tuple(
            torch.where(finite, self._move(matrix, gradient, step, learning_rate), matrix)
            for matrix, gradient in zip(state.vectors, gradients, strict=True)
        )
        skipped = ~finite
        scalars = Scalars(
            step=step,
            norm=norm,
            norm_mean=norm_mean if norm_mean is now.norm_mean else torch.where(finite, norm_mean, now.norm_mean),
            num_skipped=now.num_skipped + skipped,
        )
        return State(vectors, torch.stack(scalars)), gradients, finite

    def _clip(self, gradients: Sequence[Tensor], norm: Tensor, now: Scalars) -> tuple[Sequence[Tensor], Tensor]:
        """The clipped gradients, and the new running mean of their norm."""
        limit: Any = self.clip_norm
        norm_mean = now.norm_mean
        if self.clip_factor is not None:
            # An outlier must not raise the bar for the next one. But a bar of 0 would never be left.
            bar = torch.where(norm_mean > 0, self.clip_factor * norm_mean, torch.inf)
            # The mean of all steps at first, of the last ones later on.
            norm_mean = norm_mean.lerp(torch.minimum(norm, bar), (1 / (now.step + 1)).clamp(min=NORM_RATE))
            running = self.clip_factor * norm_mean
            limit = running if limit is None else running.clamp(max=limit)
        if limit is not None:
            # As torch.nn.utils.clip_grad_norm_ does it.
            scale = (limit / (norm + 1e-6)).clamp(max=1)
            gradients = [gradient * scale.to(gradient.dtype) for gradient in gradients]
        return gradients, norm_mean

    def _move(self, matrix: Tensor, gradient: Tensor, step: Tensor, learning_rate: Tensor) -> Tensor:
        rows = list(matrix.unbind())
        new: list[Tensor] = [rows[0]]
        if self.optimizer is not None:
            step, learning_rate = step.to(matrix.dtype), learning_rate.to(matrix.dtype)
            new = list(self.optimizer(rows[: 1 + self.optimizer.num_moments], gradient, step, learning_rate))
        if self.ema_decay is not None:
            # The mean of all steps at first, of the last ones later on.
            weight = (1 / step).clamp(min=1 - self.ema_decay)
            new.append(rows[-1] + weight.to(matrix.dtype) * (new[0] - rows[-1]))
        return torch.stack(new)


def _is_finite(value: Tensor) -> Tensor:
    # Two operations; isfinite has four.
    return value - value == 0


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack([norm.double() for norm in norms]))
