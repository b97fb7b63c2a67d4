r"""Multi-scale flows: coarser images by reordering, and parts of the vector that are finished before the others.

A multi-scale flow draws a coarse image first. It then joins further draws to it, level by level, and each level transforms
all that is there so far. Here a level is one bijection of the full vector: :class:`Split` transforms the first coordinates
and passes the others, and log-determinant, inverse and score are those of the part. Dinh et al. (2017), *Density estimation
using Real NVP*, arXiv:1605.08803.

An image of C channels, H rows and W columns is the vector of its D = C·H·W numbers, channel by channel and row by row. So the
first coordinates of a vector are the first channels of its image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_positive_integer
from .base import FlowTransform
from .linear import Permutation


class Split(FlowTransform):
    r"""A transform of the first coordinates; the others pass unchanged.

    .. math:: x_{\le n} = f(z_{\le n}), \qquad x_{> n} = z_{> n}, \qquad \log|\det J| = \log|\det J_f|,

    with n = ``transform.dim``. Invertible whenever f is; the cost is that of f. In a multi-scale flow the coordinates that pass
    are those that f's coarser level has not joined yet.

    Arguments:
        dim: The number D of coordinates.
        transform: The transform f of the first coordinates.

    Raises:
        ValueError: if f has more than D coordinates.

    Example:
        >>> from pyro_flowguides.transforms import Reverse
        >>> Split(4, Reverse(2))(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([2., 1., 3., 4.])
    """

    def __init__(self, dim: int, transform: FlowTransform) -> None:
        super().__init__(dim, transform.context_dim)
        if transform.dim > dim:
            raise ValueError(f"Split: the transform has dim = {transform.dim}, more than dim = {dim}")
        self.transform = transform

    @property
    def closed_inverse(self) -> bool:
        return self.transform.closed_inverse

    @property
    def stochastic_log_det(self) -> bool:
        return self.transform.stochastic_log_det

    def _parts(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return value[..., : self.transform.dim], value[..., self.transform.dim :]

    def forward_and_log_det(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first, rest = self._parts(z)
        first, log_det = self.transform.forward_and_log_det(first, context)
        return torch.cat([first, rest], -1), log_det

    def inverse_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first, rest = self._parts(x)
        first, log_det = self.transform.inverse_and_log_det(first, context)
        return torch.cat([first, rest], -1), log_det

    def forward_with_score(
        self, z: Tensor, score: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        first, rest = self._parts(z)
        score_first, score_rest = self._parts(score.expand_as(z))
        first, log_det, score_first = self.transform.forward_with_score(first, score_first, context)
        return torch.cat([first, rest], -1), log_det, torch.cat([score_first, score_rest.detach()], -1)


class Squeeze(Permutation):
    r"""Every block of 2 × 2 pixels becomes one pixel with four times the channels; log_det = 0.

    An image of shape (C, H, W) becomes one of shape (4C, H/2, W/2), and channel 4c + 2i + j of pixel (h, w) is channel c of
    pixel (2h + i, 2w + j).

    Arguments:
        shape: The shape (C, H, W) of the image, H and W even.

    Raises:
        ValueError: if the height or the width is odd.

    Example:
        >>> Squeeze((1, 2, 2)).squeezed_shape
        (4, 1, 1)
        >>> image = torch.arange(16.0).reshape(4, 4)
        >>> Squeeze((1, 4, 4))(image.flatten()).reshape(4, 2, 2)[0]
        tensor([[ 0.,  2.],
                [ 8., 10.]])
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(_squeezed_order("Squeeze", shape))
        channels, height, width = shape
        self.squeezed_shape = (4 * channels, height // 2, width // 2)


class Unsqueeze(Permutation):
    """What undoes :class:`Squeeze`: four channels become 2 × 2 pixels.

    Arguments:
        shape: The shape (C, H, W) of the image that results, H and W even.

    Raises:
        ValueError: if the height or the width is odd.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(_squeezed_order("Unsqueeze", shape).argsort())


def check_image_shape(owner: str, shape: Sequence[int]) -> tuple[int, int, int]:
    """The shape (C, H, W) as a tuple, or an error that says what is wrong with it."""
    if isinstance(shape, int) or len(shape) != 3:
        raise ValueError(f"{owner}: shape must be (channels, height, width), got {shape!r}")
    channels, height, width = (check_positive_integer(owner, "every size in shape", size) for size in shape)
    return channels, height, width


def _squeezed_order(owner: str, shape: Sequence[int]) -> Tensor:
    channels, height, width = check_image_shape(owner, shape)
    if height % 2 or width % 2:
        raise ValueError(f"{owner}: height and width must be even, got shape {(channels, height, width)}")
    blocks = torch.arange(channels * height * width).reshape(channels, height // 2, 2, width // 2, 2)
    return blocks.permute(0, 2, 4, 1, 3).flatten()
