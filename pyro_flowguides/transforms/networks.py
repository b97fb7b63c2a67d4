r"""Where the parameters of a transform come from: free, from part of the point, from a context.

Every conditioner starts at 0 (or at the given initial value), so that the transform it feeds starts as the identity, and
with non-zero gradients to every one of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, softplus

# The last layer of a network starts at this multiple of torch's usual range. At exactly 0 the layers before it would have no
# gradient; at this size the transform is still the identity to the last bit of float32.
NEAR_ZERO = 1e-8


# How many times smaller the steps of a damped network are. A power of 2 rounds nothing.
SLOWDOWN = 8.0


class ScalarState(nn.Module):
    """A module with numbers that are part of its state, and that its forward pass reads as Python numbers.

    As a buffer a number is saved, loaded and copied with the module. As a Python number, which lies beside the buffer under
    its name with an underscore before it, it may decide a branch, and costs no operation and no wait for the device.
    """

    def set_scalar(self, name: str, value: float) -> None:
        """Sets the buffer of this name, and the Python number beside it."""
        before = self._buffers.get(name)
        # A new tensor, never a write to the old one: a step that was captured with the old number sees the exchange.
        self.register_buffer(name, torch.tensor(value) if before is None else torch.full_like(before, value))
        setattr(self, f"_{name}", value)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in list(self._buffers):
            loaded, current = state_dict.get(prefix + name), vars(self).get(f"_{name}")
            # One of another shape is an error already.
            if current is not None and loaded is not None and loaded.shape == () and float(loaded) != current:
                self.set_scalar(name, float(loaded))


class DampedNetwork(ScalarState):
    """A network that an optimizer may move slowly.

    The forward pass divides every parameter by the buffer ``slowdown``: 1, or 8 in a damped network, whose parameters are
    stored 8 times as large. The function is the same, but a step of Adam in a stored parameter changes the parameter in use
    8 times less (the equalised learning rate of Karras et al. 2018, *Progressive growing of GANs*, arXiv:1710.10196).
    """

    slowdown: Tensor
    _slowdown: float

    def _start(self, damped: bool) -> None:
        """Sets the slowdown, once all layers are there."""
        self.set_scalar("slowdown", SLOWDOWN if damped else 1.0)
        if damped:
            scale_parameters(self, SLOWDOWN)

    def undamp(self) -> None:
        """Sets the slowdown to 1; the function stays the same."""
        scale_parameters(self, 1 / self._slowdown)
        self.set_scalar("slowdown", 1.0)

    def _apply_layer(self, layer: nn.Linear | nn.Conv2d, inputs: Tensor, scale: float = 1.0) -> Tensor:
        scale = scale / self._slowdown
        if scale == 1:
            outputs: Tensor = layer(inputs)
            return outputs
        # On the weights, which are fewer numbers than the outputs of many draws.
        weight, bias = scale * layer.weight, None if layer.bias is None else scale * layer.bias
        if isinstance(layer, nn.Linear):
            return linear(inputs, weight, bias)
        return conv2d(inputs, weight, bias, padding=layer.padding)


class MLP(DampedNetwork):
    r"""A fully connected network with smooth activations whose output starts at 0.

    SiLU is the default activation: with it flows fit clearly better than with ReLU or tanh.

    The output is divided by :math:`\sqrt{H}` for a last hidden layer of width H. A step of Adam moves all weights by about the
    learning rate, whatever the width; without the division it would move the output by up to H times as much. That is the
    main source of noise when a flow is trained with few draws at a high learning rate. Jacot et al. (2018), *Neural tangent
    kernel: convergence and generalization in neural networks*, arXiv:1806.07572.

    Arguments:
        in_features: The size of the input, at least 1.
        out_features: The size of the output.
        hidden_dims: The widths of the hidden layers; without any the network is a linear map, which suffices for a context
            from a deep encoder.
        activation: Makes an activation module; one is made per hidden layer.
        damped: Whether steps of an optimizer move the network 8 times less.

    Raises:
        ValueError: if a size is smaller than 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_dims: Sequence[int] = (32, 32),
        activation: Callable[[], nn.Module] = nn.SiLU,
        damped: bool = False,
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
        self._start(damped)

    def forward(self, inputs: Tensor) -> Tensor:
        *hidden_layers, last = self.layers
        for layer in hidden_layers:
            inputs = self._apply_layer(layer, inputs) if isinstance(layer, nn.Linear) else layer(inputs)
        return self._apply_layer(last, inputs, self.output_scale)


