"""The short round before the first one, with it and without: errors, effective draws, and processor time.

    python -m benchmarks.rounds --database PATH [--seeds 0,1,2] --out benchmarks/results/rounds.json

All posteriors of posteriordb with a reference whose start is good enough for a short round. PATH is the folder
``posterior_database`` of a checkout.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import pyro_flowguides as fg
from benchmarks.common import describe, environment, markdown_table, write_results
from benchmarks.posteriors.database import posteriors
from benchmarks.posteriors.known import KnownPosterior
from benchmarks.posteriors.scores import columns
from pyro_flowguides.training import schedules


def record(posterior: KnownPosterior, seed: int) -> dict[str, Any] | None:
    """A fit with the short round and one without; None if the start is too poor for it."""
    options: dict[str, Any] = {"seed": seed, "progress": False}
    start = fg.fit(posterior.model, fg.AutoFlow(posterior.model), *posterior.args, num_steps=1, **options)
    if not schedules.log_weight_sd(start.draws.log_weights) <= schedules.EASY_SD:
        return None
    sides = {}
    for side, easy_sd in (("short", schedules.EASY_SD), ("long", -1.0)):
        began = time.process_time()
        with patch.object(schedules, "EASY_SD", easy_sd):
            fit = fg.fit(posterior.model, fg.AutoFlow(posterior.model), *posterior.args, **options)
        seconds = time.process_time() - began
        assert posterior.reference is not None
        reference = posterior.reference
        values = (columns(fit.draws.posterior(), reference) - reference.mean) / reference.sd
        sides[side] = {
            "num_steps": len(fit.losses),
            "seconds": seconds,
            "mean_error": float(np.abs(values.mean(0)).max()),
            "sd_error": float(np.abs(values.std(0) - 1).max()),
            "ess": fit.ess.value / len(fit.draws),
        }
    return sides


def report(results: dict[str, Any]) -> str:
    rows = []
    for name, records in results["posteriors"].items():
        cells = []
        for side in ("short", "long"):
            each = [seed[side] for seed in records.values()]
            cells += [
                ", ".join(sorted({str(one["num_steps"]) for one in each}, key=int)),
                *(f"{max(one[key] for one in each):.3f}" for key in ("mean_error", "sd_error")),
                f"{min(one['ess'] for one in each):.2%}",
                f"{np.median([one['seconds'] for one in each]):.0f}",
            ]
        rows.append([name, str(len(records)), *cells])
    sides = [
        [f"{key} {side}" for key in ("steps", "mean", "sd", "effective", "seconds")] for side in ("with", "without")
    ]
    all_records = [seed for records in results["posteriors"].values() for seed in records.values()]
    ratio = np.median([one["long"]["seconds"] / one["short"]["seconds"] for one in all_records])
    return "\n".join(
        [
            "# The short round",
            "",
            describe(results["environment"]),
            "",
            "The default fit of posteriors whose whitened start is good enough for a short round, with it and without. Errors "
            "are the worst over parameters and seeds, in sds of the reference, whose own error of 10,000 draws is in them. "
            "Effective draws are the fewest. Seconds are of the processor, beside other jobs, median over seeds.",
            "",
            f"Median of the ratio of the times: {ratio:.1f}.",
            "",
            markdown_table(["posterior", "seeds", *sides[0], *sides[1]], rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rounds.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    results: dict[str, Any] = {"posteriors": {}, "environment": environment("pyro-ppl", "numpy")}
    for name, load in posteriors(options.database).items():
        posterior = load()
        if posterior.reference is None:
            continue
        for seed in options.seeds.split(","):
            found = record(posterior, int(seed))
            if found is not None:
                results["posteriors"].setdefault(name, {})[seed] = found
                print(name, seed, found, flush=True)
                write_results(options.out, results, report(results))


if __name__ == "__main__":
    main()
