"""Modes that a search finds, their masses, and what it costs where there is one mode.

    python -m benchmarks.modes --database PATH --out benchmarks/results/modes.json

Targets with several modes have exact masses. On posteriors with one mode there are fits of two guides with few steps; of the time
of longer fits the search is a smaller share. PATH is the folder ``posterior_database`` of a checkout of posteriordb; targets need
no file. ``--only`` takes names. Results are merged into the file.
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

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyro_flowguides as fg
from benchmarks.common import describe, environment, markdown_table, write_results
from benchmarks.posteriors.database import posteriors
from benchmarks.posteriors.known import KnownPosterior
from benchmarks.posteriors.targets import planar_posterior, targets
from pyro_flowguides.training import loop

NUM_STEPS, NUM_STEPS_OF_POOR_FIT = 1000, 300


# --- targets with several modes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """A target with several modes.

    Attributes:
        model: The model.
        args: Its arguments.
        centers: Where the modes are in unconstrained space, shape (K, D).
        masses: Of each.
        log_evidence: log Z, or None.
        num_starts: The number of starts of a batch.
    """

    model: Callable
    args: tuple
    centers: Tensor
    masses: Tensor
    log_evidence: float | None
    num_starts: int = 64


def normals(masses: tuple[float, ...], centers: Tensor, scale: float = 1.0, num_starts: int = 64) -> Truth:
    """A mixture of round normals."""
    logs, dim = torch.tensor(masses).log(), centers.shape[-1]

    def log_density(x: Tensor) -> Tensor:
        squared = ((x.unsqueeze(-2) - centers) / scale).square().sum(-1)
        return (logs - squared / 2).logsumexp(-1) - dim / 2 * math.log(2 * math.pi * scale**2)

    return Truth(fg.LogDensity(log_density, dim), (), centers.double(), torch.tensor(masses), 0.0, num_starts)


def apart(masses: tuple[float, ...], dim: int) -> Truth:
    """Two or three normals that are 10 standard deviations from each other."""
    centers = 10 / 2**0.5 * torch.eye(dim)[: len(masses)]
    if len(masses) > dim:
        centers = torch.tensor([[0.0, 0.0], [10.0, 0.0], [5.0, 75**0.5]])
    return normals(masses, centers)


def forty(dim: int) -> Truth:
    """Forty normals, in the plane as in FAB (Midgley et al. 2022): centres uniform on (−40, 40), sd log(1 + e)."""
    centers = 80 * torch.rand(40, dim, generator=torch.Generator().manual_seed(0)) - 40
    return normals((1 / 40,) * 40, centers, math.log1p(math.e), num_starts=256)


def first_energy() -> Truth:
    """U1 of Rezende and Mohamed (2015) on [−4, 4]²; its two modes are mirror images."""
    known = planar_posterior("U1")
    return Truth(known.model, known.args, torch.zeros(0, 0).double(), torch.tensor([0.5, 0.5]), known.log_evidence)


def many_wells() -> Truth:
    """Many-well 32: 16 independent double wells, 2¹⁶ modes. The centres are those of one well of each coordinate."""

    def log_density(x: Tensor) -> Tensor:
        first, second = x[..., ::2], x[..., 1::2]
        return (-first.pow(4) + 6 * first.square() + 0.5 * first - 0.5 * second.square()).sum(-1)

    return Truth(fg.LogDensity(log_density, 32), (), torch.zeros(0, 32).double(), torch.zeros(0), 164.6957)


def mixture_model(y: Tensor) -> None:
    """Two normals without an order."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[z], scale[z]), obs=y)


def markov_model(y: Tensor) -> None:
    """A hidden Markov model with two states without an order."""
    transition = pyro.sample("transition", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    with pyro.plate("states", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.0), 0.5))
    each = dist.Normal(loc, scale)
    pyro.sample("y", dist.DiscreteHMM(torch.zeros(2), transition.log(), each, duration=len(y)), obs=y)


def two_labels(model: Callable, y: Tensor) -> Truth:
    """By symmetry either labelling has half of the mass."""
    return Truth(model, (y,), torch.zeros(0, 0).double(), torch.tensor([0.5, 0.5]), None)


def data() -> Tensor:
    """A hundred values, 40 around −2 and 60 around 2, in blocks of ten."""
    labels = torch.tensor([0, 1, 1, 0, 1, 1, 0, 1, 0, 1]).repeat_interleave(10)
    return 4.0 * labels - 2.0 + torch.randn(100, generator=torch.Generator().manual_seed(0))


