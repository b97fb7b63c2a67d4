"""Several posteriors of the same data side by side: guides against each other, and against MCMC."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from . import moments
from .arviz import Coords, Dims
from .draws import Draws
from .importance import Estimate, ImportanceWeights, elbo
from .loo import loo
from .posterior import posterior_of
from .summary import scalars

_UNKNOWN = Estimate(float("nan"), float("nan"))


@dataclass(frozen=True)
class Compared:
    """What a row of the table is made from.

    Attributes:
        scalars: Draws of every scalar by its label, shape (S,).
        observed: The data by site.
        log_likelihood: Of every observation, shape (S, n); None where it is not known.
        elbo: The evidence lower bound; NaN where there is none.
        weights: The importance weights of a guide's draws, if they have any.
        are_exact: Whether these are draws of the posterior itself, as those of MCMC.
        seconds: How long the fit took; NaN where that is not known.
    """

    scalars: Mapping[str, np.ndarray]
    observed: Mapping[str, np.ndarray]
    log_likelihood: np.ndarray | None
    elbo: Estimate
    weights: ImportanceWeights | None
    are_exact: bool
    seconds: float


def compare(
    posteriors: Mapping[str, Any],
    *args: Any,
    model: Callable | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    reference: str | None = None,
    num_samples: int = 4000,
    coords: Coords | None = None,
    dims: Dims | None = None,
    seed: int | None = None,
) -> pd.DataFrame:
    """A table of several posteriors of the same data, one row each.

    Columns: ``elbo`` and ``elbo_se`` in nats; ``khat`` and ``khat_se``; ``ess_fraction``, the effective fraction of the draws;
    ``mean_error``, the worst (mean − mean of the reference) / sd of the reference over all scalars that both have, and
    ``sd_error``, the worst (sd / sd of the reference − 1), both with their signs and of the draws as they are, not weighted;
    ``elpd_loo`` and ``elpd_loo_se``, leave-one-out cross-validation with the correction for draws of a guide, and
    ``loo_khat``, the worst Pareto shape in it, see :mod:`pyro_flowguides.diagnostics.loo`; ``seconds``. What does not apply or
    is not known is NaN: MCMC has no ELBO, a guide whose weights are constant or without meaning has no k-hat.

    Of a fit with restarts the best by ELBO is compared.

    Arguments:
        posteriors: By name, each a :class:`FitResult`, a guide, :class:`Draws` or a ``pyro.infer.MCMC`` that has run.
        args: The positional arguments of model and guide, for what does not know its own.
        model: The model of guides that are plain functions.
        model_kwargs: The keyword arguments of model and guide.
        reference: The name of the posterior that means and standard deviations are compared with.
        num_samples: How many draws to make from a fit or a guide.
        coords: Labels along a dimension, by the name of its plate.
        dims: Names of dimensions, by site, where the plates do not give them.
        seed: Seeds Pyro before each posterior, if given.

    Raises:
        TypeError: if a posterior is none of these.
        ValueError: if the reference is not among them, if they are of different data, or have no scalar in common with it.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyro_flowguides as fg
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> y = torch.tensor(1.0)
        >>> exact = fg.AutoCoupling(model).whiten(y)
        >>> wide = pyro.infer.autoguide.AutoNormal(model, init_scale=1.0)
        >>> fg.compare({"exact": exact, "wide": wide}, y, reference="exact", seed=0)["sd_error"].round(1)
        exact    0.0
        wide     0.4
        Name: sd_error, dtype: float64
    """
    compared = {}
    for name, source in posteriors.items():
        posterior = posterior_of(source, args, model_kwargs, model=model, num_samples=num_samples, seed=seed)
        compared[name] = _compared(posterior.chains, posterior.seconds, coords or {}, dims or {})
    return comparison_table(compared, reference)


def _compared(chains: Sequence[Draws], seconds: float, coords: Coords, dims: Dims) -> Compared:
    are_exact = all(draws.no_elbo for draws in chains)
    if not are_exact:
        chains = [max(chains, key=lambda draws: draws.elbo().value)]
    first = chains[0]
    likelihoods = [
        np.concatenate([draws.log_likelihood[name].reshape(len(draws), -1).cpu().numpy() for draws in chains])
        for name in first.log_likelihood
    ]
    values = {name: np.concatenate([draws.posterior()[name] for draws in chains]) for name in first.posterior()}
    return Compared(
        scalars=scalars(values, {**first.dims, **dims}, coords),
        observed={name: value.cpu().numpy() for name, value in first.observed.items()},
        log_likelihood=np.concatenate(likelihoods, axis=1) if likelihoods else None,
        elbo=_UNKNOWN if are_exact else first.elbo(),
        weights=None if first.no_elbo or first.no_weights else first.weights,
        are_exact=are_exact,
        seconds=seconds,
    )


def compared_from_tree(tree: Any) -> Compared:
    """The same from an ArviZ container that :func:`pyro_flowguides.to_arviz` has made, or MCMC."""

    def group(name: str) -> dict[str, np.ndarray]:
        return {key: tree[name][key].values for key in tree[name].data_vars} if name in tree else {}

    statistics = group("sample_stats")
    num_chains = next(iter(group("posterior").values())).shape[0]
    chosen = list(range(num_chains))
    bound, weights = _UNKNOWN, None
    if "log_q" in statistics:
        log_p, log_q = statistics["lp"], statistics["log_q"]
        chosen = [int((log_p - log_q).mean(1).argmax())]
        bound = elbo((log_p - log_q)[chosen[0]].astype(np.float64))
        if "log_weight" in statistics:
            weights = ImportanceWeights(log_p[chosen[0]], log_q[chosen[0]])

    def drawn(values: np.ndarray) -> np.ndarray:
        return values[chosen].reshape(-1, *values.shape[2:])

    posterior = tree["posterior"]
    likelihoods = [values.reshape(len(values), -1) for values in map(drawn, group("log_likelihood").values())]
    return Compared(
        scalars=scalars(
            {name: drawn(values) for name, values in group("posterior").items()},
            {name: posterior[name].dims[2:] for name in posterior.data_vars},
            {dim: posterior[dim].values for dim in posterior.coords},
        ),
        observed=group("observed_data"),
        log_likelihood=np.concatenate(likelihoods, axis=1) if likelihoods else None,
        elbo=bound,
        weights=weights,
        are_exact="log_q" not in statistics,
        seconds=float(group("variational_fit").get("wall_time", np.nan)),
    )


def comparison_table(compared: Mapping[str, Compared], reference: str | None) -> pd.DataFrame:
    """The table of :func:`compare`."""
    if reference is not None and reference not in compared:
        raise ValueError(f"compare: the reference '{reference}' is not among {', '.join(compared)}")
    for one, other in itertools.pairwise(compared):
        _check_data(one, compared[one].observed, other, compared[other].observed)
    rows = {
        name: _row(one) | (_errors(name, one, reference, compared[reference]) if reference is not None else {})
        for name, one in compared.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def _check_data(
    name: str, observed: Mapping[str, np.ndarray], other_name: str, other: Mapping[str, np.ndarray]
) -> None:
    # The data of a minibatch are not kept.
    if not observed or not other:
        return
    where = f"compare: '{other_name}' is a fit of another model or of other data than '{name}'"
    if set(observed) != set(other):
        raise ValueError(
            f"{where}: the observed sites are {', '.join(sorted(other))} and {', '.join(sorted(observed))}"
        )
    for site, value in observed.items():
        if value.shape != other[site].shape:
            raise ValueError(f"{where}: site '{site}' has shape {other[site].shape} and {value.shape}")
        if not np.allclose(value, other[site], equal_nan=True):
            raise ValueError(f"{where}: site '{site}' has other values")


def _row(one: Compared) -> dict[str, float]:
    khat, ess_fraction = _UNKNOWN, float("nan")
    if one.weights is not None:
        khat, ess_fraction = one.weights.khat(), one.weights.ess().value / len(one.weights)
    row = {
        "elbo": one.elbo.value,
        "elbo_se": one.elbo.se,
        "khat": khat.value,
        "khat_se": khat.se,
        "ess_fraction": ess_fraction,
    }
    # Without weights, draws of a guide cannot be corrected.
    if one.log_likelihood is not None and (one.are_exact or one.weights is not None):
        result = loo(one.log_likelihood, None if one.weights is None else one.weights.log_ratios)
        row |= {"elpd_loo": result.elpd, "elpd_loo_se": result.se, "loo_khat": float(result.khats.max(initial=-np.inf))}
    else:
        row |= dict.fromkeys(("elpd_loo", "elpd_loo_se", "loo_khat"), float("nan"))
    return row | {"seconds": one.seconds}


def _errors(name: str, one: Compared, reference_name: str, reference: Compared) -> dict[str, float]:
    """The worst errors of mean and sd, with their signs."""
    common = [label for label in one.scalars if label in reference.scalars]
    if not common:
        raise ValueError(
            f"compare: '{name}' has no scalar in common with the reference '{reference_name}', whose first are "
            f"{', '.join(list(reference.scalars)[:5])}"
        )
    mean_errors, sd_errors = [], []
    for label in common:
        draws, expected = one.scalars[label], reference.scalars[label]
        sd = moments.sd(expected)
        # A scalar that is the same in every draw has no error to measure it by.
        if sd > 0:
            mean_errors.append(float((moments.mean(draws) - moments.mean(expected)) / sd))
            sd_errors.append(float(moments.sd(draws) / sd - 1))
    return {"mean_error": max(mean_errors, key=abs, default=0.0), "sd_error": max(sd_errors, key=abs, default=0.0)}
