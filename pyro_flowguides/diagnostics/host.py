"""Draws of a GPU brought to the host: in blocks, through pinned memory, with the next block on its way while one is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

# Two blocks of this size are pinned, whatever the size of the draws: pinned memory is taken from everybody else.
BLOCK_BYTES = 2**24


class Stream(Protocol):
    """Copies that the host does not wait for."""

    def buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """Memory of the host for such copies."""
        ...

    def begin(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        """Begins a copy; returns what waits for its end."""
        ...


class CudaStream:
    """Copies from a GPU to pinned memory, in the order of its other work."""

    def buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """Pinned memory."""
        return torch.empty(size, dtype=dtype, device="cpu", pin_memory=True)

    def begin(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        """Begins a copy; returns what waits for its end."""
        target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(source.device))
        return event.synchronize


def to_numpy(value: Tensor) -> np.ndarray:
    """A tensor of any device, with or without a graph, as a numpy array."""
    value = value.detach()
    return (fetched(value, CudaStream()) if value.is_cuda else value.cpu()).numpy()


def fetched(value: Tensor, stream: Stream, block_bytes: int = BLOCK_BYTES) -> Tensor:
    """A tensor on the host.

    Arguments:
        value: The tensor.
        stream: What copies from its device.
        block_bytes: The size of a block.
    """
    flat = value.reshape(-1)
    result = torch.empty(flat.shape, dtype=value.dtype, device="cpu")
    blocks = list(
        zip(*(each.split(max(1, block_bytes // value.element_size())) for each in (flat, result)), strict=True)
    )
    if not value.numel():
        return result.reshape(value.shape)
    buffers = [stream.buffer(len(blocks[0][0]), value.dtype) for _ in blocks[:2]]
    unfinished: list[Callable[[], None]] = []
    for index, (source, target) in enumerate(blocks):
        if len(unfinished) == len(buffers):
            unfinished.pop(0)()
        part = buffers[index % 2][: len(source)]
        unfinished.append(_storing(stream.begin(part, source), target, part))
    for finish in unfinished:
        finish()
    return result.reshape(value.shape)


def _storing(wait: Callable[[], None], target: Tensor, part: Tensor) -> Callable[[], None]:
    def finish() -> None:
        wait()
        target.copy_(part)

    return finish
