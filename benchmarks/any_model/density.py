"""The density of a model at many points at once, and the moments and the diagnostics of its draws."""

from __future__ import annotations

import arviz as az
import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from pyro_flowguides.model.sites import is_subsample

from .problem import Problem

# Entries of a site that are constant, such as those above the diagonal of a Cholesky factor, have no error.
SMALLEST_SD = 1e-6


class Density:
    """The log joint density of the model vectorised by hand, at many unconstrained points.

    Arguments:
        problem: The model.
    """

    def __init__(self, problem: Problem) -> None:
        self.model, self.arguments = problem.vectorized()
        trace = poutine.trace(self.model).get_trace(*self.arguments)
        sites = [site for site in trace.nodes.values() if site["type"] == "sample" and not is_subsample(site)]
        frames = [frame for site in sites for frame in site["cond_indep_stack"] if frame.vectorized]
        self.nesting = max([0, *[-frame.dim for frame in frames]])
        self.sites = [site for site in sites if not site["is_observed"]]
        self.transforms = [biject_to(site["fn"].support) for site in self.sites]
        self.sizes = [
            transform.inv(site["value"]).numel() for transform, site in zip(self.transforms, self.sites, strict=True)
        ]
        self.dim = sum(self.sizes)

    def values(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The values of the sites, ``(rows,) + batch shape + event shape``, and the log-determinant, ``(rows,)``."""
        values, log_det = {}, torch.zeros(len(x))
        parts = x.split(self.sizes, -1)
        for site, transform, part in zip(self.sites, self.transforms, parts, strict=True):
            batch = [1] * (self.nesting - len(site["fn"].batch_shape)) + list(site["fn"].batch_shape)
            shape = transform.inv(site["value"]).shape[len(site["fn"].batch_shape) :]
            unconstrained = part.reshape(len(x), *batch, *shape)
            value = transform(unconstrained)
            log_det = log_det + transform.log_abs_det_jacobian(unconstrained, value).reshape(len(x), -1).sum(-1)
            values[site["name"]] = value
        return values, log_det

    def __call__(self, x: Tensor) -> Tensor:
        values, log_det = self.values(x)
        with pyro.plate("rows", len(x), dim=-1 - self.nesting):
            trace = poutine.trace(poutine.condition(self.model, data=values)).get_trace(*self.arguments)
        trace.compute_log_prob()
        terms = [site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample"]
        return log_det + sum(term.expand(len(x), *term.shape[1:]).reshape(len(x), -1).sum(-1) for term in terms)


def moments(values: dict[str, Tensor], weight: Tensor) -> dict[str, dict[str, list[float]]]:
    """The means and the standard deviations of the weighted rows of every site."""
    means = {name: weight @ value for name, value in values.items()}
    return {
        "mean": {name: mean.tolist() for name, mean in means.items()},
        "sd": {name: (weight @ (value - means[name]) ** 2).sqrt().tolist() for name, value in values.items()},
    }


def diagnostics(samples: dict[str, np.ndarray]) -> tuple[float, float]:
    """The smallest effective sample size, of means and of spreads, and the largest R-hat, of all entries that vary.

    Source: Vehtari, Gelman, Simpson, Carpenter and Buerkner, 2021, "Rank-normalization, folding, and localization",
    arXiv:1903.08008.

    Arguments:
        samples: The draws of every site, ``(chains, draws, …)``.
    """
    scalars = np.concatenate([value.reshape(*value.shape[:2], -1) for value in samples.values()], -1)
    data = az.from_dict({"scalars": scalars[..., scalars.std((0, 1)) > SMALLEST_SD]})
    smallest = min(float(az.ess(data, method=method)["scalars"].min()) for method in ("bulk", "sd"))
    return smallest, float(az.rhat(data)["scalars"].max())
