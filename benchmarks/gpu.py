"""What a GPU gives: tests on it, milliseconds per step, seconds to a verdict, and memory, beside the CPU of the same machine.

    python -m benchmarks.gpu --device cuda --sonar CSV
    python -m benchmarks.gpu --device cpu --quick --out /tmp/gpu.json     # a dry run of the whole program, in minutes

It is made for a machine that is lent for a few minutes. From a bare Python with torch, and the other packages as wheels in a
folder:

    pip install --no-index --find-links wheels --no-build-isolation -e . pytest hypothesis scikit-learn
    python -m benchmarks.gpu --device cuda --sonar CSV

The parts share the time of ``--minutes`` (7 by default): tests of the contract of transforms, of guides and of captured steps
with ``--device``; memory; steps; fits. What a part has no time for is listed in the results, which are written after every row.
The cheapest rows come first.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import pyro_flowguides as fg
from pyro_flowguides.compiled import backends, capture, memory
from pyro_flowguides.compiled.losses import KL

from .common import describe, environment, markdown_table, write_results
from .svi_models import problems

TESTS = (
    *("tests/compiled/test_cuda_graphs.py", "tests/compiled/test_backends.py", "tests/compiled/test_waiting.py"),
    *("tests/compiled/test_binding.py", "tests/transforms/test_contract.py", "tests/guides"),
)
# The share of the time that each part may end at.
ENDS = {"tests": 0.25, "memory": 0.4, "steps": 0.75, "fits": 1.0}
# How steps are run, by the number of particles; on the CPU of a machine with a GPU they are replayed.
SIDES_AT: dict[int, tuple[str, ...]] = {
    256: ("CUDA graph", "eager", "replay", "inductor"),
    4096: ("CUDA graph", "inductor"),
    65_536: ("CUDA graph",),
    16: ("CUDA graph", "eager"),
}
MEMORY_PARTICLES, MEMORY_CHUNK = 256, 32
SECONDS_PER_ROW = 1.0


# --- problems ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model with its arguments on a device.

    Attributes:
        model: The model.
        args: Its arguments.
        guide: Makes the guide.
    """

    model: Callable
    args: tuple[Tensor, ...]
    guide: Callable[[Callable], Callable]


def cox_process(counts: Tensor, factor: Tensor) -> None:
    """A log-Gaussian Cox process on a square grid, whose kernel is a product of one along each axis."""
    side = len(factor)
    z = pyro.sample("z", dist.Normal(counts.new_zeros(side * side), 1.0).to_event(1))
    field = factor @ z.reshape(*z.shape[:-1], side, side) @ factor.mT - 1.0
    pyro.sample("counts", dist.Poisson(field.exp()).to_event(2), obs=counts)


def cox_case(side: int, device: torch.device) -> Case:
    """Counts drawn from the model itself."""
    places = torch.arange(side, dtype=torch.float64, device="cpu") / side
    kernel = (-(places.unsqueeze(-1) - places).abs() * 5).exp() + 1e-6 * torch.eye(
        side, dtype=torch.float64, device="cpu"
    )
    factor = torch.linalg.cholesky(kernel)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(side, side, dtype=torch.float64, generator=generator, device="cpu")
    counts = torch.poisson((factor @ noise @ factor.mT - 1.0).exp(), generator=generator)
    return Case(cox_process, (counts.float().to(device), factor.float().to(device)), fg.AutoFlow)


def funnel(origin: Tensor) -> None:
    """Neal's funnel in ten dimensions."""
    scale = pyro.sample("scale", dist.Normal(origin, 3.0))
    pyro.sample("x", dist.Normal(origin.new_zeros(9), (scale / 2).exp().unsqueeze(-1)).to_event(1))


def digits_case(device: torch.device) -> Case:
    """An autoencoder of 8 × 8 digits, with planar flows, on a minibatch of 100."""
    from .vae import POSTERIORS, Autoencoder, digits

    grey, _, _ = digits()
    autoencoder = Autoencoder(len(grey))
    for network in (autoencoder.encoder, autoencoder.decoder):
        network.to(device)
    flow = POSTERIORS["planar, 16 layers"]
    pixels = grey[:100].round().to(device)
    return Case(autoencoder.model, (pixels,), lambda model: fg.AmortizedFlow(model, autoencoder.encoder, flow))