class ConvNet(DampedNetwork):
    r"""A convolutional network of images whose output starts at 0: a 3 × 3, a 1 × 1 and a 3 × 3 convolution.

    Images keep their height and width; beyond their edges they are 0. The output is divided by :math:`3\sqrt{h}` for h hidden
    channels, the root of the number of terms of a sum in the last layer, as in :class:`MLP`.

    Arguments:
        in_channels: The channels of the input.
        out_channels: The channels of the output.
        hidden_channels: The channels of the two hidden layers.
        activation: Makes an activation module; one is made per hidden layer.
        context_dim: The size of a context, which is added to the first hidden layer by a linear map; 0 for none.
        damped: Whether steps of an optimizer move the network 8 times less.

    Raises:
        ValueError: if a number of channels is smaller than 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int = 32,
        activation: Callable[[], nn.Module] = nn.SiLU,
        context_dim: int = 0,
        damped: bool = False,
    ) -> None:
        super().__init__()
        if min(in_channels, out_channels, hidden_channels) < 1:
            raise ValueError(
                f"ConvNet: needs all numbers of channels at least 1, got in_channels = {in_channels}, out_channels = "
                f"{out_channels}, hidden_channels = {hidden_channels}"
            )
        self.first = nn.Conv2d(in_channels, hidden_channels, 3, padding=1)
        self.of_context = nn.Linear(context_dim, hidden_channels, bias=False) if context_dim else None
        self.middle = nn.Conv2d(hidden_channels, hidden_channels, 1)
        self.last = nn.Conv2d(hidden_channels, out_channels, 3, padding=1)
        with torch.no_grad():
            self.last.weight.mul_(NEAR_ZERO)
            assert self.last.bias is not None
            self.last.bias.zero_()
        self.activations = nn.ModuleList([activation(), activation()])
        self.output_scale = (9 * hidden_channels) ** -0.5
        self._start(damped)

    def forward(self, images: Tensor, context: Tensor | None = None) -> Tensor:
        """Images of shape ``batch_shape + (channels, height, width)``, the context of shape ``batch_shape + (context_dim,)``."""
        hidden = self._apply_layer(self.first, images.reshape(-1, *images.shape[-3:]))
        if self.of_context is not None:
            assert context is not None
            shift = self._apply_layer(self.of_context, context)
            hidden = hidden + shift.reshape(-1, hidden.shape[1], 1, 1)
        hidden = self.activations[1](self._apply_layer(self.middle, self.activations[0](hidden)))
        outputs = self._apply_layer(self.last, hidden, self.output_scale)
        return outputs.reshape(*images.shape[:-3], *outputs.shape[1:])


def scale_parameters(module: nn.Module, factor: float) -> None:
    """Multiplies what a module stores, in place."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(factor)


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

    def normalized_weights(self) -> list[Tensor]:
        """The weights as they are used, first layer first: the spectral norm of each is at most c."""
        bound = self.lipschitz ** (1 / len(self.layers))
        weights = [layer.weight for layer in self.layers]
        return [weight / (torch.linalg.matrix_norm(weight, 2) / bound).clamp(min=1.0) for weight in weights]

    def linearize(
        self, inputs: Tensor, context: Tensor | None = None, weights: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        r"""The output, and the slope of the activation at every hidden unit, one tensor per hidden layer.

        With the weights :math:`W_l` and the slopes :math:`d_l` the Jacobian of the network is
        :math:`W_L \operatorname{diag}(d_{L-1}) W_{L-1} \dots \operatorname{diag}(d_1) W_1`.
        """
        weights = self.normalized_weights() if weights is None else weights
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
        return self.linearize(inputs, context)[0]


def _lip_swish(inputs: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The activation t σ(βt)/1.1 and its derivative, which lies in (−0.1, 1) for every β > 0."""
    scaled = beta * inputs
    gate = torch.sigmoid(scaled)
    # σ(βt) σ(−βt): 1 − gate would be 0 in float32 where the product is not.
    return inputs * gate / 1.1, (gate + scaled * gate * torch.sigmoid(-scaled)) / 1.1
