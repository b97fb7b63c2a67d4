r"""Masked networks (MADE): one pass gives the parameters of every coordinate, each from the coordinates before it.

Every unit has a degree m, the number of leading coordinates that it may see: input i has degree i, and the parameters of
coordinate i have degree i − 1. A weight from a unit of degree m to one of degree m' is kept where :math:`m' \ge m`, and 0
elsewhere. So the Jacobian of the parameters is strictly lower triangular. Germain et al. (2015), *MADE: masked autoencoder
for distribution estimation*, arXiv:1502.03509.

For P parameters per coordinate and hidden layers of width H a pass costs O(H·(P·D + H)) per point. Products with the
Jacobian are written by hand, which makes the score and the gradient of the inverse cheaper than automatic differentiation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .networks import NEAR_ZERO, FreeParameters


class MaskedMLP(nn.Module):
    r"""A masked network whose parameters of a coordinate depend on the coordinates before it, and on the context.

    The degrees of a hidden layer are spread evenly, whatever its width; a layer narrower than D sees fewer of the last
    coordinates. With a context there are units of degree 0 too, and the context enters every layer, so that it reaches the
    parameters of every coordinate. Without one the parameters of coordinate 0 are free. For D = 1 there are no other
    parameters, and no network. The output starts at 0, with a gradient to every weight that is kept.

    Arguments:
        dim: The number D of coordinates.
        num_parameters: The number P of parameters of each coordinate.
        hidden_dims: The widths of the hidden layers, at least one.
        activation: Makes an elementwise activation module; one is made per hidden layer.
        context_dim: The size of the context; 0 for none.

    Raises:
        ValueError: if a size is smaller than 1 or there is no hidden layer.
    """

    def __init__(
        self,
        dim: int,
        num_parameters: int,
        hidden_dims: Sequence[int] = (32, 32),
        activation: Callable[[], nn.Module] = nn.SiLU,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        if len(hidden_dims) < 1 or min(dim, num_parameters, *hidden_dims) < 1:
            raise ValueError(
                f"MaskedMLP: needs hidden_dims with at least one layer and all sizes at least 1, got dim = {dim}, "
                f"num_parameters = {num_parameters}, hidden_dims = {tuple(hidden_dims)}"
            )
        self.dim = dim
        self.num_parameters = num_parameters
        # Hidden layers would be dead weight where no coordinate has another before it.
        self.free = FreeParameters(torch.zeros(num_parameters), context_dim, hidden_dims) if dim == 1 else None
        degrees = [torch.arange(1, dim + 1)]
        degrees += [_hidden_degrees(width, dim, with_zero=context_dim > 0 and width > 1) for width in hidden_dims]
        degrees += [torch.arange(dim).repeat(num_parameters)]
        # Degrees increase within a hidden layer, so that the units of one degree are a slice.
        self.units_of_degree = [
            [(int((degree < m).sum()), int((degree <= m).sum())) for m in range(dim)] for degree in degrees[1:-1]
        ]
        pairs = [] if dim == 1 else list(pairwise(degrees))
        layers = [_MaskedLinear(degree_out.unsqueeze(-1) >= degree_in, context_dim) for degree_in, degree_out in pairs]
        for last in layers[-1:]:
            last.start_near_zero()
        self.layers: Any = nn.ModuleList(layers)
        self.activations = nn.ModuleList(activation() for _ in pairs[1:])

    def at(self, context: Tensor | None = None) -> MaskedMLPAtContext:
        """The network at a context; the weights are masked once, for any number of calls."""
        if self.free is not None:
            return MaskedMLPAtContext(self, [], [self.free(context)])
        weights_and_biases = [layer(context) for layer in self.layers]
        weights, biases = zip(*weights_and_biases, strict=True)
        return MaskedMLPAtContext(self, list(weights), list(biases))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """The parameters of every coordinate, shape ``batch_shape + (dim, num_parameters)``."""
        return self.at(context)(inputs)


class MaskedMLPAtContext:
    """A :class:`MaskedMLP` with its context bound and its weights masked; made by :meth:`MaskedMLP.at`.

    ``weights[k]`` and ``biases[k]`` belong to layer k. A bias that depends on the context has the batch shape of the context.
    For D = 1 there are no weights, and the only bias is the parameters.
    """

    def __init__(self, network: MaskedMLP, weights: list[Tensor], biases: list[Tensor]) -> None:
        self.dim = network.dim
        self.num_parameters = network.num_parameters
        self.activations = list(network.activations)
        self.units_of_degree = network.units_of_degree
        self.weights = weights
        self.biases = biases

    def __call__(self, inputs: Tensor) -> Tensor:
        """The parameters of every coordinate, shape ``batch_shape + (dim, num_parameters)``."""
        return self._by_coordinate(self._last_layer(self._hidden(inputs)))

    def of_coordinate(self, inputs: Tensor, coordinate: int) -> Tensor:
        """The parameters of one coordinate, shape ``batch_shape + (num_parameters,)``: the others are not computed."""
        bias = self.biases[-1]
        bias = bias.reshape(*bias.shape[:-1], self.num_parameters, self.dim)[..., coordinate]
        if not self.weights:
            return bias
        return _affine(self._hidden(inputs), self._last_weight()[:, coordinate], bias)

    def linearize(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The parameters, and the slopes of the activations of each hidden layer, the latter without graph."""
        slopes = []
        hidden = inputs
        for weight, bias, activation in self._hidden_layers():
            hidden, pull_back = torch.func.vjp(activation, _affine(hidden, weight, bias))[:2]
            with torch.no_grad():
                slopes.append(pull_back(torch.ones_like(hidden))[0].detach())
        return self._by_coordinate(self._last_layer(hidden)), slopes

    def pull_back(self, slopes: list[Tensor], gradient: Tensor) -> Tensor:
        """The gradient with respect to the inputs, ``[..., input]``.

        Arguments:
            slopes: As :meth:`linearize` returns them.
            gradient: The gradient with respect to the parameters, ``[..., coordinate, parameter]``.
        """
        if not self.weights:
            return torch.zeros_like(gradient[..., 0])
        row = gradient.mT.reshape(*gradient.shape[:-2], -1) @ self.weights[-1]
        for weight, slope in zip(reversed(self.weights[:-1]), reversed(slopes), strict=True):
            row = (row * slope) @ weight
        return row

    def pull_back_rows(self, slopes: list[Tensor], gradient: Tensor) -> Tensor:
        """What every coordinate contributes to :meth:`pull_back`: ``[..., coordinate, input]``, strictly lower triangular.

        All rows go through the hidden layers together, and each through those outputs that are its own:
        O(D·H·(P + H + D)), where D vector-Jacobian products of the whole network cost O(D·H·(P·D + H + D)).
        """
        if not self.weights:
            return torch.zeros_like(gradient[..., :1])
        rows = torch.einsum("...ip,pih->...ih", gradient, self._last_weight())
        for weight, slope in zip(reversed(self.weights[:-1]), reversed(slopes), strict=True):
            rows = (rows * slope.unsqueeze(-2)) @ weight
        return rows

    def back_substitute(self, slopes: list[Tensor], gradient: Tensor, diagonal: Tensor, right: Tensor) -> Tensor:
        r"""Solves :math:`(\operatorname{diag}(d) + R)^\top v = r` for R of :meth:`pull_back_rows`, without forming it.

        From the last coordinate to the first: a hidden unit of degree m has its whole gradient once coordinates ≥ m are
        solved, and is pulled back to inputs < m, once. The work equals a single vector-Jacobian product,
        O(H·(P·D + H)), in D steps.
        """
        gradients = [torch.zeros_like(slope) for slope in slopes]
        solved = []
        for i in reversed(range(self.dim)):
            solved.append(right[..., i] / diagonal[..., i])
            if i == 0:
                continue
            gradients[-1] = gradients[-1] + (gradient[..., i, :] * solved[-1].unsqueeze(-1)) @ self._last_weight()[:, i]
            for layer in reversed(range(len(slopes))):
                units = slice(*self.units_of_degree[layer][i])
                if units.start == units.stop:
                    continue
                pulled = (gradients[layer][..., units] * slopes[layer][..., units]) @ self.weights[layer][units]
                if layer:
                    gradients[layer - 1] = gradients[layer - 1] + pulled
                else:
                    right = right - pulled
        return torch.stack(solved[::-1], -1)

    def _hidden_layers(self) -> Iterable[tuple[Tensor, Tensor, nn.Module]]:
        return zip(self.weights[:-1], self.biases[:-1], self.activations, strict=True)

    def _hidden(self, inputs: Tensor) -> Tensor:
        for weight, bias, activation in self._hidden_layers():
            inputs = activation(_affine(inputs, weight, bias))
        return inputs

    def _last_weight(self) -> Tensor:
        return self.weights[-1].reshape(self.num_parameters, self.dim, -1)

    def _last_layer(self, hidden: Tensor) -> Tensor:
        return _affine(hidden, self.weights[-1], self.biases[-1]) if self.weights else self.biases[-1]

    def _by_coordinate(self, outputs: Tensor) -> Tensor:
        return outputs.reshape(*outputs.shape[:-1], self.num_parameters, self.dim).mT


