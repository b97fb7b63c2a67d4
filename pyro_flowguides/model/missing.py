"""Missing data by Pyro's own idiom: ``pyro.sample(..., obs=y, obs_mask=seen)``.

Pyro makes two sites of it, ``<name>_observed`` and ``<name>_unobserved``, each masked where the other counts, and a
deterministic site that puts them together. What is missing may be NaN in the data.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to


class FillMissing(Messenger):
    """Puts a value of the support in the place of data that a mask hides, whose NaN would get into gradients."""

    def _pyro_sample(self, msg: Any) -> None:
        value = msg["value"]
        if not (msg["is_observed"] and isinstance(msg["mask"], Tensor) and isinstance(value, Tensor)):
            return
        if value.is_floating_point() and "_as_given" not in msg["infer"]:
            msg["infer"] = {**msg["infer"], "_as_given": value}
            # Without a look at the values: a step is captured.
            hidden = value.isnan() & ~over_events(msg["mask"], msg["fn"].event_dim)
            msg["value"] = torch.where(hidden, _in_support(msg["fn"], value), value)


def as_given(site: Any) -> Tensor:
    """The data of an observed site as the user gave them, with NaN where they are missing."""
    return site["infer"].get("_as_given", site["value"])


def num_nan(site: Any) -> int:
    """The number of NaN in the data of a site that no mask hides."""
    value = as_given(site)
    if not value.is_floating_point():
        return 0
    nan = value.isnan()
    if isinstance(site["mask"], Tensor):
        nan = nan & over_events(site["mask"], site["fn"].event_dim)
    return int(nan.sum())


def missing_elements(site: Any, shape: torch.Size) -> Tensor | None:
    """Which elements of a latent stand for missing data, as a mask over its batch shape; None for every other latent.

    The data do not reach the other elements, nor has the model a density for them.

    Arguments:
        site: The latent site, in a trace.
        shape: Its batch shape.
    """
    mask = site["mask"]
    if not (site["name"].endswith("_unobserved") and isinstance(mask, Tensor)) or mask.dim() > len(shape):
        return None
    return mask.expand(shape)


def over_events(mask: Tensor, event_dim: int) -> Tensor:
    """A mask over batch dimensions, with dimensions of size 1 for the events."""
    return mask.reshape(mask.shape + (1,) * event_dim)


def _in_support(fn: Any, value: Tensor) -> Tensor:
    if fn.support.is_discrete:
        return torch.zeros_like(value)
    transform = biject_to(fn.support)
    return transform(value.new_zeros(transform.inverse_shape(value.shape)))
