"""The arguments of a fit's steps, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from typing import Any

import pyro
from pyro import poutine
from pyro.poutine import Trace

from ..checks import warn
from ..model.call import ModelCall
from ..model.sites import full_size, is_subsampled, observed_sites, quiet_trace, unchanged_random_state
from .checkpoint import random_state, set_random_state


class Batches:
    """The arguments of the steps, epoch after epoch, which can be left and taken up again.

    Arguments:
        batches: What is iterated over again and again.

    Raises:
        ValueError: at a step, if it cannot be iterated over a second time.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches, self.epoch = batches, -1
        self._begin()

    def _begin(self) -> None:
        self.epoch += 1
        sampler: Any = getattr(self.batches, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            # A sampler for several processes, which has the same order in every epoch otherwise.
            sampler.set_epoch(self.epoch)
        # A loader shuffles with the generator of torch, or with one of its own.
        self.random_state = random_state()
        generator = getattr(self.batches, "generator", None)
        self.generator_state = None if generator is None else generator.get_state()
        self.iterator = iter(self.batches)
        self.position = 0

    def __next__(self) -> tuple[tuple, dict[str, Any]]:
        try:
            batch = next(self.iterator)
        except StopIteration:
            self._begin()
            try:
                batch = next(self.iterator)
            except StopIteration:
                raise ValueError(
                    "fit: batches came to an end and cannot be iterated over again; give a list or a DataLoader, not a generator"
                ) from None
        self.position += 1
        return arguments(batch)

    def state_dict(self) -> dict[str, Any]:
        """Where this epoch began, and how many batches of it are done."""
        return {
            "random_state": self.random_state,
            "generator_state": self.generator_state,
            "position": self.position,
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a :meth:`state_dict`."""
        set_random_state(state["random_state"])
        if state["generator_state"] is not None:
            self.batches.generator.set_state(state["generator_state"])  # type: ignore[attr-defined]
        self.epoch = state["epoch"] - 1
        self._begin()
        for _ in range(state["position"]):
            next(self)


def warn_of_plate_of_the_batch(call: ModelCall, batches: Iterable[Any], prototype: Trace) -> None:
    """Warns where the data of a batch stand in a plate of the batch's own size, as if there were no other data.

    Arguments:
        call: The model with a batch as its arguments.
        batches: All of them.
        prototype: A trace of the model at the arguments of the fit.
    """
    with quiet_trace(), unchanged_random_state(), pyro.validation_enabled(False):
        trace = poutine.trace(call).get_trace()
    whole = {
        frame.name: full_size(frame) for _, site in observed_sites(prototype) for frame in site["cond_indep_stack"]
    }
    num_data = getattr(batches, "dataset", ())
    num_data = len(num_data) if isinstance(num_data, Sized) else 0
    for name, site in observed_sites(trace):
        frames = site["cond_indep_stack"]
        if any(map(is_subsampled, frames)) or not (isinstance(site["scale"], (int, float)) and site["scale"] == 1):
            continue
        for frame in frames:
            size = full_size(frame)
            if whole.get(frame.name, size) != size or (
                size == getattr(batches, "batch_size", None) and size < num_data
            ):
                warn(
                    f"fit: observed site '{name}' is in plate '{frame.name}' of size {size}, the size of a batch, so that a step "
                    "takes the batch for all of the data, and the posterior is too wide. Give the plate its full size: "
                    f"pyro.plate('{frame.name}', number_of_data, subsample_size={size})"
                )
                return


def arguments(batch: Any) -> tuple[tuple, dict[str, Any]]:
    """The positional and keyword arguments that an element of batches stands for."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}
