r"""Autoguides whose posterior is a normalizing flow; each can stand where Pyro's ``AutoNormal`` stands.

All latent sites of the model are mapped to the real line, flattened into one vector x, and approximated by

.. math:: x = w(a(f(z))), \qquad z \sim N(0, I)

(or z from Student-t distributions) with a flow f, a trainable affine map a (both start as the identity) and a fixed affine map
w. It puts the start where ``init_loc_fn`` and ``init_scale`` say, or where :meth:`AutoFlow.whiten` finds the posterior's
Gaussian.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor
from torch.distributions import biject_to

from .. import transforms as T
from ..distributions import NormalizingFlow
from ..model import plates, supports
from ..model.batched import BatchedModel
from ..model.call import ModelCall
from ..model.latents import WAYS_OUT, Latents, LatentSite
from ..model.sites import full_size, quiet_trace, unchanged_random_state
from ..model.target import Target
from ..transforms.fixed import Scale, standard_deviations
from . import affine_maps, gaussians, many_dimensions, whitening
from .base import FlowGuide

NUM_QUANTILE_PAIRS = 5000


class AutoFlow(FlowGuide, AutoContinuous):
    r"""A guide that approximates the joint posterior of all latents by a normalizing flow.

    Usage::

        guide = AutoFlow(model)
        fit = pyro_flowguides.fit(model, guide, data)         # or Pyro's SVI(model, guide, optim, Trace_ELBO())
        guide.quantiles([0.05, 0.5, 0.95])

    A draw costs one forward pass of the flow, with its density; nothing is inverted in training. Latents inside a plate that
    takes minibatches are parts of the flow for all elements of the plate, so that a step costs O(size of the plate); the
    minibatch selects among them.

    Arguments:
        model: A Pyro model whose structure does not change. Its discrete latents are left out, to be summed out of the model.
        flow: The name of a recipe of :mod:`pyro_flowguides.flows` (``"continuous_planar"``, ``"continuous_sylvester"``,
            ``"coupling"``, ``"ffjord"``, ``"glow"``, ``"iaf"``, ``"maf"``, ``"mixture_coupling"``, ``"nice"``, ``"planar"``,
            ``"radial"``, ``"residual"``, ``"spline_autoregressive"``, ``"spline_coupling"``, ``"sylvester"``), or a function
            ``flow(dim) -> FlowTransform``, for example a recipe with ``functools.partial`` for its options.
        damped: Whether couplings are damped until the guide is whitened or given to :func:`pyro_flowguides.fit`. A start that
            is far too narrow makes all couplings widen the guide together: outlying draws are pushed further by every layer, and
            one gradient at such a draw inflates Adam's second moment for about a thousand steps. Damped couplings see inputs up
            to three standard deviations and learn an eighth as fast. Recipes of :mod:`pyro_flowguides.flows` with couplings
            are built like that; a function of your own is taken as it is.
        init_loc_fn: Where the guide starts, per site, as in Pyro's autoguides.
        init_scale: The initial standard deviation, in unconstrained space.
        base: The base distribution: ``"normal"``, or ``"student_t"`` for heavy tails whose weight is learnt, coordinate by
            coordinate, with at least 2 degrees of freedom and variance 1 (:class:`pyro_flowguides.bases.StudentT`). Its far
            draws can reach where the model's density overflows; :func:`pyro_flowguides.fit` skips such a step, plain SVI
            does not.
        affine: The trainable affine map after the flow: ``"lower_triangular"`` (any mean and covariance; D² parameters),
            ``"low_rank"`` (a diagonal and 16 directions; O(D)), ``"diagonal"``, None, or ``"auto"`` for the first up to 1,000
            latent dimensions and the second above; with it, above 200, a spline for every latent follows the fixed map.
        gradient: ``"total"``, or ``"path"`` for the path gradient (see :class:`pyro_flowguides.NormalizingFlow`), which
            :func:`pyro_flowguides.fit` uses whatever is set here.
        create_plates: As in Pyro's ``AutoNormal``: makes the plates of subsampled data.

    Raises:
        ValueError: if an argument is unknown; at set-up, if a discrete latent cannot be summed out, if a latent has no map to the
            real line, if the latents differ in dtype or device, or if it is not known which elements of a plate a latent is
            for; at a call, if a latent site or its plate is not what it was at set-up.
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

    # A model with another number among its arguments at every step is run twice no more often than this.
    max_signatures = 64

    def __init__(
        self,
        model: Callable,
        flow: str | Callable[[int], T.FlowTransform] = "coupling",
        *,
        damped: bool = True,
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 0.1,
        base: str = "normal",
        affine: str | None = "auto",
        gradient: str = "total",
        create_plates: Callable | None = None,
    ) -> None:
        affine_maps.check(type(self).__name__, affine)
        super().__init__(
            model,
            flow,
            init_scale=init_scale,
            base=base,
            gradient=gradient,
            damped=damped,
            init_loc_fn=functools.partial(init_or_feasible, init_loc_fn),
        )
        self.create_plates = create_plates
        self._affine = affine

    # --- set-up --------------------------------------------------------------------------------------------------------

    def setup(self, *args: Any, **kwargs: Any) -> AutoFlow:
        call = ModelCall.given(type(self).__name__, self.model, args, kwargs)
        with call.explaining(type(self).__name__):
            super().setup(*call.args, **call.kwargs)
            if self.master is None:
                # NeuTraReparam needs them before the first call. A part of an AutoGuideList gets its plates from there.
                with poutine.block():
                    self._create_plates(*call.args, **call.kwargs)
        return self

    def _build(self, args: tuple, kwargs: dict[str, Any]) -> Latents:
        latents = self._lay_out(args, kwargs)
        if latents.sites:
            self._attach_flow(latents, args, kwargs)
        return latents

    def _lay_out(self, args: tuple, kwargs: dict[str, Any]) -> Latents:
        """The latents of the prototype in one vector."""
        latents = Latents.whole(self.prototype_trace, type(self).__name__)
        if not latents.sites:
            if self.create_plates is None:
                raise RuntimeError(
                    f"{type(self).__name__} found no latent variables; use an empty guide instead, or give create_plates "
                    "for a guide that makes the plates alone"
                )
            return latents
        latents = supports.mark_varying(latents, ModelCall(self.model, args, kwargs), self.prototype_trace)
        self._check_given_indices(latents, args, kwargs)
        return latents

    def _attach_flow(self, latents: Latents, args: tuple, kwargs: dict[str, Any]) -> None:
        """Makes the flow."""
        self._attach(self._make_parts(latents), latents.init_loc)

    def _make_parts(self, latents: Latents) -> list[T.FlowTransform]:
        """A flow, the trainable affine map, the fixed one, which starts where the latents do, and splines of the latents."""
        dim, loc = latents.dim, latents.init_loc
        parts = [self._make_body(dim), *affine_maps.make(self._affine, dim)]
        scale = torch.full_like(loc, self._init_scale)
        parts.append(T.FixedAffine(loc, scale if dim > whitening.MAX_FULL_RANK_DIM else scale.diag()))
        return parts + affine_maps.make_marginals(self._affine, loc, scale)

    def _check_given_indices(self, latents: Latents, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raises ValueError where the model is given the indices of a plate with latents and the guide is not."""
        local = latents.subsampled_plates
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
                f"{WAYS_OUT}"
            )

    def _find_frames(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        try:
            # A guide that has seen such arguments and one that has not must draw the same.
            with quiet_trace(), unchanged_random_state():
                model = poutine.block(self.model, self._prototype_hide_fn)
                trace = poutine.trace(model).get_trace(*args, **kwargs)
        except Exception:
            # A model may need the handlers that it is run with, to forecast for example; other errors appear in its own run.
            return self._prototype_frames
        return self.latents.frames_in(trace, type(self).__name__)

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, pyro.plate]:
        made: dict[str, pyro.plate] = super()._create_plates(*args, **kwargs)
        for site in self.latents.sites:
            for frame in site.frames:
                if made[frame.name].size != full_size(frame):
                    raise ValueError(
                        f"{type(self).__name__}: create_plates makes plate '{frame.name}' with size "
                        f"{made[frame.name].size}, but latent site '{site.name}' was set up inside one of size "
                        f"{full_size(frame)}; give both the full size, and the guide's a subsample or subsample_size"
                    )
        return made

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
        self._update_plates(args, kwargs)
        self._follow_param_store()
        if not self.latent_dim:
            self._create_plates(*args, **kwargs)
            return {}
        latent = self.sample_latent(*args, **kwargs)
        made = self._create_plates(*args, **kwargs)
        unconstrained = self._latents_at(latent, args, kwargs).unpack(latent)
        return self._sample_sites(self._at_indices(unconstrained, plates.plate_indices(made)), made)

    def _at_indices(
        self, unconstrained: Iterable[tuple[LatentSite, Tensor]], indices: Mapping[str, Tensor]
    ) -> Iterator[tuple[LatentSite, Tensor]]:
        """The unconstrained values at the current elements of the plates."""
        for site, point in unconstrained:
            yield site, plates.select(point, site.frames, indices, len(site.event_shape))

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """The sites of the prototype with their unconstrained values, as ``NeuTraReparam`` asks for them."""
        for site, point in self.latents.unpack(latent):
            yield self.prototype_trace.nodes[site.name], point

    def get_base_dist(self) -> dist.TorchDistribution:
        """The distribution that the flow transforms, with its parameters as they are now."""
        return self.base()

    def get_transform(self, *args: Any, **kwargs: Any) -> T.FlowTransform:
        """The map from the base distribution to unconstrained latent space: flow, affine map, fixed map.

        ``NeuTraReparam`` takes it from here, as a change of variables that must be exact.

        Raises:
            ValueError: if its log-determinant is a random estimate. ``guide.flow`` is the same map.
        """
        if names := [site.name for site in self.latents.sites if site.varies]:
            raise ValueError(
                f"{type(self).__name__}: the support of site '{names[0]}' depends on other latents, which NeuTra cannot follow; "
                "give the site a common support, such as Uniform(0, 1), and map its value to the element's own in the model"
            )
        if self.flow.stochastic_log_det:
            raise ValueError(
                f"{type(self).__name__}: the log-determinant of its flow is a random estimate, with which an MCMC sampler "
                "on the transformed space (NeuTra) would draw from a wrong distribution; build the flow with "
                "log_det='exact', a continuous one with trace='exact'"
            )
        return self.flow

    def get_posterior(self, *args: Any, **kwargs: Any) -> NormalizingFlow:
        """The approximate posterior of the flat unconstrained latent, a fresh distribution at every call."""
        return NormalizingFlow(self.get_base_dist(), self.flow, gradient=self.gradient_now)

    def ode_error(self, num_draws: int = 1000) -> T.OdeError:
        """What the steps of a continuous flow leave of points and log q, see :func:`pyro_flowguides.transforms.ode_error`.

        Points are those of unconstrained latent space. An error of log q biases the ELBO, and spreads the weights.

        Arguments:
            num_draws: The number of draws that it is measured at.

        Raises:
            ValueError: if the flow is not continuous.
            RuntimeError: if the guide is not set up.
        """
        _ = self.latents
        with torch.no_grad():
            return self.get_posterior().ode_error(num_draws)

    def log_prob(self, x: Tensor) -> Tensor:
        """log q at points of the flat unconstrained latent space, by the inverse of the flow.

        Arguments:
            x: Points of shape ``batch_shape + (latent_dim,)``.
        """
        with self._pyro_context:
            return self.get_posterior().log_prob(x)

    def _fixed_draws(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        latents = self.latents
        if not latents.sites:
            return torch.zeros(1, 0)
        draws = self.flow(self.base.fixed_draws(NUM_QUANTILE_PAIRS))
        return draws.reshape(len(draws), *[1] * latents.nesting, latents.dim)

    # --- whitening -----------------------------------------------------------------------------------------------------

    @property
    def fixed_map(self) -> T.FixedAffine:
        """The fixed affine map w, the last part of the flow but for splines of the latents."""
        return affine_maps.fixed_map_of(self.flow)

    def whiten(
        self,
        *args: Any,
        method: str = "auto",
        model_kwargs: Mapping[str, Any] | None = None,
        model: Callable | None = None,
        vectorize: bool | None = None,
        batched: BatchedModel | None = None,
    ) -> AutoFlow:
        """Puts the fixed affine map where the posterior is, before training, and switches damping off.

        Arguments:
            args: The positional arguments of the model.
            method: ``"batch_and_match"`` for the Gaussian that
                :func:`pyro_flowguides.guides.whitening.batch_and_match` finds from ``init_loc_fn`` and ``init_scale``;
                ``"pathfinder"`` for the best on a quasi-Newton path from there; ``"init"`` to leave map and damping as they
                start; ``"auto"`` for the one of start, path, and batch and match from either with the highest ELBO. Above 200
                latent dimensions the map starts diagonal: ``"auto"`` finds the cheapest scale that fits, diagonal, with a few
                directions or full (:func:`pyro_flowguides.guides.many_dimensions.best_gaussian_in_many_dimensions`);
                ``"batch_and_match"`` finds a diagonal. Where every draw is a run of the model, ``"auto"`` does with some 2,200
                runs, and a diagonal above 200 dimensions.
            model_kwargs: The keyword arguments of the model.
            model: The whole model, where the guide is for ``poutine.block`` of it, which hides the data too.
            vectorize: Whether the model can be run on many latents at once; by default this is found out, and a model that
                cannot be is recorded.
            batched: A recording of the model that there is already.

        Returns:
            The guide.

        Raises:
            ValueError: if the method is unknown, or cannot be used in this number of dimensions; if the flow has been trained,
                since the map is part of what was trained; if latents are local to a minibatch that is an argument of the model.

        Where data are subsampled, one minibatch is drawn and kept, so that log p is a function; where latents are local to the
        minibatch, minibatches that cover the plate take its place, at a run of the model for each.
        """
        whitening.check_method(method)
        call = ModelCall.given("whiten", self.model, args, model_kwargs)
        with call.explaining("whiten"):
            self.setup(*call.args, **call.kwargs)
        if self.is_trained():
            raise ValueError(
                f"whiten: this {type(self).__name__} has been trained, and its fixed map is part of what it learnt; make a "
                "new guide to whiten it (in plain SVI after pyro.clear_param_store(), which holds the parameters of this one)"
            )
        if method == "init":
            return self
        target = Target(replace(call, model=model or call.model), self.latents, vectorize=vectorize, batched=batched)
        self._whiten(target, method)
        return self

    def _whiten(self, target: Target, method: str) -> None:
        self.put_map(*whitening.whiten(target, self._start_of_whitening(), method))

    def start_over_if_better(self, target: Target) -> bool:
        """Whitens a trained guide anew where it no longer fits, as after a fit to other data; its training starts over then.

        It fits where log p − log q spreads by at most half a nat (one standard deviation) over its draws. Where it does not, it
        is kept all the same unless the Gaussian that whitening finds has an ELBO that is higher by more than a nat. The cost for
        a guide that fits is 1000 densities, or 64 where each is a run of the model.

        Arguments:
            target: The log-density of the model.

        Returns:
            Whether the guide starts over.
        """
        log_density = whitening.without_errors(target.log_prob)
        num_draws = gaussians.NUM_ELBO_DRAWS if target.runs_together else whitening.FEW_ELBO_DRAWS
        with torch.no_grad():
            x, log_q = self.get_posterior().rsample_and_log_prob((num_draws,))
            log_ratios = log_density(x) - log_q
            if float(log_ratios.std()) <= many_dimensions.MAX_SPREAD:
                return False
            found = whitening.whiten(target, self._start_of_whitening(), "auto")
            elbo = float(log_ratios.mean().nan_to_num(-torch.inf))
            if gaussians.gaussian_elbo(log_density, *found, num_draws) <= elbo + whitening.MIN_GAIN:
                return False
            sizes = [parameter.numel() for parameter in self.parameters()]
            for parameter, value in zip(self.parameters(), self._initial.split(sizes), strict=True):
                parameter.copy_(value.reshape(parameter.shape))
        self.put_map(*found)
        return True

    def _start_of_whitening(self) -> tuple[Tensor, Tensor]:
        scale = self.fixed_map.whole_scale
        if self.latents.dim > whitening.MAX_FULL_RANK_DIM:
            scale = standard_deviations(scale)
        assert isinstance(scale, Tensor)
        return self.fixed_map.loc.double(), scale.double()

    def put_map(self, loc: Tensor, scale: Scale) -> None:
        """Takes a fixed map with a scale of any kind, before training, and switches damping off."""
        affine_maps.put(self.flow, loc, scale)
        # Where the scale is of another kind, the store has none of its tensors.
        self._share_buffers()
        self.undamp()


def init_or_feasible(init_loc_fn: Callable, site: Any) -> Tensor:
    """The value of ``init_loc_fn``; 0 in unconstrained space for a flat prior, from which nothing can be drawn.

    A discrete site is drawn: it is no part of the guide.
    """
    if site["fn"].support.is_discrete:
        value: Tensor = site["fn"]()
        return value
    try:
        return init_loc_fn(site)
    except NotImplementedError:
        fn = site["fn"]
        to_support = biject_to(fn.support)
        return to_support(torch.zeros(to_support.inverse_shape(fn.shape())))
