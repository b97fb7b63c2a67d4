r"""Recipes: functions that stack transforms into a flow.

A recipe is a function ``recipe(dim, *, num_layers, hidden_dims, context_dim=0, **options) -> FlowTransform`` that returns a
stack which starts as the identity. Any function of that shape can be given to a guide. The options that a recipe does not
name go to each of its layers.

Affine layers leave a normal law of a single coordinate normal. So for D = 1 the recipes ``coupling``, ``glow``, ``iaf``, ``maf``
and ``nice`` begin with a spline of that coordinate (:class:`~pyro_flowguides.transforms.ElementwiseSpline`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from . import transforms as T
from .checks import check_positive_integer
from .image_flows import glow_image, realnvp_image


def coupling(
    dim: int,
    *,
    num_layers: int | None = None,
    hidden_dims: Sequence[int] | None = None,
    damped: bool = False,
    **options: Any,
) -> T.FlowTransform:
    """RealNVP: affine couplings that keep one half of the coordinates and the other in turn.

    Where D > 30, two couplings make a pair, and every pair has halves of its own (the coordinates are shuffled in between):
    with the same halves throughout, coordinates of one half would depend on each other through the other half alone.
    Invertible at the cost of a forward pass. Dinh et al. (2017), arXiv:1605.08803.

    Arguments:
        dim: The number D of coordinates.
        num_layers: The number of couplings; by default 10, 16 for D > 30, or 4 for D > 1000.
        hidden_dims: The hidden layers of each network; by default two of 32, or of 64 and 32 for 30 < D ≤ 1000.
        damped: Whether the couplings start damped, see :class:`~pyro_flowguides.transforms.Coupling`.
        options: As in :class:`~pyro_flowguides.transforms.AffineCoupling`: ``context_dim``, ``log_scale_bound``, …
    """
    many, very_many = dim > _MANY, dim > _VERY_MANY
    if num_layers is None:
        num_layers = 4 if very_many else 16 if many else 10
    if hidden_dims is None:
        hidden_dims = (64, 32) if many and not very_many else (32, 32)

    def layer(index: int) -> T.FlowTransform:
        return T.AffineCoupling(dim, flip=index % 2 == 1, hidden_dims=hidden_dims, damped=damped, **options)

    couplings = _layers("coupling", num_layers, layer)
    return _with_shuffles(couplings) if many else _bent(T.Compose(couplings), hidden_dims)


def spline_coupling(
    dim: int,
    *,
    num_layers: int = 4,
    hidden_dims: Sequence[int] | None = None,
    damped: bool = False,
    **options: Any,
) -> T.FlowTransform:
    """Neural spline flow: spline couplings that keep one half of the coordinates and the other in turn.

    Invertible at the cost of a forward pass. Durkan et al. (2019), arXiv:1906.04032.

    Arguments:
        dim: The number D of coordinates.
        num_layers: The number of couplings.
        hidden_dims: The hidden layers of each network; by default two of 32, or of 64 for D > 30.
        damped: Whether the couplings start damped, see :class:`~pyro_flowguides.transforms.Coupling`.
        options: As in :class:`~pyro_flowguides.transforms.SplineCoupling`: ``context_dim``, ``num_bins``, ``tail_bound``, …
    """
    hidden_dims = _default_hidden_dims(dim, hidden_dims)

    def layer(index: int) -> T.FlowTransform:
        return T.SplineCoupling(dim, flip=index % 2 == 1, hidden_dims=hidden_dims, damped=damped, **options)

    return T.Compose(_layers("spline_coupling", num_layers, layer))


def mixture_coupling(
    dim: int,
    *,
    num_layers: int = 4,
    hidden_dims: Sequence[int] | None = None,
    damped: bool = False,
    **options: Any,
) -> T.FlowTransform:
    """Flow++: mixture couplings that keep one half of the coordinates and the other in turn.

    As flexible as splines, without their box. A draw with its density costs one pass; the inverse solves a scalar
    equation for every coordinate of every layer, so that densities of given points want the other direction, ``.inv``.
    Ho et al. (2019), arXiv:1902.00275.

    Arguments:
        dim: The number D of coordinates.
        num_layers: The number of couplings.
        hidden_dims: The hidden layers of each network; by default two of 32, or of 64 for D > 30.
        damped: Whether the couplings start damped, see :class:`~pyro_flowguides.transforms.Coupling`.
        options: As in :class:`~pyro_flowguides.transforms.MixtureCoupling`: ``context_dim``, ``num_components``, …
    """
    hidden_dims = _default_hidden_dims(dim, hidden_dims)

    def layer(index: int) -> T.FlowTransform:
        return T.MixtureCoupling(dim, flip=index % 2 == 1, hidden_dims=hidden_dims, damped=damped, **options)

    return T.Compose(_layers("mixture_coupling", num_layers, layer))


def iaf(dim: int, *, num_layers: int = 3, hidden_dims: Sequence[int] | None = None, **options: Any) -> T.FlowTransform:
    """Inverse autoregressive flow: affine autoregressive layers, with the coordinates reversed between them.

    Sampling takes one pass per layer; the inverse takes D. Kingma et al. (2016), arXiv:1606.04934.

    Arguments:
        dim: The number D of coordinates.
        num_layers: The number of autoregressive layers.
        hidden_dims: The hidden layers of each network; by default two of 32, or of 64 for D > 30.
        options: As in :class:`~pyro_flowguides.transforms.AffineAutoregressive`: ``context_dim``, ``log_scale_bound``, …
    """
    options["hidden_dims"] = _default_hidden_dims(dim, hidden_dims)
    flow = _with_reverses(_layers("iaf", num_layers, lambda _: T.AffineAutoregressive(dim, **options)))
    return _bent(flow, options["hidden_dims"])


def maf(dim: int, *, num_layers: int = 3, hidden_dims: Sequence[int] | None = None, **options: Any) -> T.FlowTransform:
    """Masked autoregressive flow: the inverse direction of the layers of :func:`iaf`.

    The density of a given point takes one pass per layer, a draw D passes: for variational inference :func:`iaf` is the
    cheaper of the two by far. Papamakarios et al. (2017), arXiv:1705.07057.

    Arguments:
        dim: The number D of coordinates.
        num_layers: The number of autoregressive layers.
        hidden_dims: The hidden layers of each network; by default two of 32, or of 64 for D > 30.
        options: As in :class:`~pyro_flowguides.transforms.AffineAutoregressive`: ``context_dim``, ``log_scale_bound``, …
    """
    options["hidden_dims"] = _default_hidden_dims(dim, hidden_dims)
    flow = _with_reverses(_layers("maf", num_layers, lambda _: T.Inverse(T.AffineAutoregressive(dim, **options))))
    return _bent(flow, options["hidden_dims"])


def spline_autoregressive(
    dim: int, *, num_layers: int = 3, hidden_dims: Sequence[int] | None = None, **options: Any
) -> T.FlowTransform:
    """Autoregressive neural spline flow, with the order of the coordinates reversed between its layers.

    Sampling takes one pass per layer; the inverse takes D. Durkan et al. (2019), arXiv:1906.04032.

    Arguments:
        dim: The number D of coordinates.
        num_layers: The number of autoregressive layers.
        hidden_dims: The hidden layers of each network; by default two of 32, or of 64 for D > 30.
        options: As in :class:`~pyro_flowguides.transforms.SplineAutoregressive`: ``context_dim``, ``num_bins``,
            ``tail_bound``, …
    """
    options["hidden_dims"] = _default_hidden_dims(dim, hidden_dims)
    return _with_reverses(
        _layers("spline_autoregressive", num_layers, lambda _: T.SplineAutoregressive(dim, **options))
    )


def planar(dim: int, *, num_layers: int = 16, **options: Any) -> T.FlowTransform:
    """A stack of planar flows. Rezende & Mohamed (2015), arXiv:1505.05770.

    Arguments:
        dim: The number D of coordinates.
        num_layers: The number of planar layers; each bends space along one direction, so that many are needed.
        options: As in :class:`~pyro_flowguides.transforms.Planar`: ``context_dim``, ``hidden_dims``.
    """
    return T.Compose(_layers("planar", num_layers, lambda _: T.Planar(dim, **options)))


def radial(dim: int, *, num_layers: int = 16, **options: Any) -> T.FlowTransform:
    """A stack of radial flows. Rezende & Mohamed (2015), arXiv:1505.05770.

    Arguments:
        dim: The number D of coordinates.
        num_layers: The number of radial layers; each draws space to one centre, or pushes it away.
        options: As in :class:`~pyro_flowguides.transforms.Radial`: ``context_dim``, ``hidden_dims``.
    """
    return T.Compose(_layers("radial", num_layers, lambda _: T.Radial(dim, **options)))


def sylvester(
    dim: int, *, num_layers: int = 8, num_vectors: int = 8, basis: str = "qr", **options: Any
) -> T.FlowTransform:
    """A stack of Sylvester flows. van den Berg et al. (2018), arXiv:1803.05649.

    Arguments:
        dim: The number D of coordinates.
        num_layers: The number of Sylvester layers.
        num_vectors: The number M of directions that each layer bends; D where that is less. Not used by ``"triangular"``,
            which bends all.
        basis: ``"qr"``, ``"householder"`` or ``"triangular"``, whose layers keep and reverse the coordinates in turn.
        options: As in :class:`~pyro_flowguides.transforms.Sylvester`: ``context_dim``, ``hidden_dims``, …
    """
    check_positive_integer("sylvester", "num_vectors", num_vectors)
    triangular = basis == "triangular"

    def layer(index: int) -> T.FlowTransform:
        size = None if triangular else min(num_vectors, dim)
        return T.Sylvester(dim, size, basis=basis, reverse=triangular and index % 2 == 1, **options)

    return T.Compose(_layers("sylvester", num_layers, layer))


def nice(
    dim: int,
    *,
    num_layers: int = 6,
    hidden_dims: Sequence[int] | None = None,
    context_dim: int = 0,
    damped: bool = False,
    **options: Any,
) -> T.FlowTransform:
    """NICE: additive couplings that change one half of the coordinates and the other in turn, then a scale for each.

    The couplings preserve volume; all change of volume comes from the final elementwise affine map. Invertible at the
    cost of a forward pass. Dinh et al. (2015), *NICE: non-linear independent components estimation*, arXiv:1410.8516.

    Arguments:
        dim: The number D of coordinates.
        num_layers: The number of couplings.
        hidden_dims: The hidden layers of each network; by default two of 32, or of 64 for D > 30.
        context_dim: The size of the context; 0 for none.
        damped: Whether the couplings start damped, see :class:`~pyro_flowguides.transforms.Coupling`.
        options: Of the couplings, as in :class:`~pyro_flowguides.transforms.AdditiveCoupling`.
    """
    shared: dict[str, Any] = {"context_dim": context_dim, "hidden_dims": _default_hidden_dims(dim, hidden_dims)}

    def layer(index: int) -> T.FlowTransform:
        return T.AdditiveCoupling(dim, flip=index % 2 == 1, damped=damped, **shared, **options)

    return _bent(T.Compose([*_layers("nice", num_layers, layer), T.Affine(dim, **shared)]), shared["hidden_dims"])


def glow(
    dim: int,
    *,
    num_layers: int = 4,
    hidden_dims: Sequence[int] | None = None,
    context_dim: int = 0,
    damped: bool = False,
    **options: Any,
) -> T.FlowTransform:
    """Glow for vectors: steps of a scale for each coordinate, a trainable linear map and an affine coupling.

    The linear maps take the place of the permutations between couplings. All parts start as the identity, which on base
    draws is what an initialisation of the scales from draws would give. Invertible at the cost of a forward pass.
    Kingma & Dhariwal (2018), *Glow: generative flow with invertible 1×1 convolutions*, arXiv:1807.03039.

    Arguments:
        dim: The number D of coordinates.
        num_layers: The number of steps.
        hidden_dims: The hidden layers of each network; by default two of 32, or of 64 for D > 30.
        context_dim: The size of the context; 0 for none.
        damped: Whether the couplings start damped, see :class:`~pyro_flowguides.transforms.Coupling`.
        options: Of the couplings, as in :class:`~pyro_flowguides.transforms.AffineCoupling`: ``log_scale_bound``, …
    """
    shared: dict[str, Any] = {"context_dim": context_dim, "hidden_dims": _default_hidden_dims(dim, hidden_dims)}

    def step(index: int) -> list[T.FlowTransform]:
        scale, mix = T.ActNorm(dim, **shared), T.LULinear(dim, **shared)
        return [scale, mix, T.AffineCoupling(dim, flip=index % 2 == 1, damped=damped, **shared, **options)]

    flow = T.Compose(part for parts in _layers("glow", num_layers, step) for part in parts)
    return _bent(flow, shared["hidden_dims"])


def residual(dim: int, *, num_layers: int = 8, **options: Any) -> T.FlowTransform:
    """A stack of residual flows. Chen et al. (2019), *Residual flows for invertible generative modeling*,
    arXiv:1906.02735.

    One layer stretches at most by 1 + L and shrinks at most by 1 − L, so that several are needed. Always invertible;
    the inverse costs some tens of forward passes.

    Arguments:
        dim: The number D of coordinates.
        num_layers: The number of residual layers.
        options: As in :class:`~pyro_flowguides.transforms.Residual`: ``context_dim``, ``hidden_dims``, ``lipschitz`` for L,
            ``log_det``, …
    """
    return T.Compose(_layers("residual", num_layers, lambda _: T.Residual(dim, **options)))


def continuous_planar(
    dim: int,
    *,
    num_layers: int = 1,
    num_units: int = 32,
    context_dim: int = 0,
    hidden_dims: Sequence[int] = (32, 32),
    **options: Any,
) -> T.FlowTransform:
    """A planar flow in continuous time. Chen et al. (2018), *Neural ordinary differential equations*, arXiv:1806.07366.

    Arguments:
        dim: The number D of coordinates.
        num_layers: The number of flows, one after the other, each with a field of its own.
        num_units: The number M of ridges of a field.
        context_dim: The size of the context; 0 for none.
        hidden_dims: The hidden layers of the network of the context.
        options: As in :class:`~pyro_flowguides.transforms.Continuous`: ``num_steps``, ``solver``, and the regularisation
            ``kinetic`` and ``jacobian``.
    """

    def layer(_: int) -> T.FlowTransform:
        field = T.PlanarField(dim, num_units, context_dim=context_dim, hidden_dims=hidden_dims)
        return T.Continuous(dim, field, **options)

    return T.Compose(_layers("continuous_planar", num_layers, layer))


def continuous_sylvester(
    dim: int,
    *,
    num_layers: int = 1,
    num_units: int = 32,
    context_dim: int = 0,
    hidden_dims: Sequence[int] = (32, 32),
    **options: Any,
) -> T.FlowTransform:
    """A Sylvester flow in continuous time: the ridges share a subspace, see :class:`~pyro_flowguides.transforms.SylvesterField`.

    Arguments:
        dim: The number D of coordinates.
        num_layers: The number of flows, one after the other, each with a field of its own.
        num_units: The number M of dimensions of the subspace; D where that is less.
        context_dim: The size of the context; 0 for none.
        hidden_dims: The hidden layers of the network of the context.
        options: As in :class:`~pyro_flowguides.transforms.Continuous`: ``num_steps``, ``solver``, and the regularisation
            ``kinetic`` and ``jacobian``.
    """
    check_positive_integer("continuous_sylvester", "num_units", num_units)

    def layer(_: int) -> T.FlowTransform:
        field = T.SylvesterField(dim, min(num_units, dim), context_dim=context_dim, hidden_dims=hidden_dims)
        return T.Continuous(dim, field, **options)

    return T.Compose(_layers("continuous_sylvester", num_layers, layer))


def ffjord(
    dim: int, *, num_layers: int = 1, hidden_dims: Sequence[int] | None = None, context_dim: int = 0, **options: Any
) -> T.FlowTransform:
    """FFJORD: the flow of a network of the point and the time. Grathwohl et al. (2019), arXiv:1810.01367.

    Arguments:
        dim: The number D of coordinates.
        num_layers: The number of flows, one after the other, each with a network of its own.
        hidden_dims: The hidden layers of each network; by default two of 32, or of 64 for D > 30.
        context_dim: The size of the context; 0 for none.
        options: As in :class:`~pyro_flowguides.transforms.Continuous`: ``trace`` (``"exact"`` by default), ``num_steps``,
            ``solver``, and the regularisation ``kinetic`` and ``jacobian``.
    """
    hidden_dims = _default_hidden_dims(dim, hidden_dims)

    def layer(_: int) -> T.FlowTransform:
        return T.Continuous(dim, T.NetworkField(dim, hidden_dims, context_dim=context_dim), **options)

    return T.Compose(_layers("ffjord", num_layers, layer))


# Every recipe by its name: what a guide accepts as a string.
RECIPES: dict[str, Callable[..., T.FlowTransform]] = {
    "continuous_planar": continuous_planar,
    "continuous_sylvester": continuous_sylvester,
    "coupling": coupling,
    "ffjord": ffjord,
    "glow": glow,
    "iaf": iaf,
    "maf": maf,
    "mixture_coupling": mixture_coupling,
    "nice": nice,
    "planar": planar,
    "radial": radial,
    "residual": residual,
    "spline_autoregressive": spline_autoregressive,
    "spline_coupling": spline_coupling,
    "sylvester": sylvester,
}

# The recipes that need the shape of an image besides, so that a name alone does not do.
IMAGE_RECIPES: dict[str, Callable[..., T.FlowTransform]] = {"glow_image": glow_image, "realnvp_image": realnvp_image}


# Above these numbers of coordinates the defaults change: first for more of them to meet, then for what a step costs.
_MANY, _VERY_MANY = 30, 1000


def _layers(recipe: str, num_layers: int, make: Callable[[int], Any]) -> list[Any]:
    return [make(index) for index in range(check_positive_integer(recipe, "num_layers", num_layers))]


def _default_hidden_dims(dim: int, hidden_dims: Sequence[int] | None) -> Sequence[int]:
    if hidden_dims is not None:
        return hidden_dims
    return (64, 64) if dim > _MANY else (32, 32)


def _bent(flow: T.Compose, hidden_dims: Sequence[int]) -> T.Compose:
    """The flow; for a single coordinate with a spline before it, since affine layers alone leave a normal law normal."""
    if flow.dim > 1:
        return flow
    return T.Compose([T.ElementwiseSpline(1, context_dim=flow.context_dim, hidden_dims=hidden_dims), *flow.transforms])


def _with_shuffles(couplings: Sequence[T.FlowTransform]) -> T.Compose:
    """The couplings in pairs, with the coordinates dealt into two halves between them, every second one to the first."""
    dim = couplings[0].dim
    dealt = torch.cat([torch.arange(0, dim, 2), torch.arange(1, dim, 2)])
    transforms: list[T.FlowTransform] = []
    order = torch.arange(dim)
    for index, coupling in enumerate(couplings):
        if index and index % 2 == 0:
            transforms.append(T.Permutation(dealt))
            order = order[dealt]
        transforms.append(coupling)
    # What all shuffles together have moved goes back beforehand, so that the start is the identity.
    return T.Compose([T.Permutation(order.argsort()), *transforms])


def _with_reverses(layers: Iterable[T.FlowTransform]) -> T.Compose:
    """The layers with a reversal of the coordinates between them, and one at the end where it restores their order."""
    transforms: list[T.FlowTransform] = []
    for layer in layers:
        transforms += [layer, T.Reverse(layer.dim)]
    # Only an even number of reversals leaves the start the identity.
    return T.Compose(transforms if len(transforms) % 4 == 0 else transforms[:-1])
