"""The cost of the path gradient: milliseconds of a captured step with it and without it, for four families of guides.

    python -m benchmarks.path_gradient [--rounds 7]

The model is eight schools, on one thread. The two kinds of step take turns, and the figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from pyro.infer import Trace_ELBO

import pyro_flowguides as fg
from pyro_flowguides.examples import EIGHT_SCHOOLS

from .common import describe, environment, markdown_table, write_results

GUIDES: dict[str, Callable] = {
    "AutoPlanar": fg.AutoPlanar,
    "AutoSylvester": fg.AutoSylvester,
    "AutoCoupling": fg.AutoCoupling,
    "AutoIAF": fg.AutoIAF,
}
NUM_STEPS = 200


def steps(guide: Callable, gradient: str, num_particles: int) -> Callable[[], float]:
    """Trains for a few steps; returns a function that takes more steps and returns the milliseconds of one."""
    model, data = EIGHT_SCHOOLS.model, EIGHT_SCHOOLS.data()
    loss = Trace_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
    with pyro.settings.context(module_local_params=True):
        svi = fg.CompiledSVI(
            model, guide(model, gradient=gradient), pyro.optim.Adam({"lr": 1e-3}), loss, backend="replay"
        )
        svi.run(60, **data)

    def run() -> float:
        with pyro.settings.context(module_local_params=True):
            start = time.perf_counter()
            svi.run(NUM_STEPS, **data)
            return (time.perf_counter() - start) / NUM_STEPS * 1e3

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "path_gradient.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = environment("pyro-ppl", "pyro_flowguides")
    rows = []
    for name, guide in GUIDES.items():
        for num_particles in (16, 256):
            plain, path = (steps(guide, gradient, num_particles) for gradient in ("total", "path"))
            times = [(plain(), path()) for _ in range(options.rounds)]
            total_ms, path_ms = (statistics.median(column) for column in zip(*times, strict=True))
            ratio = statistics.median(second / first for first, second in times)
            rows.append({"guide": name, "particles": num_particles, "total": total_ms, "path": path_ms, "ratio": ratio})
            print(name, num_particles, f"{total_ms:.3f} {path_ms:.3f} {ratio:.2f}", flush=True)
    header = ["guide", "particles", "plain gradient, ms", "path gradient, ms", "ratio"]
    lines = [
        [row["guide"], str(row["particles"]), f"{row['total']:.3f}", f"{row['path']:.3f}", f"{row['ratio']:.2f}"]
        for row in rows
    ]
    markdown = f"# The cost of the path gradient\n\n{describe(machine)} Eight schools, replayed steps, one thread.\n\n"
    write_results(options.out, {"environment": machine, "rows": rows}, markdown + markdown_table(header, lines))


if __name__ == "__main__":
    main()
