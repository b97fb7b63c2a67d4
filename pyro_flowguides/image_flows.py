r"""Recipes for latents that are images or fields on a grid: multi-scale flows of convolutional couplings.

They take the shape (channels, height, width) besides the dimension, so that a guide gets them with the shape bound::

    AutoFlow(model, functools.partial(flows.glow_image, shape=(1, 40, 40)))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from . import transforms as T
from .checks import check_positive_integer
from .transforms.multiscale import check_image_shape
from .transforms.univariate import Univariate


def glow_image(
    dim: int,
    *,
    shape: Sequence[int],
    num_levels: int = 2,
    num_steps: int = 4,
    hidden_channels: int = 32,
    univariate: Univariate | None = None,
    context_dim: int = 0,
    damped: bool = False,
) -> T.FlowTransform:
    """Glow: levels of steps of a scale for each channel, an invertible 1×1 convolution and a coupling of the channels.

    A level takes blocks of 2 × 2 pixels for the channels of one pixel. It begins with the coarser level's image, which is half
    of its channels, and joins base draws as the other half. All parts start as the identity. Invertible at the cost of a
    forward pass. Kingma & Dhariwal (2018), *Glow: generative flow with invertible 1×1 convolutions*, arXiv:1807.03039.

    Arguments:
        dim: The number of coordinates, C·H·W.
        shape: The shape (C, H, W) of the image. H and W must be multiples of ``2**num_levels``.
        num_levels: The number of levels; the coarsest has images of height ``H / 2**num_levels``.
        num_steps: The number of steps of each level.
        hidden_channels: The channels of the hidden layers of each network.
        univariate: The scalar function of the couplings, of :mod:`pyro_flowguides.transforms.univariate`; by default the
            affine one.
        context_dim: The size of the context; 0 for none.
        damped: Whether the couplings start damped, see :class:`~pyro_flowguides.transforms.Coupling`.

    Raises:
        ValueError: if the shape does not have ``dim`` numbers, or cannot be halved ``num_levels`` times.
    """
    image = _check_shape("glow_image", dim, shape, check_positive_integer("glow_image", "num_levels", num_levels))
    check_positive_integer("glow_image", "num_steps", num_steps)
    couple = _couplings(hidden_channels, univariate, context_dim, damped)

    def step(squeezed: Sequence[int], index: int) -> list[T.FlowTransform]:
        scale = T.ImageActNorm(squeezed, context_dim=context_dim)
        mix = T.InvertibleConvolution(squeezed, context_dim=context_dim)
        return [scale, mix, couple(squeezed, "channel", index)]

    levels = []
    for _ in range(num_levels):
        squeezed = T.Squeeze(image).squeezed_shape
        steps = [part for index in range(num_steps) for part in step(squeezed, index)]
        levels.append([*steps, T.Unsqueeze(image)])
        image = _half_of_the_channels(squeezed)
    return _multiscale(levels)


def realnvp_image(
    dim: int,
    *,
    shape: Sequence[int],
    num_levels: int = 2,
    num_steps: int = 4,
    hidden_channels: int = 32,
    univariate: Univariate | None = None,
    context_dim: int = 0,
    damped: bool = False,
) -> T.FlowTransform:
    """Multi-scale RealNVP: couplings on a checkerboard, and couplings of the channels of 2 × 2 blocks of pixels.

    The coarsest level has couplings on a checkerboard alone, so that with one level any height and width will do. Every other
    level joins base draws to the coarser level's image as the second half of its channels, and couples first the channels,
    then the pixels on a checkerboard. There is no batch normalisation. Invertible at the cost of a forward pass. Dinh et al.
    (2017), *Density estimation using Real NVP*, arXiv:1605.08803.

    Arguments:
        dim: The number of coordinates, C·H·W.
        shape: The shape (C, H, W) of the image. H and W must be multiples of ``2**(num_levels - 1)``.
        num_levels: The number of levels.
        num_steps: The number of couplings of each kind in a level.
        hidden_channels: The channels of the hidden layers of each network.
        univariate: The scalar function of the couplings, of :mod:`pyro_flowguides.transforms.univariate`; by default the
            affine one.
        context_dim: The size of the context; 0 for none.
        damped: Whether the couplings start damped, see :class:`~pyro_flowguides.transforms.Coupling`.

    Raises:
        ValueError: if the shape does not have ``dim`` numbers, or cannot be halved often enough.
    """
    check_positive_integer("realnvp_image", "num_levels", num_levels)
    image = _check_shape("realnvp_image", dim, shape, num_levels - 1)
    check_positive_integer("realnvp_image", "num_steps", num_steps)
    couple = _couplings(hidden_channels, univariate, context_dim, damped)
    levels = []
    for level in range(num_levels):
        parts: list[T.FlowTransform] = []
        if level < num_levels - 1:
            squeezed = T.Squeeze(image).squeezed_shape
            parts = [*(couple(squeezed, "channel", index) for index in range(num_steps)), T.Unsqueeze(image)]
        levels.append([*parts, *(couple(image, "checkerboard", index) for index in range(num_steps))])
        if level < num_levels - 1:
            image = _half_of_the_channels(squeezed)
    return _multiscale(levels)


def _couplings(
    hidden_channels: int, univariate: Univariate | None, context_dim: int, damped: bool
) -> Callable[[Sequence[int], str, int], T.FlowTransform]:
    def couple(shape: Sequence[int], mask: str, index: int) -> T.FlowTransform:
        return T.ImageCoupling(
            shape,
            univariate,
            mask=mask,
            flip=index % 2 == 1,
            hidden_channels=hidden_channels,
            context_dim=context_dim,
            damped=damped,
        )

    return couple


def _check_shape(recipe: str, dim: int, shape: Sequence[int], num_halvings: int) -> tuple[int, int, int]:
    channels, height, width = check_image_shape(recipe, shape)
    if channels * height * width != dim:
        raise ValueError(
            f"{recipe}: the shape {(channels, height, width)} has {math.prod(shape)} numbers, but dim = {dim}; a guide's flow "
            "is over all latents of the model, and other latents need a guide of their own (AutoGuideList)"
        )
    factor = 2**num_halvings
    if height % factor or width % factor:
        raise ValueError(
            f"{recipe}: height and width must be multiples of {factor} to be halved {num_halvings} times, got shape "
            f"{(channels, height, width)}; use fewer levels, or a grid in the model with some rows and columns more"
        )
    return channels, height, width


def _half_of_the_channels(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    channels, height, width = shape
    return channels // 2, height, width


def _multiscale(levels: Sequence[Sequence[T.FlowTransform]]) -> T.Compose:
    """The levels, finest first, of a half, a quarter, … of the coordinates, in the order in which a draw passes them."""
    dim = levels[0][0].dim
    order = torch.arange(dim)
    transforms: list[T.FlowTransform] = []
    for parts in reversed(levels):
        level = T.Compose(parts)
        for part in parts:
            if isinstance(part, T.Permutation):
                order[: level.dim] = order[: level.dim][part.permutation]
        transforms.append(level if level.dim == dim else T.Split(dim, level))
    # A base draw is an image too: what the levels reorder goes back beforehand, so that the start is the identity.
    return T.Compose([T.Permutation(order.argsort()), *transforms])
