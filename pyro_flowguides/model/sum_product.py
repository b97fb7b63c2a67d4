"""Sums over discrete variables of products of factors, in log space, and draws of the variables.

A factor is a tensor with a name for each of its dimensions: a discrete variable, or a plate along which the factors are
independent. Variables are eliminated one by one: those in most plates first, and among these the one whose elimination takes
the smallest table, which for a chain is the forward (or backward) algorithm, and for a tree goes from the leaves to the root.
Obermeyer et al. (2019), *Tensor variable elimination for plated factor graphs*, arXiv:1902.03210.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# A log-probability that stands for −inf on the way, where it would make gradients NaN.
IMPOSSIBLE = -1e30


class Plate(NamedTuple):
    """A plate, or a batch dimension that is declared by none.

    Attributes:
        name: Its name.
        dim: Its batch dimension, counted from the right.
    """

    name: str
    dim: int


@dataclass(frozen=True, eq=False)
class Factor:
    """A log-probability with named dimensions, none of size 1.

    Attributes:
        value: The tensor.
        dims: For each of its dimensions, the name of a variable or a plate.
        site: The site that it is of; empty for one that has been computed.
    """

    value: Tensor
    dims: tuple[str | Plate, ...]
    site: str = ""

    @property
    def variables(self) -> frozenset[str]:
        """The variables that it depends on."""
        return frozenset(dim for dim in self.dims if isinstance(dim, str))

    @property
    def plates(self) -> frozenset[Plate]:
        """The plates that it is in."""
        return frozenset(dim for dim in self.dims if isinstance(dim, Plate))

    def over(self, dims: Sequence[str | Plate]) -> Tensor:
        """The tensor with all of these dimensions in this order, of size 1 where it does not depend on one."""
        value, order = self.value, [self.dims.index(dim) for dim in dims if dim in self.dims]
        if order != sorted(order):
            value = value.permute(order)
        for axis, dim in enumerate(dims):
            if dim not in self.dims:
                value = value.unsqueeze(axis)
        return value

    def total_over(self, plates: Collection[Plate]) -> Factor:
        """The product, in log space the sum, along plates."""
        axes = [axis for axis, dim in enumerate(self.dims) if dim in plates]
        if not axes:
            return self
        return Factor(self.value.sum(axes), tuple(dim for dim in self.dims if dim not in plates), self.site)

    def at(self, variable: str, index: Factor) -> Factor:
        """What is left at a value of a variable, for each element of the plates.

        Arguments:
            variable: The variable.
            index: The number of its value, over plates that this factor is in.
        """
        if variable not in self.dims:
            return self
        axis = self.dims.index(variable)
        shape = [1 if dim == variable else size for dim, size in zip(self.dims, self.value.shape, strict=True)]
        value = self.value.gather(axis, index.over(self.dims).expand(shape)).squeeze(axis)
        return Factor(value, tuple(dim for dim in self.dims if dim != variable), self.site)


class Table(NamedTuple):
    """A step of the elimination: all that depends on a variable, before the sum over it."""

    variable: str
    factor: Factor


def components(factors: Iterable[Factor]) -> list[list[Factor]]:
    """The factors in groups that have no variable in common."""
    found: list[tuple[frozenset[str], list[Factor]]] = []
    for factor in factors:
        variables, group = factor.variables, [factor]
        for other in [each for each in found if each[0] & variables]:
            found.remove(other)
            variables, group = variables | other[0], [*other[1], *group]
        found.append((variables, group))
    return [group for _, group in found]


def eliminate(factors: Sequence[Factor], plates_of: Mapping[str, frozenset[Plate]]) -> tuple[list[Factor], list[Table]]:
    """Sums over all variables.

    Arguments:
        factors: The factors.
        plates_of: The plates that each variable is in.

    Returns:
        Factors that depend on no variable any more, and the tables from which :func:`draw` draws the variables.

    Raises:
        ValueError: if a factor ties variables of plates that are independent of each other, for which there is no cheap sum.
    """
    remaining, tables = list(factors), []
    numbers = {name: number for number, name in enumerate(plates_of)}
    while variable := _next(remaining, plates_of, numbers):
        mine = [factor for factor in remaining if variable in factor.dims]
        remaining = [factor for factor in remaining if variable not in factor.dims]
        reduced = [_without_other_plates(factor, variable, plates_of) for factor in mine]
        dims = tuple(dict.fromkeys(dim for factor in reduced for dim in factor.dims))
        # The sum is over the first dimension.
        dims = (variable, *[dim for dim in dims if dim != variable])
        table = Factor(sum((factor.over(dims) for factor in reduced[1:]), reduced[0].over(dims)), dims)
        tables.append(Table(variable, table))
        remaining.append(Factor(log_sum_exp(table.value), dims[1:]))
    return remaining, tables


def _next(factors: Iterable[Factor], plates_of: Mapping[str, frozenset[Plate]], numbers: Mapping[str, int]) -> str:
    """The variable to eliminate next; empty if none is left."""
    sizes: dict[str | Plate, int] = {}
    neighbours: dict[str, set[str | Plate]] = {}
    for factor in factors:
        sizes.update(zip(factor.dims, factor.value.shape, strict=True))
        for name in factor.variables:
            neighbours.setdefault(name, set()).update(factor.variables, plates_of[name])

    def cost(name: str) -> tuple[int, int, int]:
        size = math.prod(sizes[dim] for dim in neighbours[name])
        # The later one first: what depends on a site comes after it.
        return -len(plates_of[name]), size, -numbers[name]

    return min(neighbours, key=cost, default="")


def _without_other_plates(factor: Factor, variable: str, plates_of: Mapping[str, frozenset[Plate]]) -> Factor:
    """A factor of a variable multiplied along the plates that the variable is not in."""
    others = factor.plates - plates_of[variable]
    for name in factor.variables:
        if plates_of[name] & others:
            plates = sorted({plate.name for plate in plates_of[name] ^ plates_of[variable]})
            raise ValueError(
                f"the discrete sites '{variable}' and '{name}' are in different plates ({', '.join(plates)}), and what depends "
                "on both ties all of their elements, so that the number of combinations grows exponentially; put one of them "
                "into the plates of the other, or make one plate a loop in Python"
            )
    return factor.total_over(others)


def log_sum_exp(value: Tensor) -> Tensor:
    """log Σ exp over the first dimension; :data:`IMPOSSIBLE` with gradient 0 where all is −inf (torch's own has NaN)."""
    shift = value.detach().amax(0).clamp(min=IMPOSSIBLE)
    # The largest summand is 1, unless all are 0.
    total = (value - shift).exp().sum(0) + torch.finfo(value.dtype).tiny
    return total.log() + shift


def draw(tables: Sequence[Table]) -> dict[str, Factor]:
    """A draw of all variables from their joint distribution, given what :func:`eliminate` has kept.

    Returns:
        For each variable the number of its value, over its plates.
    """
    indices: dict[str, Factor] = {}
    for variable, table in reversed(tables):
        for other in table.variables - {variable}:
            table = table.at(other, indices[other])
        indices[variable] = Factor(_categorical(table.value), table.dims[1:])
    return indices


def _categorical(logits: Tensor) -> Tensor:
    """A draw from the categorical distribution along the first dimension, by its distribution function."""
    below = logits.softmax(0).cumsum(0)
    uniform = torch.rand(logits.shape[1:], dtype=logits.dtype, device=logits.device)
    return (below <= uniform * below[-1]).sum(0).clamp(max=len(logits) - 1)
