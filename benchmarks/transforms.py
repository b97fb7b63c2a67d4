"""Time and memory of one training step of every family of transforms, against other libraries.

One call is forward with log_det, and backward to the parameters and to the input. The sides take turns within one process, and
the figures are medians, so that the noise of the machine is the same for all sides. Memory is the peak of the tensors that one
call allocates, as torch's profiler records them; small peaks vary a little from call to call.

    python -m benchmarks.transforms --out benchmarks/results/transforms.json [--quick]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pyro_flowguides import transforms as T

from .common import describe, environment, markdown_table, write_results
from .peers import DIMS, FAMILIES, LARGEST, OURS, Layer

_DIMS = (10, 64, 512)
_BATCH_SIZES = (64, 4096)
# A call that takes longer than this many seconds is not repeated.
_LONGEST_CALL = 20.0
# The seconds for which a side is timed.
_TIME_PER_SIDE = 0.4
_LARGEST_PEAK = 6e9
_SCALING_DIMS = (100, 1_000, 10_000, 30_000, 100_000)
# For smaller D a step costs about the same whatever D, because launching its operations takes most of the time.
_LINEAR_FROM = 10_000
_SCALING_BATCH_SIZE = 16
_SCALING: dict[str, Callable[[int], T.FlowTransform]] = {
    "planar": T.Planar,
    "affine coupling, hidden layers of 64": lambda dim: T.AffineCoupling(dim, hidden_dims=(64, 64)),
    "sylvester, M = 8": lambda dim: T.Sylvester(dim, 8),
}


def make_step(layer: Layer, z: Tensor) -> Callable[[], None]:
    """One forward pass with log_det, and one backward pass to parameters and input."""
    parameters, call = layer

    def step() -> None:
        # A new tensor each time, because some libraries cache the previous result.
        point = z.detach().requires_grad_()
        outputs = [output for output in call(point) if output.requires_grad]
        torch.autograd.grad(
            outputs, [point, *parameters], [torch.ones_like(output) for output in outputs], allow_unused=True
        )

    return step


def time_in_turns(steps: dict[str, Callable[[], None]], seconds_per_side: float) -> dict[str, list[float]]:
    """Seconds per call of every side; the sides take turns."""
    first = {}
    for name, step in steps.items():
        step()
        start = time.perf_counter()
        step()
        first[name] = time.perf_counter() - start
    if max(first.values()) > _LONGEST_CALL:
        return {name: [seconds] for name, seconds in first.items()}
    num_rounds = int(min(max(seconds_per_side / (sum(first.values()) / len(first)), 5), 500))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(num_rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return times


def peak_memory(step: Callable[[], None]) -> int:
    """The largest number of bytes that the tensors of a step hold at one time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def compare(family: str, dim: int, batch_size: int, seconds_per_side: float) -> dict:
    """One cell of the table: the median time and the peak memory of every library."""
    torch.manual_seed(0)
    z = torch.randn(batch_size, dim)
    steps, skipped = {}, {}
    for library, constructor in FAMILIES[family].items():
        try:
            step = make_step(constructor(dim), z)
            step()
        except Exception as error:  # whatever a library raises: the cell reports it
            skipped[library] = f"{type(error).__name__}: {error}"
            continue
        steps[library] = step
    memory = {library: peak_memory(step) for library, step in steps.items()}
    for library, peak in memory.items():
        if peak > _LARGEST_PEAK:
            skipped[library] = f"needs {peak / 1e9:.1f} GB"
            del steps[library]
    times = time_in_turns(steps, seconds_per_side)
    median = {library: statistics.median(values) for library, values in times.items()}
    spread = {library: _spread(values) for library, values in times.items()}
    peers = {library: seconds for library, seconds in median.items() if library != OURS}
    cell = {
        "family": family,
        "dim": dim,
        "batch_size": batch_size,
        "repetitions": len(times[OURS]),
        "seconds": median,
        "relative_spread": spread,
        "peak_bytes": memory,
        "skipped": skipped,
    }
    if peers:
        fastest = min(peers, key=peers.__getitem__)
        cell |= {"fastest_peer": fastest, "time_ratio": median[OURS] / median[fastest]}
        cell |= against_leanest({library: memory[library] for library in [OURS, *peers]})
    return cell


def _sizes(family: str, quick: bool) -> list[tuple[int, int]]:
    """The D and the batches of a family."""
    dims = [dim for dim in (_DIMS[:2] if quick else _DIMS) if dim in DIMS.get(family, _DIMS)]
    sizes = [(dim, batch_size) for dim in dims for batch_size in _BATCH_SIZES]
    return [(dim, batch_size) for dim, batch_size in sizes if dim * batch_size <= LARGEST.get(family, math.inf)]


def against_leanest(memory: dict[str, int]) -> dict:
    """Our peak against the peak of the leanest peer; empty if a peak is 0, where the profiler has lost the events of a step."""
    if not all(memory.values()):
        return {}
    leanest = min((library for library in memory if library != OURS), key=memory.__getitem__)
    return {"leanest_peer": leanest, "memory_ratio": memory[OURS] / memory[leanest]}


def _spread(values: Sequence[float]) -> float:
    """The interquartile range as a fraction of the median."""
    if len(values) < 4:
        return 0.0
    lower, middle, upper = statistics.quantiles(values, n=4)
    return (upper - lower) / middle


