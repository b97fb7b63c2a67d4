r"""Continuous flows: points follow a vector field from t = 0 to t = 1.

.. math::

    \frac{dx}{dt} = f(t, x), \qquad x(0) = z, \qquad
    \log|\det J| = \int_0^1 \operatorname{tr} \frac{\partial f}{\partial x}\, dt .

A smooth field makes a bijection whatever its parameters; the inverse follows it back. The score
:math:`s = \nabla \log q` obeys

.. math:: \frac{ds}{dt} = -\left(\frac{\partial f}{\partial x}\right)^{\!\top} s
    - \nabla \operatorname{tr} \frac{\partial f}{\partial x} .

Chen, Rubanova, Bettencourt & Duvenaud (2018), *Neural ordinary differential equations*, arXiv:1806.07366. Grathwohl et al.
(2019), *FFJORD*, arXiv:1810.01367. The score: Vaitl et al. (2022), arXiv:2206.09016.

**What a solver computes.** Point, log-determinant and score are integrated together by one method in steps of h. So log_det
is the integral of the trace by that method, not the log-determinant of the map that the steps make: the two differ by O(hᵖ)
(p = 4 for Runge–Kutta), and so does the score. :func:`ode_error` says how large that is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_positive_integer
from .base import FlowTransform
from .ode import ADAPTIVE_SOLVERS, FIXED_SOLVERS, AdaptiveSteps, FixedSteps, State, import_torchdiffeq
from .vector_fields import BoundField, DifferentiatedField, PlanarField, Time

# Corrections of the inverse. Each multiplies what is left by O(hᵖ).
_NUM_CORRECTIONS = 2

_collectors: list[list[Tensor]] = []


@contextmanager
def collect_penalties() -> Iterator[list[Tensor]]:
    """The penalties of all continuous flows that points are pushed through within, one number per point each."""
    penalties: list[Tensor] = []
    _collectors.append(penalties)
    try:
        yield penalties
    finally:
        _collectors.pop()


class Continuous(FlowTransform):
    r"""The flow of a vector field.

    With a fixed number of steps it is a plain graph: gradients are those of the steps that were taken, and a training step is
    captured, compiled and mapped like any other. The methods of torchdiffeq (``pip install 'pyro-flowguides[ode]'``) choose
    their steps; they are for checks and for stiff fields. A training step with them runs uncaptured, each of its steps waits
    for the device, and they do not work under ``torch.vmap``.

    **Cost.** One evaluation of the field per stage: ``num_steps`` times 4 for ``"rk4"``, 2 for ``"midpoint"``, 1 for
    ``"euler"``. The trace and the score of :class:`~pyro_flowguides.transforms.PlanarField` and
    :class:`~pyro_flowguides.transforms.SylvesterField` are closed forms, O(DM). Those of any other field take D vector-Jacobian
    products (``trace="exact"``) or one (``"hutchinson"``). The inverse costs 6 solves.

    **Inverse.** It follows the field back, then corrects what the steps there and back leave, so that it is the inverse of
    the steps themselves. A point that the corrections do not settle, since the steps are far too long for the field, comes
    back as NaN. A solver of torchdiffeq follows the field back to its tolerance.

    **Hutchinson.** The trace is :math:`v^\top J v` for a vector v of random signs, one per point, the same through a solve. It is
    right on average; log_det is random then (``stochastic_log_det``) and must not enter importance weights, k-hat or an
    accept-reject step. Under ``torch.vmap`` it needs ``randomness="different"``.

    **Regularisation.** ``kinetic`` and ``jacobian`` are the weights of :math:`\int \|f\|^2 dt` and
    :math:`\int \|\partial f / \partial x\|_F^2 dt`, which keep paths straight and fields easy to solve. Their gradient is
    added to that of a draw's log q (:class:`pyro_flowguides.NormalizingFlow`), their value is not: ELBO and weights stay what
    they are. Finlay, Jacobsen, Nurbekyan & Oberman (2020), *How to train your neural ODE*, arXiv:2002.02798.

    Arguments:
        dim: The number D of coordinates.
        field: The vector field: one of this library, or a module of your own with ``forward(t, x)``, of a number and points to
            velocities of the same shape, smooth and with at most linear growth. With an attribute ``context_dim`` above 0 it is
            called as ``forward(t, x, context)``.
        solver: ``"rk4"``, ``"midpoint"`` or ``"euler"`` with fixed steps; ``"dopri5"``, ``"dopri8"``, ``"bosh3"`` or
            ``"adaptive_heun"`` of torchdiffeq.
        num_steps: The number of fixed steps.
        trace: ``"exact"``, or ``"hutchinson"`` for a field without a closed form.
        generator: The source of Hutchinson's signs; torch's default one if None.
        kinetic, jacobian: The weights of the regularisation.
        rtol, atol: The tolerances of a solver of torchdiffeq.
        adjoint: Whether a solver of torchdiffeq gets its gradient from the adjoint equation, solved backwards. It needs no memory
            for the steps. It is not recommended: the gradient is not that of the steps that were taken, and grows wrong unnoticed
            where the way back is unstable; it also takes longer.

    Raises:
        ValueError: if an option is unknown or does not go with the others, or the field has another ``dim``.
        ImportError: if the solver needs torchdiffeq and it is not installed.

    Example:
        >>> from pyro_flowguides.transforms import PlanarField
        >>> flow = Continuous(3, PlanarField(3, num_units=8))
        >>> x, log_det = flow.forward_and_log_det(torch.randn(5, 3))
        >>> z, _ = flow.inverse_and_log_det(x)
    """

    def __init__(
        self,
        dim: int,
        field: nn.Module,
        *,
        solver: str = "rk4",
        num_steps: int = 8,
        trace: str = "exact",
        generator: torch.Generator | None = None,
        kinetic: float = 0.0,
        jacobian: float = 0.0,
        rtol: float = 1e-6,
        atol: float = 1e-6,
        adjoint: bool = False,
    ) -> None:
        super().__init__(dim, getattr(field, "context_dim", 0))
        if getattr(field, "dim", dim) != dim:
            raise ValueError(f"Continuous: dim is {dim}, and the field has dim = {field.dim}")
        if trace not in ("exact", "hutchinson"):
            raise ValueError(f'Continuous: trace must be "exact" or "hutchinson", got {trace!r}')
        if trace == "hutchinson" and isinstance(field, PlanarField):
            raise ValueError(
                f"Continuous: the trace of {type(field).__name__} has a closed form that costs less than an estimate; leave "
                "trace out"
            )
        if min(kinetic, jacobian) < 0:
            raise ValueError(
                f"Continuous: kinetic and jacobian must be at least 0, got kinetic = {kinetic}, jacobian = {jacobian}"
            )
        self.steps: FixedSteps | AdaptiveSteps
        if solver in FIXED_SOLVERS:
            if adjoint:
                raise ValueError(
                    f"Continuous: adjoint goes with {', '.join(map(repr, ADAPTIVE_SOLVERS))}, not with {solver!r}"
                )
            self.steps = FixedSteps(solver, check_positive_integer("Continuous", "num_steps", num_steps))
        elif solver in ADAPTIVE_SOLVERS:
            import_torchdiffeq(solver)
            self.steps = AdaptiveSteps(solver, rtol, atol, adjoint)
        else:
            known = ", ".join(map(repr, FIXED_SOLVERS + ADAPTIVE_SOLVERS))
            raise ValueError(f"Continuous: solver must be one of {known}, got {solver!r}")
        self.field = field
        self.trace = trace
        self.generator = generator
        self.kinetic, self.jacobian = kinetic, jacobian

    @property
    def closed_inverse(self) -> bool:
        return False

    @property
    def stochastic_log_det(self) -> bool:
        return self.trace == "hutchinson"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, steps={self.steps}" + (", trace='hutchinson'" if self.trace != "exact" else "")

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = self._follow_with_rates(z, context, self._draw_probe(z))
        return x, log_det

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, log_det, score = self._follow_with_rates(z, context, self._draw_probe(z), score.expand_as(z).detach())
        return x, log_det, score.detach()

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        probe = self._draw_probe(x)
        if isinstance(self.steps, AdaptiveSteps):
            z, log_det = self._follow_with_rates(x, context, probe, backward=True)
            return z, log_det
        # With the steps there, F, and back, B, which undo each other up to O(h^p): z ← z + B(x) − B(F(z)).
        back = z = self._follow(x, context, backward=True)
        for _ in range(_NUM_CORRECTIONS):
            z = z + back - self._follow(self._follow(z, context), context, backward=True)
        there, log_det = self._follow_with_rates(z, context, probe)
        error = (there - x).detach().abs().amax(-1)
        settled = error <= torch.finfo(x.dtype).eps ** 0.5 * x.detach().abs().amax(-1).clamp(min=1.0)
        return torch.where(settled.unsqueeze(-1), z, torch.nan), torch.where(settled, -log_det, torch.nan)

    # --- solves -------------------------------------------------------------------------------------------------------

    def _bind(self, context: Tensor | None, probe: Tensor | None = None) -> BoundField:
        if isinstance(self.field, PlanarField):
            return self.field.bind(context)
        # A PyroModule looks its parameters up where it first needs them, which does not work within a derivative.
        for module in self.field.modules():
            for name, _ in module.named_parameters(recurse=False):
                getattr(module, name)
        field = self.field if context is None else lambda t, x: self.field(t, x, context)
        return DifferentiatedField(field, probe)

    def _draw_probe(self, z: Tensor) -> Tensor | None:
        if self.trace == "exact":
            return None
        signs = torch.randint(0, 2, z.shape, generator=self.generator, dtype=z.dtype, device=z.device)
        return 2 * signs - 1

    def _steps_for(self, context: Tensor | None) -> FixedSteps | AdaptiveSteps:
        if not (isinstance(self.steps, AdaptiveSteps) and self.steps.adjoint):
            return self.steps
        tensors = [*self.parameters(), *([] if context is None else [context])]
        return replace(self.steps, parameters=tuple(tensor for tensor in tensors if tensor.requires_grad))

    def _bound_once(self, context: Tensor | None, probe: Tensor | None = None) -> Callable[[], BoundField]:
        """The field at a context, computed once; the adjoint equation differentiates what is computed at each time."""
        if isinstance(self.steps, AdaptiveSteps) and self.steps.adjoint:
            return lambda: self._bind(context, probe)
        bound = self._bind(context, probe)
        return lambda: bound

    def _follow(self, point: Tensor, context: Tensor | None, *, backward: bool = False) -> Tensor:
        """The point at the other end."""
        field = self._bound_once(context)
        (point,) = self._steps_for(context)(
            lambda t, state: (field().velocity(t, state[0]),), (point,), backward=backward
        )
        return point

    def _follow_with_rates(
        self,
        point: Tensor,
        context: Tensor | None,
        probe: Tensor | None,
        score: Tensor | None = None,
        *,
        backward: bool = False,
    ) -> State:
        """The point at the other end, log_det, and the score if there is one. A collector gets the penalty of a way there."""
        field = self._bound_once(context, probe)
        collects = bool(_collectors) and max(self.kinetic, self.jacobian) > 0 and not backward

        def rates(t: Time, state: State) -> State:
            if score is None:
                result: State = field().rates(t, state[0])
            else:
                result = field().rates_with_score(t, state[0], state[2])
            return (*result, self._penalty_rate(field(), t, state[0], result[0])) if collects else result

        zeros = torch.zeros_like(point[..., 0])
        state = (point, zeros, *([] if score is None else [score]), *([zeros] if collects else []))
        state = self._steps_for(context)(rates, state, backward=backward)
        if collects:
            _collectors[-1].append(state[-1])
            state = state[:-1]
        return state

    def _penalty_rate(self, field: BoundField, t: Time, x: Tensor, velocity: Tensor) -> Tensor:
        rate = self.kinetic * velocity.square().sum(-1)
        return rate + self.jacobian * field.squared_norm(t, x) if self.jacobian else rate


class OdeError(NamedTuple):
    """What the steps of continuous flows leave, against steps of half the size, over some points.

    Attributes:
        x: The largest difference of a coordinate.
        log_det: The mean absolute difference of log_det.
    """

    x: float
    log_det: float


def is_continuous(transform: nn.Module) -> bool:
    """Whether a transform is or holds a continuous flow."""
    return any(isinstance(module, Continuous) for module in transform.modules())


@torch.no_grad()
def ode_error(transform: FlowTransform, z: Tensor, context: Tensor | None = None) -> OdeError:
    r"""The error of discretisation of all continuous flows in a transform, at given points.

    Each point is pushed forward twice: as always, and with half the step (a hundredth of the tolerances for a solver of
    torchdiffeq). For a method of order p the difference is :math:`1 - 2^{-p}` of the error. The error of log_det is one of
    log q: it biases the ELBO, and spreads the importance weights.

    Arguments:
        transform: A :class:`Continuous`, or a transform that holds some.
        z: Points, shape ``batch_shape + (dim,)``; draws of the base distribution.
        context: The context, if the transform takes one.

    Raises:
        ValueError: if there is no continuous flow in the transform.
    """
    if not is_continuous(transform):
        raise ValueError(f"ode_error: there is no continuous flow in this {type(transform).__name__}")
    results = []
    for is_finer in (False, True):
        # A copy, whose generators of signs go on from the same state.
        solved = copy.deepcopy(transform)
        for module in solved.modules():
            if isinstance(module, Continuous) and is_finer:
                module.steps = module.steps.finer()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            results.append(solved.forward_and_log_det(z, context))
    (x, log_det), (finer_x, finer_log_det) = results
    return OdeError(float((x - finer_x).abs().max()), float((log_det - finer_log_det).abs().mean()))
