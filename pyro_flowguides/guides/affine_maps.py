"""The trainable maps of a guide beside its flow: an affine map, by its name, and in many dimensions a spline for each latent."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .. import transforms as T
from ..transforms.fixed import Scale, standard_deviations

# None is for no map.
MAPS: dict[str | None, list[Callable[[int], T.FlowTransform]]] = {
    "lower_triangular": [T.LowerTriangularAffine],
    "low_rank": [T.LowRankAffine],
    "diagonal": [T.Affine],
    None: [],
}
# Above this size the latents get splines of their own.
MAX_PLAIN_DIM = 200
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


def make_marginals(name: str | None, loc: Tensor, scale: Tensor) -> list[T.FlowTransform]:
    """A spline for each latent, in units of its standard deviation, for ``"auto"`` in many dimensions; or none.

    The networks of a flow mix whitened coordinates, and do not see which combination of hundreds of them is one latent. The
    splines do, at O(D).
    """
    dim = len(loc)
    if name != "auto" or dim <= MAX_PLAIN_DIM:
        return []
    return [T.Standardized(T.ElementwiseSpline(dim), loc, scale)]


def fixed_map_of(flow: T.Compose) -> T.FixedAffine:
    """The fixed affine map, the last part of the flow of a guide but for the splines of the latents."""
    found = [part for part in flow.transforms if isinstance(part, T.FixedAffine)]
    return found[-1]


def put(flow: T.Compose, loc: Tensor, scale: Scale) -> None:
    """Gives the fixed map of a flow another location and scale, and the splines of the latents the units of it."""
    fixed_map_of(flow).put(loc, scale)
    for part in flow.transforms:
        if isinstance(part, T.Standardized):
            part.put(loc, standard_deviations(scale))
