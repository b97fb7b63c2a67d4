"""Checks of arguments, warnings that point at the user's own line however deep in the package they are raised, the version."""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)


def warn(message: str) -> None:
    """Warns at the innermost line that is not of this package."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and is_of_package(frame.f_code.co_filename):
        frame = frame.f_back
        level += 1
    warnings.warn(message, stacklevel=level + 1)


def is_of_package(filename: str) -> bool:
    """Whether a file of code is one of this package."""
    return filename.startswith(_PACKAGE)


def check_positive_integer(owner: str, argument: str, value: int) -> int:
    """The value, if it is an integer of at least 1; else an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {argument} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{owner}: {argument} must be at least 1, got {value}")
    return value


def version() -> str:
    """The version of this package as it was installed, "unknown" where it runs from its source alone."""
    try:
        return importlib.metadata.version("pyro-flowguides")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
