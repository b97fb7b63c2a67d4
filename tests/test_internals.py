"""Each name of torch and Pyro that they do not promise to keep, called once: a version that lacks one fails here, by name."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_flowguides import internals


def test_a_tensor_within_vmap_is_one_of_torch_func():
    seen = []
    torch.func.vmap(lambda row: seen.append(internals.is_functorch_tensor(row)) or row)(torch.zeros(2, 3))
    assert seen == [True]
    assert not internals.is_functorch_tensor(torch.zeros(3))


def test_make_fx_is_seen_recording():
    seen = []
    make_fx(lambda x: seen.append(internals.is_recording()) or x + 1)(torch.zeros(2))
    assert seen == [True]
    assert not internals.is_recording()


def test_the_arguments_of_a_run_of_mcmc():
    def model(y, scale=1.0):
        pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), scale), obs=y)

    mcmc = MCMC(NUTS(model), num_samples=2, warmup_steps=2, disable_progbar=True)
    assert not internals.has_run(mcmc)
    mcmc.run(torch.tensor(1.0), scale=2.0)
    assert internals.has_run(mcmc)
    args, kwargs = internals.mcmc_arguments(mcmc)
    assert args == (torch.tensor(1.0),)
    assert kwargs == {"scale": 2.0}
