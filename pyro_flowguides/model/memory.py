"""How many draws a pass may take, so that its memory is bounded whatever the size of the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .recording import LargestTensor

# The number of elements that the largest tensor of a pass may have: 16 MB in float32.
MAX_ELEMENTS = 2**22


def elements_per_draw(run: Callable[[int], Any]) -> int:
    """The number of elements that a draw adds to the largest tensor of a pass.

    Two draws are compared with three, operation by operation: what does not depend on the draws does not count.

    Arguments:
        run: A pass over a number of draws.
    """
    sizes = []
    for number in (2, 3):
        with LargestTensor() as seen:
            run(number)
        sizes.append(seen.sizes)
    two, three = sizes
    if len(two) == len(three):
        return max([1, *[more - fewer for fewer, more in zip(two, three, strict=True)]])
    # Every draw is a run of its own.
    return max(1, *two)


def draws_at_once(elements: int) -> int:
    """The number of draws that fit into a pass, given what each of them adds to its largest tensor."""
    return max(1, MAX_ELEMENTS // elements)
