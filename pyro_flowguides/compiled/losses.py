"""Objectives: what a training minimises, as a scalar tensor whose gradient is the gradient of the estimator.

Pyro's ELBOs return floats and call ``backward`` themselves, which waits for the device and cannot be captured. Here each of them
is one scalar tensor, whose value is the loss; its gradient is the one that Pyro's ELBO adds to the parameters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.infer import JitTrace_ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.elbo import ELBO
from pyro.infer.util import get_dependent_plate_dims, torch_sum
from torch import Tensor

from .. import internals
from ..distributions import FlowMixture
from ..guides.base import path_gradient
from ..guides.delta import LatentDelta
from ..model.call import ModelCall
from ..model.sites import is_subsample
from .recorded import BatchedCalls, find_recording, recorded_loss
from .tempering import tempered


@runtime_checkable
class Objective(Protocol):
    """What a training minimises. A class of your own needs this one method."""

    def loss(self, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """A scalar whose value is the loss, and whose gradient is the gradient of the estimator.

        Arguments:
            model: The model.
            guide: The guide.
            args: The positional arguments of both.
            kwargs: Their keyword arguments.
        """
        ...


class Prepared:
    """An objective whose steps may take tensors that are made before the step, outside of the graph.

    Its ``loss`` takes these tensors after the keyword arguments of the model.
    """

    def inputs(
        self, step: int, like: Tensor, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        """The tensors for a step, in the same number and of the same shapes each time.

        Arguments:
            step: The number of the step, from 0.
            like: A tensor with the dtype and the device of the parameters.
            model: The model.
            guide: The guide.
            args: The positional arguments of both.
            kwargs: Their keyword arguments.
        """
        return ()

    def begin_anew(self) -> None:
        """Makes again what it keeps from step to step: parameters and random numbers are others from here on."""

    def is_comparable(self, first: int, last: int) -> bool:
        """Whether a rise of the loss between these two steps is no change of what is minimised."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """What it keeps from step to step, as tensors and plain Python values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a :meth:`state_dict`."""


class KL(Prepared):
    r"""KL(q, p) up to the log evidence: the negative ELBO, by the path gradient of flow guides.

    .. math:: E_q\left[\log q(x) - \beta_t \log p(x, y)\right]

    Here :math:`\beta_t` is 1 unless the target is tempered. The path gradient of log q has weight 1 at each temperature.
    The gradient of a guide that is no flow guide is the one that ``Trace_ELBO`` takes.

    Arguments:
        num_particles: The number of draws.
        vectorize_particles: Whether they are drawn together; else one by one.
        max_plate_nesting: As in Pyro's ELBOs.
        batched: The recording of a model that does not broadcast; the guide is drawn from in one pass then, and the recording
            gives log p of all draws.
        otherwise: Makes such a recording of a model that broadcasts and cannot be captured, since it looks at data; None if
            there can be none.
        temper: The inverse temperature as a function of the number of the step, see :func:`pyro_flowguides.fit`. A captured
            step reads it as a tensor.

    References:
        Rezende & Mohamed (2015), *Variational inference with normalizing flows*, arXiv:1505.05770, equation 20.
        Roeder, Wu & Duvenaud (2017), *Sticking the landing*, arXiv:1703.09194.
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        vectorize_particles: bool = True,
        max_plate_nesting: float = math.inf,
        batched: BatchedCalls | None = None,
        otherwise: Callable[[], BatchedCalls | None] | None = None,
        temper: Callable[[int], float] | None = None,
    ) -> None:
        self.batched = batched
        self._temper = temper
        self._otherwise = otherwise
        self.elbo = Trace_ELBO(
            num_particles=num_particles,
            vectorize_particles=vectorize_particles and num_particles > 1,
            max_plate_nesting=max_plate_nesting,
        )

    def inputs(self, step: int, like: Tensor, *others: Any) -> tuple[Tensor, ...]:
        """The inverse temperature, if the target is tempered."""
        return () if self._temper is None else (like.new_full((), self._temper(step)),)

    def is_comparable(self, first: int, last: int) -> bool:
        """Whether the inverse temperature is the same."""
        return self._temper is None or self._temper(first) == self._temper(last)

    def loss(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any], beta: Tensor | None = None
    ) -> Tensor:
        if beta is not None:
            model, guide = tempered(model, guide, beta)
        with path_gradient():
            if self.batched is not None:
                return recorded_loss(self.batched, self.elbo.num_particles, guide, args, kwargs, beta)
            return self.elbo.differentiable_loss(model, guide, *args, **kwargs)

    def take_recording(self) -> bool:
        """Takes the recording of the model from now on; returns whether there is one that it had not taken before."""
        if self.batched is not None or self._otherwise is None:
            return False
        self.batched = self._otherwise()
        return self.batched is not None


