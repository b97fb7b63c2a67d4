"""Every name of torch and Pyro that they do not promise to keep: one function for each.

``tests/test_internals.py`` calls each of them, so that a new version of torch or Pyro that lacks a name fails there, by name.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.infer import MCMC
from pyro.infer.autoguide.guides import AutoGuide
from pyro.nn import PyroModule
from pyro.nn.module import _Context
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn


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


@contextmanager
def parameter_store(params: dict[str, Tensor], constraints: dict[str, Any]) -> Iterator[None]:
    """Pyro's parameter store with other contents for a while; both dictionaries are changed in place.

    ``ParamStoreDict.scope`` does the same at the cost of two copies, and strips the parameters outside of the link to their
    unconstrained values, which ``SVI`` still needs.

    Arguments:
        params: Unconstrained parameters by name.
        constraints: Their constraints by name.
    """
    store = pyro.get_param_store()
    before = store._params, store._param_to_name, store._constraints
    store._params, store._constraints = params, constraints
    store._param_to_name = {leaf: name for name, leaf in params.items()}
    try:
        yield
    finally:
        # ``clear`` puts new dictionaries in their place.
        contents: Any = ((params, store._params), (constraints, store._constraints))
        for ours, now in contents:
            if now is not ours:
                ours.clear()
                ours.update(now)
        store._params, store._param_to_name, store._constraints = before


def stored_parameters() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The unconstrained parameters in Pyro's store, and their constraints, by name."""
    store = pyro.get_param_store()
    return dict(store._params), dict(store._constraints)


class ModuleContext(_Context):
    """What a ``PyroModule`` enters around every call, with a further context manager inside.

    Arguments:
        inside: Entered at the outermost call.
    """

    def __init__(self, inside: Any) -> None:
        super().__init__()
        self.inside = inside

    def __enter__(self) -> None:
        if not self.active:
            self.inside.__enter__()
        super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if not self.active:
            self.inside.__exit__(*error)


def inside_of_module_context(module: PyroModule) -> Any | None:
    """The context manager that :func:`set_module_context` has given a module, if it has."""
    context = module._pyro_context
    return context.inside if isinstance(context, ModuleContext) else None


def module_name(module: PyroModule) -> str:
    """The name that a module's parameters have in front in Pyro's store; empty for one without a name."""
    return module._pyro_name


def set_module_context(module: PyroModule, inside: Any | None) -> None:
    """Gives a module and its parts a new context, with a further context manager inside if there is one."""
    before, new = module._pyro_context, _Context() if inside is None else ModuleContext(inside)
    for part in module.modules():
        if isinstance(part, PyroModule) and part._pyro_context is before:
            part._pyro_context = new


def copy_with_models(module: nn.Module, memo: dict[int, Any]) -> Any:
    """A deep copy of a module in which every autoguide keeps its model, copied if that is a module, too.

    Pyro's own copies have none, and neither has the original afterwards.
    """
    guides = [part for part in module.modules() if isinstance(part, AutoGuide)]
    kept = [(guide._model, guide.master) for guide in guides]
    try:
        new = copy.deepcopy(module, memo)
    finally:
        for guide, (model, master) in zip(guides, kept, strict=True):
            guide._model, guide.master = model, master
    copies = [part for part in new.modules() if isinstance(part, AutoGuide)]
    for guide, (model, _) in zip(copies, kept, strict=True):
        guide._model = tuple(_copy_if_module(each, memo) for each in model)
    return new


def _copy_if_module(model: Any, memo: dict[int, Any]) -> Any:
    # An autoguide holds its model within a handler, which makes it a partial function.
    if isinstance(model, functools.partial) and len(model.args) == 2 and isinstance(model.args[0], Messenger):
        messenger, function = model.args
        copied = _copy_if_module(function, memo)
        return model if copied is function else messenger(copied)
    return copy.deepcopy(model, memo) if isinstance(model, nn.Module) else model
