"""The distance of a guide's draws from a reference, scalar by scalar, and the score of a perfect guide."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from scipy.stats import wasserstein_distance
from torch import Tensor

from pyro_flowguides import Draws

from .known import KnownPosterior, Reference, scalar

NUM_RESAMPLES = 20


def distances(draws: np.ndarray, reference: Reference, weights: np.ndarray | None = None) -> dict[str, float | str]:
    """The distances of draws from a reference, in units of the reference's sd.

    Arguments:
        draws: Shape (N, scalars).
        reference: The reference.
        weights: Importance weights of the draws, shape (N,); equal if left out.

    Returns:
        ``mean_error``: the largest \\|mean − mean_ref\\| / sd_ref among the scalars, and ``sd_error``: the largest
        \\|sd / sd_ref − 1\\|, each with its scalar; ``wasserstein``: the 1-Wasserstein distance of the marginals over sd_ref,
        averaged over the scalars.
    """
    mean = np.average(draws, axis=0, weights=weights)
    sd = np.average((draws - mean) ** 2, axis=0, weights=weights) ** 0.5
    mean_errors, sd_errors = np.abs(mean - reference.mean) / reference.sd, np.abs(sd / reference.sd - 1)
    wasserstein = [
        wasserstein_distance(draws[:, i], reference.draws[:, i], u_weights=weights) / reference.sd[i]
        for i in range(len(reference.names))
    ]
    return {
        "mean_error": float(mean_errors.max()),
        "mean_error_of": reference.names[int(mean_errors.argmax())],
        "sd_error": float(sd_errors.max()),
        "sd_error_of": reference.names[int(sd_errors.argmax())],
        "wasserstein": float(np.mean(wasserstein)),
    }


def noise_floor(reference: Reference) -> dict[str, float]:
    """The median score of the reference's own draws, resampled: the Monte-Carlo error, and so the score of a perfect guide."""
    rng = np.random.default_rng(0)
    size = len(reference.draws)
    resampled = [distances(reference.draws[rng.integers(size, size=size)], reference) for _ in range(NUM_RESAMPLES)]
    return {key: float(np.median([one[key] for one in resampled])) for key in ("mean_error", "sd_error", "wasserstein")}


def columns(values: Mapping[str, np.ndarray], reference: Reference) -> np.ndarray:
    """The scalars of a reference, from the values by site: shape (N, scalars)."""
    return np.stack([scalar(values, name) for name in reference.names], -1)


# The weights and the squares of a poor guide's draws overflow.
@np.errstate(over="ignore")
def scores(posterior: KnownPosterior, draws: Draws) -> dict:
    """All figures of a guide's draws: ELBO, k-hat, ESS, verdict, and the distances before and after weighting."""
    elbo, khat, ess = draws.elbo, draws.khat, draws.ess
    found: dict = {
        "num_draws": len(draws),
        "elbo": elbo.value,
        "elbo_se": elbo.se,
        "khat": _number(khat.value),
        "khat_se": _number(khat.se),
        "ess_fraction": ess.value / len(draws),
        "ess_fraction_se": ess.se / len(draws),
        "verdict": str(draws.verdict),
        "importance_log_evidence": _log_mean_exp(draws.log_weights),
    }
    if posterior.log_evidence is not None:
        found["gap"] = posterior.log_evidence - elbo.value
    if posterior.reference is not None:
        values = columns(draws.posterior(), posterior.reference)
        found["raw"] = distances(values, posterior.reference)
        found["psis"] = distances(values, posterior.reference, np.exp(draws.smoothed_log_weights))
        found["floor"] = noise_floor(posterior.reference)
    return found


def _log_mean_exp(log_weights: Tensor) -> float:
    """An estimate of log Z, with about the relative error of a mean of ESS draws."""
    return float(log_weights.logsumexp(0)) - math.log(len(log_weights))


def _number(value: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value
