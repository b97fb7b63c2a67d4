"""The arguments of model and guide: which of them are inputs of a graph, and when a graph is that of other arguments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import internals


class Key(NamedTuple):
    """What must be the same for a captured step to be the step of other arguments.

    Attributes:
        structure: How the arguments are nested.
        default_dtype: The default dtype of torch.
        kinds: Of a tensor its shape, dtype, device, strides and ``requires_grad``; of anything else its value, or its identity.
    """

    structure: Any
    default_dtype: torch.dtype
    kinds: tuple[tuple[Any, ...], ...]

    def difference(self, other: Key) -> str:
        """What is new in another key, as a clause."""
        if self.structure != other.structure:
            return "the number or structure of its arguments is another"
        for before, now in zip(self.kinds, other.kinds, strict=True):
            if before != now and now[0] == "tensor":
                return f"a tensor argument has shape {tuple(now[1])} and dtype {now[2]}"
            if before != now:
                return f"an argument that is no tensor is {now[1]!r}"
        return f"the default dtype is {other.default_dtype}"


class _SameObject:
    """Equal to itself alone; keeps the object, so that nothing else gets its id."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SameObject) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"another {type(self.value).__name__}"


def _kind(leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, Tensor):
        return "tensor", leaf.shape, leaf.dtype, leaf.device, leaf.stride(), leaf.requires_grad
    if isinstance(leaf, np.ndarray):
        return "array", leaf.shape, leaf.dtype.str, leaf.tobytes()
    if isinstance(leaf, (int, float, complex, str, bytes, torch.dtype, torch.device, type(None))):
        return type(leaf), leaf
    return "object", _SameObject(leaf)


class Arguments:
    """The arguments of model and guide: tensors, which are inputs of a graph, and everything else, which is baked into it.

    Attributes:
        args: The positional arguments.
        kwargs: The keyword arguments.
        tensors: The tensors among them, however deeply nested.
    """

    def __init__(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self._leaves, self._structure = internals.flatten((args, kwargs))
        self.tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]

    @property
    def others(self) -> list[Any]:
        """What is no tensor among them."""
        return [leaf for leaf in self._leaves if not isinstance(leaf, Tensor)]

    def key(self) -> Key:
        """The kind of arguments that these are."""
        return Key(self._structure, torch.get_default_dtype(), tuple(map(_kind, self._leaves)))

    def with_tensors(self, tensors: Iterable[Tensor]) -> tuple[tuple, dict[str, Any]]:
        """The same arguments with other tensors."""
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return internals.unflatten(leaves, self._structure)
