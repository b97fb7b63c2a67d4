"""Draws from a guide, each with its log-density under the guide and under the model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from . import moments
from .arviz import Coords, Dims
from .host import to_numpy as to_numpy
from .importance import UNKNOWN, Estimate, ImportanceWeights, elbo
from .modes import Modes
from .summary import diagnose, scalars, summarize
from .verdicts import Verdict, VerdictKind, after_search, judge


@dataclass(frozen=True)
class Draws:
    """Draws from a guide. Made by :func:`draw`; every tensor has the draws as its first dimension.

    Attributes:
        values: The latent sites of the model, in their own (constrained) space. Sites in a subsampled plate are left out, since
            every minibatch has other ones.
        unconstrained: The same in unconstrained space.
        deterministic: The deterministic sites.
        log_p: The log joint density of model and data, shape (S,).
        log_q: The log-density of the guide, shape (S,).
        log_likelihood: The log-likelihood of every observed site, per observation; empty unless asked for.
        observed: The data.
        dims: The names of a site's dimensions behind the one of the draws, from the names of its plates.
        weights_error: Why these draws have no importance weights, or None if they have: the log-density of the guide is a random
            estimate (a residual flow with ``log_det="hutchinson"``), a latent is a single point, or the data are subsampled. Only
            :attr:`elbo` is available in that case.
        elbo_error: Why there is no ELBO either, or None if there is: the draws have been resampled, or come from MCMC.
        minibatch_size: The number of consecutive draws that share one minibatch of subsampled data; None where nothing is
            subsampled.
        summed_out: The discrete sites that are summed out of all densities here. Each draw of the other sites has one draw of
            them, given these and the data, among the values.
        non_finite_site: The site of model or guide that has no finite density in the first draw whose weight is not finite.

    Where there is no ELBO, k-hat or ESS, these attributes are NaN, and :attr:`verdict` is unknown and says why.
    """

    values: dict[str, Tensor]
    unconstrained: dict[str, Tensor]
    deterministic: dict[str, Tensor]
    log_p: Tensor
    log_q: Tensor
    log_likelihood: dict[str, Tensor]
    observed: dict[str, Tensor]
    dims: dict[str, list[str]]
    weights_error: str | None = None
    elbo_error: str | None = None
    minibatch_size: int | None = None
    non_finite_site: str = ""
    summed_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.log_p)

    @property
    def log_weights(self) -> Tensor:
        """log p − log q, not normalised and not smoothed."""
        return self.log_p - self.log_q

    @property
    def _error(self) -> str | None:
        """Why there are no weights, whatever the reason."""
        return self.elbo_error or self.weights_error

    @functools.cached_property
    def weights(self) -> ImportanceWeights:
        """The importance weights.

        Raises:
            ValueError: if these draws have none, with the reason.
        """
        if self._error:
            raise ValueError(f"These draws have no importance weights: {self._error}")
        return ImportanceWeights(to_numpy(self.log_p), to_numpy(self.log_q), self.non_finite_site)

    @property
    def smoothed_log_weights(self) -> np.ndarray:
        """Pareto-smoothed log weights that add up to 1; raises ValueError where there are none."""
        return self.weights.smoothed_log_weights

    @functools.cached_property
    def elbo(self) -> Estimate:
        """The evidence lower bound, the mean of the log weights, in nats."""
        if self.elbo_error:
            return UNKNOWN
        return elbo(to_numpy(self.log_weights).astype(np.float64), self.minibatch_size)

    def iw_elbo(self, num_weights: int = 10) -> Estimate:
        """The importance-weighted bound with K = ``num_weights``; see :func:`pyro_flowguides.diagnostics.importance.iw_elbo`."""
        return self.weights.iw_elbo(num_weights)

    @property
    def khat(self) -> Estimate:
        """The Pareto shape of the weights' tail, with a bootstrap standard error; NaN where all weights are equal."""
        return UNKNOWN if self._error else self.weights.khat

    @property
    def ess(self) -> Estimate:
        """The effective number of draws, ``1 / Σ w²`` of the smoothed weights, with a bootstrap standard error."""
        return UNKNOWN if self._error else self.weights.ess

    @functools.cached_property
    def verdict(self) -> Verdict:
        """What the weights say about the guide; see :func:`pyro_flowguides.diagnostics.verdicts.judge`.

        It is of all latents but the discrete ones that are summed out.
        """
        return self._judge(None)

    def judge(self, modes: Modes | None) -> Verdict:
        """The verdict with what a search for modes has found: errors include those of the modes that the guide has lost.

        Arguments:
            modes: Of :func:`find_modes` with this guide; None if they were not looked for.
        """
        if modes is None:
            return self.verdict
        return after_search(self._judge(modes) if modes.lost else self.verdict, modes.finding, modes.lost_mass)

    def _judge(self, modes: Modes | None) -> Verdict:
        if self._error:
            return Verdict(VerdictKind.UNKNOWN, UNKNOWN.value, UNKNOWN.value, len(self), self._error)
        values = {name: to_numpy(value) for name, value in self.values.items() if name not in self.summed_out}
        return judge(
            scalars(values, self.dims, {}), self.weights, None if modes is None else modes.unseen(self.dims, {})
        )

    def resample(self, num_samples: int, *, replace: bool = True, seed: int | None = None) -> Draws:
        """Draws of the posterior with equal weights: these, taken with their smoothed weights as probabilities.

        With replacement they have the moments of the weighted draws, up to noise. Without, no draw is taken twice, and the fewer
        are taken the nearer they are to the posterior. Trust them where the verdict is good.

        Arguments:
            num_samples: The number of draws to take.
            replace: Whether a draw may be taken more than once.
            seed: The seed of the choice; by default it follows Pyro's own.

        Raises:
            ValueError: if there are no weights, or there are fewer draws with a weight than are to be taken without replacement.
        """
        rng = np.random.default_rng(int(torch.randint(2**31, ())) if seed is None else seed)
        index = torch.as_tensor(self.weights.resample(num_samples, replace, rng), device=self.log_p.device)
        reason = "the draws have been resampled by their weights, and have equal weights now"
        return dataclasses.replace(self[index], elbo_error=reason)

    def posterior(self) -> dict[str, np.ndarray]:
        """The latent and the deterministic sites as numpy arrays, with integers for sites that are summed out."""
        return {
            name: to_numpy(value.long() if name in self.summed_out else value)
            for name, value in {**self.values, **self.deterministic}.items()
        }

    def mean(self, *, weighted: bool = True) -> dict[str, np.ndarray]:
        """The posterior mean of every site, by the smoothed importance weights, or the mean of the guide's draws as they are."""
        return {name: moments.mean(draws, self._weights(weighted)) for name, draws in self.posterior().items()}

    def sd(self, *, weighted: bool = True) -> dict[str, np.ndarray]:
        """The posterior standard deviation of every site, weighted or not as in :meth:`mean`."""
        return {name: moments.sd(draws, self._weights(weighted)) for name, draws in self.posterior().items()}

    def quantiles(self, quantiles: Sequence[float], *, weighted: bool = True) -> dict[str, np.ndarray]:
        """The posterior quantiles of every site, ``(len(quantiles),) + shape``, weighted or not as in :meth:`mean`."""
        weights = self._weights(weighted)
        return {name: moments.quantiles(draws, quantiles, weights) for name, draws in self.posterior().items()}

    def _weights(self, weighted: bool) -> np.ndarray | None:
        return self.weights.weights if weighted else None

    def to_dataframe(self, *, coords: Coords | None = None, dims: Dims | None = None) -> pd.DataFrame:
        """The draws as a pandas table: a row per draw, a column per latent and deterministic scalar.

        Then follow ``log_p``, ``log_q`` and, where there are weights, ``log_weight``, the smoothed and normalised one.

        Arguments:
            coords: Labels along a dimension, by the name of its plate.
            dims: Names of dimensions, by site, where the plates do not give them.

        Raises:
            ValueError: if labels do not fit, or a site has the name of one of these columns.
        """
        columns = scalars(self.posterior(), {**self.dims, **(dims or {})}, coords or {})
        densities = {name: to_numpy(getattr(self, name)) for name in ("log_p", "log_q")}
        if not self._error and not self.weights.error:
            densities["log_weight"] = self.smoothed_log_weights
        for name in densities:
            if name in columns:
                raise ValueError(
                    f"to_dataframe: a site is called '{name}', as a column of the table is; rename the site"
                )
        return pd.DataFrame({**columns, **densities})

    def summary(
        self,
        *,
        kind: str = "stats",
        quantiles: Sequence[float] = (0.05, 0.5, 0.95),
        weighted: bool = False,
        coords: Coords | None = None,
        dims: Dims | None = None,
        modes: Modes | None = None,
    ) -> pd.DataFrame:
        """A pandas table with one row per latent or deterministic scalar.

        Arguments:
            kind: ``"stats"``: mean, standard deviation and quantiles; ``"diagnostics"``: what the importance weights say about
                them, with estimated errors ``mean_error`` and ``sd_error``, see
                :func:`pyro_flowguides.diagnostics.summary.diagnose`; ``"all"``: both.
            quantiles: Numbers between 0 and 1.
            weighted: Whether to weigh the draws for mean, standard deviation and quantiles; the estimated errors are of the same.
            coords: Labels along a dimension, by the name of its plate.
            dims: Names of dimensions, by site, where the plates do not give them.
            modes: Of :func:`find_modes` with this guide. Where it has lost a mode, the estimated errors include what this does to
                latents; those of deterministic sites are then NaN.

        Raises:
            ValueError: if the kind is unknown; if weights are asked for and the draws have none; if labels do not fit.
        """
        if kind not in ("stats", "diagnostics", "all"):
            raise ValueError(f'summary: kind must be "stats", "diagnostics" or "all", got {kind!r}')
        posterior, names, labels = self.posterior(), {**self.dims, **(dims or {})}, coords or {}
        tables = []
        if kind != "diagnostics":
            tables.append(summarize(posterior, names, labels, quantiles, self._weights(weighted)))
        if kind != "stats":
            unseen = None if modes is None else modes.unseen(names, labels)
            tables.append(diagnose(posterior, names, labels, self.weights, weighted, unseen))
        return pd.concat(tables, axis=1)

    def __getitem__(self, index: slice | Tensor) -> Draws:
        """Some of the draws."""

        def taken(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value[index] for name, value in values.items()}

        return dataclasses.replace(
            self,
            values=taken(self.values),
            unconstrained=taken(self.unconstrained),
            deterministic=taken(self.deterministic),
            log_p=self.log_p[index],
            log_q=self.log_q[index],
            log_likelihood=taken(self.log_likelihood),
        )


def concatenate(parts: Sequence[Draws]) -> Draws:
    """Draws of one model one after the other; what does not vary between draws is taken from the first part."""
    first = parts[0]
    sites: dict[str, Any] = {
        field: {name: torch.cat([getattr(part, field)[name] for part in parts]) for name in getattr(first, field)}
        for field in ("values", "unconstrained", "deterministic", "log_likelihood")
    }
    return dataclasses.replace(
        first,
        **sites,
        log_p=torch.cat([part.log_p for part in parts]),
        log_q=torch.cat([part.log_q for part in parts]),
        non_finite_site=next(filter(None, (part.non_finite_site for part in parts)), ""),
    )
