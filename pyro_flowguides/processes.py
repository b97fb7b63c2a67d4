"""The processes of one training: what they agree on, and the one operation that a step needs, the mean over all of them.

A group of processes is that of ``torch.distributed``, as ``torchrun`` starts it. Without one :func:`find_processes` returns None.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import pyro
import torch
import torch.distributed
from torch import Tensor

from . import internals

Value = TypeVar("Value")
Task = TypeVar("Task")
Part = TypeVar("Part")

# How long one process waits for the others where they may have gone another way.
MEETING_SECONDS = 60
_meetings = itertools.count()

_is_apart: ContextVar[bool] = ContextVar("is_apart", default=False)
_is_alone: ContextVar[bool] = ContextVar("is_alone", default=False)


@torch.library.custom_op("pyro_flowguides::mean_over_processes", mutates_args=(), schema="(Tensor tensor) -> Tensor")
def _mean_over_processes(tensor: Tensor) -> Tensor:
    result = tensor.clone()
    if not _is_apart.get():
        with _explained():
            torch.distributed.all_reduce(result)
        result /= torch.distributed.get_world_size()
    return result


@_mean_over_processes.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Within, a mean is this process's own value: the others may not run this code."""
    token = _is_apart.set(True)
    try:
        yield
    finally:
        _is_apart.reset(token)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within, there are no other processes: this one does a piece of work that is its own."""
    token = _is_alone.set(True)
    try:
        yield
    finally:
        _is_alone.reset(token)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        rank = torch.distributed.get_rank()
        reason = " ".join(str(error).split())[:200]
        raise RuntimeError(
            f"process {rank} has lost the others: one of them may have ended or be at another step (see its own message), or "
            f"the backend does not take these tensors. torch says: {reason}"
        ) from error


def _packed(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(data: bytes) -> Any:
    """A value whose tensors on a GPU are on the one of this process."""

    def own(storage: Any, location: str) -> Any:
        return storage.cuda() if location.startswith("cuda") else storage

    return torch.load(io.BytesIO(data), map_location=own, weights_only=False)


@dataclass(frozen=True)
class Processes:
    """The processes that train together.

    All of them have to call every method, in the same order, but for :meth:`part_of`.

    Attributes:
        rank: The number of this process, from 0.
        size: The number of processes, at least 2.
    """

    rank: int
    size: int

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def mean(self, vectors: Sequence[Tensor], scalar: Tensor) -> tuple[list[Tensor], Tensor]:
        """Means over all processes, by one message in the widest dtype.

        Arguments:
            vectors: Vectors of one dtype each.
            scalar: A scalar.
        """
        parts = [*vectors, scalar.reshape(1)]
        dtype = functools.reduce(torch.promote_types, [part.dtype for part in parts])
        joined = _mean_over_processes(torch.cat([part.to(dtype) for part in parts]))
        means = [
            mean.to(part.dtype) for mean, part in zip(joined.split([len(part) for part in parts]), parts, strict=True)
        ]
        return means[:-1], means[-1].reshape(())

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Gives tensors the values that they have in the first process, in place."""
        with torch.no_grad(), _explained():
            for tensor in tensors:
                values = tensor.detach().contiguous()
                torch.distributed.broadcast(values, 0)
                if values.data_ptr() != tensor.data_ptr():
                    tensor.copy_(values)

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes, in their order."""
        packed: list[Any] = [None] * self.size
        with _explained():
            torch.distributed.all_gather_object(packed, _packed(value))
        return [_unpacked(each) for each in packed]

    def gather_from(self, find: Callable[[], Value]) -> list[Value]:
        """What a function returns in each process, where it works alone; in their order.

        Raises:
            RuntimeError: in the others, if it raises an error in one of them.
        """
        values, own_error, message = self._gather_outcomes(find)
        if own_error is not None:
            raise own_error
        if message:
            raise RuntimeError(f"process {self.rank} ends with {message}")
        return values

    def _gather_outcomes(self, find: Callable[[], Value]) -> tuple[list[Value], Exception | None, str]:
        """The values of all, the error of this process, and the first of all errors in words."""
        outcome: tuple[Value | None, str] = (None, "")
        own_error: Exception | None = None
        try:
            with alone():
                outcome = (find(), "")
        except Exception as error:
            own_error = error
            outcome = (None, f"process {self.rank}, whose error was {type(error).__name__}: {error}")
        outcomes = self.gather(outcome)
        message = next((message for _, message in outcomes if message), "")
        return [cast(Value, value) for value, _ in outcomes], own_error, message

    def led(self, lead: Callable[[Callable[[Task], list[Part]]], Value], help: Callable[[Task], Part]) -> Value:
        """What a function returns in the first process, for all of them, which help it.

        Arguments:
            lead: Called in the first process, which takes all decisions. It is given a function that gathers what ``help`` makes
                of a task in every process, and raises an error if one of them does.
            help: Does the part of this process of a task.

        Raises:
            RuntimeError: in the others, if ``lead`` raises an error.
        """

        def ask(task: Task) -> list[Part]:
            self.from_first(lambda: (True, task))
            parts, own_error, message = self._gather_outcomes(lambda: help(task))
            if message:
                raise own_error or RuntimeError(f"the work ends with {message}")
            return parts

        def find() -> tuple[bool, Any]:
            return False, lead(ask)

        while True:
            is_task, content = self.from_first(find)
            if not is_task:
                return cast(Value, content)
            # What an error means is for the first to say.
            self._gather_outcomes(functools.partial(help, content))

    def from_first(self, find: Callable[[], Value]) -> Value:
        """What a function returns in the first process, for all of them.

        Raises:
            RuntimeError: in the others, if it raises an error in the first process.
        """
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = _packed(find())
            except BaseException as error:
                outcome[1] = f"{type(error).__name__}: {error}"
                with contextlib.suppress(RuntimeError):
                    torch.distributed.broadcast_object_list(outcome, 0)
                raise
        with _explained():
            torch.distributed.broadcast_object_list(outcome, 0)
        if outcome[1] is not None:
            raise RuntimeError(f"process {self.rank} ends with the first one, whose error was {outcome[1]}")
        return _unpacked(outcome[0])

    def meet(self, what: str) -> None:
        """Waits until all are here, for a minute at most: where some may have gone another way a message would wait for long.

        Arguments:
            what: What this process has come for.

        Raises:
            RuntimeError: if some do not come.
        """
        meeting = next(_meetings)
        here = [f"pyro_flowguides/{meeting}/{rank}" for rank in range(self.size)]
        store = internals.store_of_processes()
        store.set(here[self.rank], "")
        try:
            store.wait(here, timedelta(seconds=MEETING_SECONDS))
        except RuntimeError as error:
            raise RuntimeError(
                f"process {self.rank} {what}, and within {MEETING_SECONDS} s not all of the others have"
            ) from error

    def any(self, condition: bool) -> bool:
        """Whether a condition holds in any of them."""
        conditions: list[Any] = [None] * self.size
        with _explained():
            torch.distributed.all_gather_object(conditions, condition)
        return any(conditions)

    def part_of(self, number: int) -> int:
        """How many of so many things are for this process."""
        return number // self.size + (self.rank < number % self.size)

    def separate_noise(self) -> None:
        """Seeds Pyro in every process by a number of the first one and its own rank.

        With one seed for all, every process would draw the same noise, and all of them together be worth no more than one.
        """
        seed = self.from_first(lambda: int(torch.randint(2**31 - self.size, ())))
        pyro.set_rng_seed(seed + self.rank)


def find_processes() -> Processes | None:
    """The processes of this training; None where this one is alone, or works :func:`alone`.

    The group of ``torch.distributed`` is made where ``torchrun`` has started this process and nobody has made it yet.
    """
    if _is_alone.get() or not torch.distributed.is_available():
        return None
    if not torch.distributed.is_initialized():
        if not torch.distributed.is_torchelastic_launched():
            return None
        torch.distributed.init_process_group()
    size = torch.distributed.get_world_size()
    return Processes(torch.distributed.get_rank(), size) if size > 1 else None
