r"""Where the parameters of a transform come from: free, from part of the point, from a context.

Every conditioner starts at 0 (or at the given initial value), so that the transform it feeds starts as the identity, and
with non-zero gradients to every one of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

# The last layer of a network starts at this multiple of torch's usual range. At exactly 0 the layers before it would have no
# gradient; at this size the transform is still the identity to the last bit of float32.
NEAR_ZERO = 1e-8


class MLP(nn.Module):
    r"""A fully connected network with smooth activations whose output starts at 0.

    SiLU is the default activation: with it flows fit clearly better than with ReLU or tanh.

    The output is divided by :math:`\sqrt{H}` for a last hidden layer of width H. A step of Adam moves all weights by about the
    learning rate, whatever the width; without the division it would move the output by up to H times as much, which is where
    most of the noise of a flow comes from that trains on few draws at a high rate. Jacot et al. (2018), *Neural tangent
    kernel: convergence and generalization in neural networks*, arXiv:1806.07572.

    Every parameter is used divided by ``slowdown``, 1 at first. A step of Adam in what is stored then is that much smaller in
    what is used (the equalised learning rate of Karras et al. 2018, *Progressive growing of GANs*, arXiv:1710.10196).

    Arguments:
        in_features: The size of the input, at least 1.
        out_features: The size of the output.
        hidden_dims: The widths of the hidden layers; without any the network is a linear map, which is what a context that
            comes from a deep encoder needs.
        activation: Makes an activation module; one is made per hidden layer.

    Raises:
        ValueError: if a size is smaller than 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_dims: Sequence[int] = (32, 32),
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        sizes = [in_features, *hidden_dims, out_features]
        if min(sizes) < 1:
            raise ValueError(
                f"MLP: needs all sizes at least 1, got in_features = {in_features}, hidden_dims = {tuple(hidden_dims)}, "
                f"out_features = {out_features}"
            )
        layers: list[nn.Module] = []
        for size_in, size_out in zip(sizes[:-2], sizes[1:-1], strict=True):
            layers += [nn.Linear(size_in, size_out), activation()]
        last = nn.Linear(sizes[-2], sizes[-1])
        with torch.no_grad():
            last.weight.mul_(NEAR_ZERO)
            last.bias.zero_()
        self.layers: Any = nn.ModuleList([*layers, last])
        self.output_scale = hidden_dims[-1] ** -0.5 if hidden_dims else 1.0
        self.slowdown = 1.0

    def slow_down(self, slowdown: float) -> None:
        """Makes steps smaller by another factor; the function stays the same."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(slowdown / self.slowdown)
        self.slowdown = slowdown

    def forward(self, inputs: Tensor) -> Tensor:
        *hidden_layers, last = self.layers
        for layer in hidden_layers:
            inputs = self._linear(layer, inputs) if isinstance(layer, nn.Linear) else layer(inputs)
        return self._linear(last, inputs, self.output_scale)

    def _linear(self, layer: nn.Linear, inputs: Tensor, scale: float = 1.0) -> Tensor:
        scale = scale / self.slowdown
        # On the weights, which are fewer numbers than the outputs of many draws.
        return layer(inputs) if scale == 1 else linear(inputs, scale * layer.weight, scale * layer.bias)


class FreeParameters(nn.Module):
    r"""A vector of free parameters, plus a network of the context where there is one: :math:`\theta(c) = \theta_0 + g(c)`.

    With a context this is amortisation: every context has its own parameters (van den Berg et al. 2018, arXiv:1803.05649).

    Arguments:
        initial: The initial value of the vector.
        context_dim: The size of the context; 0 for none.
        hidden_dims: The hidden layers of the network of the context; none for a linear map.
    """

    def __init__(self, initial: Tensor, context_dim: int = 0, hidden_dims: Sequence[int] = (32, 32)) -> None:
        super().__init__()
        self.value = nn.Parameter(initial.clone())
        self.network = MLP(context_dim, initial.numel(), hidden_dims) if context_dim else None

    def forward(self, context: Tensor | None = None) -> Tensor:
        """The parameters, of shape ``(n,)`` or ``context_batch_shape + (n,)``."""
        if self.network is None:
            return self.value
        return self.value + self.network(context)


class MaskedMLP(nn.Module):
    r"""A masked network (MADE): the parameters of a coordinate depend on the coordinates before it, and on the context.

    Every unit has a degree, the number of leading coordinates that it may see, and a weight between two units is kept
    where the degree does not fall. The degrees of a hidden layer are spread evenly, whatever its width; a layer
    narrower than D sees fewer of the last coordinates. With a context there are units of degree 0 too, and the context
    enters every layer, so that it reaches the parameters of every coordinate. Those of coordinate 0 are free where
    there is no context; for D = 1 there are no others, and no network. Germain et al. (2015), *MADE: masked autoencoder
    for distribution estimation*, arXiv:1502.03509.

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
        """The network at a context, with its weights masked once for any number of calls."""
        if self.free is not None:
            return MaskedMLPAtContext(self, [], [self.free(context)])
        weights_and_biases = [layer(context) for layer in self.layers]
        weights, biases = zip(*weights_and_biases, strict=True)
        return MaskedMLPAtContext(self, list(weights), list(biases))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """The parameters of every coordinate, shape ``batch_shape + (dim, num_parameters)``."""
        return self.at(context)(inputs)


