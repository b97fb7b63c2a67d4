"""The command line: ``flowguides list``, ``fit``, ``compare`` and ``report``."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pyro.infer.autoguide import AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal

from ..checks import version
from ..diagnostics.compare import comparison_table
from ..diagnostics.posterior import Posterior, posterior_from_tree
from ..diagnostics.summary import summarize
from ..diagnostics.verdicts import VerdictKind
from ..examples import EXAMPLES
from ..examples.example import Example
from ..guides.named import AutoCoupling, AutoIAF, AutoPlanar, AutoRadial, AutoResidual, AutoSpline, AutoSylvester
from ..processes import find_processes
from ..report import gather, page
from ..training.fit import fit
from ..training.result import FitResult
from .data import not_arrays
from .errors import OutputError, UserError, line_of, line_with_place, printable, reason_of, text_of
from .models import find_model
from .output import Output, quiet_arviz, write

GUIDES: dict[str, tuple[Callable, str]] = {
    "coupling": (AutoCoupling, "affine couplings (RealNVP); the first choice"),
    "iaf": (AutoIAF, "inverse autoregressive flows"),
    "spline": (AutoSpline, "rational-quadratic spline couplings: several modes, sharp edges"),
    "sylvester": (AutoSylvester, "Sylvester flows: few parameters, no networks"),
    "residual": (AutoResidual, "residual flows"),
    "radial": (AutoRadial, "radial flows: very few parameters"),
    "planar": (AutoPlanar, "planar flows: few parameters, little flexibility"),
    "normal": (AutoNormal, "Pyro's AutoNormal: independent normals"),
    "diagonal_normal": (AutoDiagonalNormal, "Pyro's AutoDiagonalNormal: independent normals, one vector"),
    "low_rank_normal": (AutoLowRankMultivariateNormal, "Pyro's AutoLowRankMultivariateNormal"),
    "multivariate_normal": (AutoMultivariateNormal, "Pyro's AutoMultivariateNormal: one multivariate normal"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    0 if all went well, 1 if results could not be written, 2 for bad input, 130 after an interrupt (Ctrl-C), 143 after SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(argv)
    options.command = shlex.join(["flowguides", *argv])
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal may lack the signs of the tables.
        sys.stdout.reconfigure(errors="replace")
    with _signals() as received:
        try:
            interrupted = options.run(options)
            _flush()
        except KeyboardInterrupt:
            interrupted = True
            print("flowguides: interrupted", file=sys.stderr)
        except (UserError, OutputError) as error:
            print(f"flowguides: {printable(str(error))}", file=sys.stderr)
            return 2 if isinstance(error, UserError) else 1
    return 128 + (received[0] if received else signal.SIGINT) if interrupted else 0


@contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGTERM interrupts as Ctrl-C does within; collects the numbers of the signals that came."""
    received: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _print(line: str) -> None:
    try:
        print(line)
    except OSError as error:
        raise _closed(error) from error


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError as error:
        raise _closed(error) from error


