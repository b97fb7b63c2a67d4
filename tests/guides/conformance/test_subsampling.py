"""Minibatches: global latents, and latents inside a subsampled plate."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import Y, train
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
)
from pyro.optim import ClippedAdam
from torch.distributions import biject_to, constraints
from transform_cases import perturb

import pyro_flowguides as fg


def test_subsampled_data_with_global_latents():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=2) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    def create_plates(y):
        return pyro.plate("data", len(y), subsample_size=2)

    for options in ({}, {"create_plates": create_plates}):
        pyro.clear_param_store()
        losses = train(model, fg.AutoCoupling(model, **options), torch.tensor(Y), steps=3)
        assert all(loss == loss for loss in losses)


# --- latents inside a subsampled plate --------------------------------------------------------------------------------

N = 6
DATA = [0.3, -1.2, 2.5, 0.8, -0.4, 1.7]


def hierarchy(y, batch_size=None):
    """A positive global scale, a normal and a positive latent per row, and data."""
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), 0.5))
    with pyro.plate("rows", len(y), subsample_size=batch_size):
        batch = pyro.subsample(y, event_dim=0)
        local = pyro.sample("local", dist.Normal(torch.zeros(()), scale))
        width = pyro.sample("width", dist.Uniform(torch.zeros(()), 2.0))
        pyro.sample("y", dist.Normal(local, 0.5 + width), obs=batch)


def hierarchy_at(y, index):
    """The same with the indices of the minibatch among its arguments."""
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), 0.5))
    with pyro.plate("rows", N, subsample=index):
        local = pyro.sample("local", dist.Normal(torch.zeros(()), scale))
        width = pyro.sample("width", dist.Uniform(torch.zeros(()), 2.0))
        pyro.sample("y", dist.Normal(local, 0.5 + width), obs=y[index])


def rows_at(y, index):
    return pyro.plate("rows", N, subsample=index)


def loss_and_gradient(loss, model, guide, *args):
    """With the same draws of the flat latent at every call."""
    guide.zero_grad()
    pyro.set_rng_seed(1)
    value = loss.loss_and_grads(model, guide, *args)
    return value, torch.cat([parameter.grad.flatten().clone() for parameter in guide.parameters()])


@pytest.mark.parametrize("Loss", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO])
def test_minibatches_estimate_loss_and_gradient_without_bias(Loss):
    """Exactly: given the draw of the latent, the mean over all minibatches is what the whole data give."""
    y = torch.tensor(DATA)
    guide = fg.AutoFlow(hierarchy_at, create_plates=rows_at).setup(y, torch.arange(N))
    perturb(guide.flow, 0.3)
    loss = Loss(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    expected_loss, expected_gradient = loss_and_gradient(loss, hierarchy_at, guide, y, torch.arange(N))
    # The draws come before the plates, so that the same seed gives the same latent; but for the first call with arguments of
    # a new shape, which looks at the model before.
    loss.loss(hierarchy_at, guide, y, torch.tensor([0, 1]))
    results = [
        loss_and_gradient(loss, hierarchy_at, guide, y, torch.tensor(index))
        for index in itertools.combinations(range(N), 2)
    ]
    losses, gradients = zip(*results, strict=True)
    assert max(losses) - min(losses) > 1.0
    assert sum(losses) / len(losses) == pytest.approx(expected_loss, rel=1e-10)
    mean_gradient = torch.stack(gradients).mean(0)
    torch.testing.assert_close(mean_gradient, expected_gradient, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("vectorize", "gradient"), [(False, "path"), (True, "total")])
def test_random_minibatches_estimate_the_loss_without_bias(vectorize, gradient):
    """The plate draws the indices: many minibatches against the whole data, within four standard errors."""
    y = torch.tensor(DATA)
    guide = fg.AutoPlanar(hierarchy, num_layers=2, gradient=gradient).setup(y, batch_size=2)
    perturb(guide.flow, 0.3)
    loss = Trace_ELBO(num_particles=20 if vectorize else 4, vectorize_particles=vectorize, max_plate_nesting=1)
    whole = torch.tensor([loss.loss(hierarchy, guide, y) for _ in range(100)])
    parts = torch.tensor([loss.loss(hierarchy, guide, y, batch_size=2) for _ in range(100)])
    standard_error = float(((whole.var() + parts.var()) / 100) ** 0.5)
    assert float(parts.mean()) == pytest.approx(float(whole.mean()), abs=4 * standard_error)
    assert float(parts.std()) > float(whole.std())


def test_latent_covers_the_whole_plate():
    y = torch.tensor(DATA)
    guide = fg.AutoFlow(hierarchy).setup(y, batch_size=2)
    assert guide.latent_dim == 1 + 2 * N
    perturb(guide.flow, 0.3)
    trace = poutine.trace(guide).get_trace(y, batch_size=2)
    index = trace.nodes["rows"]["value"]
    assert trace.nodes["local"]["value"].shape == (2,)
    assert float(trace.nodes["local"]["scale"]) == N / 2
    latent = trace.nodes["_AutoFlow_latent"]
    assert latent["scale"] == 1.0
    values = {site.name: value for site, value in guide.latents.unpack(latent["value"])}
    torch.testing.assert_close(trace.nodes["local"]["value"], values["local"][index])
    torch.testing.assert_close(trace.nodes["width"]["value"], 2 * values["width"][index].sigmoid())
    for shape, estimate in (((), guide.median()), ((3,), guide.quantiles([0.1, 0.5, 0.9]))):
        assert estimate["scale"].shape == shape
        assert estimate["local"].shape == estimate["width"].shape == (*shape, N)


def test_mean_field_elbo_scales_once():
    y = torch.tensor(DATA)
    guide = fg.AutoFlow(hierarchy_at, create_plates=rows_at).setup(y, torch.arange(N))
    perturb(guide.flow, 0.3)
    losses = []
    Trace_ELBO().loss(hierarchy_at, guide, y, torch.tensor([4, 1]))
    for Loss in (Trace_ELBO, TraceMeanField_ELBO):
        pyro.set_rng_seed(0)
        losses.append(Loss().loss(hierarchy_at, guide, y, torch.tensor([4, 1])))
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


@pytest.mark.parametrize("vectorize", [False, True])
def test_trains_on_minibatches_of_any_size(vectorize):
    y = torch.tensor(DATA)
    guide = fg.AutoFlow(hierarchy)
    loss = Trace_ELBO(num_particles=2, vectorize_particles=vectorize, max_plate_nesting=1)
    svi = SVI(hierarchy, guide, ClippedAdam({"lr": 0.01}), loss)
    for batch_size in (2, 2, 3, None, 2):
        assert math.isfinite(svi.step(y, batch_size=batch_size))
    assert guide.latent_dim == 1 + 2 * N
    draws = Predictive(hierarchy, guide=guide, num_samples=5, parallel=True)(y)
    assert draws["local"].shape == (5, N)


def states(batch, index, size):
    """Time series of which some are observed at a time, with the plate's indices as an argument."""
    drift = pyro.sample("drift", dist.LogNormal(-1.0, 0.5))
    with pyro.plate("series", size, subsample=index):
        z = 0.0
        for t, observed in enumerate(batch):
            z = pyro.sample(f"state_{t}", dist.Normal(z, drift))
            pyro.sample(f"obs_{t}", dist.Bernoulli(logits=z), obs=observed)


