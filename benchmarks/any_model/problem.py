"""What the benchmark knows of a model: two forms of it and its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """A model with its data.

    Attributes:
        name: Its name in the results.
        source: What of Pyro's documentation or examples it re-tells.
        model: The model as its users write it, for one draw. If ``is_built``, a function that builds it from the data.
        data: Arrays, the arguments of the model.
        by_hand: The same sites, carried through for batch dimensions on the left; None if the model itself does so, or is never
            written so.
        is_built: Whether ``model(*arguments)`` returns the model, whose own arguments ``given`` says.
        given: Whether a model that is built takes the data as arguments again.
        discrete: Whether it has discrete latents.
    """

    name: str
    source: str
    model: Callable
    data: tuple[np.ndarray, ...]
    by_hand: Callable | None = None
    is_built: bool = False
    given: bool = True
    discrete: bool = False

    def arguments(self) -> tuple[Tensor, ...]:
        """The data as tensors, of torch's default dtype where they are real numbers."""
        tensors = map(torch.as_tensor, self.data)
        return tuple(each.to(torch.get_default_dtype()) if each.is_floating_point() else each for each in tensors)

    def as_written(self) -> tuple[Callable, tuple[Tensor, ...]]:
        """A fresh model, with its arguments."""
        arguments = self.arguments()
        if not self.is_built:
            return self.model, arguments
        return self.model(*arguments), arguments if self.given else ()

    def vectorized(self) -> tuple[Callable, tuple[Tensor, ...]]:
        """The model with batch dimensions carried through, with its arguments."""
        return (self.as_written()) if self.by_hand is None else (self.by_hand, self.arguments())


def product(X: Tensor, beta: Tensor) -> Tensor:
    """``X @ beta`` of every draw, where the last batch dimension of ``beta``, if it has any, is kept for the plate of the data.

    Arguments:
        X: Shape ``(N, D)``.
        beta: Shape ``(D,)`` or ``(…, 1, D)``.

    Returns:
        Shape ``(N,)`` or ``(…, N)``.
    """
    return (beta @ X.T).reshape(*beta.shape[:-2], len(X))
