"""Discrete latents summed out, against sums over all combinations of their values."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from discrete_models import DATA, MODELS, by_brute_force, means, normal, uniform
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate

from pyro_flowguides.model import enumeration
from pyro_flowguides.model.batched import BatchedModel
from pyro_flowguides.model.call import ModelCall
from pyro_flowguides.model.enumeration import Enumeration
from pyro_flowguides.model.latents import Latents
from pyro_flowguides.model.sites import latent_sites
from pyro_flowguides.model.target import Target


def at_a_draw(model, args):
    """A trace of the model, and the values of its continuous latents in it."""
    pyro.set_rng_seed(0)
    trace = poutine.trace(model).get_trace(*args)
    return trace, {name: site["value"] for name, site in latent_sites(trace) if not site["fn"].support.is_discrete}


def summed_out(model, args=()):
    """The sum over the discrete latents, and the model at a draw of the others."""
    trace, values = at_a_draw(model, args)
    return Enumeration.of(trace, values), lambda: poutine.condition(model, data=values)(*args)


def several(values, number):
    return {name: value.expand(number, *value.shape).clone() for name, value in values.items()}


@pytest.mark.parametrize("name", MODELS)
def test_value_and_gradient_are_those_of_the_sum(name):
    model, *args = MODELS[name]
    trace, values = at_a_draw(model, args)
    points = {name: value.clone().requires_grad_() for name, value in values.items()}
    summed = Enumeration.of(trace, values)
    log_joint = summed.log_joint(lambda: poutine.condition(model, data=points)(*args))
    expected = by_brute_force(model, args, points)[0].logsumexp(0)
    torch.testing.assert_close(log_joint, expected)
    ours, theirs = (
        torch.autograd.grad(each, list(points.values()), allow_unused=True, materialize_grads=True)
        for each in (log_joint, expected)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_recordings_have_the_sum_and_draws_of_the_posterior(name):
    model, *args = MODELS[name]
    trace, values = at_a_draw(model, args)
    summed = Enumeration.of(trace, values)
    batched = BatchedModel(ModelCall(model, tuple(args)), trace, list(values), enumeration=summed)
    batched.check_sum()
    number = 2000
    drawn = batched.trace(several(values, number), number)
    log_p, every = by_brute_force(model, args, values)
    torch.testing.assert_close(drawn.log_joint, log_p.logsumexp(0).expand(number))
    torch.testing.assert_close(batched.log_prob(several(values, 2)), log_p.logsumexp(0).expand(2))
    weights = log_p.softmax(0)
    for site in summed.names:
        exact = torch.stack([each[site].double() for each in every])
        mean = torch.tensordot(weights, exact, 1)
        variance = torch.tensordot(weights, (exact - mean) ** 2, 1)
        found = drawn.nodes[site]["value"]
        assert found.shape == (number, *trace.nodes[site]["value"].shape)
        assert found.dtype == trace.nodes[site]["value"].dtype
        # Five standard errors; what is nearly certain may still happen once.
        assert ((found.double().mean(0) - mean).abs() <= 5 * (variance / number).sqrt() + 1 / number).all(), site


def test_dependent_sites_are_drawn_together():
    """Each alone is fair, and they are never equal."""

    def model():
        normal("x")
        first = pyro.sample("first", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("second", dist.Bernoulli(0.999 - 0.998 * first))

    trace, values = at_a_draw(model, ())
    batched = BatchedModel(ModelCall(model), trace, ["x"], enumeration=Enumeration.of(trace, values))
    drawn = batched.trace(several(values, 1000), 1000)
    assert ((drawn.nodes["first"]["value"] + drawn.nodes["second"]["value"]) == 1).double().mean() > 0.99


def test_a_long_chain_is_that_of_the_forward_algorithm():
    y = torch.sin(torch.arange(60.0, dtype=torch.float64))
    stay = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)

    def model():
        locs, z = means(), torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(stay[z]))
            pyro.sample(f"y_{t}", dist.Normal(locs[z], 1.0), obs=y[t])

    summed, bound = summed_out(model)
    low, high = at_a_draw(model, ())[1].values()
    emission = dist.Normal(torch.stack([low, high]), 1.0)
    message = stay[0].log()
    for t in range(len(y)):
        message = message + emission.log_prob(y[t])
        if t < len(y) - 1:
            message = (message.unsqueeze(-1) + stay.log()).logsumexp(0)
    prior = dist.Normal(-1.0, 1.0).log_prob(low) + dist.Normal(1.0, 1.0).log_prob(high)
    torch.testing.assert_close(summed.log_joint(bound), prior + message.logsumexp(0))


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_the_scale_is_outside_of_the_logarithm(scale):
    """As in Pyro's own sum, whatever a subsampled plate or a handler scales."""

    @config_enumerate
    def model():
        locs = means()
        with poutine.scale(scale=scale), pyro.plate("data", 12, subsample_size=len(DATA), dim=-2):
            z = pyro.sample("z", dist.Categorical(uniform(2)))
            pyro.sample("y", dist.Normal(locs[z], 1.0), obs=DATA.unsqueeze(-1))

    summed, bound = summed_out(model)
    values = at_a_draw(model, ())[1]

    def guide():
        for name, value in values.items():
            pyro.sample(name, dist.Delta(value))

    expected = -TraceEnum_ELBO(max_plate_nesting=2).loss(model, guide)
    assert float(summed.log_joint(bound)) == pytest.approx(expected, abs=1e-8)
    assert abs(expected) > 1


