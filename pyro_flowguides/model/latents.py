"""Where the latents of a model lie: one flat vector, its parts for the sites, and their plates.

A vector of the layout holds the unconstrained values of the latent sites one after the other. Two guides use it:

- for the posterior of all latents the vector holds every site over the whole of its plates (:meth:`Latents.whole`);
- for the posterior of single data some plates, the data plates, hold all sites. There is a vector for every one of their
  elements, with a site's further plates and event dimensions in it (:meth:`Latents.of_one_datum`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

from . import plates
from .missing import missing_elements, over_events
from .sites import full_size, is_subsampled, latent_sites

WAYS_OUT = (
    "Ways out: create_plates, which makes the plate for the guide as for the model; AutoGuideList of AutoFlow for the global "
    "latents and AutoNormal for the local ones; AmortizedFlow(model, encoder), whose parameters do not depend on the size of "
    "the plate"
)


@dataclass(frozen=True)
class LatentSite:
    """One latent site: its map from the real line, and its part of the vector.

    Attributes:
        name: The name of the site.
        event_dim: The number of event dimensions of its value.
        event_shape: The event shape of its unconstrained value.
        batch_dims: The number of batch dimensions.
        inner: Dimension and size of each batch dimension that is in the vector: all of them, but for data plates.
        crosses: Whether a data plate is to the right of one of them.
        frames: The plates, as Pyro's trace holds them.
        shape: The shape of its value in the trace, over whole plates.
        transform: The map from unconstrained values to the support.
        kept: Where some of the elements alone are in the vector, which ones, of the flattened part; the others have 0. These are
            the data that are missing (``obs_mask=``) and have to be inferred.
        missing: The same as a mask over the batch shape.
        varies: Whether the support depends on other latents; ``transform`` holds for one run then (:func:`supports.at`).
    """

    name: str
    event_dim: int
    event_shape: tuple[int, ...]
    batch_dims: int
    inner: tuple[tuple[int, int], ...]
    crosses: bool
    plates: tuple[str, ...]
    frames: tuple[Any, ...] = field(compare=False)
    shape: torch.Size = field(compare=False)
    transform: Transform = field(compare=False)
    kept: Tensor | None = field(compare=False, default=None)
    missing: Tensor | None = field(compare=False, default=None)
    varies: bool = False

    @property
    def size(self) -> int:
        """The number of entries in the vector."""
        return math.prod(self.packed_shape) if self.kept is None else len(self.kept)

    def log_jacobian(self, unconstrained: Tensor, value: Tensor) -> Tensor:
        """log |det| of its map, 0 for elements that are not in the vector."""
        log_det = self.transform.log_abs_det_jacobian(unconstrained, value)
        if self.missing is None:
            return log_det
        return torch.where(over_events(self.missing, log_det.dim() - value.dim() + self.event_dim), log_det, 0.0)

    @property
    def packed_shape(self) -> tuple[int, ...]:
        """The shape of the part before it is flattened: inner batch dimensions, then event dimensions."""
        return (*[size for _, size in self.inner], *self.event_shape)

    def without_padding(self, value: Tensor, leading: int) -> Tensor:
        """A value without the dimensions of plates that this site is not in.

        Arguments:
            value: The value with the batch dimensions of :meth:`Latents.unpack`.
            leading: The number of batch dimensions to the left of the plates' dimensions.
        """
        own = value.dim() - self.batch_dims - self.event_dim
        return value.reshape([*value.shape[:leading], *value.shape[own:]])

    def place(self, part: Tensor) -> Tensor:
        """The unconstrained value, with every inner batch dimension where the model has it.

        Arguments:
            part: The site's part of vectors, of shape ``batch_shape + (size,)``.
        """
        batch = [*[1] * (self.batch_dims - part.dim() + 1), *part.shape[:-1]]
        if self.kept is not None:
            whole = part.new_zeros(*part.shape[:-1], math.prod(self.packed_shape))
            part = whole.index_copy(-1, self.kept.to(part.device), part)
        if not self.crosses:
            for dim, size in self.inner:
                batch[dim] = size
            return part.reshape([*batch, *self.event_shape])
        value = part.reshape([*batch, *self.packed_shape])
        for index, (dim, _) in enumerate(self.inner):
            value = value.transpose(len(batch) + dim, len(batch) + index)
        return value.reshape([*value.shape[: len(batch)], *self.event_shape])


@dataclass(frozen=True)
class Latents:
    """The latent sites of a model, their plates and their places in one flat vector.

    Attributes:
        sites: The sites in the order of the vector.
        data_plates: The plates that are not in the vector, by dimension; two layouts are equal whatever their sizes.
        init_loc: The vector at the values of the trace, averaged over the data.
    """

    sites: tuple[LatentSite, ...]
    data_plates: dict[int, str]
    init_loc: Tensor = field(compare=False)

    @classmethod
    def whole(cls, trace: Trace, owner: str) -> Latents:
        """Every latent site of a trace over the whole of its plates.

        Where a plate takes a minibatch, the site in the trace is extended to all of its elements, in place.

        Arguments:
            trace: A trace of the model.
            owner: The name that errors begin with.

        Raises:
            ValueError: if the size of a plate is not known, a support has no map to the real line or differs from element to
                element of a minibatch, the sites differ in dtype or device, or a value is not finite.
        """
        sites: list[Any] = [site for _, site in latent_sites(trace)]
        for site in sites:
            for frame in site["cond_indep_stack"]:
                if frame.size < 0:
                    raise ValueError(
                        f"{owner}: latent site '{site['name']}' is inside plate '{frame.name}', whose size is not "
                        f"known; give it: pyro.plate('{frame.name}', size). {WAYS_OUT}"
                    )
            with helpful_support_errors(site):
                plates.cover_whole_plates(site)
        return cls._of(sites, {}, owner)

    @classmethod
    def of_one_datum(cls, trace: Trace, owner: str) -> Latents:
        """What belongs to one element of the plates that all latent sites of a trace share.

        Arguments:
            trace: A trace of the model.
            owner: The name that errors begin with.

        Raises:
            ValueError: if a site is in no plate, in a subsampled plate that not all sites share, or has bounds that
                differ from datum to datum; if the sites share no plate, differ in dtype or device, or a value is not finite.
        """
        sites: list[Any] = [site for _, site in latent_sites(trace)]
        for site in sites:
            if not site["cond_indep_stack"]:
                raise ValueError(
                    f"{owner}: latent site '{site['name']}' is not in a plate, so that it belongs to no datum. Name the "
                    "sites of this guide by sites=[...], or hide this one by poutine.block(model, hide=[...]); a guide for it, "
                    "for example AutoFlow, goes with this one in an AutoGuideList"
                )
        names = [{frame.name for frame in site["cond_indep_stack"]} for site in sites]
        shared = set.intersection(*names)
        if not shared:
            where = ", ".join(f"'{site['name']}' in {sorted(each)}" for site, each in zip(sites, names, strict=True))
            raise ValueError(
                f"{owner}: the sites share no plate ({where}); make one guide for each plate, with sites=[...], and put "
                "them into an AutoGuideList"
            )
        for site in sites:
            for frame in site["cond_indep_stack"]:
                if frame.name not in shared and is_subsampled(frame):
                    raise ValueError(
                        f"{owner}: site '{site['name']}' is in plate '{frame.name}', which takes {frame.size} of its "
                        f"{frame.full_size} elements and is not shared by all sites of this guide; use the whole plate, or one "
                        "guide for each plate"
                    )
        data_plates = {frame.dim: frame.name for frame in sites[0]["cond_indep_stack"] if frame.name in shared}
        return cls._of(sites, dict(sorted(data_plates.items())), owner)

    @classmethod
    def _of(cls, traced: Sequence[Any], data_plates: dict[int, str], owner: str) -> Latents:
        sites, init_locs = [], []
        for site in traced:
            first, value = traced[0]["value"], site["value"]
            if (value.dtype, value.device) != (first.dtype, first.device):
                raise ValueError(
                    f"{owner}: its latents form one vector, but site '{traced[0]['name']}' is {first.dtype} on {first.device} "
                    f"and site '{site['name']}' is {value.dtype} on {value.device}; make the parameters of the two priors alike, "
                    "or use one guide for each in an AutoGuideList"
                )
            latent, unconstrained = _latent_site(site, data_plates, owner)
            data_dims = [dim for dim in range(-latent.batch_dims, 0) if dim in data_plates]
            if data_dims:
                unconstrained = unconstrained.mean([dim - len(latent.event_shape) for dim in data_dims])
            flat = unconstrained.reshape(-1)
            # In a minibatch other elements are missing at every run.
            if not data_plates and not any(map(is_subsampled, latent.frames)):
                missing = missing_elements(site, site["fn"].batch_shape)
                if missing is not None:
                    elements = over_events(missing, len(latent.event_shape)).expand_as(unconstrained)
                    index = elements.reshape(-1).nonzero().squeeze(-1)
                    latent = replace(latent, kept=index, missing=missing)
                    flat = flat[index]
            sites.append(latent)
            init_locs.append(flat)
        return cls(tuple(sites), data_plates, torch.cat(init_locs) if init_locs else torch.zeros(0))

    @property
    def dim(self) -> int:
        """The size of the vector."""
        return sum(site.size for site in self.sites)

    @property
    def nesting(self) -> int:
        """The number of batch dimensions that all plates take, data plates included."""
        dims = [*self.data_plates, *[dim for site in self.sites for dim, _ in site.inner]]
        return max([0, *[-dim for dim in dims], *[-frame.dim for site in self.sites for frame in site.frames]])

    @property
    def data_nesting(self) -> int:
        """The number of batch dimensions that the data plates take."""
        return max([0, *[-dim for dim in self.data_plates]])

    @property
    def subsampled_plates(self) -> dict[str, str]:
        """The plates with latents inside that took a part of their elements, each with the name of one of these latents."""
        return {frame.name: site.name for site in self.sites for frame in site.frames if is_subsampled(frame)}

    def unpack(self, x: Tensor, leading: int | None = None) -> Iterator[tuple[LatentSite, Tensor]]:
        """The unconstrained value of every site.

        Arguments:
            x: Vectors of shape ``batch_shape + (dim,)``. The dimensions of plates are at the right of the batch shape, 1 where
                the plate is in the vector; they may be left out at its left end.
            leading: The number of batch dimensions to the left of the plates' dimensions. With it, a value has no dimension
                for a plate that its site is not in; by default it keeps all, so that the values broadcast.
        """
        position = 0
        for site in self.sites:
            value = site.place(x[..., position : position + site.size])
            if leading is not None:
                own = value.dim() - site.batch_dims - len(site.event_shape)
                value = value.reshape([*value.shape[:leading], *value.shape[own:]])
            yield site, value
            position += site.size

    def pack(self, trace: Trace) -> Tensor:
        """The vector of the unconstrained values in a trace of the model over whole plates."""
        parts = []
        for site in self.sites:
            node: Any = trace.nodes[site.name]
            part = biject_to(node["fn"].support).inv(node["value"]).reshape(-1)
            parts.append(part if site.kept is None else part[site.kept])
        return torch.cat(parts)

    def frames_in(self, trace: Trace, owner: str) -> dict[str, Any]:
        """The plates of these latents in another trace of the model, by name.

        Raises:
            ValueError: if a site is missing there, has another shape, or is in another plate or one of another full size.
        """
        frames = {}
        for site in self.sites:
            if site.name not in trace.nodes:
                raise ValueError(
                    f"{owner}: latent site '{site.name}' was in the model at set-up and is not with these arguments; a "
                    "flow needs the same latents at every call. Sample it always and use it when it is needed, or use a "
                    "guide for each of the two forms of the model"
                )
            now: Any = trace.nodes[site.name]
            for before, frame in zip(site.frames, now["cond_indep_stack"], strict=False):
                size, size_before = full_size(frame), full_size(before)
                if (before.name, size_before) != (frame.name, size):
                    raise ValueError(
                        f"{owner}: latent site '{site.name}' is inside plate '{frame.name}' of size {size}, which at "
                        f"set-up was plate '{before.name}' of size {size_before}. If these are minibatches, "
                        f"give the plate its full size and subsample_size. {WAYS_OUT}"
                    )
                frames[frame.name] = frame
            with torch.no_grad():
                plates.cover_whole_plates(now)
            if now["value"].shape != site.shape:
                raise ValueError(
                    f"{owner}: latent site '{site.name}' has shape {tuple(now['value'].shape)} with these arguments, and "
                    f"had {tuple(site.shape)} at set-up; make a new guide for a model of another size"
                )
        return frames

    def describe(self) -> str:
        """Sites, shapes and plates in words."""
        return ", ".join(f"'{site.name}' of shape {site.packed_shape} in {list(site.plates)}" for site in self.sites)


def _latent_site(site: Any, data_plates: Mapping[int, str], owner: str) -> tuple[LatentSite, Tensor]:
    """A site of a trace in the layout, and its unconstrained value."""
    name, fn, value = site["name"], site["fn"], site["value"]
    with helpful_support_errors(site):
        support = _support_of_one_datum(site, data_plates, owner)
        transform = biject_to(support)
        unconstrained = transform.inv(value.detach())
    if not bool(unconstrained.isfinite().all()):
        raise ValueError(
            f"{owner}: init_loc_fn gives site '{name}' a value that is not finite in unconstrained space; choose another "
            "init_loc_fn, for example init_to_feasible"
        )
    batch_dims = value.dim() - fn.event_dim
    # While torch.jit records, sizes are tensors.
    sizes = {dim: int(value.shape[dim - fn.event_dim]) for dim in range(-batch_dims, 0) if dim not in data_plates}
    inner = tuple((dim, size) for dim, size in sizes.items() if size != 1)
    frames = sorted(site["cond_indep_stack"], key=lambda frame: frame.dim)
    latent = LatentSite(
        name=name,
        event_dim=fn.event_dim,
        event_shape=tuple(int(size) for size in unconstrained.shape[batch_dims:]),
        batch_dims=batch_dims,
        inner=inner,
        crosses=any(data_dim > dim for data_dim in data_plates for dim, _ in inner),
        plates=tuple(frame.name for frame in frames),
        frames=tuple(site["cond_indep_stack"]),
        shape=value.shape,
        transform=transform,
    )
    return latent, unconstrained


def _support_of_one_datum(site: Any, data_plates: Mapping[int, str], owner: str) -> constraints.Constraint:
    """The support with its bounds as they are for every datum: a plate expands them to its size at the time."""
    support = site["fn"].support
    for dim, plate in data_plates.items():
        try:
            support = plates.same_along(support, dim - site["fn"].event_dim)
        except ValueError as error:
            raise ValueError(
                f"{owner}: the bounds of site '{site['name']}' differ along plate '{plate}'; give it fixed bounds, and "
                "scale its value in the model"
            ) from error
    return support
