"""A mixture of flows on targets with several modes: the mass of each mode, the gap of the ELBO, log Z, and the time.

    python -m benchmarks.mixtures --out benchmarks/results/mixtures.json

Masses are those of the draws of the guide, without weights. ``--only`` takes names. Results are merged into the file.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

import pyro_flowguides as fg
from benchmarks.common import describe, environment, markdown_table, write_results
from benchmarks.modes import SEVERAL, Truth

NAMES = [name for name in SEVERAL if name != "many-well 32"]
# The whitened start of a mixture of normals is exact, and steps are long with forty components.
NUM_STEPS: dict[str, int | None] = {"forty normals, D = 2": 30, "forty normals, D = 50": 10}


def record(name: str, seed: int) -> dict[str, Any]:
    """Fits a mixture to a target."""
    truth = SEVERAL[name]()
    pyro.clear_param_store()
    # Of the processor: other jobs run beside it.
    began = time.process_time()
    fit = fg.fit(
        truth.model,
        fg.AutoMixture(truth.model),
        *truth.args,
        seed=seed,
        num_steps=NUM_STEPS.get(name),
        progress=False,
    )
    seconds = time.process_time() - began
    log_weights = fit.draws.log_weights.double()
    log_z = float(log_weights.logsumexp(0)) - float(np.log(len(log_weights)))
    expected = truth.masses.double()
    masses = shares(fit, truth)
    ratio = masses / expected
    return {
        "seconds": seconds,
        "num_steps": len(fit.losses),
        "num_components": len(fit.guide.weights),  # type: ignore[attr-defined]
        "masses": [round(float(mass), 4) for mass in masses],
        "true_masses": [round(float(mass), 4) for mass in expected],
        "worst": float((masses - expected).abs().max()),
        "within_factor_1.5": int(((ratio < 1.5) & (ratio > 1 / 1.5)).sum()),
        "gap": (log_z if truth.log_evidence is None else truth.log_evidence) - fit.elbo.value,
        "elbo_se": fit.elbo.se,
        "error_of_log_evidence": None if truth.log_evidence is None else log_z - truth.log_evidence,
        "ess": float(fit.ess.value) / len(log_weights),
        "khat": float(fit.khat.value),
        "lost": None if fit.modes is None else len(fit.modes.lost),
        "verdict": str(fit.verdict),
    }


def shares(fit: fg.FitResult, truth: Truth) -> Tensor:
    """The share of the draws that belongs to each mode."""
    values = fit.draws.values
    if len(truth.centers):
        x = values["x"].reshape(len(fit.draws), -1).double()
        # Centres may overlap: a draw belongs to each as much as the truth says. All normals of a target have one scale.
        scale = 1.3132617 if len(truth.centers) == 40 else 1.0
        joint = truth.masses.double().log() - torch.cdist(x, truth.centers).square() / (2 * scale**2)
        return joint.softmax(-1).mean(0)
    if "loc" in values:
        first = (values["loc"][..., 0] < values["loc"][..., 1]).double().mean()
    else:
        (site,) = values.values()
        first = (site.reshape(len(fit.draws), -1)[:, 0] < 0).double().mean()
    return torch.stack([first, 1 - first])


def report(results: dict[str, Any]) -> str:
    rows = []
    for name in (name for name in NAMES if name in results["targets"]):
        records = list(results["targets"][name].values())

        def span(key: str, spec: str, records: list[dict] = records) -> str:
            numbers = [record[key] for record in records if record[key] is not None]
            if not numbers:
                return "–"
            low, high = f"{min(numbers):{spec}}", f"{max(numbers):{spec}}"
            return low if low == high else f"{low} … {high}"

        rows.append(
            [
                name,
                str(len(records)),
                str(len(records[0]["true_masses"])),
                span("num_components", "d"),
                span("within_factor_1.5", "d"),
                span("worst", ".3f"),
                span("gap", ".4f"),
                span("error_of_log_evidence", ".4f"),
                span("ess", ".2f"),
                span("num_steps", "d"),
                span("seconds", ".0f"),
                ", ".join(sorted({record["verdict"].split(":")[0].split(",")[0] for record in records})),
            ]
        )
    header = ["target", "seeds", "modes", "components", "mass within 1.5×", "worst error of a mass", "log Z − ELBO"]
    header += ["error of log Z", "ESS / draws", "steps", "seconds", "verdict"]
    return "\n".join(
        [
            "# Mixtures of flows",
            "",
            describe(results["environment"]),
            "",
            "`AutoMixture` with default options. Seconds are those of one processor, set-up and search included. Masses are "
            "shares of 10,000 draws without weights. log Z is estimated from their weights, which stands in the gap where it is "
            "not known. A guide of forty components has long steps, and a start that is exact on a mixture of normals; here its "
            "steps are few.",
            "",
            markdown_table(header, rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mixtures.json"))
    parser.add_argument("--only", nargs="+", metavar="NAME", default=NAMES)
    parser.add_argument("--seeds", default="0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {"targets": {}}
    if options.out.exists():
        results = json.loads(options.out.read_text())
    results["environment"] = environment("pyro-ppl", "numpy")
    for name in options.only:
        for seed in options.seeds.split(","):
            results["targets"].setdefault(name, {})[seed] = record(name, int(seed))
            print(name, seed, results["targets"][name][seed], flush=True)
            write_results(options.out, results, report(results))


if __name__ == "__main__":
    main()
