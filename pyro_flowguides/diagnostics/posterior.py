"""Whatever stands for a posterior: a fit, draws, a guide, a run of MCMC; each becomes chains of draws, and goes to ArviZ."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import MCMC
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from ..checks import version
from ..internals import has_run, mcmc_arguments
from ..model.call import ModelCall
from .arviz import Coords, Dims, Group, to_tree
from .draws import Draws, concatenate
from .groups import completed_dims, draws_groups, model_groups, stack_numbered
from .replay import draws_at
from .sampling import draw
from .verdicts import Verdict, after_search


@dataclass(frozen=True)
class Posterior:
    """Chains of draws with the model that they are of.

    Attributes:
        chains: Independent fits, or the chains of MCMC, all of the same number of draws.
        call: The model with its arguments; None for draws without one.
        sample_stats: More statistics of every draw, ``(chain, draw)``.
        groups: More groups for ArviZ.
        attrs: More attributes for ArviZ.
        coords: Labels along a dimension, where they are known.
        seconds: The time that the fit took; NaN where it is not known.
        modes: What a search for other modes has found, and the fraction of the mass that was lost; None where there was none.
    """

    chains: Sequence[Draws]
    call: ModelCall | None = None
    sample_stats: Mapping[str, np.ndarray] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    coords: Coords = field(default_factory=dict)
    seconds: float = float("nan")
    modes: tuple[str, float] | None = None

    def best(self) -> Draws:
        """The draws of the best fit by its ELBO; of MCMC, which has none, the draws of all chains."""
        if all(chain.elbo_error for chain in self.chains):
            return concatenate(self.chains)
        return max(self.chains, key=lambda chain: chain.elbo.value)

    @property
    def verdict(self) -> Verdict:
        """The verdict on the best fit, with what a search for modes has found."""
        verdict = self.best().verdict
        return verdict if self.modes is None else after_search(verdict, *self.modes)


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
        source: A fit, which knows its own arguments; a guide; :class:`Draws`; a ``pyro.infer.MCMC`` that has run, which knows
            its own arguments too; or any other object with a method ``to_posterior(num_samples)`` that returns a
            :class:`Posterior`.
        args: The positional arguments of model and guide.
        model_kwargs: The keyword arguments of model and guide.
        model: The model, where the source does not know it.
        num_samples: The number of draws to make from a fit or a guide.
        seed: Seeds Pyro before drawing, if given.

    Raises:
        TypeError: if the source is none of these.
        ValueError: if the model of a guide is not known, or MCMC has not run or has no model.
    """
    if seed is not None:
        pyro.set_rng_seed(seed)
    if hasattr(source, "to_posterior"):
        return source.to_posterior(num_samples)
    if isinstance(source, MCMC):
        return _posterior_of_mcmc(source, model)
    if isinstance(source, AutoGuide):
        model = source.model
    call = None if model is None else ModelCall.given("draw", model, args, model_kwargs)
    if isinstance(source, Draws):
        return Posterior([source], call)
    if not callable(source):
        raise TypeError(f"a posterior is a fit, Draws, a guide or a pyro.infer.MCMC, not {type(source).__name__}")
    if call is None:
        raise ValueError("a guide that is a plain function does not know its model: give it with model=")
    options: dict[str, Any] = {"num_samples": num_samples, "log_likelihood": True, "seed": seed}
    with call.explaining("draw"):
        return Posterior([draw(call.model, source, *call.args, model_kwargs=call.kwargs, **options)], call)


def _posterior_of_mcmc(mcmc: MCMC, model: Callable | None) -> Posterior:
    model = mcmc.kernel.model or model
    if not has_run(mcmc):
        raise ValueError("this MCMC has not been run yet")
    if model is None:
        raise ValueError("this MCMC has a potential function and no model: give the model with model=")
    call = ModelCall.given("to_arviz", model, *mcmc_arguments(mcmc))
    samples = mcmc.get_samples(group_by_chain=True)
    chains = [
        draws_at(call, {name: values[i] for name, values in samples.items()}, "the draws come from MCMC")
        for i in range(mcmc.num_chains)
    ]
    diverging = np.zeros((len(chains), len(chains[0])), dtype=bool)
    divergences = mcmc.diagnostics().get("divergences", {})
    for i in range(len(chains)):
        diverging[i, divergences.get(f"chain {i}", [])] = True
    return Posterior(chains, call, {"diverging": diverging})


