"""What all flow guides do: their parameters in Pyro's store, their sites, their estimates from fixed draws, their copies."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeVar

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide.guides import AutoGuide
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn

from .. import bases, flows, internals
from .. import transforms as T
from ..model import plates, supports
from ..model.call import ModelCall
from ..model.enumeration import is_summed_out
from ..model.latents import Latents, LatentSite
from ..recipes import build, find_recipe
from ..transforms import coupling
from .delta import LatentDelta

BASES: dict[str, Callable[[int], bases.Base]] = {
    "normal": bases.StandardNormal,
    # Unit variance, so that init_scale and the whitening map mean the same whatever the tails.
    "student_t": functools.partial(bases.StudentT, unit_variance=True),
}
GRADIENTS = ("total", "path")
# See path_gradient and calls_of_flow_guides.
_forced_gradients: list[str] = []
_listeners: list[list[Call]] = []

Guide = TypeVar("Guide", bound="FlowGuide")


@contextlib.contextmanager
def path_gradient() -> Iterator[None]:
    """Lets every flow guide take the path gradient within, whatever it is wrapped in."""
    _forced_gradients.append("path")
    try:
        yield
    finally:
        _forced_gradients.pop()


@contextlib.contextmanager
def calls_of_flow_guides() -> Iterator[list[Call]]:
    """Every call of a flow guide within, wherever it is inside of a guide: a lambda, one of Pyro's handlers, an object."""
    calls: list[Call] = []
    _listeners.append(calls)
    try:
        yield calls
    finally:
        _listeners.remove(calls)


class Call(NamedTuple):
    """A call of a flow guide with its arguments."""

    guide: FlowGuide
    args: tuple
    kwargs: dict[str, Any]


