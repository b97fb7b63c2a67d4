"""A table of posterior moments and quantiles, one row per scalar, with labels. Numpy and pandas alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd


def summarise(
    values: Mapping[str, np.ndarray],
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Sequence[Any]],
    quantiles: Sequence[float],
) -> pd.DataFrame:
    """Mean, standard deviation and quantiles of every scalar.

    Arguments:
        values: Draws by name, shape ``(num_draws,) + shape``.
        dims: The names of the dimensions of each shape.
        coords: The labels along a dimension; a dimension without labels is numbered.
        quantiles: Numbers between 0 and 1.

    Returns:
        A data frame indexed by labels such as ``theta[Choate]``, with columns ``mean``, ``sd`` and one per quantile (``5%``).
    """
    rows = {}
    for name, draws in values.items():
        draws = draws.astype(np.float64) if draws.dtype == bool else draws
        labels = scalar_labels(name, draws.shape[1:], dims.get(name, ()), coords)
        for label, column in zip(labels, draws.reshape(len(draws), -1).T, strict=True):
            rows[label] = [column.mean(), column.std(ddof=1), *np.quantile(column, list(quantiles))]
    columns = ["mean", "sd", *(f"{100 * q:g}%" for q in quantiles)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def scalar_labels(
    name: str, shape: Sequence[int], dims: Sequence[str], coords: Mapping[str, Sequence[Any]]
) -> list[str]:
    """The labels of a variable's scalars in row-major order: ``["theta[Choate]", …]``, or the name alone for a scalar."""
    if not shape:
        return [name]
    axes = [
        [str(label) for label in coords[dim]] if dim in coords else [str(i) for i in range(size)]
        for size, dim in itertools.zip_longest(shape, dims)
    ]
    return [f"{name}[{', '.join(labels)}]" for labels in itertools.product(*axes)]