def series_plate(batch, index, size):
    return pyro.plate("series", size, subsample=index)


@pytest.mark.parametrize("in_list", [False, True])
def test_create_plates_for_indices_that_are_given(in_list):
    if in_list:
        guide = AutoGuideList(states, create_plates=series_plate)
        guide.append(AutoDelta(poutine.block(states, expose=["drift"])))
        guide.append(fg.AutoFlow(poutine.block(states, hide=["drift"])))
    else:
        guide = fg.AutoFlow(states, create_plates=series_plate)
    data = dist.Bernoulli(0.5).sample((2, 10))
    svi = SVI(states, guide, ClippedAdam({"lr": 0.01}), Trace_ELBO())
    # The last minibatch is smaller.
    for begin in (0, 4, 8):
        index = torch.arange(begin, min(begin + 4, 10))
        assert math.isfinite(svi.step(data[:, index], index, size=10))
    assert guide.median(data, torch.arange(10), size=10)["state_1"].shape == (10,)


@pytest.mark.parametrize("independent", [True, False])
def test_create_plates_without_latents(independent):
    """Such a guide makes the plates, and nothing else."""

    def model(data):
        size = len(data)
        with pyro.plate("rows", size, dim=-2), pyro.plate("columns", size, dim=-1):
            batch = pyro.subsample(data, event_dim=0)
            pyro.sample("obs", dist.Normal(0, 1), obs=batch)

    def create_plates(data):
        size = len(data)
        rows = pyro.plate("rows", size, subsample_size=5, dim=-2)
        if independent:
            return rows, pyro.plate("columns", size, subsample_size=5, dim=-1)
        with rows as index:
            pass
        return rows, pyro.plate("columns", size, subsample=index, dim=-1)

    guide = fg.AutoFlow(model, create_plates=create_plates)
    data = torch.randn(10, 10)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.01}), Trace_ELBO())
    assert math.isfinite(svi.step(data))
    trace = poutine.trace(guide).get_trace(data)
    assert list(trace.nodes["rows"]["value"].shape) == [5]
    assert guide.median(data) == guide.quantiles([0.5], data) == {}


