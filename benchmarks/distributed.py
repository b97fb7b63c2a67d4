"""Draws per second of one process and of two that train together, and what their message costs.

    python -m benchmarks.distributed --sonar sonar.csv [--rounds 5] [--quick]

Every process has one thread. One process and two of ``torchrun`` take turns, each in processes of its own, and the figures are
medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO

import pyro_flowguides as fg
from pyro_flowguides.processes import Processes, find_processes

from .common import describe, environment, in_processes, markdown_table, write_results
from .svi_models import problems
from .vae import POSTERIORS, Autoencoder, digits

_WARM_UP_STEPS, _PARTICLES, _BATCH_SIZE = 60, 256, 100
_NUM_PROCESSES = 2


def sonar(path: Path) -> tuple[fg.CompiledSVI, Callable[[], tuple], int]:
    """Logistic regression with the default coupling guide."""
    problem = next(problem for problem in problems(path) if problem.name == "sonar")
    data = problem.tensors()
    loss = Trace_ELBO(num_particles=_PARTICLES, vectorize_particles=True, max_plate_nesting=1)
    guide = fg.AutoCoupling(problem.model)
    svi = fg.CompiledSVI(problem.model, guide, pyro.optim.Adam({"lr": 1e-3}), loss, backend="replay")
    return svi, lambda: data, _PARTICLES


def autoencoder(path: Path) -> tuple[fg.CompiledSVI, Callable[[], tuple], int]:
    """The autoencoder of digits with Sylvester flows, a minibatch in each process."""
    grey, validation, _ = digits()
    network = Autoencoder(len(grey))
    guide = fg.AmortizedFlow(network.model, network.encoder, POSTERIORS["Sylvester, 4 layers"]).setup(validation)
    svi = fg.CompiledSVI(network.model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(), backend="replay")

    def batch() -> tuple:
        return (torch.bernoulli(grey[torch.randint(len(grey), (_BATCH_SIZE,))]),)

    return svi, batch, _BATCH_SIZE


TASKS: dict[str, Callable[[Path], tuple[fg.CompiledSVI, Callable[[], tuple], int]]] = {
    "sonar, 256 draws": sonar,
    "autoencoder, 100 digits": autoencoder,
}


def work(task: str, path: Path, num_steps: int) -> dict[str, Any]:
    """Seconds of a step of this process, alone or together with others; what it sends, and how long that takes."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    processes = find_processes()
    svi, batch, number = TASKS[task](path)
    for _ in range(_WARM_UP_STEPS):
        svi.compile_step(batch(), {})()
    began = time.perf_counter()
    for _ in range(num_steps):
        svi.compile_step(batch(), {})()
    seconds = (time.perf_counter() - began) / num_steps
    size = sum(parameter.numel() for parameter in svi.parameters.values())
    return {
        "seconds": seconds,
        "draws": number * (processes.size if processes else 1),
        "numbers": size + 1,
        "message_seconds": message_seconds(processes, size) if processes else 0.0,
    }


def message_seconds(processes: Processes, size: int, number: int = 50) -> float:
    """Seconds of the mean of a vector of this size over all processes, when none waits for another."""
    vector, scalar = torch.randn(size), torch.zeros(())
    times = []
    for _ in range(number):
        processes.gather(None)
        began = time.perf_counter()
        processes.mean([vector], scalar)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def run(task: str, path: Path, num_steps: int, num_processes: int) -> dict[str, Any]:
    """The result of ``work`` in the first of so many new processes."""
    return in_processes(
        "benchmarks.distributed", num_processes, "--worker", task, "--sonar", path, "--steps", num_steps
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sonar", type=Path, required=True, help="the sonar data, CSV")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--quick", action="store_true", help="one round of few steps")
    parser.add_argument("--worker", choices=TASKS, help="what this process shall train")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "distributed.json")
    options = parser.parse_args()
    if options.worker:
        result = work(options.worker, options.sonar, options.steps)
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(result), flush=True)
        return
    num_rounds, num_steps = (1, 20) if options.quick else (options.rounds, options.steps)
    machine, rows = environment("pyro-ppl", "pyro_flowguides"), []
    for task in TASKS:
        alone, together = [], []
        for _ in range(num_rounds):
            alone.append(run(task, options.sonar, num_steps, 1))
            together.append(run(task, options.sonar, num_steps, _NUM_PROCESSES))
        rates = [[each["draws"] / each["seconds"] for each in sides] for sides in (alone, together)]
        rows.append(
            {
                "task": task,
                "numbers": together[0]["numbers"],
                "alone_ms": 1e3 * statistics.median(each["seconds"] for each in alone),
                "together_ms": 1e3 * statistics.median(each["seconds"] for each in together),
                "message_ms": 1e3 * statistics.median(each["message_seconds"] for each in together),
                "speed_up": statistics.median(two / one for one, two in zip(*rates, strict=True)),
            }
        )
        print(rows[-1], flush=True)
    table = [
        [
            row["task"],
            f"{row['numbers']:,}",
            f"{row['alone_ms']:.2f}",
            f"{row['together_ms']:.2f}",
            f"{row['message_ms']:.2f}",
            f"{row['speed_up']:.2f}",
        ]
        for row in rows
    ]
    header = [
        "in each process",
        "numbers in the message",
        "one process, ms",
        "two, ms",
        "message, ms",
        "speed-up",
    ]
    write_results(
        options.out,
        {"environment": machine, "rows": rows},
        "# Two processes against one\n\n"
        "Milliseconds of a captured step (replay), and draws per second of two processes as a multiple of one; gloo, one thread "
        f"for each process. Medians of {num_rounds} rounds of {num_steps} steps, in which both take turns. A step sends one "
        "vector with the gradient and the loss; its time is that of the mean alone, when no process waits for another.\n\n"
        f"{markdown_table(header, table)}\n\n{describe(machine)}\n",
    )


if __name__ == "__main__":
    main()