def scaling(seconds_per_side: float) -> dict:
    """The time of a step against D, and the exponent of a power law through the sizes from ``_LINEAR_FROM`` on."""
    results = {}
    for name, constructor in _SCALING.items():
        steps = {}
        for dim in _SCALING_DIMS:
            torch.manual_seed(0)
            transform = constructor(dim)
            layer = list(transform.parameters()), transform.forward_and_log_det
            steps[str(dim)] = make_step(layer, torch.randn(_SCALING_BATCH_SIZE, dim))
        seconds = {dim: statistics.median(values) for dim, values in time_in_turns(steps, seconds_per_side).items()}
        points = [(dim, seconds[str(dim)]) for dim in _SCALING_DIMS if dim >= _LINEAR_FROM]
        log_dim, log_seconds = torch.tensor(points, dtype=torch.float64).log().unbind(-1)
        centred = log_dim - log_dim.mean()
        results[name] = {"seconds": seconds, "exponent": float((centred * log_seconds).sum() / centred.square().sum())}
    return results


def to_markdown(results: dict) -> str:
    """The tables of a results file."""
    rows = []
    for cell in results["cells"]:
        libraries = [library for library in cell["seconds"] if library != OURS]
        peers = "; ".join(f"{library} {_milliseconds(cell['seconds'][library])}" for library in libraries)
        peers += "".join(f"; {library} left out ({reason})" for library, reason in cell["skipped"].items())
        rows.append(
            [
                cell["family"],
                str(cell["dim"]),
                str(cell["batch_size"]),
                _milliseconds(cell["seconds"][OURS]),
                peers,
                f"{cell['time_ratio']:.2f}" if "time_ratio" in cell else "",
                f"{cell['memory_ratio']:.2f}" if "memory_ratio" in cell else "",
            ]
        )
    header = ["family", "D", "batch", "ours", "peers", "time ours / fastest", "memory ours / leanest"]
    spread = statistics.median(cell["relative_spread"][OURS] for cell in results["cells"])
    wins = sum(cell.get("time_ratio", 0) <= 1 for cell in results["cells"])
    parts = [
        "# Transforms: time and memory of a training step",
        __doc__.split("\n\n")[1].replace("\n", " "),
        f"{describe(results['environment'])} Times in ms. The machine was shared: in the median cell, the interquartile range is "
        f"{100 * spread:.0f} % of the median. On every side networks have two hidden layers of 64 with ReLU, and splines have 8 "
        "pieces. The fastest peer differs from row to row. A ratio below 1 means that ours is faster, as it is in "
        f"{wins} of {len(results['cells'])} cells.",
        "The sides do not always compute the same. Pyro's Sylvester returns a log-determinant that does not belong to its map. "
        "By default the residual flow of normflows estimates log_det at random from about four terms of its series, and ours is "
        "exact; in the other row both sum 20 terms with random traces. Ours takes exact spectral norms in every call; users of "
        "normflows add power iterations, which are not counted here. The linear maps of Zuko and normflows have no shift. The "
        "affine layers of normflows do not bound the log-scale. Continuous flows take 8 Runge–Kutta steps of order 4 here, with "
        "the gradients of these steps; Zuko's choose their steps, by default to an error of 1e-5, and solve the adjoint "
        "equation. Their networks have ELU there and SiLU here, those of the Glow of two levels ReLU there and SiLU here. D is "
        "the number of values of an image.",
        markdown_table(header, rows),
        "## Time against D",
        f"Ours, batch {_SCALING_BATCH_SIZE}, times in ms. The exponent belongs to a power law from D = {_LINEAR_FROM} on; 1 "
        "means a time proportional to D.",
        markdown_table(
            ["family", *(f"D = {dim}" for dim in _SCALING_DIMS), "exponent"],
            [
                [name, *map(_milliseconds, entry["seconds"].values()), f"{entry['exponent']:.2f}"]
                for name, entry in results["scaling"].items()
            ],
        ),
    ]
    return "\n\n".join(parts)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="benchmarks/results/transforms.json", help="the JSON file to write")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repetitions")
    parser.add_argument("--families", nargs="*", choices=list(FAMILIES), help="only these families")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seconds = 0.1 if options.quick else _TIME_PER_SIDE
    cells = []
    for family in options.families or FAMILIES:
        for dim, batch_size in _sizes(family, options.quick):
            cells.append(compare(family, dim, batch_size, seconds))
            cell = cells[-1]
            print(
                f"{family:24s} D={dim:<4d} batch={batch_size:<5d} ratio {cell.get('time_ratio', float('nan')):5.2f}"
                f" memory {cell.get('memory_ratio', float('nan')):5.2f}  "
                + "  ".join(f"{library} {_milliseconds(value)}" for library, value in cell["seconds"].items()),
                *cell["skipped"].values(),
                flush=True,
            )
    results = {
        "environment": environment("pyro-ppl", "zuko", "normflows", "nflows"),
        "cells": cells,
        "scaling": scaling(seconds),
    }
    write_results(options.out, results, to_markdown(results))
    for name, entry in results["scaling"].items():
        print(f"{name}: time ∝ D^{entry['exponent']:.2f}")


if __name__ == "__main__":
    main()
