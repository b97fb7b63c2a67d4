"""Models that several benchmarks share, in float64 whatever the default dtype, with their evidence.

Two other files keep forms of their own. The models in :mod:`benchmarks.posteriors` have no plates, so that draws are batch
dimensions of every site. The models in :mod:`benchmarks.svi_models` are written a second time in NumPyro.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

from pyro_flowguides.examples import EIGHT_SCHOOLS_CENTERED

DTYPE = torch.float64


def funnel() -> None:
    """Neal's funnel in 10 dimensions: v ~ N(0, 3), x_i ~ N(0, exp(v/2)); log Z = 0."""
    v = pyro.sample("v", dist.Normal(torch.tensor(0.0, dtype=DTYPE), 3.0))
    with pyro.plate("coordinates", 9):
        pyro.sample("x", dist.Normal(torch.tensor(0.0, dtype=DTYPE), torch.exp(v / 2)))


def eight_schools_centered() -> None:
    """The centred eight schools with their data; log Z is ``EIGHT_SCHOOLS_CENTERED.log_evidence``."""
    EIGHT_SCHOOLS_CENTERED.model(**{name: value.to(DTYPE) for name, value in EIGHT_SCHOOLS_CENTERED.data().items()})
