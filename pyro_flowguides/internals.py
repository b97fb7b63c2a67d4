"""Every name of torch and Pyro that they do not promise to keep: one function for each.

``tests/test_internals.py`` calls each of them, so that a new version of torch or Pyro that lacks a name fails there, by name. No
other file of the package imports a private name, or looks one up.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import pyro.infer.trace_elbo
import pyro.infer.trace_mean_field_elbo
import pyro.infer.traceenum_elbo
import pyro.infer.tracegraph_elbo
import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.infer import ELBO, MCMC, TraceGraph_ELBO
from pyro.infer.autoguide.guides import AutoGuide
from pyro.nn import PyroModule
from pyro.nn.module import _Context
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

# A mode that sees every operation below autograd; its subclasses define ``__torch_dispatch__``.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

# --- tensors -----------------------------------------------------------------------------------------------------------


def is_functorch_tensor(value: Tensor) -> bool:
    """Whether a tensor is one of ``torch.func`` (vmap, vjp), whose values cannot be read."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


def is_in_functorch() -> bool:
    """Whether what runs now is within ``torch.func`` (vmap, vjp, grad, …)."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def version(tensor: Tensor) -> int:
    """The number of times that a tensor, or another one with the same memory, has been written to."""
    return tensor._version


def storage_id(tensor: Tensor) -> int:
    """The same number for all tensors with the same memory, even for those that have none yet."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def watch_storage(storage: torch.UntypedStorage) -> Callable[[], bool]:
    """Tells whether the memory of a tensor has been freed since; does not keep it alive."""
    from torch.multiprocessing.reductions import StorageWeakRef

    expired: Callable[[], bool] = StorageWeakRef(storage).expired
    return expired


def mark_as_parameter(tensor: Tensor) -> None:
    """Makes ``isinstance(tensor, nn.Parameter)`` true; a PyroModule would wrap anything else anew."""
    tensor._is_param = True  # type: ignore[attr-defined]


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of nested tuples, lists and dicts, and what puts them together again."""
    return pytree.tree_flatten(tree)


def unflatten(leaves: Sequence[Any], structure: Any) -> Any:
    """The inverse of :func:`flatten`."""
    return pytree.tree_unflatten(leaves, structure)


def is_hidden(fn: MaskedDistribution) -> bool:
    """Whether a distribution is masked as a whole, so that it has no density."""
    return fn._mask is False


# --- operators and graphs ----------------------------------------------------------------------------------------------

# The view that a product of matrices ends with.
UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
# What ``Tensor.to`` is below autograd.
TO_COPY = torch.ops.aten._to_copy.default
# What draws from a gamma and from a Dirichlet distribution.
STANDARD_GAMMA = torch.ops.aten._standard_gamma.default
SAMPLE_DIRICHLET = torch.ops.aten._sample_dirichlet.default


def is_operator(target: Any) -> bool:
    """Whether the target of a node in a graph is an operation of torch."""
    return isinstance(target, torch._ops.OpOverload)


def is_mutable(operator: Any) -> bool:
    """Whether an operation writes to one of its arguments."""
    return bool(operator._schema.is_mutable)


def returns_view(operator: Any) -> bool:
    """Whether an operation returns a tensor that shares memory with one of its arguments."""
    return any(result.alias_info is not None for result in operator._schema.returns)


def written_arguments(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operation writes to, among those that it is called with."""
    given = {argument.name: value for argument, value in zip(operator._schema.arguments, args, strict=False)}
    given.update(kwargs)
    return [
        given[argument.name]
        for argument in operator._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name in given
    ]


def is_recording() -> bool:
    """Whether ``make_fx`` records the operations that run now."""
    # Imported here, since the module is slow to import and few need it.
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


def record(function: Callable[..., Any], inputs: Sequence[Tensor]) -> GraphModule:
    """The operations of a function of tensors, below autograd, as a graph."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with _shared_fake_mode():
        return make_fx(function)(*inputs)


def record_functional(
    function: Callable[..., Any], inputs: Sequence[Tensor], decompositions: Mapping[Any, Callable[..., Any]]
) -> GraphModule:
    """The operations of a function as a graph without writes in place.

    Arguments:
        function: The function.
        inputs: An example of its arguments.
        decompositions: Operations to write as others.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    functional = torch.func.functionalize(function, remove="mutations")
    with _shared_fake_mode():
        return make_fx(functional, decomposition_table=dict(decompositions))(*inputs)


def jit_function(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """A function of tensors that returns some, traced by torch.jit, in a compilation unit of its own.

    What ``torch.jit.trace`` makes is held by torch for good, several megabytes for each captured step.
    """
    graph, _ = torch._C._create_graph_by_tracing(
        lambda *tensors: tuple(function(*tensors)), tuple(inputs), lambda value: "", True, False
    )
    traced: Callable[..., Any] = torch._C._create_function_from_graph("replay", graph)
    return traced


@contextmanager
def _shared_fake_mode() -> Iterator[None]:
    """``make_fx`` takes one mode for the shapes of all results; making one for each takes half of the time of a recording."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch._guards.tracing(torch._guards.TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        yield


@contextmanager
def not_recording() -> Iterator[None]:
    """``make_fx`` takes no notice of what runs within, and keeps the results as constants."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    with disable_proxy_modes_tracing():
        yield


@contextmanager
def no_batching_row_by_row() -> Iterator[None]:
    """``vmap`` raises an error for an operation that it cannot batch, where it would run it row by row."""
    functorch: Any = torch._C._functorch
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)


