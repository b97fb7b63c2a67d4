r"""A guide for the latents of single data: an encoder reads the data, and the parameters of a flow depend on its output.

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

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn

from .. import transforms as T
from ..checks import warn
from ..distributions import NormalizingFlow
from ..model.call import ModelCall
from ..model.latents import Latents
from ..model.sites import latent_sites, quiet_trace
from .base import FlowGuide

NUM_QUANTILE_PAIRS = 500


class AmortizedFlow(FlowGuide):
    r"""A guide :math:`\prod_n q(x_n \mid c_n)` for the latents inside a data plate, amortised by an encoder.

    Usage::

        guide = AmortizedFlow(model, encoder)
        fit = pyro_flowguides.fit(model, guide, data)
        guide.quantiles([0.05, 0.5, 0.95], new_data)

    Model and guide are called with the same arguments, and so is the encoder. The number of data may differ from call to
    call. In a subsampled plate each factor of the guide is scaled like the model's terms, so that the ELBO of a minibatch is
    an unbiased estimate of the ELBO of all data, at the cost of the minibatch. A draw costs one pass of the encoder and one
    forward pass of the flow; nothing is inverted in training.

    The flow has a vector for every element of those plates that all of the sites share; what a site has in further plates and
    in event dimensions is part of that vector, so that its size must not change.

    Arguments:
        model: A Pyro model whose local latents are continuous.
        encoder: A function ``encoder(*args, **kwargs)`` of the model's arguments, most often a ``torch.nn.Module`` (which
            becomes a Pyro module in place; a function registers its parameters itself, by ``pyro.module``). It returns a
            context of shape ``plate_shape + (context_dim,)``, where ``plate_shape`` ends with the dimension −1 of the plates:
            ``(N, context_dim)`` for a plate at dimension −1, ``(N, 1, context_dim)`` for one at −2. It has a row
            for every element of the minibatch or, in a subsampled plate, for all data, from which the plate's indices select. It
            is called within the plates, so that ``pyro.subsample`` there avoids the work.
        flow: The name of a recipe of :mod:`pyro_flowguides.flows`; a function ``flow(dim, context_dim=...) -> FlowTransform``,
            for example a recipe with ``functools.partial`` for its options; or None for a diagonal normal.
        damped: Whether couplings are damped, as in :class:`pyro_flowguides.AutoFlow`. By default they are not: damping guards
            against a start that is far too narrow, and this guide is never whitened but starts as wide as ``init_scale`` says.
        sites: The names of the latents of this guide; by default all of the model, which then must be inside a plate.
        init_loc_fn: Where the guide starts, per site, as in Pyro's autoguides; its values are averaged over the data.
        init_scale: The initial standard deviation, in unconstrained space; a good choice is the spread of the latents across
            the data.
        base: The base distribution, as in :class:`pyro_flowguides.AutoFlow`: ``"normal"``, or ``"student_t"`` for heavy tails
            whose weight is learnt, coordinate by coordinate, with variance 1. Its degrees of freedom are the same for all
            data; they do not come from the encoder.
        gradient: ``"total"``, or ``"path"`` for the path gradient (see :class:`pyro_flowguides.NormalizingFlow`).
        create_plates: As in Pyro's ``AutoNormal``: a function of the model's arguments that makes the plates. Without it the
            model is run once more, to see its plates, whenever the shapes of tensors or the integers among the arguments are
            new.

    Raises:
        ValueError: if an argument is unknown; at set-up, if a discrete latent cannot be summed out, if a latent is
            outside every plate or of a bound that differs from datum to datum (it must be the same in all calls, too), if the
            sites share no plate, or if the flow does not fit; in every call, if the shape of the context does not fit the
            plates.
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

    def __init__(
        self,
        model: Callable,
        encoder: Callable[..., Tensor],
        flow: str | Callable[..., T.FlowTransform] | None = "coupling",
        *,
        damped: bool = False,
        sites: Sequence[str] | None = None,
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 1.0,
        base: str = "normal",
        gradient: str = "total",
        create_plates: Callable | None = None,
    ) -> None:
        if not callable(encoder):
            raise TypeError(f"AmortizedFlow: encoder must be a function of the model's arguments, got {encoder!r}")
        if isinstance(sites, str):
            raise TypeError(f"AmortizedFlow: sites must be a list of names, got the string {sites!r}")
        super().__init__(
            InitMessenger(init_loc_fn)(model),
            flow,
            init_scale=init_scale,
            base=base,
            gradient=gradient,
            damped=damped,
            create_plates=create_plates,
        )
        if isinstance(encoder, nn.Module):
            # Before it is attached: the other order leaves every parameter in the store under a second name.
            to_pyro_module_(encoder)
        self.encoder = encoder
        self.sites = None if sites is None else tuple(sites)

    # --- set-up --------------------------------------------------------------------------------------------------------

    @property
    def context_dim(self) -> int:
        """The size of the context that the encoder returns."""
        return self.flow.context_dim

    def _prototype_hide_fn(self, message: Any) -> bool:
        others = self.sites is not None and message["name"] not in self.sites
        return others or super()._prototype_hide_fn(message)

    def _build(self, args: tuple, kwargs: dict[str, Any]) -> Latents:
        self._check_names(args, kwargs)
        latents = Latents.of_one_datum(self.prototype_trace, "AmortizedFlow")
        if self._latents is None:
            self._build_flow(latents, self._first_context(latents, args, kwargs))
        elif latents != self._latents:
            raise ValueError(
                f"AmortizedFlow: the latents of one datum are {latents.describe()} in this call, but "
                f"{self._latents.describe()} in the call that built the guide; their shapes must not change"
            )
        return self._latents or latents

    def _update_plates(self, args: tuple, kwargs: dict[str, Any]) -> None:
        # Otherwise create_plates or the AutoGuideList makes the plates.
        if self._latents is None or (self.master is None and self.create_plates is None):
            super()._update_plates(args, kwargs)

    def _find_frames(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self.model is None:
            raise RuntimeError(
                "AmortizedFlow: this guide comes from a file, without its model, and cannot see the plates for arguments of "
                "sizes that are new. get_posterior, median and quantiles work; to draw or train, make the guide anew with "
                "its model and load the state_dict"
            )
        self._setup_prototype(*args, **kwargs)
        return self._prototype_frames

    def _check_names(self, args: tuple, kwargs: dict[str, Any]) -> None:
        missing = [name for name in self.sites or () if name not in self.prototype_trace.nodes]
        if missing:
            with quiet_trace():
                known = [name for name, _ in latent_sites(poutine.trace(self.model).get_trace(*args, **kwargs))]
            raise ValueError(f"AmortizedFlow: sites {missing} are no latents of the model, which has {known}")
        if not any(True for _ in latent_sites(self.prototype_trace)):
            raise RuntimeError("AmortizedFlow found no latent variables; use an empty guide instead")

    def _first_context(self, latents: Latents, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The context that the guide is built for; warns of parameters of the encoder that would never train."""
        with torch.enable_grad(), poutine.block(), poutine.trace(param_only=True) as capture:
            context = self._encode(latents, args, kwargs)
        if context.requires_grad and not isinstance(self.encoder, nn.Module) and not capture.trace.nodes:
            warn(
                "AmortizedFlow: the context depends on something with a gradient, but Pyro knows no parameter of the encoder, "
                "so that it would not be trained; pass the torch.nn.Module itself, or call pyro.module in the function"
            )
        return context.detach()

    def _build_flow(self, latents: Latents, context: Tensor) -> None:
        dim, context_dim, loc = latents.dim, context.shape[-1], latents.init_loc
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
            parts.append(self._make_body(dim, context_dim))
        self._attach([*parts, last], loc)

    # --- the context ---------------------------------------------------------------------------------------------------

    def _encode(self, latents: Latents, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The encoder's output, with its number of dimensions and its size checked."""
        context = self.encoder(*args, **kwargs)
        if not isinstance(context, Tensor) or not context.is_floating_point():
            what = f"a tensor of {context.dtype}" if isinstance(context, Tensor) else f"a {type(context).__name__}"
            raise TypeError(
                f"AmortizedFlow: the encoder must return one floating-point tensor, the context, got {what}; several parts "
                "go together by torch.cat([...], -1)"
            )
        shape = tuple(context.shape)
        if len(shape) != latents.data_nesting + 1 or 0 in shape:
            raise ValueError(
                f"AmortizedFlow: the encoder must return a context of shape {_context_shape(latents)}, got shape {shape}"
            )
        if self._latents is not None and shape[-1] != self.context_dim:
            raise ValueError(
                f"AmortizedFlow: the encoder must return a context whose last dimension is {self.context_dim}, as it was when "
                f"the guide was built, got shape {shape}"
            )
        return context

    def _select(self, context: Tensor, plates: Mapping[str, Any]) -> Tensor:
        """The rows of the context that belong to the current elements of the plates."""
        data_plates = self.latents.data_plates
        shape = tuple(context.shape)
        for dim in range(-self.latents.data_nesting, 0):
            plate: Any = plates[data_plates[dim]] if dim in data_plates else None
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
            A distribution over vectors of size ``latent_dim``, in unconstrained space. Its batch shape is the one of the
            context, with 1 for each further plate to the left.
        """
        if self._latents is None:
            self.setup(*args, **kwargs)
        call = ModelCall.given("AmortizedFlow", self.model, args, kwargs)
        return self._posterior(self._encode(self.latents, call.args, dict(call.kwargs)))

    def _posterior(self, context: Tensor) -> NormalizingFlow:
        missing = self.latents.nesting + 1 - context.dim()
        context = context.reshape(*[1] * missing, *context.shape)
        return NormalizingFlow(self.base(), self.flow, gradient=self.gradient_now).condition(context)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples every local site in its plates, with the same arguments as the model; returns the values by name."""
        self._update_plates(args, kwargs)
        self._follow_param_store()
        latents = self.latents
        plates = self._create_plates(*args, **kwargs)
        with ExitStack() as stack:
            for dim, name in latents.data_plates.items():
                stack.enter_context(plates[name])
                if plates[name].dim != dim:
                    raise ValueError(
                        f"AmortizedFlow: plate '{name}' is at dimension {dim} in the model, and at {plates[name].dim} by "
                        f"create_plates; make it with dim={dim}"
                    )
            context = self._select(self._encode(latents, args, kwargs), plates)
            latent = pyro.sample(f"_{self._pyro_name}_latent", self._posterior(context), infer={"is_auxiliary": True})
        # Where there are particles further left, every site keeps all dimensions of plates.
        leading = 0 if latent.dim() - 1 == latents.nesting else None
        return self._sample_sites(latents.unpack(latent, leading), plates)

    def _fixed_draws(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        posterior = self.get_posterior(*args, **kwargs)
        base_draws = self.base.fixed_draws(NUM_QUANTILE_PAIRS)
        return posterior.transform(base_draws.reshape(len(base_draws), *[1] * len(posterior.batch_shape), -1))


def _context_shape(latents: Latents) -> str:
    """The shape that a context must have, in words."""
    batch = [
        f"size of '{latents.data_plates[dim]}'" if dim in latents.data_plates else "1"
        for dim in range(-latents.data_nesting, 0)
    ]
    return f"({', '.join(batch)}, context_dim)"
