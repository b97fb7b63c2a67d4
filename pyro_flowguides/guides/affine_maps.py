"""The trainable affine map of a guide, by its name."""

from __future__ import annotations

from collections.abc import Callable

from .. import transforms as T

# None is for no map.
MAPS: dict[str | None, list[Callable[[int], T.FlowTransform]]] = {
    "lower_triangular": [T.LowerTriangularAffine],
    "low_rank": [T.LowRankAffine],
    "diagonal": [T.Affine],
    None: [],
}
# A triangular map has D² parameters; above this size it would cost more than the networks of a flow.
MAX_TRIANGULAR_DIM = 1000


def check(owner: str, name: str | None) -> None:
    """Raises ValueError, which begins with the owner, if there is no such map."""
    if name not in ("auto", *MAPS):
        raise ValueError(
            f'{owner}: affine must be "auto", "lower_triangular", "low_rank", "diagonal" or None, got {name!r}'
        )


def make(name: str | None, dim: int) -> list[T.FlowTransform]:
    """The map of this name, or none; ``"auto"`` is the cheaper one where there are many dimensions."""
    if name == "auto":
        name = "lower_triangular" if dim <= MAX_TRIANGULAR_DIM else "low_rank"
    return [make_map(dim) for make_map in MAPS[name]]
