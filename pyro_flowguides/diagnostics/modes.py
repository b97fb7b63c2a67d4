r"""The modes of a posterior, the mass of each, and which of them a guide has not drawn.

Importance weights of a guide's draws are blind to what the guide never reaches. A search with many starts is not: all of them
climb together on the batched log density (:mod:`pyro_flowguides.model.ascent`), and where they arrive the mass is measured
(:mod:`pyro_flowguides.model.mode_search`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .errors import Unseen
from .importance import Estimate
from .summary import scalars

# The number of modes that a sentence names.
NUM_NAMED = 3


@dataclass(frozen=True)
class Mode:
    """One mode of a posterior. Made by :func:`pyro_flowguides.find_modes`.

    Attributes:
        values: The latent sites at the maximum of the density in unconstrained space, in their own (constrained) space.
        mean: The mean of each site within this mode, in its own space, float64.
        sd: Its standard deviation within this mode, likewise.
        log_density: log p there, of the joint density in unconstrained space.
        mass: The fraction of the posterior's mass that belongs to this mode, of what is known of the posterior.
        drawn: The fraction of the guide's draws that belong to it; NaN without a guide.
        is_lost: Whether the guide has drawn less than half of its mass, and its weights do not make up for it.
        khat: The Pareto shape of the weights that measured the mass. Above 0.7 the mass is not that of a Gaussian around the
            maximum, and not to be relied on.
        num_found: The number of starts that have come to it.
        is_definite: Whether the negative Hessian of log p is positive definite there. Where it is not, the mode is a ridge or at
            the edge of a plateau.
        symmetric_to: The index of an earlier mode that a symmetry of the model maps to this one; None if there is none.
        symmetry: That symmetry in words, such as "the elements of 'loc' in the order 1, 0".
        where: The scalars that tell it best from the others, in words.
        loc: The mean of a Gaussian for this mode in unconstrained space, shape (D,), float64.
        scale_tril: The Cholesky factor of its covariance, shape (D, D), float64.
        log_mass: The log of the mass, not normalised: log Z of this part of the posterior.
    """

    values: dict[str, Tensor]
    mean: dict[str, Tensor]
    sd: dict[str, Tensor]
    log_density: float
    mass: Estimate
    drawn: float
    is_lost: bool
    khat: float
    num_found: int
    is_definite: bool
    symmetric_to: int | None
    symmetry: str
    where: str
    loc: Tensor
    scale_tril: Tensor
    log_mass: float


@dataclass(frozen=True, repr=False)
class Modes:
    """The modes of a posterior. Made by :func:`pyro_flowguides.find_modes`; ``print`` gives a sentence.

    Attributes:
        modes: The modes with at least a hundredth of the mass of the heaviest: those that the guide draws, then those that it has
            lost, and the heaviest of each first.
        num_starts: The number of starts of the search.
        num_arrived: The number of them that have come to one of these modes.
        has_guide: Whether the draws of a guide were compared with them.
    """

    modes: tuple[Mode, ...]
    num_starts: int
    num_arrived: int
    has_guide: bool

    def __len__(self) -> int:
        return len(self.modes)

    def __iter__(self) -> Iterator[Mode]:
        return iter(self.modes)

    def __getitem__(self, index: int) -> Mode:
        return self.modes[index]

    def __repr__(self) -> str:
        table = self.to_dataframe().to_string(float_format=lambda number: f"{number:.3f}", na_rep="–")
        return f"{self}\n{table}" if self.modes else str(self)

    def __str__(self) -> str:
        if self.has_guide:
            return self.finding
        if not self.modes:
            return f"none of {self.num_starts} starts came to a maximum of the density."
        number = "one mode" if len(self) == 1 else f"{len(self)} modes"
        return f"{self.num_starts} starts found {number}: {'; '.join(map(_described, self.modes[:NUM_NAMED]))}" + (
            f"; and {len(self) - NUM_NAMED} more." if len(self) > NUM_NAMED else "."
        )

    @property
    def lost(self) -> tuple[Mode, ...]:
        """The modes that the guide has not drawn."""
        return tuple(mode for mode in self.modes if mode.is_lost)

    @property
    def lost_mass(self) -> float:
        """The fraction of the mass of the modes that the guide has not drawn."""
        return sum(mode.mass.value for mode in self.lost)

    @property
    def finding(self) -> str:
        """What the search says about the guide, in a sentence."""
        if not self.modes:
            return f"none of {self.num_starts} starts came to a maximum of the density, so nothing is known of other modes."
        if not self.lost:
            arrived = (
                "" if self.num_arrived > self.num_starts / 2 else f", {self.num_arrived} of which came to a maximum,"
            )
            return f"{self.num_starts} starts{arrived} found no other mode."
        first, number = self.lost[0], len(self.lost)
        are_images = all(mode.symmetric_to is not None and not self[mode.symmetric_to].is_lost for mode in self.lost)
        mass = f"about {first.mass.value:.0%} of the mass"
        if number == 1:
            image = f"it is mode {first.symmetric_to} of fit.modes with {first.symmetry}; what this leaves unchanged is right"
            return f"a mode at {first.where} with {mass} has not been drawn{'; ' + image if are_images else ''}."
        images = (
            "all are images of modes that have been, by symmetries of the model; what these leave unchanged is right"
        )
        return (
            f"{number} modes with about {self.lost_mass:.0%} of the mass have not been drawn, the heaviest at {first.where} with "
            f"{mass}{'; ' + images if are_images else ''}."
        )

    def unseen(self, dims: Mapping[str, Sequence[str]], coords: Mapping[str, Sequence[Any]]) -> Unseen | None:
        """The moments of all lost modes together, by the labels of the scalars; None if no mode is lost.

        Arguments:
            dims: The names of a site's dimensions.
            coords: The labels along a dimension.
        """
        if not self.lost:
            return None

        def of_lost(kind: str) -> dict[str, np.ndarray]:
            sites = [getattr(mode, kind) for mode in self.lost]
            return scalars(
                {name: torch.stack([each[name] for each in sites]).numpy() for name in sites[0]}, dims, coords
            )

        masses = np.array([mode.mass.value for mode in self.lost])
        moments = {}
        for (label, means), sds in zip(of_lost("mean").items(), of_lost("sd").values(), strict=True):
            mean = np.average(means, weights=masses)
            moments[label] = mean, np.average(sds**2 + (means - mean) ** 2, weights=masses) ** 0.5
        return Unseen(self.lost_mass, math.hypot(*(mode.mass.se for mode in self.lost)), moments)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per mode: where it is, its log density, mass with standard error, k-hat, and the fraction that was drawn."""
        rows = [
            {
                "where": mode.where,
                "log_density": mode.log_density,
                "mass": mode.mass.value,
                "mass_se": mode.mass.se,
                "khat": mode.khat,
                **({"drawn": mode.drawn} if self.has_guide else {}),
                "starts": mode.num_found,
                "remark": _remark(mode),
            }
            for mode in self.modes
        ]
        return pd.DataFrame(rows)


def _described(mode: Mode) -> str:
    return f"{mode.where} with about {mode.mass.value:.0%} of the mass"


def _remark(mode: Mode) -> str:
    remarks = []
    if mode.symmetric_to is not None:
        remarks.append(f"mode {mode.symmetric_to} with {mode.symmetry}")
    if not mode.is_definite:
        remarks.append("no definite Hessian")
    return "; ".join(remarks)
