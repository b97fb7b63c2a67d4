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
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

import pyro_flowguides as fg
from benchmarks.common import markdown_table, write_results
from benchmarks.posteriors.configurations import Configuration
from benchmarks.posteriors.database import posteriors
from benchmarks.posteriors.known import KnownPosterior, Reference
from benchmarks.posteriors.scores import columns
from benchmarks.posteriors.targets import ENERGIES, targets
from pyro_flowguides.diagnostics.errors import Unseen, moment_errors
from pyro_flowguides.diagnostics.importance import ImportanceWeights
from pyro_flowguides.diagnostics.summary import scalar_labels
from pyro_flowguides.diagnostics.verdicts import MAX_MEAN_ERROR, NEGLIGIBLE_MASS, after_search, judge

NUM_DRAWS = 10_000
# Fresh draws: those of the fit have chosen its best round.
SEED_OF_DRAWS = 1000
# On their fits with seed 0 MAX_SHAPE of diagnostics.errors was chosen.
CHOSEN_ON = (
    *("U1", "U2", "U3", "U4", "funnel_2", "funnel_10", "arK-arK", "garch-garch11", "hmm_example-hmm_example"),
    *("eight_schools-eight_schools_noncentered", "one_comp_mm_elim_abs-one_comp_mm_elim_abs"),
)
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
        **_unseen(fit, reference),
        "finding": np.array("" if fit.modes is None else fit.modes.finding),
        # Of the reference's own draws, where its moments are theirs and not exact.
        "kurtosis": (standardized**4).mean(0),
        "num_reference": np.array(np.inf if _is_exact(reference) else len(reference.draws)),
        "seconds": np.array(seconds),
    }


def _unseen(fit: fg.FitResult, reference: Reference) -> dict[str, np.ndarray]:
    """The moments of the lost modes in the same units; nothing if there are none."""
    if fit.modes is None or not fit.modes.lost:
        return {}
    unseen = fit.modes.unseen(fit.draws.dims, {})
    assert unseen is not None
    sites = {}
    for name, value in fit.draws.posterior().items():
        labels = scalar_labels(name, value.shape[1:], fit.draws.dims.get(name, ()), {})
        # Of deterministic sites nothing is known.
        table = np.array([unseen.moments.get(label, (np.nan, np.nan)) for label in labels])
        sites[name] = np.moveaxis(table.reshape(*value.shape[1:], 2), -1, 0)
    mean, sd = columns(sites, reference)
    return {
        "unseen_mass_se": np.array(unseen.mass_se),
        "unseen_mean": (mean - reference.mean) / reference.sd,
        "unseen_sd": sd / reference.sd,
    }


def _is_exact(reference: Reference) -> bool:
    return not np.allclose(reference.mean, reference.draws.mean(0), rtol=1e-9, atol=0)


# --- judgement -----------------------------------------------------------------------------------------------------------


def judge_fit(path: Path) -> dict[str, Any] | None:
    """The verdict on the kept draws of a fit, its expected errors and the actual ones; None for a fit that has failed."""
    kept = np.load(path)
    if "error" in kept:
        return None
    name, guide, seed = path.stem.rsplit(".", 2)
    columns = kept["values"].T.astype(np.float64)
    weights = ImportanceWeights(kept["log_p"], kept["log_q"])
    scalars = dict(zip(kept["names"].tolist(), columns, strict=True))
    lost, unseen = float(kept["lost_mass"]), None
    if "unseen_mean" in kept:
        moments = zip(kept["unseen_mean"].tolist(), kept["unseen_sd"].tolist(), strict=True)
        unseen = Unseen(lost, float(kept["unseen_mass_se"]), dict(zip(scalars, moments, strict=True)))
    verdict = judge(scalars, weights, unseen)
    if lost > NEGLIGIBLE_MASS:
        verdict = after_search(verdict, "", lost)
    errors = moment_errors(scalars, weights, unseen)
    noise = np.stack([np.full(len(columns), 1.0), np.sqrt((kept["kurtosis"] - 1) / 4)])
    of_reference = noise / float(kept["num_reference"]) ** 0.5
    actual = {"raw": _actual(columns), "weighted": _actual(columns, weights.weights)}
    expected = {"raw": errors.raw, "weighted": errors.weighted}
    return {
        "posterior": name,
        "guide": guide,
        "seed": int(seed),
        "verdict": verdict.kind.name,
        "khat": verdict.khat,
        "ess_fraction": verdict.ess_fraction,
        "lost_mass": lost,
        "noise": float(of_reference.max()),
        # By as much as the reference may be off, an error of 0.1 may be seen as a larger or a smaller one.
        "within": {
            key: bool((np.abs(found) - 2 * of_reference <= MAX_MEAN_ERROR).all()) for key, found in actual.items()
        },
        "beyond": {
            key: bool((np.abs(found) + 2 * of_reference > MAX_MEAN_ERROR).any()) for key, found in actual.items()
        },
        "errors": {
            f"{key} {moment}": _compare(
                getattr(expected[key], moment), np.abs(actual[key][i]), of_reference[i], noise[i]
            )
            for key in actual
            for i, moment in enumerate(("mean", "sd"))
        },
    }


