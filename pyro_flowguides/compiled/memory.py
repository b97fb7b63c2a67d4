"""The memory of a step: predicted from passes with few particles, and compared with what there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import internals
from ..model.recording import LargestTensor

# The part of the free memory that a step may take. It is also used by others, and in pieces.
SHARE = 0.5
_FEW = (2, 4)
# A backward pass makes about two tensors for each one of the forward pass; this is more.
_PASSES = 4


class _HeldBytes(internals.TorchDispatchMode):
    """Notes after each operation how many bytes the tensors hold that were made within.

    Attributes:
        series: The bytes after each operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.series: list[int] = []
        self._held = 0
        self._living: dict[int, tuple[Callable[[], bool], int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for key, (is_gone, size) in list(self._living.items()):
            if is_gone():
                del self._living[key]
                self._held -= size
        given = {internals.storage_id(leaf) for leaf in _tensors((args, kwargs))}
        for leaf in _tensors(result):
            key = internals.storage_id(leaf)
            if key not in given and key not in self._living:
                storage = leaf.untyped_storage()
                self._living[key] = internals.watch_storage(storage), storage.nbytes()
                self._held += storage.nbytes()
        self.series.append(self._held)
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in internals.flatten(tree)[0] if isinstance(leaf, Tensor) and leaf.layout == torch.strided]


class Prediction(NamedTuple):
    """The bytes that a step holds after each of its operations: whatever the number of particles, and for each of them."""

    fixed: Sequence[float]
    each: Sequence[float]

    def of(self, num_particles: int) -> float:
        """The bytes at the peak of a step with this many particles."""
        return max(fixed + num_particles * each for fixed, each in zip(*self, strict=True))

    def most(self, limit: float) -> float:
        """The number of particles whose step stays within so many bytes."""
        return min(((limit - fixed) // each for fixed, each in zip(*self, strict=True) if each > 0), default=math.inf)


def predict(run: Callable[[int], Any]) -> Prediction:
    """Predicts the memory that an eager step takes beside what is there before it; a captured one takes less.

    Steps with two and with four particles are compared, operation by operation: the memory of a tensor is linear in the number
    of particles. Cost: two steps, some ten times slower than others.

    Arguments:
        run: Computes the loss and its gradient with a number of particles.
    """
    series = []
    for number in _FEW:
        with _HeldBytes() as held:
            run(number)
        series.append(held.series or [0])
    few, more = series
    if len(few) != len(more):
        # Every particle is a run of its own: what is held grows until the gradient is taken.
        few, more = [max(few)], [max(more)]
    each = [(theirs - ours) / (_FEW[1] - _FEW[0]) for ours, theirs in zip(few, more, strict=True)]
    return Prediction([ours - _FEW[0] * slope for ours, slope in zip(few, each, strict=True)], each)


def free_bytes(device: torch.device) -> float:
    """The memory that is free on a device; infinite where nobody knows."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds and does not use.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        return min(_available(), _left_to_group())
    return math.inf


def _available() -> float:
    """By Linux; other systems do not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((1024 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf)


def _left_to_group(folder: Path = Path("/sys/fs/cgroup")) -> float:
    """What the control group of a container leaves to it."""
    try:
        limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return math.inf
    return math.inf if limit == "max" else max(0.0, float(limit) - float(used))


def chunk_size_for(loss: Callable[[int], Tensor], gradient: Callable[[int], Any], num_particles: int) -> int | None:
    """The number of particles that fit into the memory at a time, in chunks of nearly the same size; None if all of them do.

    Cost: one forward pass with two particles. Where all of its tensors together, freed or not, might be too much for all
    particles, the cost of :func:`predict` as well.

    Arguments:
        loss: Computes the loss with a number of particles.
        gradient: Computes the loss and its gradient.
        num_particles: The number of particles of a step.
    """
    with LargestTensor() as seen:
        device = loss(_FEW[0]).device
    limit = SHARE * free_bytes(device)
    bound = _PASSES * torch.float64.itemsize * sum(seen.sizes) * num_particles / _FEW[0]
    return None if bound <= limit else fitting(predict(gradient), num_particles, limit)


def fitting(prediction: Prediction, num_particles: int, limit: float) -> int | None:
    """See :func:`chunk_size_for`.

    Arguments:
        prediction: The memory of a step.
        num_particles: The number of particles of a step.
        limit: The bytes that it may take.
    """
    most = max(1, prediction.most(limit))
    return None if most >= num_particles else math.ceil(num_particles / math.ceil(num_particles / most))
