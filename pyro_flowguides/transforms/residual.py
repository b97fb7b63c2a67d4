r"""Residual flows: a step along a vector field that is too weak to fold space.

.. math:: x = z + g(z), \qquad \log|\det J| = \log\det(I + J_g), \qquad \operatorname{Lip}(g) \le L < 1.

With L < 1 the map is a bijection: z is the fixed point of :math:`z \mapsto x - g(z)`. Behrmann et al. (2019),
*Invertible residual networks*, arXiv:1811.00995; Chen et al. (2019), *Residual flows for invertible generative
modeling*, arXiv:1906.02735.

The Jacobian of the network is a product that passes through hidden layers, :math:`J_g = PQ` with Q from z to a hidden
layer of H units and P from there to x. By the identities of Sylvester and Woodbury,

.. math:: \det(I_D + PQ) = \det(I_H + QP), \qquad (I_D + PQ)^{-1} = I_D - P (I_H + QP)^{-1} Q,

so that the exact determinant and the exact solves need a matrix of the size of the narrowest layer alone, input
included. With hidden layers of usual width this makes exact log-determinants affordable for every D, and the estimators
of the power series

.. math:: \log\det(I + J_g) = \sum_{k=1}^{\infty} \frac{(-1)^{k+1}}{k} \operatorname{tr} J_g^k

are only needed for networks that are wide throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_positive_integer
from .base import FlowTransform
from .networks import LipschitzMLP

_MODES = ("auto", "exact", "series", "hutchinson", "roulette")
# The roulette keeps this many terms of the series for every point.
_TERMS_BEFORE_ROULETTE = 4
# Newton steps of the inverse. 4 to 9 leave no residual for L = 0.97 and weights of any size; activations as sharp as a
# kink (β = 1e5) took 18.
_NEWTON_STEPS = 20


class Residual(FlowTransform):
    r"""The residual flow with a Lipschitz network g. Always invertible; with a context, invertible for every context.

    Cost per point, for layers of width H and :math:`m = \min(D, H)`: a forward pass of g, and for log_det

    - ``"exact"``: :math:`O(H^2 m + m^3)`, the determinant of an m × m matrix;
    - ``"series"``: :math:`O(H^2 m + K m^3)`, the first K terms of the power series with exact traces. Deterministic,
      with an error of at most :math:`m L^{K+1} / ((K+1)(1-L))`;
    - ``"hutchinson"``: O(K H (D + H)), the first K terms with the traces estimated by one Rademacher vector per point.
      Unbiased for the series of K terms, in its value and in its gradient;
    - ``"roulette"``: as before, and every point stops after a random number N of terms, term k counting
      :math:`1/P(N \ge k)` times (Chen et al. 2019). N is at most K: this too is unbiased for the series of K terms, not
      for the infinite one. All K terms are computed and masked, since a graph that is captured once cannot branch on N;
      it costs the same as ``"hutchinson"`` and can only be noisier;
    - ``"auto"``: ``"exact"`` for m up to ``exact_threshold``, else ``"hutchinson"``.

    The gradient of ``"hutchinson"`` and ``"roulette"`` is not the derivative of the estimated value but the Neumann
    series :math:`v^\top \sum_k (-J_g)^k\, \mathrm{d}J_g\, v`, which needs no graph through the powers; the value
    returned is still the estimate of log_det. Their log_det is random: ``stochastic_log_det`` is True. Such a log q is
    right on average as a loss, but must not enter importance weights, k-hat or an accept-reject step. Under
    ``torch.vmap`` they need ``randomness="different"``.

    The inverse takes Newton steps safeguarded by the fixed-point iteration (``"exact"`` and ``"series"``), or the
    fixed-point iteration alone, as often as the bound L needs for the last digit. The score is multiplied by J^{-T} by
    Woodbury's identity, or by the Neumann series to the last digit.

    Arguments:
        dim: The number D of coordinates.
        hidden_dims: The hidden layers of g.
        log_det: How log_det is computed, see above.
        lipschitz: The bound L of the Lipschitz constant of g, in (0, 1). Beyond 0.97 the inverse loses digits and the
            series converges slowly.
        num_terms: K; by default as many terms as bring :math:`L^{K+1} / ((K+1)(1-L))`, the error per dimension, below
            1e-3.
        exact_threshold: The largest m for which ``"auto"`` means ``"exact"``. On one core a training step at m = 128
            takes twice as long as with the estimator, at m = 400 six times as long; at m = 32 it is faster.
        context_dim: The size of the context, a further input of g; 0 for none.

    Raises:
        ValueError: if ``lipschitz`` is not in (0, 1) or ``log_det`` is unknown.

    Example:
        >>> residual = Residual(3)
        >>> x, log_det = residual.forward_and_log_det(torch.randn(5, 3))
        >>> z, _ = residual.inverse_and_log_det(x)
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden_dims: Sequence[int] = (32, 32),
        log_det: str = "auto",
        lipschitz: float = 0.9,
        num_terms: int | None = None,
        exact_threshold: int = 128,
        context_dim: int = 0,
    ) -> None:
        super().__init__(dim, context_dim)
        if not 0 < lipschitz < 1:
            raise ValueError(f"Residual: lipschitz must be in (0, 1) for the map to be invertible, got {lipschitz}")
        if log_det not in _MODES:
            raise ValueError(f"Residual: log_det must be one of {', '.join(map(repr, _MODES))}, got {log_det!r}")
        self.g = LipschitzMLP(dim, dim, hidden_dims, lipschitz=lipschitz, context_dim=context_dim)
        # The layer at which the product J_g is cut in two: 0 is the input.
        self.cut = min(range(len(self.g.sizes) - 1), key=self.g.sizes.__getitem__)
        if log_det == "auto":
            log_det = "exact" if self.g.sizes[self.cut] <= exact_threshold else "hutchinson"
        self.log_det = log_det
        self.lipschitz = lipschitz
        if num_terms is None:
            num_terms = _terms_for(lipschitz, 1e-3)
        self.num_terms = check_positive_integer("Residual", "num_terms", num_terms)

    @property
    def stochastic_log_det(self) -> bool:
        return self.log_det in ("hutchinson", "roulette")

    @property
    def closed_inverse(self) -> bool:
        return False

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        step, jacobian = self._linearize_g(z, context, self.g.normalized_weights())
        return z + step, self._log_det(jacobian, z)

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weights = self.g.normalized_weights()
        with torch.no_grad():
            solution = (self._solve_by_fixed_point if self.stochastic_log_det else self._solve_by_newton)(
                x, context, weights
            )
            _, jacobian = self._linearize_g(solution, context, weights)
        # One Newton step with the Jacobian held fixed: its value polishes the solution, its derivative is the implicit
        # one.
        residual = solution + self._linearize_g(solution, context, weights)[0] - x
        z = solution - self._solve(jacobian, residual)
        return z, -self._log_det(self._linearize_g(z, context, weights)[1], z)

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = self.g.normalized_weights()

        def log_det_of(point: Tensor) -> tuple[Tensor, tuple[Tensor, _Jacobian]]:
            step, jacobian = self._linearize_g(point, context, weights)
            return self._log_det(jacobian, point), (step, jacobian)

        log_det, pull_back, (step, jacobian) = torch.func.vjp(log_det_of, z, has_aux=True)  # type: ignore[misc]
        with torch.no_grad():
            (gradient,) = pull_back(torch.ones_like(log_det))
            score = self._solve(jacobian, (score - gradient).expand_as(z), transpose=True)
        return z + step, log_det, score.detach()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, log_det={self.log_det!r}, lipschitz={self.lipschitz}"

    def _linearize_g(self, point: Tensor, context: Tensor | None, weights: list[Tensor]) -> tuple[Tensor, _Jacobian]:
        step, slopes = self.g.linearize(point, context, weights)
        return step, _Jacobian(weights, slopes)

    # --- log_det ------------------------------------------------------------------------------------------------------

    def _log_det(self, jacobian: _Jacobian, z: Tensor) -> Tensor:
        if self.log_det == "exact":
            core = jacobian.core(self.cut)
            return torch.linalg.slogdet(core + torch.eye(core.shape[-1], dtype=core.dtype, device=core.device))[1]
        if self.log_det == "series":
            core = power = jacobian.core(self.cut)
            total = _trace(power)
            for k in range(2, self.num_terms + 1):
                power = power @ core
                total = total - (-1) ** k / k * _trace(power)
            return total
        return self._estimate_log_det(jacobian, z)

    def _estimate_log_det(self, jacobian: _Jacobian, z: Tensor) -> Tensor:
        with torch.no_grad():
            probe = torch.where(torch.rand_like(z) < 0.5, -1.0, 1.0).to(z.dtype)
            stop = torch.rand_like(z[..., 0])
            value, neumann, power = torch.zeros_like(stop), torch.zeros_like(z), probe
            for k in range(1, self.num_terms + 1):
                weight = -((-1.0) ** k) * self._term_weight(k, stop).unsqueeze(-1)
                neumann = neumann + weight * power
                power = jacobian.pull(power)
                value = value + (weight * power * probe).sum(-1) / k
        # The value of the one, the derivative of the other: only J_g v has a graph.
        surrogate = (neumann * jacobian.push(probe)).sum(-1)
        return value + surrogate - surrogate.detach()

    def _term_weight(self, k: int, stop: Tensor) -> Tensor:
        """1[N ≥ k] / P(N ≥ k). Surviving each term with probability L keeps the variance finite: L^{2k} / L^k."""
        if self.log_det == "hutchinson":
            return torch.ones_like(stop)
        survival = self.lipschitz ** max(k - _TERMS_BEFORE_ROULETTE, 0)
        return (stop < survival) / torch.full_like(stop, survival)

    # --- solves -------------------------------------------------------------------------------------------------------

    def _solve(self, jacobian: _Jacobian, vector: Tensor, transpose: bool = False) -> Tensor:
        """``(I + J_g)⁻¹ vector``, or with the transposed matrix."""
        apply = jacobian.pull if transpose else jacobian.push
        if self.stochastic_log_det:
            result = term = vector
            for _ in range(self._steps_to_the_last_digit(vector.dtype)):
                term = -apply(term)
                result = result + term
            return result
        core = jacobian.core(self.cut)
        matrix = core + torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
        if transpose:
            inner = jacobian.pull(vector, self.cut, None)
            return vector - jacobian.pull(_solve_general(matrix.mT, inner), 0, self.cut)
        inner = jacobian.push(vector, 0, self.cut)
        return vector - jacobian.push(_solve_general(matrix, inner), self.cut, None)

    def _solve_by_fixed_point(self, x: Tensor, context: Tensor | None, weights: list[Tensor]) -> Tensor:
        z = x
        for _ in range(self._steps_to_the_last_digit(x.dtype)):
            z = x - self._linearize_g(z, context, weights)[0]
        return z

    def _solve_by_newton(self, x: Tensor, context: Tensor | None, weights: list[Tensor]) -> Tensor:
        """Newton's method; where a step reduces the residual by less than L, a fixed-point step, which does, follows.

        The number of steps is fixed. A point whose residual does not come below ``sqrt(eps)·max(1, |x|)`` becomes NaN.
        """
        z = x
        residual, jacobian = self._linearize_g(z, context, weights)
        error = torch.linalg.vector_norm(residual, dim=-1, keepdim=True)
        plain = torch.zeros_like(error, dtype=torch.bool)
        for _ in range(_NEWTON_STEPS):
            trial = z - torch.where(plain, residual, self._solve(jacobian, residual))
            step, trial_jacobian = self._linearize_g(trial, context, weights)
            trial_residual = trial + step - x
            trial_error = torch.linalg.vector_norm(trial_residual, dim=-1, keepdim=True)
            accept = (trial_error <= self.lipschitz * error) | (plain & (trial_error < error))
            z = torch.where(accept, trial, z)
            residual = torch.where(accept, trial_residual, residual)
            error = torch.where(accept, trial_error, error)
            slopes = [
                torch.where(accept, new, old) for new, old in zip(trial_jacobian.slopes, jacobian.slopes, strict=True)
            ]
            jacobian = _Jacobian(weights, slopes)
            plain = ~accept
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1.0)
        return torch.where(error <= torch.finfo(x.dtype).eps ** 0.5 * size, z, torch.full_like(z, torch.nan))

    def _steps_to_the_last_digit(self, dtype: torch.dtype) -> int:
        """The smallest n with Lⁿ at most the rounding of the dtype."""
        return math.ceil(math.log(torch.finfo(dtype).eps) / math.log(self.lipschitz))


