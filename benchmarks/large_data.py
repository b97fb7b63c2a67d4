"""Time and memory of whitening, steps, draws and exports as the data grow.

A regression with five coefficients on 1000 to 100,000 rows, written for many draws and for one draw, which is recorded. Each
job first runs on 50 rows; memory is the rise of the largest resident size after that, the result included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_flowguides as fg
from benchmarks.common import describe, environment, markdown_table, write_results

NUM_ROWS = (1000, 10_000, 100_000)
NUM_STEPS, NUM_PARTICLES = 10, 16


def _regression(x: Tensor, y: Tensor, times: Callable[[Tensor, Tensor], Tensor]) -> None:
    beta = pyro.sample("beta", dist.Normal(0.0, 2.0).expand([5]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(times(x, beta), sigma), obs=y)


def broadcast(x: Tensor, y: Tensor) -> None:
    _regression(x, y, lambda x, beta: (beta.unsqueeze(-2) * x).sum(-1))


def for_one_draw(x: Tensor, y: Tensor) -> None:
    _regression(x, y, lambda x, beta: x @ beta)


MODELS = {"many draws": broadcast, "one draw": for_one_draw}


def data(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(number, 5, generator=generator)
    return x, x @ torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0]) + 0.7 * torch.randn(number, generator=generator)


Job = Callable[[Callable, tuple[Tensor, Tensor]], Callable[[], object]]


def whitening(model: Callable, args: tuple[Tensor, Tensor]) -> Callable[[], object]:
    guide = fg.AutoCoupling(model).setup(*args)
    return lambda: guide.whiten(*args)


def steps(model: Callable, args: tuple[Tensor, Tensor]) -> Callable[[], object]:
    guide = fg.AutoCoupling(model).setup(*args)
    options = {"num_particles": NUM_PARTICLES, "num_steps": NUM_STEPS, "whiten": None, "progress": False}
    return lambda: fg.fit(model, guide, *args, **options)


def draws(model: Callable, args: tuple[Tensor, Tensor]) -> Callable[[], object]:
    guide = fg.AutoCoupling(model).setup(*args)
    return lambda: fg.draw(model, guide, *args, num_samples=1000)


def export(model: Callable, args: tuple[Tensor, Tensor]) -> Callable[[], object]:
    guide = fg.AutoCoupling(model).setup(*args)
    return lambda: fg.to_arviz(guide, *args, num_samples=200)


def leave_one_out(model: Callable, args: tuple[Tensor, Tensor]) -> Callable[[], object]:
    made = fg.draw(model, fg.AutoCoupling(model).setup(*args), *args, num_samples=200, log_likelihood=True)
    return lambda: fg.compare({"guide": made})


JOBS: dict[str, Job] = {
    "whitening": whitening,
    f"fit of {NUM_STEPS} steps, {NUM_PARTICLES} particles, with its 10,000 draws": steps,
    "1000 draws with both densities": draws,
    "to_arviz of 200 draws": export,
    "leave-one-out of 200 draws": leave_one_out,
}


def measure(model: str, num_rows: int) -> list[dict]:
    """Seconds of one run of every job, and the rise of the largest resident size in MB."""
    torch.set_num_threads(1)
    found = []
    for name, job in JOBS.items():
        for number in (50, num_rows):
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            run = job(MODELS[model], data(number))
            before, wall, cpu = resident(), time.perf_counter(), time.process_time()
            run()
            seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
            numbers = {"seconds": seconds, "cpu_seconds": cpu_seconds, "megabytes": resident("VmHWM") - before}
        found.append({"job": name, "model": model, "rows": num_rows, **numbers})
    return found


def resident(peak: str = "") -> float:
    """The resident size in MB, from which on the largest one is counted; or the largest one. Linux alone."""
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(peak or "VmRSS")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/large_data.json"))
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "ROWS"), help="measure this alone and print JSON")
    options = parser.parse_args()
    if options.one:
        model, rows = options.one
        print(json.dumps(measure(model, int(rows))))
        return
    torch.set_num_threads(1)
    machine = environment("pyro-ppl", "arviz", "numpy")
    results: list[dict] = []
    for rows in NUM_ROWS:
        for model in MODELS:
            command = [sys.executable, "-m", "benchmarks.large_data", "--one", model, str(rows)]
            results += json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            write_results(options.out, {"environment": machine, "results": results}, report(machine, results))


def report(machine: dict, results: list[dict]) -> str:
    table = [
        [
            *(row["job"], row["model"], f"{row['rows']:,}"),
            *(f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", f"{row['megabytes']:.0f}"),
        ]
        for row in results
    ]
    header = ["job", "model written for", "rows", "seconds", "CPU seconds", "extra memory, MB"]
    introduction = " ".join(__doc__.split("\n\n", 1)[1].split())
    return "\n\n".join(
        [
            "# Large data",
            f"AutoCoupling. {describe(machine)}",
            introduction,
            markdown_table(header, sorted(table, key=lambda row: (row[0], row[1]))),
        ]
    )


if __name__ == "__main__":
    main()
