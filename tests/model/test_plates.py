"""Latents inside plates: whole plates, minibatches, and what the arguments say of them."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import constraints

from pyro_flowguides.model import plates


def model(size=6, batch_size=2, upper=1.0):
    with pyro.plate("outer", 3, dim=-2), pyro.plate("rows", size, subsample_size=batch_size, dim=-1):
        pyro.sample("x", dist.Uniform(0.0, torch.as_tensor(upper)))


def test_a_site_is_extended_to_whole_plates():
    site = poutine.trace(model).get_trace().nodes["x"]
    before = site["value"]
    plates.cover_whole_plates(site)
    assert site["value"].shape == site["fn"].batch_shape == (3, 6)
    torch.testing.assert_close(site["value"], before.repeat(1, 3), rtol=0, atol=0)
    assert site["fn"].support.check(site["value"]).all()


def test_a_support_of_its_own_for_every_element_is_refused():
    site = poutine.trace(model).get_trace(upper=[1.0, 2.0]).nodes["x"]
    with pytest.raises(
        ValueError, match="support of latent site 'x'.*of plate 'rows', of which a minibatch shows only 2 of 6"
    ):
        plates.cover_whole_plates(site)


def test_the_bounds_along_an_axis():
    support = constraints.independent(constraints.interval(torch.zeros(3, 2), torch.ones(3, 2)), 1)
    narrowed = plates.same_along(support, -2)
    assert narrowed.base_constraint.upper_bound.shape == (1, 2)
    assert narrowed.check(torch.full((5, 2), 0.5)).all()
    # Along another axis they differ, and a bound that lacks the axis is the same for all.
    support = constraints.interval(torch.tensor(0.0), torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match="differ along dimension -1"):
        plates.same_along(support, -1)
    assert plates.same_along(support, -2).upper_bound.shape == (2,)


def test_selection_by_the_indices_of_plates():
    frames = poutine.trace(model).get_trace().nodes["x"]["cond_indep_stack"]
    value = torch.arange(18.0).reshape(3, 6)
    selected = plates.select(value, frames, {"rows": torch.tensor([4, 1])}, 0)
    torch.testing.assert_close(selected, value[:, [4, 1]])
    events = plates.select(value.unsqueeze(-1), frames, {"rows": torch.tensor([4, 1])}, 1)
    torch.testing.assert_close(events.squeeze(-1), value[:, [4, 1]])


@pytest.mark.parametrize(("size", "count"), [(6, 2), (6, 4), (5, 5)])
def test_minibatches_cover_a_plate(size, count):
    sites = plates.subsample_sites(poutine.trace(model).get_trace(size, count))
    assert set(sites) == ({"rows"} if count < size else set())
    sets = plates.minibatches(sites, whole=["rows"])
    covered = torch.cat([indices["rows"] for indices in sets]) if count < size else torch.arange(size)
    assert set(covered.tolist()) == set(range(size))
    (kept,) = plates.minibatches(sites, whole=[])
    assert set(kept) == set(sites)


def test_given_indices_are_told_from_drawn_ones():
    def given(index):
        with pyro.plate("rows", 6, subsample=index):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    assert plates.has_given_indices(plates.trace_plates(given, (torch.tensor([1]),), {})["rows"])
    assert not plates.has_given_indices(plates.trace_plates(model, (), {})["rows"])


def test_signatures_differ_where_a_model_may():
    same = [({"a": torch.zeros(3), "b": 1.5},), ({"b": 2.5, "a": torch.ones(3)},)]
    assert plates.signature(*same[0]) == plates.signature(*same[1])
    base = plates.signature(torch.zeros(3), 2, "a", [np.zeros(2)])
    for other in (
        (torch.zeros(4), 2, "a", [np.zeros(2)]),
        (torch.zeros(3, dtype=torch.float64), 2, "a", [np.zeros(2)]),
        (torch.zeros(3), 3, "a", [np.zeros(2)]),
        (torch.zeros(3), 2, "b", [np.zeros(2)]),
        (torch.zeros(3), 2, "a", [np.zeros(3)]),
        (torch.zeros(3), 2, "a", None),
    ):
        assert plates.signature(*other) != base
    assert hash(base) == hash(plates.signature(torch.ones(3), 2, "a", [np.ones(2)]))
