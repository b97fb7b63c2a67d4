"""``fit``: from a model and a guide to a fitted guide with its verdict, in one call."""

from __future__ import annotations

import contextlib
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from tqdm.auto import tqdm

from ..diagnostics.draws import draw_traced
from ..guides import AutoFlow
from ..tracing import Tracer, observed_sites, tensor_sites
from .result import FlowFit

NUM_STEPS = 1500
NUM_PARTICLES = 256
LEARNING_RATE = 1e-2
# Gradients are clipped at this multiple of the running mean of their norm.
CLIP_FACTOR = 2.0
MAX_SKIPPED = 50
NUM_FINAL_DRAWS = 10_000
# Without vectorisation every particle is a run of the model.
NUM_LOOPED_PARTICLES, NUM_LOOPED_DRAWS = 8, 1000

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
}


def fit(
    model: Callable,
    guide: Callable,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    num_steps: int | None = None,
    num_particles: int | None = None,
    optim: PyroOptim | Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    schedule: str | Callable[[float], float] | None = None,
    loss: ELBO | None = None,
    whiten: str | None = "auto",
    num_restarts: int = 1,
    seed: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    callbacks: Sequence[Callable[[int, float], bool | None]] = (),
    max_skipped: int | None = None,
    progress: bool = True,
) -> FlowFit:
    """Fits a guide to a model and judges the result.

    The defaults: whiten the guide, then 1500 steps of Adam at learning rate 1e-2 with a cosine to 0, on the path gradient of
    ``Trace_ELBO`` with 256 vectorised particles, gradients clipped at twice their running norm. A step whose loss or gradient
    is not finite changes nothing and is counted. An interrupt from the keyboard ends the training, and what was reached is
    returned.

    Arguments:
        model: A Pyro model.
        guide: A guide of this library, or any other Pyro guide; then there is nothing to whiten and the gradient is its own.
        args: The positional arguments of both.
        model_kwargs: The keyword arguments of both.
        num_steps: The number of steps.
        num_particles: The number of draws per step; not together with ``loss``, which has its own.
        optim: A Pyro optimiser, or a function from a list of parameters to a torch optimiser.
        schedule: What the learning rate is multiplied with: ``"cosine"`` or ``"constant"``, or a function of the progress
            from 0 to 1. By default cosine; none for a Pyro optimiser, which has schedulers of its own.
        loss: An ELBO of Pyro to use instead; the guide's own ``gradient`` setting then holds.
        whiten: The method of :meth:`pyro_flowguides.AutoFlow.whiten`, or None. ``"auto"`` leaves a trained guide alone, so that
            a second call continues the training.
        num_restarts: Must be 1; restarts are not available yet.
        seed: Seeds Pyro first, if given.
        checkpoint: Must be None; checkpoints are not available yet.
        checkpoint_every: As ``checkpoint``.
        resume: As ``checkpoint``.
        callbacks: Functions called as ``callback(step, loss)`` after each step; one that returns True ends the training.
        max_skipped: So many skipped steps in a row end the fit with an error; 50 by default.
        progress: Show a progress bar.

    Returns:
        The fitted guide with its draws, ELBO, k-hat and verdict.

    Raises:
        ValueError: if an argument is wrong, the data hold NaN, or the model has no finite log-probability at the start; the
            message names the site.
        RuntimeError: if ``max_skipped`` steps in a row had no finite loss or gradient.
        NotImplementedError: if an option is not available yet.
    """
    _refuse_what_is_to_come(num_restarts, checkpoint, checkpoint_every, resume)
    num_steps = _positive("num_steps", num_steps, NUM_STEPS)
    max_skipped = _positive("max_skipped", max_skipped, MAX_SKIPPED)
    if loss is not None and num_particles is not None:
        raise ValueError("fit: num_particles belongs to the default loss; give it to the loss instead")
    if isinstance(optim, PyroOptim) and schedule is not None:
        raise ValueError(
            "fit: a Pyro optimiser has its own schedulers, such as pyro.optim.ExponentialLR; leave schedule out"
        )
    if optim is not None and not callable(optim):
        raise TypeError(
            f"fit: optim must be a Pyro optimiser or a function from parameters to a torch optimiser, got {optim!r}"
        )
    factor = _schedule(schedule)
    kwargs = dict(model_kwargs or {})
    if seed is not None:
        pyro.set_rng_seed(seed)
    start = time.perf_counter()

    if isinstance(guide, AutoFlow):
        guide.setup(*args, **kwargs)
    tracer = Tracer(model, guide, args, kwargs)
    _check_start(tracer)
    if isinstance(guide, AutoFlow) and whiten is not None and not (whiten == "auto" and guide.is_trained()):
        guide.whiten(*args, method=whiten, model_kwargs=kwargs, vectorize=tracer.vectorizes)
    elif whiten not in ("auto", None) and not isinstance(guide, AutoFlow):
        raise ValueError(
            f"fit: whiten={whiten!r} needs a guide of this library; {type(guide).__name__} has no fixed map"
        )

    default_loss = loss is None
    if loss is None:
        num_particles = _positive(
            "num_particles", num_particles, NUM_PARTICLES if tracer.vectorizes else NUM_LOOPED_PARTICLES
        )
        loss = Trace_ELBO(
            num_particles=num_particles,
            vectorize_particles=tracer.vectorizes and num_particles > 1,
            max_plate_nesting=tracer.max_plate_nesting,
        )
    trainer = _Trainer(loss, model, guide, args, kwargs, optim, lambda step: factor(step / num_steps))
    with torch.no_grad():
        # Once with the user's validation: later on a step that is not finite is the guard's business.
        loss.loss(model, guide, *args, **kwargs)  # type: ignore[attr-defined]
    with _path_gradient(guide) if default_loss else contextlib.nullcontext(), pyro.validation_enabled(False):
        losses, num_skipped = _train(trainer, num_steps, max_skipped, callbacks, progress, tracer)
    draws = draw_traced(tracer, NUM_FINAL_DRAWS if tracer.vectorizes else NUM_LOOPED_DRAWS)
    return FlowFit(model, guide, args, kwargs, losses, num_skipped, time.perf_counter() - start, draws)