class IWELBO(RenyiELBO):
    r"""The importance-weighted bound of K draws, with its doubly reparameterised gradient.

    .. math:: \mathcal{L}_K = E\left[\log \frac1K \sum_{k=1}^K w_k\right], \qquad w_k = \frac{p(x_k)}{q(x_k)},
       \quad x_k \sim q,

    tighter than the ELBO, which is :math:`\mathcal{L}_1`, and exact for :math:`K \to \infty`. Where a plate holds all sites of
    the model, such as the data of a variational autoencoder, there is one bound for each of its elements.

    The plain gradient has a signal-to-noise ratio that falls with K. The doubly reparameterised one,
    :math:`\sum_k \tilde w_k^2\, \partial_x \log w_k \cdot \partial x_k` with normalized weights :math:`\tilde w`, has the
    same mean and does not; it needs a guide with a path gradient, which every flow guide of this library has. The
    gradient to the parameters of the model has weights :math:`\tilde w_k` in both.

    Arguments:
        num_particles: The number K of draws, at least 2.
        gradient: ``"doubly_reparameterized"``, or ``"total"`` for the plain one, which any reparameterised guide has.
        max_plate_nesting: As in Pyro's ELBOs.
        vectorize_particles: As in Pyro's ELBOs.

    Raises:
        ValueError: if K or the gradient is wrong; at the first step, if the guide has no path gradient.

    References:
        Burda, Grosse & Salakhutdinov (2016), *Importance weighted autoencoders*, arXiv:1509.00519.
        Tucker, Lawson, Gu & Maddison (2019), *Doubly reparameterized gradient estimators for Monte Carlo objectives*,
        arXiv:1810.04152.
    """

    def __init__(
        self,
        num_particles: int = 16,
        *,
        gradient: str = "doubly_reparameterized",
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = True,
    ) -> None:
        if num_particles < 2:
            raise ValueError(
                f"IWELBO: num_particles must be at least 2, got {num_particles}; with one it is Trace_ELBO"
            )
        if gradient not in ("doubly_reparameterized", "total"):
            raise ValueError(f'IWELBO: gradient must be "doubly_reparameterized" or "total", got {gradient!r}')
        super().__init__(
            alpha=0,
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
        )
        self.gradient = gradient

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The loss, with its gradient added to the parameters."""
        loss = _importance_weighted_loss(self, model, guide, args, kwargs)
        loss.backward()
        return float(loss.detach())


# --- ELBOs of Pyro and functions -----------------------------------------------------------------------------------------

Adapter = Callable[[Any, Callable, Callable, tuple, dict[str, Any]], Tensor]


class PyroELBO:
    """An ELBO of Pyro as an objective.

    ``Trace_ELBO`` with vectorised particles takes a recording of a model that does not broadcast, see :meth:`find_recording`.

    Arguments:
        elbo: The ELBO: of Pyro, its Jit variants included, or of your own with a method ``differentiable_loss``.

    Raises:
        NotImplementedError: if this ELBO has no differentiable loss.
    """

    def __init__(self, elbo: Any) -> None:
        self.elbo = elbo
        self._adapter = _find_adapter(elbo)
        self._batched: BatchedCalls | None = None

    def loss(self, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        if self._batched is not None:
            return recorded_loss(self._batched, self.elbo.num_particles, guide, args, kwargs)
        return self._adapter(self.elbo, model, guide, args, kwargs)

    def find_recording(self, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        """Records the model from now on, where its particles cannot be run together otherwise.

        Arguments:
            model: The model.
            guide: The guide.
            args: The positional arguments of both.
            kwargs: Their keyword arguments.
        """
        if (
            type(self.elbo) in (Trace_ELBO, JitTrace_ELBO)
            and self.elbo.vectorize_particles
            and self.elbo.num_particles > 1
        ):
            self._batched = find_recording(ModelCall(model, args, kwargs), guide)


class LossFunction:
    """A function ``loss(model, guide, *args, **kwargs)`` that returns a tensor, as an objective."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def loss(self, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        return self.function(model, guide, *args, **kwargs)


def as_objective(loss: Any) -> Objective:
    """The objective that an ELBO of Pyro, a loss function or an objective stands for.

    Raises:
        NotImplementedError: if it is an ELBO without a differentiable loss.
        TypeError: if it is none of these.
    """
    if any(hasattr(loss, name) for name in ("differentiable_loss", "loss_and_grads")):
        return PyroELBO(loss)
    # Such as Pyro's EnergyDistance, which has a method ``loss`` with other arguments as well.
    if callable(loss):
        return LossFunction(loss)
    if isinstance(loss, Objective):
        return loss
    raise TypeError(
        f"loss must be an ELBO of Pyro, an objective with a method loss(model, guide, args, kwargs), or a function "
        f"loss(model, guide, *args, **kwargs), got {loss!r}"
    )


def as_function(objective: Objective) -> Callable[..., Tensor]:
    """An objective as a function ``loss(model, guide, *args, **kwargs)``, which Pyro's SVI takes."""
    return lambda model, guide, *args, **kwargs: objective.loss(model, guide, args, kwargs)


def _importance_weighted_loss(
    elbo: IWELBO, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]
) -> Tensor:
    if elbo.gradient == "total":
        return _renyi_loss(elbo, model, guide, args, kwargs)
    with path_gradient():
        return _renyi_loss(elbo, model, guide, args, kwargs, doubly_reparameterized=True)


