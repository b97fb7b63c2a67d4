"""A posterior that is flattened: the log joint density times an inverse temperature, in the space in which the guide draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor


class _ScaledJacobians(Messenger):
    """Scales the density of every point mass of a guide, which is the Jacobian of the map from unconstrained space."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = scale

    def _pyro_sample(self, msg: Any) -> None:
        distribution = msg["fn"]
        while isinstance(distribution, (dist.Independent, dist.MaskedDistribution)):
            distribution = distribution.base_dist
        if isinstance(distribution, dist.Delta):
            msg["scale"] = self.scale * msg["scale"]


def tempered(model: Callable, guide: Callable, beta: Tensor) -> tuple[Callable, Callable]:
    r"""A model and a guide whose ELBO is :math:`E_q[\beta \log p(x, y) - \log q(x)]`.

    Here :math:`\log p(x, y) = \log p(\theta(x), y) + \log|\det \partial \theta / \partial x|` for a guide that draws x in
    unconstrained space, as every autoguide does. So the modes of log p stay where they are, and a normal becomes one of variance
    :math:`1 / \beta`. Without the Jacobian the flattened density may have no integral.

    Arguments:
        model: The model.
        guide: The guide.
        beta: The inverse temperature, a positive scalar.
    """
    return poutine.scale(model, scale=beta), _ScaledJacobians(beta)(guide)