def posterior_from_tree(tree: Any) -> Posterior:
    """The posterior in an ArviZ container of :func:`to_arviz`, or of any MCMC; without its model.

    Raises:
        KeyError: if there is no group posterior.
    """

    def group(name: str) -> dict[str, np.ndarray]:
        return {key: tree[name][key].values for key in tree[name].data_vars} if name in tree else {}

    def chain_of(name: str, chain: int) -> dict[str, Tensor]:
        return {key: torch.as_tensor(values[chain]) for key, values in group(name).items()}

    posterior = tree["posterior"]
    attrs = posterior.attrs
    summed_out = tuple(map(str, np.atleast_1d(attrs.get("summed_out", ()))))
    num_chains, num_samples = next(iter(group("posterior").values())).shape[:2]
    statistics = group("sample_stats")
    unknown = np.full((num_chains, num_samples), np.nan)
    chains = [
        Draws(
            values=chain_of("posterior", i),
            unconstrained=chain_of("unconstrained_posterior", i),
            deterministic={},
            log_p=torch.as_tensor(statistics.get("lp", unknown)[i]),
            log_q=torch.as_tensor(statistics.get("log_q", unknown)[i]),
            log_likelihood=chain_of("log_likelihood", i),
            observed={name: torch.as_tensor(value) for name, value in group("observed_data").items()},
            dims={name: list(posterior[name].dims[2:]) for name in posterior.data_vars},
            weights_error=None if "log_weight" in statistics else "the file has no log_weight",
            elbo_error=None
            if "log_q" in statistics
            else "the file has no log_q: these are draws of the posterior itself",
            summed_out=summed_out,
        )
        for i in range(num_chains)
    ]
    seconds = float(group("variational_fit").get("wall_time", np.nan))
    kept = {name: Group(group(name)) for name in ("posterior_predictive", "variational_fit") if name in tree}
    coords = {dim: posterior[dim].values for dim in posterior.coords}
    modes = (str(attrs["modes"]), float(attrs["lost_mass"])) if "lost_mass" in attrs else None
    return Posterior(chains, groups=kept, attrs=attrs, coords=coords, seconds=seconds, modes=modes)


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
    posterior_predictive, prior, prior_predictive, observed_data, constant_data, and variational_fit for a fit (the ELBO of every
    step, ``num_skipped`` steps, ``num_rolled_back``, ``wall_time`` in seconds, k-hat and final ELBO of every chain). Where modes
    were looked for, the attribute ``modes`` says what was found, and ``lost_mass`` is the fraction of the mass lost. Dimensions
    are named after the plates; none of size 1 is dropped. ``arviz.loo_approximate_posterior`` (1.x) takes ``lp`` and ``log_q``
    from there. Observed sites that are numbered, such as ``obs_0``, ``obs_1``, … of a loop over data, are one variable ``obs``
    with a dimension ``obs_number``. A masked entry has log-likelihood 0; ``arviz.loo`` counts it as an observation without a
    k-hat, :func:`compare` does not.

    Arguments:
        source: A fit (:class:`FitResult`), :class:`Draws`, any Pyro guide, or a ``pyro.infer.MCMC`` that has run.
        args: The positional arguments of model and guide; a fit and MCMC know theirs.
        model: The model, where the source does not know it; for :class:`Draws`, to have the groups that need it.
        model_kwargs: The keyword arguments of model and guide.
        num_samples: The number of draws to make from a fit or a guide.
        predictive: Whether to sample new data at every draw.
        prior: Whether to sample from the prior as well.
        coords: Labels along a dimension, by the name of its plate.
        dims: Names of dimensions, by site, where the plates do not give them.
        seed: Seeds Pyro first, if given.

    Raises:
        TypeError: if the source is none of these.
        ValueError: if the model is not known; if chains are of different models, names are given for an unknown site, names
            clash or labels do not fit, see :func:`pyro_flowguides.diagnostics.arviz.to_tree`.
    """
    posterior = posterior_of(source, args, model_kwargs, model=model, num_samples=num_samples, seed=seed)
    chains, call = posterior.chains, posterior.call
    groups = draws_groups(chains, dims or {}, posterior.sample_stats)
    given = completed_dims(chains[0], dims or {})
    more = model_groups(call, chains, predictive=predictive, prior=prior) if call else {}
    for name, group in {**more, **posterior.groups}.items():
        groups[name] = dataclasses.replace(group, dims={**group.dims, **given})
    unknown = set(given) - {name for group in groups.values() for name in group.variables}
    if unknown:
        known = ", ".join(chains[0].dims)
        raise ValueError(f"to_arviz: dims names '{min(unknown)}', which is no site; there are {known}")
    groups, numbers = stack_numbered(groups)
    attrs = {
        "creation_library": "pyro_flowguides",
        "creation_library_version": version(),
        "creation_library_language": "Python",
        "inference_library": "pyro-ppl",
        "inference_library_version": pyro.__version__,
        "modeling_interface": "pyro_flowguides",
        "modeling_interface_version": version(),
        "torch_version": str(torch.__version__),
        "python_version": platform.python_version(),
        "sampled_variables": [name.replace("/", ".") for name in chains[0].values],
        **({"name": call.name} if call else {}),
        **({"summed_out": [name.replace("/", ".") for name in chains[0].summed_out]} if chains[0].summed_out else {}),
        **posterior.attrs,
        **({"modes": posterior.modes[0], "lost_mass": posterior.modes[1]} if posterior.modes else {}),
    }
    return to_tree(groups, {**numbers, **_column_labels(call, chains[0]), **(coords or {})}, attrs)


def _column_labels(call: ModelCall | None, draws: Draws) -> dict[str, tuple[str, ...]]:
    """The names of the columns of frames among the arguments, for the plates that have an element for each column."""
    columns = {} if call is None else call.columns
    values = {name: value.shape[1:] for name, value in {**draws.values, **draws.deterministic}.items()}
    shapes = {**values, **{name: value.shape for name, value in draws.observed.items()}}
    sizes = {
        dim: size
        for name, shape in shapes.items()
        for index, (dim, size) in enumerate(zip(draws.dims.get(name, ()), shape, strict=False))
        if dim != f"{name}_dim_{index}"
    }
    # Two frames of as many columns say nothing about which of them a plate is over.
    lengths = [len(labels) for labels in columns.values()]
    return {
        dim: labels
        for dim, size in sizes.items()
        for labels in columns.values()
        if len(labels) == size and lengths.count(size) == 1
    }
