"""Plain ``pyro.infer.SVI`` of guides with their defaults, from Pyro's default start, without whitening, clipping or schedule.

    python -m benchmarks.plain_svi --out benchmarks/results/plain_svi.json

This is the result for a user who replaces ``AutoNormal`` by another guide and changes nothing else.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam

import pyro_flowguides as fg
from pyro_flowguides.examples import EIGHT_SCHOOLS_CENTERED

from .common import describe, environment, markdown_table, write_results
from .models import eight_schools_centered, funnel

_NUM_STEPS, _NUM_PARTICLES, _NUM_DRAWS = 300, 10, 5000
_SEEDS = range(5)
_RATES = (0.01, 0.05)
GUIDES: dict[str, Callable] = {
    "AutoFlow": fg.AutoFlow,
    "AutoFlow, damped=False": functools.partial(fg.AutoFlow, damped=False),
    "AutoIAF": fg.AutoIAF,
    "AutoSpline": fg.AutoSpline,
    "Pyro's AutoIAFNormal": AutoIAFNormal,
    "Pyro's AutoMultivariateNormal": AutoMultivariateNormal,
    "Pyro's AutoNormal": AutoNormal,
}


def banana() -> None:
    """A parabola with noise; log Z = 0."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(a.square(), 0.3))


# Each model with its log Z.
MODELS: dict[str, tuple[Callable[[], None], float]] = {
    "eight schools, centred": (eight_schools_centered, EIGHT_SCHOOLS_CENTERED.log_evidence),
    "funnel": (funnel, 0.0),
    "banana": (banana, 0.0),
}


def gap(model: Callable, log_z: float, name: str, rate: float, seed: int) -> float:
    """log Z − ELBO after the training; infinite if the training ended with an error or left the support of the model."""
    # SVI trains the parameters in Pyro's store.
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = GUIDES[name](model)
    elbo = functools.partial(Trace_ELBO, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, Adam({"lr": rate}), elbo(num_particles=_NUM_PARTICLES))
    try:
        for _ in range(_NUM_STEPS):
            svi.step()
        with torch.no_grad():
            value = log_z + elbo(num_particles=_NUM_DRAWS).loss(model, guide)
    except ValueError:
        return math.inf
    return math.inf if math.isnan(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    results: dict[str, dict[str, list[float]]] = {name: {} for name in GUIDES}
    columns = [(model, rate) for model in MODELS for rate in _RATES]
    for (model, rate), seed in ((column, seed) for column in columns for seed in _SEEDS):
        for name in GUIDES:
            runs = results[name].setdefault(f"{model}, {rate}", [])
            runs.append(gap(*MODELS[model], name, rate, seed))
            print(model, rate, seed, name, runs[-1], flush=True)
    machine = environment("pyro-ppl")
    rows = [
        [name, *(f"{_number(statistics.median(runs))} / {_number(max(runs))}" for runs in by_column.values())]
        for name, by_column in results.items()
    ]
    markdown = "\n\n".join(
        [
            "# Plain SVI from the default start",
            f"log Z − ELBO in nats, median / worst of {len(_SEEDS)} seeds, after {_NUM_STEPS} steps of Adam with "
            f"{_NUM_PARTICLES} particles at the learning rate in the header, with Pyro's SVI and without whitening, clipping or "
            "schedule. ∞: the training ended with an error, or left the support of the model. "
            f"{describe(machine)}",
            markdown_table(["guide", *(f"{model}, {rate}" for model, rate in columns)], rows),
        ]
    )
    write_results(options.out, {"environment": machine, "results": results}, markdown)
    print(markdown)


def _number(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.2f}" if value < 1000 else f"{value:.0e}"


if __name__ == "__main__":
    main()
