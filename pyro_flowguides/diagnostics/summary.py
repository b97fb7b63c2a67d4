"""Tables with one labelled row per scalar: moments and quantiles, diagnostics. Numpy and pandas alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from . import moments
from .errors import Unseen, moment_errors
from .importance import ImportanceWeights


def summarize(
    values: Mapping[str, np.ndarray],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Sequence[Any]],
    quantiles: Sequence[float],
    weights: np.ndarray | None = None,
) -> pd.DataFrame:
    """Mean, standard deviation and quantiles of every scalar.

    Arguments:
        values: Draws by name, shape ``(S,) + shape``.
        dims: The names of the dimensions of each shape.
        coords: The labels along a dimension; a dimension without labels is numbered.
        quantiles: Numbers between 0 and 1.
        weights: Of the draws, adding up to 1; equal if not given.

    Returns:
        A data frame indexed by labels such as ``theta[Choate]``, with columns ``mean``, ``sd`` and one per quantile (``5%``).
    """
    statistics = {
        name: np.stack(
            [moments.mean(draws, weights), moments.sd(draws, weights), *moments.quantiles(draws, quantiles, weights)],
            -1,
        )
        for name, draws in values.items()
    }
    rows = {
        label: row
        for name, table in statistics.items()
        for label, row in zip(
            scalar_labels(name, table.shape[:-1], dims.get(name, ()), coords),
            table.reshape(-1, table.shape[-1]),
            strict=True,
        )
    }
    columns = ["mean", "sd", *(f"{100 * q:g}%" for q in quantiles)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def diagnose(
    values: Mapping[str, np.ndarray],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Sequence[Any]],
    weights: ImportanceWeights,
    weighted: bool = False,
    unseen: Unseen | None = None,
) -> pd.DataFrame:
    """What the importance weights say about every scalar.

    Arguments:
        values: Draws by name, shape ``(S,) + shape``.
        dims: The names of the dimensions of each shape.
        coords: The labels along a dimension; a dimension without labels is numbered.
        weights: Of the draws.
        weighted: Whether the errors are those of the weighted draws, or of the draws as they are.
        unseen: What no draw has reached; the errors are NaN where its moments are not known.

    Returns:
        A data frame with the index of :func:`summarize` and the columns ``khat`` (see :meth:`ImportanceWeights.khat_of_mean`),
        ``shift`` (by how many standard deviations the weights move the mean), ``ess`` (the number of draws of the posterior that
        would estimate the mean as well as the weighted draws), ``mcse_mean`` (the standard error of the weighted mean), and the
        estimated errors with their standard errors, see :mod:`pyro_flowguides.diagnostics.errors`: ``mean_error`` and
        ``mean_error_se`` (the mean minus the posterior's, in its sds), ``sd_error`` and ``sd_error_se`` (the sd over the
        posterior's, minus 1). Where a few draws carry all the weight, the errors are NaN.
    """
    columns = scalars(values, dims, coords)
    rows = {}
    for label, column in columns.items():
        plain, mean = moments.mean(column), moments.mean(column, weights.weights)
        sd = moments.sd(column, weights.weights)
        mcse = np.sqrt((weights.weights**2 * (column - mean) ** 2).sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            rows[label] = [weights.khat_of_mean(column), (mean - plain) / sd, (sd / mcse) ** 2, mcse]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["khat", "shift", "ess", "mcse_mean"])
    errors = moment_errors(columns, weights, unseen)
    found = errors.weighted if weighted else errors.raw
    return table.assign(
        mean_error=found.mean_bias, mean_error_se=found.mean_se, sd_error=found.sd_bias, sd_error_se=found.sd_se
    )


def scalars(
    values: Mapping[str, np.ndarray], dims: Mapping[str, Sequence[str]], coords: Mapping[str, Sequence[Any]]
) -> dict[str, np.ndarray]:
    """Every scalar's draws by its label."""
    return {
        label: column
        for name, draws in values.items()
        for label, column in zip(
            scalar_labels(name, draws.shape[1:], dims.get(name, ()), coords),
            draws.reshape(len(draws), -1).T,
            strict=True,
        )
    }


def scalar_labels(
    name: str, shape: Sequence[int], dims: Sequence[str], coords: Mapping[str, Sequence[Any]]
) -> list[str]:
    """The labels of a variable's scalars in row-major order: ``["theta[Choate]", …]``, or the name alone for a scalar.

    Raises:
        ValueError: if there are more names than dimensions, or a dimension has another number of labels than elements.
    """
    if len(dims) > len(shape):
        raise ValueError(f"'{name}' has {len(shape)} dimensions, and {len(dims)} names for them: {', '.join(dims)}")
    if not shape:
        return [name]
    axes = []
    for size, dim in itertools.zip_longest(shape, dims):
        labels = [str(label) for label in coords.get(dim, range(size))]
        if len(labels) != size:
            raise ValueError(f"dimension '{dim}' of '{name}' has {size} elements and {len(labels)} labels in coords")
        axes.append(labels)
    return [f"{name}[{', '.join(labels)}]" for labels in itertools.product(*axes)]
