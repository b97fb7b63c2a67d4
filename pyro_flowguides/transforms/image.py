r"""Transforms of images: couplings with convolutional networks, and maps of the channels that all pixels share.

An image of shape (C, H, W) is the vector of its D = C·H·W numbers, channel by channel and row by row, so that these are
transforms of :math:`\mathbb{R}^D` like all others. A grid of latents is an image of one channel. Kingma & Dhariwal (2018),
*Glow: generative flow with invertible 1×1 convolutions*, arXiv:1807.03039; Dinh et al. (2017), *Density estimation using
Real NVP*, arXiv:1605.08803.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import FlowTransform
from .coupling import Coupling
from .elementwise import ActNorm
from .linear import LULinear
from .multiscale import check_image_shape
from .networks import ConvNet
from .univariate import ShiftScale, Univariate


class Pixelwise(FlowTransform):
    r"""A transform f of the C channels, applied to every pixel with the same parameters.

    .. math:: x_{\cdot hw} = f(z_{\cdot hw}), \qquad \log|\det J| = \sum_{h, w} \log|\det J_f(z_{\cdot hw})|.

    Invertible whenever f is; the cost is that of f at H·W points.

    Arguments:
        shape: The shape (C, H, W) of the image.
        transform: The transform f, with ``dim`` = C.

    Raises:
        ValueError: if ``transform.dim`` is not the number of channels.
    """

    def __init__(self, shape: Sequence[int], transform: FlowTransform) -> None:
        name = type(self).__name__
        channels, height, width = check_image_shape(name, shape)
        super().__init__(channels * height * width, transform.context_dim)
        if transform.dim != channels:
            raise ValueError(f"{name}: the transform has dim = {transform.dim}, but the image {channels} channels")
        self.shape = (channels, height, width)
        self.transform = transform

    @property
    def closed_inverse(self) -> bool:
        return self.transform.closed_inverse

    @property
    def stochastic_log_det(self) -> bool:
        return self.transform.stochastic_log_det

    def _pixels(self, value: Tensor) -> Tensor:
        """The channels of every pixel, shape ``batch_shape + (H·W, C)``."""
        return value.reshape(*value.shape[:-1], self.shape[0], -1).mT

    def _at_every_pixel(self, method: Callable, context: Tensor | None, *values: Tensor) -> Any:
        context = None if context is None else context.unsqueeze(-2)
        value, log_det, *score = method(*(self._pixels(value) for value in values), context)
        return value.mT.flatten(-2), log_det.sum(-1), *(part.mT.flatten(-2) for part in score)

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._at_every_pixel(self.transform.forward_and_log_det, context, z)

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._at_every_pixel(self.transform.inverse_and_log_det, context, x)

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._at_every_pixel(self.transform.forward_with_score, context, z, score.expand_as(z))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shape={self.shape}"


class InvertibleConvolution(Pixelwise):
    r"""Glow's invertible 1×1 convolution: one affine map :math:`x = LUz + t` of the channels, the same at every pixel.

    .. math:: \log|\det J| = H W \sum_i d_i

    with L, U and d of :class:`LULinear`, whose diagonal is positive: always invertible, and it starts as the identity. O(C²)
    per pixel in both directions. Kingma & Dhariwal (2018), arXiv:1807.03039.

    Arguments:
        shape: The shape (C, H, W) of the image.
        options: As in :class:`LULinear`: ``context_dim``, ``hidden_dims``.
    """

    def __init__(self, shape: Sequence[int], **options: Any) -> None:
        channels, _, _ = check_image_shape(type(self).__name__, shape)
        super().__init__(shape, LULinear(channels, **options))


class ImageActNorm(Pixelwise):
    r"""A location and a scale for every channel, :math:`x = e^{s} z + t`, that can be set from draws.

    It starts as the identity, as :class:`ActNorm` does. Kingma & Dhariwal (2018), arXiv:1807.03039.

    Arguments:
        shape: The shape (C, H, W) of the image.
        options: As in :class:`ActNorm`: ``context_dim``, ``hidden_dims``.
    """

    transform: ActNorm

    def __init__(self, shape: Sequence[int], **options: Any) -> None:
        channels, _, _ = check_image_shape(type(self).__name__, shape)
        super().__init__(shape, ActNorm(channels, **options))

    def initialize(self, z: Tensor) -> None:
        """Sets scale and location from draws that reach this transform, so that every channel has mean 0 and sd 1.

        Arguments:
            z: Draws, shape ``(…, dim)``.

        Raises:
            ValueError: if the shape is wrong, there are fewer than two pixels in all, or a channel does not vary.
        """
        if z.dim() == 0 or z.shape[-1] != self.dim:
            raise ValueError(f"ImageActNorm: expected draws of shape (…, {self.dim}), got {tuple(z.shape)}")
        self.transform.initialize(self._pixels(z))


class ImageCoupling(Coupling):
    r"""A coupling of an image: a convolutional network of the kept part decides how the other part is transformed.

    The maths of :class:`Coupling`, with a network of a 3 × 3, a 1 × 1 and a 3 × 3 convolution, as in Glow. Its cost per point
    is O(H·W·h·(9C·P + h)) for h hidden channels and P parameters per coordinate. The kept part is

    - ``"channel"``: the first half of the channels at every pixel;
    - ``"checkerboard"``: all channels of every second pixel, as the fields of one colour on a chess board. The network sees
      the image with zeros on the other fields.

    A single channel has no half to keep; :class:`Squeeze` makes four of it. For D = 1 the parameters are free.

    Arguments:
        shape: The shape (C, H, W) of the image.
        univariate: The scalar function; by default the affine function of RealNVP and Glow, with log-scales bounded by 3.
        mask: ``"channel"`` or ``"checkerboard"``.
        flip: Keep the others instead.
        hidden_channels: The channels of the two hidden layers.
        activation: Makes the activation module of the network.
        context_dim: The size of the context, added to the first hidden layer by a linear map; 0 for none.
        damped: Whether the coupling starts damped, see :class:`Coupling`.

    Raises:
        ValueError: if the mask is unknown, or leaves nothing to keep or to change.

    Example:
        >>> coupling = ImageCoupling((4, 8, 8), mask="channel")
        >>> x, log_det = coupling.forward_and_log_det(torch.zeros(10, 256))
        >>> log_det.shape
        torch.Size([10])
    """

    def __init__(
        self,
        shape: Sequence[int],
        univariate: Univariate | None = None,
        *,
        mask: str = "channel",
        flip: bool = False,
        hidden_channels: int = 32,
        activation: Callable[[], nn.Module] = nn.SiLU,
        context_dim: int = 0,
        damped: bool = False,
    ) -> None:
        shape = check_image_shape("ImageCoupling", shape)
        if mask not in ("channel", "checkerboard"):
            raise ValueError(f'ImageCoupling: mask must be "channel" or "checkerboard", got {mask!r}')
        univariate = ShiftScale() if univariate is None else univariate
        dim = math.prod(shape)
        kept = channel_mask(shape) if mask == "channel" else checkerboard_mask(shape)
        network = None
        if dim > 1:
            if kept.all() or not kept.any():
                raise ValueError(f"ImageCoupling: a {mask} mask cannot part an image of shape {shape} in two")
            kept = kept ^ flip
            network = _ImageNetwork(
                shape, kept, univariate.num_parameters, hidden_channels, activation, context_dim, damped
            )
        super().__init__(dim, univariate, mask=kept, context_dim=context_dim, damped=damped, conditioner=network)
        self.shape = shape

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shape={self.shape}"


def channel_mask(shape: Sequence[int]) -> Tensor:
    """The boolean vector of shape (D,) that is True on the first half of the channels, rounded down.

    Arguments:
        shape: The shape (C, H, W) of the image.
    """
    channels, height, width = check_image_shape("channel_mask", shape)
    return (torch.arange(channels) < channels // 2).repeat_interleave(height * width)


def checkerboard_mask(shape: Sequence[int]) -> Tensor:
    """The boolean vector of shape (D,) that is True where row and column of a pixel add to an odd number.

    Arguments:
        shape: The shape (C, H, W) of the image.
    """
    channels, height, width = check_image_shape("checkerboard_mask", shape)
    odd = (torch.arange(height).unsqueeze(-1) + torch.arange(width)) % 2 == 1
    return odd.flatten().repeat(channels)


class _ImageNetwork(nn.Module):
    """From the kept numbers, and a context after them, to the parameters of the others: those of a kind side by side."""

    place: Tensor
    changed: Tensor

    def __init__(
        self,
        shape: tuple[int, int, int],
        kept: Tensor,
        num_parameters: int,
        hidden_channels: int,
        activation: Callable[[], nn.Module],
        context_dim: int,
        damped: bool,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.num_kept = int(kept.sum())
        self.num_parameters = num_parameters
        pixels = shape[1] * shape[2]
        # Whole channels are images of their own; of other masks the network sees, and answers, the full image.
        self.whole_channels = bool((kept.reshape(shape) == kept.reshape(shape)[:, :1, :1]).all())
        kept_channels = self.num_kept // pixels if self.whole_channels else shape[0]
        changed_channels = shape[0] - kept_channels if self.whole_channels else shape[0]
        self.register_buffer("changed", (~kept).nonzero().squeeze(-1))
        self.register_buffer("place", torch.cat([kept.nonzero().squeeze(-1), self.changed]).argsort())
        self.network = ConvNet(
            kept_channels, num_parameters * changed_channels, hidden_channels, activation, context_dim, damped
        )

    def forward(self, inputs: Tensor) -> Tensor:
        image, context = inputs[..., : self.num_kept], inputs[..., self.num_kept :]
        if not self.whole_channels:
            zeros = image.new_zeros(()).expand(*image.shape[:-1], len(self.changed))
            image = torch.cat([image, zeros], -1).index_select(-1, self.place)
        outputs = self.network(image.reshape(*image.shape[:-1], -1, *self.shape[1:]), context)
        if self.whole_channels:
            return outputs.flatten(-3)
        outputs = outputs.reshape(*outputs.shape[:-3], self.num_parameters, -1)
        return outputs.index_select(-1, self.changed).flatten(-2)
