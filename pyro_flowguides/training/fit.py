"""``fit``: from a model and a guide to a fitted guide with its verdict, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor

from ..checks import check_positive_integer
from ..compiled.losses import Objective, as_objective
from ..compiled.svi import MAX_NONFINITE_STEPS
from ..model.call import ModelCall
from ..model.ownership import private_store
from .again import call_text
from .batches import arguments
from .checkpoint import Checkpoint
from .division import common_seed, find_division
from .fingerprint import describe_options
from .loop import Loop, Options
from .restarts import WAYS, fit_repeatedly
from .result import FitResult
from .schedules import find_schedule, find_temper


def fit(
    model: Callable,
    guide: Callable,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    num_steps: int | None = None,
    num_particles: int | None = None,
    batches: Iterable[Any] | None = None,
    num_restarts: int = 1,
    max_seconds: float | None = None,
    restarts: str = "best",
    seed: int | None = None,
    progress: bool = True,
    loss: Objective | ELBO | Callable[..., Tensor] | None = None,
    optim: PyroOptim | Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    schedule: str | Callable[[float], float] | None = None,
    temper: str | Callable[[float], float] | None = None,
    whiten: str | None = "auto",
    search_modes: bool | None = None,
    backend: str = "auto",
    ema_decay: float | None = None,
    checkpoint: Checkpoint | str | Path | None = None,
    callbacks: Sequence[Callable[[int, float], bool | None]] = (),
    max_nonfinite_steps: int = MAX_NONFINITE_STEPS,
    chunk_size: int | str | None = "auto",
    distributed: str | None = None,
) -> FitResult:
    r"""Fits a guide to a model and judges the result.

    Without options: whiten the guide, then train a round of 1000 steps of Adam at learning rate 1e-2 with a cosine to 0, on the
    path gradient of ``Trace_ELBO`` with 256 vectorised particles, gradients clipped at twice their running norm. Then 10,000
    draws are weighted. If the standard deviation s of the log weights, without the largest and the smallest thousandth, is above
    0.05 (near a perfect fit KL(q, p) is s² / 2, and no mean is off by more than about s standard deviations), another round
    follows with twice the steps and twice the particles. A third one, doubled again, follows if the second has made the ELBO
    rise by more than its standard error. A round that makes it fall is taken back. Where s is below 0.4 before the first step,
    as on a posterior that is nearly Gaussian, a round of 400 steps comes first, and is mostly the only one.

    Discrete latents that the guide leaves out are summed out: everything here is of the marginal posterior of the others. The
    draws have one draw of each discrete site, given these.

    The step is captured once a round as a graph, see :class:`pyro_flowguides.CompiledSVI`, which also guards against steps that
    are not finite or explode. An interrupt from the keyboard ends the training, and the guide as it is then is returned.

    **Main arguments**

    Arguments:
        model: A Pyro model.
        guide: A guide of this library, or any other Pyro guide, which is not whitened and keeps its own gradient.
        args: The positional arguments of both: tensors, numpy arrays, pandas series and frames, lists and numbers, which become
            tensors by the rule of docs/how_to/data.md.
        model_kwargs: The keyword arguments of both, likewise.
        num_steps: The number of steps, in one round. By default rounds as described above; one round of 3000 steps where the
            draws have no weights that could end a round (subsampled data, a random log-density), where the model cannot be
            vectorised, and with ``loss``, ``batches`` or a Pyro optimiser.
        num_particles: The number of draws per step, in every round; not together with ``loss``, which has its own.
        batches: Arguments step by step, such as a ``DataLoader``, iterated over again and again: a tuple or list of positional
            arguments, a dict of keyword arguments, or one argument. The guide is whitened and judged on ``args``, for example
            all of the data; by default on the first batch.
        num_restarts: The number of independent fits, with the seeds ``seed``, ``seed + 1``, …, of which the best by ELBO is
            kept; the draws of all are in ``FitResult.restarts``. A flow guide that is not set up yet starts from new weights
            each time, any other guide from the parameters it has.
        max_seconds: The seconds after which the fit has ended, the final draws and the search for modes included; by default as
            many as it takes. Rounds that have no time left are left out, and the learning rate of the last one falls as the time
            runs out. A fit with a limit is not the same when it is repeated. Whitening, and a step that has begun, are not cut
            off. With restarts each has its part of the time. Not together with ``temper``.
        restarts: What is kept of them: ``"best"``, or ``"mixture"`` for an :class:`pyro_flowguides.AutoMixture` of all, weighed
            by the evidence that each holds; those that hold the same are merged. The guide that was given has the parameters
            of the best.
        seed: Seeds Pyro first, if given.
        progress: Whether to show a progress bar.

    **Other arguments**

    Arguments:
        loss: What to minimise instead: an ELBO of Pyro, :class:`pyro_flowguides.IWELBO`, an object of your own with a method
            ``loss(model, guide, args, kwargs) -> Tensor``, or a function ``loss(model, guide, *args, **kwargs) -> Tensor``. The
            guide's own ``gradient`` holds then.
        optim: A Pyro optimiser, or a function from a list of parameters to a torch optimiser. A scheduler of Pyro, such as
            ``pyro.optim.ExponentialLR``, is stepped after every step, also where there are batches.
        schedule: The factor of the learning rate over a round: ``"cosine"``, ``"constant"``, or a function of the progress from
            0 to 1. A step: ``lambda progress: 1.0 if progress < 0.5 else 0.1``. A warm-up: ``lambda progress: min(1.0, progress
            / 0.05)``, times ``training.schedules.cosine(progress)`` if it shall fall afterwards. By default cosine; none for a
            Pyro optimiser, which has schedulers of its own.
        temper: How the target is flattened at first, to find modes that a narrow start loses: None, ``"linear"``,
            ``"rezende_mohamed"``, or a function of the progress over the first round, from 0 to 1, that rises to 1. The loss is
            :math:`E_q[\log q(x) - \beta_t \log p(x, y)]` with the inverse temperature :math:`\beta_t` at step t, where log p
            is that of x in unconstrained space, the Jacobian of the constraints included. ``"linear"`` rises from 0.01 to 1 over
            the first half of the round; ``"rezende_mohamed"`` is :math:`\min(1, 0.01 + t / 10000)` (Rezende & Mohamed 2015)
            and needs a ``num_steps`` of at least 9900. Later rounds have :math:`\beta = 1`. The losses, in the result and in
            callbacks, are those of the flattened target as long as :math:`\beta_t < 1`, and an explosion is not recognised
            until it stays the same. A heavy tail, such as that of a Student-t, has no integral when it is flattened.
        whiten: The method of :meth:`pyro_flowguides.AutoFlow.whiten`, or None. ``"auto"`` continues the training of a trained
            guide, unless it no longer fits these data and a Gaussian fits better, which it starts over from then
            (:meth:`pyro_flowguides.AutoFlow.start_over_if_better`); where data are subsampled, and with ``batches`` or ``loss``,
            the training always goes on. The flows inside an ``AutoGuideList`` are left alone, since its parts have no posterior
            of their own; docs/how_to/initialise.md says how to choose where those start.
        search_modes: Whether to look for modes that the guide has not drawn, by :func:`pyro_flowguides.find_modes`. By default
            from some 400 steps of a flow on, and some 1800 of a guide whose steps are cheaper, with a number of evaluations of
            the model that grows with the steps: at most about a tenth of the fit's time. With True in any case and with no such
            limit. The training and the draws are the same with it and without, and a fit with a seed finds the same modes again.
            There is no search where the draws have no weights, there are batches alone, or an interrupt has ended the training.
        backend: How a step is run, see :class:`pyro_flowguides.CompiledSVI`.
        ema_decay: Keep an exponential moving average of the parameters with this decay, such as 0.99, and return it.
        checkpoint: A :class:`pyro_flowguides.Checkpoint`, or its path alone: the file to write the state of the fit to, and
            whether to continue from it.
        callbacks: Functions called as ``callback(step, loss)`` after each step, counted over all rounds; one that returns True
            ends the training.
        max_nonfinite_steps: The number of steps in a row without a finite loss or gradient that ends the fit with an error.
        chunk_size: The number of particles that a step takes at a time, which bounds its memory, see
            :class:`pyro_flowguides.CompiledSVI`. ``"auto"`` splits only where a step would take more than half of the memory that
            is free, as two passes with few particles predict; ``FitResult.chunk_size`` says whether it did. A ``loss`` that is no
            mean over particles, such as :class:`pyro_flowguides.IWELBO`, cannot be split.
        distributed: How several processes of ``torchrun`` divide the work, see docs/how_to/distributed.md. ``"particles"``: each
            has draws of its own, ``num_particles`` a step, or restarts of its own where there are as many. ``"data"``: each
            takes batches of its own as well, and the guide is judged on ``args`` by the first process. ``"independent"``: each
            fits by itself. By default ``"data"`` with ``batches``, else ``"particles"``. Gradients are averaged over the
            processes, and all of them return the same fit; the first one shows the progress, warns and writes the checkpoint.
            An interrupt ends all of them.

    Returns:
        The fitted guide with its draws, ELBO, k-hat, modes and verdict.

    Raises:
        TypeError: if the guide is a class, or an argument has a wrong type.
        ValueError: if an argument is wrong or cannot become a tensor, the data hold NaN, the model has no finite log-probability
            at the start, or the guide leaves out a discrete site that cannot be summed out; the message names the argument or
            the site. Also if a checkpoint is damaged, of another fit (the first difference is named), or cannot be written.
        FileExistsError: if the checkpoint exists already and does not say ``resume=True``.
        BlockingIOError: if another fit that is running writes to the checkpoint.
        RuntimeError: if ``max_nonfinite_steps`` steps in a row had no finite loss or gradient, or another process has ended.
    """
    given = dict(locals())
    if isinstance(guide, type) or not callable(guide):
        wrong = f"the class {guide.__name__}" if isinstance(guide, type) else repr(guide)
        raise TypeError(f"fit: guide must be a guide of the model, such as AutoCoupling(model), got {wrong}")
    made_by = call_text(fit, given)
    if optim is not None and not callable(optim):
        raise TypeError(
            f"fit: optim must be a Pyro optimiser or a function from parameters to a torch optimiser, got {optim!r}"
        )
    if isinstance(optim, PyroOptim) and schedule is not None:
        raise ValueError(
            "fit: a Pyro optimiser has its own schedulers, such as pyro.optim.ExponentialLR; leave schedule out"
        )
    if loss is not None and num_particles is not None:
        raise ValueError("fit: num_particles belongs to the default loss; give it to the loss instead")
    if loss is not None and temper is not None:
        raise ValueError("fit: temper belongs to the default loss; leave out loss, or temper")
    if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    for name, number in (("num_steps", num_steps), ("num_particles", num_particles), ("num_restarts", num_restarts)):
        if number is not None:
            check_positive_integer("fit", name, number)
    check_positive_integer("fit", "max_nonfinite_steps", max_nonfinite_steps)
    _check_seconds(max_seconds, temper)
    division = find_division("fit", distributed, has_batches=batches is not None)
    if division is not None:
        described: dict[str, Any] = {
            "seed": seed,
            "num_steps": num_steps,
            "num_particles": num_particles,
            "num_restarts": num_restarts,
            "restarts": restarts,
            "max_seconds": max_seconds,
            "whiten": whiten,
            "temper": temper,
            "search_modes": search_modes,
            "the class of the guide": type(guide).__name__,
            "the number of callbacks": len(callbacks),
            "the steps between checkpoints": checkpoint and checkpoint.every,
            "whether there are batches": batches is not None,
        }
        if division.mode == "particles":
            described |= {"the data": [args, model_kwargs]}
        division.check_same("fit", describe_options(described))
        seed, checkpoint = common_seed(division, seed), division.checkpoint(checkpoint)
    if restarts not in WAYS:
        raise ValueError(f'fit: restarts must be "best" or "mixture", got {restarts!r}')
    kwargs = dict(model_kwargs or {})
    args_are_a_batch = batches is not None and not args and not kwargs
    options = Options(
        num_steps=num_steps,
        num_particles=num_particles,
        batches=batches,
        args_are_a_batch=args_are_a_batch,
        loss=None if loss is None else as_objective(loss),
        optim=optim,
        schedule=None if isinstance(optim, PyroOptim) else find_schedule(schedule),
        svi={
            "backend": backend,
            "ema_decay": ema_decay,
            "max_nonfinite_steps": max_nonfinite_steps,
            "chunk_size": chunk_size,
        },
        temper=find_temper(temper),
        whiten=whiten,
        search_modes=search_modes,
        seed=seed,
        max_seconds=max_seconds,
        checkpoint=checkpoint,
        callbacks=callbacks,
        progress=progress,
        division=division,
    )
    if isinstance(batches, pd.DataFrame):
        raise TypeError(
            "fit: batches is a frame, which is iterated over by the names of its columns; give a list of frames"
        )
    if batches is not None and args_are_a_batch:
        if seed is not None:
            # A loader that shuffles draws.
            pyro.set_rng_seed(seed)
        args, kwargs = arguments(next(iter(batches)))
    call = ModelCall.given("fit", model, args, kwargs)
    with division.quiet() if division else nullcontext():
        if num_restarts > 1:
            result = fit_repeatedly(call, guide, options, num_restarts, restarts)
        else:
            with private_store(model, guide) as (model, guide):
                result = Loop(replace(call, model=model), guide, options).run()
    return replace(result, made_by=made_by)


def _check_seconds(max_seconds: Any, temper: Any) -> None:
    if max_seconds is None:
        return
    if isinstance(max_seconds, bool) or not isinstance(max_seconds, (int, float)):
        raise TypeError(f"fit: max_seconds must be a number of seconds, got {max_seconds!r}")
    if not max_seconds > 0:
        raise ValueError(f"fit: max_seconds must be above 0, got {max_seconds}")
    if temper is not None:
        raise ValueError(
            "fit: temper goes by steps, which max_seconds may cut off; give num_steps in place of max_seconds"
        )
