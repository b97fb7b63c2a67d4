"""Losses as tensors: the loss of every Pyro ELBO with its gradient attached, and the importance-weighted bound.

Pyro's ELBOs hand out floats and call ``backward`` themselves, which waits for the device and cannot be captured. Here each of
them is one scalar tensor whose value is the loss and whose gradient is that of the estimator.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList
from pyro.infer.elbo import ELBO
from pyro.infer.util import get_dependent_plate_dims, torch_sum
from torch import Tensor

from .. import internals
from ..guides.amortized import AmortizedFlow
from ..guides.auto import AutoFlow

# The Jit variants replace these methods by compiled ones; what they compute is that of their parents.
_BY_METHOD: tuple[tuple[type[ELBO], Callable[..., Any]], ...] = (
    (TraceMeanField_ELBO, TraceMeanField_ELBO.differentiable_loss),
    (TraceEnum_ELBO, TraceEnum_ELBO.differentiable_loss),
    (Trace_ELBO, Trace_ELBO.differentiable_loss),
)


def differentiable_loss(loss: Any, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The loss of an ELBO of Pyro as a scalar with the gradient of the estimator.

    Raises:
        NotImplementedError: if this ELBO has no differentiable loss.
    """
    if isinstance(loss, RenyiELBO):
        return _renyi_loss(loss, model, guide, args, kwargs)
    if isinstance(loss, TraceGraph_ELBO):
        elbo, surrogate = internals.loss_and_surrogate(loss, model, guide, args, kwargs)
        return surrogate - (elbo + surrogate).detach()
    for kind, method in _BY_METHOD:
        if isinstance(loss, kind) and not _overrides(loss, kind):
            return method(loss, model, guide, *args, **kwargs)
    if hasattr(loss, "differentiable_loss"):
        return loss.differentiable_loss(model, guide, *args, **kwargs)
    if callable(loss) and not isinstance(loss, ELBO):
        return loss(model, guide, *args, **kwargs)
    raise NotImplementedError(f"{type(loss).__name__} has no differentiable loss")


def _overrides(loss: Any, kind: type[ELBO]) -> bool:
    """Whether a class from outside of Pyro has a differentiable loss of its own."""
    own = type(loss).differentiable_loss
    return not own.__module__.startswith("pyro.infer") and own is not kind.differentiable_loss  # type: ignore[attr-defined]


class IWELBO(RenyiELBO):
    r"""The importance-weighted bound of K draws, with its doubly reparameterised gradient.

    .. math:: \mathcal{L}_K = E\left[\log \frac1K \sum_{k=1}^K w_k\right], \qquad w_k = \frac{p(x_k)}{q(x_k)},
       \quad x_k \sim q,

    tighter than the ELBO, which is :math:`\mathcal{L}_1`, and exact for :math:`K \to \infty`. Where a plate holds all sites of
    the model, such as the data of a variational autoencoder, there is one bound for each of its elements.

    The plain gradient has a signal-to-noise ratio that falls with K. The doubly reparameterised one,
    :math:`\sum_k \tilde w_k^2\, \partial_x \log w_k \cdot \partial x_k` with normalised weights :math:`\tilde w`, has the
    same mean and does not; it needs a guide that can take the path gradient, as all flow guides of this library can. The
    gradient to the parameters of the model has weights :math:`\tilde w_k` in both.

    Arguments:
        num_particles: The number K of draws, at least 2.
        gradient: ``"doubly_reparameterized"``, or ``"total"`` for the plain one, which any reparameterised guide has.
        max_plate_nesting: As in Pyro's ELBOs.
        vectorize_particles: As in Pyro's ELBOs.

    Raises:
        ValueError: if K or the gradient is wrong; at the first step, if the guide cannot take the path gradient.

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
        loss = _renyi_loss(self, model, guide, args, kwargs)
        loss.backward()
        return float(loss.detach())


def _renyi_loss(loss: Any, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Li & Turner (2016), arXiv:1602.02311; alpha = 0 is the importance-weighted bound."""
    doubly = isinstance(loss, IWELBO) and loss.gradient == "doubly_reparameterized"
    if doubly and not has_path_gradient(guide):
        raise ValueError(
            f"IWELBO: the doubly reparameterised gradient needs a flow guide, which {type(guide).__name__} is not (or not in "
            'all of its parts); use gradient="total"'
        )
    log_weights, surrogates, guide_traces = [], [], []
    with path_gradient(guide) if doubly else contextlib.nullcontext():
        for model_trace, guide_trace in internals.elbo_traces(loss, model, guide, args, kwargs):
            log_weight, surrogate = _log_weight_and_surrogate(loss.alpha, model_trace, guide_trace)
            log_weights.append(log_weight)
            surrogates.append(surrogate)
            guide_traces.append(guide_trace)
    vectorized = loss.vectorize_particles and loss.num_particles > 1
    scaled = (1 - loss.alpha) * (log_weights[0] if vectorized else torch.stack(log_weights)).detach()
    bound = (scaled.logsumexp(0) - math.log(loss.num_particles)) / (1 - loss.alpha)
    weights = scaled.softmax(0)
    if doubly:
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
        value = site["value"]
        if site["infer"].get("is_auxiliary") and value.requires_grad:
            factor = weights.reshape(*weights.shape, *[1] * (value.dim() - weights.dim()))
            value.register_hook(functools.partial(torch.mul, factor))


FLOW_GUIDES = (AutoFlow, AmortizedFlow)


def flow_guides(guide: Callable) -> list[AutoFlow | AmortizedFlow]:
    """The flow guides in a guide, which is one of them, a list of guides, or none."""
    modules = guide.modules() if isinstance(guide, torch.nn.Module) else ()
    return [module for module in modules if isinstance(module, FLOW_GUIDES)]


def has_path_gradient(guide: Callable) -> bool:
    """Whether every part of a guide is a flow guide."""
    parts = list(guide) if isinstance(guide, AutoGuideList) else [guide]
    return all(isinstance(part, FLOW_GUIDES) for part in parts)


@contextlib.contextmanager
def path_gradient(guide: Callable) -> Iterator[None]:
    """Lets the flow guides in a guide use the path gradient for a while."""
    parts = flow_guides(guide)
    previous = [part.gradient for part in parts]
    for part in parts:
        part.gradient = "path"
    try:
        yield
    finally:
        for part, gradient in zip(parts, previous, strict=True):
            part.gradient = gradient
