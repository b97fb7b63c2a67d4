"""The table of recipes that every test of a recipe runs over; a new recipe adds its row here."""

import functools

import pyro.distributions as dist
import torch
from transform_cases import perturb

from pyro_flowguides import NormalizingFlow, flows

RECIPE_CASES = {
    **flows.RECIPES,
    "sylvester_householder": functools.partial(flows.sylvester, basis="householder"),
    "sylvester_triangular": functools.partial(flows.sylvester, basis="triangular"),
    # With few ridges and small steps these bear a perturbation of size 1.
    "continuous_planar_4": functools.partial(flows.continuous_planar, num_units=4, num_steps=64),
    "continuous_sylvester_4": functools.partial(flows.continuous_sylvester, num_units=4, num_steps=64),
}


def size_of_perturbation(recipe):
    """1, or less for fields of many ridges: a perturbation of size 1 in all of them would need far more steps."""
    return 0.3 if recipe in (flows.continuous_planar, flows.continuous_sylvester) else 1.0


def make_flow(recipe, dim, dtype, context_dim=0, scale=1.0, **options):
    """A NormalizingFlow over two perturbed layers of a recipe."""
    transform = perturb(
        recipe(dim, num_layers=2, context_dim=context_dim).to(dtype), scale * size_of_perturbation(recipe)
    )
    base = dist.Normal(torch.zeros(dim, dtype=dtype), 1.0).to_event(1)
    return NormalizingFlow(base, transform, **options)