SEVERAL: dict[str, Callable[[], Truth]] = {
    **{f"two normals, D = {dim}": functools.partial(apart, (0.7, 0.3), dim) for dim in (2, 10, 50)},
    **{f"three normals, D = {dim}": functools.partial(apart, (0.6, 0.3, 0.1), dim) for dim in (2, 10, 50)},
    "U1 alone": first_energy,
    "forty normals, D = 2": functools.partial(forty, 2),
    "forty normals, D = 50": functools.partial(forty, 50),
    "many-well 32": many_wells,
    "mixture of two normals, labels": lambda: two_labels(mixture_model, data()),
    "hidden Markov model, labels": lambda: two_labels(markov_model, data()),
}


def search(name: str, seed: int) -> dict[str, Any]:
    """Looks for the modes of a target, without a guide."""
    truth = SEVERAL[name]()
    began = time.perf_counter()
    modes = fg.find_modes(truth.model, *truth.args, num_starts=truth.num_starts, seed=seed)
    record: dict[str, Any] = {
        "seconds": time.perf_counter() - began,
        "num_starts": modes.num_starts,
        "num_modes": len(modes),
        "masses": [round(mode.mass.value, 4) for mode in modes][:50],
        "symmetric": sum(mode.symmetric_to is not None for mode in modes),
        "worst_khat": max(mode.khat for mode in modes),
        "log_evidence": float(np.logaddexp.reduce([mode.log_mass for mode in modes])),
        "true_log_evidence": truth.log_evidence,
    }
    if len(truth.centers):
        record |= by_center(modes, truth)
    elif len(truth.masses):
        record |= {"true_modes": 2, "found": len(modes), "worst": max(abs(mode.mass.value - 0.5) for mode in modes)}
    else:
        signs = torch.stack([mode.loc[::2].sign() for mode in modes])
        both = (signs > 0).any(0) & (signs < 0).any(0)
        record |= {"true_modes": 2**16, "found": len(modes), "coordinates_with_both_wells": int(both.sum())}
    return record


def by_center(modes: fg.Modes, truth: Truth) -> dict[str, Any]:
    """How many centres have a mode, and how far its mass is from that of the centres that belong to it."""
    found = torch.stack([mode.loc for mode in modes]).cpu()
    distances, nearest = torch.cdist(truth.centers, found).min(-1)
    scale = float(modes[0].scale_tril.diagonal().mean())
    # Centres that overlap have one mode: its mass is theirs together.
    own = torch.zeros(len(modes)).index_add(0, nearest, truth.masses)
    masses = torch.tensor([mode.mass.value for mode in modes])
    reached = distances < 3 * scale
    ratio = (masses / own.clamp(min=1e-9))[nearest]
    return {
        "true_modes": len(truth.centers),
        "found": int(reached.sum()),
        "within_factor_1.5": int((reached & (ratio < 1.5) & (ratio > 1 / 1.5)).sum()),
        "worst": float((masses - own).abs().max()),
    }


# --- targets with one mode -----------------------------------------------------------------------------------------------


def share(load: Callable[[], KnownPosterior], seed: int) -> dict[str, Any]:
    """The record of a posterior in single precision, or in double where it cannot be trained otherwise."""
    try:
        return {"dtype": "float32", **share_of(load(), seed)}
    except RuntimeError:
        torch.set_default_dtype(torch.float64)
        try:
            return {"dtype": "float64", **share_of(load(), seed)}
        finally:
            torch.set_default_dtype(torch.float32)


def share_of(posterior: KnownPosterior, seed: int) -> dict[str, Any]:
    """The modes that two guides are said to have lost, and the share of a fit's time that the search takes.

    The default guide has a round of training and is searched as ``fit`` does it. ``AutoNormal`` is stopped early and misses most
    of many posteriors, where a false alarm is most likely; it is searched in any case.
    """
    fit, seconds = timed_fit(posterior, fg.AutoCoupling(posterior.model), seed, num_steps=NUM_STEPS)
    try:
        poor, _ = timed_fit(
            posterior, AutoNormal(posterior.model), seed, num_steps=NUM_STEPS_OF_POOR_FIT, search_modes=True
        )
    except RuntimeError:
        # A guide that is not whitened may find no finite loss.
        poor = None
    return {
        "dim": sum(value[0].numel() for value in fit.draws.unconstrained.values()),
        "lost": lost(fit),
        "lost_by_poor_fit": poor and lost(poor),
        "search_seconds": seconds,
        "fit_seconds": fit.wall_time,
        "share": seconds / fit.wall_time,
        "verdict": str(fit.verdict),
        "verdict_on_poor_fit": poor and str(poor.verdict),
    }


