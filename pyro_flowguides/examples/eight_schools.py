"""The effect of coaching in eight schools: the smallest hierarchical model that mean field gets wrong.

Rubin (1981), *Estimation in parallel randomized experiments*, Journal of Educational Statistics 6(4).
"""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .example import Example

EFFECTS = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
STANDARD_ERRORS = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]
SCHOOLS = [
    "Choate",
    "Deerfield",
    "Phillips Andover",
    "Phillips Exeter",
    "Hotchkiss",
    "Lawrenceville",
    "St. Paul's",
    "Mt. Hermon",
]


def eight_schools(sigma: Tensor, y: Tensor | None = None) -> Tensor:
    """The non-centred form: θ = μ + τ·θ̃ with standard normal θ̃.

    Arguments:
        sigma: The standard errors of the estimated effects, shape (8,).
        y: The estimated effects, shape (8,).
    """
    mu = pyro.sample("mu", dist.Normal(sigma.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(sigma.new_tensor(5.0)))
    with pyro.plate("school", len(sigma)):
        theta_tilde = pyro.sample("theta_tilde", dist.Normal(sigma.new_tensor(0.0), 1.0))
        theta = pyro.deterministic("theta", mu + tau * theta_tilde)
        return pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_centered(sigma: Tensor, y: Tensor | None = None) -> Tensor:
    """The centred form, θ ~ N(μ, τ), whose posterior is a funnel.

    Arguments:
        sigma: The standard errors of the estimated effects, shape (8,).
        y: The estimated effects, shape (8,).
    """
    mu = pyro.sample("mu", dist.Normal(sigma.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(sigma.new_tensor(5.0)))
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        return pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def data() -> dict[str, Tensor]:
    """The data, in the default dtype and on the default device."""
    return {"sigma": torch.tensor(STANDARD_ERRORS), "y": torch.tensor(EFFECTS)}


def nuts_reference() -> dict[str, np.ndarray]:
    """The 2000 NUTS draws of the non-centred form that ship with ArviZ; the sd of tau is 4 % below the exact one."""
    import arviz as az

    posterior = az.load_arviz_data("non_centered_eight")["posterior"]
    draws = {name: np.asarray(posterior[name].values) for name in ("mu", "tau", "theta")}
    return {name: value.reshape(-1, *value.shape[2:]) for name, value in draws.items()}


EIGHT_SCHOOLS = Example(
    name="eight_schools",
    description="effects of coaching in eight schools (Rubin 1981), non-centred",
    model=eight_schools,
    data=data,
    coords={"school": SCHOOLS},
    report=("mu", "tau", "theta"),
    reference=nuts_reference,
    log_evidence=-31.311,
)
EIGHT_SCHOOLS_CENTERED = Example(
    name="eight_schools_centered",
    description="the same model, centred: a funnel",
    model=eight_schools_centered,
    data=data,
    coords={"school": SCHOOLS},
    report=("mu", "tau", "theta"),
    reference=nuts_reference,
    log_evidence=-31.311,
)