class FlowGuide(AutoGuide):
    """An autoguide with a flow and a base distribution, the base class of :class:`AutoFlow` and :class:`AmortizedFlow`.

    Every parameter of the guide, and every floating-point buffer of its flow, has one name in Pyro's parameter store. A guide
    that is set up takes the values that the store has under these names: the buffers are part of what the parameters mean. With
    ``pyro.settings.set(module_local_params=True)`` the store is left alone.

    A subclass lays out the latents and makes the flow in ``_build``, draws in ``forward``, and gives fixed draws for medians
    and quantiles.

    Arguments:
        model: The model.
        flow: The name of a recipe, a recipe, or None where the subclass can do without.
        init_scale: The initial standard deviation.
        base: ``"normal"`` or ``"student_t"``.
        gradient: ``"total"`` or ``"path"``.
        damped: Whether recipes of :mod:`pyro_flowguides.flows` are asked for damped couplings.
        options: The options of the class that comes next.

    Raises:
        ValueError: if an argument is unknown.
    """

    flow: T.Compose
    base: bases.Base
    prototype_trace: Any
    # The number of different signatures of arguments for which the model is run.
    max_signatures: float = math.inf

    def __init__(
        self,
        model: Callable,
        flow: str | Callable[..., T.FlowTransform] | None,
        *,
        init_scale: float,
        base: str,
        gradient: str,
        damped: bool,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        recipe = None if flow is None else find_recipe(name, flow)
        if not isinstance(init_scale, (int, float)) or not init_scale > 0:
            raise ValueError(f"{name}: init_scale must be a positive number, got {init_scale!r}")
        if base not in BASES:
            raise ValueError(f'{name}: base must be "normal" or "student_t", got {base!r}')
        if gradient not in GRADIENTS:
            raise ValueError(f'{name}: gradient must be "total" or "path", got {gradient!r}')
        super().__init__(model, **options)
        self.gradient = gradient
        self._recipe = _damped(recipe) if damped and recipe is not None else recipe
        self._base = base
        self._init_scale = float(init_scale)
        self._latents: Latents | None = None
        self._initial = torch.zeros(0)
        self._frames_at: dict[Any, dict[str, Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for calls in _listeners:
            calls.append(Call(self, args, kwargs))
        return super().__call__(*args, **kwargs)

    @property
    def gradient_now(self) -> str:
        """The gradient of a draw: the guide's own, or the path gradient within :func:`path_gradient`."""
        return _forced_gradients[-1] if _forced_gradients else self.gradient

    # --- set-up --------------------------------------------------------------------------------------------------------

    def setup(self: Guide, *args: Any, **kwargs: Any) -> Guide:
        """Builds the guide for these arguments of the model, unless it is built; returns the guide.

        Afterwards ``parameters()``, ``state_dict()``, ``load_state_dict()`` and ``to()`` work; a guide that is not set up is
        built by its first call.
        """
        if self._latents is None and self.master is not None and self.master().prototype_trace is None:
            raise ValueError(
                f"{type(self).__name__}: this guide is part of an AutoGuideList, whose plates it uses; call the list once "
                "instead, which sets up all of its parts"
            )
        call = ModelCall.given(type(self).__name__, self.model, args, kwargs)
        with call.explaining(type(self).__name__), self._pyro_context:
            self._update_plates(call.args, dict(call.kwargs))
        return self

    @property
    def latents(self) -> Latents:
        """The latent sites, their plates and their places in the vector that the flow draws.

        Raises:
            RuntimeError: if the guide is not set up.
        """
        if self._latents is None:
            raise RuntimeError(
                f"{type(self).__name__} is not set up, and has no flow yet: call guide.setup(*args) with the arguments of the "
                "model first"
            )
        return self._latents

    @property
    def latent_dim(self) -> int:
        """The size of the vector that the flow draws."""
        return self.latents.dim

    def _prototype_hide_fn(self, message: Any) -> bool:
        """Whether the prototype lacks a site: one that is no latent, or that is discrete, which the model sums out."""
        return bool(AutoGuide._prototype_hide_fn(message)) or is_summed_out(message)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        previous = self.prototype_trace
        try:
            with torch.no_grad():
                # Not AutoContinuous's, to which a minibatch is the whole plate.
                AutoGuide._setup_prototype(self, *args, **kwargs)
                self._latents = self._build(args, kwargs)
        except BaseException:
            # A half-built guide would take its next call for granted.
            self.prototype_trace = previous
            raise
        self._frames_at[_signature(args, kwargs)] = self._prototype_frames

    def _build(self, args: tuple, kwargs: dict[str, Any]) -> Latents:
        """Lays out the latents of the prototype and attaches the flow by ``_attach``."""
        raise NotImplementedError(f"{type(self).__name__} must implement _build")

    def _update_plates(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Builds the guide at its first call; later, takes over the sizes that the plates have at these arguments.

        The model is run for it when arguments of this shape come for the first time.
        """
        if self._latents is None:
            self._setup_prototype(*args, **kwargs)
        # While torch.jit records, sizes are tensors; what it records is the repetition of a call that has been seen.
        elif not torch.jit.is_tracing():  # type: ignore[attr-defined]
            key = _signature(args, kwargs)
            if key not in self._frames_at:
                if len(self._frames_at) >= self.max_signatures:
                    return
                self._frames_at[key] = self._find_frames(args, kwargs)
            self._prototype_frames = self._frames_at[key]

    def _find_frames(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The plates that hold latents when the model is run on these arguments, by name."""
        raise NotImplementedError(f"{type(self).__name__} must implement _find_frames")

    def _make_body(self, dim: int, context_dim: int = 0) -> T.FlowTransform:
        """The flow that the recipe makes, without affine maps."""
        assert self._recipe is not None
        return build(type(self).__name__, self._recipe, dim, context_dim)

    def _attach(self, parts: Sequence[T.FlowTransform], loc: Tensor) -> None:
        """Makes flow and base distribution parts of the guide, in the dtype and on the device of the latents."""
        flow = T.Compose(parts).to(dtype=loc.dtype, device=loc.device)
        base = BASES[self._base](flow.dim).to(dtype=loc.dtype, device=loc.device)
        self._attach_modules({"flow": flow, "base": base})

    def _attach_modules(self, modules: Mapping[str, nn.Module]) -> None:
        """Makes modules parts of the guide under these names, and their parameters those of the store."""
        named = list(self.named_parameters())
        for owner, module in modules.items():
            # Before they are attached: the other order leaves every parameter in the store under a second name.
            to_pyro_module_(module)
            named += [(f"{owner}.{name}", parameter) for name, parameter in module.named_parameters()]
        # And before anything is replaced: to set a module anew takes the values of the old one out of the store.
        self._check_param_store(named)
        for owner, module in modules.items():
            setattr(self, owner, module)
        self._initial = self._flat_parameters()
        self._join_param_store()

    # --- the parameters ------------------------------------------------------------------------------------------------

    def _join_param_store(self) -> None:
        """Shares parameters and buffers with Pyro's store; where the store has a value, it is taken."""
        self._check_param_store(self.named_parameters())
        for module in self.modules():
            for name, parameter in list(module._parameters.items()):
                # A bias that is switched off is None; a PyroParam looks after itself.
                if parameter is not None and not name.endswith("_unconstrained"):
                    setattr(module, name, module._parameters.pop(name))
        if not pyro.settings.get("module_local_params"):
            store = pyro.get_param_store()
            names = {name: self._pyro_get_fullname(f"flow.{name}") for name in _floating_buffers(self.flow)}
            known = {name: store[full_name].detach() for name, full_name in names.items() if full_name in store}
            self.flow.load_state_dict(known, strict=False)
            self._share_buffers()

    def _check_param_store(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Raises ValueError if the store holds a value of another shape under the name of a parameter."""
        if pyro.settings.get("module_local_params"):
            return
        store = pyro.get_param_store()
        for name, parameter in named:
            full_name = self._pyro_get_fullname(name)
            if full_name in store and store[full_name].shape != parameter.shape:
                raise ValueError(
                    f"{type(self).__name__}: the parameter store holds '{full_name}' of shape "
                    f"{tuple(store[full_name].shape)} in place of {tuple(parameter.shape)}, from a guide of the same class for "
                    "another model or with other options; call pyro.clear_param_store() first, or use "
                    "pyro.settings.set(module_local_params=True)"
                )

    def _follow_param_store(self) -> None:
        """Joins the store anew after it was cleared or loaded, which replaces all of its values: one tells for all."""
        first = next(self.named_parameters(), None)
        # A recording puts other tensors into the store, and sees to the module itself.
        if first is None or pyro.settings.get("module_local_params") or internals.is_recording():
            return
        name, parameter = self._pyro_get_fullname(first[0]), first[1]
        store = pyro.get_param_store()
        if name not in store or store[name] is not parameter:
            self._join_param_store()

    def _share_buffers(self) -> None:
        """Puts the buffers of the flow into the store, which sees every later change of them in place."""
        if not pyro.settings.get("module_local_params"):
            with self._pyro_context:
                for name, buffer in _floating_buffers(self.flow).items():
                    pyro.get_param_store()[self._pyro_get_fullname(f"flow.{name}")] = buffer.detach()

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As for every module; the guide must be set up, otherwise it has nothing to load into."""
        has_flow = bool(state_dict) and bool(self.latents.sites)
        result = super().load_state_dict(state_dict, *args, **kwargs)
        if has_flow:
            # Unless the guide has been moved since, the store has them.
            self._share_buffers()
        return result

    def _flat_parameters(self) -> Tensor:
        values = [parameter.detach().reshape(-1) for parameter in self.parameters()]
        return torch.cat(values) if values else torch.zeros(0)

    def is_trained(self) -> bool:
        """Whether any parameter differs from its value when the flow was built, by training or loading."""
        now = self._flat_parameters()
        return self._latents is not None and not torch.equal(self._initial.to(now), now)

    def undamp(self) -> None:
        """Switch the safeguards off that keep couplings stable before whitening.

        The flow stays the same function. :meth:`AutoFlow.whiten` and :func:`pyro_flowguides.fit` do this; nothing changes in a
        guide that has been trained, whose parameters depend on the safeguards.

        Raises:
            RuntimeError: if the guide is not set up.
        """
        if self.latents.sites and not self.is_trained():
            coupling.undamp(self.flow)
            self._initial = self._flat_parameters()
            self._share_buffers()

    # --- the sites -----------------------------------------------------------------------------------------------------

    def _latents_at(self, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Latents:
        """The latents with the supports that they have at these points."""
        return supports.at(self.latents, ModelCall(self.model, args, kwargs), x)

    def _sample_sites(
        self, unconstrained: Iterable[tuple[LatentSite, Tensor]], made: Mapping[str, pyro.plate]
    ) -> dict[str, Tensor]:
        """Samples the value of every site inside its plates, with the Jacobian of its map as the density."""
        result = {}
        for site, point in unconstrained:
            value = site.transform(point)
            log_density: Tensor | float = 0.0
            if poutine.get_mask() is not False:
                log_jacobian = site.log_jacobian(point, value)
                log_density = -sum_rightmost(log_jacobian, log_jacobian.dim() - value.dim() + site.event_dim)
            with ExitStack() as stack:
                for frame in site.frames:
                    stack.enter_context(made[frame.name])
                result[site.name] = pyro.sample(site.name, LatentDelta(value, log_density, site.event_dim))
        return result

    # --- estimates -----------------------------------------------------------------------------------------------------

    def _fixed_draws(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Unconstrained latents at fixed antithetic base points that include 0, so that estimates never jitter.

        Their shape is ``(draws,) + slots of the plates + (latent_dim,)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement _fixed_draws")

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The marginal medians by site, from the same fixed draws as :meth:`quantiles`.

        They are taken in unconstrained space, as in Pyro, so that they lie in the site's support: the coordinate-wise medians
        of a simplex need not add up to 1.
        """
        medians = self._fixed_draws(args, kwargs).median(0).values
        latents = self._latents_at(medians, args, kwargs)
        return {site.name: site.without_padding(site.transform(point), 0) for site, point in latents.unpack(medians)}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The marginal quantiles of every latent site, from fixed draws: 10,001, or 1001 for every datum of an encoder.

        Arguments:
            quantiles: Numbers between 0 and 1.
            args: The positional arguments of the model; they are read by a guide with an encoder, and where supports depend on
                other latents.
            kwargs: The keyword arguments of the model; likewise.

        Returns:
            A dict of site name to a tensor of shape ``(len(quantiles),) + site shape``.

        Raises:
            RuntimeError: if the guide is not set up.
        """
        draws = self._fixed_draws(args, kwargs)
        # torch.quantile computes the same, but not for more than 16 million numbers.
        position = torch.as_tensor(quantiles, dtype=draws.dtype, device=draws.device).reshape(-1) * (len(draws) - 1)
        below = position.floor().long().clamp(0, len(draws) - 2)
        result = {}
        for site, point in self._latents_at(draws, args, kwargs).unpack(draws):
            # In the site's own space: the map to a simplex, for example, is not increasing coordinate by coordinate.
            value = site.without_padding(site.transform(point), 1).sort(0).values
            weight = (position - below).reshape(-1, *[1] * (value.dim() - 1))
            result[site.name] = torch.lerp(value[below], value[below + 1], weight)
        return result

    # --- copies --------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # Pyro drops the model, which often cannot be pickled, from the original as well as from the copy.
        model, master = self._model, self.master
        state = dict(super().__getstate__())
        self._model, self.master = model, master
        # The recipe has done its work, and may be a lambda.
        return {**state, "_model": (None,), "master": None, "_recipe": None}

    def __deepcopy__(self: Guide, memo: dict[int, Any]) -> Guide:
        # Within a process the model need not be dropped: the copy can be trained on.
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new._model, new._recipe = self._model, self._recipe
        return new


def _floating_buffers(flow: nn.Module) -> dict[str, Tensor]:
    """The floating-point buffers in the state dict of a flow, by name."""
    state = flow.state_dict(keep_vars=True)
    return {
        name: value
        for name, value in state.items()
        if not isinstance(value, nn.Parameter) and value.is_floating_point()
    }


def _signature(args: tuple, kwargs: dict[str, Any]) -> Any:
    # While torch.jit records, sizes are tensors.
    return None if torch.jit.is_tracing() else plates.signature(args, kwargs)  # type: ignore[attr-defined]


def _damped(recipe: Callable[..., T.FlowTransform]) -> Callable[..., T.FlowTransform]:
    """A recipe of this library with damped couplings, if it has any; a function of the user's own is taken as it is."""
    function: Any = recipe
    options: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        options = {**function.keywords, **options}
        function = function.func
    ours = any(function is known for known in [*flows.RECIPES.values(), *flows.IMAGE_RECIPES.values()])
    if not ours or "damped" in options or "damped" not in inspect.signature(function).parameters:
        return recipe
    return functools.partial(recipe, damped=True)
