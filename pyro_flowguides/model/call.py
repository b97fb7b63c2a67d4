"""A model with the arguments it is run on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.messenger import Messenger

from .data import Conversion, Note, explaining
from .ownership import OwnedFunction


@dataclass(frozen=True)
class ModelCall:
    """A model with its arguments: what a posterior is the posterior of.

    Attributes:
        model: The Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        columns: The names of the columns of each argument that was given as a frame.
        notes: What other arguments than tensors have become.
    """

    model: Callable
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()

    @classmethod
    def given(cls, owner: str, model: Callable, args: tuple, kwargs: Mapping[str, Any] | None = None) -> ModelCall:
        """A model with the arguments of a user, converted to tensors by the rule of :mod:`pyro_flowguides.model.data`.

        Arguments:
            owner: The name that errors begin with.
            model: The model.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Raises:
            ValueError: if an argument cannot become a tensor.
        """
        made = Conversion(owner, cls(model).as_written, args, kwargs or {})
        return cls(model, made.args, made.kwargs, made.columns, tuple(made.notes))

    def explaining(self, owner: str) -> AbstractContextManager[None]:
        """The context of a first run of the model, whose errors say what the arguments have become."""
        return explaining(owner, self.notes)

    def __call__(self) -> Any:
        """Runs the model."""
        return self.model(*self.args, **self.kwargs)

    @property
    def as_written(self) -> Callable:
        """The user's function or module under what is wrapped around it: Pyro's handlers, or the parameters of a fit."""
        model = self.model
        while True:
            if isinstance(model, OwnedFunction):
                model = model.function
            elif isinstance(model, functools.partial) and model.args and isinstance(model.args[0], Messenger):
                model = model.args[1]
            else:
                return model

    @property
    def without_initial_values(self) -> ModelCall:
        """The same without the handler by which Pyro's autoguides give latents their first values, draws of the prior."""
        model = self.model
        while isinstance(model, functools.partial) and model.args and isinstance(model.args[0], InitMessenger):
            model = model.args[1]
        return replace(self, model=model)

    @property
    def name(self) -> str:
        """The name of the model as the user wrote it."""
        model = self.as_written
        return getattr(model, "__name__", type(model).__name__)