def _actual(columns: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The errors of means and sds, for a posterior with mean 0 and sd 1: shape (2, scalars)."""
    mean = np.average(columns, axis=1, weights=weights)
    sd = np.average((columns - mean[:, None]) ** 2, axis=1, weights=weights) ** 0.5
    return np.stack([mean, sd - 1])


def _compare(expected: np.ndarray, actual: np.ndarray, of_reference: np.ndarray, noise: np.ndarray) -> dict[str, Any]:
    """The worst errors, and of the scalars whose error is no noise, how many there are and how many are expected."""
    is_seen = actual > 3 * np.hypot(of_reference, noise / NUM_DRAWS**0.5)
    ratio = expected[is_seen] / actual[is_seen]
    return {
        "expected": float(expected.max()),
        "actual": float(actual.max()),
        "worst_is_seen": bool(is_seen[actual.argmax()]),
        "seen": int(is_seen.sum()),
        "expected_within_2": int(((ratio >= 0.5) & (ratio <= 2)).sum()),
    }


def is_right(record: dict[str, Any]) -> bool:
    """Whether the errors are as the verdict says."""
    within, beyond = record["within"], record["beyond"]
    rules = {
        "EXACT": within["raw"],
        "GOOD": within["raw"],
        "GOOD_ONCE_WEIGHTED": within["weighted"],
        "DOUBTFUL": beyond["raw"] and beyond["weighted"],
    }
    return rules[record["verdict"]]


# --- report --------------------------------------------------------------------------------------------------------------


def report(records: list[dict[str, Any]]) -> str:
    groups = {
        "all": records,
        "posteriors that a constant was chosen on": [r for r in records if r["posterior"] in CHOSEN_ON],
        "other posteriors": [r for r in records if r["posterior"] not in CHOSEN_ON],
        **{f"guide {guide}": [r for r in records if r["guide"] == guide] for guide in GUIDES},
        **{f"seed {seed}": [r for r in records if r["seed"] == seed] for seed in (0, 1, 2)},
        "at least 100 effective draws": [r for r in records if r["ess_fraction"] * NUM_DRAWS >= 100],
        "5 to 100 effective draws": [r for r in records if 5 <= r["ess_fraction"] * NUM_DRAWS < 100],
    }
    groups = {name: chosen for name, chosen in groups.items() if chosen}
    kinds = ("EXACT", "GOOD", "GOOD_ONCE_WEIGHTED", "DOUBTFUL", "UNKNOWN")
    verdicts = [
        [name, str(len(chosen)), *(_rightness(chosen, kind) for kind in kinds[:4])] for name, chosen in groups.items()
    ]
    keys = ("raw mean", "raw sd", "weighted mean", "weighted sd")
    worst = [[name, *(_worst(chosen, [key]) for key in keys), _worst(chosen, keys)] for name, chosen in groups.items()]
    scalars = [
        [name, *(_scalars(chosen, [key]) for key in keys), _scalars(chosen, keys)] for name, chosen in groups.items()
    ]
    wrong = [
        [
            *(r["posterior"], r["guide"], str(r["seed"]), r["verdict"].lower().replace("_", " "), f"{r['khat']:.2f}"),
            f"{r['ess_fraction']:.2%}",
            *(f"{r['errors'][key]['actual']:.3f} / {r['errors'][key]['expected']:.3f}" for key in keys),
        ]
        for r in records
        if not is_right(r)
    ]
    header = ["fits", *(key + " error" for key in keys), "together"]
    return "\n\n".join(
        [
            "# The verdict against the errors of the fits",
            "A fit is right if no mean is off by more than 0.1 sd of the posterior and no sd by more than 10%, give or take two "
            "standard errors of the reference. A verdict is right if its draws, or its weighted draws, are; doubtful is right if "
            "neither are. Two things were chosen on results: MAX_SHAPE of diagnostics.errors on "
            "fits with seed 0 of some posteriors, which have a row of their own, and that weights may leave the square of "
            "k-hat of what they correct, among three powers, on 150 of these fits, the other posteriors' "
            "included. The guides coupling_20 and coupling_200 had "
            "that many steps, and normal, mvn and iaf one round of 1000.",
            "## How often a verdict is right",
            markdown_table(["fits", "number", *(kind.lower().replace("_", " ") for kind in kinds[:4])], verdicts),
            "## How often the worst error of a fit is within a factor of 2 of the expected one",
            f"Of {len(records)} fits, {sum(map(_is_predicted, records))} have a prediction: of the others a few draws carry all "
            "the weight, and their verdict is doubtful. Here are those whose worst error is above three standard errors of the "
            "reference and of 10,000 exact draws together.",
            markdown_table(header, worst),
            "## The same of all scalars",
            markdown_table(header, scalars),
            "## Verdicts that are wrong",
            "Errors: actual / expected.",
            markdown_table(["posterior", "guide", "seed", "verdict", "k-hat", "effective", *keys], wrong),
        ]
    )


def _is_predicted(record: dict[str, Any]) -> bool:
    return not np.isnan(record["errors"]["raw mean"]["expected"])


def _rightness(records: list[dict[str, Any]], kind: str) -> str:
    judged = [is_right(record) for record in records if record["verdict"] == kind]
    return _share(sum(judged), len(judged))


def _worst(records: list[dict[str, Any]], keys: Iterable[str]) -> str:
    found = [record["errors"][key] for record in records for key in keys]
    ratios = [
        one["expected"] / one["actual"] for one in found if one["worst_is_seen"] and not np.isnan(one["expected"])
    ]
    return _share(sum(0.5 <= ratio <= 2 for ratio in ratios), len(ratios))


def _scalars(records: list[dict[str, Any]], keys: Iterable[str]) -> str:
    found = [r["errors"][key] for r in records for key in keys if not np.isnan(r["errors"][key]["expected"])]
    return _share(sum(one["expected_within_2"] for one in found), sum(one["seen"] for one in found))


def _share(number: int, total: int) -> str:
    return f"{number / total:.0%} of {total}" if total else "–"


def _without_nan(value: Any) -> Any:
    """None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--out", type=Path, default=Path("build/verdict"))
    parser.add_argument("--database", type=Path)
    parser.add_argument("--sonar", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--guides", default=",".join(GUIDES))
    parser.add_argument("--skip", default="", help="posteriors to leave for another time, separated by commas")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/verdict.json"))
    options = parser.parse_args()
    if options.command == "report":
        records = [judge_fit(path) for path in sorted(options.out.glob("*.npz"))]
        fitted = [record for record in records if record is not None]
        write_results(options.results, {"results": _without_nan(fitted)}, report(fitted))
        print(report(fitted))
        return
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    known = ({} if options.database is None else posteriors(options.database)) | targets(options.sonar)
    known = {name: load for name, load in known.items() if name not in options.skip.split(",")}
    run(known, options.guides.split(","), map(int, options.seeds.split(",")), options.out)


if __name__ == "__main__":
    main()
