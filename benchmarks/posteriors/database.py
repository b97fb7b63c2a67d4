"""The posteriors of a checkout of posteriordb (https://github.com/stan-dev/posteriordb): JSON files, the large ones zipped."""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .definitions import DEFINITIONS, Definition
from .known import KnownPosterior, Reference, by_site, scalar, tensor


def posteriors(database: Path) -> dict[str, Callable[[], KnownPosterior]]:
    """A function that loads the posterior, for each posterior of the folder ``posterior_database`` whose model is known.

    Raises:
        FileNotFoundError: if the folder is not a database.
    """
    folder = database / "posteriors"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{database} has no folder 'posteriors'; give the folder posterior_database of a checkout of posteriordb"
        )
    entries = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {
        entry["name"]: functools.partial(_load, database, entry)
        for entry in entries
        if entry["model_name"] in DEFINITIONS and entry["reference_posterior_name"]
    }


def _load(database: Path, entry: dict[str, Any]) -> KnownPosterior:
    definition = DEFINITIONS[entry["model_name"]]
    data = {name: tensor(value) for name, value in read_data(database, entry["data_name"]).items()}
    draws = reference_draws(database, entry["reference_posterior_name"])
    arguments = definition.arguments(data)
    reference = {name: tensor(value) for name, value in by_site(draws).items()}
    return KnownPosterior(
        name=entry["name"],
        model=definition.model,
        args=arguments,
        reference=_reference(draws, definition),
        latents=definition.latents(reference, data),
        log_evidence=definition.log_evidence(*arguments) if definition.log_evidence else None,
    )


def read_data(database: Path, name: str) -> dict[str, Any]:
    """The content of a data set."""
    return _read(database / "data" / "data" / name)


def reference_draws(database: Path, name: str) -> dict[str, np.ndarray]:
    """The draws of every scalar parameter, chain after chain."""
    chains = _read(database / "reference_posteriors" / "draws" / "draws" / name)
    return {parameter: np.concatenate([chain[parameter] for chain in chains]) for parameter in chains[0]}


def _reference(draws: dict[str, np.ndarray], definition: Definition) -> Reference:
    names = tuple(f"log {name}" if name in definition.log_scale else name for name in draws)
    values = by_site(draws)
    return Reference.from_draws(names, np.stack([scalar(values, name) for name in names], -1))


def _read(path: Path) -> Any:
    with zipfile.ZipFile(path.with_name(f"{path.name}.json.zip")) as archive:
        return json.loads(archive.read(archive.namelist()[0]))
