r"""Linear regressions, with their evidence.

With :math:`y \sim N(X\beta, \sigma^2 I)` and a flat or normal prior of β, the integral over β has a closed form, and the
evidence is an integral over σ alone, computed by the trapezoidal rule in log σ. For a flat β, with the residual sum of squares
R of least squares,

.. math:: \int p(y \mid \beta, \sigma)\,d\beta = (2\pi\sigma^2)^{-(n-k)/2} |X^\top X|^{-1/2} e^{-R / 2\sigma^2},

and for :math:`\beta \sim N(m, S^2)` the integral is :math:`N(y;\, Xm,\, \sigma^2 I + X S^2 X^\top)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .known import flat

# The half-width in log σ, around the scale of the residuals; the sd of the posterior of log σ is about (2n)^-½.
_HALF_WIDTH, _NUM_NODES = 4.0, 40_001
LOG_TWO_PI = math.log(2 * math.pi)


# --- models ------------------------------------------------------------------------------------------------------------


def _observe(mean: Tensor, sigma: Tensor, y: Tensor) -> None:
    pyro.sample("y", dist.Normal(mean, sigma.unsqueeze(-1)).to_event(1), obs=y)


def _flat_coefficients(x: Tensor) -> Tensor:
    return pyro.sample("beta", flat(dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1)))


def _flat_scale(x: Tensor) -> Tensor:
    return pyro.sample("sigma", flat(dist.HalfCauchy(x.new_ones(()))))


def flat_regression(x: Tensor, y: Tensor) -> None:
    """Flat coefficients, flat residual scale."""
    _observe(_flat_coefficients(x) @ x.mT, _flat_scale(x), y)


def half_cauchy_regression(x: Tensor, y: Tensor) -> None:
    """Flat coefficients, σ ~ half-Cauchy(2.5)."""
    beta = _flat_coefficients(x)
    sigma = pyro.sample("sigma", dist.HalfCauchy(x.new_tensor(2.5)))
    _observe(beta @ x.mT, sigma, y)


def normal_regression(x: Tensor, y: Tensor) -> None:
    """β ~ N(0, 10), σ ~ half-N(0, 10), no intercept."""
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(x.new_tensor(10.0)))
    _observe(beta @ x.mT, sigma, y)


def line(x: Tensor, y: Tensor, intercept: Tensor, slope: Tensor) -> None:
    """A straight line; ``intercept`` and ``slope`` are mean and sd of the priors of α and β. σ is flat."""
    alpha = pyro.sample("alpha", dist.Normal(intercept[0], intercept[1]))
    beta = pyro.sample("beta", dist.Normal(slope[0], slope[1]))
    _observe(alpha.unsqueeze(-1) + beta.unsqueeze(-1) * x, _flat_scale(x), y)


def autoregression(lags: Tensor, y: Tensor) -> None:
    """y on its own past: α, β ~ N(0, 10), σ ~ half-Cauchy(2.5)."""
    alpha = pyro.sample("alpha", dist.Normal(y.new_zeros(()), 10.0))
    beta = pyro.sample("beta", dist.Normal(y.new_zeros(lags.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
    _observe(alpha.unsqueeze(-1) + beta @ lags.mT, sigma, y)


def heavy_tailed_regression(factor: Tensor, num_rows: Tensor) -> None:
    """b ~ N(0, 1), the intercept ~ t(3, 8, 10), σ ~ half-t(3, 0, 10), on data compressed by :func:`triangular_factor`."""
    b = pyro.sample("b", dist.Normal(factor.new_zeros(len(factor) - 2), 1.0).to_event(1))
    intercept = pyro.sample("Intercept", dist.StudentT(factor.new_tensor(3.0), 8.0, 10.0))
    # Half of a t is a t on the positive half-line, with twice the density.
    sigma = pyro.sample("sigma", flat(dist.HalfCauchy(factor.new_tensor(10.0))))
    pyro.factor("sigma_prior", _half_t(sigma))
    residual = factor[:, -1] - intercept.unsqueeze(-1) * factor[:, 0] - b @ factor[:, 1:-1].mT
    log_likelihood = -0.5 * residual.square().sum(-1) / sigma**2 - num_rows * (sigma.log() + 0.5 * LOG_TWO_PI)
    pyro.factor("y", log_likelihood)


def _half_t(sigma: Tensor) -> Tensor:
    return dist.StudentT(sigma.new_tensor(3.0), 0.0, 10.0).log_prob(sigma) + math.log(2)


# --- data --------------------------------------------------------------------------------------------------------------


def columns(*parts: Tensor | float) -> Tensor:
    """A design matrix of columns; a number is a constant column."""
    length = next(len(part) for part in parts if isinstance(part, Tensor))
    return torch.stack([part if isinstance(part, Tensor) else torch.full((length,), float(part)) for part in parts], -1)


def with_interaction(a: Tensor, b: Tensor) -> Tensor:
    return columns(1, a, b, a * b)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


def standardised(x: Tensor) -> Tensor:
    return centred(x) / x.std(0)


def line_arguments(data: dict[str, Tensor]) -> tuple[Tensor, ...]:
    priors = [torch.stack([data[f"pmu{name}"], data[f"ps{name}"]]) for name in ("alpha", "beta")]
    return data["x"], data["y"], *priors


def election_design(data: dict[str, Tensor]) -> Tensor:
    """The National Election Study: ideology, race, age group, education, gender, income."""
    ages = [(data["age_discrete"] == group).to(data["income"]) for group in (2, 3, 4)]
    return columns(1, data["real_ideo"], data["race_adj"], *ages, data["educ1"], data["gender"], data["income"])


def autoregressive_arguments(data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The K values before each value, the latest first, and the values that have K predecessors."""
    y, order = data["y"], int(data["K"])
    lags = torch.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], -1)
    return lags, y[order:]


