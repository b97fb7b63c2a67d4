"""``fit_density``: a flow that is fitted to data by maximum likelihood, in one call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyro
from torch import Tensor

from ..checks import check_positive_integer
from ..compiled.svi import MAX_NONFINITE_STEPS
from ..model.call import ModelCall
from ..model.ownership import private_store
from .checkpoint import Checkpoint, random_state, set_random_state
from .density import AnyFlow, Density, Units, context_scale_of, flow_and_base, gaussian_of, with_fixed_maps
from .density_fit import DensityFit
from .division import common_seed, find_division
from .fingerprint import describe_options
from .likelihood import MaximumLikelihood, Plan, Rows, no_latents, split
from .schedules import find_schedule
from .steps import OptimizerFactory, default_optimizer

NUM_STEPS = 3000
OWNER = "fit_density"


def fit_density(
    flow: AnyFlow,
    data: Any,
    *,
    context: Any = None,
    validation: Any = 0.1,
    num_levels: int | None = None,
    logit: float | None = None,
    whiten: str | None = "auto",
    num_steps: int | None = None,
    num_epochs: int | None = None,
    batch_size: int = 256,
    patience: int | None = 20,
    seed: int | None = None,
    progress: bool = True,
    optim: OptimizerFactory | None = None,
    schedule: str | Callable[[float], float] | None = None,
    backend: str = "auto",
    checkpoint: Checkpoint | str | Path | None = None,
    callbacks: Sequence[Callable[[int, float], bool | None]] = (),
    max_nonfinite_steps: int = MAX_NONFINITE_STEPS,
    distributed: bool = True,
) -> DensityFit:
    r"""Fits the density of data by maximum likelihood.

    .. math:: \max_\theta \frac1N \sum_n \log q_\theta(x_n), \qquad
        \log q_\theta(x) = \log q_0(z) + \log\left|\det \frac{\partial z}{\partial x}\right|,\quad z = f_\theta^{-1}(x).

    Without options: a tenth of the rows is held out. A fixed affine map whitens the others. Then come 3000 steps of Adam at
    learning rate 1e-2 with a cosine to 0, each on 256 rows, with the captured step and the guard of
    :func:`pyro_flowguides.fit`. About once in an epoch, and not more often than every 50 steps, the held-out rows are scored.
    The training ends when they have not become more likely in 20 looks. The fit has the parameters of the best look.

    A step inverts the flow. That is one pass for ``"coupling"``, ``"spline_coupling"``, ``"glow"``, ``"nice"`` and ``"maf"``, D
    passes for ``"iaf"``, and a numerical solution for ``"planar"``, ``"radial"``, ``"sylvester"`` and ``"residual"``, with exact
    gradients. Such a flow is cheaper the other way round, ``lambda dim: flows.planar(dim).inv``; then drawing is what is solved.

    **Data**

    Arguments:
        flow: The name of a recipe of :mod:`pyro_flowguides.flows`; a recipe, called as ``flow(dim)``, or as
            ``flow(dim, context_dim=C)``; a :class:`~pyro_flowguides.transforms.FlowTransform`; or a
            :class:`pyro_flowguides.NormalizingFlow`, whose base distribution stays fixed. A flow starts from the parameters it
            has; the fit trains a copy.
        data: The rows, shape ``(N, D)``, ``(N,)``, or ``(N, H, W)`` and ``(N, C, H, W)`` for images, whose shape draws have
            again. A tensor, whose dtype and device the fit has, an array, a frame or a list.
        context: What each row is conditioned on, shape ``(N, C)`` or ``(N,)``. It is standardised.
        validation: The fraction of the rows that is held out; or rows of their own, ``(x, context)`` with a context; or None.
        num_levels: The number K of levels, for data that are the integers 0, …, K − 1. Every step adds uniform noise to them,
            and the density is that of x + u.
        logit: For integers: the flow works on the logit of α + (1 − 2α)(x + u)/K with this α, such as 0.05, so that draws stay
            in range.
        whiten: The fixed affine map: ``"auto"`` for mean and covariance (for standard deviations above 200 dimensions),
            ``"diagonal"`` for standard deviations, None for none.

    **Steps**

    Arguments:
        num_steps: The number of steps.
        num_epochs: The number of passes over the rows, in place of ``num_steps``.
        batch_size: The number of rows in a step.
        patience: The number of looks at the held-out rows without a better one that ends the training; None for no end.
        seed: Seeds Pyro first, if given.
        progress: Whether to show a progress bar.
        optim: A function from a list of parameters to a torch optimiser.
        schedule: As in :func:`pyro_flowguides.fit`.
        backend: As in :func:`pyro_flowguides.fit`.
        checkpoint: As in :func:`pyro_flowguides.fit`; resumed with the same number of steps.
        callbacks: As in :func:`pyro_flowguides.fit`; each makes every step wait for the device.
        max_nonfinite_steps: As in :func:`pyro_flowguides.fit`.
        distributed: Whether the processes of ``torchrun``, if there are several, train together, each with batches of its own
            from the same data; see docs/how_to/distributed.md.

    Returns:
        The density, to draw from and to score rows with.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if an argument is wrong or cannot become a tensor; if the data hold NaN, a constant column, a column that is a
            linear function of others, integers without ``num_levels``, or too few rows; also if a checkpoint does not fit.
        RuntimeError: if ``max_nonfinite_steps`` steps in a row had no finite loss or gradient.

    References:
        Papamakarios et al. (2021), *Normalizing flows for probabilistic modeling and inference*, arXiv:1912.02762.

    Example:
        >>> import torch
        >>> import pyro_flowguides as fg
        >>> x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3.0])
        >>> fit = fg.fit_density("coupling", x, num_steps=20, seed=0, progress=False)
        >>> fit.sample(5).shape, fit.log_prob(x).shape
        (torch.Size([5, 2]), torch.Size([400]))
    """
    if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    division = find_division(OWNER, "data" if distributed else "independent", has_batches=True)
    if division is not None:
        same = {
            "seed": seed,
            "num_steps": num_steps,
            "num_epochs": num_epochs,
            "batch_size": batch_size,
            "the number of callbacks": len(callbacks),
            "the steps between checkpoints": checkpoint and checkpoint.every,
            "the data": [data, context, validation],
        }
        division.check_same(OWNER, describe_options(same))
        seed, checkpoint = common_seed(division, seed), division.checkpoint(checkpoint)
    num_steps = NUM_STEPS if num_steps is None and num_epochs is None else num_steps
    plan = Plan(
        num_steps=num_steps,
        num_epochs=num_epochs,
        batch_size=batch_size,
        patience=patience,
        optim=optim,
        schedule=schedule,
        progress=progress,
        backend=backend,
        checkpoint=checkpoint,
        callbacks=callbacks,
        max_nonfinite_steps=max_nonfinite_steps,
        division=division,
    )
    plan.check(OWNER)
    _check_options(num_levels, logit, whiten)
    data, context, validation = ModelCall.given(OWNER, _named, (data, context, validation)).args
    units, rows, validation = _rows(data, context, validation, num_levels, logit)
    belongs_to = {
        "data": rows.arguments,
        "validation": validation.arguments if isinstance(validation, Rows) else validation,
        "units": vars(units),
        "whiten": whiten,
        "num_steps": num_steps,
        "num_epochs": num_epochs,
        "batch_size": batch_size,
        "patience": patience,
        "optim": optim or default_optimizer(),
        "schedule": find_schedule(schedule),
        "seed": seed,
    }
    with division.quiet() if division else nullcontext(), checkpoint.reserved() if checkpoint else nullcontext():
        return _fit(flow, units, rows, validation, whiten, plan, seed, belongs_to)


def _fit(
    flow: AnyFlow,
    units: Units,
    rows: Rows,
    validation: Any,
    whiten: str | None,
    plan: Plan,
    seed: int | None,
    belongs_to: dict[str, Any],
) -> DensityFit:
    if seed is not None:
        pyro.set_rng_seed(seed)
    saved = None if plan.checkpoint is None else plan.checkpoint.load()
    if saved is not None and plan.checkpoint is not None:
        # The same rows are held out, with the same noise.
        with plan.checkpoint.used():
            set_random_state(saved["began"])
    began = random_state()
    train, held_out = _divide(rows, validation)
    made, base = flow_and_base(OWNER, flow, units)
    gaussian = gaussian_of(OWNER, train.continuous(), units, whiten)
    of_context = None if train.context is None else context_scale_of(train.context)
    density = copy.deepcopy(Density(base, with_fixed_maps(made, units, gaussian, of_context))).to(train.x)
    if plan.division is not None:
        density.load_state_dict(plan.division.processes.from_first(lambda: dict(density.state_dict())))
    # The last one: its fixed maps depend on the others.
    belongs_to = {**belongs_to, "flow": [repr(density.transform), dict(density.state_dict())]}

    def log_prob(x: Tensor, context: Tensor | None = None) -> Tensor:
        pyro.module("density", density)
        return density.log_prob(x, context)

    with private_store(log_prob, no_latents):
        training = MaximumLikelihood(OWNER, log_prob, train, held_out, plan, describe_options(belongs_to))
        training.run(saved, began={"began": began})
    return DensityFit(
        density=copy.deepcopy(density),
        units=units,
        train_losses=np.array(training.losses),
        validation_losses=np.array([loss for _, loss in training.looks]),
        validation_steps=np.array([step for step, _ in training.looks], dtype=np.int64),
        best_step=training.best_step,
        stopped_early=training.stopped_early,
        num_skipped=training.num_skipped,
        num_rolled_back=training.num_rolled_back,
        wall_time=training.seconds,
        interrupted=training.interrupted,
        recipe=flow if isinstance(flow, str) else None,
    )


def _named(data: Any, context: Any = None, validation: Any = None) -> None:
    """What errors call the arguments."""


def _check_options(num_levels: int | None, logit: float | None, whiten: str | None) -> None:
    if num_levels is not None and check_positive_integer(OWNER, "num_levels", num_levels) < 2:
        raise ValueError(f"{OWNER}: num_levels must be at least 2, got {num_levels}")
    if logit is not None and num_levels is None:
        raise ValueError(f"{OWNER}: logit is for integers, with num_levels")
    if logit is not None and not 0 < logit < 0.5:
        raise ValueError(f"{OWNER}: logit must be between 0 and 0.5, such as 0.05, got {logit}")
    if whiten not in ("auto", "diagonal", None):
        raise ValueError(f'{OWNER}: whiten must be "auto", "diagonal" or None, got {whiten!r}')


def _rows(
    data: Any, context: Any, validation: Any, num_levels: int | None, logit: float | None
) -> tuple[Units, Rows, Any]:
    """The units, the rows, and the rows to look at if they are given."""
    if not isinstance(data, Tensor) or data.dim() == 0:
        raise TypeError(
            f"{OWNER}: data must be an array, a frame, a list of numbers or a tensor with rows, got {data!r}"
        )
    if len(data) < 2 or not data[0].numel():
        raise ValueError(f"{OWNER}: data of shape {tuple(data.shape)} have nothing to fit; give at least two rows")
    context_shape = None if context is None else tuple(getattr(context, "shape", ())[1:])
    units = Units(tuple(data.shape[1:]), context_shape, num_levels, logit)
    rows = units.rows(OWNER, data, context)
    if isinstance(validation, (tuple, list)) and len(validation) == 2:
        return units, rows, units.rows(OWNER, *validation, like=rows.x, name="validation")
    if isinstance(validation, Tensor):
        return units, rows, units.rows(OWNER, validation, like=rows.x, name="validation")
    return units, rows, validation


def _divide(rows: Rows, validation: Any) -> tuple[Rows, Rows | None]:
    if validation is None or isinstance(validation, Rows):
        return rows, validation
    if isinstance(validation, bool) or not isinstance(validation, float):
        raise TypeError(f"{OWNER}: validation must be a fraction, rows of their own, or None, got {validation!r}")
    return split(OWNER, rows, validation)
