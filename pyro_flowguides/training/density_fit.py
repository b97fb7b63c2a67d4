"""What the fit of a density returns: a distribution, in the units of the data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from ..diagnostics.importance import Estimate
from ..distributions import NormalizingFlow
from ..model.data import Conversion
from . import saving
from .density import AnyFlow, Density, Units, flow_and_base, with_fixed_maps
from .likelihood import Rows, score


@dataclass(repr=False)
class DensityFit:
    """A density that was fitted to data. Made by :func:`fit_density`.

    It owns its parameters: neither the flow that was given nor another fit changes it.

    Attributes:
        density: The flow with its base distribution, a module; ``density.parameters()`` are what was trained.
        units: What a row of the data is.
        train_losses: The mean negative log-likelihood of the batch of every step, in nats per row, shape (steps,).
        validation_losses: That of the held-out rows at every look at them; empty without any.
        validation_steps: The number of steps before each look.
        best_step: The number of steps after which the held-out rows were most likely; the parameters are those of then.
        stopped_early: Whether patience has ended the training.
        interrupted: Whether an interrupt from the keyboard has ended it.
        num_skipped: The number of steps that were skipped because loss or gradient were not finite.
        num_rolled_back: The number of times that the training exploded and was taken back.
        wall_time: The seconds that the fit took.
        recipe: The name of the recipe of the flow, if it was given by its name.
    """

    density: Density
    units: Units
    train_losses: np.ndarray
    validation_losses: np.ndarray
    validation_steps: np.ndarray
    best_step: int
    stopped_early: bool
    num_skipped: int
    num_rolled_back: int
    wall_time: float
    interrupted: bool = False
    recipe: str | None = field(default=None)

    def __repr__(self) -> str:
        loss = f", validation loss {self.validation_losses.min():.4g} nats" if len(self.validation_losses) else ""
        end = ", interrupted" if self.interrupted else ", stopped early" if self.stopped_early else ""
        kept = f", parameters of step {self.best_step}" if self.best_step < self.num_steps else ""
        return f"DensityFit of rows of shape {self.units.shape}: {self.num_steps} steps, {self.wall_time:.1f} s{end}{kept}{loss}"

    @property
    def num_steps(self) -> int:
        """The number of steps."""
        return len(self.train_losses)

    @property
    def distribution(self) -> NormalizingFlow:
        """The density as a distribution over flat rows; with a context, ``distribution.condition(context)`` is one.

        Of integers it is the density of k + u with noise u from 0 to 1.
        """
        return self.density.distribution()

    @torch.no_grad()
    def sample(self, num_samples: int = 1, context: Any = None, *, seed: int | None = None) -> Tensor:
        """Draws, in the shape of the data; integers where the data were.

        Arguments:
            num_samples: The number of draws.
            context: One context for all draws, or several in a batch shape of their own, which each get as many.
            seed: Seeds Pyro first, if given.

        Returns:
            Shape ``(num_samples,) + batch shape of the context + shape of a row``.

        Raises:
            ValueError: if a context is missing, not wanted, or of a wrong shape.
        """
        if seed is not None:
            pyro.set_rng_seed(seed)
        flat_context = self._flat_context(context)
        x = self.density.distribution(flat_context).sample(torch.Size([num_samples]))
        if (levels := self.units.num_levels) is not None:
            x = x.floor().clamp(0, levels - 1).long()
        return x.reshape(*x.shape[:-1], *self.units.shape)

    def _flat_context(self, context: Any) -> Tensor | None:
        shape = self.units.context_shape
        if (context is None) != (shape is None):
            raise ValueError(
                "DensityFit: " + ("there is no context in this density" if shape is None else "give context=")
            )
        if context is None or shape is None:
            return None
        context = torch.as_tensor(Conversion("DensityFit", self.sample, (1, context), {}).args[1]).to(self._like)
        batch = context.dim() - len(shape)
        if batch < 0 or tuple(context.shape[batch:]) != shape:
            raise ValueError(f"DensityFit: a context must end in shape {shape}, got {tuple(context.shape)}")
        return context.reshape(*context.shape[:batch], self.units.context_dim)

    def log_prob(self, x: Any, context: Any = None) -> Tensor:
        """The log-density of rows in the data's own units, in nats, shape (rows,).

        Of integers: log q(k + u) with fresh noise u, whose mean over the noise is a lower bound of the log-probability of k.

        Arguments:
            x: The rows, shape ``(rows,) + shape of a row``: an array, a frame or a tensor.
            context: Their context, one for each.

        Raises:
            ValueError: if a shape is wrong, or a number is not finite or none of the levels.
        """
        rows = self._rows(x, context).continuous()
        return self.density.log_prob(rows.x, rows.context)

    def bits_per_dim(self, x: Any, context: Any = None, *, seed: int | None = None) -> Estimate:
        r"""The mean of :math:`-\log_2 q(x) / D` over rows, with its standard error.

        For integers this is what a lossless code needs at most, for each number of a row, with uniform noise for
        dequantisation: Theis, van den Oord & Bethge (2016), arXiv:1511.01844.

        Arguments:
            x: Rows, as in :meth:`log_prob`; rows that were not trained on.
            context: Their context.
            seed: Seeds Pyro first, if given: integers get noise.
        """
        if seed is not None:
            pyro.set_rng_seed(seed)
        bits = -score(self.density.log_prob, self._rows(x, context).continuous()).double() / (
            self.units.dim * math.log(2)
        )
        return Estimate(float(bits.mean()), float(bits.std()) / math.sqrt(len(bits)) if len(bits) > 1 else math.nan)

    @property
    def _like(self) -> Tensor:
        return next(self.density.parameters())

    def _rows(self, x: Any, context: Any) -> Rows:
        x, context = Conversion("DensityFit", self.log_prob, (x, context), {}).args
        return self.units.rows("DensityFit", x, context, like=self._like, name="x")

    # --- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Writes the fit to a file without a pickle, a NumPy archive with a description in JSON; see :meth:`load`.

        Arguments:
            path: The file; an existing one is replaced.

        Raises:
            OSError: if it cannot be written.
        """
        content = {name: getattr(self, name) for name in _PLAIN_FIELDS}
        saving.write(Path(path), {**content, "units": vars(self.units), "state": dict(self.density.state_dict())})

    @classmethod
    def load(cls, path: str | Path, flow: AnyFlow | None = None) -> DensityFit:
        """Reads a fit that :meth:`save` has written. Nothing in the file is executed.

        Arguments:
            path: The file.
            flow: The flow that was given to :func:`fit_density`, or one like it; not needed where it was the name of a recipe.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is damaged or no saved density, the flow is missing, or it is another one.
        """
        owner = "DensityFit.load"
        content = saving.read(Path(path), "DensityFit")
        try:
            units, state = Units(**content["units"]), content["state"]
            fields = {name: content[name] for name in _PLAIN_FIELDS}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{owner}: '{path}' is no saved density: {error}") from error
        flow = flow or fields["recipe"]
        if flow is None:
            raise ValueError(f"{owner}: the flow was no recipe given by its name: give it with flow=")
        return cls(density=_with_state(owner, flow, units, state), units=units, **fields)


def _with_state(owner: str, flow: AnyFlow, units: Units, state: dict[str, Tensor]) -> Density:
    """The density with these values."""
    made, base = flow_and_base(owner, flow, units)
    try:
        gaussian = state["transform.transforms.1.loc"], state["transform.transforms.1.scale"]
        prefix = "transform.transforms.0."
        of_context = None
        if units.context_shape is not None:
            of_context = state[f"{prefix}loc"], state[f"{prefix}scale"]
        density = Density(base, with_fixed_maps(made, units, gaussian, of_context)).to(gaussian[0].dtype)
        density.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{owner}: the file is of another flow: {' '.join(str(error).split())[:300]}") from error
    return density


_PLAIN_FIELDS = (
    "train_losses",
    "validation_losses",
    "validation_steps",
    "best_step",
    "stopped_early",
    "num_skipped",
    "num_rolled_back",
    "wall_time",
    "interrupted",
    "recipe",
)
