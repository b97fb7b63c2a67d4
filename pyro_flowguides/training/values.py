"""Provisional."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro
import torch
from torch import Tensor


class Values:
    """The values of parameters, to go back to."""

    def __init__(self, *functions: Callable, values: Sequence[Tensor] | None = None) -> None:
        modules = [function for function in functions if isinstance(function, torch.nn.Module)]
        leaves = [leaf for _, leaf in pyro.get_param_store().named_parameters()]
        leaves += [leaf for module in modules for leaf in module.parameters()]
        leaves += [buffer for module in modules for buffer in module.buffers()]
        self.leaves = list({id(leaf): leaf for leaf in leaves}.values())
        self.values = [leaf.detach().clone() for leaf in self.leaves] if values is None else list(values)

    def restore(self) -> None:
        with torch.no_grad():
            for leaf, value in zip(self.leaves, self.values, strict=True):
                leaf.copy_(value)


def load_modules(states, model, guide) -> None:
    """Buffers and parameters of model and guide; the fixed map of a flow guide is among them."""
    from ..guides.auto import AutoFlow

    for name, module in (("model", model), ("guide", guide)):
        if (name in states) != isinstance(module, torch.nn.Module):
            raise ValueError(f"fit: the checkpoint is of another {name}")
        if isinstance(module, torch.nn.Module):
            try:
                module.load_state_dict(states[name])
            except RuntimeError as error:
                raise ValueError(
                    f"fit: the checkpoint is of another {name}: {' '.join(str(error).split())[:300]}"
                ) from error
        if isinstance(module, AutoFlow):
            module.share_whitening()
