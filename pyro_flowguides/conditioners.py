r"""Where the parameters of a transform come from: free, from part of the point, from a context.

Every conditioner starts at 0 (or at the given initial value), so that the transform it feeds starts as the identity, and
with non-zero gradients to every one of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# The last layer of a network starts at this multiple of torch's usual range. At exactly 0 the layers before it would have no
# gradient; at this size the transform is still the identity to the last bit of float32.
NEAR_ZERO = 1e-8


class MLP(nn.Module):
    r"""A fully connected network with smooth activations whose output starts at 0.

    SiLU is the default activation: with it flows fit clearly better than with ReLU or tanh.

    Arguments:
        in_features: The size of the input, at least 1.
        out_features: The size of the output.
        hidden_dims: The widths of the hidden layers, at least one.
        activation: Makes an activation module; one is made per hidden layer.

    Raises:
        ValueError: if a size is smaller than 1 or there is no hidden layer.
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
        if len(sizes) < 3 or min(sizes) < 1:
            raise ValueError(
                f"MLP: needs hidden_dims with at least one layer and all sizes at least 1, got in_features = {in_features}, "
                f"hidden_dims = {tuple(hidden_dims)}, out_features = {out_features}"
            )
        layers: list[nn.Module] = []
        for size_in, size_out in zip(sizes[:-2], sizes[1:-1], strict=True):
            layers += [nn.Linear(size_in, size_out), activation()]
        last = nn.Linear(sizes[-2], sizes[-1])
        with torch.no_grad():
            last.weight.mul_(NEAR_ZERO)
            last.bias.zero_()
        self.layers = nn.ModuleList([*layers, last])

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = layer(inputs)
        return inputs


class FreeParameters(nn.Module):
    r"""A vector of free parameters, plus a network of the context where there is one: :math:`\theta(c) = \theta_0 + g(c)`.

    With a context this is amortisation: every context has its own parameters (van den Berg et al. 2018, arXiv:1803.05649).

    Arguments:
        initial: The initial value of the vector.
        context_dim: The size of the context; 0 for none.
        hidden_dims: The hidden layers of the network of the context.
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