def has_triton() -> bool:
    """Whether inductor can compile for a GPU."""
    return bool(torch.utils._triton.has_triton())


def has_standalone_compile() -> bool:
    """Whether inductor can compile a graph without dynamo; in torch 2.6 it cannot yet."""
    import torch._inductor

    return hasattr(torch._inductor, "standalone_compile")


def standalone_compile(module: GraphModule, inputs: Sequence[Tensor], config: Mapping[str, Any]) -> Callable[..., Any]:
    """Compiles a graph by inductor, without dynamo, for inputs of these shapes."""
    return torch._inductor.standalone_compile(
        module, list(inputs), dynamic_shapes="from_example_inputs", options={"config_patches": dict(config)}
    )


# --- Pyro's parameter store --------------------------------------------------------------------------------------------


def stored_leaf(name: str) -> Tensor | None:
    """The unconstrained parameter of a name in Pyro's store; None if there is none."""
    return pyro.get_param_store()._params.get(name)


@contextmanager
def replaced_in_store(replacements: Mapping[int, Tensor]) -> Iterator[None]:
    """Puts other tensors in the place of unconstrained parameters in Pyro's store.

    Arguments:
        replacements: The other tensors, by the ``id`` of the parameters.
    """
    store = pyro.get_param_store()
    params, names = store._params, store._param_to_name
    store._params = {name: replacements.get(id(leaf), leaf) for name, leaf in params.items()}
    store._param_to_name = {leaf: name for name, leaf in store._params.items()}
    try:
        yield
    finally:
        store._params, store._param_to_name = params, names


# --- what Pyro checks on the way ---------------------------------------------------------------------------------------


@contextmanager
def without_checks_of_elbos() -> Iterator[None]:
    """Pyro's ELBOs without ``torch_item`` and ``warn_if_nan``, which look at values."""
    with ExitStack() as stack:
        for module in (
            pyro.infer.trace_elbo,
            pyro.infer.trace_mean_field_elbo,
            pyro.infer.traceenum_elbo,
            pyro.infer.tracegraph_elbo,
        ):
            for name, replacement in (("torch_item", _detach), ("warn_if_nan", _nothing)):
                if hasattr(module, name):
                    stack.enter_context(_replaced(module, name, replacement))
        yield


@contextmanager
def without_checks_of_samples() -> Iterator[None]:
    """Distributions that do not look at the values they score, even those made with validation switched on."""
    with _replaced(torch.distributions.Distribution, "_validate_sample", _nothing):
        yield


@contextmanager
def branches_for_tracing() -> Iterator[None]:
    """Makes Pyro, and nobody else, take its branches for ``torch.jit.trace``, which look at no value."""
    real = torch._C._get_tracing_state

    def tracing_state() -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return True if caller.startswith("pyro.") else real()

    with _replaced(torch._C, "_get_tracing_state", tracing_state):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    previous = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, previous)


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Takes the place of a check."""


# --- Pyro's ELBOs and MCMC ---------------------------------------------------------------------------------------------


def elbo_traces(
    elbo: ELBO, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]
) -> Iterator[tuple[poutine.Trace, poutine.Trace]]:
    """The traces of model and guide, once for all particles if they are vectorised, else one by one."""
    return iter(elbo._get_traces(model, guide, args, kwargs))


def loss_and_surrogate(
    elbo: TraceGraph_ELBO, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]
) -> tuple[Any, Tensor]:
    """The ELBO of ``TraceGraph_ELBO`` and the scalar that it differentiates."""
    return elbo._loss_and_surrogate_loss(model, guide, args, kwargs)


def enumeration_ids(site: Any) -> dict[int, int]:
    """For each dimension of enumeration in a site's log-probability, a number of the site that is enumerated there."""
    ids: dict[int, int] = site["infer"].get("_dim_to_id", {})
    return ids


def enumeration_id(site: Any) -> int:
    """The number of an enumerated site."""
    return enumeration_ids(site)[site["infer"]["_enumerate_dim"]]


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


class _ModuleContext(_Context):
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
    return context.inside if isinstance(context, _ModuleContext) else None


def module_name(module: PyroModule) -> str:
    """The name that a module's parameters have in front in Pyro's store; empty for one without a name."""
    return module._pyro_name


def set_module_context(module: PyroModule, inside: Any | None) -> None:
    """Gives a module and its parts a new context, with a further context manager inside if there is one."""
    before, new = module._pyro_context, _Context() if inside is None else _ModuleContext(inside)
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
        # None in a guide that Pyro has copied or loaded.
        guide._model = model and tuple(_copy_if_module(each, memo) for each in model)
    return new


def _copy_if_module(model: Any, memo: dict[int, Any]) -> Any:
    # An autoguide holds its model within a handler, which makes it a partial function.
    if isinstance(model, functools.partial) and len(model.args) == 2 and isinstance(model.args[0], Messenger):
        messenger, function = model.args
        copied = _copy_if_module(function, memo)
        return model if copied is function else messenger(copied)
    return copy.deepcopy(model, memo) if isinstance(model, nn.Module) else model


def store_of_processes() -> Any:
    """The keys and values that the processes of the default group of ``torch.distributed`` share."""
    return torch.distributed.distributed_c10d._get_default_store()
