"""What a target that is flat at first and a mass-covering objective find, and what they cost where there is one mode.

    python -m benchmarks.tempering --database PATH --out benchmarks/results/tempering.json

Every way has the default guide ``AutoCoupling`` and the same number of steps in one round. Targets with several modes have
exact masses. PATH is the folder ``posterior_database`` of a checkout of posteriordb. ``--only`` takes names of targets,
``--ways`` those of ways. Results are merged into the file.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

import pyro_flowguides as fg
from benchmarks.common import describe, environment, markdown_table, write_results
from benchmarks.modes import SEVERAL
from benchmarks.posteriors.database import posteriors
from benchmarks.posteriors.known import KnownPosterior
from benchmarks.posteriors.targets import ENERGIES, targets

NUM_STEPS, NUM_DRAWS = 3000, 100_000
INIT_SCALE = 1.5
# Where the modes are far apart, the start is as wide as they are.
INIT_SCALES = {"forty normals, D = 2": 20.0, "forty normals, D = 50": 20.0}
# A mode counts as found if the guide gives it its mass within this factor.
FACTOR = 1.5
# Annealed draws are noisy, so that steps are shorter than the default ones.
BOOTSTRAP = {
    "loss": fg.FlowAnnealedBootstrap(),
    "whiten": None,
    "optim": functools.partial(torch.optim.Adam, lr=3e-3),
}
WAYS: dict[str, dict[str, Any]] = {
    "as by default": {},
    "tempered": {"temper": "linear"},
    "not whitened": {"whiten": None},
    "tempered, not whitened": {"temper": "linear", "whiten": None},
    "Rezende & Mohamed": {"temper": "rezende_mohamed", "num_steps": 12_000, "whiten": None},
    "splines, tempered, not whitened": {"guide": fg.AutoSpline, "temper": "linear", "whiten": None},
    "annealed bootstrap": BOOTSTRAP,
    "splines, annealed bootstrap": {"guide": fg.AutoSpline, **BOOTSTRAP},
    "splines, tempered, then annealed bootstrap": {
        "guide": fg.AutoSpline,
        "temper": "linear",
        "whiten": None,
        "then": BOOTSTRAP,
    },
}
# These have one mode; the tempering can only cost something.
ONE_MODE = ("eight_schools_centered", "funnel_10", "kidiq-kidscore_momhsiq", "gp_pois_regr-gp_pois_regr")


@dataclass(frozen=True)
class Target:
    """A model with its exact answers.

    Attributes:
        model: The model.
        args: Its arguments.
        centers: Where the modes are, shape (K, D); none where they are ridges or too many.
        masses: Of each.
        log_evidence: log Z, or None.
    """

    model: Callable
    args: tuple
    centers: Tensor
    masses: Tensor
    log_evidence: float | None


def _with_modes(name: str) -> Target:
    truth = SEVERAL[name]()
    return Target(truth.model, truth.args, truth.centers, truth.masses, truth.log_evidence)


def _known(load: Callable[[], KnownPosterior], name: str) -> Target:
    known = load()
    # Of those in the plane U1 alone has separate modes, of equal mass by symmetry.
    centers = torch.tensor([[-2.0, 0.0], [2.0, 0.0]]).double() if name == "U1" else torch.zeros(0, 2).double()
    return Target(known.model, known.args, centers, torch.full((len(centers),), 0.5), known.log_evidence)


def record(target: Target, way: dict[str, Any], seed: int, num_steps: int, init_scale: float) -> dict[str, Any]:
    """One fit and what its draws say."""
    pyro.clear_param_store()
    options = {"num_steps": num_steps, "guide": fg.AutoCoupling, **way}
    scale = {"init_scale": init_scale} if options.get("whiten", "auto") is None else {}
    guide = options.pop("guide")(target.model, **scale)
    then = options.pop("then", None)
    began = time.process_time()
    fit = fg.fit(target.model, guide, *target.args, seed=seed, search_modes=False, progress=False, **options)
    if then is not None:
        more = {"num_steps": num_steps // 2, "seed": seed, **then}
        fit = fg.fit(target.model, fit.guide, *target.args, search_modes=False, progress=False, **more)
    seconds = time.process_time() - began
    draws = fg.draw(target.model, fit.guide, *target.args, num_samples=NUM_DRAWS, batch_size=10_000)
    found: dict[str, Any] = {
        "elbo": draws.elbo.value,
        "elbo_se": draws.elbo.se,
        "seconds": seconds,
        "num_steps": options["num_steps"],
    }
    found["khat"] = draws.khat.value
    found["num_skipped"], found["num_rolled_back"] = fit.num_skipped, fit.num_rolled_back
    log_z = float(draws.log_weights.double().logsumexp(0)) - math.log(NUM_DRAWS)
    if target.log_evidence is not None:
        found |= {"gap": target.log_evidence - draws.elbo.value, "log_z_error": log_z - target.log_evidence}
    # Constrained: the centres of U1 are in its own space.
    points = torch.cat([value.reshape(NUM_DRAWS, -1) for value in draws.values.values()], -1).double()
    if len(target.centers):
        found |= by_center(points, target)
    elif points.shape[-1] == 32:
        share = (points[:, ::2] > 0).double().mean(0)
        found["coordinates_with_both_wells"] = int(((share > 0.01) & (share < 0.99)).sum())
        found["least_share"] = float(torch.minimum(share, 1 - share).min())
    return found


def by_center(points: Tensor, target: Target) -> dict[str, Any]:
    """How many modes have their mass within a factor, by the draws that are nearest to each, and the worst error of a mass."""
    nearest = torch.cat([torch.cdist(part, target.centers).argmin(-1) for part in points.split(10_000)])
    masses = nearest.bincount(minlength=len(target.centers)) / len(points)
    found = (masses < FACTOR * target.masses) & (masses > target.masses / FACTOR)
    return {
        "num_modes": len(target.centers),
        "found": int(found.sum()),
        "drawn": int((masses > target.masses / 100).sum()),
        "worst_mass_error": float((masses - target.masses).abs().max()),
    }


def report(results: dict[str, Any]) -> str:
    rows = []
    for name, ways in results["targets"].items():
        for way, by_seed in ways.items():
            values = list(by_seed.values())

            def span(key: str, spec: str, values: list[dict] = values) -> str:
                numbers = [record[key] for record in values if record.get(key) is not None]
                if not numbers:
                    return "–"
                low, high = f"{min(numbers):{spec}}", f"{max(numbers):{spec}}"
                return low if low == high else f"{low} … {high}"

            modes = span("found", "d")
            if "num_modes" in values[0]:
                modes += f" of {values[0]['num_modes']}"
            elif "coordinates_with_both_wells" in values[0]:
                modes = span("coordinates_with_both_wells", "d") + " of 16 pairs"
            rows.append(
                [
                    name,
                    way,
                    span("num_steps", "d"),
                    str(len(values)),
                    span("gap", ".3f") if "gap" in values[0] else f"ELBO {span('elbo', '.3f')}",
                    span("log_z_error", "+.3f"),
                    span("drawn", "d"),
                    modes,
                    span("worst_mass_error", ".3f"),
                    str(sum(record["num_rolled_back"] for record in values)),
                    span("seconds", ".0f"),
                ]
            )
    header = [
        "target",
        "way",
        "steps",
        "seeds",
        "log Z − ELBO",
        "error of log Z",
        "reached",
        "right mass",
        "worst error",
    ]
    return "\n".join(
        [
            "# A target that is flat at first, and an objective that covers modes",
            "",
            describe(results["environment"]),
            "",
            "`AutoCoupling`, or `AutoSpline` where it says so, and one round of steps. Ranges are over seeds. The error of log Z "
            f"is that by the weights of {NUM_DRAWS:,} draws. A mode is reached if the guide gives it a hundredth of its mass, "
            f"and its mass is right within a factor of {FACTOR}; the last error is that of a mass. A pair of the many wells "
            "counts if each of its two wells has a hundredth of the draws. The annealed bootstrap is `FlowAnnealedBootstrap` "
            "with its defaults, and Adam at 3e-3; half as many of its steps follow where it comes second. Guides that are not "
            f"whitened start with standard deviation {INIT_SCALE} in unconstrained space, and 20 for the forty normals, whose "
            "centres lie within ± 40. Seconds are those of the processor for the fit, beside other jobs.",
            "",
            markdown_table([*header, "rollbacks", "seconds"], rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tempering.json"))
    parser.add_argument("--database", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--ways", nargs="+", default=list(WAYS)[:4], choices=list(WAYS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--num-steps", type=int, default=NUM_STEPS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"targets": {}}
    if options.out.exists():
        results = json.loads(options.out.read_text())
    results["environment"] = environment("pyro-ppl", "numpy")
    known = targets() | ({} if options.database is None else posteriors(options.database))
    names = [name for name in SEVERAL if "labels" not in name and name != "U1 alone"]
    load: dict[str, Callable[[], Target]] = {
        name: functools.partial(_known, known[name], name) for name in [*ENERGIES, *ONE_MODE] if name in known
    }
    load |= {name: functools.partial(_with_modes, name) for name in names}
    for seed in options.seeds.split(","):
        for name in load:
            if options.only and name not in options.only:
                continue
            target = load[name]()
            for way in options.ways:
                if seed in results["targets"].get(name, {}).get(way, {}):
                    continue
                scale = INIT_SCALES.get(name, INIT_SCALE)
                found = record(target, WAYS[way], int(seed), options.num_steps, scale)
                results["targets"].setdefault(name, {}).setdefault(way, {})[seed] = found
                print(name, way, seed, found, flush=True)
                write_results(options.out, results, report(results))


if __name__ == "__main__":
    main()
