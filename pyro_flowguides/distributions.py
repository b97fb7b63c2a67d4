"""Normalizing flows as distributions of Pyro."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.ops.provenance import detach_provenance
from torch import Tensor
from torch.distributions import constraints

from . import transforms as T
from .transforms.base import Conditioned
from .transforms.continuous import OdeError, collect_penalties, ode_error
from .transforms.numerics import value_and_pull_back


class NormalizingFlow(dist.TransformedDistribution):
    r"""The distribution of :math:`x = f(z)` for z from a base distribution and a flow transform f.

    .. math:: \log q(x) = \log q_0(z) - \log\left|\det \frac{\partial f}{\partial z}\right|, \qquad z = f^{-1}(x).

    A point that this object has just drawn is scored without inverting the flow: the last draw is remembered, by identity,
    with its log-density. Every other point is scored through the inverse.

    A transform with ``context_dim > 0`` makes a family of distributions, one for every context:
    :meth:`condition` binds a batch of contexts and returns the batch of distributions.

    Arguments:
        base: A reparameterised distribution over vectors, for example ``Normal(zeros, ones).to_event(1)``, or one that a
            module of :mod:`pyro_flowguides.bases` returns.
        transform: The flow.
        gradient: ``"total"`` for the plain derivative of log q, or ``"path"`` for the path gradient ("sticking the landing",
            Roeder et al. 2017, arXiv:1703.09194): the log-density of a draw depends on the parameters through the draw alone,
            :math:`\log q + s^\top (x - x_{\text{detached}})` with the score s carried along by ``forward_with_score``
            (Vaitl et al. 2024, arXiv:2403.15881). Its variance vanishes where q is exact. Values are the same. The regularisation
            of :class:`~pyro_flowguides.transforms.Continuous` is part of both gradients and of no value.

    Raises:
        ValueError: if the gradient is unknown; at the first draw or density, if the transform still needs a context.

    Example:
        >>> from pyro_flowguides.flows import coupling
        >>> base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
        >>> flow = NormalizingFlow(base, coupling(2))
        >>> x, log_prob = flow.rsample_and_log_prob((5,))
        >>> x.shape, log_prob.shape
        (torch.Size([5, 2]), torch.Size([5]))
        >>> conditional = NormalizingFlow(base, coupling(2, context_dim=3)).condition(torch.zeros(7, 3))
        >>> conditional.batch_shape, conditional.rsample((5,)).shape
        (torch.Size([7]), torch.Size([5, 7, 2]))
    """

    def __init__(
        self,
        base: dist.TorchDistribution,
        transform: T.FlowTransform,
        *,
        gradient: str = "total",
        validate_args: bool | None = None,
    ) -> None:
        if gradient not in ("total", "path"):
            raise ValueError(f'NormalizingFlow: gradient must be "total" or "path", got {gradient!r}')
        self.gradient = gradient
        self._last_draw: tuple[Tensor, Tensor] | None = None
        super().__init__(base, [transform], validate_args=validate_args)

    @property
    def transform(self) -> T.FlowTransform:
        return self.transforms[0]

    def condition(self, context: Tensor) -> NormalizingFlow:
        """The distribution, or the batch of them, for given contexts; the parameters are shared.

        Arguments:
            context: Of shape ``context_batch_shape + (context_dim,)``.

        Returns:
            A distribution whose batch shape is the one of the context, broadcast with the batch shape of this distribution.

        Raises:
            ValueError: if the transform takes no context, or one of another size.
        """
        size = self.transform.context_dim
        if not size:
            raise ValueError("NormalizingFlow: the transform takes no context (context_dim = 0), there is none to bind")
        if context.dim() == 0 or context.shape[-1] != size:
            raise ValueError(
                f"NormalizingFlow: the last dimension of the context must be context_dim = {size}, "
                f"got shape {tuple(context.shape)}"
            )
        batch_shape = torch.broadcast_shapes(self.batch_shape, context.shape[:-1])
        return NormalizingFlow(
            self.base_dist.expand(batch_shape),
            self.transform.condition(context),
            gradient=self.gradient,
            validate_args=self._validate_args,
        )

    def _check_bound(self) -> None:
        if self.transform.context_dim:
            raise ValueError(
                f"NormalizingFlow: the transform needs a context of size {self.transform.context_dim}; "
                "call condition(context) first and use the distribution it returns"
            )

    def expand(self, batch_shape: torch.Size, _instance: NormalizingFlow | None = None) -> NormalizingFlow:
        new = self._get_checked_instance(NormalizingFlow, _instance)
        new.gradient = self.gradient
        new._last_draw = None
        return super().expand(batch_shape, _instance=new)

    def rsample_and_log_prob(self, sample_shape: torch.Size | Sequence[int] = torch.Size()) -> tuple[Tensor, Tensor]:
        """Draws x with its log-density in one forward pass. The gradient of the latter follows ``self.gradient``."""
        self._check_bound()
        z = self.base_dist.rsample(torch.Size(sample_shape))
        if not torch.is_grad_enabled():
            return self._draw(z)
        with collect_penalties() as penalties:
            x, log_q = self._draw_with_path_gradient(z) if self.gradient == "path" else self._draw(z)
        for penalty in penalties:
            log_q = log_q + (penalty - penalty.detach()).reshape(log_q.shape)
        return x, log_q

    def _draw(self, z: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = self.transform.forward_and_log_det(self._as_rows(z))
        return x.reshape(z.shape), self.base_dist.log_prob(z) - log_det.reshape(z.shape[:-1])

    def _as_rows(self, z: Tensor) -> Tensor:
        """The points as a matrix, on which a network is cheapest, unless each has a context of its own."""
        conditioned = any(isinstance(module, Conditioned) for module in self.transform.modules())
        return z if conditioned else z.reshape(-1, z.shape[-1])

    def _draw_with_path_gradient(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise NotImplementedError(
                "torch.jit.trace cannot record the path gradient, which differentiates within the forward pass; use "
                'gradient="total" with the Jit ELBOs, or Trace_ELBO with gradient="path"'
            )
        log_base, pull_back = value_and_pull_back(self.base_dist.log_prob, z.detach())
        with torch.no_grad():
            (score,) = pull_back(torch.ones_like(log_base))
        x, log_det, score = self.transform.forward_with_score(self._as_rows(z), self._as_rows(score))
        # From the very tensor that is returned: what flows back into a draw can then be weighed there, as IWELBO does it.
        x = x.reshape(z.shape)
        path = ((x - x.detach()) * score.reshape(z.shape)).sum(-1)
        return x, (log_base - log_det.reshape(log_base.shape)).detach() + path

    @torch.no_grad()
    def ode_error(self, num_draws: int = 1000) -> OdeError:
        """What the steps of the continuous flows in it leave, see :func:`pyro_flowguides.transforms.ode_error`.

        Arguments:
            num_draws: The number of draws of the base distribution that it is measured at.

        Raises:
            ValueError: if there is no continuous flow in the transform, or it needs a context.
        """
        self._check_bound()
        return ode_error(self.transform, self.base_dist.sample(torch.Size([num_draws])))

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        self._last_draw = self.rsample_and_log_prob(sample_shape)
        return self._last_draw[0]

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density of a draw, or of any other point by the inverse of the flow."""
        if self._last_draw is not None and value is self._last_draw[0]:
            return self._last_draw[1]
        self._check_bound()
        if self._validate_args:
            self._validate_sample(value)
        z, log_det = self.transform.inverse_and_log_det(value)
        return self.base_dist.log_prob(z) + log_det


