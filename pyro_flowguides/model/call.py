"""A model with the arguments it is run on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.messenger import Messenger

from .ownership import OwnedFunction


@dataclass(frozen=True)
class ModelCall:
    """A model with its arguments: what a posterior is the posterior of.

    Attributes:
        model: The Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """

    model: Callable
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

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
