"""A posterior of the benchmark with its answers, and the names of its parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor


@dataclass(frozen=True)
class Reference:
    """The right answer for the scalars of a posterior.

    Attributes:
        names: The scalars: ``mu``, ``theta[1]`` (counted from 1), ``log K_m`` for a scalar that is judged on the log scale.
        draws: Draws from the posterior, shape (S, scalars).
        mean: The means, exact or of the draws, shape (scalars,).
        sd: The standard deviations, likewise.
    """

    names: tuple[str, ...]
    draws: np.ndarray
    mean: np.ndarray
    sd: np.ndarray

    @classmethod
    def from_draws(cls, names: tuple[str, ...], draws: np.ndarray) -> Reference:
        return cls(names, draws, draws.mean(0), draws.std(0, ddof=1))


@dataclass(frozen=True)
class KnownPosterior:
    """A model with its data, and the known answers about its posterior.

    Attributes:
        name: The name in tables and files.
        model: The Pyro model, which must accept batch dimensions on the left of every latent.
        args: Its arguments.
        reference: The right answer, or None.
        latents: Draws from the posterior for every latent site, with the draws as the first dimension, or None.
        log_evidence: log Z of the model's density as it is written, in nats, or None.
    """

    name: str
    model: Callable
    args: tuple[Tensor, ...] = ()
    reference: Reference | None = None
    latents: Mapping[str, Tensor] | None = None
    log_evidence: float | None = None


def tensor(values: Any) -> Tensor:
    """Numbers of any type in the default dtype, on the default device."""
    return torch.tensor(np.asarray(values, dtype=np.float64), dtype=torch.get_default_dtype())


def flat(distribution: dist.TorchDistribution) -> dist.TorchDistribution:
    """The improper density 1 on the support of a distribution, which only serves for the start of a guide."""
    return distribution.mask(False)


def scalar(values: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The draws of one scalar, from arrays by site with the draws as their first dimension.

    Raises:
        KeyError: if there is no such site.
    """
    logarithm, site, index = re.fullmatch(r"(log )?([^\[]+)(?:\[([\d,]+)\])?", name).groups()
    if site not in values:
        raise KeyError(f"scalar '{name}' belongs to no site; there are {', '.join(values)}")
    indices = [int(i) - 1 for i in index.split(",")] if index else []
    draws = values[site][(slice(None), *indices)]
    return np.log(draws) if logarithm else draws


def by_site(scalars: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by site, from the draws of scalars such as ``theta[1]``: the inverse of :func:`scalar`."""
    sites: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
    for name, draws in scalars.items():
        site, _, index = name.rstrip("]").partition("[")
        sites.setdefault(site, {})[tuple(int(i) - 1 for i in index.split(",")) if index else ()] = draws
    arrays = {}
    for site, parts in sites.items():
        shape = tuple(1 + max(index) for index in zip(*parts, strict=True))
        first = next(iter(parts.values()))
        arrays[site] = np.full((len(first), *shape), np.nan)
        for index, draws in parts.items():
            arrays[site][(slice(None), *index)] = draws
    return arrays
