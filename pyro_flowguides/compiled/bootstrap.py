"""A mass-covering objective: flow annealed importance sampling bootstrap."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ..checks import check_positive_integer
from ..guides.auto import AutoFlow
from ..model.annealing import Particles, anneal
from ..model.call import ModelCall
from ..model.sites import quiet_trace, subsampled_plate
from ..model.target import Target, value_and_score
from .losses import Prepared

# The buffer is filled with this part of its size before the first step.
FIRST_FILL = 1 / 8
FIRST_STEP_SIZE = 0.1
# A correction of a weight is cut at this value.
MAX_CORRECTION = 10.0
# The draws that tell how wide the guide is.
NUM_FOR_SCALE = 256


class FlowAnnealedBootstrap(Prepared):
    r"""The α-divergence of the posterior from a flow guide, on annealed draws with a replay buffer (FAB).

    .. math:: D_\alpha(p, q) \propto \int p(x)^\alpha q(x)^{1 - \alpha} \, dx

    With α = 2, the default, it is the variance of the importance weights p / q, infinite where the guide lacks a mode that the
    draws can reach; with α = 1 its gradient is that of KL(p, q). KL(q, p), which ``fit`` minimises otherwise, is content with one
    mode. Every ``num_updates`` steps, ``num_draws`` draws of the guide are taken towards :math:`g = p^\alpha q^{1 - \alpha}` by
    annealed importance sampling with Hamiltonian Monte Carlo, whose step sizes are adapted, and put into a buffer with their
    weights w. A step draws ``num_draws`` points of the buffer, in proportion to w, and minimises

    .. math:: -\frac1N \sum_n c_n \log q(x_n), \qquad c_n = \left(\frac{q_\text{then}(x_n)}{q(x_n)}\right)^{\alpha - 1} \le 10,

    where c corrects for what the guide has become since the point was weighed, and then is multiplied into its weight.

    It goes to ``fit(loss=)`` and :class:`pyro_flowguides.CompiledSVI`. Give the guide a wide start, ``whiten=None`` and
    ``init_scale=``: whitening moves it to one mode. In many dimensions start from a guide that covers the modes roughly, such
    as a tempered fit, and lower the learning rate: the weights of a poor guide are those of a few points. Annealing runs
    eagerly, outside of the captured step, and takes most of the time: ``num_intermediate · num_hmc_steps · num_leapfrog_steps``
    gradients of model and guide for ``num_draws`` draws each. The buffer is part of the state of a training, so that a
    checkpoint resumes exactly. Parameters of the model are not trained.

    Arguments:
        num_draws: The number N of draws of a step, and of an annealing.
        num_intermediate: The number of densities between q and g.
        num_hmc_steps: The number of Hamiltonian steps at each of them.
        num_leapfrog_steps: The number of leapfrog steps in each of these.
        buffer_size: The number of points that are kept, the newest ones; an eighth is filled before the first step.
        num_updates: The number of steps from one annealing to the next.
        alpha: The α of the divergence, at least 1.

    Raises:
        TypeError: at the first step, if the guide is no :class:`AutoFlow`, whose density is known at any point.
        ValueError: if a number is wrong; at the first step, if the model cannot be run on many draws at once, if it subsamples
            data, or if no draw has a finite weight; at a later one, if the arguments are others (``batches``).

    References:
        Midgley, Stimper, Simm, Schölkopf & Hernández-Lobato (2023), *Flow annealed importance sampling bootstrap*,
        arXiv:2208.01893.
    """

    def __init__(
        self,
        num_draws: int = 256,
        *,
        num_intermediate: int = 2,
        num_hmc_steps: int = 1,
        num_leapfrog_steps: int = 5,
        buffer_size: int = 16_384,
        num_updates: int = 8,
        alpha: float = 2.0,
    ) -> None:
        name = type(self).__name__
        self.num_draws = check_positive_integer(name, "num_draws", num_draws)
        self.num_intermediate = check_positive_integer(name, "num_intermediate", num_intermediate)
        self.num_hmc_steps = check_positive_integer(name, "num_hmc_steps", num_hmc_steps)
        self.num_leapfrog_steps = check_positive_integer(name, "num_leapfrog_steps", num_leapfrog_steps)
        self.buffer_size = check_positive_integer(name, "buffer_size", buffer_size)
        self.num_updates = check_positive_integer(name, "num_updates", num_updates)
        if buffer_size < num_draws:
            raise ValueError(f"{name}: buffer_size must be at least num_draws = {num_draws}, got {buffer_size}")
        if not alpha >= 1:
            raise ValueError(f"{name}: alpha must be at least 1, got {alpha!r}")
        self.alpha = float(alpha)
        # Model, guide and arguments that the buffer belongs to.
        self._owner: tuple[Any, ...] = ()
        self._num_added, self._step = 0, -1

    def loss(
        self,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        x: Tensor,
        corrections: Tensor,
    ) -> Tensor:
        assert isinstance(guide, AutoFlow)
        return -(corrections * guide.log_prob(x)).mean()

    # --- before a step ---------------------------------------------------------------------------------------------------

    def inputs(
        self, step: int, like: Tensor, model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        """Points of the buffer and their corrections."""
        with pyro.validation_enabled(False), poutine.block():
            owner = (model, guide, *args, *kwargs.values())
            if not self._owner or self._owner[1] is not guide:
                self._begin(ModelCall(model, args, kwargs), guide)
                self._owner = owner
            elif len(owner) != len(self._owner) or any(a is not b for a, b in zip(owner, self._owner, strict=True)):
                raise ValueError(
                    f"{type(self).__name__}: the arguments are others than those of the first step; its buffer belongs to one "
                    "posterior, so that it takes no batches"
                )
            # A step that is prepared twice is the same step.
            if step != self._step:
                if step % self.num_updates == 0:
                    self._anneal()
                self._batch = self._sample()
                self._step = step
        return self._batch

    def _begin(self, call: ModelCall, guide: Callable) -> None:
        name = type(self).__name__
        if not isinstance(guide, AutoFlow):
            raise TypeError(
                f"{name}: the guide must be an AutoFlow, such as AutoCoupling(model), whose density is known at any point, got "
                f"{type(guide).__name__}"
            )
        guide.setup(*call.args, **call.kwargs)
        with quiet_trace():
            trace = poutine.trace(call).get_trace()
        if plate := subsampled_plate(trace):
            raise ValueError(
                f"{name}: plate '{plate}' subsamples its data, and the density must be that of all of them"
            )
        with warnings.catch_warnings():
            # It is an error here.
            warnings.simplefilter("ignore")
            self._target = Target(call, guide.latents, vectorize=None)
        if not self._target.runs_together:
            raise ValueError(
                f"{name}: the model can neither be run on many draws at once nor be recorded, and draw by draw it would take "
                "too long; see docs/how_to/vectorise.md"
            )
        self._guide = guide
        self._fill()

    def begin_anew(self) -> None:
        """Fills the buffer anew."""
        if self._owner:
            with pyro.validation_enabled(False), poutine.block():
                self._fill()

    def _fill(self) -> None:
        guide = self._guide
        loc = guide.latents.init_loc
        self._points = loc.new_zeros(self.buffer_size, guide.latent_dim)
        # For each point: its log weight, and log q when it was weighed.
        self._log_weights, self._log_q = loc.new_full((2, self.buffer_size), -torch.inf)
        self._step_sizes = loc.new_full((self.num_intermediate,), FIRST_STEP_SIZE)
        self._num_added, self._step = 0, -1
        while self._num_added < max(FIRST_FILL * self.buffer_size, self.num_draws):
            self._anneal()
        if not bool(self._log_weights.isfinite().any()):
            raise ValueError(
                f"{type(self).__name__}: no draw of the guide has a finite weight; give it another start by init_loc_fn"
            )

    def _evaluate(self, x: Tensor) -> Particles:
        log_q, score_q = value_and_score(self._guide.log_prob, x)
        log_p, score_p = value_and_score(self._target.log_prob, x)
        log_p = log_p.to(log_q)
        alpha = self.alpha
        log_g, score_g = alpha * log_p + (1 - alpha) * log_q, alpha * score_p + (1 - alpha) * score_q
        return Particles(x, log_q, log_g, score_q, score_g)

    @torch.no_grad()
    def _anneal(self) -> None:
        """Takes draws of the guide to g, and puts them into the buffer in the place of the oldest."""
        posterior = self._guide.get_posterior()
        # Draws of their own: a step that depended on the particles would bias them.
        scale = posterior.sample(torch.Size([NUM_FOR_SCALE])).std(0)
        start = self._evaluate(posterior.sample(torch.Size([self.num_draws])))
        end, log_weights, self._step_sizes = anneal(
            start, self._evaluate, self._step_sizes, scale, self.num_hmc_steps, self.num_leapfrog_steps
        )
        places = torch.arange(self._num_added, self._num_added + self.num_draws, device=scale.device) % self.buffer_size
        self._points[places], self._log_weights[places], self._log_q[places] = end.x, log_weights, end.log_q
        self._num_added += self.num_draws

    @torch.no_grad()
    def _sample(self) -> tuple[Tensor, Tensor]:
        """Points in proportion to their weights, with their corrections, which become part of the weights."""
        weights = self._log_weights.softmax(0)
        chosen = torch.multinomial(weights, self.num_draws, replacement=True)
        x = self._points[chosen]
        log_q = self._guide.log_prob(x)
        log_correction = (1 - self.alpha) * (log_q - self._log_q[chosen])
        # A point where the guide has no density any more is not drawn again.
        log_correction = torch.where(log_correction.isfinite(), log_correction, -torch.inf)
        # A point that was chosen twice is corrected once: both of its values are the same.
        self._log_weights[chosen] = self._log_weights[chosen] + log_correction
        self._log_q[chosen] = log_q
        return x, log_correction.exp().clamp(max=MAX_CORRECTION)

    # --- state -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The buffer and the step sizes."""
        names = ("_points", "_log_weights", "_log_q", "_step_sizes", "_num_added", "_step", "_batch")
        return {name.strip("_"): getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a :meth:`state_dict`."""
        for name, value in state.items():
            setattr(self, f"_{name}", _on(self._points.device, value))


def _on(device: torch.device, value: Any) -> Any:
    """A tensor, or several, on a device."""
    if isinstance(value, (tuple, list)):
        return tuple(_on(device, each) for each in value)
    return value.to(device) if isinstance(value, Tensor) else value