class _Trainer:
    """One step of training: loss, gradient, guard, clipping, update."""

    def __init__(
        self,
        loss: Any,
        model: Callable,
        guide: Callable,
        args: tuple,
        model_kwargs: dict[str, Any],
        optim: PyroOptim | Callable[[list[Tensor]], torch.optim.Optimizer] | None,
        learning_rate_factor: Callable[[int], float],
    ) -> None:
        self.loss = loss
        self.model, self.guide = model, guide
        self.args, self.model_kwargs = args, model_kwargs
        self.pyro_optim = optim if isinstance(optim, PyroOptim) else None
        self.make_optimizer: Callable[[list[Tensor]], Any] = optim or functools.partial(
            torch.optim.Adam, lr=LEARNING_RATE, foreach=True
        )
        self.learning_rate_factor = learning_rate_factor
        self.scheduler: torch.optim.lr_scheduler.LambdaLR | None = None
        self.norms = _RunningMean()

    def step(self) -> tuple[float, bool]:
        """The loss, and whether the parameters were updated."""
        with poutine.trace(param_only=True) as capture, warnings.catch_warnings():
            # The guard below is told of a NaN by its value.
            warnings.filterwarnings("ignore", "Encountered NaN", UserWarning)
            loss = self.loss.loss_and_grads(self.model, self.guide, *self.args, **self.model_kwargs)
        sites: list[Any] = list(capture.trace.nodes.values())
        # By identity, since a leaf may have two names; in the order of the names, so that a repeated run is the same run.
        leaves = [site["value"].unconstrained() for site in sorted(sites, key=lambda site: site["name"])]
        parameters = list({id(leaf): leaf for leaf in leaves}.values())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        updated = math.isfinite(loss) and math.isfinite(norm)
        if updated:
            # An outlier must not raise the bar for the next one.
            self.norms.add(min(norm, CLIP_FACTOR * self.norms.mean))
            torch.nn.utils.clip_grads_with_norm_(parameters, CLIP_FACTOR * self.norms.mean, torch.tensor(norm))
            self._update(parameters)
        pyro.infer.util.zero_grads(parameters)
        return float(loss), updated

    def _update(self, parameters: list[Tensor]) -> None:
        if self.pyro_optim is not None:
            self.pyro_optim(parameters)
            return
        if self.scheduler is None:
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.make_optimizer(parameters), self.learning_rate_factor
            )
        self.scheduler.optimizer.step()
        self.scheduler.step()


