r"""Discrete latents, summed out.

The model is run once with all values of its discrete latents z side by side, as Pyro's ``TraceEnum_ELBO`` runs it
(``config_enumerate`` and ``poutine.enum``; ``pyro.markov`` reuses dimensions). The log-probabilities of the sites are factors of

.. math:: \log p(\theta, y) = \log \sum_z p(\theta, z, y),

and :mod:`.sum_product` sums over z. What it keeps on the way gives draws from :math:`p(z \mid \theta, y)`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions import Categorical
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from .. import internals
from .recording import LargestTensor, TooLargeError
from .sites import (
    is_deterministic,
    latent_sites,
    max_plate_nesting,
    observed_sites,
    quiet_trace,
    tensor_sites,
)
from .sum_product import IMPOSSIBLE, Factor, Plate, components, draw, eliminate

# The largest tensor of one draw may have this many elements, or this multiple of the largest one without enumeration.
MAX_ELEMENTS = 2**22
MAX_GROWTH = 64


class Marginal(NamedTuple):
    """A run of the model whose discrete latents are summed out.

    Attributes:
        log_joint: The log joint density of everything else, a scalar.
        trace: A run at one draw of the discrete latents.
        log_likelihood: The log-likelihood of observed sites that depend on discrete latents, over their batch shape, where every
            observation has one of its own.
    """

    log_joint: Tensor
    trace: Trace
    log_likelihood: dict[str, Tensor]


def sites_to_sum_out(trace: Trace, given: Collection[str]) -> tuple[str, ...]:
    """The discrete latents of a model that nobody gives a value.

    Arguments:
        trace: A trace of the model.
        given: The names of the sites that a guide supplies.

    Raises:
        ValueError: if the values of one of them cannot be listed, or a continuous latent lacks a value too.
    """
    left_out = [(name, site) for name, site in latent_sites(trace) if name not in given]
    discrete = [name for name, site in left_out if site["fn"].support.is_discrete]
    for name, site in left_out:
        if name in discrete:
            check_can_be_summed_out(site)
        elif discrete:
            raise ValueError(
                f"the guide leaves out the continuous site '{name}', while the discrete site '{discrete[0]}' is summed out; give "
                "the guide all continuous latents of the model"
            )
    return tuple(discrete)


def check_can_be_summed_out(site: Any) -> None:
    """Raises ValueError unless the values of a discrete site can be listed."""
    fn, reason = site["fn"], "has infinitely many values, or values that Pyro cannot list"
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    if site["fn"].has_enumerate_support:
        try:
            site["fn"].enumerate_support(expand=False)
            return
        except NotImplementedError as error:
            reason = f"has values that cannot be listed ({error})"
    raise ValueError(
        f"the latent site '{site['name']}' is discrete, {type(fn).__name__}, and {reason}, so that it cannot be summed out. Ways "
        "out: Categorical or Binomial over the values that matter; a plate in the place of to_event; the marginal distribution, "
        "such as GammaPoisson for a Poisson with a Gamma rate; a guide of your own that gives the site"
    )


def is_summed_out(site: Any) -> bool:
    """Whether a guide leaves out a latent site because it is discrete.

    Raises:
        ValueError: if the site cannot be summed out.
    """
    if not site["fn"].support.is_discrete:
        return False
    check_can_be_summed_out(site)
    return True


class _Mark(Messenger):
    """Marks the sites to enumerate, whatever the model says of them.

    Arguments:
        supports: The values of each site, which need not be computed in the run: Binomial looks at its numbers for it.
    """

    def __init__(self, supports: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.supports = supports

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.supports:
            return
        infer = {key: value for key, value in msg["infer"].items() if key != "num_samples"}
        msg["infer"] = {**infer, "enumerate": "parallel", "expand": False}
        # Pyro knows a Categorical by its support.
        if not isinstance(msg["fn"], Categorical):
            fn, support = copy.copy(msg["fn"]), self.supports[msg["name"]]
            value = support.reshape(len(support), *[1] * len(fn.batch_shape), *fn.event_shape)
            fn.enumerate_support = lambda expand: value
            msg["fn"] = fn


class Enumeration:
    """The discrete latents of a model that are summed out.

    Arguments:
        prototype: A trace of one run of the model.
        names: The sites to sum out.

    Attributes:
        without_log_likelihood: For observed sites whose observations have no log-likelihood of their own, why; known after
            :meth:`check`.
    """

    def __init__(self, prototype: Trace, names: Sequence[str]) -> None:
        sites: dict[str, Any] = dict(tensor_sites(prototype))
        self.names = tuple(names)
        self.nesting = max([max_plate_nesting(prototype), *[len(site["fn"].batch_shape) for site in sites.values()]])
        self.without_log_likelihood: dict[str, str] = {}
        self._shapes = {name: site["fn"].batch_shape for name, site in sites.items()}
        self._data = {name for name, _ in observed_sites(prototype)}
        self._supports = {}
        for name in names:
            self._check_plates(sites[name])
            values = sites[name]["fn"].enumerate_support(expand=False)
            self._supports[name] = values.reshape(len(values), *sites[name]["fn"].event_shape)

    @classmethod
    def of(cls, prototype: Trace, given: Collection[str]) -> Enumeration | None:
        """The discrete latents that nobody gives a value; None if there are none, see :func:`sites_to_sum_out`."""
        names = sites_to_sum_out(prototype, given)
        return cls(prototype, names) if names else None

    @staticmethod
    def _check_plates(site: Any) -> None:
        dims = {frame.dim for frame in site["cond_indep_stack"]}
        shape = site["fn"].batch_shape
        for dim in range(-len(shape), 0):
            if shape[dim] > 1 and dim not in dims:
                raise ValueError(
                    f"the discrete site '{site['name']}' has batch shape {tuple(shape)}, of which dimension {dim} is in no "
                    "plate; put the site into a pyro.plate, so that its elements can be summed out one by one"
                )

    # --- what it computes --------------------------------------------------------------------------------------------------

    def log_joint(self, model: Callable[[], Any]) -> Tensor:
        """The log joint density with the discrete latents summed out, a scalar, with scales and masks.

        Arguments:
            model: The model, which needs no arguments and has a value for every continuous latent.
        """
        return self._factors(model).log_joint()

    def marginal(self, model: Callable[[], Any]) -> Marginal:
        """The same with a draw of the discrete latents given everything else, and the log-likelihoods.

        Arguments:
            model: As for :meth:`log_joint`. The indices of subsampled plates have values, too.
        """
        factors = self._factors(model)
        trace = self._trace_at(model, factors, factors.draw())
        found = factors.log_likelihoods()
        return Marginal(
            factors.log_joint(),
            trace,
            {name: value.reshape(self._shapes[name]) for name, value in found.items() if isinstance(value, Tensor)},
        )

    def check(self, model: Callable[[], Any]) -> None:
        """Finds out whether the sum can be had.

        Arguments:
            model: As for :meth:`marginal`.

        Raises:
            ValueError: if the model cannot be run with all values of its discrete latents at once, has another log-probability
                then than for single values, or if there are too many combinations.
        """
        with quiet_trace():
            with LargestTensor() as plain:
                poutine.trace(model).get_trace().compute_log_prob()
            sites = self._describe()
            try:
                with LargestTensor(max(MAX_ELEMENTS, MAX_GROWTH * plain.largest)) as enumerated:
                    factors = self._factors(model)
                    factors.log_joint()
            except TooLargeError:
                raise ValueError(
                    f"the values of {sites} have too many combinations to sum over: a tensor has {enumerated.largest:,} numbers "
                    "for each draw. Ways out: pyro.markov around the steps of a chain; a pyro.plate for sites that are "
                    "independent; fewer values"
                ) from None
            except (RuntimeError, IndexError, TypeError, AssertionError, NotImplementedError) as error:
                message = " ".join(str(error).split("Trace Shapes:")[0].split())[:300]
                raise ValueError(
                    f"the model cannot be run with all values of {sites} at once, each with a dimension of its own on the left: "
                    f"{message or type(error).__name__}. Index by Vindex of pyro.ops.indexing, write torch.where for an if, and "
                    "put what is independent into plates (Pyro's tutorial on enumeration)"
                ) from error
            indices = factors.draw()
            factors.compare(self._trace_at(model, factors, indices), indices)
            found = factors.log_likelihoods()
            self.without_log_likelihood = {name: each for name, each in found.items() if isinstance(each, str)}

    def _describe(self) -> str:
        names = ", ".join(f"'{name}'" for name in self.names[:3]) + ", …" * (len(self.names) > 3)
        return f"{len(self.names)} discrete sites ({names})" if len(self.names) > 1 else f"the discrete site {names}"

    def _factors(self, model: Callable[[], Any]) -> _Factors:
        enumerated = poutine.enum(_Mark(self._supports)(model), first_available_dim=-1 - self.nesting)
        return _Factors(poutine.trace(enumerated).get_trace(), self.names, self._data, self.nesting)

    def _trace_at(self, model: Callable[[], Any], factors: _Factors, indices: Mapping[str, Factor]) -> Trace:
        """A run of the model at one value of every discrete latent.

        The values have the dimensions of enumeration, with size 1: an index without dimensions cannot be recorded.
        """
        values = {}
        for name in self.names:
            support, shape = self._supports[name], self._shapes[name]
            # A site of one value is no variable.
            index = indices[name].value if name in indices else support.new_zeros(shape.numel(), dtype=torch.long)
            padding = [1] * (1 + self.nesting - len(shape))
            values[name] = support.index_select(0, index.reshape(-1)).reshape(*padding, *shape, *support.shape[1:])
        return poutine.trace(poutine.condition(model, data=values)).get_trace()


class _Factors:
    """The log-probabilities of an enumerated run.

    Arguments:
        trace: Of the enumerated run.
        names: The sites that are summed out.
        data: The sites that hold data.
        nesting: The number of batch dimensions to the right of those of enumeration.
    """

    def __init__(self, trace: Trace, names: Sequence[str], data: Collection[str], nesting: int) -> None:
        self.sites = _with_log_prob(trace)
        self._names, self._data, self._nesting = names, data, nesting
        self._variables = {internals.enumeration_id(self.sites[name]): name for name in names}
        self._factors = {name: self._factor(site) for name, site in self.sites.items()}
        self._plates_of = {name: self._factors[name].plates for name in names}
        self._groups = components(factor for factor in self._factors.values() if factor.variables)
        for group in self._groups:
            self._check(group)
        self._eliminated = [eliminate(group, self._plates_of) for group in self._groups]

    def _factor(self, site: Any) -> Factor:
        """The log-probability of a site, without its scale."""
        value = self._unscaled(site)
        plates = {frame.dim: frame.name for frame in site["cond_indep_stack"] if frame.vectorized}
        ids = internals.enumeration_ids(site)
        dims: list[str | Plate] = []
        for dim in range(-value.dim(), 0):
            if value.shape[dim] == 1:
                continue
            if dim >= -self._nesting:
                dims.append(Plate(plates.get(dim, f"dimension {dim} of {site['name']}"), dim))
            elif dim in ids:
                dims.append(self._variables[ids[dim]])
            else:
                raise ValueError(
                    f"site '{site['name']}' has batch dimension {dim} of size {value.shape[dim]}, which is of no plate and of no "
                    "discrete site; index by Vindex of pyro.ops.indexing, and use the sites of a pyro.markov loop within the loop"
                )
        return Factor(value.reshape([size for size in value.shape if size > 1]), tuple(dims), site["name"])

    def _unscaled(self, site: Any) -> Tensor:
        # A discrete latent adds up to 1 where it is masked, too.
        mask = None if site["name"] in self._names else site["mask"]
        return scale_and_mask(site["unscaled_log_prob"], mask=mask)

    def _check(self, group: Sequence[Factor]) -> None:
        """Raises ValueError unless the factors of a group can be summed together."""
        first = group[0].site
        for factor in group:
            for name in factor.variables:
                if missing := self._plates_of[name] - factor.plates:
                    raise ValueError(
                        f"site '{factor.site}' depends on the discrete site '{name}' and is outside of its plate "
                        f"'{min(missing).name}', so that all combinations of its elements count; put '{factor.site}' into "
                        "the plate"
                    )
            scale, other = _number(self.sites[factor.site]), _number(self.sites[first])
            if scale != other:
                raise ValueError(
                    f"site '{factor.site}' counts {scale:g} times and '{first}' {other:g} times (a subsampled plate, or "
                    "poutine.scale), and both depend on the same discrete sites: the log of a sum over their values cannot be "
                    "estimated from a part of the data. Put the discrete sites into the plate, or use all data"
                )

    # --- what they add up to -----------------------------------------------------------------------------------------------

    def log_joint(self) -> Tensor:
        """log p of everything but the variables, with scales and masks."""
        total = sum(self.sites[name]["log_prob"].sum() for name, each in self._factors.items() if not each.variables)
        for group, (left, _) in zip(self._groups, self._eliminated, strict=True):
            summed: Any = sum(factor.value.sum() for factor in left)
            summed = torch.where(summed > IMPOSSIBLE / 2, summed, -torch.inf)
            # The scale is outside of the logarithm.
            total = total + scale_and_mask(summed, self.sites[group[0].site]["scale"])
        return torch.as_tensor(total)

    def draw(self) -> dict[str, Factor]:
        """For each variable the number of a value, over its plates from the left to the right."""
        indices = {name: index for _, tables in self._eliminated for name, index in draw(tables).items()}
        return {name: _summed([index], index.plates) for name, index in indices.items()}

    def log_likelihoods(self) -> dict[str, Tensor | str]:
        """log p(y_i | θ) of each observation i of the data that depend on a variable; or why there is none."""
        found: dict[str, Tensor | str] = {}
        for group, (left, _) in zip(self._groups, self._eliminated, strict=True):
            data = [factor for factor in group if factor.site in self._data]
            shared = frozenset.intersection(*[factor.plates for factor in group])
            for factor in data:
                if len(data) > 1:
                    other = next(each.site for each in data if each is not factor)
                    found[factor.site] = f"shares a discrete site with the data of '{other}'"
                elif factor.plates != shared:
                    name = next(name for name in self._names if any(name in each.variables for each in group))
                    found[factor.site] = f"shares the discrete site '{name}' between its observations"
                else:
                    found[factor.site] = self._likelihood(group, factor, left, shared)
        return found

    def _likelihood(
        self, group: Sequence[Factor], data: Factor, left: Sequence[Factor], plates: Collection[Plate]
    ) -> Tensor:
        joint = _summed(left, plates).value
        others = [factor for factor in group if factor is not data]
        if all(factor.site in self._names for factor in others):
            return joint
        # Without the data, continuous latents that depend on the variables still count.
        return joint - _summed(eliminate(others, self._plates_of)[0], plates).value

    def compare(self, trace: Trace, indices: Mapping[str, Factor]) -> None:
        """Raises ValueError unless every site has the log-probability of a run at single values of the variables.

        Arguments:
            trace: The run.
            indices: The numbers of the values.
        """
        for name, site in _with_log_prob(trace).items():
            factor = self._factors[name]
            for variable in factor.variables:
                factor = factor.at(variable, indices[variable])
            together, alone = factor.value.sum(), self._unscaled(site).sum()
            if not torch.allclose(together, alone, rtol=1e-3, atol=1e-3, equal_nan=True):
                raise ValueError(
                    f"site '{name}' has log-probability {float(together):.6g} where all values of the discrete sites are run "
                    f"at once, and {float(alone):.6g} at the same values alone: the model mixes the values, by a sum over a "
                    "plate for example. Their dimensions are on the left of those of the plates"
                )


def _with_log_prob(trace: Trace) -> dict[str, Any]:
    """The sample sites of a trace that count, with their log-probabilities."""
    sites = {name: site for name, site in tensor_sites(trace) if not is_deterministic(site)}
    trace.compute_log_prob(lambda name, _: name in sites)
    return sites


def _summed(factors: Sequence[Factor], plates: Collection[Plate]) -> Factor:
    """The product of factors without variables, in log space the sum, over plates from the left to the right."""
    dims = tuple(sorted(plates, key=lambda plate: plate.dim))
    parts = [factor.total_over(factor.plates - set(plates)).over(dims) for factor in factors]
    return Factor(sum(parts[1:], parts[0]), dims)


def _number(site: Any) -> float:
    """The scale of a site."""
    scale = site["scale"]
    if isinstance(scale, Tensor) and scale.dim():
        raise ValueError(
            f"site '{site['name']}' has a scale of shape {tuple(scale.shape)} and depends on a discrete site, whose sum can be "
            "scaled as a whole only; give poutine.scale a number"
        )
    return float(scale)
