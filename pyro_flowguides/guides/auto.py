r"""Autoguides whose posterior is a normalizing flow; each can stand where Pyro's ``AutoNormal`` stands.

All latent sites of the model are mapped to the real line, flattened into one vector x, and approximated by

.. math:: x = w(a(f(z))), \qquad z \sim N(0, I)

(or z from Student-t distributions) with a flow f, a trainable affine map a (both start as the identity) and a fixed affine map
w that puts the start where ``init_loc_fn`` and ``init_scale`` say, or where :meth:`AutoFlow.whiten` finds the posterior's
Gaussian.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.nn.module import to_pyro_module_
from torch import Tensor
from torch.distributions import biject_to, register_kl

from .. import bases, flows
from .. import transforms as T
from ..distributions import NormalizingFlow
from ..model import plates
from ..model.sites import (
    PLATE_NAME,
    log_prob_per_draw,
    max_plate_nesting,
    per_draw,
    quiet_trace,
    unchanged_random_state,
)
from . import damping, whitening
from .base import StoredGuide

BASES: dict[str, Callable[[int], bases.Base]] = {
    "normal": bases.StandardNormal,
    # Unit variance, so that init_scale and the whitening map mean the same whatever the tails.
    "student_t": functools.partial(bases.StudentT, unit_variance=True),
}
# Above this size the fixed map is diagonal: a full one costs D² numbers and D³ operations to find.
MAX_FULL_RANK_DIM = 200
NUM_QUANTILE_PAIRS = 5000
# A model with another number among its arguments at every step is run twice no more often than this.
MAX_SIGNATURES = 64
# For the covariance as a whole, and for its diagonal above MAX_FULL_RANK_DIM.
WHITENING_METHODS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "auto": whitening.best_gaussian,
    "batch_and_match": whitening.batch_and_match,
    "path": whitening.quasi_newton_path,
    "laplace": whitening.laplace,
}
DIAGONAL_WHITENING_METHODS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "auto": whitening.best_diagonal_gaussian,
    "batch_and_match": whitening.diagonal_batch_and_match,
}
_WAYS_OUT = (
    "Ways out: create_plates, which makes the plate for the guide as for the model; AutoGuideList of AutoFlow for the global "
    "latents and AutoNormal for the local ones; AmortizedFlow(model, encoder), whose parameters do not depend on the size of "
    "the plate"
)


class AutoFlow(StoredGuide, AutoContinuous):
    r"""A guide that approximates the joint posterior of all latents by a normalizing flow.

    It trains with Pyro's ``SVI`` and any of its ELBOs, or with :func:`pyro_flowguides.fit`. A draw costs one forward pass of
    the flow, with its density; nothing is inverted in training.

    Latents inside a plate that takes minibatches are parts of the flow for all elements of the plate, so that a step costs
    O(size of the plate); the minibatch selects among them.

    Arguments:
        model: A Pyro model whose latents are continuous and whose structure does not change.
        flow: The name of a recipe of :mod:`pyro_flowguides.flows` (``"coupling"``, ``"glow"``, ``"iaf"``, ``"maf"``,
            ``"nice"``, ``"planar"``, ``"radial"``, ``"residual"``, ``"spline_autoregressive"``, ``"spline_coupling"``,
            ``"sylvester"``), or a function ``flow(dim) -> FlowTransform``, for example a recipe with ``functools.partial``
            for its options.
        init_loc_fn: Where the guide starts, per site, as in Pyro's autoguides.
        init_scale: The standard deviation it starts with, in unconstrained space.
        base: The base distribution: ``"normal"``, or ``"student_t"`` for heavy tails whose weight is learnt, coordinate by
            coordinate, with at least 2 degrees of freedom and variance 1 (:class:`pyro_flowguides.bases.StudentT`). Its far
            draws can reach where the model's density overflows; :func:`pyro_flowguides.fit` skips such a step, plain SVI
            does not.
        affine: The trainable affine map after the flow: ``"lower_triangular"`` (any mean and covariance; D² parameters),
            ``"diagonal"``, or None.
        gradient: ``"total"``, or ``"path"`` for the path gradient (see :class:`pyro_flowguides.NormalizingFlow`), which
            :func:`pyro_flowguides.fit` uses whatever is set here.
        create_plates: As in Pyro's ``AutoNormal``: makes the plates of subsampled data.

    Raises:
        ValueError: if an argument is unknown; at set-up, if a latent site is discrete or has no map to the real line, if the
            latents differ in dtype or device, or if it is not known which elements of a plate a latent is for; at a call, if
            a latent site or its plate is not what it was at set-up.
        RuntimeError: at set-up, if the model has no latent site (and ``create_plates`` no plates to make either).
        NotImplementedError: at set-up, for a sequential plate.

    References:
        Rezende & Mohamed (2015), *Variational inference with normalizing flows*, arXiv:1505.05770.
        Agrawal & Domke (2024), *Disentangling impact of capacity, objective, batchsize, estimators, and step-size on flow
        VI*, arXiv:2412.08824.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> guide = AutoFlow(model).setup(torch.tensor([0.3, 0.1, 0.8]))
        >>> guide.latent_dim
        1
    """

    flow: T.Compose
    base: bases.Base
    prototype_trace: Any

    def __init__(
        self,
        model: Callable,
        flow: str | Callable[[int], T.FlowTransform] = "coupling",
        *,
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
        base: str = "normal",
        affine: str | None = "lower_triangular",
        gradient: str = "total",
        create_plates: Callable | None = None,
    ) -> None:
        name = type(self).__name__
        if isinstance(flow, str) and flow not in flows.RECIPES:
            raise ValueError(f"{name}: unknown flow {flow!r}; known recipes are {', '.join(sorted(flows.RECIPES))}")
        if not isinstance(init_scale, (int, float)) or not init_scale > 0:
            raise ValueError(f"{name}: init_scale must be a positive number, got {init_scale!r}")
        if base not in BASES:
            raise ValueError(f'{name}: base must be "normal" or "student_t", got {base!r}')
        if affine not in ("lower_triangular", "diagonal", None):
            raise ValueError(f'{name}: affine must be "lower_triangular", "diagonal" or None, got {affine!r}')
        if gradient not in ("total", "path"):
            raise ValueError(f'{name}: gradient must be "total" or "path", got {gradient!r}')
        super().__init__(model, init_loc_fn=functools.partial(_init_or_feasible, init_loc_fn))
        self.create_plates = create_plates
        self.gradient = gradient
        self._recipe = flows.RECIPES[flow] if isinstance(flow, str) else flow
        self._base = base
        self._init_scale = float(init_scale)
        self._affine = affine
        # Where the guide is part of another module, that one's method is called and not this one's.
        self.register_load_state_dict_post_hook(_follow_loaded)

    # --- set-up --------------------------------------------------------------------------------------------------------

    def setup(self, *args: Any, **kwargs: Any) -> AutoFlow:
        """Builds the guide for these arguments of the model, unless it is built; returns the guide.

        Afterwards ``parameters()``, ``state_dict()``, ``load_state_dict()`` and ``to()`` work; a guide that is not set up is
        built by its first call.
        """
        if self.prototype_trace is None:
            if self.master is not None and self.master().prototype_trace is None:
                raise ValueError(
                    f"{type(self).__name__}: this guide is part of an AutoGuideList, whose plates it uses; call the list once "
                    "instead, which sets up all of its parts"
                )
            with self._pyro_context:
                self._setup_prototype(*args, **kwargs)
        if self.master is None:
            # A part of an AutoGuideList gets its plates from there.
            with poutine.block():
                self._create_plates(*args, **kwargs)
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            with torch.no_grad():
                # Not that of AutoContinuous, to which a minibatch is the whole plate.
                super(AutoContinuous, self)._setup_prototype(*args, **kwargs)
                self._lay_out_latents()
            # While torch.jit records, sizes are tensors.
            key = None if torch._C._get_tracing_state() else plates.signature(args, kwargs)
            self._known_frames = {key: self._prototype_frames}
            if not self.latent_dim:
                if self.create_plates is None:
                    raise RuntimeError(
                        f"{type(self).__name__} found no latent variables; use an empty guide instead, or give create_plates "
                        "for a guide that makes the plates alone"
                    )
                return
            self._check_latents()
            self._check_given_indices(args, kwargs)
            init_loc = self._init_loc()
            flow = self._build_flow(init_loc)
            damping.hold_back(flow, True)
            self.register_buffer("held_back", torch.ones_like(init_loc[0]))
            base = BASES[self._base](self.latent_dim).to(dtype=init_loc.dtype, device=init_loc.device)
            self._checksum_at_start = _checksum(flow, base)
            # Converted before it is attached: the other order leaves every parameter in the store under a second name.
            to_pyro_module_(flow)
            to_pyro_module_(base)
            self.flow = flow
            self.base = base
            self._attach_to_param_store()
        except BaseException:
            # A half-built guide would take its next call for granted.
            self.prototype_trace = None
            raise

    def _lay_out_latents(self) -> None:
        """The flat latent holds the sites one after the other, each over the whole of its plates."""
        self._unconstrained_shapes = {}
        self._unconstrained_event_dims = {}
        self._cond_indep_stacks = {}
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            self._check_sizes_are_known(site)
            with helpful_support_errors(site):
                plates.cover_whole_plates(site)
                shape = biject_to(site["fn"].support).inv(site["value"]).shape
            self._unconstrained_shapes[name] = shape
            self._unconstrained_event_dims[name] = site["fn"].event_dim + len(shape) - site["value"].dim()
            self._cond_indep_stacks[name] = site["cond_indep_stack"]
        self.latent_dim = sum(shape.numel() for shape in self._unconstrained_shapes.values())

    def _check_sizes_are_known(self, site: Any) -> None:
        for frame in site["cond_indep_stack"]:
            if frame.size < 0:
                raise ValueError(
                    f"{type(self).__name__}: latent site '{site['name']}' is inside plate '{frame.name}', whose size is not "
                    f"known; give it: pyro.plate('{frame.name}', size). {_WAYS_OUT}"
                )

    def _check_latents(self) -> None:
        first: Any = None
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            value = site["value"]
            first = first or site
            if (value.dtype, value.device) != (first["value"].dtype, first["value"].device):
                raise ValueError(
                    f"{type(self).__name__}: its latents form one vector, but site '{first['name']}' is "
                    f"{first['value'].dtype} on {first['value'].device} and site '{name}' is {value.dtype} on "
                    f"{value.device}; make the parameters of the two priors alike, or use one guide for each in an "
                    "AutoGuideList"
                )
            if not bool(biject_to(site["fn"].support).inv(value).isfinite().all()):
                raise ValueError(
                    f"{type(self).__name__}: init_loc_fn gives site '{name}' a value that is not finite in unconstrained "
                    "space; choose another init_loc_fn, for example init_to_feasible"
                )

    def _check_given_indices(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Latents at indices that the model is given: the guide must be given the same, or it would train others."""
        local = self._local_plates()
        if not local:
            return
        given = {
            name
            for name, site in plates.trace_plates(self.model, args, kwargs).items()
            if name in local and plates.has_given_indices(site)
        }
        owner = self if self.master is None else self.master()
        with poutine.block():
            made = owner.create_plates(*args, **kwargs) if owner.create_plates is not None else ()
        given -= {plate.name for plate in ([made] if isinstance(made, pyro.plate) else made)}
        if given:
            name = sorted(given)[0]
            raise ValueError(
                f"{type(self).__name__}: latent site '{local[name]}' is inside plate '{name}', which gets its indices "
                "(subsample=) in the model, so that the guide does not know which elements they are. "
                f"{_WAYS_OUT}"
            )

    def _local_plates(self) -> dict[str, str]:
        """The subsampled plates with latents inside, each with the name of one of them."""
        return {
            frame.name: name
            for name, frames in self._cond_indep_stacks.items()
            for frame in frames
            if plates.is_subsampled(frame)
        }

    # --- other arguments than those of the set-up ------------------------------------------------------------------------

    def _follow_arguments(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Takes over the minibatch sizes of these arguments, and finds out whether the model is still the same.

        The model is run for it when arguments of this shape come for the first time.
        """
        if torch._C._get_tracing_state():
            return
        key = plates.signature(args, kwargs)
        if key not in self._known_frames:
            if len(self._known_frames) >= MAX_SIGNATURES:
                return
            try:
                # A guide that has seen such arguments and one that has not must draw the same.
                with quiet_trace(), unchanged_random_state():
                    model = poutine.block(self.model, self._prototype_hide_fn)
                    trace = poutine.trace(model).get_trace(*args, **kwargs)
            except Exception:
                # A model may need the handlers that it is run with, to forecast for example; what is wrong otherwise, its own
                # run will show.
                self._known_frames[key] = self._prototype_frames
            else:
                self._known_frames[key] = self._check_same_latents(trace)
        self._prototype_frames = self._known_frames[key]

    def _check_same_latents(self, trace: poutine.Trace) -> dict[str, Any]:
        """Raises ValueError unless the latents are those of the set-up; returns their plates by name."""
        name_of_guide = type(self).__name__
        frames = {}
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            if name not in trace.nodes:
                raise ValueError(
                    f"{name_of_guide}: latent site '{name}' was in the model at set-up and is not with these arguments; a "
                    "flow needs the same latents at every call. Sample it always and use it when it is needed, or use a "
                    "guide for each of the two forms of the model"
                )
            now: Any = trace.nodes[name]
            for before, frame in zip(site["cond_indep_stack"], now["cond_indep_stack"], strict=False):
                size, size_before = plates.full_size(frame), plates.full_size(before)
                if (before.name, size_before) != (frame.name, size):
                    raise ValueError(
                        f"{name_of_guide}: latent site '{name}' is inside plate '{frame.name}' of size {size}, which at "
                        f"set-up was plate '{before.name}' of size {size_before}. If these are minibatches, "
                        f"give the plate its full size and subsample_size. {_WAYS_OUT}"
                    )
                frames[frame.name] = frame
            with torch.no_grad():
                plates.cover_whole_plates(now)
            if now["value"].shape != site["value"].shape:
                raise ValueError(
                    f"{name_of_guide}: latent site '{name}' has shape {tuple(now['value'].shape)} with these arguments, and "
                    f"had {tuple(site['value'].shape)} at set-up; make a new guide for a model of another size"
                )
        return frames

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, pyro.plate]:
        made: dict[str, pyro.plate] = super()._create_plates(*args, **kwargs)
        for name, frames in self._cond_indep_stacks.items():
            for frame in frames:
                if made[frame.name].size != plates.full_size(frame):
                    raise ValueError(
                        f"{type(self).__name__}: create_plates makes plate '{frame.name}' with size "
                        f"{made[frame.name].size}, but latent site '{name}' was set up inside one of size "
                        f"{plates.full_size(frame)}; give both the full size, and the guide's a subsample or subsample_size"
                    )
        return made

    def _build_flow(self, init_loc: Tensor) -> T.Compose:
        dim = self.latent_dim
        body = self._recipe(dim)
        if not isinstance(body, T.FlowTransform) or body.dim != dim or body.context_dim:
            raise ValueError(
                f"{type(self).__name__}: flow({dim}) must return a FlowTransform with dim = {dim} and no context, got {body!r}"
            )
        parts = [body]
        if self._affine == "lower_triangular":
            parts.append(T.LowerTriangularAffine(dim))
        elif self._affine == "diagonal":
            parts.append(T.Affine(dim))
        scale = torch.full_like(init_loc, self._init_scale)
        parts.append(T.FixedAffine(init_loc, scale if dim > MAX_FULL_RANK_DIM else scale.diag()))
        return T.Compose(parts).to(dtype=init_loc.dtype, device=init_loc.device)

    @property
    def _whitening(self) -> T.FixedAffine:
        whitening_map = self.flow.transforms[-1]
        assert isinstance(whitening_map, T.FixedAffine)
        return whitening_map

    # --- the parameter store -------------------------------------------------------------------------------------------

    def _attach_to_param_store(self) -> None:
        """As other guides do it, and with the buffers of the fixed map.

        Parameters that another guide adopts, or that come from a file, mean nothing without the map they were trained behind.
        """
        super()._attach_to_param_store()
        if not pyro.settings.get("module_local_params"):
            self._adopt_whitening()
        self._follow_held_back()

    def _adopt_whitening(self) -> None:
        """Takes the fixed map, and what goes with it, from the store; where there is none, gives it this one."""
        store = pyro.get_param_store()
        for name, buffer in self._stored_buffers().items():
            full_name = self._pyro_get_fullname(name)
            if full_name in store:
                with torch.no_grad():
                    buffer.copy_(store[full_name])
            else:
                store[full_name] = buffer.clone()

    # --- the posterior -------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples every latent site.

        Latents inside a subsampled plate are drawn for the whole plate and returned at its current indices. log q counts
        once, whereas the plate scales the model's terms, and the Jacobians with them, from the minibatch to the whole: the
        ELBO is estimated without bias.

        Arguments:
            args: Those of the model.
            kwargs: Those of the model.

        Returns:
            A dict of site name to value.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._follow_param_store()
        self._follow_arguments(args, kwargs)
        if not self.latent_dim:
            self._create_plates(*args, **kwargs)
            return {}
        latent = self.sample_latent(*args, **kwargs)
        made = self._create_plates(*args, **kwargs)
        indices = plates.plate_indices(made)
        result = {}
        for site, unconstrained in self._unpack_latent(latent):
            name, fn, frames = site["name"], site["fn"], self._cond_indep_stacks[site["name"]]
            unconstrained = plates.select(unconstrained, frames, indices, self._unconstrained_event_dims[name])
            transform = biject_to(fn.support)
            value = transform(unconstrained)
            log_density: Tensor | float = 0.0
            if poutine.get_mask() is not False:
                log_jacobian = transform.log_abs_det_jacobian(unconstrained, value)
                log_density = -sum_rightmost(log_jacobian, log_jacobian.dim() - value.dim() + fn.event_dim)
            with ExitStack() as stack:
                for frame in frames:
                    stack.enter_context(made[frame.name])
                result[name] = pyro.sample(name, _LatentDelta(value, log_density, fn.event_dim))
        return result

    def get_base_dist(self) -> dist.TorchDistribution:
        """The distribution that the flow transforms, with its parameters as they are now."""
        return self.base()

    def get_transform(self, *args: Any, **kwargs: Any) -> T.FlowTransform:
        """The map from the base distribution to unconstrained latent space: flow, affine map, fixed map.

        ``NeuTraReparam`` takes it from here, as a change of variables that must be exact.

        Raises:
            ValueError: if its log-determinant is a random estimate. ``guide.flow`` is the same map.
        """
        if self.flow.stochastic_log_det:
            raise ValueError(
                f"{type(self).__name__}: the log-determinant of its flow is a random estimate, with which an MCMC sampler "
                "on the transformed space (NeuTra) would draw from a wrong distribution; build the flow with "
                "log_det='exact'"
            )
        return self.flow

    def get_posterior(self, *args: Any, **kwargs: Any) -> NormalizingFlow:
        """The approximate posterior of the flat unconstrained latent, a fresh distribution at every call."""
        return NormalizingFlow(self.get_base_dist(), self.flow, gradient=self.gradient)

    def _latent_draws(self) -> Tensor:
        """x at fixed antithetic base points that include 0, so that medians and quantiles never jitter."""
        return self.flow(self.base.fixed_draws(NUM_QUANTILE_PAIRS))

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As that of every module; the guide must be set up, otherwise it has nothing to load into."""
        if state_dict:
            self._check_set_up()
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _check_set_up(self) -> None:
        if self.prototype_trace is None:
            raise RuntimeError(
                f"{type(self).__name__} is not set up, and has no flow yet: call guide.setup(*args) with the arguments of the "
                "model first"
            )

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The marginal medians and standard deviations in unconstrained space."""
        self._check_set_up()
        if not self.latent_dim:
            return torch.zeros(0), torch.zeros(0)
        with torch.no_grad():
            draws = self._latent_draws()
            return draws.median(0).values, draws.std(0)

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The marginal quantiles of every latent site, from 10,001 fixed draws.

        :meth:`median` is taken in unconstrained space instead, as in Pyro, so that it lies in the site's support: the
        coordinate-wise medians of a simplex need not add up to 1.

        Arguments:
            quantiles: Numbers between 0 and 1.
            args: Not used; for compatibility.
            kwargs: Not used; for compatibility.

        Returns:
            A dict of site name to a tensor of shape ``(len(quantiles),) + site shape``.

        Raises:
            RuntimeError: if the guide is not set up.
        """
        self._check_set_up()
        if not self.latent_dim:
            return {}
        draws = self._latent_draws()
        num_draws = len(draws)
        position = torch.as_tensor(quantiles, dtype=draws.dtype, device=draws.device).reshape(-1) * (num_draws - 1)
        below = position.floor().long().clamp(0, num_draws - 2)
        batch_shape = (num_draws, *[1] * max_plate_nesting(self.prototype_trace))
        result = {}
        for site, unconstrained in self._unpack_latent(draws.reshape(*batch_shape, self.latent_dim)):
            # In the site's own space: a map such as that of a simplex is not increasing coordinate by coordinate.
            value = biject_to(site["fn"].support)(unconstrained)
            value = per_draw(value, site["value"].shape, num_draws).sort(0).values
            weight = (position - below).reshape(-1, *[1] * (value.dim() - 1))
            result[site["name"]] = torch.lerp(value[below], value[below + 1], weight)
        return result

    # --- whitening -----------------------------------------------------------------------------------------------------

    def whiten(
        self, *args: Any, method: str = "auto", model_kwargs: Mapping[str, Any] | None = None, vectorize: bool = True
    ) -> AutoFlow:
        """Puts the fixed affine map where the posterior is, before training.

        Arguments:
            args: The positional arguments of the model.
            method: ``"batch_and_match"`` for the Gaussian that :func:`pyro_flowguides.whitening.batch_and_match` finds from
                ``init_loc_fn`` and ``init_scale``; ``"path"`` for the best on a quasi-Newton path from there; ``"laplace"``
                for that of the mode and the Hessian there; ``"init"`` to leave the map as it starts; ``"auto"`` for the one
                of start, path, and batch and match from either with the highest ELBO. Above 200 latent dimensions the map is
                diagonal, and ``"auto"`` chooses among the start and diagonal batch and match from the start and from the mode.
            model_kwargs: The keyword arguments of the model.
            vectorize: Whether the model can be run on many latents at once.

        Returns:
            The guide.

        Raises:
            ValueError: if the method is unknown, or not for so many dimensions; if the flow has been trained: the map is part
                of what was trained; if latents are local to a minibatch that is an argument of the model.

        Where data are subsampled, one minibatch is drawn and kept, so that log p is a function; where latents are local to the
        minibatch, minibatches that cover the plate take its place, at a run of the model for each.
        """
        if method not in ("init", *WHITENING_METHODS):
            raise ValueError(f"whiten: method must be one of {', '.join(['init', *WHITENING_METHODS])}, got {method!r}")
        self.setup(*args, **(model_kwargs or {}))
        if self.is_trained():
            raise ValueError(
                f"whiten: this {type(self).__name__} has been trained, and its fixed map is part of what it learnt; make a "
                "new guide (after pyro.clear_param_store()) to whiten it"
            )
        if method == "init":
            return self
        methods = WHITENING_METHODS if self.latent_dim <= MAX_FULL_RANK_DIM else DIAGONAL_WHITENING_METHODS
        if method not in methods:
            raise ValueError(
                f'whiten: "{method}" is for at most {MAX_FULL_RANK_DIM} latent dimensions, here are {self.latent_dim}; '
                f"use one of {', '.join(methods)}"
            )
        log_density = self._log_density(args, dict(model_kwargs or {}), vectorize)
        start = self._whitening.loc.double(), self._whitening.scale.double()
        loc, scale = methods[method](log_density, *start)
        with torch.no_grad():
            self._whitening.loc.copy_(loc)
            self._whitening.scale.copy_(scale)
        self.let_go()
        return self

    def let_go(self) -> None:
        """Ends what keeps couplings from exploding in plain training from a start that is too narrow.

        Before whitening their networks see no further than three standard deviations of the base distribution, and take steps
        an eighth as large as those of other parameters. :meth:`whiten` and ``fit`` end that. Nothing changes in a guide that
        has been trained.
        """
        self._check_set_up()
        if self.latent_dim and not self.is_trained():
            damping.hold_back(self.flow, False)
            with torch.no_grad():
                self.held_back.zero_()
            self._checksum_at_start = _checksum(self.flow, self.base)
            self.share_whitening()

    def _follow_held_back(self) -> None:
        damping.follow(self.flow, torch.equal(self.held_back, torch.ones_like(self.held_back)))

    def _stored_buffers(self) -> dict[str, Tensor]:
        """What Pyro's parameter store must hold for the parameters to mean the same elsewhere."""
        buffers = {f"whitening.{name}": buffer for name, buffer in self._whitening.named_buffers()}
        return {**buffers, "whitening.held_back": self.held_back}

    def share_whitening(self) -> None:
        """Tells Pyro's parameter store of the fixed map, after it was replaced."""
        if not pyro.settings.get("module_local_params"):
            with self._pyro_context:
                for name, buffer in self._stored_buffers().items():
                    pyro.get_param_store()[self._pyro_get_fullname(name)] = buffer.clone()

    def is_trained(self) -> bool:
        """Whether any parameter has moved, or was loaded, since the flow was built."""
        return not math.isclose(_checksum(self.flow, self.base), self._checksum_at_start, rel_tol=1e-12)

    def _log_density(self, args: tuple, model_kwargs: dict[str, Any], vectorize: bool) -> whitening.LogDensity:
        """log p of flat unconstrained latents, in float64 whatever the dtype of the model."""
        with quiet_trace():
            # Not that of the prototype, which leaves out the observed sites and their plates.
            trace = poutine.trace(self.model).get_trace(*args, **model_kwargs)
        nesting = max_plate_nesting(trace)
        index_sets = self._fixed_minibatches(trace)
        dtype = self._whitening.loc.dtype

        def of_batch(latent: Tensor) -> Tensor:
            num_points = len(latent)
            latent = latent.reshape(num_points, *[1] * nesting, self.latent_dim) if vectorize else latent.squeeze(0)
            values, log_det = {}, torch.zeros(num_points, dtype=dtype, device=latent.device)
            for site, unconstrained in self._unpack_latent(latent):
                transform = biject_to(site["fn"].support)
                values[site["name"]] = transform(unconstrained)
                log_jacobian = transform.log_abs_det_jacobian(unconstrained, values[site["name"]])
                log_det = log_det + log_jacobian.reshape(num_points, -1).sum(-1)
            log_p = [log_prob_at(values, indices, num_points) for indices in index_sets]
            return log_det + sum(log_p) / len(log_p)

        def log_prob_at(values: dict[str, Tensor], indices: dict[str, Tensor], num_points: int) -> Tensor:
            nodes = self.prototype_trace.nodes
            selected = {
                name: plates.select(value, self._cond_indep_stacks[name], indices, nodes[name]["fn"].event_dim)
                for name, value in values.items()
            }
            model = poutine.condition(self.model, data={**selected, **indices})
            plate = pyro.plate(PLATE_NAME, num_points, dim=-1 - nesting) if vectorize else nullcontext()
            with poutine.block(), plate:
                trace = poutine.trace(model).get_trace(*args, **model_kwargs)
            return log_prob_per_draw(trace, num_points)

        def log_density(points: Tensor) -> Tensor:
            rows = points.to(dtype)
            with pyro.validation_enabled(False):
                return torch.cat([of_batch(batch) for batch in ([rows] if vectorize else rows.split(1))]).double()

        return log_density

    def _fixed_minibatches(self, trace: poutine.Trace) -> list[dict[str, Tensor]]:
        sites, local = plates.subsample_sites(trace), self._local_plates()
        for name, latent in local.items():
            if name in sites and plates.has_given_indices(sites[name]):
                raise ValueError(
                    f"whiten: latent site '{latent}' is inside plate '{name}', of which these arguments of the model hold one "
                    f"minibatch, which tells nothing of the others; call whiten with arguments for the whole plate, or leave "
                    'the map as it is: method="init" (fit: whiten=None)'
                )
        return plates.minibatches(sites, whole=local)


class _LatentDelta(dist.Delta):
    """The Delta of a latent site, whose log-density is the Jacobian of the site's map from unconstrained space.

    Pyro's divergence of a Delta leaves that density out, so that ``TraceMeanField_ELBO`` is wrong by the Jacobian for every
    constrained site of its own autoguides; with the divergence registered below it is right.
    """

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return super().rsample(sample_shape) if sample_shape else self.v

    def log_prob(self, x: Tensor) -> Tensor:
        # Every ELBO asks for the point itself, which need not be compared with itself.
        return self.log_density if x is self.v else super().log_prob(x)


@register_kl(_LatentDelta, dist.Distribution)  # type: ignore[untyped-decorator]
def _kl_latent_delta(p: _LatentDelta, q: dist.Distribution) -> Tensor:
    return p.log_density - q.log_prob(p.v)


def _follow_loaded(guide: AutoFlow, keys: Any) -> None:
    """After a state dict was loaded, whose parameters belong to the fixed map in it."""
    if guide.prototype_trace is not None and guide.latent_dim:
        guide._follow_held_back()


def _init_or_feasible(init_loc_fn: Callable, site: Any) -> Tensor:
    """What ``init_loc_fn`` says; for a flat prior, which nothing can be drawn from, 0 in unconstrained space."""
    try:
        return init_loc_fn(site)
    except NotImplementedError:
        fn = site["fn"]
        to_support = biject_to(fn.support)
        return to_support(torch.zeros(to_support.inverse_shape(fn.shape())))


def _checksum(*modules: torch.nn.Module) -> float:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return float(sum(parameter.detach().double().abs().sum() for parameter in parameters))