def test_log_likelihoods_are_those_of_the_sum():
    model, y = MODELS["mixture"]
    summed, bound = summed_out(model, (y,))
    values = at_a_draw(model, (y,))[1]
    locs = torch.stack([values["low"], values["high"]])
    expected = (dist.Normal(locs, 1.0).log_prob(y.unsqueeze(-1)) + values["weights"].log()).logsumexp(-1)
    torch.testing.assert_close(summed.marginal(bound).log_likelihood["y"], expected)


def test_log_likelihoods_with_a_continuous_latent_below():
    """p(y | x) = Σ p(z) p(x | z) p(y | x, z) / Σ p(z) p(x | z)."""
    model, y = MODELS["continuous_below"]
    summed, bound = summed_out(model, (y,))
    values = at_a_draw(model, (y,))[1]
    locs, x = torch.stack([values["low"], values["high"]]), values["x"].unsqueeze(-1)
    prior = uniform(2).log() + dist.Normal(locs, 0.5).log_prob(x)
    likelihood = dist.Normal(x + torch.arange(2), 1.0).log_prob(y.unsqueeze(-1))
    expected = (prior + likelihood).logsumexp(-1) - prior.logsumexp(-1)
    torch.testing.assert_close(summed.marginal(bound).log_likelihood["y"], expected)


@pytest.mark.parametrize(
    ("name", "site", "reason"),
    [
        ("global", "y", "shares the discrete site 'z' between its observations"),
        ("dependent", "y", "shares the discrete site 'u' between its observations"),
        ("chain", "y_1", "shares a discrete site with the data of 'y_"),
    ],
)
def test_observations_that_share_a_discrete_site_have_no_log_likelihood(name, site, reason):
    model, *args = MODELS[name]
    summed, bound = summed_out(model, args)
    summed.check(bound)
    assert reason in summed.without_log_likelihood[site]
    assert site not in summed.marginal(bound).log_likelihood


def test_the_target_of_whitening_is_that_of_the_sum():
    """With the Jacobians of the latents; here of none."""
    model, y = MODELS["global"]
    trace = poutine.trace(poutine.block(model, hide=["z"])).get_trace(y)
    latents = Latents.whole(trace, "test")
    x = torch.tensor([[0.2, -1.0], [1.5, 0.1]], dtype=torch.float64)
    found = Target(ModelCall(model, (y,)), latents).log_prob(x)
    for row, ours in zip(x, found, strict=True):
        expected = by_brute_force(model, (y,), {"low": row[0], "high": row[1]})[0].logsumexp(0)
        torch.testing.assert_close(ours, expected)


