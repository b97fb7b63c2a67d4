r"""Coupling transforms: some coordinates pass unchanged and decide how the others are transformed.

With the coordinates split into A (kept) and B (changed), and a scalar function f applied to B,

.. math:: x_A = z_A, \qquad x_B = f(z_B; \theta(z_A)), \qquad \log|\det J| = \sum_{i \in B} \log f'(z_i; \theta_i(z_A)).

Invertible whenever f is increasing, at the same cost in both directions: O(D·H) for hidden layers of width H. The score goes
through with a division and one vector-Jacobian product of the network. Dinh et al. (2015), *NICE*, arXiv:1410.8516; Dinh et
al. (2017), *Density estimation using Real NVP*, arXiv:1605.08803.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import FlowTransform
from .networks import MLP, DampedNetwork, FreeParameters, ScalarState
from .numerics import Recomputed, value_and_pull_back
from .univariate import MixtureOfLogistics, RationalQuadraticSpline, Shift, ShiftScale, Univariate

# How far the network of a damped coupling sees: in standard deviations, where its inputs have about unit scale.
REACH = 3.0


class Coupling(ScalarState, FlowTransform):
    r"""The coupling structure over any scalar function.

    For ``dim = 1`` there is nothing to condition on, and the parameters are free (or depend on the context alone).

    Damping keeps a stack of couplings stable when a guide that starts far too narrow is trained at a high learning rate. All
    couplings widen such a guide together. Every layer pushes outlying draws further, and one gradient at such a draw
    inflates Adam's second moment for about a thousand steps. A damped coupling differs in two ways:

    - its network sees :math:`z_A / \sqrt{1 + (z_A/r)^2}` with the reach :math:`r = 3` in place of :math:`z_A`. Its outputs
      no longer grow with a point far out, so a stack of couplings cannot amplify an outlying point layer by layer;
    - its network moves 8 times less in a step of the optimizer, see :class:`~pyro_flowguides.transforms.networks.DampedNetwork`.

    A guide that starts at a Gaussian fitted to the posterior needs no damping, and the tails of a posterior want networks
    without limits: :func:`undamp` switches damping off. Both numbers are buffers, so that ``state_dict()`` alone determines
    the function.

    Arguments:
        dim: The number D of coordinates.
        univariate: The scalar function, see :mod:`pyro_flowguides.transforms.univariate`.
        mask: Which coordinates are kept: ``"half"`` (the first D // 2), ``"checkerboard"`` (every second one) or a boolean
            tensor of shape (D,), True where a coordinate is kept.
        flip: Keep the others instead.
        hidden_dims: The hidden layers of the network.
        activation: Makes the activation module of the network.
        context_dim: The size of the context, a further input of the network; 0 for none.
        damped: Whether the coupling starts damped.
        conditioner: A network of your own in place of the fully connected one. It maps the kept coordinates, with the
            context after them, to the parameters of the others: first parameter 0 of each of them, then parameter 1, …. It
            must start at 0 for the coupling to start as the identity.

    Raises:
        ValueError: if the mask is unknown, of the wrong shape, or keeps every coordinate.
    """

    reach: Tensor
    _reach: float
    order: Tensor
    order_back: Tensor

    def __init__(
        self,
        dim: int,
        univariate: Univariate,
        *,
        mask: str | Tensor = "half",
        flip: bool = False,
        hidden_dims: Sequence[int] = (32, 32),
        activation: Callable[[], nn.Module] = nn.SiLU,
        context_dim: int = 0,
        damped: bool = False,
        conditioner: nn.Module | None = None,
    ) -> None:
        super().__init__(dim, context_dim)
        self.univariate = univariate
        self.set_scalar("reach", REACH if damped else math.inf)
        kept = _kept_coordinates(dim, mask, flip)
        order = torch.cat([kept.nonzero().squeeze(-1), (~kept).nonzero().squeeze(-1)])
        self.num_kept = int(kept.sum())
        self.num_changed = dim - self.num_kept
        self.register_buffer("order", order)
        self.register_buffer("order_back", order.argsort())
        # Two slices are views; an index is a copy.
        self.kept_first = bool(kept[: self.num_kept].all())
        self.kept_last = bool(kept[self.num_changed :].all())
        out_features = self.num_changed * univariate.num_parameters
        self.conditioner: nn.Module
        if conditioner is not None:
            self.conditioner = conditioner
        elif self.num_kept:
            self.conditioner = MLP(self.num_kept + context_dim, out_features, hidden_dims, activation, damped)
        else:
            self.conditioner = FreeParameters(torch.zeros(out_features), context_dim, hidden_dims)

    @property
    def damped(self) -> bool:
        """Whether damping is on."""
        return self._reach < math.inf

    @property
    def closed_inverse(self) -> bool:
        return self.univariate.closed_inverse

    def _split(self, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.kept_last:
            return value[..., self.num_changed :], value[..., : self.num_changed]
        if not self.kept_first:
            value = value.index_select(-1, self.order)
        return value[..., : self.num_kept], value[..., self.num_kept :]

    def _join(self, kept: Tensor, changed: Tensor) -> Tensor:
        if self.kept_last:
            return torch.cat([changed, kept], -1)
        value = torch.cat([kept, changed], -1)
        return value if self.kept_first else value.index_select(-1, self.order_back)

    def _univariate_parameters(self, kept: Tensor, context: Tensor | None) -> Tensor:
        if not self.num_kept:
            outputs = self.conditioner(context)
        else:
            if self.damped:
                kept = kept * torch.rsqrt(1 + (kept / self._reach).square())
            if context is not None:
                kept = torch.cat([kept, context.expand(*kept.shape[:-1], -1)], -1)
            outputs = self.conditioner(kept)
        return outputs.reshape(*outputs.shape[:-1], self.univariate.num_parameters, self.num_changed).mT

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, changed = self._split(z)
        changed, log_derivative = self.univariate.forward(changed, self._univariate_parameters(kept, context))
        return self._join(kept, changed), log_derivative.expand_as(changed).sum(-1)

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, changed = self._split(x)
        changed, log_derivative = self.univariate.inverse(changed, self._univariate_parameters(kept, context))
        return self._join(kept, changed), log_derivative.expand_as(changed).sum(-1)

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        kept, changed = self._split(z)
        parameters, pull_back_network = value_and_pull_back(
            lambda point: self._univariate_parameters(point, context), kept
        )
        (changed, log_derivative), pull_back = value_and_pull_back(self.univariate.forward, changed, parameters)
        with torch.no_grad():
            score_kept, score_changed = self._split(score)
            ones = torch.ones_like(log_derivative)
            log_det_gradient = pull_back((torch.zeros_like(changed), ones))[0]
            score_changed = (score_changed - log_det_gradient) * (-log_derivative).exp()
            # d(x_B·s_x + log_det) through the parameters: what J^{-T} takes from the kept half.
            parameters_gradient = pull_back((score_changed.expand_as(changed), ones))[1]
            score_kept = score_kept - pull_back_network(parameters_gradient)[0]
            score = self._join(score_kept, score_changed)
        return self._join(kept, changed), log_derivative.expand_as(changed).sum(-1), score.detach()

    def recompute(self, result: Tensor, context: Tensor | None = None, *, inverse: bool = False) -> Recomputed:
        # The kept half is there already: the network runs once for both directions.
        functions = self.univariate.forward, self.univariate.inverse
        there, back = reversed(functions) if inverse else functions
        kept, changed = self._split(result.detach())
        with torch.enable_grad():
            kept = kept.detach().requires_grad_()
            parameters = self._univariate_parameters(kept, context)
            with torch.no_grad():
                changed, _ = back(changed, parameters)
            changed = changed.detach().requires_grad_()
            changed_again, log_derivative = there(changed, parameters)
            log_det = log_derivative.expand_as(changed_again).sum(-1)
            return Recomputed((kept, changed), (kept, changed_again), log_det, self._split, self._join)

    def extra_repr(self) -> str:
        damped = ", damped=True" if self.damped else ""
        return f"{super().extra_repr()}, kept={self.num_kept}, univariate={self.univariate}{damped}"


class AffineCoupling(Coupling):
    r"""Affine coupling (RealNVP): :math:`x_B = e^{s(z_A)} \odot z_B + t(z_A)`.

    The log-scale is clipped smoothly at its bound c, :math:`s = c\tanh(a/c)`.

    Arguments:
        dim: The number D of coordinates.
        log_scale_bound: The bound c of the log-scale.
        options: As in :class:`Coupling`.

    Example:
        >>> coupling = AffineCoupling(4, hidden_dims=(8,))
        >>> coupling
        AffineCoupling(
          dim=4, kept=2, univariate=ShiftScale(log_scale_bound=3.0)
          (conditioner): MLP(
            (layers): ModuleList(
              (0): Linear(in_features=2, out_features=8, bias=True)
              (1): SiLU()
              (2): Linear(in_features=8, out_features=4, bias=True)
            )
          )
        )
        >>> x, log_det = coupling.forward_and_log_det(torch.zeros(10, 4))
        >>> log_det.shape
        torch.Size([10])
    """

    def __init__(self, dim: int, *, log_scale_bound: float = 3.0, **options: Any) -> None:
        super().__init__(dim, ShiftScale(log_scale_bound), **options)


class AdditiveCoupling(Coupling):
    r"""Additive coupling (NICE): :math:`x_B = z_B + t(z_A)`; it preserves volume, log_det = 0.

    Arguments:
        dim: The number D of coordinates.
        options: As in :class:`Coupling`.
    """

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__(dim, Shift(), **options)


class SplineCoupling(Coupling):
    r"""Rational-quadratic spline coupling on :math:`[-B, B]`, the identity outside.

    Durkan et al. (2019), *Neural spline flows*, arXiv:1906.04032.

    Arguments:
        dim: The number D of coordinates.
        num_bins: The number of pieces of each spline.
        tail_bound: B, half the side of the box.
        options: As in :class:`Coupling`.
    """

    def __init__(self, dim: int, *, num_bins: int = 8, tail_bound: float = 5.0, **options: Any) -> None:
        super().__init__(dim, RationalQuadraticSpline(num_bins, tail_bound), **options)


class MixtureCoupling(Coupling):
    r"""Mixture coupling (Flow++): the logit of a mixture of logistic distribution functions, then an affine function.

    Ho et al. (2019), *Flow++*, arXiv:1902.00275; see
    :class:`~pyro_flowguides.transforms.univariate.MixtureOfLogistics`. The inverse solves one scalar equation per
    coordinate.

    Arguments:
        dim: The number D of coordinates.
        num_components: The number of components of each mixture, even.
        log_scale_bound: The bound of all log-scales.
        options: As in :class:`Coupling`.
    """

    def __init__(self, dim: int, *, num_components: int = 8, log_scale_bound: float = 2.0, **options: Any) -> None:
        super().__init__(dim, MixtureOfLogistics(num_components, log_scale_bound), **options)


def undamp(flow: nn.Module) -> None:
    """Switches damping off in all couplings of a flow, in place.

    The weights in use stay the same: what is stored is divided by the slowdown. So a flow that is still the identity stays
    the identity. A flow that has been trained becomes another map, since its networks see further.

    Arguments:
        flow: A coupling, or a module that contains couplings.
    """
    for module in flow.modules():
        if isinstance(module, Coupling) and module.damped:
            module.set_scalar("reach", math.inf)
            for network in module.conditioner.modules():
                if isinstance(network, DampedNetwork):
                    network.undamp()


def _kept_coordinates(dim: int, mask: str | Tensor, flip: bool) -> Tensor:
    """The boolean vector of the coordinates that pass unchanged."""
    if isinstance(mask, str):
        if mask == "half":
            kept = torch.arange(dim) < dim // 2
        elif mask == "checkerboard":
            kept = torch.arange(dim) % 2 == 1
        else:
            raise ValueError(f'Coupling: mask must be "half", "checkerboard" or a boolean tensor, got {mask!r}')
        # One coordinate can only be changed: flipping would make the layer an identity without parameters.
        return kept ^ (flip and dim > 1)
    if mask.shape != (dim,) or mask.dtype != torch.bool:
        raise ValueError(
            f"Coupling: a mask tensor must be boolean of shape ({dim},), got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    kept = mask.cpu() ^ flip
    if kept.all():
        raise ValueError("Coupling: the mask keeps every coordinate, so that nothing would be transformed")
    return kept
