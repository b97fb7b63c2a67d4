"""Fits of guides to posteriors, one JSON line for each, so that an interrupted run continues where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pyro

import pyro_flowguides as fg

from ..common import environment
from .configurations import CONFIGURATIONS
from .known import KnownPosterior
from .scores import scores

NUM_DRAWS = 100_000


def run(
    posteriors: Mapping[str, Callable[[], KnownPosterior]],
    guides: Sequence[str],
    seeds: Iterable[int],
    out: Path,
    num_steps: int | None = None,
    num_particles: int | None = None,
) -> None:
    """Make the fits that are not yet in the file ``runs.jsonl`` of the folder, and add a line for each.

    A fit that fails leaves a line with its error, and the run continues.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "runs.jsonl"
    done = {_key(record) for record in read(path)}
    options = {"num_steps": num_steps, "num_particles": num_particles}
    for seed in seeds:
        for name, load in posteriors.items():
            for guide in guides:
                record = {"posterior": name, "guide": guide, "seed": seed, **options}
                if _key(record) in done:
                    continue
                try:
                    record |= fit_and_score(load(), guide, seed, **options)
                except Exception as error:  # whatever it is, the run continues
                    record["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
                record["environment"] = environment("pyro-ppl", "pyro-flowguides")
                with path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(_line(record), flush=True)


def fit_and_score(posterior: KnownPosterior, guide_name: str, seed: int, **options: int | None) -> dict:
    """The scores of one fit; an option that is None keeps its default."""
    given = {name: value for name, value in options.items() if value is not None}
    start = time.perf_counter()
    configuration = CONFIGURATIONS[guide_name]
    guide = configuration.guide(posterior.model)
    fit = fg.fit(
        posterior.model, guide, *posterior.args, seed=seed, progress=False, **{**configuration.options, **given}
    )
    seconds = time.perf_counter() - start
    draws = fg.draw(fit.model, fit.guide, *posterior.args, num_samples=NUM_DRAWS, seed=seed)
    return {
        "seconds": seconds,
        "whitening_seconds": _whitening_seconds(posterior, guide_name, seed),
        "steps": len(fit.losses),
        "skipped": fit.num_skipped,
        **scores(posterior, draws),
    }


def _whitening_seconds(posterior: KnownPosterior, guide_name: str, seed: int) -> float | None:
    """The seconds of whitening alone, measured on another guide; the seconds of the fit include them too."""
    configuration = CONFIGURATIONS[guide_name]
    guide = configuration.guide(posterior.model)
    if not isinstance(guide, fg.AutoFlow) or configuration.options.get("whiten", "auto") is None:
        return None
    # A guide that is set up by hand has its parameters in Pyro's store.
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide.setup(*posterior.args)
    start = time.perf_counter()
    guide.whiten(*posterior.args)
    return time.perf_counter() - start


def read(path: Path) -> list[dict]:
    """The lines of a file of results; an empty list where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _key(record: dict) -> tuple:
    return tuple(record[name] for name in ("posterior", "guide", "seed", "num_steps", "num_particles"))


def _line(record: dict) -> str:
    head = f"{record['posterior']} · {record['guide']} · seed {record['seed']}"
    if "error" in record:
        return f"{head}: {record['error']}"
    parts = [f"{record['seconds']:.1f} s", f"ELBO {record['elbo']:.4f}"]
    if "gap" in record:
        parts.append(f"gap {record['gap']:.4f}")
    if "raw" in record:
        parts.append(f"mean error {record['raw']['mean_error']:.3f}, sd error {record['raw']['sd_error']:.3f}")
    khat = "–" if record["khat"] is None else f"{record['khat']:.2f}"
    return f"{head}: {', '.join(parts)}, k-hat {khat}, ESS/N {record['ess_fraction']:.4f}"