def _closed(error: OSError) -> OutputError:
    """The error of a standard output that takes no more, which Python must not try to write to again at its end."""
    with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return OutputError(f"the standard output could not be written: {reason_of(error)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowguides",
        description="Fit Pyro models with normalizing-flow guides.",
        epilog="Exit status: 0 if all went well, 1 if results could not be written, 2 for bad input, 130 after Ctrl-C, 143 "
        "after SIGTERM. An interrupt during the training ends it; the results so far are written, and marked as interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"pyro_flowguides {version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="name the bundled models and the guides")
    listing.set_defaults(run=_list)

    fitting = commands.add_parser("fit", help="fit a model with one guide, or compare several")
    fitting.set_defaults(run=_fit)
    fitting.add_argument("model", help="a bundled model, or FILE.py:NAME for a model of your own")
    fitting.add_argument("--guide", default="coupling", metavar="NAME", help="the guide (default: %(default)s)")
    fitting.add_argument("--compare", nargs="+", default=[], metavar="NAME", help="further guides to fit beside it")
    fitting.add_argument(
        "--data", type=Path, metavar="FILE", help="arguments of your model by name: .json, .npz or .csv"
    )
    fitting.add_argument(
        "--out", type=Path, metavar="DIR", help="write netCDF files, a PNG and reports to this directory"
    )
    fitting.add_argument(
        "--report",
        action=argparse.BooleanOptionalAction,
        help="write an HTML report for each guide, to the directory of --out or to this one (default: with --out)",
    )
    fitting.add_argument("--num-steps", type=int, metavar="N", help="training steps (default: as in fit)")
    fitting.add_argument("--num-particles", type=int, metavar="N", help="draws per step (default: as in fit)")
    fitting.add_argument(
        "--search-modes",
        action=argparse.BooleanOptionalAction,
        help="look for modes that the guide has not drawn (default: where it is cheap)",
    )
    fitting.add_argument("--max-seconds", type=float, metavar="S", help="end each fit after so many seconds")
    fitting.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)")
    fitting.add_argument("--no-progress", action="store_true", help="show no progress bar")

    comparing = commands.add_parser("compare", help="compare posteriors that fit has written, or any of the same data")
    comparing.set_defaults(run=_compare)
    comparing.add_argument("files", nargs="+", type=Path, metavar="FILE.nc", help="netCDF files with a posterior")
    comparing.add_argument("--reference", metavar="NAME", help="the file, without .nc, that moments are compared with")

    reporting = commands.add_parser(
        "report", help="make an HTML report of a posterior that fit has written, or of any other"
    )
    reporting.set_defaults(run=_report)
    reporting.add_argument("file", type=Path, metavar="FILE.nc", help="a netCDF file with a posterior")
    reporting.add_argument(
        "--beside", nargs="+", type=Path, default=[], metavar="FILE.nc", help="others to draw the marginals of"
    )
    reporting.add_argument("--reference", metavar="NAME", help="the one of them, without .nc, to compare with")
    reporting.add_argument("--out", type=Path, metavar="FILE.html", help="the file to write (default: FILE.html)")
    return parser


def _list(options: argparse.Namespace) -> bool:
    width = max(map(len, [*EXAMPLES, *GUIDES]))
    _print("models:")
    for name, example in EXAMPLES.items():
        _print(f"  {name:{width}}  {example.description}")
    _print("guides:")
    for name, (_, description) in GUIDES.items():
        _print(f"  {name:{width}}  {description}")
    return False


def _fit(options: argparse.Namespace) -> bool:
    # All of the input is checked before the first fit.
    names = list(dict.fromkeys([options.guide, *options.compare]))
    for name in names:
        if name not in GUIDES:
            raise UserError(f"unknown guide '{name}'; known are {', '.join(GUIDES)}")
    for option in ("num_steps", "num_particles"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} must be at least 1, got {value}")
    if options.max_seconds is not None and not options.max_seconds > 0:
        raise UserError(f"--max-seconds must be above 0, got {options.max_seconds}")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed must be from 0 to {2**32 - 1}, got {options.seed}")
    example, file = find_model(options.model, options.data)
    # Under torchrun the first process alone prints and writes.
    processes = find_processes()
    is_first = processes is None or processes.is_first
    output = _find_output(options, example.name, names) if is_first else None
    with nullcontext() if output is None else output.reserved():
        fits: dict[str, FitResult] = {}
        for name in names:
            fits[name] = _fit_one(example, file, name, options)
            if fits[name].interrupted:
                break
        if is_first:
            _show(fits, example, output)
    return any(result.interrupted for result in fits.values())


def _find_output(options: argparse.Namespace, model: str, guides: Sequence[str]) -> Output | None:
    """Where the results go; None if there are none to write."""
    with_reports = options.out is not None if options.report is None else options.report
    if options.out is None and not with_reports:
        return None
    return Output(options.out or Path(), model, guides, results=options.out is not None, reports=with_reports)


def _show(fits: Mapping[str, FitResult], example: Example, output: Output | None) -> None:
    reference = example.reference() if example.reference else None
    _print(moments_table(fits, example, reference))
    for name, result in fits.items():
        _print(f"{name}: {_interrupted(result)}{result.verdict}")
        if result.verdict.kind is not VerdictKind.UNKNOWN:
            _print(f"  {result.verdict.khat_meaning}")
    if output is None:
        return
    for name in filter(fits.get, output.fits):
        _print(f"wrote {output.write_fit(name, fits[name], example)}")
    for name in filter(fits.get, output.reports):
        _print(f"wrote {output.write_report(name, fits, example, reference)}")
    if output.picture is None:
        return
    shown = _moments(next(iter(fits.values())).summary(coords=example.coords, quantiles=()), example.report)
    try:
        _print(f"wrote {output.write_picture(fits, example, reference, list(shown))}")
    except ImportError:
        print("no picture: pip install 'pyro-flowguides[plots]'", file=sys.stderr)


