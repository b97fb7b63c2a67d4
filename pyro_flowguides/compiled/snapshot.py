"""The state of a training at one moment, by name: what a rollback, a round, a restart and a checkpoint go back to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Snapshot:
    """Everything that steps change: parameters, optimiser, counters of the guard, buffers of model and guide.

    It holds copies, which nobody writes to. Of Pyro's parameter store it holds the parameters that are trained, and no others.

    Attributes:
        rows: For each trained parameter, by its name in Pyro, a tensor of shape ``(rows, *shape)``: its unconstrained value,
            then the moments of Adam, then the moving average if one is kept.
        scalars: The numbers of :class:`pyro_flowguides.compiled.update.Scalars`.
        optimizer: The state of an optimiser that is not part of the graph; None for Adam.
        buffers: The buffers of model and guide, if they are modules, as ``"model.…"`` and ``"guide.…"``.
    """

    rows: dict[str, Tensor]
    scalars: Tensor
    optimizer: Any
    buffers: dict[str, Tensor]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The unconstrained values of the parameters by their names in Pyro."""
        return {name: rows[0] for name, rows in self.rows.items()}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python values, which ``torch.load(..., weights_only=True)`` reads."""
        return dict(vars(self))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Snapshot:
        """The snapshot that a :meth:`state_dict` is of."""
        return cls(**state)


class Buffers:
    """The buffers of model and guide, if they are modules.

    Arguments:
        model: The model.
        guide: The guide.
    """

    def __init__(self, model: Callable, guide: Callable) -> None:
        functions = {"model": model, "guide": guide}
        self._modules = {name: module for name, module in functions.items() if isinstance(module, nn.Module)}

    def copy(self) -> dict[str, Tensor]:
        """Copies of all buffers."""
        # All of them: the versions of tensors do not tell of the writes of BatchNorm.
        return {name: buffer.detach().clone() for name, buffer in self._named().items()}

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Writes copies back.

        Raises:
            ValueError: if model and guide lack one of these buffers, or have it in another shape; nothing is written then.
        """
        named = self._named()
        for name, value in saved.items():
            if name not in named or named[name].shape != value.shape:
                here = tuple(named[name].shape) if name in named else "none"
                raise ValueError(
                    f"the state is of another model or guide: buffer '{name}' has shape {tuple(value.shape)} there and "
                    f"{here} here"
                )
        for name, value in saved.items():
            named[name].copy_(value)

    def _named(self) -> dict[str, Tensor]:
        return {
            f"{root}.{name}": buffer
            for root, module in self._modules.items()
            for name, buffer in module.named_buffers()
            # Training cannot write to tensors of inference mode.
            if not buffer.is_inference()
        }