def cases(sonar: Path | None, quick: bool) -> dict[str, Callable[[torch.device], Case]]:
    """The models whose steps are timed."""

    def tabular(name: str, device: torch.device) -> Case:
        (problem,) = [each for each in problems(sonar) if each.name == name] if sonar else []
        return Case(problem.model, tuple(tensor.to(device) for tensor in problem.tensors()), fg.AutoFlow)

    def schools(device: torch.device) -> Case:
        from .svi_models import _eight_schools_data, eight_schools

        return Case(
            eight_schools, tuple(torch.as_tensor(each).to(device) for each in _eight_schools_data()), fg.AutoFlow
        )

    side = 8 if quick else 40
    found: dict[str, Callable[[torch.device], Case]] = {"eight schools": schools}
    if sonar is not None:
        found["sonar"] = functools.partial(tabular, "sonar")
    found[f"Cox process, D = {side**2}"] = functools.partial(cox_case, side)
    found["VAE of digits"] = digits_case
    return found


def posteriors(sonar: Path | None, quick: bool) -> dict[str, Callable[[torch.device], Case]]:
    """Five posteriors to fit; four without the sonar data."""
    of_steps = cases(sonar, quick)
    found = {name: of_steps[name] for name in ("eight schools", "sonar") if name in of_steps}
    found["funnel, D = 10"] = lambda device: Case(funnel, (torch.zeros((), device=device),), fg.AutoFlow)
    if sonar is not None:

        def hierarchical(device: torch.device) -> Case:
            (problem,) = [each for each in problems(sonar) if each.name == "hierarchical"]
            return Case(problem.model, tuple(tensor.to(device) for tensor in problem.tensors()), fg.AutoFlow)

        found["hierarchical"] = hierarchical
    found["Cox process, D = 64"] = functools.partial(cox_case, 8)
    return found


# --- measurements ------------------------------------------------------------------------------------------------------


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def without_cuda_graphs() -> Iterator[None]:
    with mock.patch.object(backends, "can_record", return_value=False):
        yield


# How a step is run: the backend, and what holds meanwhile.
SIDES: dict[str, tuple[str, Callable[[], Any]]] = {
    "eager": ("eager", contextlib.nullcontext),
    "replay": ("replay", without_cuda_graphs),
    "CUDA graph": ("replay", contextlib.nullcontext),
    "inductor": ("inductor", contextlib.nullcontext),
}


def svi_of(case: Case, num_particles: int, **options: Any) -> fg.CompiledSVI:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = case.guide(case.model)
    # An amortised guide stands in a plate of its own.
    loss: Any = KL(num_particles, max_plate_nesting=1)
    if isinstance(guide, fg.AmortizedFlow):
        loss = Trace_ELBO(num_particles=num_particles, vectorize_particles=num_particles > 1, max_plate_nesting=1)
    optim = functools.partial(torch.optim.Adam, lr=1e-3)
    return fg.CompiledSVI(case.model, guide, optim, loss, clip_factor=2.0, **options)


def milliseconds(case: Case, num_particles: int, side: str, device: torch.device, seconds: float) -> dict[str, float]:
    """The median time of a step over some runs, and the seconds until the first steps were done."""
    backend, held = SIDES[side]
    with held():
        svi = svi_of(case, num_particles, backend=backend)
        began = time.perf_counter()
        # Set-up, capture, compilation, and the first launches.
        svi.run(2, *case.args)
        svi.run(6, *case.args)
        wait(device)
        ready = time.perf_counter() - began
        times: list[float] = []
        count = 1
        while sum(times) * count < seconds or len(times) < 3:
            start = time.perf_counter()
            svi.run(count, *case.args)
            wait(device)
            spent = time.perf_counter() - start
            if spent < seconds / 20:
                # Too short to be measured: more at once, and anew.
                times.clear()
                count *= 2
                continue
            times.append(spent / count)
    return {"ms": 1e3 * statistics.median(times), "seconds_until_ready": ready}


def measure_steps(options: argparse.Namespace, device: torch.device, rows: list[dict], part: Part) -> None:
    found = cases(options.sonar, options.quick)
    devices = [device] if device.type == "cpu" else [device, torch.device("cpu")]
    for num_particles, sides in SIDES_AT.items():
        if options.quick and num_particles > 256:
            continue
        for name, make in found.items():
            for where in devices:
                alone = [side for side in ("replay", "eager") if side in sides or side == "replay"]
                here = sides if where.type == "cuda" else alone if device.type == "cpu" else ["replay"]
                for side in here:
                    row = {"model": name, "particles": num_particles, "device": where.type, "side": side}
                    if part.is_over(row):
                        continue
                    measure = functools.partial(
                        milliseconds, make(where), num_particles, side, where, 0.1 if options.quick else SECONDS_PER_ROW
                    )
                    part.add(rows, row, measure)


