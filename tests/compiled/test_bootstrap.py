"""Flow annealed importance sampling bootstrap: the gradient of the divergence, the buffer, what it refuses."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides import FlowAnnealedBootstrap

MEAN, SD = 1.0, 0.8


def model():
    pyro.sample("x", dist.Normal(torch.tensor(MEAN, dtype=torch.float64), SD))


def subsampled(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])


def branching():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.factor("factor", x if x > 0 else 2 * x)


def with_data(y):
    pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0).expand([len(y)]).to_event(1), obs=y)


def normal_guide(model=model, **options):
    return fg.AutoFlow(model, fg.transforms.Affine, affine=None, **{"init_scale": 1.3, **options})


def prepared(objective, guide, step=0):
    return objective.inputs(step, torch.zeros(()), guide.model, guide, (), {})


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_the_gradient_is_that_of_the_divergence(alpha):
    """Of normals p^α q^(1 − α) is a normal as well."""
    pyro.set_rng_seed(0)
    guide = normal_guide()
    guide.setup()
    objective = FlowAnnealedBootstrap(8192, buffer_size=65_536, alpha=alpha, num_leapfrog_steps=2)
    x, corrections = prepared(objective, guide)
    torch.testing.assert_close(corrections, torch.ones_like(corrections))
    value = objective.loss(model, guide, (), {}, x, corrections)
    parameters = list(guide.parameters())
    found = torch.cat([each.reshape(-1) for each in torch.autograd.grad(value, parameters)])

    points = torch.stack([torch.zeros(1), torch.ones(1)]).double()
    loc, end = guide.flow(points)[:, 0]
    scale = end - loc
    m, t = float(loc.detach()), float(scale.detach())
    precision = alpha / SD**2 + (1 - alpha) / t**2
    mean = (alpha * MEAN / SD**2 + (1 - alpha) * m / t**2) / precision
    exact = scale.log() + 0.5 * ((mean - loc) ** 2 + 1 / precision) / scale**2
    expected = torch.cat([each.reshape(-1) for each in torch.autograd.grad(exact, parameters)])

    # Of the batch, and of the buffer that it comes from.
    each = torch.stack(
        [
            torch.cat([part.reshape(-1) for part in torch.autograd.grad(-guide.log_prob(point), parameters)])
            for point in x[:200]
        ]
    )
    error = each.std(0) * (1 / 8192 + 3 / 8192) ** 0.5
    assert bool(((found - expected).abs() < 5 * error).all()), (found, expected, error)


def test_corrections_and_weights_follow_the_guide():
    pyro.set_rng_seed(0)
    guide = normal_guide()
    objective = FlowAnnealedBootstrap(64, buffer_size=64, num_updates=100)
    prepared(objective, guide)
    before = objective.state_dict()
    log_q, log_weights = before["log_q"].clone(), before["log_weights"].clone()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.7)
    x, corrections = prepared(objective, guide, step=1)
    now = objective.state_dict()
    changed = now["log_q"] != log_q
    torch.testing.assert_close(now["log_q"][changed], guide.log_prob(now["points"][changed]).detach())
    torch.testing.assert_close(now["log_weights"][changed] - log_weights[changed], (log_q - now["log_q"])[changed])
    places = (x[:, None] == now["points"][None]).all(-1).double().argmax(-1)
    expected = (log_q[places] - guide.log_prob(x).detach()).exp()
    torch.testing.assert_close(corrections, expected.clamp(max=10))
    assert float(corrections.max()) > 1.5 > 0.7 > float(corrections.min())
    # The same step once more is the same batch.
    assert prepared(objective, guide, step=1)[0] is x


def test_the_buffer_keeps_the_newest():
    objective = FlowAnnealedBootstrap(8, buffer_size=20, num_updates=2)
    guide = normal_guide()
    prepared(objective, guide)
    first = objective.state_dict()["points"].clone()
    # A fill of 8 before the first step, and 8 at it.
    assert (first != 0).all(-1).tolist() == [True] * 16 + [False] * 4
    prepared(objective, guide, step=1)
    assert torch.equal(objective.state_dict()["points"], first)
    prepared(objective, guide, step=2)
    second = objective.state_dict()["points"]
    assert (second != first).all(-1).tolist() == [True] * 4 + [False] * 12 + [True] * 4
    assert objective.state_dict()["num_added"] == 24


def test_a_captured_fit_is_the_eager_one():
    runs = {}
    for backend in ("eager", "replay"):
        pyro.clear_param_store()
        loss = FlowAnnealedBootstrap(16, buffer_size=64, num_updates=3)
        options = {"seed": 0, "num_steps": 12, "loss": loss, "whiten": None, "progress": False}
        runs[backend] = fg.fit(model, normal_guide(), backend=backend, **options)
    np.testing.assert_allclose(runs["replay"].losses, runs["eager"].losses, rtol=1e-9)
    assert runs["replay"].losses[-3:].mean() < runs["replay"].losses[:3].mean() + math.log(10)


@pytest.mark.parametrize(
    ("model", "guide", "args", "error", "message"),
    [
        (model, AutoNormal(model), (), TypeError, "guide must be an AutoFlow, .* got AutoNormal"),
        (
            branching,
            normal_guide(branching),
            (),
            ValueError,
            "can neither be run on many draws at once nor be recorded",
        ),
        (subsampled, normal_guide(subsampled), (torch.zeros(5),), ValueError, "plate 'data' subsamples its data"),
    ],
)
def test_what_it_refuses(model, guide, args, error, message):
    with pytest.raises(error, match=message):
        FlowAnnealedBootstrap(8, buffer_size=8).inputs(0, torch.zeros(()), model, guide, args, {})


def test_other_arguments_are_refused():
    objective, guide, y = FlowAnnealedBootstrap(8, buffer_size=8), normal_guide(with_data), torch.zeros(3)
    objective.inputs(0, y, with_data, guide, (y,), {})
    with pytest.raises(ValueError, match="the arguments are others than those of the first step"):
        objective.inputs(1, y, with_data, guide, (y + 1,), {})
    other = normal_guide(with_data)
    objective.inputs(0, y, with_data, other, (y + 1,), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draws": 0}, "num_draws must be at least 1"),
        ({"num_intermediate": 0}, "num_intermediate must be at least 1"),
        ({"num_draws": 16, "buffer_size": 8}, "buffer_size must be at least num_draws = 16, got 8"),
        ({"alpha": 0.5}, "alpha must be at least 1, got 0.5"),
    ],
)
def test_wrong_numbers(options, message):
    with pytest.raises(ValueError, match=f"FlowAnnealedBootstrap: {message}"):
        FlowAnnealedBootstrap(**options)
