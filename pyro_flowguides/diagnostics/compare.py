"""Several posteriors of the same data side by side: guides against each other, and against MCMC."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from . import moments
from .arviz import Coords, Dims
from .draws import Draws, to_numpy
from .loo import joined, loo
from .posterior import Posterior, posterior_of
from .summary import scalars


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
    ``loo_khat``, the worst Pareto shape in it, see :mod:`pyro_flowguides.diagnostics.loo`; ``seconds``. Columns that
    do not apply or are not known are NaN: MCMC has no ELBO, a guide whose weights are constant or without meaning has no k-hat.

    Of a fit with restarts the best by ELBO is compared.

    Arguments:
        posteriors: By name, each a fit (:class:`FitResult`), a guide, :class:`Draws` or a ``pyro.infer.MCMC`` that has run.
        args: The positional arguments of model and guide, where a posterior does not know its own.
        model: The model of guides that are plain functions.
        model_kwargs: The keyword arguments of model and guide.
        reference: The name of the posterior that means and standard deviations are compared with.
        num_samples: The number of draws to make from a fit or a guide.
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
        >>> pyro.clear_param_store()
        >>> exact = fg.AutoCoupling(model).whiten(y)
        >>> wide = pyro.infer.autoguide.AutoNormal(model, init_scale=1.0)
        >>> fg.compare({"exact": exact, "wide": wide}, y, reference="exact", seed=0)["sd_error"].round(1)
        exact    0.0
        wide     0.4
        Name: sd_error, dtype: float64
    """
    found = {
        name: posterior_of(source, args, model_kwargs, model=model, num_samples=num_samples, seed=seed)
        for name, source in posteriors.items()
    }
    return comparison_table(found, reference, coords, dims)


def comparison_table(
    posteriors: Mapping[str, Posterior],
    reference: str | None = None,
    coords: Coords | None = None,
    dims: Dims | None = None,
) -> pd.DataFrame:
    """The table of :func:`compare` for posteriors whose draws have been made."""
    if reference is not None and reference not in posteriors:
        raise ValueError(f"compare: the reference '{reference}' is not among {', '.join(posteriors)}")
    draws = {name: one.best() for name, one in posteriors.items()}
    for (name, one), (other_name, other) in itertools.pairwise(draws.items()):
        _check_data(name, one.observed, other_name, other.observed)
    rows = {name: _row(one) | {"seconds": posteriors[name].seconds} for name, one in draws.items()}
    if reference is not None:
        labelled = {
            name: scalars(one.posterior(), {**one.dims, **(dims or {})}, {**posteriors[name].coords, **(coords or {})})
            for name, one in draws.items()
        }
        for name, row in rows.items():
            row |= _errors(name, labelled[name], reference, labelled[reference])
    return pd.DataFrame.from_dict(rows, orient="index")


def _check_data(name: str, observed: Mapping[str, Tensor], other_name: str, other: Mapping[str, Tensor]) -> None:
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
            raise ValueError(f"{where}: site '{site}' has shape {tuple(other[site].shape)} and {tuple(value.shape)}")
        if not np.allclose(to_numpy(value), to_numpy(other[site]), equal_nan=True):
            raise ValueError(f"{where}: site '{site}' has other values")


def _row(draws: Draws) -> dict[str, float]:
    row = {
        "elbo": draws.elbo.value,
        "elbo_se": draws.elbo.se,
        "khat": draws.khat.value,
        "khat_se": draws.khat.se,
        "ess_fraction": draws.ess.value / len(draws),
    }
    # Without weights, draws of a guide cannot be corrected; nor is a part of the data all of them.
    if (
        draws.log_likelihood
        and set(draws.log_likelihood) >= set(draws.observed)
        and (draws.elbo_error or not draws.weights_error)
    ):
        pointwise = [to_numpy(value).reshape(len(draws), -1) for value in draws.log_likelihood.values()]
        log_ratios = None if draws.elbo_error else draws.weights.log_ratios
        result = joined([loo(each, log_ratios) for each in pointwise])
        return row | {
            "elpd_loo": result.elpd,
            "elpd_loo_se": result.se,
            "loo_khat": float(result.khats.max(initial=-np.inf)),
        }
    return row | dict.fromkeys(("elpd_loo", "elpd_loo_se", "loo_khat"), float("nan"))


def _errors(
    name: str, scalars: Mapping[str, np.ndarray], reference_name: str, reference: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """The worst errors of mean and sd, with their signs."""
    common = [label for label in scalars if label in reference]
    if not common:
        raise ValueError(
            f"compare: '{name}' has no scalar in common with the reference '{reference_name}', whose first are "
            f"{', '.join(list(reference)[:5])}"
        )
    mean_errors, sd_errors = [], []
    for label in common:
        draws, expected = scalars[label], reference[label]
        sd = moments.sd(expected)
        # A scalar that is the same in every draw has no error to measure it by.
        if sd > 0:
            mean_errors.append(float((moments.mean(draws) - moments.mean(expected)) / sd))
            sd_errors.append(float(moments.sd(draws) / sd - 1))
    return {"mean_error": max(mean_errors, key=abs, default=0.0), "sd_error": max(sd_errors, key=abs, default=0.0)}
