"""One model: the speed of both of its forms, a default fit of it as it is written, and ``AutoNormal`` with plain SVI."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import ClippedAdam

import pyro_flowguides as fg
from pyro_flowguides.compiled.losses import KL
from pyro_flowguides.model.call import ModelCall
from pyro_flowguides.training import start
from pyro_flowguides.training.loop import NUM_PARTICLES
from pyro_flowguides.training.steps import CLIP_FACTOR

from .density import SMALLEST_SD
from .problem import Problem

NUM_WARM, NUM_ROUNDS, STEPS_PER_ROUND = 60, 11, 50
# Small: speed is measured, and the parameters should stay where every model has a density.
SPEED_RATE = 1e-4
PLAIN_STEPS, PLAIN_RATE, PLAIN_CLIP, NUM_PLAIN_DRAWS = 4000, 0.01, 10.0, 4000
MAX_MEAN_ERROR, MAX_SD_ERROR = 0.05, 0.05


def run(problem: Problem, reference: dict[str, Any]) -> dict[str, Any]:
    """All figures of one model; where a part of them fails, the error in its place."""
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "speed": lambda: speed(problem),
        "fit": lambda: default_fit(problem, reference),
        "AutoNormal": lambda: plain_svi(problem, reference),
    }
    row: dict[str, Any] = {"source": problem.source, "discrete": problem.discrete, "reference": reference["kind"]}
    for name, part in parts.items():
        try:
            row[name] = part()
        except Exception as error:
            row[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    return row


# --- speed -----------------------------------------------------------------------------------------------------------------


class Training:
    """The training steps of a default fit, with parameters of their own.

    Arguments:
        model: The model.
        arguments: Its arguments.
    """

    def __init__(self, model: Callable, arguments: tuple) -> None:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        self.arguments = arguments
        guide = fg.AutoFlow(model)
        call = ModelCall(model, arguments, {})
        self.tracer, flow_guides = start.set_up(call, guide)
        tracer = self.tracer
        start.whiten(flow_guides, guide, "auto", tracer)
        loss = KL(
            NUM_PARTICLES,
            vectorize_particles=tracer.vectorizes,
            max_plate_nesting=tracer.max_plate_nesting,
            batched=start.batched_calls(tracer, arguments_vary=False),
            otherwise=lambda: start.record(tracer),
        )
        self.svi = fg.CompiledSVI(
            model,
            guide,
            lambda leaves: torch.optim.Adam(leaves, lr=SPEED_RATE),
            loss,
            clip_factor=CLIP_FACTOR,
        )
        self.loss = loss
        self._state = pyro.get_param_store().get_state()

    def seconds(self, num_steps: int) -> float:
        """The time of some more steps."""
        store = pyro.get_param_store()
        store.clear()
        store.set_state(self._state)
        begin = time.perf_counter()
        self.svi.run(num_steps, *self.arguments)
        elapsed = time.perf_counter() - begin
        self._state = store.get_state()
        return elapsed

    @property
    def way(self) -> str:
        """How many draws are made together."""
        if self.loss.batched is not None:
            return "recorded"
        return self.tracer.vectorization


def speed(problem: Problem) -> dict[str, Any]:
    """Steps per second of the model as written and vectorised by hand, in turns; the ratio is the median of the rounds."""
    begin = time.perf_counter()
    written = Training(*problem.as_written())
    if written.way == "looped":
        return {"way": "looped"}
    written.seconds(NUM_WARM)
    until_warm = time.perf_counter() - begin
    sides = [written]
    if problem.by_hand is not None:
        by_hand = Training(*problem.vectorized())
        by_hand.seconds(NUM_WARM)
        sides.append(by_hand)
    rounds = [[side.seconds(STEPS_PER_ROUND) for side in sides] for _ in range(NUM_ROUNDS)]
    row = {
        "way": written.way,
        "captured": written.svi.backend != "eager",
        "seconds_until_warm": until_warm,
        "steps_per_second": STEPS_PER_ROUND / statistics.median(each[0] for each in rounds),
    }
    if problem.by_hand is not None:
        row["steps_per_second_by_hand"] = STEPS_PER_ROUND / statistics.median(each[1] for each in rounds)
        row["ratio"] = statistics.median(each[1] / each[0] for each in rounds)
        row["by_hand_way"] = sides[1].way
    return row


# --- fits ------------------------------------------------------------------------------------------------------------------


def default_fit(problem: Problem, reference: dict[str, Any]) -> dict[str, Any]:
    """``fit`` with nothing but the model and ``AutoFlow(model)``."""
    pyro.clear_param_store()
    model, arguments = problem.as_written()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        begin = time.perf_counter()
        fit = fg.fit(model, fg.AutoFlow(model), *arguments, seed=0, progress=False)
        seconds = time.perf_counter() - begin
    draws, verdict = fit.draws, fit.verdict
    row = {
        "seconds": seconds,
        "steps": len(fit.losses),
        "elbo": fit.elbo.value,
        "khat": None if np.isnan(fit.khat.value) else fit.khat.value,
        "verdict": verdict.kind.name,
        "reason": str(verdict),
        "draws": len(draws),
        "warnings": [str(each.message)[:500] for each in caught if "pyro_flowguides" in str(each.filename)],
        "raw": errors(draws.mean(weighted=False), draws.sd(weighted=False), reference),
        "weighted": errors(draws.mean(weighted=True), draws.sd(weighted=True), reference),
    }
    if "log_z" in reference:
        row["log_z_error"] = float(draws.log_weights.double().logsumexp(0)) - np.log(len(draws)) - reference["log_z"]
        row["gap"] = reference["log_z"] - fit.elbo.value
    return {**row, "agreement": agreement(row)}


def agreement(row: dict[str, Any]) -> str:
    """Whether the verdict says what the errors are: of the draws where it is good, of the weighted ones where it says so."""
    kind = row["verdict"]
    judged = row["raw" if kind in ("EXACT", "GOOD") else "weighted"]
    right = judged["mean"] <= MAX_MEAN_ERROR and judged["sd"] <= MAX_SD_ERROR
    if kind in ("EXACT", "GOOD", "GOOD_ONCE_WEIGHTED"):
        return "agrees" if right else "too good"
    return "too cautious" if right else "agrees"


def errors(mean: dict[str, Any], sd: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """The largest errors among all scalars: of a mean in reference sd, and of an sd relative to it.

    Raises:
        ValueError: if a latent of the reference is missing.
    """
    if missing := set(reference["mean"]) - set(mean):
        raise ValueError(f"no draws of {', '.join(sorted(missing))}")
    found: dict[str, Any] = {"mean": 0.0, "sd": 0.0}
    for name, exact in reference["mean"].items():
        scale = np.asarray(reference["sd"][name])
        varies = scale > SMALLEST_SD
        for what, error in {
            "mean": np.abs(np.ravel(mean[name])[varies] - np.asarray(exact)[varies]) / scale[varies],
            "sd": np.abs(np.ravel(sd[name])[varies] / scale[varies] - 1),
        }.items():
            if error.max() > found[what]:
                found[what], found[f"{what}_of"] = float(error.max()), name
    return found


def plain_svi(problem: Problem, reference: dict[str, Any]) -> dict[str, Any]:
    """Pyro's ``AutoNormal`` by Pyro's SVI, as its tutorials train it; the final draws do not count in the time."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, arguments = problem.as_written()
    guide = AutoNormal(poutine.block(model, hide_fn=_is_enumerated) if problem.discrete else model)
    elbo = TraceEnum_ELBO(max_plate_nesting=2) if problem.discrete else Trace_ELBO()
    begin = time.perf_counter()
    svi = SVI(model, guide, ClippedAdam({"lr": PLAIN_RATE, "clip_norm": PLAIN_CLIP}), elbo)
    for _ in range(PLAIN_STEPS):
        svi.step(*arguments)
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        draws = [guide(*arguments) for _ in range(NUM_PLAIN_DRAWS)]
    values = {name: torch.stack([draw[name] for draw in draws]).double() for name in reference["mean"]}
    mean = {name: value.mean(0).numpy() for name, value in values.items()}
    sd = {name: value.std(0).numpy() for name, value in values.items()}
    return {"seconds": seconds, "steps": PLAIN_STEPS, **errors(mean, sd, reference)}


def _is_enumerated(site: dict[str, Any]) -> bool:
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and getattr(site["fn"], "has_enumerate_support", False)
        and site["infer"].get("enumerate") is not None
    )
