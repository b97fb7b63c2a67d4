"""The verdict and its predicted errors, against the errors that the fits really have.

    python -m benchmarks.verdict run    --database PATH --sonar CSV --out DIR [--seeds 0,1,2] [--guides normal,mvn]
    python -m benchmarks.verdict report --out DIR --results benchmarks/results/verdict.json

``run`` fits guides of all qualities to every posterior that has a reference. It keeps 10,000 fresh draws of each guide with their
densities, and makes only the fits that are not there yet. ``report`` judges the kept draws by the code as it is now. PATH is the
folder ``posterior_database`` of a checkout of posteriordb.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pyro_flowguides as fg
from benchmarks.posteriors.configurations import Configuration
from benchmarks.posteriors.database import posteriors
from benchmarks.posteriors.known import KnownPosterior
from benchmarks.posteriors.scores import columns
from benchmarks.posteriors.targets import ENERGIES, targets

NUM_DRAWS = 10_000
# Fresh draws: those of the fit have chosen its best round.
SEED_OF_DRAWS = 1000
# From the cheapest on. One round each but for the default: guides of all qualities are wanted, not the best of each kind.
GUIDES: dict[str, Configuration] = {
    "normal": Configuration(AutoNormal, {"num_steps": 1000}),
    "mvn": Configuration(AutoMultivariateNormal, {"num_steps": 1000}),
    # Hardly more than the Gaussian that whitening finds.
    "coupling_20": Configuration(fg.AutoCoupling, {"num_steps": 20}),
    "coupling_200": Configuration(fg.AutoCoupling, {"num_steps": 200}),
    "iaf": Configuration(fg.AutoIAF, {"num_steps": 1000}),
    "default": Configuration(fg.AutoFlow),
}


# --- fits ----------------------------------------------------------------------------------------------------------------


def run(
    known: Mapping[str, Callable[[], KnownPosterior]], guides: Iterable[str], seeds: Iterable[int], out: Path
) -> None:
    """Make the fits that are not in the folder yet. One that fails leaves a file with its error, and the run goes on."""
    out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for guide in guides:
            for name, load in known.items():
                path = out / f"{name}.{guide}.{seed}.npz"
                if path.exists():
                    continue
                posterior = load()
                if posterior.reference is None:
                    continue
                try:
                    found = fit_and_draw(posterior, GUIDES[guide], seed)
                except Exception as error:  # whatever it is, the run goes on
                    found = {"error": np.array(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")}
                np.savez_compressed(path, **found)
                print(name, guide, seed, found.get("error", f"{found.get('seconds', 0):.0f} s"), flush=True)


def fit_and_draw(posterior: KnownPosterior, configuration: Configuration, seed: int) -> dict[str, np.ndarray]:
    """Draws of a fitted guide in units of the reference: ``(x − mean_ref) / sd_ref``, so that the truth has mean 0 and sd 1."""
    reference = posterior.reference
    began = time.perf_counter()
    guide = configuration.guide(posterior.model)
    # Short fits are not searched for lost modes by default, since a search would be most of their time.
    options = ({"search_modes": True} if posterior.name in ENERGIES else {}) | configuration.options
    fit = fg.fit(posterior.model, guide, *posterior.args, seed=seed, progress=False, **options)
    seconds = time.perf_counter() - began
    draws = fg.draw(fit.model, fit.guide, *posterior.args, num_samples=NUM_DRAWS, seed=SEED_OF_DRAWS + seed)
    values = (columns(draws.posterior(), reference) - reference.mean) / reference.sd
    standardized = (reference.draws - reference.mean) / reference.sd
    return {
        "values": values.astype(np.float32),
        "names": np.array(reference.names),
        "log_p": draws.log_p.numpy(force=True),
        "log_q": draws.log_q.numpy(force=True),
        "lost_mass": np.array(np.nan if fit.modes is None else fit.modes.lost_mass),
        "finding": np.array("" if fit.modes is None else fit.modes.finding),
        # Of the reference's own draws, where its moments are theirs and not exact.
        "kurtosis": (standardized**4).mean(0),
        "num_reference": np.array(np.inf if _is_exact(reference) else len(reference.draws)),
        "seconds": np.array(seconds),
    }


def _is_exact(reference) -> bool:
    return not np.allclose(reference.mean, reference.draws.mean(0), rtol=1e-9, atol=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--out", type=Path, default=Path("build/verdict"))
    parser.add_argument("--database", type=Path)
    parser.add_argument("--sonar", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--guides", default=",".join(GUIDES))
    parser.add_argument("--skip", default="", help="posteriors to leave for another time, separated by commas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    known = ({} if options.database is None else posteriors(options.database)) | targets(options.sonar)
    known = {name: load for name, load in known.items() if name not in options.skip.split(",")}
    run(known, options.guides.split(","), map(int, options.seeds.split(",")), options.out)


if __name__ == "__main__":
    main()
