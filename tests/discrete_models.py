"""Models with discrete latents, small enough for a sum over all combinations of their values."""

import itertools

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.ops.indexing import Vindex

from pyro_flowguides.model.sites import latent_sites

DATA = torch.tensor([0.3, -1.2, 2.1, 0.9], dtype=torch.float64)
MATRIX = torch.tensor([[0.3, -1.2, 2.1], [0.9, 0.1, -0.4]], dtype=torch.float64)
F64 = {"dtype": torch.float64}


def normal(name, loc=0.0, scale=1.0):
    return pyro.sample(name, dist.Normal(torch.tensor(loc, **F64), scale))


def means():
    return torch.stack([normal("low", -1.0), normal("high", 1.0)])


def uniform(size):
    return torch.linspace(1.0, 2.0, size, **F64).log().softmax(0)


@config_enumerate
def mixture(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2, **F64)))
    locs = means()
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(locs[z], 1.0), obs=y)


def global_site(y):
    locs = means()
    z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, **F64)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(locs[0] + z * locs[1], 1.0), obs=y)


def dependent(y):
    locs = means()
    u = pyro.sample("u", dist.Categorical(uniform(3)), infer={"enumerate": "parallel"})
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.2 + 0.3 * u.double()), infer={"enumerate": "sequential"})
        pyro.sample("y", dist.Normal(torch.where(z > 0, locs[1], locs[0]) + u, 1.0), obs=y)


def nested(y):
    locs = means()
    with pyro.plate("group", y.shape[1], dim=-1):
        u = pyro.sample("u", dist.Bernoulli(torch.sigmoid(locs[0])))
        with pyro.plate("item", y.shape[0], dim=-2):
            z = pyro.sample("z", dist.Categorical(torch.stack([0.3 + 0.4 * u, 0.7 - 0.4 * u], -1)))
            pyro.sample("y", dist.Normal(locs[z], 1.0), obs=y)


def one_hot(y):
    locs = means()
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.OneHotCategorical(uniform(2)))
        pyro.sample("y", dist.Normal((z * locs).sum(-1), 1.0), obs=y)


def chain(y):
    locs = means()
    stay = torch.sigmoid(locs[0])
    z = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        p = torch.where(z > 0, stay, 1 - stay)
        z = pyro.sample(f"z_{t}", dist.Categorical(torch.stack([1 - p, p], -1)))
        pyro.sample(f"y_{t}", dist.Normal(Vindex(locs)[z], 1.0), obs=y[t])


def two_chains(y):
    locs = means()
    u, z = torch.tensor(0), torch.tensor(0)
    transition = torch.tensor([[0.8, 0.2], [0.4, 0.6]], **F64)
    for t in pyro.markov(range(len(y))):
        u = pyro.sample(f"u_{t}", dist.Categorical(transition[u]))
        z = pyro.sample(f"z_{t}", dist.Categorical(Vindex(transition)[u, :]))
        pyro.sample(f"y_{t}", dist.Normal(Vindex(locs)[z] + u, 1.0), obs=y[t])


def chains_in_a_plate(y):
    locs = means()
    transition = torch.tensor([[0.8, 0.2], [0.4, 0.6]], **F64)
    lengths = torch.tensor([3, 1])
    with pyro.plate("series", len(y), dim=-1):
        z = torch.tensor(0)
        for t in pyro.markov(range(y.shape[1])):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
                pyro.sample(f"y_{t}", dist.Normal(locs[z], 1.0), obs=y[:, t])


def masked(y):
    locs = means()
    with pyro.plate("data", len(y)), poutine.mask(mask=torch.tensor([True, False, True, True])):
        z = pyro.sample("z", dist.Categorical(uniform(2)))
        pyro.sample("y", dist.Normal(locs[z], 1.0), obs=y)


def impossible_values(y):
    """From the first value on no data are possible: a sum over −inf alone on the way."""
    locs = means()
    u = pyro.sample("u", dist.Bernoulli(torch.tensor(0.5, **F64)))
    z = pyro.sample("z", dist.Categorical(uniform(2)))
    pyro.factor("possible", torch.where(u > 0, 0.0, -torch.inf) + 0.0 * z)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(locs[z], 1.0), obs=y)


def continuous_below(y):
    """A continuous latent depends on the discrete one, and the data on both."""
    locs = means()
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(uniform(2)))
        x = pyro.sample("x", dist.Normal(locs[z], 0.5))
        pyro.sample("y", dist.Normal(x + z, 1.0), obs=y)


def no_plate_for_data(y):
    locs = means()
    z = pyro.sample("z", dist.Categorical(uniform(2)))
    pyro.sample("y", dist.Normal(locs[z], torch.ones(len(y), **F64)), obs=y)


def counts(y):
    """A binomial latent, and a site with a single value."""
    locs = means()
    with pyro.plate("data", len(y)):
        n = pyro.sample("n", dist.Binomial(3, torch.sigmoid(locs[0])))
        k = pyro.sample("k", dist.Categorical(torch.ones(1, **F64)))
        pyro.sample("y", dist.Normal(n * locs[1] + k, 1.0), obs=y)


MODELS = {
    "mixture": (mixture, DATA),
    "global": (global_site, DATA),
    "dependent": (dependent, DATA),
    "nested": (nested, MATRIX),
    "one_hot": (one_hot, DATA),
    "chain": (chain, DATA),
    "two_chains": (two_chains, DATA[:3]),
    "chains_in_a_plate": (chains_in_a_plate, MATRIX),
    "masked": (masked, DATA),
    "impossible_values": (impossible_values, DATA),
    "continuous_below": (continuous_below, DATA),
    "no_plate_for_data": (no_plate_for_data, DATA),
    "counts": (counts, DATA[:3]),
}


def combinations(trace):
    """All values of all elements of the discrete latents, one dict each."""
    sites = {name: site for name, site in latent_sites(trace) if site["fn"].support.is_discrete}
    choices = []
    for name, site in sites.items():
        support = site["fn"].enumerate_support(expand=False)
        support = support.reshape(len(support), *site["fn"].event_shape)
        shape = site["fn"].batch_shape
        rows = itertools.product(range(len(support)), repeat=shape.numel())
        choices.append([(name, support[torch.tensor(row, dtype=torch.long).reshape(shape)]) for row in rows])
    return [dict(each) for each in itertools.product(*choices)]


def by_brute_force(model, args, values):
    """log p of every combination of the discrete latents, and the combinations.

    A discrete latent counts where it is masked, too: it adds up to 1.
    """
    conditioned = poutine.condition(model, data=values)
    every = combinations(poutine.trace(conditioned).get_trace(*args))
    log_p = []
    for combination in every:
        trace = poutine.trace(poutine.condition(conditioned, data=combination)).get_trace(*args)
        trace.compute_log_prob()
        log_p.append(
            sum(
                site["unscaled_log_prob"].sum() if name in combination else site["log_prob_sum"]
                for name, site in trace.nodes.items()
                if site["type"] == "sample"
            )
        )
    return torch.stack(log_p), every
