"""Milliseconds per training step: captured steps against Pyro's SVI, eager and Jit, and NumPyro's ``svi.run``.

    python -m benchmarks.svi_step --sonar sonar.csv [--models …] [--guides …] [--particles …] [--inductor …] [--rounds 5]

All sides run in one process, on one thread each. They take turns for several rounds; the table has medians over the rounds and
their ratios. The times are without capture and compilation. NumPyro's time per step is the difference of two runs of different
lengths, so that tracing and compilation, which every ``svi.run`` repeats, cancel.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before jax is imported: one thread for every side.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import pyro
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoNormal

import pyro_flowguides as fg

from .common import describe, environment, markdown_table, write_results
from .svi_models import Problem, problems

LEARNING_RATE = 1e-3
PYRO_GUIDES: dict[str, Callable] = {
    "AutoNormal": lambda problem: AutoNormal(problem.model),
    "AutoIAF": lambda problem: AutoIAFNormal(problem.model, hidden_dim=list(problem.hidden_dims), num_transforms=3),
}
OUR_GUIDES: dict[str, Callable] = {
    # CompiledSVI captures steps of any guide.
    "AutoNormal": lambda problem: AutoNormal(problem.model),
    "AutoIAF": lambda problem: fg.AutoIAF(problem.model, num_layers=3, hidden_dims=problem.hidden_dims),
    "AutoCoupling": lambda problem: fg.AutoCoupling(problem.model),
    "AutoSpline": lambda problem: fg.AutoSpline(problem.model),
    "AutoCoupling, path gradient": lambda problem: fg.AutoCoupling(problem.model, gradient="path"),
}
# A round lasts about this long, so that a slow side takes fewer steps.
SECONDS_PER_ROUND = 1.0

Runner = Callable[[int], None]


def elbo(kind: type, num_particles: int) -> Any:
    return kind(num_particles=num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1)


def pyro_runner(problem: Problem, guide: Callable, num_particles: int, kind: type) -> Runner:
    pyro.clear_param_store()
    svi = SVI(problem.model, guide(problem), pyro.optim.Adam({"lr": LEARNING_RATE}), elbo(kind, num_particles))
    arguments = problem.tensors()

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            svi.step(*arguments)

    return _in_own_store(run)


def captured_runner(problem: Problem, guide: Callable, num_particles: int, backend: str) -> Runner:
    pyro.clear_param_store()
    optim = pyro.optim.Adam({"lr": LEARNING_RATE})
    svi = fg.CompiledSVI(problem.model, guide(problem), optim, elbo(Trace_ELBO, num_particles), backend=backend)
    arguments = problem.tensors()
    return _in_own_store(lambda num_steps: svi.run(num_steps, *arguments))


def _in_own_store(run: Callable[[int], Any]) -> Runner:
    """Runs with its own parameters, whatever the other sides have put in Pyro's store since the last call."""
    state: list[Any] = []

    def run_in_store(num_steps: int) -> None:
        store = pyro.get_param_store()
        if state:
            store.clear()
            store.set_state(state.pop())
        run(num_steps)
        state.append(store.get_state())

    return run_in_store


def numpyro_runner(problem: Problem, guide: str, num_particles: int) -> Callable[[int], None]:
    import jax
    import numpyro
    from numpyro.infer import SVI as NumPyroSVI
    from numpyro.infer import Trace_ELBO as NumPyroELBO
    from numpyro.infer import autoguide

    guides = {
        "AutoNormal": autoguide.AutoNormal,
        "AutoIAF": lambda model: autoguide.AutoIAFNormal(model, num_flows=3, hidden_dims=list(problem.hidden_dims)),
    }
    loss = NumPyroELBO(num_particles=num_particles, vectorize_particles=True)
    svi = NumPyroSVI(
        problem.numpyro_model, guides[guide](problem.numpyro_model), numpyro.optim.Adam(LEARNING_RATE), loss
    )
    arguments = problem.jax_arrays()

    def run(num_steps: int) -> None:
        jax.block_until_ready(svi.run(jax.random.PRNGKey(0), num_steps, *arguments, progress_bar=False).params)

    return run


def seconds(run: Runner, num_steps: int) -> float:
    start = time.perf_counter()
    run(num_steps)
    return time.perf_counter() - start


