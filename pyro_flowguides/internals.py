"""Every name of torch and Pyro that they do not promise to keep: one function for each.

``tests/test_internals.py`` calls each of them, so that a new version of torch or Pyro that lacks a name fails there, by name.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.infer import MCMC
from torch import Tensor


def is_functorch_tensor(value: Tensor) -> bool:
    """Whether a tensor is one of ``torch.func`` (vmap, vjp), whose values cannot be read."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


def is_recording() -> bool:
    """Whether ``make_fx`` records the operations that run now."""
    # Imported here, since the module is slow to import and few need it.
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


def mcmc_arguments(mcmc: MCMC) -> tuple[tuple, dict[str, Any]]:
    """The positional and keyword arguments of ``MCMC.run``, which have no public name."""
    return mcmc._args or (), mcmc._kwargs or {}


def has_run(mcmc: MCMC) -> bool:
    """Whether ``MCMC.run`` has been called."""
    return mcmc._samples is not None
