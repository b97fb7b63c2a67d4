"""Why no step is finite any more: the first reason that fresh draws show, in words."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta

from pyro_flowguides.compiled.lost import why_lost

FINITE = "every site's log-probability is finite, its gradient is not"


def guide_at(*values):
    """A guide that draws one value after another, again and again."""
    given = iter([])

    def guide():
        nonlocal given
        value = next(given, None)
        if value is None:
            given = iter(values)
            value = next(given)
        pyro.sample("x", dist.Delta(torch.as_tensor(value)))

    return guide


def root():
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    mean = torch.where(x > 0, x.sqrt(), 0.0)
    pyro.sample("y", dist.Normal(mean.sum(-1), 1.0), obs=torch.tensor(0.3))


def test_a_gradient_that_is_not_finite_is_named_with_the_value_and_the_line():
    reason = why_lost(root, guide_at([2.0, -1.25]), (), {})
    number = root.__code__.co_firstlineno + 2
    assert reason.startswith(
        "log p is finite and its gradient to site 'x' is nan, for example where x = -1.25, "
        f"by {__file__}, line {number}: mean = torch.where(x > 0, x.sqrt(), 0.0)"
    )
    assert reason.endswith("torch.where(x > 0, x.clamp(min=1e-6).sqrt(), 0.0)")


def test_one_draw_of_many_is_found():
    """The fiftieth is looked at, and none after it."""
    good, bad = [2.0, 1.0], [2.0, -1.0]
    assert "x = -1" in why_lost(root, guide_at(*[good] * 49, bad), (), {})
    assert why_lost(root, guide_at(*[good] * 50, bad), (), {}) == FINITE


def test_a_gradient_that_is_infinite_has_no_line():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("root", -x.abs().sqrt())

    reason = why_lost(model, guide_at(0.0), (), {})
    assert re.match(r"log p is finite and its gradient to site 'x' is (nan|-?inf), for example where x = 0", reason)


def test_a_site_without_density_comes_first():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x.sqrt() > -1.0, -torch.inf, 0.0))

    assert "site 'wall' of the model has log-probability -inf" in why_lost(model, guide_at(2.0), (), {})


def test_a_draw_that_raises_is_told():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        raise RuntimeError("no   factor\n at " + "x" * 400)
        return x

    assert why_lost(model, guide_at(2.0), (), {}) == "a draw raises " + ("no factor at " + "x" * 400)[:300]


def test_arguments_reach_model_and_guide():
    def model(limit, *, sign):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(sign * x > limit, -torch.inf, 0.0))

    def guide(limit, *, sign):
        pyro.sample("x", dist.Delta(sign * torch.as_tensor(limit + 1)))

    assert "'wall'" in why_lost(model, guide, (3.0,), {"sign": -1})


@pytest.mark.parametrize("observed", [True, False])
def test_without_a_reason_nothing_is_left_behind(observed):
    """A model whose density depends on no latent has no gradient to look at."""

    def model():
        if observed:
            pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.3))

    guide = AutoDelta(model) if observed else (lambda: None)
    state = torch.random.get_rng_state()
    with pyro.poutine.trace() as outer:
        assert why_lost(model, guide, (), {}) == FINITE
    assert not [name for name in outer.trace.nodes if name in ("x", "y")]
    assert torch.equal(torch.random.get_rng_state(), state)