def fit_time(case: Case, quick: bool) -> dict[str, Any]:
    pyro.clear_param_store()
    options = {"num_steps": 60, "num_particles": 32} if quick else {}
    fit = fg.fit(case.model, case.guide(case.model), *case.args, seed=0, progress=False, **options)
    return {
        "seconds": fit.wall_time,
        "steps": len(fit.losses),
        "verdict": fit.verdict.kind.name.lower(),
        "khat": fit.khat.value,
        "elbo": fit.elbo.value,
        "elbo_se": fit.elbo.se,
    }


def measure_fits(options: argparse.Namespace, device: torch.device, rows: list[dict], part: Part) -> None:
    for where in [device] if device.type == "cpu" else [device, torch.device("cpu")]:
        for name, make in posteriors(options.sonar, options.quick).items():
            row = {"posterior": name, "device": where.type}
            if not part.is_over(row):
                part.add(rows, row, functools.partial(fit_time, make(where), options.quick))


def step_memory(side: int, chunk_size: int | None, device: torch.device, num_particles: int) -> dict[str, float]:
    """Predicted and measured megabytes of a step beside what is there before it."""
    case = cox_case(side, device)
    svi = svi_of(case, num_particles, backend="eager", chunk_size=chunk_size)
    svi.run(1, *case.args)
    trained = svi._trained

    def gradient(number: int | None) -> None:
        with capture.no_waiting():
            trained._gradients_of(number, case.args, {})

    def whole() -> None:
        with capture.no_waiting():
            trained.gradients(case.args, {})

    predicted = memory.predict(gradient).of(chunk_size or num_particles)
    result = {"predicted_megabytes": predicted / 1e6, "eager_megabytes": peak(whole, device) / 1e6}
    replayed = svi_of(case, num_particles, backend="replay", chunk_size=chunk_size)
    # Captured, launched one by one, and recorded as a CUDA graph, which has memory of its own.
    replayed.run(2, *case.args)
    result["replayed_megabytes"] = peak(lambda: replayed.run(6, *case.args), device) / 1e6
    return result


def peak(run: Callable[[], Any], device: torch.device) -> float:
    """The bytes that are allocated at the most, beside those that are before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from .transforms import peak_memory

    return peak_memory(run)


def measure_memory(options: argparse.Namespace, device: torch.device, rows: list[dict], part: Part) -> None:
    for side in (8, 12) if options.quick else (40, 100):
        for chunk_size in (MEMORY_CHUNK, None):
            row = {"dim": side**2, "particles": MEMORY_PARTICLES, "chunk_size": chunk_size, "device": device.type}
            if not part.is_over(row):
                part.add(rows, row, functools.partial(step_memory, side, chunk_size, device, MEMORY_PARTICLES))


def run_tests(options: argparse.Namespace, device: torch.device, rows: list[dict], part: Part) -> None:
    """One row for each file or folder of tests."""
    for path in TESTS[:1] if options.quick else TESTS:
        row = {"tests": path}
        if not part.is_over(row):
            part.add(rows, row, functools.partial(test_counts, path, device, part.seconds_left))


def test_counts(path: str, device: torch.device, seconds: float) -> dict[str, Any]:
    """The last line of pytest, and the tests that failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "-m", "not slow"]
    try:
        found = subprocess.run(
            [*command, "--device", str(device), path],
            capture_output=True,
            text=True,
            timeout=max(5.0, seconds),
            check=False,
        )
        output, ended = found.stdout, True
    except subprocess.TimeoutExpired as error:
        output, ended = (error.stdout or b"").decode(), False
    lines = [line for line in output.splitlines() if line.strip()]
    return {
        "ended": ended,
        "summary": lines[-1].strip("= ") if lines else "",
        "failed": re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE),
    }


test_counts.__test__ = False  # type: ignore[attr-defined]


# --- the program -------------------------------------------------------------------------------------------------------


class Part:
    """A part of the program, with the time that it may take.

    Arguments:
        end: When it has to end.
        left_out: Rows that there was no time for.
        write: Writes the results so far.
    """

    def __init__(self, end: float, left_out: list[dict], write: Callable[[], None]) -> None:
        self.end, self.left_out, self.write = end, left_out, write

    @property
    def seconds_left(self) -> float:
        return self.end - time.perf_counter()

    def is_over(self, row: dict) -> bool:
        """Whether there is no time left for a row, which is noted then."""
        if self.seconds_left > 0:
            return False
        self.left_out.append(row)
        return True

    def add(self, rows: list[dict], row: dict, measure: Callable[[], dict]) -> None:
        """Adds a row with what was measured, or with the error that came instead."""
        try:
            row = row | measure()
        except Exception as error:  # whatever it is, the other rows count
            row = row | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        rows.append(row)
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        self.write()


