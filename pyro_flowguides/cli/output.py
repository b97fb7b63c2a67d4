"""What a fit writes: netCDF files, a picture and reports. Each is whole or not there."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from ..diagnostics.plots import plot_marginals
from ..diagnostics.summary import scalars
from ..examples.example import Example
from ..training.files import check_writable, locked, write_whole
from ..training.result import FitResult
from .errors import OutputError, UserError, line_of, reason_of

NUM_ARVIZ_DRAWS = 4000
MAX_PLOTTED = 12


class Output:
    """The files of one command in a directory.

    Arguments:
        directory: The directory.
        model: The name of the model.
        guides: The names of the guides.
        results: Whether to write netCDF files and the picture.
        reports: Whether to write a report for each guide.
    """

    def __init__(self, directory: Path, model: str, guides: Sequence[str], *, results: bool, reports: bool) -> None:
        self.directory = directory
        self.fits = {name: directory / f"{model}_{name}.nc" for name in guides} if results else {}
        self.picture = directory / f"{model}_marginals.png" if results else None
        self.reports = {name: directory / f"{model}_{name}.html" for name in guides} if reports else {}

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Makes the directory, and keeps other commands from writing the same files within.

        Raises:
            UserError: if the files cannot be written there.
        """
        with ExitStack() as stack:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--out: the directory {self.directory} cannot be made: {reason_of(error)}") from error
            for path in filter(None, (*self.fits.values(), self.picture, *self.reports.values())):
                try:
                    stack.enter_context(locked(path))
                    check_writable(path)
                except OSError as error:
                    raise UserError(f"--out: {path} cannot be written: {reason_of(error)}") from error
            yield

    def write_fit(self, name: str, result: FitResult, example: Example) -> Path:
        """One fit as a netCDF file."""
        path = self.fits[name]
        try:
            with quiet_arviz():
                content = netcdf(result.to_arviz(NUM_ARVIZ_DRAWS, coords=example.coords))
        # The names of a user's sites may clash, for example.
        except Exception as error:
            raise OutputError(f"{path} could not be written: {line_of(error)}") from error
        return write(path, content)

    def write_picture(
        self,
        fits: Mapping[str, FitResult],
        example: Example,
        reference: Mapping[str, np.ndarray] | None,
        shown: Sequence[str],
    ) -> Path:
        """The marginals of all fits in one picture; needs matplotlib."""
        assert self.picture is not None
        import matplotlib.pyplot as plt

        dims = next(iter(fits.values())).draws.dims
        posteriors = {name: scalars(result.draws.posterior(), dims, example.coords) for name, result in fits.items()}
        if reference is not None:
            posteriors = {"NUTS": scalars(reference, dims, example.coords)} | posteriors
        axes = plot_marginals(posteriors, shown[:MAX_PLOTTED], reference="NUTS" if reference is not None else None)
        buffer = io.BytesIO()
        axes[0].figure.savefig(buffer, format="png", dpi=120)
        plt.close(axes[0].figure)
        return write(self.picture, buffer.getvalue())

    def write_report(
        self,
        name: str,
        fits: Mapping[str, FitResult],
        example: Example,
        reference: Mapping[str, np.ndarray] | None,
    ) -> Path:
        """The report on one fit, with the others and the reference beside it."""
        beside: dict[str, Any] = {} if reference is None else {"NUTS": reference}
        beside |= {other: result.draws for other, result in fits.items() if other != name}
        against = None if reference is None else "NUTS"
        path = self.reports[name]
        try:
            with quiet_arviz():
                fits[name].report(path, beside=beside, reference=against, coords=example.coords)
        except OSError as error:
            raise OutputError(f"{path} could not be written: {reason_of(error)}") from error
        except Exception as error:
            raise OutputError(f"{path} could not be written: {line_of(error)}") from error
        return path


def write(path: Path, content: bytes) -> Path:
    """Writes a whole file, or raises OutputError."""
    try:
        write_whole(path, content)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {reason_of(error)}") from error
    return path


def netcdf(tree: Any) -> bytes:
    """An ArviZ container as the content of a netCDF file.

    It is made in memory: HDF5 crashes the process where a file that it writes cannot grow.
    """
    import h5netcdf
    from xarray.backends import H5NetCDFStore

    if hasattr(tree, "subtree"):
        datasets = {node.path: node.to_dataset() for node in tree.subtree}
    else:
        datasets = {"/": xr.Dataset(attrs=tree.attrs), **{f"/{name}": tree[name] for name in tree.groups()}}
    buffer = io.BytesIO()
    with h5netcdf.File(buffer, "w") as file:
        for path, dataset in datasets.items():
            compressed = {
                name: {"zlib": True} for name, variable in dataset.variables.items() if variable.dtype.kind in "biuf"
            }
            dataset.dump_to_store(H5NetCDFStore(file, group=path), encoding=compressed)
    return buffer.getvalue()


@contextmanager
def quiet_arviz() -> Iterator[None]:
    """Without ArviZ 0.x's announcement of its successor, which is not about the user's fit."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)
        yield
