r"""A guide for the latents of single data: an encoder reads the data, and a flow whose parameters depend on what it read.

For every element n of a data plate the local latents are mapped to the real line and flattened into one vector :math:`x_n`,

.. math:: x_n = a\left(f\left(\mu(c_n) + \sigma(c_n) \odot z_n;\, c_n\right)\right), \qquad z_n \sim N(0, I), \qquad
    c_n = \text{encoder}(\text{data})_n

(or z from Student-t distributions, the same for all data) with μ and log σ linear in the context c, a conditional flow f (the
identity, for a diagonal normal) and a trainable elementwise affine map a. f, μ and σ start independent of the context, with f
the identity, μ = 0 and σ = 1; a starts at the location that ``init_loc_fn`` gives and at ``init_scale``. Kingma & Welling
(2014), *Auto-encoding variational Bayes*, arXiv:1312.6114; Rezende & Mohamed (2015), *Variational inference with normalizing
flows*, arXiv:1505.05770; Kingma et al. (2016), *Improving variational inference with inverse autoregressive flow*,
arXiv:1606.04934; van den Berg et al. (2018), *Sylvester normalizing flows for variational inference*, arXiv:1803.05649.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide.guides import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn
from torch.distributions import Transform, biject_to, constraints

from .. import bases, flows
from .. import transforms as T
from ..distributions import NormalizingFlow
from ..model.sites import latent_sites, quiet_trace
from .auto import BASES, _LatentDelta
from .base import StoredGuide

NUM_QUANTILE_PAIRS = 500


class AmortizedFlow(StoredGuide):
    r"""A guide :math:`\prod_n q(x_n \mid c_n)` for the latents inside a data plate, amortised by an encoder.

    Model and guide are called with the same arguments, and so is the encoder. The number of data may differ from call to
    call. In a subsampled plate each factor of the guide is scaled like the model's terms, so that the ELBO of a minibatch is
    an unbiased estimate of that of all data, at the cost of the minibatch. A draw costs one pass of the encoder and one
    forward pass of the flow; nothing is inverted in training.

    The flow has a vector for every element of those plates that all of the sites share; what a site has in further plates and
    in event dimensions is part of that vector, so that its size must not change.

    Arguments:
        model: A Pyro model whose local latents are continuous.
        encoder: A function ``encoder(*args, **kwargs)`` of the model's arguments, most often a ``torch.nn.Module`` (which
            becomes a Pyro module in place; a function registers its parameters itself, by ``pyro.module``). It returns a
            context of shape ``plate_shape + (context_dim,)``, where ``plate_shape`` ends with the dimension −1 of the plates:
            ``(N, context_dim)`` for a plate at dimension −1, ``(N, 1, context_dim)`` for one at −2. Its rows are those of the
            minibatch or, in a subsampled plate, of all data, of which the plate's indices then select; it is called within
            the plates, so that ``pyro.subsample`` there avoids the work.
        flow: The name of a recipe of :mod:`pyro_flowguides.flows`; a function ``flow(dim, context_dim=...) -> FlowTransform``,
            for example a recipe with ``functools.partial`` for its options; or None for a diagonal normal.
        sites: The names of the latents of this guide; by default all of the model, which then must be inside a plate.
        init_loc_fn: Where the guide starts, per site, as in Pyro's autoguides; its values are averaged over the data.
        init_scale: The standard deviation it starts with, in unconstrained space: that which the latents have over the data
            is a good one.
        base: The base distribution, as in :class:`pyro_flowguides.AutoFlow`: ``"normal"``, or ``"student_t"`` for heavy tails
            whose weight is learnt, coordinate by coordinate, with variance 1. Its degrees of freedom are those of all data;
            they do not come from the encoder.
        gradient: ``"total"``, or ``"path"`` for the path gradient (see :class:`pyro_flowguides.NormalizingFlow`).
        create_plates: As in Pyro's ``AutoNormal``: a function of the model's arguments that makes the plates. Without it the
            model is run once more, to see its plates, whenever the shapes of tensors or the integers among the arguments are
            new.

    Raises:
        ValueError: if an argument is unknown; at set-up, if a latent is discrete, outside every plate or of a bound that
            differs from datum to datum (it must be the same in all calls, too), if the sites share no plate, or if the flow
            does not fit; in every call, if the shape of the context does not fit the plates.
        TypeError: if the encoder returns something other than a floating-point tensor.
        RuntimeError: at set-up, if the model has no latent.
        NotImplementedError: at set-up, for a sequential plate.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> decoder = nn.Linear(2, 5)
        >>> def model(data):
        ...     pyro.module("decoder", decoder)
        ...     with pyro.plate("data", 1000, subsample_size=len(data)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=data)
        >>> encoder = nn.Sequential(nn.Linear(5, 16), nn.SiLU())
        >>> guide = AmortizedFlow(model, encoder, flow="iaf").setup(torch.randn(100, 5))
        >>> guide(torch.randn(20, 5))["z"].shape
        torch.Size([20, 2])
    """

    flow: T.Compose
    base: bases.Base
    prototype_trace: Any

    def __init__(
        self,
        model: Callable,
        encoder: Callable[..., Tensor],
        flow: str | Callable[..., T.FlowTransform] | None = "coupling",
        *,
        sites: Sequence[str] | None = None,
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 1.0,
        base: str = "normal",
        gradient: str = "total",
        create_plates: Callable | None = None,
    ) -> None:
        if not callable(encoder):
            raise TypeError(f"AmortizedFlow: encoder must be a function of the model's arguments, got {encoder!r}")
        if isinstance(flow, str) and flow not in flows.RECIPES:
            raise ValueError(
                f"AmortizedFlow: unknown flow {flow!r}; known recipes are {', '.join(sorted(flows.RECIPES))}"
            )
        if isinstance(sites, str):
            raise TypeError(f"AmortizedFlow: sites must be a list of names, got the string {sites!r}")
        if not isinstance(init_scale, (int, float)) or not init_scale > 0:
            raise ValueError(f"AmortizedFlow: init_scale must be a positive number, got {init_scale!r}")
        if base not in BASES:
            raise ValueError(f'AmortizedFlow: base must be "normal" or "student_t", got {base!r}')
        if gradient not in ("total", "path"):
            raise ValueError(f'AmortizedFlow: gradient must be "total" or "path", got {gradient!r}')
        super().__init__(InitMessenger(init_loc_fn)(model), create_plates=create_plates)
        if isinstance(encoder, nn.Module):
            # Before it is attached: the other order leaves every parameter in the store under a second name.
            to_pyro_module_(encoder)
        self.encoder = encoder
        self.gradient = gradient
        self.sites = None if sites is None else tuple(sites)
        self._recipe = flows.RECIPES[flow] if isinstance(flow, str) else flow
        self._base = base
        self._init_scale = float(init_scale)
        self._layout: _Layout | None = None
        self._frames_at: dict[Hashable, dict[str, Any]] = {}

    # --- set-up --------------------------------------------------------------------------------------------------------

    def setup(self, *args: Any, **kwargs: Any) -> AmortizedFlow:
        """Builds the guide for arguments like these, unless it is built; returns the guide.

        Afterwards ``parameters()``, ``state_dict()``, ``load_state_dict()`` and ``to()`` work; a guide that is not set up is
        built by its first call.
        """
        with self._pyro_context:
            self._see_plates(args, kwargs)
        return self

    @property
    def latent_dim(self) -> int:
        """The size of the vector of one datum."""
        return self._built_layout.size

    @property
    def context_dim(self) -> int:
        """The size of the context that the encoder returns."""
        return self.flow.context_dim

    @property
    def _built_layout(self) -> _Layout:
        if self._layout is None:
            raise RuntimeError(
                "AmortizedFlow: this guide is not built yet; call setup(*args) with the model's arguments"
            )
        return self._layout

    def _see_plates(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Builds the guide at its first call, and knows the sizes of the model's plates at every call."""
        if self._layout is not None and (self.master is not None or self.create_plates is not None):
            return
        if self._layout is not None and torch.jit.is_tracing():  # type: ignore[attr-defined]
            # Sizes are tensors there; what runs is the repetition of a call that has been seen.
            return
        sizes = _sizes((args, kwargs))
        if sizes not in self._frames_at:
            if self.model is None:
                raise RuntimeError(
                    "AmortizedFlow: this guide comes from a file, without its model, and cannot see the plates for arguments of "
                    "sizes that are new. get_posterior, median and quantiles work; to draw or train, make the guide anew with "
                    "its model and load the state_dict"
                )
            self._setup_prototype(*args, **kwargs)
            self._frames_at[sizes] = self._prototype_frames
        self._prototype_frames = self._frames_at[sizes]

    def _prototype_hide_fn(self, message: Any) -> bool:
        others = self.sites is not None and message["name"] not in self.sites
        return others or AutoGuide._prototype_hide_fn(message)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        previous = self.prototype_trace
        try:
            with torch.no_grad():
                super()._setup_prototype(*args, **kwargs)
                self._check_names(args, kwargs)
                layout = _Layout.of([site for _, site in latent_sites(self.prototype_trace)])
                if self._layout is None:
                    self._build(layout, self._first_context(layout, args, kwargs))
                    self._layout = layout
                elif layout != self._layout:
                    raise ValueError(
                        f"AmortizedFlow: the latents of one datum are {layout.describe()} in this call, but "
                        f"{self._layout.describe()} in the call that built the guide; their shapes must not change"
                    )
        except BaseException:
            # A half-built guide would take its next call for granted.
            self.prototype_trace = previous
            raise

    def _check_names(self, args: tuple, kwargs: dict[str, Any]) -> None:
        missing = [name for name in self.sites or () if name not in self.prototype_trace.nodes]
        if missing:
            with quiet_trace():
                known = [name for name, _ in latent_sites(poutine.trace(self.model).get_trace(*args, **kwargs))]
            raise ValueError(f"AmortizedFlow: sites {missing} are no latents of the model, which has {known}")
        if not any(True for _ in self.prototype_trace.iter_stochastic_nodes()):
            raise RuntimeError("AmortizedFlow found no latent variables; use an empty guide instead")

    def _first_context(self, layout: _Layout, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The context that the guide is built for; warns of parameters of the encoder that would never train."""
        with torch.enable_grad(), poutine.block(), poutine.trace(param_only=True) as capture:
            context = self._encode(layout, args, kwargs)
        if context.requires_grad and not isinstance(self.encoder, nn.Module) and not capture.trace.nodes:
            warnings.warn(
                "AmortizedFlow: the context depends on something with a gradient, but Pyro knows no parameter of the encoder, "
                "so that it would not be trained; pass the torch.nn.Module itself, or call pyro.module in the function",
                stacklevel=2,
            )
        return context.detach()

    def _build(self, layout: _Layout, context: Tensor) -> None:
        dim, context_dim, loc = layout.size, context.shape[-1], layout.init_loc
        if (context.dtype, context.device) != (loc.dtype, loc.device):
            raise ValueError(
                f"AmortizedFlow: the encoder returns {context.dtype} on {context.device}, the latents are {loc.dtype} on "
                f"{loc.device}; bring the encoder there with encoder.to(...)"
            )
        last = T.Affine(dim)
        last.parameters_of.value.copy_(torch.cat([loc, torch.full_like(loc, math.log(self._init_scale))]))
        # Linear in the context: the depth is in the encoder.
        parts: list[T.FlowTransform] = [T.Affine(dim, context_dim=context_dim, hidden_dims=())]
        if self._recipe is not None:
            body = self._recipe(dim, context_dim=context_dim)
            if not isinstance(body, T.FlowTransform) or body.dim != dim or body.context_dim not in (0, context_dim):
                raise ValueError(
                    f"AmortizedFlow: flow({dim}, context_dim={context_dim}) must return a FlowTransform with dim = {dim} and "
                    f"context_dim = {context_dim}, got {body!r}"
                )
            parts.append(body)
        flow = T.Compose([*parts, last]).to(dtype=loc.dtype, device=loc.device)
        base = BASES[self._base](dim).to(dtype=loc.dtype, device=loc.device)
        to_pyro_module_(flow)
        to_pyro_module_(base)
        self.flow = flow
        self.base = base
        self._attach_to_param_store()

    # --- the context ---------------------------------------------------------------------------------------------------

    def _encode(self, layout: _Layout, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The encoder's output, with its number of dimensions and its size checked."""
        context = self.encoder(*args, **kwargs)
        if not isinstance(context, Tensor) or not context.is_floating_point():
            what = f"a tensor of {context.dtype}" if isinstance(context, Tensor) else f"a {type(context).__name__}"
            raise TypeError(
                f"AmortizedFlow: the encoder must return one floating-point tensor, the context, got {what}; several parts "
                "go together by torch.cat([...], -1)"
            )
        shape = tuple(context.shape)
        if len(shape) != layout.data_nesting + 1 or 0 in shape:
            raise ValueError(
                f"AmortizedFlow: the encoder must return a context of shape {layout.context_shape}, got shape {shape}"
            )
        if self._layout is not None and shape[-1] != self.context_dim:
            raise ValueError(
                f"AmortizedFlow: the encoder must return a context whose last dimension is {self.context_dim}, as it was when "
                f"the guide was built, got shape {shape}"
            )
        return context

    def _select(self, context: Tensor, plates: Mapping[str, Any]) -> Tensor:
        """The rows of the context that belong to the current elements of the plates."""
        layout = self._built_layout
        shape = tuple(context.shape)
        for dim in layout.context_dims:
            plate: Any = plates[layout.data_plates[dim]] if dim in layout.data_plates else None
            size, full_size = (1, 1) if plate is None else (plate.subsample_size, plate.size)
            rows = shape[dim - 1]
            if rows == full_size and rows != size:
                context = context.index_select(dim - 1, plate.indices.to(context.device))
            elif rows != size and not torch.jit.is_tracing():  # type: ignore[attr-defined]
                # (Sizes are tensors there.)
                expected = (
                    "1, since no plate is there"
                    if plate is None
                    else f"{size}, the size of plate '{plate.name}'"
                    + (f" (or {full_size}, of which it takes {size})" if full_size != size else "")
                )
                raise ValueError(
                    f"AmortizedFlow: the encoder returned a context of shape {shape}, whose dimension {dim - 1} must be "
                    f"{expected}. If the size of the plate changes from call to call, give create_plates to the "
                    "AutoGuideList that holds this guide."
                )
        return context

    # --- the posterior -------------------------------------------------------------------------------------------------

    def get_posterior(self, *args: Any, **kwargs: Any) -> NormalizingFlow:
        """The approximate posteriors for the given arguments: one for every row of the encoder's output.

        Returns:
            A distribution over vectors of size ``latent_dim``, in unconstrained space. Its batch shape is that of the
            context, with 1 for each further plate to the left.
        """
        if self._layout is None:
            self.setup(*args, **kwargs)
        return self._posterior(self._encode(self._built_layout, args, kwargs))

    def _posterior(self, context: Tensor) -> NormalizingFlow:
        missing = self._built_layout.nesting + 1 - context.dim()
        context = context.reshape(*[1] * missing, *context.shape)
        return NormalizingFlow(self.base(), self.flow, gradient=self.gradient).condition(context)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples every local site in its plates, with the same arguments as the model; returns the values by name."""
        self._see_plates(args, kwargs)
        self._follow_param_store()
        layout = self._built_layout
        plates = self._create_plates(*args, **kwargs)
        with ExitStack() as stack:
            for dim, name in layout.data_plates.items():
                stack.enter_context(plates[name])
                if plates[name].dim != dim:
                    raise ValueError(
                        f"AmortizedFlow: plate '{name}' is at dimension {dim} in the model, and at {plates[name].dim} by "
                        f"create_plates; make it with dim={dim}"
                    )
            context = self._select(self._encode(layout, args, kwargs), plates)
            latent = pyro.sample(f"_{self._pyro_name}_latent", self._posterior(context), infer={"is_auxiliary": True})
        result = {}
        for site, unconstrained in layout.unpack(latent, keep_slots=latent.dim() - 1 > layout.nesting):
            value = site.transform(unconstrained)
            log_density: Any = 0.0
            if poutine.get_mask() is not False:
                log_density = site.transform.inv.log_abs_det_jacobian(value, unconstrained)
                log_density = sum_rightmost(log_density, log_density.dim() - value.dim() + site.event_dim)
            with ExitStack() as stack:
                for name in site.plates:
                    stack.enter_context(plates[name])
                result[site.name] = pyro.sample(site.name, _LatentDelta(value, log_density, site.event_dim))
        return result

    def _fixed_draws(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """x for every datum at fixed antithetic base points that include 0; the draws are the first dimension."""
        posterior = self.get_posterior(*args, **kwargs)
        base_draws = self.base.fixed_draws(NUM_QUANTILE_PAIRS)
        return posterior.transform(base_draws.reshape(len(base_draws), *[1] * len(posterior.batch_shape), -1))

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The marginal medians for the given arguments, one for every row of the encoder's output, by site.

        They are taken in unconstrained space, so that they lie in the site's support, from 1001 fixed draws.
        """
        medians = self._fixed_draws(args, kwargs).median(0).values
        return {site.name: site.transform(value) for site, value in self._built_layout.unpack(medians)}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The marginal quantiles for the given arguments, one for every row of the encoder's output.

        They come from 1001 fixed draws for every datum: a quantile has the Monte-Carlo error of so many.

        Arguments:
            quantiles: Numbers between 0 and 1.
            args: The positional arguments of the model.
            kwargs: The keyword arguments of the model.

        Returns:
            A dict of site name to a tensor of shape ``(len(quantiles),) + site shape``.
        """
        draws = self._fixed_draws(args, kwargs)
        position = torch.as_tensor(quantiles, dtype=draws.dtype, device=draws.device).reshape(-1) * (len(draws) - 1)
        below = position.floor().long().clamp(0, len(draws) - 2)
        result = {}
        for site, unconstrained in self._built_layout.unpack(draws):
            value = site.transform(unconstrained).sort(0).values
            weight = (position - below).reshape(-1, *[1] * (value.dim() - 1))
            result[site.name] = torch.lerp(value[below], value[below + 1], weight)
        return result


# --- where the latents of one datum lie ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LocalSite:
    """One latent site: its map from the real line, and where its part of a datum's vector belongs.

    The part is laid out as ``inner sizes + event shape``; the inner plates (dimension and size) are those that not all sites
    share.
    """

    name: str
    event_dim: int
    event_shape: tuple[int, ...]
    batch_dims: int
    plates: tuple[str, ...]
    inner: tuple[tuple[int, int], ...]
    transform: Transform = field(compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*[size for _, size in self.inner], *self.event_shape)

    def place(self, part: Tensor) -> Tensor:
        """A part of shape ``batch_shape + (size,)`` with every inner plate in the dimension where the model has it."""
        batch_dims = part.dim() - 1
        value = part.reshape(*part.shape[:-1], *self.shape)
        for index, (dim, _) in enumerate(self.inner):
            value = value.transpose(batch_dims + dim, batch_dims + index)
        return value.reshape(*value.shape[:batch_dims], *self.event_shape)


@dataclass(frozen=True)
class _Layout:
    """The local sites, the plates that they share, and the vector of one datum; equal whatever the number of data."""

    sites: tuple[_LocalSite, ...]
    data_plates: dict[int, str]
    init_loc: Tensor = field(compare=False)

    @classmethod
    def of(cls, sites: Sequence[Any]) -> _Layout:
        """The layout of the latent sites of a trace; raises the errors of :class:`AmortizedFlow`."""
        for site in sites:
            if site["fn"].support.is_discrete:
                raise ValueError(
                    f"AmortizedFlow: site '{site['name']}' is discrete. Leave it out by sites=[...], and marginalise it in the "
                    "model by pyro.infer.config_enumerate and TraceEnum_ELBO"
                )
            if not site["cond_indep_stack"]:
                raise ValueError(
                    f"AmortizedFlow: latent site '{site['name']}' is not in a plate, so that it belongs to no datum. Name the "
                    "sites of this guide by sites=[...], or hide this one by poutine.block(model, hide=[...]); a guide for it, "
                    "for example AutoFlow, goes with this one in an AutoGuideList"
                )
        names = [{frame.name for frame in site["cond_indep_stack"]} for site in sites]
        shared = set.intersection(*names)
        if not shared:
            where = ", ".join(
                f"'{site['name']}' in {sorted(plates)}" for site, plates in zip(sites, names, strict=True)
            )
            raise ValueError(
                f"AmortizedFlow: the sites share no plate ({where}); make one guide for each plate, with sites=[...], and put "
                "them into an AutoGuideList"
            )
        data_plates = {frame.dim: frame.name for frame in sites[0]["cond_indep_stack"] if frame.name in shared}
        local_sites, init_locs = zip(*[_local_site(site, data_plates) for site in sites], strict=True)
        kinds = {(loc.dtype, loc.device) for loc in init_locs}
        if len(kinds) > 1:
            which = ", ".join(
                f"'{site.name}' {loc.dtype} on {loc.device}" for site, loc in zip(local_sites, init_locs, strict=True)
            )
            raise ValueError(f"AmortizedFlow: the latents differ in dtype or device: {which}")
        return cls(local_sites, dict(sorted(data_plates.items())), torch.cat(init_locs))

    @property
    def size(self) -> int:
        return len(self.init_loc)

    @property
    def data_nesting(self) -> int:
        """The number of batch dimensions of the context."""
        return max(-dim for dim in self.data_plates)

    @property
    def nesting(self) -> int:
        """The number of batch dimensions of the posterior: with a slot of size 1 for every inner plate."""
        return max([self.data_nesting, *[-dim for site in self.sites for dim, _ in site.inner]])

    @property
    def context_shape(self) -> str:
        """The shape that a context must have, in words."""
        batch = [f"size of '{self.data_plates[dim]}'" if dim in self.data_plates else "1" for dim in self.context_dims]
        return f"({', '.join(batch)}, context_dim)"

    @property
    def context_dims(self) -> range:
        return range(-self.data_nesting, 0)

    def describe(self) -> str:
        return ", ".join(f"'{site.name}' of shape {site.shape} in {list(site.plates)}" for site in self.sites)

    def unpack(self, latent: Tensor, keep_slots: bool = False) -> Iterator[tuple[_LocalSite, Tensor]]:
        """The unconstrained values of all sites, from vectors of shape ``(…, batch_shape, size)``.

        The slots of inner plates that a site does not have are dropped, unless dimensions further left rely on them.
        """
        sizes = [math.prod(site.shape) for site in self.sites]
        for site, part in zip(self.sites, latent.split(sizes, -1), strict=True):
            value = site.place(part)
            if not keep_slots:
                first = latent.dim() - 1 - self.nesting
                value = value.reshape(*value.shape[:first], *value.shape[first + self.nesting - site.batch_dims :])
            yield site, value


def _local_site(site: Any, data_plates: Mapping[int, str]) -> tuple[_LocalSite, Tensor]:
    """A site of a trace, and its part of a datum's vector, averaged over the data."""
    name, fn, value = site["name"], site["fn"], site["value"]
    frames = sorted(site["cond_indep_stack"], key=lambda frame: frame.dim)
    inner = [frame for frame in frames if frame.dim not in data_plates]
    for frame in inner:
        if frame.full_size != frame.size:
            raise ValueError(
                f"AmortizedFlow: site '{name}' is in plate '{frame.name}', which takes {frame.size} of its {frame.full_size} "
                "elements and is not shared by all sites of this guide; use the whole plate, or one guide for each plate"
            )
    with helpful_support_errors(site):
        support = _support_of_one_datum(name, fn.support, fn.event_dim, data_plates)
        transform = biject_to(support)
    unconstrained = transform.inv(value)
    if not bool(unconstrained.isfinite().all()):
        raise ValueError(
            f"AmortizedFlow: init_loc_fn gives site '{name}' a value that is not finite in unconstrained space; choose another "
            "init_loc_fn, for example init_to_feasible"
        )
    batch_dims = value.dim() - fn.event_dim
    inner_dims = [frame.dim for frame in inner]
    data_dims = [batch_dims + dim for dim in range(-batch_dims, 0) if dim not in inner_dims]
    local_site = _LocalSite(
        name=name,
        event_dim=fn.event_dim,
        event_shape=tuple(unconstrained.shape[batch_dims:]),
        batch_dims=batch_dims,
        plates=tuple(frame.name for frame in frames),
        inner=tuple((frame.dim, frame.size) for frame in inner),
        transform=transform,
    )
    return local_site, unconstrained.mean(data_dims).reshape(-1)


def _support_of_one_datum(name: str, support: Any, event_dim: int, data_plates: Mapping[int, str]) -> Any:
    """The support with its bounds as they are for every datum: a plate expands them to its size at the time."""
    support = copy.copy(support)
    for attribute, bound in vars(support).items():
        if isinstance(bound, constraints.Constraint):
            setattr(support, attribute, _support_of_one_datum(name, bound, event_dim, data_plates))
        elif isinstance(bound, Tensor):
            for dim, plate in data_plates.items():
                axis = dim - event_dim
                if bound.dim() < -axis:
                    continue
                first = bound.narrow(axis, 0, 1)
                if not bool((bound == first).all()):
                    raise ValueError(
                        f"AmortizedFlow: the bounds of site '{name}' differ along plate '{plate}'; give it fixed bounds, and "
                        "scale its value in the model"
                    )
                bound = first
            setattr(support, attribute, bound)
    return support


def _sizes(value: Any) -> Hashable:
    """What the size of a plate can come from: shapes, integers and strings, as they lie in the arguments."""
    if isinstance(value, Mapping):
        return tuple((key, _sizes(part)) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_sizes(part) for part in value)
    if isinstance(value, (int, str)):
        return value
    return tuple(getattr(value, "shape", ()))