def looked_at():
    x = normal("x")
    z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
    pyro.sample("y", dist.Normal(x + (1.0 if z > 0 else 0.0), 1.0), obs=torch.tensor(0.3))


def mixed():
    """The sum over the data takes the dimension of enumeration for theirs: 0.5 + 1.5, and never 2 for three data."""
    x = normal("x")
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("y", dist.Normal(x + (z + 0.5).sum(0), 1.0), obs=torch.zeros(3))


def outside_of_the_plate():
    x = normal("x")
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
    pyro.sample("y", dist.Normal(x + z, 1.0), obs=torch.zeros(2))


def grid():
    x = normal("x")
    rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1)
    with rows:
        u = pyro.sample("u", dist.Bernoulli(torch.tensor(0.5)))
    with columns:
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
    with rows, columns:
        pyro.sample("y", dist.Normal(x + u * z, 1.0), obs=torch.zeros(2, 3))


def too_many():
    total = normal("x")
    for i in range(30):
        total = total + pyro.sample(f"z_{i}", dist.Bernoulli(torch.tensor(0.5)))
    pyro.sample("y", dist.Normal(total, 1.0), obs=torch.tensor(0.3))


def part_of_the_data():
    x = normal("x")
    z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
    with pyro.plate("data", 10, subsample_size=2):
        pyro.sample("y", dist.Normal(x + z, 1.0), obs=torch.zeros(2))


def scaled_one_by_one():
    x = normal("x")
    with pyro.plate("data", 2), poutine.scale(scale=torch.tensor([1.0, 2.0])):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("y", dist.Normal(x + z, 1.0), obs=torch.zeros(2))


def no_plate():
    normal("x")
    pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)))


def infinite():
    normal("x")
    pyro.sample("z", dist.Poisson(torch.tensor(2.0)))


def joined():
    normal("x")
    pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (looked_at, "cannot be run with all values of the discrete site 'z' at once.*Vindex"),
        (mixed, "site 'y' has log-probability .* where all values .*: the model mixes the values"),
        (outside_of_the_plate, "site 'y' depends on the discrete site 'z' and is outside of its plate 'data'"),
        (grid, "'[uz]' and '[uz]' are in different plates .columns, rows.*grows exponentially"),
        (
            too_many,
            r"the values of 30 discrete sites \('z_0', 'z_1', 'z_2', …\) have too many combinations.*pyro.markov",
        ),
        (part_of_the_data, "'y' counts 5 times and 'z' 1 times|'z' counts 1 times and 'y' 5 times"),
        (scaled_one_by_one, r"site '[yz]' has a scale of shape \(2,\)"),
        (no_plate, r"'z' has batch shape \(3,\), of which dimension -1 is in no plate"),
        (infinite, "'z' is discrete, Poisson, and has infinitely many values.*Ways out: Categorical"),
        (
            joined,
            "'z' is discrete, Bernoulli, and has .* values that Pyro cannot list.*a plate in the place of to_event",
        ),
    ],
)
def test_sums_that_cannot_be_had(model, message):
    def sum_out():
        summed, bound = summed_out(model)
        summed.check(bound)

    with pytest.raises(ValueError, match=message), pyro.validation_enabled(False):
        sum_out()


def test_a_guide_has_to_give_all_continuous_latents():
    trace = poutine.trace(MODELS["global"][0]).get_trace(DATA)
    with pytest.raises(
        ValueError, match="leaves out the continuous site 'high', while the discrete site 'z' is summed"
    ):
        Enumeration.of(trace, ["low"])


def test_large_data_are_no_combinations(monkeypatch):
    monkeypatch.setattr(enumeration, "MAX_ELEMENTS", 2)
    model, y = MODELS["mixture"]
    summed, bound = summed_out(model, (y,))
    summed.check(bound)