class _Jacobian(NamedTuple):
    """The Jacobian of g at a batch of points: a chain of weights with the slopes of the activations between them."""

    weights: list[Tensor]
    slopes: list[Tensor]

    def push(self, vector: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """The vectors at layer ``start`` mapped to layer ``stop`` (0 is the input, None the output)."""
        for layer in range(start, len(self.weights) if stop is None else stop):
            vector = vector @ self.weights[layer].mT
            if layer < len(self.slopes):
                vector = vector * self.slopes[layer]
        return vector

    def pull(self, vector: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """The transposed map, from layer ``stop`` to layer ``start``."""
        for layer in reversed(range(start, len(self.weights) if stop is None else stop)):
            if layer < len(self.slopes):
                vector = vector * self.slopes[layer]
            vector = vector @ self.weights[layer]
        return vector

    def core(self, cut: int) -> Tensor:
        """QP: once around the chain, from layer ``cut`` over the output, taken as the input, back to it."""
        first = self.weights[cut]
        basis = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device)
        # One basis vector per row. What comes before the first slope is the same for all points, and computed once.
        chain = _Jacobian(self.weights, [slope.unsqueeze(-2) for slope in self.slopes])
        return chain.push(chain.push(basis, cut, None), 0, cut).mT


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def _solve_general(matrix: Tensor, vector: Tensor) -> Tensor:
    """``matrix⁻¹ vector`` without the check for singular matrices, which would wait for the device: none is here."""
    return torch.linalg.solve_ex(matrix, vector.unsqueeze(-1))[0].squeeze(-1)


def _terms_for(lipschitz: float, error: float) -> int:
    """The number of terms of the series after which at most ``error`` per dimension is missing."""
    num_terms = 1
    while lipschitz ** (num_terms + 1) / ((num_terms + 1) * (1 - lipschitz)) > error:
        num_terms += 1
    return num_terms