def test_two_subsampled_plates_and_event_dimensions():
    """Rows and columns with latents of each and of both, as plates in either order of the dimensions."""

    def model():
        rows = pyro.plate("rows", 5, subsample_size=2, dim=-2)
        columns = pyro.plate("columns", 4, subsample_size=3, dim=-1)
        with rows as i:
            pyro.sample("row", dist.Dirichlet(torch.ones(3)))
        with columns as j:
            pyro.sample("column", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with rows, columns:
            cell = pyro.sample("cell", dist.LKJCholesky(2, torch.tensor(1.0)))
        return i, j, cell

    guide = fg.AutoFlow(model)
    loss = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=2)
    assert math.isfinite(SVI(model, guide, ClippedAdam({"lr": 0.01}), loss).step())
    assert guide.latent_dim == 5 * 2 + 4 * 2 + 5 * 4
    trace = poutine.trace(guide).get_trace()
    i, j = trace.nodes["rows"]["value"], trace.nodes["columns"]["value"]
    latent = trace.nodes["_AutoFlow_latent"]["value"]
    values = {site.name: value for site, value in guide.latents.unpack(latent)}
    cell = biject_to(constraints.corr_cholesky)(values["cell"][i][:, j])
    torch.testing.assert_close(trace.nodes["cell"]["value"], cell)
    assert {name: tuple(value.shape) for name, value in guide.median().items()} == {
        "row": (5, 1, 3),
        "column": (4, 2),
        "cell": (5, 4, 2, 2),
    }


def test_subsampling_under_jit():
    def model():
        with pyro.plate("rows", N, subsample_size=2) as index:
            local = pyro.sample("local", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(local, 1.0), obs=torch.tensor(DATA)[index])

    guide = fg.AutoPlanar(model, init_scale=1.0)
    loss = JitTrace_ELBO(num_particles=8, vectorize_particles=True, ignore_jit_warnings=True)
    losses = train(model, guide, steps=150, loss=loss)
    assert len(set(losses)) > 100
    assert sum(losses[-50:]) < sum(losses[:50])


def test_a_step_runs_the_model_once():
    """The structure is looked at when arguments of a new shape come, and however many come, not for ever."""
    runs = []

    def model(y, step):
        runs.append(step)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    guide = fg.AutoPlanar(model, num_layers=1).setup(torch.zeros(2), 0)
    runs.clear()
    for _ in range(3):
        guide(torch.zeros(2), 0)
    assert runs == []
    guide(torch.zeros(3), 0)
    assert len(runs) == 1
    for step in range(200):
        guide(torch.zeros(2), step)
    assert len(runs) < 80


# --- whitening and fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 4])
def test_whitening_of_local_latents_sees_the_whole_plate(batch_size):
    """Also where the minibatch does not divide the plate, nearly."""

    def model(batch_size=None):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("rows", N, subsample_size=batch_size) as index:
            local = pyro.sample("local", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(local, 0.5), obs=torch.tensor(DATA)[index])

    guides = []
    for size in (None, batch_size):
        pyro.clear_param_store()
        guides.append(fg.AutoPlanar(model).whiten(model_kwargs={"batch_size": size}))
    whole, parts = guides
    if N % batch_size == 0:
        torch.testing.assert_close(parts.fixed_map.loc, whole.fixed_map.loc, rtol=0, atol=1e-4)
        torch.testing.assert_close(parts.fixed_map.scale, whole.fixed_map.scale, rtol=0, atol=1e-4)
    else:
        # An element of two minibatches counts 1.5 times in place of 0.75.
        ratio = parts.fixed_map.scale.diagonal() / whole.fixed_map.scale.diagonal()
        assert float(ratio.max()) < 1.3
        assert float(ratio.min()) > 0.7


def test_whitening_of_global_latents_keeps_one_minibatch():
    y = torch.randn(1000)

    def model():
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 10.0))
        with pyro.plate("data", len(y), subsample_size=50) as index:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])

    guide = fg.AutoPlanar(model).setup()
    guide.whiten()
    # The posterior of 1000 points, at the mean of 50 of them.
    assert guide.fixed_map.scale.item() == pytest.approx(1000**-0.5, rel=1e-3)
    assert guide.fixed_map.loc.item() == pytest.approx(0.0, abs=4 / 50**0.5)


def test_fit_with_local_latents():
    y = torch.tensor(DATA)
    guide = fg.AutoPlanar(hierarchy, num_layers=2)
    result = fg.fit(
        hierarchy, guide, y, model_kwargs={"batch_size": 3}, num_steps=100, num_particles=16, seed=0, progress=False
    )
    assert result.num_skipped == 0
    loss = Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1)
    assert -loss.loss(hierarchy, guide, y) > -14.0
