"""Symmetries of a model that map one of its modes to another, such as an exchange of the components of a mixture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..model.latents import Latents, LatentSite
from ..model.target import LogProb

# How far a mode may be from the image of another, in units of their size.
TOLERANCE = 0.05
# How far log p may differ between a point and its image, in nats; float32 models are rounded.
MAX_NATS = 0.01
NUM_POINTS = 4
# With more modes only those next in mass are looked at: equal modes are neighbours there.
MAX_PAIRS = 32

# The places of the values of all sites, one after the other, that an exchange takes them from.
Exchange = tuple[np.ndarray, str]


def find_symmetries(
    latents: Latents, log_density: LogProb, values: Mapping[str, Tensor], points: Tensor, order: Sequence[int]
) -> list[tuple[int | None, str]]:
    """For every mode an earlier one from which a symmetry leads to it, and the symmetry in words.

    Candidates are exchanges of the elements along an axis, in some of the sites with an axis of this length; exchanges of sites
    of equal shape; and changes of sign. Which elements change places is found by matching one mode with the other, and that the
    density is symmetric by its values at other points and at their images.

    Arguments:
        latents: The latents of the model.
        log_density: log p of flat vectors.
        values: The sites of all modes, in constrained space, ``(modes,) + shape``.
        points: The flat vectors, shape (modes, D).
        order: The modes that are looked at.

    Returns:
        For every mode in this order: the position of the earlier one, or None, and the symmetry.
    """
    found: list[tuple[int | None, str]] = [(None, "")] * len(order)
    if any(site.varies or site.kept is not None for site in latents.sites):
        return found
    flat = np.concatenate(
        [values[site.name].detach().double().reshape(len(points), -1).cpu().numpy() for site in latents.sites], -1
    )
    for position, index in enumerate(order):
        # From the first of equal modes, which stands for all.
        for earlier in range(max(0, position - MAX_PAIRS), position):
            if found[earlier][0] is not None:
                continue
            words = _symmetry(latents, log_density, points[order[earlier]], flat[order[earlier]], flat[index])
            if words:
                found[position] = earlier, words
                break
    return found


def _symmetry(latents: Latents, log_density: LogProb, point: Tensor, first: np.ndarray, second: np.ndarray) -> str:
    """The symmetry that maps the values of one mode to another's, in words; empty if there is none."""
    scale = TOLERANCE * (np.abs(first).max() + np.abs(second).max())
    if not np.allclose(np.sort(np.abs(first)), np.sort(np.abs(second)), atol=scale, rtol=0):
        return ""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(NUM_POINTS, len(point), generator=generator, dtype=torch.float64).to(point)
    nearby = point + 0.1 * noise
    for indices, words in _exchanges(latents, first, second):
        if not np.allclose(first[indices], second, atol=scale, rtol=0):
            continue
        images = _image(latents, nearby, torch.as_tensor(indices))
        if _is_symmetric(log_density, nearby, images):
            return words
    # A latent of the real line may change its sign.
    if len(first) == len(point) and np.allclose(first, point.cpu().numpy()):
        signs = np.where(np.abs(first + second) < np.abs(first - second), -1.0, 1.0)
        if np.allclose(signs * first, second, atol=scale, rtol=0):
            images = nearby * torch.as_tensor(signs).to(nearby)
            if (signs < 0).any() and _is_symmetric(log_density, nearby, images):
                return f"the sign of {_names(latents, signs < 0)} changed"
    return ""


@torch.no_grad()
def _is_symmetric(log_density: LogProb, points: Tensor, images: Tensor) -> bool:
    differences = log_density(points) - log_density(images)
    return bool((differences.abs() < MAX_NATS).all())


def _exchanges(latents: Latents, first: np.ndarray, second: np.ndarray) -> Iterator[Exchange]:
    """Exchanges by which the values of one mode might become those of another."""
    ends = np.cumsum([math.prod(site.shape) for site in latents.sites])
    numbers = [
        np.arange(end - math.prod(site.shape), end).reshape(site.shape)
        for site, end in zip(latents.sites, ends, strict=True)
    ]
    identity = np.arange(ends[-1])
    # Elements along axes of equal length.
    for places in numbers:
        for axis in range(places.ndim):
            rows = np.moveaxis(places, axis, 0).reshape(places.shape[axis], -1)
            matched = _matched(first[rows], second[rows])
            if len(rows) < 2 or (matched == np.arange(len(rows))).all():
                continue
            result = identity.copy()
            changed = []
            for other, others in zip(latents.sites, numbers, strict=True):
                best = _best_along_axes(others, matched, first, second)
                result[others.reshape(-1)] = best.reshape(-1)
                if not np.array_equal(best, others):
                    changed.append(f"'{other.name}'")
            yield result, f"the elements of {_listed(changed)} in the order {', '.join(map(str, matched))}"
    # Sites of equal shape and support.
    groups: dict[tuple, list[int]] = {}
    for index, site in enumerate(latents.sites):
        groups.setdefault((tuple(site.shape), str(site.transform.codomain)), []).append(index)
    result, changed = identity.copy(), []
    for group in groups.values():
        rows = np.stack([numbers[index].reshape(-1) for index in group])
        matched = _matched(first[rows], second[rows])
        for index, source in zip(group, matched, strict=True):
            result[numbers[index].reshape(-1)] = rows[source]
            if group[source] != index:
                changed.append(f"'{latents.sites[index].name}'")
    if changed:
        yield result, f"{_listed(changed)} exchanged"


def _matched(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """For every row of the second the row of the first that is nearest, each taken once."""
    costs = np.square(second[:, None] - first[None]).sum(-1)
    return np.asarray(linear_sum_assignment(costs)[1])


def _best_along_axes(places: np.ndarray, matched: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The places of one site, exchanged along those of its axes that bring it nearest to the other mode."""
    axes = [axis for axis in range(places.ndim) if places.shape[axis] == len(matched)]
    candidates = []
    for number in range(len(axes) + 1):
        for chosen in itertools.combinations(axes, number):
            taken = places
            for axis in chosen:
                taken = np.take(taken, matched, axis)
            candidates.append(taken)
    return min(candidates, key=lambda taken: float(np.square(first[taken] - second[places]).sum()))


def _image(latents: Latents, points: Tensor, indices: Tensor) -> Tensor:
    """The flat vectors of points whose values have changed places."""
    count = len(points)
    made = [(site, site.without_padding(site.transform(x), 1)) for site, x in latents.unpack(_padded(latents, points))]
    flat = torch.cat([value.reshape(count, -1) for _, value in made], -1)[:, indices.to(points.device)]
    parts = flat.split([value[0].numel() for _, value in made], -1)
    return torch.cat(
        [_unconstrained(site, part.reshape(value.shape)) for (site, value), part in zip(made, parts, strict=True)], -1
    )


def _padded(latents: Latents, points: Tensor) -> Tensor:
    return points.reshape(len(points), *[1] * latents.nesting, latents.dim)


def _unconstrained(site: LatentSite, value: Tensor) -> Tensor:
    return site.transform.inv(value).reshape(len(value), -1)


def _names(latents: Latents, chosen: np.ndarray) -> str:
    """The sites of some elements of the flat vector."""
    named, begin = [], 0
    for site in latents.sites:
        if chosen[begin : begin + site.size].any():
            named.append(f"'{site.name}'")
        begin += site.size
    return _listed(named)


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
