"""What ends a command with one line, and how the line is made."""

from __future__ import annotations

import traceback
from pathlib import Path

MAX_LENGTH = 500
# Their messages stand for themselves; of other errors the name says more than the message.
_TELLING = (ValueError, RuntimeError, NotImplementedError, TypeError)
_LIBRARIES = ("site-packages", "dist-packages", "pyro_flowguides")


class UserError(Exception):
    """What the user gave cannot be used; the message is one line."""


class OutputError(Exception):
    """What was computed cannot be written; the message is one line."""


def printable(text: str) -> str:
    """A text with control characters, such as those in the name of a column, as escapes: they would break the line."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def text_of(error: BaseException) -> str:
    """The message of any error as one line; empty if it has none."""
    try:
        # Pyro appends a table of all sites to an error within a model.
        message = str(error).split("Trace Shapes:")[0]
    except Exception:
        message = ""
    return " ".join(message.split())[:MAX_LENGTH]


def line_of(error: BaseException) -> str:
    """The message of any error, with its name where the message alone would say little."""
    text, name = text_of(error), type(error).__name__
    if text and type(error) in _TELLING:
        return text
    return f"{name}: {text}" if text else name


def reason_of(error: OSError) -> str:
    """Why the system refuses, in its own words."""
    return error.strerror or text_of(error) or type(error).__name__


def place_in(file: Path, error: BaseException) -> str | None:
    """The innermost line of a user's file, or of a file of the user beside it, that an error comes from; None if none."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{Path(error.filename).name}, line {error.lineno}"
    folder, place = file.resolve().parent, None
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename).resolve()
        inside = path.is_relative_to(folder) and not any(part in _LIBRARIES for part in path.relative_to(folder).parts)
        if path == file.resolve() or inside:
            place = f"{path.name}, line {frame.lineno}"
    return place


def line_with_place(file: Path | None, error: BaseException) -> str | None:
    """A line about an error in a user's file; None if it does not come from there."""
    place = None if file is None else place_in(file, error)
    if place is None:
        # What explains an error of the user's file was raised by it.
        return None if error.__cause__ is None else line_with_place(file, error.__cause__)
    text, name = text_of(error), type(error).__name__
    return f"{place}: {name}: {text}" if text else f"{place}: {name}"
