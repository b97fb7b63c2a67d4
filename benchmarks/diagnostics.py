"""Time and memory of draws and their diagnostics.

Ten thousand draws with both densities on eight schools, and a million draws of a model in ten dimensions. Each job has a
process of its own. It first imports everything and runs a small job of the same kind; memory is the rise of the largest
resident size after that.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch

import pyro_flowguides as fg
from benchmarks.common import describe, environment, markdown_table, write_results
from pyro_flowguides.examples import EIGHT_SCHOOLS

REPEATS = 5


def ten_dimensions(y: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(y.new_ones(())))
    with pyro.plate("group", 8):
        theta = pyro.sample("theta", dist.Normal(mu, sigma))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def eight_schools() -> Callable[[int], fg.Draws]:
    data = EIGHT_SCHOOLS.data()
    guide = fg.AutoCoupling(EIGHT_SCHOOLS.model).whiten(model_kwargs=data)
    return lambda num_samples: fg.draw(EIGHT_SCHOOLS.model, guide, model_kwargs=data, num_samples=num_samples)


def ten_latents() -> Callable[[int], fg.Draws]:
    y = torch.linspace(-2.0, 2.0, 8)
    guide = fg.AutoCoupling(ten_dimensions).whiten(y)
    return lambda num_samples: fg.draw(ten_dimensions, guide, y, num_samples=num_samples)


def judge(draws: fg.Draws) -> list[Any]:
    """Everything that is computed from draws; the first use of an attribute computes it."""
    return [draws.elbo, draws.khat, draws.ess, draws.verdict, draws.summary(kind="all", weighted=True)]


# By name: a function that makes the function to draw with, the number of draws, and their use.
JOBS: dict[str, tuple[Callable[[], Callable[[int], fg.Draws]], int, Callable[[fg.Draws], Any]]] = {
    "draws with both densities, eight schools": (eight_schools, 10_000, lambda draws: None),
    "the same, with ELBO, k-hat, ESS and all tables": (eight_schools, 10_000, judge),
    "draws with both densities, ten dimensions": (ten_latents, 1_000_000, lambda draws: None),
    "the same, with ELBO, k-hat, ESS and all tables, ten dimensions": (ten_latents, 1_000_000, judge),
}


def measure(name: str) -> dict:
    """Seconds (the shortest of several runs) and the rise of the largest resident size, in MB."""
    torch.set_num_threads(1)
    setup, num_samples, use = JOBS[name]
    pyro.set_rng_seed(0)
    draw = setup()
    use(draw(1000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(REPEATS if num_samples < 100_000 else 1):
        start = time.perf_counter()
        use(draw(num_samples))
        seconds.append(time.perf_counter() - start)
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"draws": num_samples, "seconds": min(seconds), "megabytes": megabytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help="measure this job alone and print the result as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    torch.set_num_threads(1)
    command = [sys.executable, "-m", "benchmarks.diagnostics", "--one"]
    results = {
        name: json.loads(subprocess.run([*command, name], check=True, capture_output=True, text=True).stdout)
        for name in JOBS
    }
    machine = environment("pyro-ppl", "arviz", "numpy")
    rows = [
        [name, f"{row['draws']:,}", f"{row['seconds']:.2f}", f"{row['megabytes']:.0f}"] for name, row in results.items()
    ]
    markdown = "\n\n".join(
        [
            "# Draws and their diagnostics",
            f"AutoCoupling, whitened; float32. {describe(machine)}",
            " ".join(__doc__.split("\n\n", 1)[1].split()),
            markdown_table(["job", "draws", "seconds", "extra memory, MB"], rows),
        ]
    )
    print(markdown)
    if options.out:
        write_results(options.out, {"environment": machine, "results": results}, markdown)


if __name__ == "__main__":
    main()
