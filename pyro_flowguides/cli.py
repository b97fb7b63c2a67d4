"""The command line: ``flowguides list``, ``flowguides fit`` and ``flowguides compare``."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal

from .checks import version
from .diagnostics.compare import comparison_table
from .diagnostics.importance import VerdictKind
from .diagnostics.plots import plot_marginals
from .diagnostics.posterior import Posterior, posterior_from_tree
from .diagnostics.summary import scalars, summarize
from .examples import EXAMPLES
from .examples.example import Example
from .guides.named import AutoCoupling, AutoIAF, AutoPlanar, AutoRadial, AutoResidual, AutoSpline, AutoSylvester
from .training.fit import fit
from .training.result import FitResult

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
NUM_ARVIZ_DRAWS = 4000
MAX_PLOTTED = 12


class UserError(Exception):
    """What the user gave cannot be used; the message is one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 for bad input."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        options.run(options)
    except UserError as error:
        print(f"flowguides: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flowguides", description="Fit Pyro models with normalizing-flow guides.")
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
    fitting.add_argument("--out", type=Path, metavar="DIR", help="write netCDF files and a PNG to this directory")
    fitting.add_argument("--num-steps", type=int, metavar="N", help="training steps (default: as in fit)")
    fitting.add_argument("--num-particles", type=int, metavar="N", help="draws per step (default: as in fit)")
    fitting.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)")
    fitting.add_argument("--no-progress", action="store_true", help="show no progress bar")

    comparing = commands.add_parser("compare", help="compare posteriors that fit has written, or any of the same data")
    comparing.set_defaults(run=_compare)
    comparing.add_argument("files", nargs="+", type=Path, metavar="FILE.nc", help="netCDF files with a posterior")
    comparing.add_argument("--reference", metavar="NAME", help="the file, without .nc, that moments are compared with")
    return parser


def _list(options: argparse.Namespace) -> None:
    width = max(map(len, [*EXAMPLES, *GUIDES]))
    print("models:")
    for name, example in EXAMPLES.items():
        print(f"  {name:{width}}  {example.description}")
    print("guides:")
    for name, (_, description) in GUIDES.items():
        print(f"  {name:{width}}  {description}")


def _fit(options: argparse.Namespace) -> None:
    # All of the input is checked before the first fit.
    names = list(dict.fromkeys([options.guide, *options.compare]))
    for name in names:
        if name not in GUIDES:
            raise UserError(f"unknown guide '{name}'; known are {', '.join(GUIDES)}")
    for option in ("num_steps", "num_particles"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} must be at least 1, got {value}")
    example = _find_model(options.model, options.data)
    if options.out is not None:
        _make_directory(options.out)

    fits = {name: _fit_one(example, name, options) for name in names}
    reference = example.reference() if example.reference else None
    print(moments_table(fits, example, reference))
    for name, result in fits.items():
        print(f"{name}: {result.verdict}")
        if result.verdict.kind is not VerdictKind.UNKNOWN:
            print(f"  {result.verdict.khat_meaning}")
    if options.out is not None:
        for path in _write(options.out, fits, example, reference):
            print(f"wrote {path}")


