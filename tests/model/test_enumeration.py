"""Discrete latents summed out, against sums over all combinations of their values."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from discrete_models import DATA, F64, MODELS, by_brute_force, chain, means, mixture, normal, uniform
from pyro import poutine

from pyro_flowguides.model import enumeration
from pyro_flowguides.model.enumeration import Enumeration, sites_to_sum_out
from pyro_flowguides.model.sites import latent_sites


def at_a_draw(model, *args):
    """The model's discrete latents, and a draw of the others from the prior."""
    pyro.set_rng_seed(0)
    trace = poutine.trace(model).get_trace(*args)
    values = {name: site["value"] for name, site in latent_sites(trace) if not site["fn"].support.is_discrete}
    return Enumeration(trace, sites_to_sum_out(trace, values)), values


def bound(model, args, values):
    return lambda: poutine.condition(model, data=values)(*args)


@pytest.mark.parametrize("name", MODELS)
def test_value_and_gradient_are_those_of_the_sum(name):
    model, *args = MODELS[name]
    summed, values = at_a_draw(model, *args)
    points = {name: value.clone().requires_grad_() for name, value in values.items()}
    log_joint = summed.log_joint(bound(model, args, points))
    expected = by_brute_force(model, args, points)[0].logsumexp(0)
    torch.testing.assert_close(log_joint, expected)
    leaves = list(points.values())
    ours, theirs = (torch.autograd.grad(each, leaves, allow_unused=True, materialize_grads=True) for each in (log_joint, expected))
    torch.testing.assert_close(ours, theirs)
    summed.check(bound(model, args, values))


@pytest.mark.parametrize("name", MODELS)
def test_draws_are_those_of_the_posterior(name):
    model, *args = MODELS[name]
    summed, values = at_a_draw(model, *args)
    log_p, every = by_brute_force(model, args, values)
    number = 400
    drawn = [summed.marginal(bound(model, args, values)).trace for _ in range(number)]
    exact = log_p.softmax(0)
    for site in summed.names:
        mean = sum(weight * each[site].double() for weight, each in zip(exact, every, strict=True))
        square = sum(weight * each[site].double() ** 2 for weight, each in zip(exact, every, strict=True))
        found = torch.stack([trace.nodes[site]["value"].double() for trace in drawn]).mean(0)
        # Five standard errors, and one draw for what is nearly certain.
        error = 5 * ((square - mean**2).clamp(min=0) / number).sqrt() + 1 / number
        assert ((found - mean).abs() <= error).all(), site