PARTS: dict[str, Callable[[argparse.Namespace, torch.device, list[dict], Part], None]] = {
    "tests": run_tests,
    "memory": measure_memory,
    "steps": measure_steps,
    "fits": measure_fits,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run")
    parser.add_argument("--sonar", type=Path, help="the sonar data, CSV; without them the models on them are left out")
    parser.add_argument("--minutes", type=float, default=7.0, help="the time for everything")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="small sizes, and no compiler")
    parser.add_argument("--out", type=Path, help="the JSON file; a dry run on the CPU needs one")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu makes a dry run")
    if device.type != "cuda" and options.out is None:
        parser.error("a dry run says nothing of a GPU, and is not kept among the results: give --out a file elsewhere")
    out = options.out or Path(__file__).parent / "results" / "gpu.json"
    warnings.simplefilter("ignore")
    machine = environment("pyro-ppl", "pyro_flowguides") | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    results: dict[str, Any] = {"environment": machine, "quick": options.quick, "left_out": []}
    results |= {part: [] for part in options.parts}

    def write() -> None:
        write_results(out, results, report(results))

    began = time.perf_counter()
    for name in options.parts:
        part = Part(began + 60 * options.minutes * ENDS[name], results["left_out"], write)
        PARTS[name](options, device, results[name], part)
        results["seconds"] = time.perf_counter() - began
        write()


# --- tables ------------------------------------------------------------------------------------------------------------


def report(results: dict[str, Any]) -> str:
    machine = results["environment"]
    parts = [
        "# A GPU beside the CPU of the same machine",
        f"GPU: {machine['device']}. {describe(machine)} float32 products of matrices: precision "
        f'"{machine["float32_matmul_precision"]}".',
    ]
    if machine["device"] == "none":
        parts.append("A dry run on the CPU, which says that the program works, and nothing of a GPU.")
    if results["quick"]:
        parts.append("With `--quick`: small sizes, and times that are too short to count.")
    if "tests" in results:
        parts += [
            "## Tests",
            markdown_table(["tests", "result"], [[row["tests"], _outcome(row)] for row in results["tests"]]),
        ]
    if "steps" in results:
        parts += ["## Milliseconds per step", _steps_table(results["steps"])]
    if "fits" in results:
        header = ["posterior", "device", "seconds", "steps", "ELBO", "k-hat", "verdict"]
        table = markdown_table(header, list(map(_fit_row, results["fits"])))
        parts += ["## Seconds to a verdict", "`fit` with its defaults.", table]
    if "memory" in results:
        header = ["D", "particles", "chunks of", "predicted, MB", "eager, MB", "captured, MB"]
        parts += [
            "## Memory of a step",
            "The peak beside what is there before the step: the Cox process with `AutoFlow`. The prediction is of an eager step.",
            markdown_table(header, list(map(_memory_row, results["memory"]))),
        ]
    if results["left_out"]:
        parts.append(f"{len(results['left_out'])} rows had no time left; the JSON file lists them.")
    return "\n\n".join(parts)


def _outcome(row: dict) -> str:
    if "error" in row:
        return str(row["error"])
    failed = f"; failed: {', '.join(row['failed'])}" if row["failed"] else ""
    return row["summary"] + failed if row["ended"] else f"did not end in time{failed}"


def _steps_table(rows: list[dict]) -> str:
    columns = list(dict.fromkeys((row["device"], row["side"]) for row in rows))
    lines = list(dict.fromkeys((row["model"], row["particles"]) for row in rows))
    cells = {(row["model"], row["particles"], row["device"], row["side"]): row for row in rows}

    def cell(row: dict | None) -> str:
        if row is None:
            return ""
        return f"{row['ms']:.3g}" if "ms" in row else "failed"

    header = ["model", "particles", *(f"{side}, {device}" for device, side in columns)]
    return markdown_table(
        header, [[line[0], str(line[1]), *(cell(cells.get((*line, *column))) for column in columns)] for line in lines]
    )


def _fit_row(row: dict) -> list[str]:
    if "error" in row:
        return [row["posterior"], row["device"], row["error"], "", "", "", ""]
    khat = "" if math.isnan(row["khat"]) else f"{row['khat']:.2f}"
    elbo = f"{row['elbo']:.3f} ± {row['elbo_se']:.3f}"
    return [row["posterior"], row["device"], f"{row['seconds']:.1f}", str(row["steps"]), elbo, khat, row["verdict"]]


def _memory_row(row: dict) -> list[str]:
    start = [str(row["dim"]), str(row["particles"]), str(row["chunk_size"] or "all")]
    if "error" in row:
        return [*start, row["error"], "", ""]
    names = ("predicted_megabytes", "eager_megabytes", "replayed_megabytes")
    return [*start, *(f"{row[name]:,.1f}" if name in row else "" for name in names)]


if __name__ == "__main__":
    main()
