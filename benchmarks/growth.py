"""Seconds and bytes of a training step of the default guide against the number of latents.

The model is a Poisson regression with a latent rate for each group, and D − 1 groups. The guide is `AutoFlow` with its defaults,
whitened. A step is the path gradient of `Trace_ELBO` with 256 particles, captured, with Adam. Seconds are the median of the steps
after the capture. Bytes are the peak of the tensors that a step allocates, and the parameters with the two moments of Adam. The
exponent is that of a power of D between two sizes.

    python -m benchmarks.growth --out benchmarks/results/growth.json [--dims 100,1000,10000]
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import time
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import pyro_flowguides as fg

from .common import describe, environment, markdown_table, write_results
from .transforms import peak_memory

_NUM_PARTICLES = 256
_NUM_STEPS = 7


def groups(counts: Tensor) -> None:
    """A rate for every group, around a common one."""
    mean = pyro.sample("mean", dist.Normal(counts.new_zeros(()), 1.0))
    with pyro.plate("groups", len(counts)):
        log_rate = pyro.sample("log_rate", dist.Normal(mean, 0.7))
        pyro.sample("y", dist.Poisson(log_rate.exp()), obs=counts)


def measure(dim: int) -> dict[str, float | int | str]:
    """The figures of one number of latents."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    counts = torch.poisson((0.7 * torch.randn(dim - 1)).exp())
    guide = fg.AutoFlow(groups, gradient="path").setup(counts)
    clock = time.perf_counter()
    guide.whiten(counts)
    whitening = time.perf_counter() - clock
    loss = Trace_ELBO(num_particles=_NUM_PARTICLES, vectorize_particles=True, max_plate_nesting=1)
    svi = fg.CompiledSVI(groups, guide, pyro.optim.Adam({"lr": 0.01}), loss)
    svi.step(counts)
    seconds = []
    for _ in range(_NUM_STEPS):
        clock = time.perf_counter()
        svi.step(counts)
        seconds.append(time.perf_counter() - clock)
    parameters = sum(parameter.nbytes for parameter in guide.parameters())
    scale = guide.fixed_map.whole_scale
    kind = f"{len(scale.stretches)} directions" if isinstance(scale, fg.transforms.LowRank) else f"{scale.dim()}-d"
    return {
        "dim": dim,
        "whitening_seconds": whitening,
        "scale": kind.replace("1-d", "diagonal").replace("2-d", "full"),
        "seconds": statistics.median(seconds),
        "parameters": parameters,
        "bytes": peak_memory(lambda: svi.step(counts)) + 3 * parameters,
        "peak_of_process": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def exponents(rows: Sequence[dict], name: str) -> list[float]:
    """The power of D by which a figure grows, from each row to the next."""
    pairs = zip(rows, rows[1:], strict=False)
    return [math.log(b[name] / a[name]) / math.log(b["dim"] / a["dim"]) for a, b in pairs]


def to_markdown(results: dict) -> str:
    rows = results["rows"]
    growth = {name: ["", *(f"{value:.2f}" for value in exponents(rows, name))] for name in ("seconds", "bytes")}
    header = ["D", "scale", "whitening, s", "step, ms", "exponent", "bytes of a step, MB", "exponent", "process, MB"]
    table = [
        [
            f"{row['dim']:,}",
            row["scale"],
            f"{row['whitening_seconds']:.1f}",
            f"{1e3 * row['seconds']:.0f}",
            growth["seconds"][index],
            f"{row['bytes'] / 1e6:,.0f}",
            growth["bytes"][index],
            f"{row['peak_of_process'] / 1e6:,.0f}",
        ]
        for index, row in enumerate(rows)
    ]
    parts = ["# Growth of a step with the number of latents", __doc__.split("\n\n")[1].replace("\n", " ")]
    return "\n\n".join([*parts, describe(results["environment"]), markdown_table(header, table)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="benchmarks/results/growth.json", help="the JSON file to write")
    parser.add_argument("--dims", default="100,1000,10000", help="numbers of latents, in ascending order")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    rows = []
    for dim in options.dims.split(","):
        rows.append(measure(int(dim)))
        print(rows[-1], flush=True)
    results = {"environment": environment("pyro_flowguides"), "rows": rows}
    write_results(options.out, results, to_markdown(results))
    print(to_markdown(results))


if __name__ == "__main__":
    main()