def sides(problem: Problem, guide: str, num_particles: int, inductor: bool, numpyro: bool) -> dict[str, Runner]:
    """Every side that exists for a guide; those that cannot run are missing."""
    makers: dict[str, Callable[[], Runner]] = {}
    if guide in PYRO_GUIDES:
        makers["Pyro"] = lambda: pyro_runner(problem, PYRO_GUIDES[guide], num_particles, Trace_ELBO)
        makers["Pyro, Jit"] = lambda: pyro_runner(problem, PYRO_GUIDES[guide], num_particles, JitTrace_ELBO)
    makers["replay"] = lambda: captured_runner(problem, OUR_GUIDES[guide], num_particles, "replay")
    if inductor:
        makers["inductor"] = lambda: captured_runner(problem, OUR_GUIDES[guide], num_particles, "inductor")
    if numpyro and guide in PYRO_GUIDES:
        makers["NumPyro"] = lambda: numpyro_runner(problem, guide, num_particles)
    result = {}
    for name, make in makers.items():
        try:
            run = make()
            run(1)
            result[name] = run
        except Exception as error:
            print(f"  {name} does not run: {' '.join(str(error).split())[:120]}")
    return result


def measure(problem: Problem, guide: str, num_particles: int, options: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    runners = sides(problem, guide, num_particles, guide in options.inductor, options.numpyro)
    steps = {}
    for name, run in runners.items():
        run(60 if name not in ("Pyro", "NumPyro") else 3)
        if name != "NumPyro":
            steps[name] = max(10, min(5000, int(SECONDS_PER_ROUND / (seconds(run, 10) / 10))))
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(options.rounds):
        for name, run in runners.items():
            if name == "NumPyro":
                # A long run and a short one: both trace and compile, the rest is steps.
                short, long = seconds(run, 100), seconds(run, 100 + options.numpyro_steps)
                times[name].append((long - short) / options.numpyro_steps * 1e3)
            else:
                times[name].append(seconds(run, steps[name]) / steps[name] * 1e3)
    row = {
        "model": problem.name,
        "guide": guide,
        "particles": num_particles,
        "ms": {name: statistics.median(values) for name, values in times.items()},
        "spread": {name: [min(values), max(values)] for name, values in times.items()},
        "seconds_in_all": time.perf_counter() - start,
    }
    print(problem.name, guide, num_particles, {name: round(value, 3) for name, value in row["ms"].items()}, flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    names = ["Pyro", "Pyro, Jit", "NumPyro", "replay", "inductor"]

    def ratio(row: dict[str, Any], above: str, below: str) -> str:
        return f"{row['ms'][above] / row['ms'][below]:.2f}" if above in row["ms"] and below in row["ms"] else ""

    lines = [
        [
            row["model"],
            row["guide"],
            str(row["particles"]),
            *[f"{row['ms'][name]:.3f}" if name in row["ms"] else "" for name in names],
            ratio(row, "Pyro", "replay"),
            ratio(row, "Pyro", "inductor"),
            ratio(row, "replay", "NumPyro"),
            ratio(row, "inductor", "NumPyro"),
        ]
        for row in rows
    ]
    header = ["model", "guide", "particles", *names]
    ratios = ["Pyro / replay", "Pyro / inductor", "replay / NumPyro", "inductor / NumPyro"]
    return markdown_table([*header, *ratios], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sonar", type=Path, required=True, help="the sonar data, CSV")
    parser.add_argument("--models", nargs="*", default=["eight schools", "sonar", "hierarchical"])
    parser.add_argument("--guides", nargs="*", default=list(OUR_GUIDES))
    parser.add_argument("--particles", nargs="*", type=int, default=[1, 16, 256])
    parser.add_argument("--inductor", nargs="*", default=["AutoNormal", "AutoIAF"], help="guides to compile as well")
    parser.add_argument("--no-numpyro", dest="numpyro", action="store_false")
    parser.add_argument("--numpyro-steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--update", action="store_true", help="keep the rows of an earlier run that this one does not measure"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "svi_step.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")

    rows: list[dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.update else []
    machine = environment("pyro-ppl", "numpyro", "jax", "pyro_flowguides")
    for problem in problems(options.sonar):
        for guide in options.guides if problem.name in options.models else ():
            for num_particles in options.particles:
                new = measure(problem, guide, num_particles, options)
                rows = [row for row in rows if any(row[key] != new[key] for key in ("model", "guide", "particles"))] + [
                    new
                ]
                markdown = (
                    "# Milliseconds per training step\n\n"
                    f"{describe(machine)} One thread for every side; medians of {options.rounds} rounds in turn. "
                    "Adam, vectorised particles; IAF: three layers, each with two hidden layers of 32 (sonar: 64).\n\n"
                )
                write_results(options.out, {"environment": machine, "rows": rows}, markdown + table(rows))


if __name__ == "__main__":
    main()
