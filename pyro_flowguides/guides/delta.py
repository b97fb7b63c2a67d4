"""The point mass that a guide gives to a latent site, with the Jacobian of the site's map as its density."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import register_kl


class LatentDelta(dist.Delta):
    """The Delta of a latent site, whose log-density is the Jacobian of the site's map from unconstrained space.

    Pyro's divergence of a Delta leaves this density out, so that ``TraceMeanField_ELBO`` is wrong by the Jacobian for every
    constrained site of Pyro's own autoguides; with the divergence registered below it is right.
    """

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        return super().rsample(sample_shape) if sample_shape else self.v

    def log_prob(self, x: Tensor) -> Tensor:
        # Every ELBO asks for the point itself, which need not be compared with itself.
        return self.log_density if x is self.v else super().log_prob(x)


@register_kl(LatentDelta, dist.Distribution)  # type: ignore[untyped-decorator]
def _kl_latent_delta(p: LatentDelta, q: dist.Distribution) -> Tensor:
    return p.log_density - q.log_prob(p.v)