def _interrupted(result: FitResult) -> str:
    return f"interrupted after {len(result.losses)} steps; " if result.interrupted else ""


def _fit_one(example: Example, file: Path | None, name: str, options: argparse.Namespace) -> FitResult:
    arguments = example.data()
    try:
        result = fit(
            example.model,
            GUIDES[name][0](example.model),
            model_kwargs=arguments,
            num_steps=options.num_steps,
            num_particles=options.num_particles,
            search_modes=options.search_modes,
            max_seconds=options.max_seconds,
            seed=options.seed,
            progress=not options.no_progress,
        )
        return replace(result, made_by=options.command)
    # A model may raise anything.
    except (Exception, SystemExit) as error:
        place = line_with_place(file, error)
        if place is None:
            raise UserError(f"{options.model} with guide '{name}': {line_of(error)}") from error
        hint = not_arrays(arguments)
        raise UserError(f"{place} ({options.data}: {hint})" if hint else place) from error


def _report(options: argparse.Namespace) -> bool:
    path = options.out or options.file.with_suffix(".html")
    posterior, beside = _read_posterior(options.file), _read_posteriors(options.beside)
    try:
        with quiet_arviz():
            content = page(gather(posterior, beside=beside, reference=options.reference))
    except Exception as error:
        raise UserError(line_of(error)) from error
    _print(f"{options.file}: {posterior.verdict}")
    _print(f"wrote {write(path, content.encode())}")
    return False


def _read_posteriors(paths: Sequence[Path]) -> dict[str, Posterior]:
    """Posteriors by the names of their files, without their folders where that tells them apart."""
    stems = [path.stem for path in paths]
    names = [path.stem if stems.count(path.stem) == 1 else str(path) for path in paths]
    return {name: _read_posterior(path) for name, path in zip(names, paths, strict=True)}


def _compare(options: argparse.Namespace) -> bool:
    posteriors = _read_posteriors(options.files)
    try:
        table = comparison_table(posteriors, options.reference)
    except Exception as error:
        raise UserError(line_of(error)) from error
    # One posterior is a row of numbers of different sizes: by columns they line up.
    _print(table.T.to_string(float_format=lambda number: f"{number:.3f}", na_rep="–"))
    for name, one in posteriors.items():
        verdict = one.verdict
        if verdict.kind is not VerdictKind.UNKNOWN:
            _print(f"{name}: {verdict}")
            _print(f"  {verdict.khat_meaning}")
    return False


def _read_posterior(path: Path) -> Posterior:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with quiet_arviz():
        import arviz as az

        # Damaged files are found out by whatever trips over them.
        try:
            tree = az.from_netcdf(str(path))
        except Exception as error:
            raise UserError(f"{path} cannot be read as netCDF: {text_of(error) or type(error).__name__}") from error
    if "posterior" not in tree:
        raise UserError(f"{path} has no group 'posterior'")
    try:
        return posterior_from_tree(tree)
    except Exception as error:
        raise UserError(f"{path}: its posterior cannot be used: {line_of(error)}") from error


# --- results ----------------------------------------------------------------------------------------------------------


def moments_table(fits: Mapping[str, FitResult], example: Example, reference: Mapping[str, np.ndarray] | None) -> str:
    """ELBO, k-hat, and every reported scalar's mean and sd under each guide, next to the reference."""
    columns: dict[str, dict[str, str]] = {}
    for name, result in fits.items():
        khat = "–" if np.isnan(result.khat.value) else f"{result.khat:.2f} ± {result.khat.se:.2f}"
        column = {"ELBO": str(result.elbo), "k-hat": khat}
        label = f"{name} (interrupted)" if result.interrupted else name
        columns[label] = column | _moments(result.summary(coords=example.coords, quantiles=()), example.report)
    if reference is not None:
        dims = next(iter(fits.values())).draws.dims
        column = {"ELBO": f"log Z = {example.log_evidence}" if example.log_evidence else "", "k-hat": ""}
        columns["NUTS"] = column | _moments(summarize(reference, dims, example.coords, ()), example.report)
    table = pd.DataFrame(columns).fillna("")
    table.index.name = "mean (sd)"
    return table.to_string()


def _moments(summary: pd.DataFrame, report: Sequence[str]) -> dict[str, str]:
    rows = zip(map(str, summary.index), summary["mean"], summary["sd"], strict=True)
    return {label: f"{mean:.3f} ({sd:.3f})" for label, mean, sd in rows if not report or label.split("[")[0] in report}
