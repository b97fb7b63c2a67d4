"""Checkpoints: everything that a fit needs to continue where it was, in one file."""

from __future__ import annotations

import os
import random
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checks import check_positive_integer

FORMAT = 3


class Checkpoint:
    """The file that :func:`pyro_flowguides.fit` writes its state to, so that an interrupted fit can continue.

    A resumed fit gives the same numbers as one without the interruption. With restarts each has a file of its own,
    ``name-0.suffix``, ``name-1.suffix``, …

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

    def __repr__(self) -> str:
        return f"Checkpoint('{self.path}', every={self.every}, resume={self.resume})"

    def of_restart(self, index: int) -> Checkpoint:
        """The checkpoint of one of several restarts."""
        return Checkpoint(self.path.with_name(f"{self.path.stem}-{index}{self.path.suffix}"), self.every, self.resume)

    def save(self, content: dict[str, Any]) -> None:
        """Writes the file in one step: whatever happens meanwhile, there is the old file or the new one."""
        handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save({"format": FORMAT, **content}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self.path)
        except BaseException:
            os.unlink(name)
            raise

    def load(self) -> dict[str, Any] | None:
        """Reads the file; None if there is none yet.

        Raises:
            ValueError: if the directory does not exist, or the file is damaged or no checkpoint.
            FileExistsError: if there is a file, and ``resume`` is not set.
        """
        if not self.path.parent.is_dir():
            raise ValueError(f"fit: the directory of checkpoint '{self.path}' does not exist")
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