def timed_fit(posterior: KnownPosterior, guide: Callable, seed: int, **options: Any) -> tuple[fg.FitResult, float]:
    """A fit, and the seconds that the search for modes has taken."""
    seconds = []
    search_of_loop = loop.Loop._search

    def timed(self: loop.Loop, draws: fg.Draws, **options: Any) -> fg.Modes | None:
        began = time.perf_counter()
        modes = search_of_loop(self, draws, **options)
        seconds.append(time.perf_counter() - began)
        return modes

    pyro.clear_param_store()
    loop.Loop._search = timed  # type: ignore[method-assign]
    try:
        fit = fg.fit(posterior.model, guide, *posterior.args, seed=seed, progress=False, **options)
    finally:
        loop.Loop._search = search_of_loop  # type: ignore[method-assign]
    return fit, seconds[0]


def lost(fit: fg.FitResult) -> list | None:
    """Where the modes are that a fit is said to have lost, and their masses; None where there was no search."""
    return None if fit.modes is None else [[mode.where, mode.mass.value] for mode in fit.modes.lost]


# --- tables --------------------------------------------------------------------------------------------------------------


def report(results: dict[str, Any]) -> str:
    several = []
    for name, records in results["several"].items():
        values = list(records.values())

        def span(key: str, spec: str, values: list[dict] = values) -> str:
            numbers = [record[key] for record in values if record.get(key) is not None]
            if not numbers:
                return "–"
            low, high = f"{min(numbers):{spec}}", f"{max(numbers):{spec}}"
            return low if low == high else f"{low} … {high}"

        errors = [
            abs(record["log_evidence"] - record["true_log_evidence"])
            for record in values
            if record["true_log_evidence"] is not None
        ]
        several.append(
            [
                name,
                str(values[0]["true_modes"]),
                span("found", "d"),
                span("within_factor_1.5", "d"),
                span("worst", ".3f"),
                f"{max(errors):.3f}" if errors else "–",
                span("symmetric", "d"),
                span("num_starts", "d"),
                span("seconds", ".1f"),
            ]
        )
    one = []
    for name, records in sorted(results["one"].items()):
        for seed, record in records.items():
            numbers = ["–" if record[key] is None else str(len(record[key])) for key in ("lost", "lost_by_poor_fit")]
            one.append(
                [
                    name,
                    seed,
                    str(record["dim"]),
                    *numbers,
                    f"{record['search_seconds']:.2f}",
                    f"{record['fit_seconds']:.1f}",
                    f"{record['share']:.1%}",
                ]
            )
    header = ["target", "modes", "found", "mass within 1.5×", "worst error of a mass", "error of log Z", "symmetric"]
    lines = [
        "# Modes",
        "",
        describe(results["environment"]),
        "",
        "## Several modes: `find_modes`, no guide",
        "",
        "Ranges are over seeds. Centres that overlap count as found where they share a mode. Many-well 32 has 2¹⁶ modes: what is "
        "found is a part of them, and log Z is that of this part.",
        "",
        markdown_table([*header, "starts", "seconds"], several),
        "",
        "## One mode: modes said to be lost, and what the search costs",
        "",
        f"The default guide after {NUM_STEPS} steps, and `AutoNormal` after {NUM_STEPS_OF_POOR_FIT}, which misses most of many "
        "posteriors. Times are of the former. Single precision, or double where the fit is not possible otherwise. U1 and U4 "
        "have two modes, and U2 and U3 ridges; all others have one mode.",
        "",
        markdown_table(
            ["posterior", "seed", "D", "lost", "lost by AutoNormal", "search, seconds", "fit, seconds", "search / fit"],
            one,
        ),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/modes.json"))
    parser.add_argument("--database", type=Path)
    parser.add_argument("--sonar", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--seeds", default="0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"several": {}, "one": {}}
    if options.out.exists():
        results = json.loads(options.out.read_text())
    results["environment"] = environment("pyro-ppl", "numpy", "scipy")
    known = targets(options.sonar) | ({} if options.database is None else posteriors(options.database))
    # The first search loads ArviZ.
    search("two normals, D = 2", 0)
    for seed in options.seeds.split(","):
        jobs: dict[str, tuple[str, Callable[[], dict]]] = {
            name: ("several", functools.partial(search, name, int(seed))) for name in SEVERAL
        }
        jobs |= {
            name: ("one", lambda load=load, seed=seed: share(load, int(seed)))  # type: ignore[misc]
            for name, load in known.items()
        }
        for name, (kind, job) in jobs.items():
            if (options.only and name not in options.only) or seed in results[kind].get(name, {}):
                continue
            record = job()
            results[kind].setdefault(name, {})[seed] = record
            print(name, seed, {key: value for key, value in record.items() if key not in ("masses", "verdict")})
            write_results(options.out, results, report(results))


if __name__ == "__main__":
    main()
