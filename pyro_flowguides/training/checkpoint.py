"""Checkpoints: everything that a fit needs to go on where it was, in one file."""

from __future__ import annotations

import os
import random
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

FORMAT = 2


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


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint in one step: whatever happens meanwhile, there is the old file or the new one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint.

    Raises:
        ValueError: if the file is damaged, or no checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch does not look at the checksums.
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(
            f"checkpoint '{path}' cannot be read, it is damaged or no checkpoint; delete it to begin anew: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"'{path}' is no checkpoint of this version of pyro_flowguides; delete it to begin anew")
    return content