class _RunningMean:
    """An exponential mean over about 100 steps, without bias at its start."""

    def __init__(self, decay: float = 0.99) -> None:
        self.decay, self.total, self.weight = decay, 0.0, 0.0

    def add(self, value: float) -> None:
        self.total = self.decay * self.total + (1 - self.decay) * value
        self.weight = self.decay * self.weight + (1 - self.decay)

    @property
    def mean(self) -> float:
        """The mean so far; infinite before the first value that is not 0, since a bound of 0 would never be left."""
        return self.total / self.weight if self.total else math.inf


def _train(
    trainer: _Trainer,
    num_steps: int,
    max_skipped: int,
    callbacks: Sequence[Callable[[int, float], bool | None]],
    progress: bool,
    tracer: Tracer,
) -> tuple[np.ndarray, int]:
    """The losses of all steps and the number of skipped ones."""
    losses: list[float] = []
    num_skipped = in_a_row = 0
    recent = _RunningMean()
    description = type(trainer.guide).__name__
    with tqdm(total=num_steps, disable=not progress, desc=description, mininterval=0.5) as bar:
        try:
            for step in range(num_steps):
                loss, updated = trainer.step()
                losses.append(loss)
                in_a_row = 0 if updated else in_a_row + 1
                num_skipped += not updated
                if in_a_row >= max_skipped:
                    raise RuntimeError(
                        f"fit: {in_a_row} steps in a row had no finite loss or gradient, up to step {step}; "
                        + (
                            _first_site_without_density(tracer)
                            or "every site's log-probability is finite, its gradient is not"
                        )
                    )
                if updated:
                    recent.add(-loss)
                    bar.set_postfix(elbo=f"{recent.mean:.3f}", refresh=False)
                bar.update()
                stops = [callback(step, loss) for callback in callbacks]
                if any(stops):
                    break
        except KeyboardInterrupt:
            warnings.warn(f"fit: interrupted after {len(losses)} of {num_steps} steps", stacklevel=3)
    return np.array(losses), num_skipped


def _check_start(tracer: Tracer) -> None:
    """An error that names the site, if training could not even begin."""
    for name, site in observed_sites(tracer.model_prototype):
        missing = int(site["value"].isnan().sum()) if site["value"].is_floating_point() else 0
        if missing:
            raise ValueError(
                f"fit: observed site '{name}' holds {missing} NaN among its {site['value'].numel()} values; remove them, or "
                "put any valid number in their place and mask those with poutine.mask (a NaN has NaN gradients even masked)"
            )
    message = _first_site_without_density(tracer)
    if message:
        raise ValueError(f"fit: the ELBO is not finite at the start: {message}")


@torch.no_grad()
def _first_site_without_density(tracer: Tracer) -> str | None:
    """A sentence about the first site of a fresh draw whose log-probability is not finite."""
    with poutine.block(), pyro.validation_enabled(False):
        for guide_trace, model_trace, _ in tracer.traces(1):
            for owner, trace in (("model", model_trace), ("guide", guide_trace)):
                trace.compute_log_prob()
                for name, site in tensor_sites(trace):
                    if not math.isfinite(site["log_prob_sum"]):
                        return f"site '{name}' of the {owner} has log-probability {float(site['log_prob_sum'])}"
    return None


@contextlib.contextmanager
def _path_gradient(guide: Callable) -> Iterator[None]:
    """Lets a flow guide use the path gradient for a while."""
    if not isinstance(guide, AutoFlow):
        yield
        return
    previous, guide.gradient = guide.gradient, "path"
    try:
        yield
    finally:
        guide.gradient = previous


def _schedule(schedule: str | Callable[[float], float] | None) -> Callable[[float], float]:
    if schedule is None:
        return SCHEDULES["cosine"]
    if callable(schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise ValueError(
            f"fit: unknown schedule {schedule!r}; known are {', '.join(SCHEDULES)}, or a function of the progress"
        )
    return SCHEDULES[schedule]


def _positive(name: str, value: int | None, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"fit: {name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"fit: {name} must be at least 1, got {value}")
    return value


def _refuse_what_is_to_come(
    num_restarts: int, checkpoint: str | Path | None, checkpoint_every: int | None, resume: bool
) -> None:
    if num_restarts != 1:
        raise NotImplementedError("fit: num_restarts is not available yet; call fit with several seeds instead")
    if checkpoint is not None or checkpoint_every is not None or resume:
        raise NotImplementedError(
            "fit: checkpoint, checkpoint_every and resume are not available yet; save guide.state_dict() with torch.save"
        )
