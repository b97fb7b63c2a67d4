"""How the processes of ``torchrun`` divide a training between them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer.autoguide.guides import AutoGuide
from pyro.poutine import Trace
from torch import nn
from torch.utils.data.distributed import DistributedSampler

from ..checks import version, warn
from ..diagnostics.draws import Draws, concatenate
from ..guides.amortized import AmortizedFlow
from ..model.call import ModelCall
from ..model.sites import full_size, is_subsampled, latent_sites, observed_sites, unchanged_random_state
from ..processes import Processes, find_processes
from .checkpoint import Checkpoint, set_random_state
from .fingerprint import cut, describe

MODES = ("particles", "data", "independent")


@dataclass(frozen=True)
class Division:
    """What each process does.

    Attributes:
        processes: The processes.
        mode: ``"particles"``: all have the same data, each has draws of its own. ``"data"``: each has data of its own as well.
            ``"independent"``: each does pieces of work of its own.
    """

    processes: Processes
    mode: str

    @property
    def is_first(self) -> bool:
        """Whether this process shows the progress and writes files."""
        return self.processes.is_first

    def batches(self, batches: Iterable[Any]) -> Iterable[Any]:
        """The batches of this process: all of them, or its share where data are divided.

        The share is every n-th batch for n processes. A ``DistributedSampler`` has divided the data already: its batches are
        taken as they are.
        """
        if self.mode == "data" and isinstance(getattr(batches, "sampler", None), DistributedSampler):
            return batches
        return _CommonOrder(batches, self)

    def draws(self, draw: Callable[[int], Draws], number: int) -> Draws:
        """Draws of all processes, the same in each of them. Where data are divided, they are those of the first one.

        Arguments:
            draw: Makes so many draws.
            number: The number of draws.
        """
        if self.mode == "data":
            return self.processes.from_first(lambda: draw(number))
        return concatenate(self.processes.gather(draw(self.processes.part_of(number))))

    def checkpoint(self, checkpoint: Checkpoint | None) -> Checkpoint | None:
        """The same file, which the first process alone reads and writes."""
        return checkpoint and _OfFirst(checkpoint, self.processes)

    def own_checkpoint(self, checkpoint: Checkpoint | None) -> Checkpoint | None:
        """The same file, which this process reads and writes for itself."""
        return checkpoint and Checkpoint(checkpoint.path, checkpoint.every, checkpoint.resume)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """The first process alone warns within."""
        with warnings.catch_warnings():
            if not self.is_first:
                warnings.simplefilter("ignore")
            yield

    def check_same(self, owner: str, descriptions: Mapping[str, str]) -> None:
        """Raises ValueError, in all processes, unless each has these descriptions.

        Arguments:
            owner: What the message begins with.
            descriptions: What has to be the same, by its name.
        """
        versions = {
            "version of pyro_flowguides": version(),
            "version of torch": torch.__version__,
            "version of Pyro": pyro.__version__,
            "distributed": self.mode,
        }
        first, *others = self.processes.gather({**versions, **descriptions})
        for rank, theirs in enumerate(others, start=1):
            for name in {**first, **theirs}:
                there, here = theirs.get(name, "none"), first.get(name, "none")
                if there != here:
                    alike = ", or with distributed='data'" if self.mode == "particles" else ""
                    raise ValueError(
                        f"{owner}: process {rank} and process 0 differ in {name}: it is {cut(there, here)} in the one, "
                        f"{cut(here, there)} in the other. Start all of them alike{alike}"
                    )


def find_division(owner: str, mode: str | None, *, has_batches: bool) -> Division | None:
    """How the processes divide the work; None for one process, or several that have nothing to do with each other.

    Arguments:
        owner: What the message of an error begins with.
        mode: One of ``MODES``; None for ``"data"`` where there are batches, else for ``"particles"``.
        has_batches: Whether a step takes a part of the data.

    Raises:
        ValueError: if the mode is unknown.
    """
    if mode is not None and mode not in MODES:
        raise ValueError(f"{owner}: distributed must be None or one of {', '.join(MODES)}, got {mode!r}")
    if mode == "independent" or (processes := find_processes()) is None:
        return None
    return Division(processes, mode or ("data" if has_batches else "particles"))


def common_seed(division: Division | None, seed: int | None) -> int | None:
    """The seed that was given; where there are several processes and none was given, one that the first of them draws."""
    if division is None:
        return seed
    return division.processes.from_first(lambda: int(torch.randint(2**31 - 1, ())) if seed is None else seed)


def check_own_rows(division: Division, call: ModelCall, guide: Callable, prototype: Trace) -> None:
    """Looks at plates of rows that each process has alone, where data are divided and there are no batches.

    Warns if such a plate has the size of these rows alone, since they count for all data then.

    Arguments:
        division: How the processes divide the work.
        call: The model with the arguments of this process.
        guide: The guide.
        prototype: A trace of the model.

    Raises:
        ValueError: if an automatic guide has parameters for these rows, which would be averaged with those for other rows.
    """
    if len(set(division.processes.gather(describe([call.args, call.kwargs])))) == 1:
        return
    parts = guide.modules() if isinstance(guide, nn.Module) else ()
    has_parameters = isinstance(guide, AutoGuide) and not any(isinstance(part, AmortizedFlow) for part in parts)
    for observed, site in observed_sites(prototype):
        frames = site["cond_indep_stack"]
        if not frames or any(map(is_subsampled, frames)):
            continue
        for name, latent in latent_sites(prototype) if has_parameters else ():
            if set(frames) <= set(latent["cond_indep_stack"]):
                raise ValueError(
                    f"fit: latent site '{name}' is in plate '{frames[-1].name}', whose rows each process has alone, and the "
                    "guide's parameters for them would be averaged over different rows. Give the plate all rows and the indices "
                    f"of these: pyro.plate('{frames[-1].name}', number_of_all_rows, subsample=indices), also to the guide by "
                    "create_plates=; or use AmortizedFlow, which has no parameters for rows"
                )
        if isinstance(site["scale"], (int, float)) and site["scale"] == 1:
            warn(
                f"fit: observed site '{observed}' is in plate '{frames[-1].name}' of size {full_size(frames[-1])}, and the "
                "processes have different data there, so that each takes its own for all of them, and the posterior is too "
                f"wide. Give the plate its full size: pyro.plate('{frames[-1].name}', number_of_all_rows, "
                f"subsample_size={full_size(frames[-1])})"
            )


def own_state(owner: str, division: Division | None, states: list[Any]) -> Any:
    """The state that this process had when a checkpoint was written; None, with a warning, if there were more or fewer of them.

    Then the random numbers are those of the first process, or others in each of several.

    Arguments:
        owner: What the warning begins with.
        division: How the processes divide the work now.
        states: The states of all processes, each of which begins with its random state.
    """
    size = division.processes.size if division else 1
    if len(states) == size:
        return states[division.processes.rank if division else 0]
    warn(
        f"{owner}: the checkpoint was written by {len(states)} processes and is resumed by {size}: the training goes on, with "
        "other random numbers than it would have had, and a new epoch of batches"
    )
    set_random_state(states[0][0])
    if division:
        division.processes.separate_noise()
    return None


class _CommonOrder:
    """Batches in an order that is the same in all processes, whatever random numbers each of them draws besides.

    Arguments:
        batches: What is iterated over.
        division: How they are divided.
    """

    def __init__(self, batches: Iterable[Any], division: Division) -> None:
        self.wrapped, self.division = batches, division
        size, number = division.processes.size, _number_of(batches)
        if division.mode == "data" and number is not None and number < size:
            raise ValueError(
                f"{number} batches are too few for {size} processes, which take one each at every step; make them smaller"
            )
        seed = division.processes.from_first(lambda: int(torch.randint(2**63 - 1, ())))
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Any]:
        processes = self.division.processes
        if self.division.mode == "particles":
            return self._in_order()
        # The rest of an epoch is dropped, so that all take the same number.
        rounds = zip(*[self._in_order()] * processes.size, strict=False)
        return (batches[processes.rank] for batches in rounds)

    def _in_order(self) -> Iterator[Any]:
        seed = int(torch.randint(2**31 - 1, (), generator=self.generator))
        if (own := getattr(self.wrapped, "generator", None)) is not None:
            own.manual_seed(seed)
        stream = _Stream(seed)
        with stream:
            iterator = iter(self.wrapped)
        while True:
            with stream:
                batch = next(iterator, _END)
            if batch is _END:
                return
            yield batch


def _number_of(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:
        # A loader of a dataset without a length.
        return None


_END = object()


class _OfFirst(Checkpoint):
    """A checkpoint that the first of several processes reads and writes for all of them."""

    def __init__(self, checkpoint: Checkpoint, processes: Processes) -> None:
        super().__init__(checkpoint.path, checkpoint.every, checkpoint.resume)
        self.processes = processes

    def of_restart(self, index: int) -> Checkpoint:
        return _OfFirst(super().of_restart(index), self.processes)

    @contextmanager
    def reserved(self) -> Iterator[None]:
        reserved = super().reserved
        with ExitStack() as stack:
            self.processes.from_first(lambda: stack.enter_context(reserved()))
            yield

    def try_to_save(self, content: dict[str, Any]) -> None:
        if self.processes.is_first:
            super().try_to_save(content)

    def load(self) -> dict[str, Any] | None:
        return self.processes.from_first(super().load)


class _Stream:
    """A random state of its own, which goes on from one use to the next."""

    def __init__(self, seed: int) -> None:
        with unchanged_random_state():
            pyro.set_rng_seed(seed)
            self._own = _generators()

    def __enter__(self) -> None:
        self._outside = _generators()
        _set_generators(self._own)

    def __exit__(self, *error: Any) -> None:
        self._own = _generators()
        _set_generators(self._outside)


def _generators() -> tuple[Any, ...]:
    return torch.random.get_rng_state(), np.random.get_state(), random.getstate()


def _set_generators(states: tuple[Any, ...]) -> None:
    torch.random.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
