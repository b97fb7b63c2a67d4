"""Checkpoints: everything that a fit needs to continue where it was, in one file."""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checks import check_positive_integer, warn
from .files import check_writable, locked, write_whole

FORMAT = 6


class Checkpoint:
    """The file that :func:`pyro_flowguides.fit` writes its state to, so that an interrupted fit can continue.

    A resumed fit gives the same numbers as one without the interruption. A fit with other data, another model, guide, optimizer,
    seed or other options is refused. These may change: the path (move the file), ``every``, ``progress``, ``callbacks``,
    ``backend``, ``max_nonfinite_steps``; and there may be more steps in the last round where the learning rate does not depend
    on their number, as with ``schedule="constant"``.

    One fit at a time writes the file: while it runs there is a lock file ``.name.lock`` beside it. A write that fails, on a full
    disk for example, is one warning, and the training goes on. Reading a checkpoint executes no code of the file.

    With restarts each has a file of its own, ``name-0.suffix``, ``name-1.suffix``, …

    Arguments:
        path: The file.
        every: The number of steps from one write to the next.
        resume: Whether to continue from the file if it exists; otherwise an existing file is an error.

    Raises:
        TypeError: if ``every`` is not an integer.
        ValueError: if ``every`` is below 1.
    """

    def __init__(self, path: str | Path, every: int = 500, resume: bool = False) -> None:
        self.path = Path(path)
        self.every = check_positive_integer("Checkpoint", "every", every)
        self.resume = resume
        self._has_warned = False

    def __repr__(self) -> str:
        return f"Checkpoint('{self.path}', every={self.every}, resume={self.resume})"

    def of_restart(self, index: int) -> Checkpoint:
        """The checkpoint of one of several restarts."""
        return Checkpoint(self.path.with_name(f"{self.path.stem}-{index}{self.path.suffix}"), self.every, self.resume)

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Nobody else writes the file within; litter that a killed process has left beside it is removed.

        Raises:
            ValueError: if the file cannot be written.
            BlockingIOError: if another fit has reserved it.
        """
        if not self.path.parent.is_dir():
            raise ValueError(f"fit: the directory of checkpoint '{self.path}' does not exist")
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self.path))
                check_writable(self.path)
            except BlockingIOError as error:
                raise BlockingIOError(
                    f"fit: checkpoint '{self.path}' belongs to another fit, {error}; wait for its end, or give another path"
                ) from None
            except OSError as error:
                raise ValueError(
                    f"fit: checkpoint '{self.path}' cannot be written: {error.strerror or error}"
                ) from error
            yield

    def save(self, content: dict[str, Any]) -> None:
        """Writes the file in one step: whatever happens meanwhile, there is the old file or the new one.

        Raises:
            OSError: if it cannot be written.
        """
        # Not straight to the file: torch hides what the system says about a full disk.
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, **content}, buffer)
        write_whole(self.path, buffer.getbuffer())

    def try_to_save(self, content: dict[str, Any]) -> None:
        """Writes the file if that is possible; otherwise the old one stays, and there is one warning."""
        try:
            self.save(content)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                warn(
                    f"fit: checkpoint '{self.path}' could not be written: {error.strerror or error}; the training goes on, the "
                    f"file stays as it was, and the next attempt is made after {self.every} steps"
                )

    def load(self) -> dict[str, Any] | None:
        """Reads the file; None if there is none yet.

        Raises:
            ValueError: if the file is damaged, no checkpoint, or cannot be read.
            FileExistsError: if there is a file, and ``resume`` is not set.
        """
        if not self.path.exists():
            return None
        if not self.resume:
            raise FileExistsError(
                f"fit: checkpoint '{self.path}' exists; give Checkpoint('{self.path}', resume=True) to continue from it, or "
                "delete it to start again"
            )
        try:
            with zipfile.ZipFile(self.path) as archive:
                # torch does not look at the checksums.
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of {damaged} is wrong")
            content = torch.load(self.path, weights_only=True, map_location="cpu")
        except OSError as error:
            raise ValueError(f"fit: checkpoint '{self.path}' cannot be read: {error.strerror or error}") from error
        except Exception as error:
            raise ValueError(
                f"fit: checkpoint '{self.path}' cannot be read, it is damaged or no checkpoint; delete it to start again: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(
                f"fit: '{self.path}' is no checkpoint of this version of pyro_flowguides; delete it to start again"
            )
        return content

    @contextmanager
    def used(self) -> Iterator[None]:
        """What a content that was read is no good for is a ValueError that names the file.

        Raises:
            ValueError: if something within fails, with the reason.
        """
        try:
            yield
        except ValueError as error:
            raise ValueError(f"fit: checkpoint '{self.path}' does not fit: {error}") from error
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise ValueError(
                f"fit: checkpoint '{self.path}' is damaged or incomplete; delete it to start again: {reason}"
            ) from error


def random_state() -> dict[str, Any]:
    """The state of the generators of torch, numpy and Python, as tensors and plain Python values."""
    state: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = state
    return {
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [kind, keys.tolist(), position, has_gauss, gauss],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Goes back to a :func:`random_state`."""
    torch.random.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    random.setstate(state["python"])
