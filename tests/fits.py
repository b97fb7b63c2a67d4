"""Short fits, and the models of the tests of training."""

import pyro
import pyro.distributions as dist
import torch

import pyro_flowguides as fg

Y = [0.3, 1.4, 2.2, 0.7, 1.9]


def quick(model, guide, *args, **options):
    """A short fit, without a captured step where that is not what is tested."""
    defaults = {"num_steps": 20, "num_particles": 8, "seed": 0, "progress": False, "backend": "eager"}
    return fg.fit(model, guide, *args, **{**defaults, **options})


def skewed():
    """What no short training of a diagonal map reaches."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(0.0, (1.5 * mu).exp()))


def scale_only(model):
    return fg.AutoFlow(model, fg.transforms.Affine, affine=None)


def faulty(broken):
    """A model whose likelihood is NaN while a tensor says so."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("broken", torch.where(broken, torch.nan, -1.0) * (mu - 1) ** 2)

    return model
