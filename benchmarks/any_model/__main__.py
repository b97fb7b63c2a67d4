"""Models as their users write them, for one draw.

    python -m benchmarks.any_model reference [NAME ...]
    python -m benchmarks.any_model run [NAME ...]
    python -m benchmarks.any_model loops

The first two merge their rows into the result files, a model at a time.
"""

from __future__ import annotations

import argparse
import traceback
from pathlib import Path

import torch

from .loops import loops
from .models import PROBLEMS
from .records import RESULTS, chosen, merge, read
from .reference import reference
from .report import report
from .run import run

REFERENCES = RESULTS / "any_model_reference.json"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.any_model", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    referring = commands.add_parser("reference", help="find the means and standard deviations")
    referring.add_argument("names", nargs="*", help="models; by default all")
    referring.add_argument("--missing", action="store_true", help="only models without a reference")
    referring.add_argument(
        "--nuts", action="store_true", help="by Pyro's NUTS above five dimensions, which takes hours"
    )
    referring.add_argument("--out", type=Path, default=REFERENCES)
    referring.set_defaults(command=_reference)
    running = commands.add_parser("run", help="measure speeds, and errors of fits")
    running.add_argument("names", nargs="*", help="models; by default all")
    running.add_argument("--missing", action="store_true", help="only models without a result")
    running.add_argument("--references", type=Path, default=REFERENCES)
    running.add_argument("--out", type=Path, default=RESULTS / "any_model.json")
    running.set_defaults(command=_run)
    looping = commands.add_parser("loops", help="measure what it costs to record loops over time")
    looping.add_argument("--out", type=Path, default=RESULTS / "any_model_loops.json")
    looping.set_defaults(command=lambda options: loops(options.out))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.command(options)


def _reference(options: argparse.Namespace) -> None:
    torch.set_default_dtype(torch.float64)
    for name in chosen(options.names):
        if options.missing and name in read(options.out):
            continue
        try:
            row = reference(PROBLEMS[name], options.nuts)
        except Exception:
            print(name, "failed", flush=True)
            traceback.print_exc()
            continue
        merge(options.out, name, row)
        print(name, {key: value for key, value in row.items() if key not in ("mean", "sd")}, flush=True)


def _run(options: argparse.Namespace) -> None:
    references = read(options.references)
    for name in chosen(options.names):
        if options.missing and name in read(options.out):
            continue
        if name not in references:
            print(f"{name}: no reference yet; python -m benchmarks.any_model reference {name!r}", flush=True)
            continue
        merge(options.out, name, run(PROBLEMS[name], references[name]))
        rows = read(options.out)
        options.out.with_suffix(".md").write_text(report(rows) + "\n")
        print(name, rows[name], flush=True)


if __name__ == "__main__":
    main()