def triangular_factor(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The triangular factor R of the columns 1, x, y, and the number of rows.

    The table of columns is QR, and Q has orthonormal columns. Residuals therefore have the same sum of squares on the rows of R
    as on all rows: thousands of rows become as many as there are columns, and the density is the same.
    """
    table = torch.cat([torch.ones_like(y).unsqueeze(-1), x, y.unsqueeze(-1)], -1)
    return torch.linalg.qr(table).R, y.new_tensor(float(len(y)))


# --- evidence ----------------------------------------------------------------------------------------------------------


def _integral_over_scale(log_density: Callable[[Tensor], Tensor], around: float) -> float:
    """log ∫ exp(log_density(σ)) dσ."""
    log_sigma = math.log(around) + torch.linspace(-_HALF_WIDTH, _HALF_WIDTH, _NUM_NODES, dtype=torch.float64)
    step = float(log_sigma[1] - log_sigma[0])
    return float((log_density(log_sigma.exp()) + log_sigma).logsumexp(0)) + math.log(step)


def flat_log_evidence(x: Tensor, y: Tensor, log_prior: Callable[[Tensor], Tensor] = torch.zeros_like) -> float:
    """log Z for a flat β and a σ with the given log-density, by default flat."""
    q, r = torch.linalg.qr(x)
    rss = float((y - q @ (q.mT @ y)).square().sum())
    freedom, log_volume = len(y) - x.shape[1], float(r.diagonal().abs().log().sum())

    def log_density(sigma: Tensor) -> Tensor:
        return -0.5 * (freedom * (LOG_TWO_PI + 2 * sigma.log()) + rss / sigma**2) - log_volume + log_prior(sigma)

    return _integral_over_scale(log_density, (rss / freedom) ** 0.5)


def normal_log_evidence(
    x: Tensor,
    y: Tensor,
    mean: Tensor,
    sd: Tensor,
    log_prior: Callable[[Tensor], Tensor] = torch.zeros_like,
    num_rows: int | None = None,
) -> float:
    """log Z for β ~ N(mean, sd²), coordinate by coordinate, and a σ with the given log-density, by default flat.

    ``num_rows`` is the number of rows before compression, where x and y are compressed.
    """
    num_rows = len(y) if num_rows is None else num_rows
    left, singular, _ = torch.linalg.svd(x * sd, full_matrices=False)
    residual = y - x @ mean
    inside = left.mT @ residual
    outside = float((residual - left @ inside).square().sum())
    freedom = num_rows - len(singular)

    def log_density(sigma: Tensor) -> Tensor:
        variance = sigma.unsqueeze(-1) ** 2 + singular**2
        quadratic = (inside**2 / variance + variance.log()).sum(-1) + outside / sigma**2 + 2 * freedom * sigma.log()
        return -0.5 * (num_rows * LOG_TWO_PI + quadratic) + log_prior(sigma)

    return _integral_over_scale(log_density, (outside / freedom) ** 0.5)


def half_cauchy_log_evidence(x: Tensor, y: Tensor) -> float:
    return flat_log_evidence(x, y, dist.HalfCauchy(x.new_tensor(2.5)).log_prob)


def normal_regression_log_evidence(x: Tensor, y: Tensor) -> float:
    prior = x.new_zeros(x.shape[1]), x.new_full((x.shape[1],), 10.0)
    return normal_log_evidence(x, y, *prior, dist.HalfNormal(x.new_tensor(10.0)).log_prob)


def line_log_evidence(x: Tensor, y: Tensor, intercept: Tensor, slope: Tensor) -> float:
    mean, sd = torch.stack([intercept, slope], -1)
    return normal_log_evidence(columns(1, x), y, mean, sd)


def autoregression_log_evidence(lags: Tensor, y: Tensor) -> float:
    x = torch.cat([lags.new_ones(len(lags), 1), lags], -1)
    prior = x.new_zeros(x.shape[1]), x.new_full((x.shape[1],), 10.0)
    return normal_log_evidence(x, y, *prior, dist.HalfCauchy(x.new_tensor(2.5)).log_prob)


def heavy_tailed_log_evidence(factor: Tensor, num_rows: Tensor) -> float:
    """The evidence of :func:`heavy_tailed_regression`.

    The columns are centred, so that the first row of R belongs to the intercept alone. A second quadrature integrates over it.
    """
    # Around the mean of y, in units of its standard error: apart from the prior, the inner integrand is normal there.
    units = torch.linspace(-8, 8, 121, dtype=factor.dtype)
    step, mean = float(units[1] - units[0]), factor[0, -1] / factor[0, 0]

    def log_prior(sigma: Tensor) -> Tensor:
        width = sigma / num_rows**0.5
        intercept = mean + units * width.unsqueeze(-1)
        log_inner = dist.StudentT(factor.new_tensor(3.0), 8.0, 10.0).log_prob(intercept) - 0.5 * units**2
        return log_inner.logsumexp(-1) + width.log() + math.log(step) + _half_t(sigma)

    x, y = factor[1:, 1:-1], factor[1:, -1]
    prior = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    return normal_log_evidence(x, y, *prior, log_prior, num_rows=int(num_rows))
