"""What stands for a posterior: a fit, draws, a guide, a run of MCMC; each becomes chains of draws, and goes to ArviZ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
from pyro.infer import MCMC
from pyro.infer.autoguide import AutoGuide

from ..training.result import FitResult
from .arviz import Coords, Dims
from .draws import Draws
from .export import export
from .predictive import Conditioned, model_groups
from .replay import draws_at
from .sampling import draw


@dataclass(frozen=True)
class Posterior:
    """Chains of draws, with log-likelihoods unless they were given without.

    Attributes:
        chains: Independent fits, or the chains of MCMC.
        conditioned: The model with its arguments; None for draws without one.
        sample_stats: What else is known of every draw, ``(chain, draw)``.
        seconds: How long the fit took; NaN where that is not known.
    """

    chains: list[Draws]
    conditioned: Conditioned | None
    sample_stats: Mapping[str, np.ndarray]
    seconds: float = float("nan")


def posterior_of(
    source: Any,
    args: tuple = (),
    model_kwargs: Mapping[str, Any] | None = None,
    *,
    model: Callable | None = None,
    num_samples: int = 4000,
    seed: int | None = None,
) -> Posterior:
    """Draws from whatever stands for a posterior.

    Arguments:
        source: A :class:`FitResult`, which knows its own arguments; a guide; :class:`Draws`; or a ``pyro.infer.MCMC`` that has
            run, which knows its own arguments too.
        args: The positional arguments of model and guide.
        model_kwargs: Their keyword arguments.
        model: The model, where the source does not know it.
        num_samples: How many draws to make from a fit or a guide.
        seed: Seeds Pyro before drawing, if given.

    Raises:
        TypeError: if the source is none of these.
        ValueError: if the model of a guide is not known, or MCMC has not run or has no model.
    """
    if seed is not None:
        pyro.set_rng_seed(seed)
    if isinstance(source, FitResult):
        conditioned = Conditioned(source.model, source.args, source.model_kwargs)
        return Posterior(source.chains(num_samples), conditioned, {}, source.wall_time)
    if isinstance(source, MCMC):
        return _posterior_of_mcmc(source, model)
    if isinstance(source, Draws):
        return Posterior([source], Conditioned(model, args, model_kwargs or {}) if model else None, {})
    if isinstance(source, AutoGuide):
        model = source.model
    if not callable(source):
        raise TypeError(f"a posterior is a FitResult, Draws, a guide or a pyro.infer.MCMC, not {type(source).__name__}")
    if model is None:
        raise ValueError("a guide that is a plain function does not know its model: give it with model=")
    options: dict[str, Any] = {"num_samples": num_samples, "log_likelihood": True, "seed": seed}
    draws = draw(model, source, *args, model_kwargs=model_kwargs, **options)
    return Posterior([draws], Conditioned(model, args, model_kwargs or {}), {})


def _posterior_of_mcmc(mcmc: MCMC, model: Callable | None) -> Posterior:
    model = mcmc.kernel.model or model
    if mcmc._samples is None:
        raise ValueError("this MCMC has not been run yet")
    if model is None:
        raise ValueError("this MCMC has a potential function and no model: give the model with model=")
    # The arguments of run() have no public name.
    conditioned = Conditioned(model, mcmc._args or (), mcmc._kwargs or {})
    samples = mcmc.get_samples(group_by_chain=True)
    chains = [
        draws_at(
            model,
            {name: values[i] for name, values in samples.items()},
            conditioned.args,
            conditioned.kwargs,
            "they come from MCMC",
        )
        for i in range(mcmc.num_chains)
    ]
    diverging = np.zeros((len(chains), len(chains[0])), dtype=bool)
    divergences = mcmc.diagnostics().get("divergences", {})
    for i in range(len(chains)):
        diverging[i, divergences.get(f"chain {i}", [])] = True
    return Posterior(chains, conditioned, {"diverging": diverging})


def to_arviz(
    source: Any,
    *args: Any,
    model: Callable | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 4000,
    predictive: bool = True,
    prior: bool = True,
    coords: Coords | None = None,
    dims: Dims | None = None,
    seed: int | None = None,
) -> Any:
    """A posterior as ArviZ's ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x), with the same content in both.

    Groups, as far as there is something to put into them: posterior (chain, draw; a chain is an independent fit),
    unconstrained_posterior, sample_stats (``lp``, ``log_q``, ``log_weight``, ``diverging``), log_likelihood,
    posterior_predictive, prior, prior_predictive, observed_data, constant_data, variational_fit. Dimensions are named after
    the plates; none of size 1 is dropped. ``arviz.loo_approximate_posterior`` (1.x) takes ``lp`` and ``log_q`` from there. A
    masked entry has log-likelihood 0; ``arviz.loo`` counts it as an observation without a k-hat, :func:`compare` does not.

    Arguments:
        source: A :class:`FitResult`, :class:`Draws`, any Pyro guide, or a ``pyro.infer.MCMC`` that has run.
        args: The positional arguments of model and guide; a fit and MCMC know theirs.
        model: The model, where the source does not know it; for :class:`Draws`, to have the groups that need it.
        model_kwargs: The keyword arguments of model and guide.
        num_samples: How many draws to make from a fit or a guide.
        predictive: Whether to sample new data at every draw.
        prior: Whether to sample from the prior as well.
        coords: Labels along a dimension, by the name of its plate.
        dims: Names of dimensions, by site, where the plates do not give them.
        seed: Seeds Pyro first, if given.

    Raises:
        TypeError: if the source is none of these.
        ValueError: if the model is not known; if names clash or labels do not fit, see
            :func:`pyro_flowguides.diagnostics.arviz.to_tree`.
    """
    if isinstance(source, FitResult):
        if seed is not None:
            pyro.set_rng_seed(seed)
        return source.to_arviz(num_samples, predictive=predictive, prior=prior, coords=coords, dims=dims)
    posterior = posterior_of(source, args, model_kwargs, model=model, num_samples=num_samples, seed=seed)
    conditioned = posterior.conditioned
    groups = model_groups(conditioned, posterior.chains, predictive=predictive, prior=prior) if conditioned else {}
    return export(
        posterior.chains,
        more_groups=groups,
        sample_stats=posterior.sample_stats,
        coords=coords,
        dims=dims,
        attrs={"name": conditioned.name} if conditioned else None,
    )