def _fit_one(example: Example, name: str, options: argparse.Namespace) -> FitResult:
    guide = GUIDES[name][0](example.model)
    # The errors of fit are about the user's model and data; what lies deeper keeps its traceback.
    try:
        return fit(
            example.model,
            guide,
            model_kwargs=example.data(),
            num_steps=options.num_steps,
            num_particles=options.num_particles,
            seed=options.seed,
            progress=not options.no_progress,
        )
    except (ValueError, RuntimeError, NotImplementedError, TypeError, IndexError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{options.model} with guide '{name}': {message[:500]}") from error


def _compare(options: argparse.Namespace) -> None:
    stems = [path.stem for path in options.files]
    names = [path.stem if stems.count(path.stem) == 1 else str(path) for path in options.files]
    posteriors = {name: _read_posterior(path) for name, path in zip(names, options.files, strict=True)}
    try:
        table = comparison_table(posteriors, options.reference)
    except ValueError as error:
        raise UserError(str(error)) from error
    # One posterior is a row of numbers of different sizes: by columns they line up.
    print(table.T.to_string(float_format=lambda number: f"{number:.3f}", na_rep="–"))
    for name, one in posteriors.items():
        verdict = one.best().verdict
        if verdict.kind is not VerdictKind.UNKNOWN:
            print(f"{name}: {verdict}")
            print(f"  {verdict.khat_meaning}")


def _read_posterior(path: Path) -> Posterior:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with _quiet_arviz():
        import arviz as az

        try:
            tree = az.from_netcdf(str(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as netCDF: {' '.join(str(error).split())[:200]}") from error
    if "posterior" not in tree:
        raise UserError(f"{path} has no group 'posterior'")
    return posterior_from_tree(tree)


# --- models and data of the user ----------------------------------------------------------------------------------------


def _find_model(name: str, data: Path | None) -> Example:
    if name in EXAMPLES:
        if data is not None:
            raise UserError(f"'{name}' is a bundled model with its own data; --data is for a model of your own")
        return EXAMPLES[name]
    file, colon, attribute = name.rpartition(":")
    if not colon:
        raise UserError(f"unknown model '{name}'; known are {', '.join(EXAMPLES)}, or FILE.py:NAME for your own")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    # Dataclasses look their module up by its name.
    sys.modules.setdefault(spec.name, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    model = getattr(module, attribute, None)
    if not callable(model):
        raise UserError(f"{path} has no model '{attribute}'")
    arguments = read_data(data) if data is not None else {}
    _check_arguments(model, arguments, data)
    return Example(name=attribute, description=str(path), model=model, data=lambda: arguments)


def read_data(path: Path) -> dict[str, Any]:
    """The arguments of a model by name; lists and arrays become tensors, floating-point ones in the default dtype.

    JSON: an object. NPZ: its arrays. CSV: its columns, by the names in the first row.
    """
    if not path.is_file():
        raise UserError(f"there is no data file {path}")
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise UserError(f"{path}: a JSON data file must hold an object, argument name to value")
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                content = dict(archive)
        elif path.suffix == ".csv":
            content = {str(name): column.to_numpy() for name, column in pd.read_csv(path).items()}
        else:
            raise UserError(f"{path}: data files are .json, .npz or .csv")
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    return {name: _as_argument(path, name, value) for name, value in content.items()}


def _as_argument(path: Path, name: str, value: Any) -> Any:
    if not isinstance(value, (list, np.ndarray)):
        return value
    try:
        # A copy: pandas gives arrays that must not be written to, which torch would share.
        array = np.array(value)
    except ValueError as error:
        raise UserError(f"{path}: '{name}' is not a rectangular array") from error
    if array.dtype.kind not in "biuf":
        raise UserError(f"{path}: '{name}' holds values that are not numbers")
    tensor = torch.as_tensor(array, device=torch.get_default_device())
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def _check_arguments(model: Callable, arguments: Mapping[str, Any], data: Path | None) -> None:
    """One line about an argument that is missing or not wanted, before anything runs."""
    try:
        signature = inspect.signature(model)
    except (TypeError, ValueError):
        return
    parameters = signature.parameters.values()
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    missing = [name for name in required if name not in arguments]
    if missing and data is None:
        raise UserError(f"the model needs the argument '{missing[0]}': give it in a file with --data")
    if missing:
        raise UserError(f"the model needs the argument '{missing[0]}', which {data} does not have")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    unknown = [name for name in arguments if name not in signature.parameters]
    if unknown:
        taken = ", ".join(signature.parameters)
        raise UserError(f"{data} has '{unknown[0]}', which the model does not take; it takes {taken}")


# --- results ------------------------------------------------------------------------------------------------------------


def moments_table(fits: Mapping[str, FitResult], example: Example, reference: Mapping[str, np.ndarray] | None) -> str:
    """ELBO, k-hat, and every reported scalar's mean and sd under each guide, next to the reference."""
    columns: dict[str, dict[str, str]] = {}
    for name, result in fits.items():
        khat = "–" if np.isnan(result.khat.value) else f"{result.khat:.2f} ± {result.khat.se:.2f}"
        column = {"ELBO": str(result.elbo), "k-hat": khat}
        columns[name] = column | _moments(result.summary(coords=example.coords, quantiles=()), example.report)
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


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the directory {path} cannot be made: {error.strerror}") from error


def _write(
    directory: Path, fits: Mapping[str, FitResult], example: Example, reference: Mapping[str, np.ndarray] | None
) -> list[Path]:
    """One netCDF file per guide and a PNG of the marginals; a file is whole or not there."""
    written = []
    for name, result in fits.items():
        path = directory / f"{example.name}_{name}.nc"
        with _quiet_arviz(), _whole_file(path) as part:
            result.to_arviz(NUM_ARVIZ_DRAWS, coords=example.coords).to_netcdf(str(part))
        written.append(path)
    path = directory / f"{example.name}_marginals.png"
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture: pip install 'pyro-flowguides[plots]'", file=sys.stderr)
        return written
    first = next(iter(fits.values()))
    dims = first.draws.dims
    posteriors = {name: scalars(result.draws.posterior(), dims, example.coords) for name, result in fits.items()}
    if reference is not None:
        posteriors = {"NUTS": scalars(reference, dims, example.coords)} | posteriors
    shown = list(_moments(first.summary(coords=example.coords, quantiles=()), example.report))
    axes = plot_marginals(posteriors, shown[:MAX_PLOTTED], reference="NUTS" if reference is not None else None)
    with _whole_file(path) as part:
        axes[0].figure.savefig(part, dpi=120)
    plt.close(axes[0].figure)
    return [*written, path]


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """A path beside the file to write to, moved into place at the end."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet_arviz() -> Iterator[None]:
    """Without ArviZ 0.x's announcement of its successor, which is not about the user's fit."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)
        yield