class MaskedMLPAtContext:
    """A :class:`MaskedMLP` with its context bound; made by :meth:`MaskedMLP.at`."""

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

    def linearise(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The parameters, and the slopes of the activations of each hidden layer, the latter without graph."""
        slopes = []
        hidden = inputs
        for weight, bias, activation in self._hidden_layers():
            hidden, pull_back = torch.func.vjp(activation, _affine(hidden, weight, bias))[:2]
            with torch.no_grad():
                slopes.append(pull_back(torch.ones_like(hidden))[0].detach())
        return self._by_coordinate(self._last_layer(hidden)), slopes

    def pull_back(self, slopes: list[Tensor], gradient: Tensor) -> Tensor:
        """The gradient by input, ``[..., input]``, from one by parameter, ``[..., coordinate, parameter]``."""
        if not self.weights:
            return torch.zeros_like(gradient[..., 0])
        row = gradient.mT.reshape(*gradient.shape[:-2], -1) @ self.weights[-1]
        for weight, slope in zip(reversed(self.weights[:-1]), reversed(slopes), strict=True):
            row = (row * slope) @ weight
        return row

    def pull_back_rows(self, slopes: list[Tensor], gradient: Tensor) -> Tensor:
        """What every coordinate contributes to that gradient: ``[..., coordinate, input]``, strictly lower triangular.

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
        solved, and is pulled back to inputs < m, once. The work is that of a single vector-Jacobian product,
        O(H·(P·D + H)), in D steps.
        """
        gradients = [torch.zeros_like(slope) for slope in slopes]
        solved = []
        for i in reversed(range(self.dim)):
            solved.append(right[..., i] / diagonal[..., i])
            if i == 0 or not self.weights:
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


class LipschitzMLP(nn.Module):
    r"""A fully connected network with Lipschitz constant at most ``lipschitz`` in its inputs; its output starts at 0.

    Every weight is used as :math:`W / \max(1, \|W\|_2 / c)` with :math:`c = \text{lipschitz}^{1/L}` for L layers and
    the exact largest singular value (a few steps of power iteration can miss a fifth of it, and the bound with it). The
    activation is LipSwish, :math:`t\,\sigma(\beta t)/1.1` with a free β > 0 per layer: its slope never exceeds 1, and
    unlike tanh or ELU it still bends where the slope is 1. Behrmann et al. (2019), *Invertible residual networks*,
    arXiv:1811.00995; Chen et al. (2019), *Residual flows for invertible generative modeling*, arXiv:1906.02735.

    Normalising costs one singular value decomposition per layer and call, whatever the number of points.

    Arguments:
        in_features: The size of the input, at least 1.
        out_features: The size of the output.
        hidden_dims: The widths of the hidden layers, at least one.
        lipschitz: The bound, in (0, 1].
        context_dim: The size of a context, a further input that the bound does not concern; 0 for none.

    Raises:
        ValueError: if a size is smaller than 1, there is no hidden layer, or the bound is not in (0, 1].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_dims: Sequence[int] = (32, 32),
        *,
        lipschitz: float = 0.9,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        sizes = [in_features, *hidden_dims, out_features]
        if len(sizes) < 3 or min(sizes) < 1:
            raise ValueError(
                f"LipschitzMLP: needs hidden_dims with at least one layer and all sizes at least 1, got in_features = "
                f"{in_features}, hidden_dims = {tuple(hidden_dims)}, out_features = {out_features}"
            )
        if not 0 < lipschitz <= 1:
            raise ValueError(f"LipschitzMLP: lipschitz must be in (0, 1], got {lipschitz}")
        self.sizes = tuple(sizes)
        self.lipschitz = lipschitz
        layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
        with torch.no_grad():
            layers[-1].weight.mul_(NEAR_ZERO)
            layers[-1].bias.zero_()
        self.layers: Any = nn.ModuleList(layers)
        self.context_layer: Any = nn.Linear(context_dim, sizes[1], bias=False) if context_dim else None
        # β = softplus of these.
        self.sharpness = nn.Parameter(torch.full((len(hidden_dims),), 0.5))

    def normalised_weights(self) -> list[Tensor]:
        """The weights as they are used, first layer first: the spectral norm of each is at most c."""
        bound = self.lipschitz ** (1 / len(self.layers))
        weights = [layer.weight for layer in self.layers]
        return [weight / (torch.linalg.matrix_norm(weight, 2) / bound).clamp(min=1.0) for weight in weights]

    def linearise(
        self, inputs: Tensor, context: Tensor | None = None, weights: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        r"""The output, and the slope of the activation at every hidden unit, one tensor per hidden layer.

        With the weights :math:`W_l` and the slopes :math:`d_l` the Jacobian of the network is
        :math:`W_L \operatorname{diag}(d_{L-1}) W_{L-1} \dots \operatorname{diag}(d_1) W_1`.
        """
        weights = self.normalised_weights() if weights is None else weights
        sharpness = softplus(self.sharpness)
        hidden, slopes = inputs, []
        for index, (layer, weight) in enumerate(zip(self.layers, weights, strict=True)):
            hidden = linear(hidden, weight, layer.bias)
            if index == 0 and self.context_layer is not None:
                hidden = hidden + self.context_layer(context)
            if index < len(self.layers) - 1:
                hidden, slope = _lip_swish(hidden, sharpness[index])
                slopes.append(slope)
        return hidden, slopes

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return self.linearise(inputs, context)[0]


def _lip_swish(inputs: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The activation t σ(βt)/1.1 and its derivative, which lies in (−0.1, 1) for every β > 0."""
    scaled = beta * inputs
    gate = torch.sigmoid(scaled)
    # σ(βt) σ(−βt): 1 − gate would be 0 in float32 where the product is not.
    return inputs * gate / 1.1, (gate + scaled * gate * torch.sigmoid(-scaled)) / 1.1
