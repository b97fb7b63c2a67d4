"""The search for the first NaN, and whether there are numbers to look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..internals import is_functorch_tensor, is_recording

_detecting_nan = False


@contextmanager
def detect_nan(enabled: bool = True) -> Iterator[None]:
    """Within it transforms raise an error at the first NaN, which names the transform.

    A transform refuses an input or a context that holds NaN, and a :class:`Compose` checks what each of its parts returns,
    so that the error names the part that made the first NaN. It is off by default, whatever the validation settings of
    Pyro, because every check waits for the device. Values that cannot be read (under ``torch.vmap``, ``make_fx``,
    ``torch.compile``, ``torch.jit.trace``, while a CUDA graph is captured, on the meta device) are not checked. The switch is
    one for all threads.

    Arguments:
        enabled: Whether to check; False switches an outer ``detect_nan()`` off.

    Example:
        >>> from pyro_flowguides.transforms import Planar
        >>> planar = Planar(2)
        >>> with detect_nan():
        ...     planar(torch.tensor([0.0, torch.nan]))
        Traceback (most recent call last):
            ...
        ValueError: Planar: 1 of the 2 numbers of its input is NaN
    """
    global _detecting_nan
    previous, _detecting_nan = _detecting_nan, enabled
    try:
        yield
    finally:
        _detecting_nan = previous


def is_detecting_nan() -> bool:
    """Whether :func:`detect_nan` is on."""
    return _detecting_nan


def refuse_nan(owner: str, tensors: dict[str, Tensor | None]) -> None:
    """Raises an error that counts the NaN of the first tensor that has any; tensors that cannot be read are left out."""
    for name, value in tensors.items():
        if value is not None and can_be_read(value) and (count := int(value.detach().isnan().sum())):
            verb = "is" if count == 1 else "are"
            raise ValueError(f"{owner}: {count} of the {value.numel()} numbers of {name} {verb} NaN")


def can_be_read(value: Tensor) -> bool:
    """Whether the numbers of a tensor are there for Python to look at."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or value.is_meta:  # type: ignore[attr-defined]
        return False
    if is_functorch_tensor(value) or is_recording():
        return False
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())
