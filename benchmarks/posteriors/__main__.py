"""The distance of fitted guides from real posteriors.

    python -m benchmarks.posteriors check  --database PATH [--sonar CSV] --out benchmarks/results/posteriors_check.json
    python -m benchmarks.posteriors run    --database PATH [--sonar CSV] --guides default,mvn --seeds 0,1,2 --out DIR
    python -m benchmarks.posteriors report --out DIR

The command ``run`` is the default, and its default folder is ``build/posteriors``.

PATH is the folder ``posterior_database`` of a checkout of posteriordb. Without it there are only the targets with a known
evidence. ``--pines CSV`` adds Cox processes in 256 and 1600 dimensions.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..common import describe, environment, markdown_table, write_results
from .check import Check, check
from .configurations import CONFIGURATIONS
from .database import posteriors
from .known import KnownPosterior
from .report import report
from .run import read, run
from .targets import targets


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0].startswith("--") and arguments[0] != "--help":
        arguments = ["run", *arguments]
    options = _parse(arguments)
    torch.set_default_dtype(getattr(torch, getattr(options, "dtype", "float64")))
    torch.set_num_threads(1)
    return options.command(options)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.posteriors", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    sources = argparse.ArgumentParser(add_help=False)
    sources.add_argument("--database", type=Path, help="the folder posterior_database of a checkout of posteriordb")
    sources.add_argument("--sonar", type=Path, help="the sonar data: a CSV with the columns x1, ..., x60, label")
    sources.add_argument(
        "--pines", type=Path, help="points in the unit square: a CSV whose last two columns are x and y"
    )
    sources.add_argument("--only", type=_words, help="posteriors, by name, separated by commas")

    checking = commands.add_parser("check", parents=[sources], help="compare every model with its reference draws")
    checking.add_argument("--out", type=Path, required=True, help="a JSON file; its table is put beside it")
    checking.set_defaults(command=_check)

    running = commands.add_parser("run", parents=[sources], help="fit the guides and score their draws")
    running.add_argument("--guides", type=_words, default=["default"], help=f"some of {', '.join(CONFIGURATIONS)}")
    running.add_argument("--seeds", type=_numbers, default=[0, 1, 2], help="numbers separated by commas")
    running.add_argument("--steps", type=int, help="instead of the default number of steps")
    running.add_argument("--particles", type=int, help="instead of the default number of particles")
    running.add_argument(
        "--dtype",
        choices=("float32", "float64"),
        default="float64",
        help="single precision halves the seconds of large posteriors, but some posteriors are too badly conditioned for it",
    )
    running.add_argument(
        "--out",
        type=Path,
        default=Path("build/posteriors"),
        help="the folder of the results; fits that are already there are not repeated",
    )
    running.set_defaults(command=_run)

    reporting = commands.add_parser("report", help="make the tables of a run")
    reporting.add_argument("--out", type=_paths, required=True, help="the folders of the results, separated by commas")
    reporting.add_argument("--results", type=Path, help="a JSON file for all records; their tables are put beside it")
    reporting.set_defaults(command=_report)

    options = parser.parse_args(arguments)
    unknown = set(getattr(options, "guides", [])) - set(CONFIGURATIONS)
    if unknown:
        parser.error(f"unknown guides {', '.join(sorted(unknown))}; known are {', '.join(CONFIGURATIONS)}")
    if options.command is not _report:
        options.posteriors = _chosen(options, parser)
    return options


def _chosen(options: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Callable[[], KnownPosterior]]:
    found = posteriors(options.database) if options.database else {}
    found |= targets(options.sonar, options.pines)
    if options.only is None:
        return found
    missing = set(options.only) - set(found)
    if missing:
        parser.error(f"unknown posteriors {', '.join(sorted(missing))}; there are {', '.join(found)}")
    return {name: found[name] for name in options.only}


def _check(options: argparse.Namespace) -> int:
    """Check every model that has reference draws; 0 if all passed."""
    checks: dict[str, Check] = {}
    for name, load in options.posteriors.items():
        posterior = load()
        if posterior.latents is not None:
            checks[name] = check(posterior)
            print(f"{name}: {'passed' if checks[name].passed else 'FAILED'}", flush=True)
    machine = environment("pyro-ppl")
    results = {name: {**dataclasses.asdict(one), "passed": one.passed} for name, one in checks.items()}
    markdown = _check_table(checks) + f"\n\n{describe(machine)}"
    write_results(options.out, {"environment": machine, "results": results}, markdown)
    print(markdown)
    return 0 if all(one.passed for one in checks.values()) else 1


def _check_table(checks: dict[str, Check]) -> str:
    header = ["posterior", "D", "draws", "E[s] = 0", "E[s xᵀ] = −I", "bound", "alone", "passed"]
    rows = [
        [
            name,
            str(one.dim),
            str(one.num_draws),
            f"{one.worst_mean:.2f}",
            f"{one.worst_product:.2f}",
            f"{one.bound:.2f}",
            f"{one.worst_alone:.1e}",
            "yes" if one.passed else "NO",
        ]
        for name, one in checks.items()
    ]
    passed = sum(one.passed for one in checks.values())
    return "\n\n".join(
        [
            "# Posteriors: the models against their reference draws",
            f"{passed} of {len(checks)} pass. s is the gradient of the model's log-density in unconstrained space. The columns "
            "of Stein's identity have the largest |z| of its statistics; for a right model it exceeds the bound once in a "
            "thousand times. Alone: the largest difference, in nats, between the log-density of a draw in a batch and of the "
            "same draw alone.",
            markdown_table(header, rows),
        ]
    )


def _run(options: argparse.Namespace) -> int:
    run(options.posteriors, options.guides, options.seeds, options.out, options.steps, options.particles)
    markdown = report(read(options.out / "runs.jsonl"))
    (options.out / "report.md").write_text(markdown + "\n")
    print(markdown)
    return 0


def _report(options: argparse.Namespace) -> int:
    records = [record for folder in options.out for record in read(folder / "runs.jsonl")]
    markdown = report(records)
    if options.results is not None:
        write_results(options.results, {"results": records}, markdown)
    print(markdown)
    return 0


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _paths(text: str) -> list[Path]:
    return [Path(word) for word in _words(text)]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


if __name__ == "__main__":
    raise SystemExit(main())
