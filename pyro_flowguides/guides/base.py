"""What a guide does with its parameters: one name each in Pyro's parameter store, and copies that can be trained."""

from __future__ import annotations

import copy
from typing import Any

import pyro
from pyro.infer.autoguide.guides import AutoGuide


class StoredGuide(AutoGuide):
    """An autoguide whose modules share their parameters with Pyro's store, and which can be copied and pickled at any time."""

    def _attach_to_param_store(self) -> None:
        """Shares every parameter with Pyro's store under one name; where the store has a value, that value is taken.

        The modules must be Pyro modules, converted before they were attached to the guide: the other order leaves every
        parameter in the store under a second name.

        Raises:
            ValueError: if the store holds a value of another shape under the name of a parameter.
        """
        self._check_param_store()
        for module in self.modules():
            for name, parameter in list(module._parameters.items()):
                # A bias that is switched off is None; a PyroParam looks after itself.
                if parameter is not None and not name.endswith("_unconstrained"):
                    setattr(module, name, module._parameters.pop(name))

    def _check_param_store(self) -> None:
        if pyro.settings.get("module_local_params"):
            return
        store = pyro.get_param_store()
        for name, parameter in self.named_parameters():
            full_name = self._pyro_get_fullname(name)
            if full_name in store and store[full_name].shape != parameter.shape:
                raise ValueError(
                    f"{type(self).__name__}: the parameter store holds '{full_name}' of shape "
                    f"{tuple(store[full_name].shape)} in place of {tuple(parameter.shape)}, from a guide of the same class for "
                    "another model or with other options; call pyro.clear_param_store() first, or use "
                    "pyro.settings.set(module_local_params=True)"
                )

    def _follow_param_store(self) -> None:
        """Attaches anew after the store was cleared or loaded, which replaces all of its values: one tells for all."""
        first = next(self.named_parameters(), None)
        if first is None or pyro.settings.get("module_local_params"):
            return
        name, parameter = self._pyro_get_fullname(first[0]), first[1]
        store = pyro.get_param_store()
        if name not in store or store[name] is not parameter:
            self._attach_to_param_store()

    def __getstate__(self) -> dict[str, Any]:
        # Pyro drops the model, which often cannot be pickled, but from the guide at hand as well as from the copy.
        model, master = self._model, self.master
        state = dict(super().__getstate__())
        self._model, self.master = model, master
        # The recipe has done its work, and may be a lambda.
        return {**state, "_model": (None,), "master": None, "_recipe": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredGuide:
        # Within a process the model need not be dropped: the copy can be trained on.
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new._model, new._recipe = self._model, self._recipe
        return new
