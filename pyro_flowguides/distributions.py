"""Normalizing flows as distributions of Pyro."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor

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
