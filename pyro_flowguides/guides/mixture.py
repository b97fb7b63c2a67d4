r"""A guide that is a mixture of flows, one for each mode of the posterior.

.. math:: q(x) = \sum_k \pi_k q_k(x), \qquad x = w_k(a_k(f_k(z))) \text{ with probability } \pi_k
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn

from .. import bases, internals
from .. import transforms as T
from ..checks import check_positive_integer, warn
from ..distributions import FlowMixture, NormalizingFlow, systematic
from ..model.call import ModelCall
from ..model.latents import Latents
from ..model.maxima import find_maxima, local
from ..model.sites import quiet_trace, unchanged_random_state
from ..model.target import ERRORS_OF_MODELS, LogProb, Target
from . import affine_maps, whitening
from .auto import NUM_QUANTILE_PAIRS, AutoFlow
from .base import BASES
from .gaussians import gaussian_elbo
from .many_dimensions import diagonal_batch_and_match

NUM_STARTS = 256
# Where every point is a run of the model.
NUM_LOOPED_STARTS = 16
# A component costs a pass and an inverse for every draw.
MAX_COMPONENTS = 64
# The part of a density that belongs to one mode is nearly normal, and the start of batch and match is the mode itself.
NUM_UPDATES = 30
# Lighter components are dropped.
MIN_WEIGHT = 1e-4
# Components that share more are merged: 1 for two that are the same.
MAX_OVERLAP = 0.99
NUM_OVERLAP_DRAWS = 100


class Starts(NamedTuple):
    """Where components start.

    Attributes:
        locs: Shape (K, D).
        scales: Cholesky factors, shape (K, D, D), or standard deviations, shape (K, D).
        nats: The log of the mass of each, up to a constant, shape (K,).
    """

    locs: Tensor
    scales: Tensor
    nats: Tensor


class Components(nn.Module):
    """The flows of a mixture, their base distributions, and their weights before a softmax."""

    logits: Tensor

    def __init__(self, flows: Sequence[T.Compose], base: Sequence[bases.Base], logits: Tensor) -> None:
        super().__init__()
        self.components = nn.ModuleList(flows)
        self.bases = nn.ModuleList(base)
        if len(flows) > 1:
            self.logits = nn.Parameter(logits.clone())
        else:
            # One weight is 1, whatever it is before the softmax.
            self.register_buffer("logits", torch.zeros_like(logits))

    def __len__(self) -> int:
        return len(self.components)


class AutoMixture(AutoFlow):
    r"""A guide that is a mixture of flows, with one component for each mode that a search finds before the training.

    Usage::

        guide = AutoMixture(model)
        fit = pyro_flowguides.fit(model, guide, data)
        guide.weights                                         # the weight of each component

    The search takes place when the guide is set up, by :func:`pyro_flowguides.model.maxima.find_maxima`. Each component starts
    at a mode, with its own affine map, and with the mass of the mode as its weight. log q is exact: every component is inverted
    at every draw. The weights are trained with the flows, see :class:`pyro_flowguides.FlowMixture`, which says with which ELBOs.
    With one mode the guide is an :class:`AutoFlow`.

    At the end of :func:`pyro_flowguides.fit` components that coincide are merged, and those with a weight below 1e-4 are dropped
    (:meth:`simplify`).

    A draw costs a pass and an inverse of every component: choose flows with a cheap inverse, such as couplings. Train with
    vectorised particles: a draw alone has no baseline, and its gradient of the weights is noisy.

    Arguments:
        model: The model.
        flow: The flow of each component, as in :class:`AutoFlow`.
        num_components: ``"auto"`` for the modes that are found, up to 64; or a number: the heaviest of the modes, and further
            components around the heaviest one where there are fewer.
        options: The options of :class:`AutoFlow`. ``init_loc_fn`` and ``init_scale`` are where a single component starts.

    Raises:
        ValueError: if ``num_components`` is below 1, or, at set-up, if the log-determinant of the flow is a random estimate.

    References:
        Morningstar et al. (2021), *Automatic differentiation variational inference with mixtures*, arXiv:2003.01687.
        Roeder, Wu & Duvenaud (2017), *Sticking the landing*, arXiv:1703.09194.

    Example:
        >>> import pyro_flowguides as fg, torch
        >>> two = fg.LogDensity(lambda x: torch.logaddexp(-(x - 5).square().sum() / 2, -(x + 5).square().sum() / 2), 2)
        >>> _ = torch.manual_seed(0)
        >>> guide = AutoMixture(two).setup()
        >>> [f"{weight:.2f}" for weight in guide.weights]
        ['0.50', '0.50']
    """

    flow: Components  # type: ignore[assignment]

    def __init__(
        self,
        model: Callable,
        flow: str | Callable[[int], T.FlowTransform] = "coupling",
        *,
        num_components: int | str = "auto",
        **options: Any,
    ) -> None:
        if isinstance(num_components, str) and num_components != "auto":
            raise ValueError(f'AutoMixture: num_components must be "auto" or a number, got {num_components!r}')
        if not isinstance(num_components, str):
            check_positive_integer("AutoMixture", "num_components", num_components)
        super().__init__(model, flow, **options)
        self.num_components = num_components

    # --- set-up --------------------------------------------------------------------------------------------------------

    def _attach_flow(self, latents: Latents, args: tuple, kwargs: dict[str, Any]) -> None:
        loc = latents.init_loc
        starts = self._find_starts(latents, args, kwargs)
        number = 1 if starts is None else len(starts.locs)
        flows, base = [], []
        for index in range(number):
            flows.append(T.Compose(self._make_parts(latents)))
            if starts is not None:
                affine_maps.put(flows[-1], starts.locs[index], starts.scales[index])
            base.append(BASES[self._base](latents.dim))
        if flows[0].stochastic_log_det:
            raise ValueError(
                f"{type(self).__name__}: the log-determinant of its flow is a random estimate, and a mixture needs the density "
                "of every component; build the flow with log_det='exact', a continuous one with trace='exact'"
            )
        logits = torch.zeros(1) if starts is None else starts.nats - starts.nats.logsumexp(0)
        self._attach_modules({"flow": Components(flows, base, logits).to(dtype=loc.dtype, device=loc.device)})

    def _find_starts(self, latents: Latents, args: tuple, kwargs: dict[str, Any]) -> Starts | None:
        """A start for each component; None for one component that starts as in AutoFlow."""
        found = self._find_modes(latents, args, kwargs)
        if isinstance(self.num_components, int):
            found = self._spread(found, self.num_components, latents)
        if len(found.locs) < 2:
            return None
        if latents.dim > whitening.MAX_FULL_RANK_DIM:
            found = found._replace(scales=found.scales.square().sum(-1).sqrt())
        return found

    def _find_modes(self, latents: Latents, args: tuple, kwargs: dict[str, Any]) -> Starts:
        """The heaviest modes, as many as there may be components; none where there is no search."""
        loc = latents.init_loc.double()
        nothing = Starts(loc.new_zeros(0, len(loc)), loc.new_zeros(0, len(loc), len(loc)), loc.new_zeros(0))
        # A part of a list has the density of the part alone, of which the other latents are drawn.
        if self.num_components == 1 or self.master is not None:
            return nothing
        try:
            with quiet_trace(), pyro.validation_enabled(False):
                target = Target(ModelCall(self.model, args, kwargs), latents, vectorize=None)
                maxima, nats = find_maxima(target, NUM_STARTS if target.runs_together else NUM_LOOPED_STARTS)
        except ERRORS_OF_MODELS as error:
            warn(f"{type(self).__name__}: modes were not looked for: {' '.join(str(error).split())[:300]}")
            return nothing
        most = self.num_components if isinstance(self.num_components, int) else MAX_COMPONENTS
        return Starts(maxima.points[:most], maxima.scale_trils[:most], nats[:most])

    def _spread(self, starts: Starts, number: int, latents: Latents) -> Starts:
        """More components around the heaviest mode, or around the start of the latents, which share its mass."""
        locs, scales, nats = starts
        if not len(locs):
            locs = latents.init_loc.double().unsqueeze(0)
            scales, nats = self._init_scale * torch.eye(latents.dim).to(locs).unsqueeze(0), locs.new_zeros(1)
        more = number - len(locs)
        noise = torch.randn(more, latents.dim, dtype=locs.dtype, device=locs.device)
        shared = nats[:1] - math.log(more + 1)
        return Starts(
            torch.cat([locs, locs[0] + noise @ scales[0].mT]),
            torch.cat([scales, scales[:1].expand(more, -1, -1)]),
            torch.cat([shared, nats[1:], shared.expand(more)]),
        )

    # --- the components ------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> Tensor:
        """The weights of the components, shape (K,)."""
        _ = self.latents
        return self.flow.logits.detach().softmax(-1)

    def mix(self, guides: Sequence[AutoFlow]) -> None:
        """Takes copies of the flows of other guides of the same latents as components, with equal weights.

        Arguments:
            guides: Guides that are set up, with one flow each.

        Raises:
            RuntimeError: if this guide or one of those is not set up.
            ValueError: if their latents are others.
        """
        for guide in guides:
            if [site.name for site in guide.latents.sites] != [site.name for site in self.latents.sites]:
                raise ValueError(f"{type(self).__name__}: the guides of a mixture must have the same latents")
        self._replace_components(
            [(guide.flow, guide.base) for guide in guides], self.flow.logits.new_zeros(len(guides))
        )

    def _replace_components(self, chosen: Sequence[tuple[T.Compose, bases.Base]], logits: Tensor) -> None:
        """Puts copies of other components in the place of these."""
        # One by one: a component may be chosen more than once.
        pairs = [copy.deepcopy(pair) for pair in chosen]
        modules: list[Any] = [part for pair in pairs for part in pair]
        for module in modules:
            # It has been called as a part of another module.
            internals.set_module_context(module, None)
        components = Components([flow for flow, _ in pairs], [base for _, base in pairs], logits)
        with self._pyro_context:
            # Their names in the store are taken over by others.
            del self.flow
        self._attach_modules({"flow": components.to(logits)})
        # They have been trained, and there is no start to go back to.
        self._initial = torch.zeros(0)

    def _pairs(self) -> list[tuple[Any, Any]]:
        return list(zip(self.flow.components, self.flow.bases, strict=True))

    @torch.no_grad()
    def simplify(self) -> bool:
        r"""Merges components that coincide, and drops those with a weight below 1e-4.

        Two components a and b coincide where the mixture does not tell them apart: where

        .. math:: E_{q_a}\left[\frac{(\pi_a + \pi_b) q_b}{\pi_a q_a + \pi_b q_b}\right] > 0.99,

        which is 1 where they are the same, and 0 where they are apart. The heavier one takes the weight of both. Not during a
        training, since an optimiser knows the parameters.

        Returns:
            Whether there are fewer components now.

        Raises:
            RuntimeError: if the guide is not set up.
        """
        weights = self.weights
        kept: dict[int, Tensor] = {}
        overlaps = self._overlaps(weights)
        for index in weights.argsort(descending=True).tolist():
            twin = next((other for other in kept if float(overlaps[other, index]) > MAX_OVERLAP), None)
            if twin is not None:
                kept[twin] = kept[twin] + weights[index]
            elif not kept or float(weights[index]) >= MIN_WEIGHT:
                kept[index] = weights[index]
        if len(kept) == len(weights):
            return False
        pairs = self._pairs()
        self._replace_components([pairs[index] for index in kept], torch.stack(list(kept.values())).log())
        return True

    def _overlaps(self, weights: Tensor) -> Tensor:
        """How much of each component the mixture does not tell from each other one, shape (K, K)."""
        posterior, logs = self.get_posterior(), weights.log()
        both = torch.logaddexp(logs.unsqueeze(-1), logs)
        rows = []
        with unchanged_random_state():
            for index, component in enumerate(posterior.components):
                joint = posterior.component_log_probs(component.sample(torch.Size([NUM_OVERLAP_DRAWS]))) + logs
                rows.append(
                    (joint - logs + both[index] - torch.logaddexp(joint, joint[:, index : index + 1])).exp().mean(0)
                )
        return torch.stack(rows)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As for every module; the guide has as many components then as the one that was saved."""
        found = {int(match[1]) for name in state_dict if (match := re.match(r"flow\.components\.(\d+)\.", name))}
        if self.latents.sites and found and len(found) != len(self.flow):
            self._replace_components([self._pairs()[0]] * len(found), self.flow.logits.new_zeros(len(found)))
        return super().load_state_dict(state_dict, *args, **kwargs)

    # --- the posterior -------------------------------------------------------------------------------------------------

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowMixture:  # type: ignore[override]
        """The mixture over the flat unconstrained latent, a fresh distribution at every call."""
        components = [NormalizingFlow(base(), flow, validate_args=False) for flow, base in self._pairs()]
        return FlowMixture(components, self.flow.logits, gradient=self.gradient_now, validate_args=False)

    def get_base_dist(self) -> Any:
        raise ValueError(
            f"{type(self).__name__}: a mixture is no transform of one base distribution; get_posterior() is the mixture itself"
        )

    def get_transform(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"{type(self).__name__}: a mixture is no change of variables, which NeuTra needs; use AutoFlow, or sample from each "
            "mode alone"
        )

    def _fixed_draws(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        latents = self.latents
        if not latents.sites:
            return torch.zeros(1, 0)
        points = [base.fixed_draws(NUM_QUANTILE_PAIRS) for _, base in self._pairs()]
        number = len(points[0])
        # Neither all near the centre of one component nor at random.
        order = torch.randperm(number, generator=torch.Generator().manual_seed(0)).to(points[0].device)
        draws = self.get_posterior().draw_from(systematic(self.weights, number, 0.5)[order], points)
        return draws.reshape(number, *[1] * latents.nesting, latents.dim)

    # --- whitening -----------------------------------------------------------------------------------------------------

    @property
    def fixed_map(self) -> T.FixedAffine:
        """The fixed affine map of the first component."""
        return self._maps()[0]

    def _maps(self) -> list[T.FixedAffine]:
        return [affine_maps.fixed_map_of(flow) for flow in self.flow.components]  # type: ignore[arg-type]

    def _whiten(self, target: Target, method: str) -> None:
        """Fits a Gaussian to the part of the density that belongs to each component, for a map and a weight."""
        whitening.check_method(method, target.latents.dim)
        if len(self.flow) == 1:
            super()._whiten(target, method)
            return
        maps = self._maps()
        nats = self.flow.logits.detach().double()
        locs = torch.stack([each.loc for each in maps]).double()
        scales = torch.stack([each.scale for each in maps]).double()
        log_prob = whitening.without_errors(target.log_prob)
        elbos = []
        for index, flow in enumerate(self.flow.components):
            part = local(log_prob, locs, scales, nats, index)
            start = locs[index], scales[index]
            candidates = [start, _fitted(part, start, method)]
            found = [gaussian_elbo(part, *candidate) for candidate in candidates]
            best = int(found[1] > found[0])
            elbos.append(found[best])
            affine_maps.put(flow, *candidates[best])  # type: ignore[arg-type]
        with torch.no_grad():
            new = torch.tensor(elbos).to(self.flow.logits)
            if bool(new.isfinite().all()):
                self.flow.logits.copy_(new.log_softmax(-1))
        self._initial = self._flat_parameters()
        self.undamp()

    def start_over_if_better(self, target: Target) -> bool:
        """As :meth:`AutoFlow.start_over_if_better` with one component; a mixture of several never starts over."""
        # What is made of trained components has no start to go back to.
        return len(self.flow) == 1 and len(self._initial) > 0 and super().start_over_if_better(target)


def _fitted(log_density: LogProb, start: tuple[Tensor, Tensor], method: str) -> tuple[Tensor, Tensor]:
    if method == "pathfinder":
        return whitening.quasi_newton_path(log_density, *start)
    match = whitening.batch_and_match if start[1].dim() == 2 else diagonal_batch_and_match
    return match(log_density, *start, num_updates=NUM_UPDATES)