class _MaskedLinear(nn.Module):
    """A linear layer with some of its weights held at 0, and a further, full weight for a context."""

    mask: Tensor

    def __init__(self, mask: Tensor, context_dim: int) -> None:
        super().__init__()
        size_out, size_in = mask.shape
        self.linear = nn.Linear(size_in, size_out)
        self.of_context = nn.Linear(context_dim, size_out, bias=False) if context_dim else None
        self.register_buffer("mask", mask.to(self.linear.weight))

    def start_near_zero(self) -> None:
        with torch.no_grad():
            self.linear.weight.mul_(NEAR_ZERO)
            self.linear.bias.zero_()
            # No layer lies behind this weight, so that it can start at 0 itself.
            if self.of_context is not None:
                self.of_context.weight.zero_()

    def forward(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The masked weight, and the bias with the part of the context."""
        bias = self.linear.bias
        if self.of_context is not None:
            bias = bias + self.of_context(context)
        return self.linear.weight * self.mask, bias


def _affine(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``weight @ inputs + bias`` for a bias that may have batch dimensions of its own."""
    return linear(inputs, weight, bias) if bias.dim() == 1 else linear(inputs, weight) + bias


def _hidden_degrees(width: int, dim: int, with_zero: bool) -> Tensor:
    """Degrees spread evenly over 1, …, D − 1 (or 0, …, D − 1); with degree 1 always there no layer is cut off."""
    num_zero = max(1, width // dim) if with_zero else 0
    others = width - num_zero
    return torch.cat([torch.zeros(num_zero, dtype=torch.int64), 1 + torch.arange(others) * (dim - 1) // others])
