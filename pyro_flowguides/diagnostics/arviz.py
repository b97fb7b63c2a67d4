"""From arrays to ArviZ: ``InferenceData`` on ArviZ 0.x, ``DataTree`` on 1.x, with the same content.

This module works on numpy arrays and needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .importance import arviz_generation


def to_tree(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    sample_dims: Mapping[str, Sequence[str]] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """Builds the container of the installed ArviZ.

    Arguments:
        groups: Group name to variable name to array; the leading dimensions of an array are the group's sample dimensions.
        coords: Labels of dimensions.
        dims: Names of a variable's other dimensions; those not named are called ``<variable>_dim_<i>``.
        sample_dims: The sample dimensions of the groups where they are not chain and draw; none for groups of data.
        attrs: Attributes of every group.

    Returns:
        ``arviz.InferenceData`` or ``xarray.DataTree``.
    """
    import arviz as az
    import xarray as xr

    generation = arviz_generation()
    datasets = {}
    for group, named in groups.items():
        # Pyro's scopes join names by a slash, which netCDF takes for a group.
        variables = {name.replace("/", "."): array for name, array in named.items()}
        default = () if group.endswith("data") else ("chain", "draw")
        group_sample_dims = list((sample_dims or {}).get(group, default))
        group_dims = {name.replace("/", "."): list((dims or {}).get(name, [])) for name in named}
        used = {dim for name in variables for dim in group_dims[name]} | set(group_sample_dims)
        key = "sample_dims" if generation else "default_dims"
        datasets[group] = az.dict_to_dataset(
            {name: np.asarray(array) for name, array in variables.items()},
            coords={dim: list(labels) for dim, labels in (coords or {}).items() if dim in used},
            dims={name: names for name, names in group_dims.items() if names},
            **{key: group_sample_dims},
        )
        datasets[group].attrs.update(attrs or {})
    return xr.DataTree.from_dict(datasets) if generation else az.InferenceData(**datasets)