def _renyi_loss(
    elbo: RenyiELBO,
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    doubly_reparameterized: bool = False,
) -> Tensor:
    """Li & Turner (2016), arXiv:1602.02311; alpha = 0 is the importance-weighted bound."""
    log_weights, surrogates, guide_traces = [], [], []
    for model_trace, guide_trace in internals.elbo_traces(elbo, model, guide, args, kwargs):
        log_weight, surrogate = _log_weight_and_surrogate(elbo.alpha, model_trace, guide_trace)
        log_weights.append(log_weight)
        surrogates.append(surrogate)
        guide_traces.append(guide_trace)
    vectorized = elbo.vectorize_particles and elbo.num_particles > 1
    scaled = (1 - elbo.alpha) * (log_weights[0] if vectorized else torch.stack(log_weights)).detach()
    bound = (scaled.logsumexp(0) - math.log(elbo.num_particles)) / (1 - elbo.alpha)
    weights = scaled.softmax(0)
    if doubly_reparameterized:
        for index, trace in enumerate(guide_traces):
            _weigh_gradients(trace, weights if vectorized else weights[index])
    surrogate = (weights * (surrogates[0] if vectorized else torch.stack(surrogates))).sum()
    return surrogate.detach() - surrogate - bound.sum()


def _log_weight_and_surrogate(
    alpha: float, model_trace: poutine.Trace, guide_trace: poutine.Trace
) -> tuple[Tensor, Tensor]:
    """log p − log q, summed over every plate that does not hold all sites, and what is differentiated in its place."""
    sum_dims = get_dependent_plate_dims(model_trace.nodes.values())
    log_weight: Any = 0.0
    surrogate: Any = 0.0
    for site in _samples(model_trace):
        log_prob = torch_sum(site["log_prob"], sum_dims)
        log_weight, surrogate = log_weight + log_prob, surrogate + log_prob
    for site in _samples(guide_trace):
        if isinstance(site["fn"], FlowMixture) and not site["fn"].has_rsample:
            raise ValueError(
                "RenyiELBO and IWELBO have no gradient for the weights of a mixture; use Trace_ELBO, which fit does by default"
            )
        log_prob = torch_sum(site["log_prob"], sum_dims)
        log_weight = log_weight - log_prob
        if not is_identically_zero(site["score_parts"].entropy_term):
            surrogate = surrogate - log_prob
        if not is_identically_zero(site["score_parts"].score_function):
            surrogate = surrogate + alpha / (1 - alpha) * log_prob
    return log_weight, surrogate


def _samples(trace: poutine.Trace) -> list[Any]:
    sites: list[Any] = list(trace.nodes.values())
    return [site for site in sites if site["type"] == "sample"]


def _weigh_gradients(guide_trace: poutine.Trace, weights: Tensor) -> None:
    """Weighs once more what flows back into each draw: the second factor of the doubly reparameterised gradient."""
    for site in _samples(guide_trace):
        if not (site["infer"].get("is_auxiliary") or is_subsample(site) or isinstance(site["fn"], LatentDelta)):
            raise ValueError(
                "IWELBO: the doubly reparameterised gradient needs a flow guide, and site "
                f"'{site['name']}' comes from another one; use gradient=\"total\""
            )
        value = site["value"]
        if site["infer"].get("is_auxiliary") and value.requires_grad:
            factor = weights.reshape(*weights.shape, *[1] * (value.dim() - weights.dim()))
            value.register_hook(functools.partial(torch.mul, factor))


def _graph_loss(elbo: TraceGraph_ELBO, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    value, surrogate = internals.loss_and_surrogate(elbo, model, guide, args, kwargs)
    return surrogate - (value + surrogate).detach()


def _by_method_of(kind: Any) -> Adapter:
    return lambda elbo, model, guide, args, kwargs: kind.differentiable_loss(elbo, model, guide, *args, **kwargs)


def _by_own_method(elbo: Any, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return elbo.differentiable_loss(model, guide, *args, **kwargs)


# The first kind that an ELBO is of decides. The Jit variants replace the methods of their parents by compiled ones.
_ADAPTERS: tuple[tuple[type[ELBO], Adapter], ...] = (
    (IWELBO, _importance_weighted_loss),
    (RenyiELBO, _renyi_loss),
    (TraceGraph_ELBO, _graph_loss),
    (TraceMeanField_ELBO, _by_method_of(TraceMeanField_ELBO)),
    (TraceEnum_ELBO, _by_method_of(TraceEnum_ELBO)),
    (Trace_ELBO, _by_method_of(Trace_ELBO)),
)


def _find_adapter(elbo: Any) -> Adapter:
    own = getattr(type(elbo), "differentiable_loss", None)
    for kind, adapter in _ADAPTERS:
        if isinstance(elbo, kind) and not _overrides(own, getattr(kind, "differentiable_loss", own)):
            return adapter
    if own is None:
        raise NotImplementedError(f"{type(elbo).__name__} has no differentiable loss")
    return _by_own_method


def _overrides(own: Any, inherited: Any) -> bool:
    """Whether a class from outside of Pyro has a method of its own."""
    return own is not inherited and not own.__module__.startswith("pyro.infer")
