"""A small training, and the optimisers of Pyro that it is tested with."""

import pyro
import pyro.distributions as dist
import pyro.optim
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_flowguides import CompiledSVI


def observations(dtype):
    return torch.tensor([0.3, 1.4, 2.2, 0.7, 1.9], dtype=dtype)


def compiled(model, guide=None, *, rate=0.05, elbo=None, **options):
    guide = AutoNormal(model) if guide is None else guide
    return CompiledSVI(model, guide, pyro.optim.Adam({"lr": rate}), elbo or Trace_ELBO(), **options)


def parameters():
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def per_parameter(name):
    return {"lr": 0.1} if "locs" in name else {"lr": 0.01}


OPTIMIZERS = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.05}),
    "AdamW": lambda: pyro.optim.AdamW({"lr": 0.05, "weight_decay": 0.1}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.9, "clip_norm": 0.7}),
    "SGD": lambda: pyro.optim.SGD({"lr": 0.001, "momentum": 0.9}),
    "RMSprop": lambda: pyro.optim.RMSprop({"lr": 0.01}),
    "for each parameter": lambda: pyro.optim.Adam(per_parameter),
    "clip_args": lambda: pyro.optim.Adam({"lr": 0.05}, {"clip_norm": 0.5}),
    "scheduler": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.8}
    ),
}


def scaled(get):
    """A model whose prior has a standard deviation from somewhere."""

    def model():
        pyro.sample("x", dist.Normal(0.0, get()))

    return model


def at_two():
    pyro.sample("x", dist.Delta(pyro.param("at", torch.tensor(2.0))))
