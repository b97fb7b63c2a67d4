"""From arrays to ArviZ: ``InferenceData`` on ArviZ 0.x, ``DataTree`` on 1.x, with the same content.

This module works on numpy arrays and needs no torch.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Coords = Mapping[str, Sequence[Any]]
Dims = Mapping[str, Sequence[str]]

SAMPLE_DIMS = ("chain", "draw")
# Names of dimensions that ArviZ's schema keeps for itself.
RESERVED_DIMS = ("chain", "draw", "sample", "pred_id")


@functools.cache
def arviz_generation() -> int:
    """0 for ArviZ 0.x (InferenceData), 1 for 1.x and later (DataTree)."""
    return min(1, int(importlib.metadata.version("arviz").split(".")[0]))


@dataclass(frozen=True)
class Group:
    """The variables of one group.

    Attributes:
        variables: Arrays by name; the leading dimensions of each are the sample dimensions.
        dims: Names of a variable's other dimensions; those not named are called ``<variable>_dim_<i>``.
        sample_dims: The dimensions that all variables share; none for groups of data.
    """

    variables: Mapping[str, np.ndarray]
    dims: Dims = field(default_factory=dict)
    sample_dims: Sequence[str] = SAMPLE_DIMS


def to_tree(
    groups: Mapping[str, Group],
    coords: Coords | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """Builds the container of the installed ArviZ.

    Arguments:
        groups: The groups by name.
        coords: Labels along dimensions.
        attrs: Attributes of the container and of every group, beside those that ArviZ's schema asks for.

    Returns:
        ``arviz.InferenceData`` or ``xarray.DataTree``.

    Raises:
        ValueError: if names clash: a dimension with a variable of its group or with a name that ArviZ keeps for itself, two
            dimensions of a variable with each other, two variables once the slashes of scopes have become dots; if a
            dimension has several sizes, or another number of labels than elements; if labels are given for no dimension.
    """
    import xarray as xr

    coords = {_safe(dim): labels for dim, labels in (coords or {}).items()}
    named_dims = {
        name: {variable: _dimension_names(name, group, variable) for variable in group.variables}
        for name, group in groups.items()
    }
    known = {dim for variables in named_dims.values() for dims in variables.values() for dim in dims}
    for dim in coords:
        if dim not in known:
            raise ValueError(
                f"to_arviz: coords has labels for '{dim}', which is no dimension; there are {', '.join(sorted(known))}"
            )
    shared = {
        "created_at": datetime.datetime.now().astimezone().isoformat(),
        **(attrs or {}),
    }
    datasets = {name: _dataset(name, group, named_dims[name], coords, shared) for name, group in groups.items()}
    if arviz_generation() == 0:
        import arviz as az

        return az.InferenceData(attrs=shared, **datasets)
    tree = xr.DataTree.from_dict(datasets)
    tree.attrs.update(shared)
    return tree


def _dataset(
    group_name: str,
    group: Group,
    dims: Dims,
    coords: Coords,
    attrs: Mapping[str, Any],
) -> Any:
    """One group as an ``xarray.Dataset``, with a coordinate for every dimension as ArviZ makes them."""
    import xarray as xr

    sizes: dict[str, int] = {}
    variables: dict[str, tuple[Sequence[str], np.ndarray]] = {}
    for name, array in group.variables.items():
        for dim, size in zip(dims[name], array.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                raise ValueError(
                    f"to_arviz: dimension '{dim}' of group {group_name} has {sizes[dim]} elements before '{name}' and "
                    f"{size} in it; name the dimensions apart with dims"
                )
        safe = _safe(name)
        if safe in variables:
            raise ValueError(f"to_arviz: two variables of group {group_name} would be called '{safe}'; rename a site")
        variables[safe] = (dims[name], array)
    for dim, size in sizes.items():
        if dim in coords and len(coords[dim]) != size:
            raise ValueError(
                f"to_arviz: dimension '{dim}' of group {group_name} has {size} elements and {len(coords[dim])} labels in coords"
            )
        if dim in variables:
            raise ValueError(
                f"to_arviz: '{dim}' is the name of a dimension and of a variable of group {group_name}; rename the site or "
                "name the dimension with dims"
            )
    labels = {dim: list(coords[dim]) if dim in coords else np.arange(size) for dim, size in sizes.items()}
    own = {"sample_dims": list(group.sample_dims)} if group.sample_dims else {}
    return xr.Dataset(variables, coords=labels, attrs={**attrs, **own})


def _dimension_names(group_name: str, group: Group, name: str) -> list[str]:
    """The names of all dimensions of a variable."""
    rank = group.variables[name].ndim - len(group.sample_dims)
    given = list(group.dims.get(name, ()))
    if len(given) > rank:
        raise ValueError(
            f"to_arviz: '{name}' of group {group_name} has {rank} dimensions beside {list(group.sample_dims)}, and {len(given)} "
            f"names for them: {given}"
        )
    names = [_safe(dim) for dim in (*given, *(f"{name}_dim_{i}" for i in range(len(given), rank)))]
    for dim in names:
        if dim in RESERVED_DIMS and group.sample_dims:
            raise ValueError(
                f"to_arviz: a dimension of '{name}' is called '{dim}', which ArviZ keeps for itself; rename the plate, or name "
                f"the dimension with dims={{'{name}': [...]}}"
            )
        if names.count(dim) > 1:
            raise ValueError(f"to_arviz: two dimensions of '{name}' are called '{dim}'; name them with dims")
    return [*group.sample_dims, *names]


def _safe(name: str) -> str:
    """A name for netCDF, which takes the slash that joins the names of Pyro's scopes for a group."""
    return name.replace("/", ".")