class FlowMixture(dist.TorchDistribution):
    r"""A mixture of normalizing flows, with an exact density by the inverses of all of them.

    .. math:: q(x) = \sum_k \pi_k q_k(x), \qquad \nabla_\pi E_q[r] = \sum_k \nabla \pi_k E_{q_k}[r], \quad r = \log p - \log q.

    Draws are stratified: n draws have about :math:`n \pi_k` from component k, within one or two, in random order. Given its
    component a draw is reparameterised, and its log-density has the gradient of the components.

    The weights learn by the score function :math:`s(x) = \log \sum_k \pi_k q_k(x)` as a function of :math:`\pi` alone, which
    :meth:`score_parts` gives to Pyro's ELBOs. The draws are stratified in two halves, independent of each other, and each half
    has the mean of r over the other as its baseline. There is no bias, and a constant in r, such as log Z, adds no noise. A
    draw alone has no baseline. ``Trace_ELBO``, ``TraceGraph_ELBO`` and ``TraceEnum_ELBO`` train the weights.
    ``TraceMeanField_ELBO`` refuses to. ``RenyiELBO`` has no such term, and does not train them.

    Arguments:
        components: The flows :math:`q_k`, over vectors of the same size.
        logits: The weights before a softmax, shape (K,).
        gradient: As in :class:`NormalizingFlow`. ``"path"``: the log-density of a draw depends on the parameters through the draw
            alone, by the score of the whole mixture (Roeder et al. 2017, arXiv:1703.09194).

    Cost: n draws are n passes and n inverses of every component.

    Raises:
        ValueError: if the gradient is unknown.

    Example:
        >>> from pyro_flowguides.flows import coupling
        >>> base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
        >>> mixture = FlowMixture([NormalizingFlow(base, coupling(2)) for _ in range(3)], torch.zeros(3))
        >>> x, log_prob = mixture.rsample_and_log_prob((5,))
        >>> x.shape, log_prob.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(
        self,
        components: Sequence[NormalizingFlow],
        logits: Tensor,
        *,
        gradient: str = "total",
        batch_shape: torch.Size = torch.Size(),
        validate_args: bool | None = None,
    ) -> None:
        if gradient not in ("total", "path"):
            raise ValueError(f'FlowMixture: gradient must be "total" or "path", got {gradient!r}')
        self.components, self.logits, self.gradient = list(components), logits, gradient
        # The last draw, its log-density, and the score function of the weights there.
        self._last_draw: tuple[Tensor, Tensor, Tensor] | None = None
        super().__init__(batch_shape, components[0].event_shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override, unused-ignore]
        """Whether draws carry all of the gradient, which they do unless weights are learnt."""
        return not (self.logits.requires_grad and torch.is_grad_enabled())

    @property
    def weights(self) -> Tensor:
        """The weights of the components, shape (K,)."""
        return self.logits.softmax(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowMixture:
        shape = torch.Size(batch_shape)
        return FlowMixture(self.components, self.logits, gradient=self.gradient, batch_shape=shape, validate_args=False)

    def component_log_probs(self, value: Tensor) -> Tensor:
        """The log-density of every component by its inverse, shape ``value.shape[:-1] + (K,)``."""
        rows = value.reshape(-1, value.shape[-1])
        each = []
        for component in self.components:
            z, log_det = component.transform.inverse_and_log_det(rows)
            each.append(component.base_dist.log_prob(z) + log_det)
        return torch.stack(each, -1).reshape(*value.shape[:-1], len(self.components))

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density of a draw, or of any other point."""
        value = detach_provenance(value)
        if self._last_draw is not None and value is self._last_draw[0]:
            return self._last_draw[1]
        return (self.component_log_probs(value) + self.logits.log_softmax(-1)).logsumexp(-1)

    def score_parts(self, x: Tensor, *args: Any, **kwargs: Any) -> ScoreParts:
        """log q, the score function of the weights, and what an ELBO subtracts to be differentiated.

        The ELBOs multiply the score function by log p; by log q it is multiplied here, since they leave the density of an
        auxiliary site out.
        """
        log_q = self.log_prob(x)
        drawn = self._last_draw is not None and detach_provenance(x) is self._last_draw[0]
        if not drawn or self.has_rsample:
            return ScoreParts(log_q, 0.0, log_q)  # type: ignore[arg-type]
        assert self._last_draw is not None
        score = self._last_draw[2]
        return ScoreParts(log_q, score, log_q + log_q.detach() * score)

    def __call__(self, sample_shape: Any = torch.Size(), *args: Any, **kwargs: Any) -> Tensor:
        return self.rsample(sample_shape)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        self._last_draw = self._draw(torch.Size(sample_shape))
        return self._last_draw[0]

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample_and_log_prob(self, sample_shape: torch.Size | Sequence[int] = torch.Size()) -> tuple[Tensor, Tensor]:
        """Draws x with its log-density, whose gradient follows ``self.gradient``."""
        return self._draw(torch.Size(sample_shape))[:2]

    def _draw(self, sample_shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        shape = sample_shape + self.batch_shape
        number = math.prod(shape)
        weights = self.weights.detach()
        half = number - number // 2
        index = torch.cat([stratified(weights, half), stratified(weights, number - half)])
        x, own, penalty = self._draw_from(index)
        log_q, score = self._log_q(x, own, index)
        if torch.is_grad_enabled():
            log_q = log_q + (penalty - penalty.detach())
        # The mean over each half is what the other half has as its baseline.
        first, second = score[:half], score[half:]
        if number > 1:
            score = torch.cat([first - second.sum() / half, second - first.sum() / (number - half)])
        return x.reshape(*shape, -1), log_q.reshape(shape), score.reshape(shape)

    def draw_from(self, index: Tensor, base_draws: Sequence[Tensor]) -> Tensor:
        """Pushes points of the base distributions forward.

        Arguments:
            index: The component of each, shape (n,).
            base_draws: Points of the base distribution of every component, shape (n, D).
        """
        each = [flow.transform(z) for flow, z in zip(self.components, base_draws, strict=True)]
        return _chosen(each, index)

    def _draw_from(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draws from the given components, the log-density of each in its own, and the penalty on the way.

        All components draw all points, so that the shapes are known before the draw.
        """
        points, densities, penalties = [], [], []
        for component in self.components:
            z = component.base_dist.rsample(torch.Size([len(index)]))
            with collect_penalties() as found:
                x, log_det = component.transform.forward_and_log_det(z)
            points.append(x)
            densities.append(component.base_dist.log_prob(z) - log_det)
            penalties.append(sum((penalty.reshape(-1) for penalty in found), torch.zeros_like(log_det)))
        return _chosen(points, index), _chosen(densities, index), _chosen(penalties, index)

    def _log_q(self, x: Tensor, own: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """log q at draws, and the score function of the weights there.

        Arguments:
            x: The draws, shape (n, D).
            own: The log-density of each in its own component, from the forward pass, which no rounding of an inverse touches.
            index: The component of each.
        """
        is_own = index.unsqueeze(-1) == torch.arange(len(self.components), device=index.device)
        log_weights = self.logits.log_softmax(-1)

        def with_own(log_probs: Tensor, own: Tensor) -> Tensor:
            return torch.where(is_own, own.unsqueeze(-1), log_probs)

        if self.gradient == "total" or not torch.is_grad_enabled():
            each = with_own(self.component_log_probs(x), own)
            log_q = (each + log_weights.detach()).logsumexp(-1)
        else:
            log_q, each = self._with_path_gradient(x, own, with_own)
        return log_q, (each.detach() + log_weights).logsumexp(-1)

    def _with_path_gradient(self, x: Tensor, own: Tensor, with_own: Any) -> tuple[Tensor, Tensor]:
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise NotImplementedError(
                "torch.jit.trace cannot record the path gradient, which differentiates within the forward pass; use "
                'gradient="total" with the Jit ELBOs, or Trace_ELBO with gradient="path"'
            )
        # The parameters have no gradient from here; within the pull-back the points have one all the same.
        with torch.no_grad():
            each, pull_back = value_and_pull_back(self.component_log_probs, x)
            each = with_own(each, own)
            joint = each + self.logits.detach().log_softmax(-1)
            (score,) = pull_back(joint.softmax(-1))
        return joint.logsumexp(-1) + ((x - x.detach()) * score).sum(-1), each

    def ode_error(self, num_draws: int = 1000) -> OdeError:
        """The worst of the components, see :meth:`NormalizingFlow.ode_error`."""
        errors = [component.ode_error(num_draws) for component in self.components]
        return OdeError(*(max(values) for values in zip(*errors, strict=True)))


def stratified(weights: Tensor, number: int) -> Tensor:
    r"""Indices of which about :math:`n \pi_k` are k, in random order, with static shapes.

    Arguments:
        weights: The weights :math:`\pi`, shape (K,).
        number: The number n of indices.
    """
    offset, order = (
        torch.rand((), dtype=weights.dtype, device=weights.device),
        torch.rand(number, device=weights.device),
    )
    return systematic(weights, number, offset)[order.argsort()]


def systematic(weights: Tensor, number: int, offset: Tensor | float) -> Tensor:
    """The component that each of n equal strata of the unit interval meets at an offset from 0 to 1, in rising order."""
    strata = torch.arange(number, dtype=weights.dtype, device=weights.device)
    index = torch.searchsorted(weights.cumsum(-1), (strata + offset) / max(number, 1))
    # The weights may add up to a little less than 1.
    return index.clamp(max=len(weights) - 1)


def _chosen(each: Sequence[Tensor], index: Tensor) -> Tensor:
    """Row i of the tensor number ``index[i]``, for every i."""
    return torch.stack(list(each))[index, torch.arange(len(index), device=index.device)]
