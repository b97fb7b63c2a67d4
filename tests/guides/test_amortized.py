"""Amortised guides for local latents: their density, their scaling, what they learn and what they refuse."""

import copy
import functools
import io
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from models import train
from pyro import poutine
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value
from torch import nn
from torch.distributions import biject_to
from transform_cases import perturb

import pyro_flowguides as fg
from pyro_flowguides import flows
from pyro_flowguides import transforms as T
from pyro_flowguides.model.sites import latent_sites

RECIPES = {
    "diagonal normal": None,
    "coupling": "coupling",
    "iaf": functools.partial(flows.iaf, num_layers=2),
    "planar": functools.partial(flows.planar, num_layers=3),
    "sylvester": functools.partial(flows.sylvester, num_layers=2, num_vectors=2),
    "spline": functools.partial(flows.spline_coupling, num_layers=2),
}
every_base = pytest.mark.parametrize("base", ["normal", "student_t"])
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
LOADING, NOISE = 1.5, 0.7


class Encoder(nn.Module):
    """Reads the data, and leaves the other arguments of a model alone."""

    def __init__(self, in_features, context_dim=6):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_features, 8), nn.Tanh(), nn.Linear(8, context_dim, bias=False), nn.Tanh()
        )

    def forward(self, data, *others):
        return self.layers(data)


class SubsampledEncoder(Encoder):
    """Reads the rows of the minibatch alone."""

    def forward(self, data, *others):
        return super().forward(pyro.subsample(data, event_dim=1))


class ColumnEncoder(Encoder):
    """For data plates at dimension −2."""

    def forward(self, data, *others):
        return super().forward(data).unsqueeze(-2)


def make_data(num_data, dtype=torch.float64):
    return LOADING * torch.randn(num_data, 1, dtype=dtype) + NOISE * torch.randn(num_data, 1, dtype=dtype)


def conjugate(data, full_size=None):
    """z_n ~ N(0, 1), x_n ~ N(a z_n, s); a minibatch where the full size is given."""
    zero = data.new_zeros(())
    with pyro.plate("data", full_size or len(data), subsample_size=len(data)):
        z = pyro.sample("z", dist.Normal(zero, 1.0))
        pyro.sample("x", dist.Normal(LOADING * z, NOISE), obs=data.squeeze(-1))


def conjugate_answer(data):
    """The mean and standard deviation of every z, and the log evidence of every datum."""
    precision = 1 + LOADING**2 / NOISE**2
    mean = LOADING / NOISE**2 * data.squeeze(-1) / precision
    log_evidence = dist.Normal(data.new_zeros(()), (LOADING**2 + NOISE**2) ** 0.5).log_prob(data.squeeze(-1))
    return mean, precision**-0.5, log_evidence


def several_sites(data):
    """Local sites with supports, event dimensions and an inner plate to the left of that of the data."""
    zero = data.new_zeros(())
    plate = pyro.plate("data", len(data), dim=-1)
    with plate:
        a = pyro.sample("a", dist.LogNormal(zero, 0.5))
        simplex = pyro.sample("simplex", dist.Dirichlet(data.new_tensor([2.0, 3.0, 4.0])))
        pyro.sample("interval", dist.Uniform(data.new_tensor(-2.0), 3.0))
        with pyro.plate("times", 2, dim=-2):
            pair = pyro.sample("pair", dist.Normal(data.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(a + simplex[..., 0] + pair.sum(-1), 1.0), obs=data.mT)


def data_on_the_left(data):
    """The data plate at dimension −2, with an inner plate at −1."""
    with pyro.plate("data", len(data), dim=-2):
        local = pyro.sample("local", dist.Normal(data.new_zeros(()), 1.0))
        with pyro.plate("times", 2, dim=-1):
            step = pyro.sample("step", dist.Gamma(data.new_tensor(2.0), 1.0))
            pyro.sample("x", dist.Normal(local + step, 1.0), obs=data)


def make_guide(model, data, recipe="coupling", **options):
    """A guide at parameters moved by O(1) noise."""
    encoder = (ColumnEncoder if model is data_on_the_left else Encoder)(data.shape[-1]).to(data)
    guide = fg.AmortizedFlow(model, encoder, recipe, **options).setup(data)
    perturb(guide.flow, 0.5)
    perturb(guide.base)
    return guide


train = functools.partial(train, lr=0.01, num_particles=8)


# --- the density ---------------------------------------------------------------------------------------------------------


def log_density_of_base(base, z):
    """log q0 by torch's own distributions."""
    if isinstance(base, fg.bases.StudentT):
        return torch.distributions.StudentT(base.df, 0.0, ((base.df - 2) / base.df).sqrt()).log_prob(z).sum(-1)
    return dist.Normal(z.new_zeros(()), 1.0).log_prob(z).sum(-1)


@every_recipe
@every_base
@pytest.mark.parametrize("model", [several_sites, data_on_the_left])
def test_log_q_is_that_of_the_jacobian_for_every_datum(recipe, base, model, dtype, tolerance):
    """log q0(z) − log|det dx/dz| by autograd, datum by datum, with the maps to the supports."""
    data = torch.randn(4, 2, dtype=dtype)
    guide = make_guide(model, data, recipe, base=base)
    trace = poutine.trace(guide).get_trace(data)
    trace.compute_log_prob()
    latent = trace.nodes["_AmortizedFlow_latent"]
    posterior = guide.get_posterior(data)
    # The point before the flow, by its inverse; the flow itself is differentiated below.
    z = posterior.transform.inverse_and_log_det(latent["value"])[0].detach()
    context = guide.encoder(data).detach()
    per_datum = latent["log_prob"].reshape(len(data), -1).sum(-1)
    for n in range(len(data)):
        row = context.reshape(len(data), -1)[n]
        jacobian = torch.func.jacrev(lambda point, row=row: guide.flow.forward_and_log_det(point, row)[0])(
            z.reshape(len(data), -1)[n]
        )
        log_q0 = log_density_of_base(guide.base, z.reshape(len(data), -1)[n])
        expected = log_q0 - torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(per_datum[n], expected, rtol=tolerance(1e-6), atol=tolerance(1e-6))


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("model", [several_sites, data_on_the_left])
def test_sites_have_the_shapes_supports_and_jacobians_of_the_model(model, vectorize):
    data = torch.randn(4, 2, dtype=torch.float64)
    guide = make_guide(model, data)
    prototype = poutine.trace(model).get_trace(data)

    def in_plate(function):
        def run(*args):
            with pyro.plate("particles", 5, dim=-3):
                return function(*args)

        return run if vectorize else function

    trace = poutine.trace(in_plate(guide)).get_trace(data)
    replayed = poutine.trace(poutine.replay(in_plate(model), trace=trace)).get_trace(data)
    replayed.compute_log_prob()
    trace.compute_log_prob()
    layout_order = dict(latent_sites(prototype))
    position = 0
    latent = trace.nodes["_AmortizedFlow_latent"]["value"]
    for name, site in layout_order.items():
        value, fn = trace.nodes[name]["value"], site["fn"]
        expected = site["value"].shape
        if vectorize:
            expected = (5, *[1] * (2 - len(fn.batch_shape)), *expected)
        assert value.shape == expected, name
        assert fn.support.check(value).all(), name
        # The site's log-density is minus the log-determinant of its map, at the part of the vector that is its own.
        unconstrained = biject_to(fn.support).inv(value)
        jacobian = biject_to(fn.support).log_abs_det_jacobian(unconstrained, value)
        torch.testing.assert_close(trace.nodes[name]["log_prob"].sum(), -jacobian.sum())
        num_numbers = unconstrained.numel() // (latent.numel() // latent.shape[-1])
        part = latent[..., position : position + num_numbers]
        # All numbers of the part arrive, and those of a datum at that datum.
        axis = unconstrained.dim() - (len(unconstrained.shape) - value.dim()) - fn.event_dim
        data_axis = axis - (1 if model is several_sites else 2)
        latent_axis = latent.dim() - (2 if model is several_sites else 3)
        for n in range(len(data)):
            torch.testing.assert_close(
                unconstrained.select(data_axis, n).flatten().sort().values,
                part.select(latent_axis, n).flatten().sort().values,
            )
        position += num_numbers
    assert position == latent.shape[-1]
    assert not torch.isnan(replayed.log_prob_sum())


def test_the_order_within_a_datum_does_not_depend_on_the_number_of_particles():
    data = torch.randn(4, 2, dtype=torch.float64)
    guide = make_guide(several_sites, data)
    latent = torch.randn(3, 1, 4, guide.latent_dim, dtype=torch.float64)
    together = {site.name: value for site, value in guide.latents.unpack(latent)}
    for i in range(3):
        for site, value in guide.latents.unpack(latent[i], leading=0):
            torch.testing.assert_close(value, together[site.name][i].reshape(value.shape), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("recipe", "base"),
    [*[(recipe, "normal") for recipe in RECIPES.values()], ("coupling", "student_t")],
    ids=[*RECIPES, "coupling student_t"],
)
def test_the_path_gradient_has_the_mean_of_the_total_one(recipe, base):
    """Means over the same 2000 draws; their difference is the mean score of q, within 4 of its standard errors."""
    data = make_data(2)
    guide = make_guide(conjugate, data, recipe, base=base)
    gradients = {}
    for gradient in ("total", "path"):
        guide.gradient = gradient
        pyro.set_rng_seed(0)
        per_batch = []
        for _ in range(20):
            guide.zero_grad()
            Trace_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1).loss_and_grads(
                conjugate, guide, data
            )
            per_batch.append(torch.cat([parameter.grad.flatten() for parameter in guide.parameters()]))
        gradients[gradient] = torch.stack(per_batch)
    difference = gradients["path"] - gradients["total"]
    se = difference.std(0) / 20**0.5
    # 20 batches: Student's t with 19 degrees of freedom, for some thousand numbers.
    assert ((difference.mean(0)).abs() <= 8 * se + 1e-9).all()
    assert difference.abs().max() > 1e-3


# --- minibatches ---------------------------------------------------------------------------------------------------------


def elbo_at(model, guide, latent, *args):
    """log p − log q with every datum's latent given."""
    given = {"_AmortizedFlow_latent": latent}
    guide_trace = poutine.trace(poutine.condition(guide, data=given)).get_trace(*args)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
    # A conditioned site is observed; its density counts all the same.
    return model_trace.log_prob_sum() - guide_trace.log_prob_sum()


@every_recipe
@every_base
def test_the_elbo_over_all_minibatches_is_that_of_the_data(recipe, base):
    """Exactly: with the latents given, every term belongs to one datum."""
    data, latent = make_data(6), torch.randn(6, 1, dtype=torch.float64)
    guide = make_guide(conjugate, data, recipe, base=base)
    full = elbo_at(conjugate, guide, latent, data, 6)
    rows = [[0, 1], [2, 3], [4, 5]]
    minibatches = [elbo_at(conjugate, guide, latent[part], data[part], 6) for part in rows]
    torch.testing.assert_close(sum(minibatches) / 3, full, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("Reader", [Encoder, SubsampledEncoder])
def test_a_plate_that_subsamples_itself(Reader):
    """Model, guide and encoder get all data; the rows of the context are those of the plate's indices."""
    data, latent = make_data(6), torch.randn(6, 1, dtype=torch.float64)

    def model(data):
        with pyro.plate("data", len(data), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(data.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(LOADING * z, NOISE), obs=data[index].squeeze(-1))

    guide = fg.AmortizedFlow(model, Reader(1).double(), "iaf").setup(data)
    perturb(guide.flow)
    parts = []
    for rows in ([0, 1], [2, 3], [4, 5]):
        index = {"data": torch.tensor(rows)}
        pair = poutine.condition(model, data=index), poutine.condition(guide, data=index)
        parts.append(elbo_at(*pair, latent[rows], data))
    # A guide for the model without subsampling; the parameters are those of the store.
    whole = fg.AmortizedFlow(conjugate, Encoder(1).double(), "iaf").setup(data)
    full = elbo_at(conjugate, whole, latent, data)
    torch.testing.assert_close(sum(parts) / 3, full, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("when", ["set up on all data", "set up on a minibatch"])
def test_any_batch_size(when):
    """The scale is that of the model in every call, whatever the call that built the guide."""
    data = make_data(12)
    guide = fg.AmortizedFlow(conjugate, Encoder(1).double()).setup(
        data if when == "set up on all data" else data[:5], 12
    )
    for rows, full_size in ((12, 12), (5, 12), (1, 12), (5, 5), (3, 7)):
        trace = poutine.trace(guide).get_trace(data[:rows], full_size)
        assert trace.nodes["z"]["value"].shape == (rows,)
        assert trace.nodes["z"]["scale"] == trace.nodes["_AmortizedFlow_latent"]["scale"] == full_size / rows
        model_trace = poutine.trace(poutine.replay(conjugate, trace=trace)).get_trace(data[:rows], full_size)
        assert model_trace.nodes["z"]["scale"] == full_size / rows


def test_the_model_is_not_run_for_sizes_that_were_seen():
    runs = []

    def model(data, temperature):
        runs.append(len(data))
        conjugate(data)

    data = make_data(6)
    guide = fg.AmortizedFlow(model, Encoder(1).double()).setup(data, 0.1)
    for step in range(3):
        guide(data, step / 3)
        guide(data[:2], step / 3)
    assert runs == [6, 2]


def test_create_plates():
    data = make_data(6)
    guide = fg.AmortizedFlow(
        conjugate,
        Encoder(1).double(),
        create_plates=lambda data, full_size: pyro.plate("data", full_size, subsample_size=len(data)),
    ).setup(data, 6)
    trace = poutine.trace(guide).get_trace(data[:2], 6)
    assert trace.nodes["z"]["scale"] == trace.nodes["_AmortizedFlow_latent"]["scale"] == 3


# --- what it learns ------------------------------------------------------------------------------------------------------


def exact_encoder(data, full_size=None):
    """The mean of every posterior: the guide's map of it is linear, so that the family holds the answer."""
    return conjugate_answer(data)[0].unsqueeze(-1)


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(None, id="diagonal normal"), pytest.param(RECIPES["planar"], id="planar", marks=pytest.mark.slow)],
)
def test_learns_a_conjugate_posterior_from_minibatches(recipe):
    data = make_data(40)
    guide = fg.AmortizedFlow(conjugate, exact_encoder, recipe, gradient="path").setup(data, 40)
    order = [torch.randperm(40)[:10] for _ in range(600)]
    train(conjugate, guide, steps=600, lr=0.03, decay=0.01, batches=lambda step: (data[order[step]], 40))
    mean, sd, log_evidence = conjugate_answer(data)
    draws = guide.get_posterior(data).sample((4000,)).squeeze(-1)
    # Each of 40 means and deviations to 5 standard errors of 4000 draws, plus 2% of sd that training leaves.
    assert (draws.mean(0) - mean).abs().max() < (5 / 4000**0.5 + 0.02) * sd
    assert (draws.std(0) / sd - 1).abs().max() < 5 / 8000**0.5 + 0.02
    elbo = fg.draw(conjugate, guide, data, 40, num_samples=2000).elbo
    assert elbo.value < float(log_evidence.sum()) + 4 * elbo.se + 1e-9
    assert elbo.value > float(log_evidence.sum()) - 0.05


def test_new_data_get_their_posterior_without_training():
    data, new = make_data(200), make_data(50)
    guide = fg.AmortizedFlow(conjugate, exact_encoder, None, gradient="path").setup(data)
    train(conjugate, guide, data, steps=400, lr=0.03, decay=0.01)
    mean, sd, _ = conjugate_answer(new)
    torch.testing.assert_close(guide.median(new)["z"], mean, rtol=0, atol=0.02 * sd)
    low, high = guide.quantiles([0.1586553, 0.8413447], new)["z"]
    # 1001 fixed draws: an 84% quantile has a standard error of 0.048 sd.
    torch.testing.assert_close((high - low) / (2 * sd), torch.ones_like(low), rtol=0, atol=0.1)


def skewed(data):
    """Counts with a rate that is local: the posterior is a gamma distribution, skewed in log space."""
    with pyro.plate("data", len(data)):
        rate = pyro.sample("rate", dist.Gamma(data.new_tensor(0.5), 0.5))
        pyro.sample("count", dist.Poisson(rate), obs=data.squeeze(-1))


@pytest.mark.slow
def test_a_flow_is_closer_than_a_diagonal_normal():
    data = torch.tensor([[0.0], [1.0], [4.0], [0.0]], dtype=torch.float64)
    log_evidence = dist.GammaPoisson(data.new_tensor(0.5), 0.5).log_prob(data).sum()
    gaps = {}
    for name, recipe in (("normal", None), ("spline", RECIPES["spline"])):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = fg.AmortizedFlow(skewed, Encoder(1).double(), recipe, gradient="path", init_scale=2.0)
        train(skewed, guide, data, steps=200, lr=0.03, decay=0.03)
        elbo = fg.draw(skewed, guide, data, num_samples=4000).elbo
        assert elbo.value < float(log_evidence) + 4 * elbo.se
        gaps[name] = float(log_evidence) - elbo.value
    assert gaps["spline"] < 0.5 * gaps["normal"]


# --- with global latents -------------------------------------------------------------------------------------------------


def hierarchical(data, full_size):
    """μ ~ N(0, 2), z_n ~ N((μ, μ), I), x_n ~ N(z_n1 + z_n2, s): all conjugate, with z_n1 and z_n2 correlated."""
    mu = pyro.sample("mu", dist.Normal(data.new_zeros(()), 2.0))
    with pyro.plate("data", full_size, subsample_size=len(data)):
        z = pyro.sample("z", dist.Normal(mu.unsqueeze(-1), data.new_ones(2)).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), NOISE), obs=data.squeeze(-1))


def hierarchical_answer(data):
    """The mean of μ, the best ELBO of q(μ) ∏ q(z_n) and that of mean field.

    Of all products of given blocks the best is the normal one with the blocks of the precision, and its divergence from the
    posterior is half the difference of the log-determinants.
    """
    num_data = len(data)
    precision = torch.eye(1 + 2 * num_data, dtype=data.dtype)
    precision[0, 0] = 1 / 4 + 2 * num_data
    precision[0, 1:] = precision[1:, 0] = -1.0
    block = torch.eye(2, dtype=data.dtype) + 1 / NOISE**2
    for n in range(num_data):
        precision[1 + 2 * n : 3 + 2 * n, 1 + 2 * n : 3 + 2 * n] = block
    covariance = (NOISE**2 + 2) * torch.eye(num_data, dtype=data.dtype) + 4 * 2.0**2
    log_evidence = dist.MultivariateNormal(torch.zeros_like(data[:, 0]), covariance).log_prob(data[:, 0])
    of_blocks = precision[0, 0].log() + num_data * torch.linalg.slogdet(block)[1]
    log_det = torch.linalg.slogdet(precision)[1]
    mean = torch.linalg.solve(precision, torch.cat([data.new_zeros(1), data[:, 0].repeat_interleave(2) / NOISE**2]))[0]
    return (
        float(mean),
        float(log_evidence - 0.5 * (of_blocks - log_det)),
        float(log_evidence - 0.5 * (precision.diag().log().sum() - log_det)),
    )


def make_mixed_guide(local):
    def create_plates(data, full_size):
        return pyro.plate("data", full_size, subsample_size=len(data), dim=-1)

    guide = AutoGuideList(hierarchical, create_plates=create_plates)
    guide.append(fg.AutoFlow(poutine.block(hierarchical, expose=["mu"])))
    guide.append(local(poutine.block(hierarchical, expose=["z"])))
    return guide


@pytest.mark.slow
def test_globals_and_locals_in_one_svi():
    """From minibatches to the best ELBO of q(μ) ∏ q(z_n), which is out of the reach of mean field."""
    num_data, batch = 30, 10
    data = 2.0 + torch.randn(num_data, 1, dtype=torch.float64) * (2 + NOISE**2) ** 0.5
    mean, best, best_of_mean_field = hierarchical_answer(data)

    def correlated(dim, context_dim):
        return T.LowerTriangularAffine(dim, context_dim=context_dim)

    guide = make_mixed_guide(
        lambda model: fg.AmortizedFlow(model, lambda data, full_size: data, correlated, gradient="path")
    )
    order = [torch.randperm(num_data)[:batch] for _ in range(700)]
    train(hierarchical, guide, steps=700, lr=0.03, decay=0.01, batches=lambda step: (data[order[step]], num_data))
    elbo = fg.draw(hierarchical, guide, data, num_data, num_samples=4000).elbo
    assert elbo.value < best + 4 * elbo.se
    assert elbo.value > best - 0.2
    assert elbo.value > best_of_mean_field + 1
    assert float(guide[0].median()["mu"]) == pytest.approx(mean, abs=0.05)
    assert set(guide.median(data, num_data)) == {"mu", "z"}
    assert guide.quantiles([0.1, 0.9], data, num_data)["z"].shape == (2, num_data, 2)


def test_a_list_without_create_plates_says_so_for_another_batch_size():
    data = make_data(6)
    guide = AutoGuideList(hierarchical)
    guide.append(AutoNormal(poutine.block(hierarchical, expose=["mu"])))
    guide.append(fg.AmortizedFlow(poutine.block(hierarchical, expose=["z"]), Encoder(1).double()))
    guide(data[:2], 6)
    with pytest.raises(ValueError, match=r"shape \(3, 6\).*must be 2, the size of plate 'data' \(or 6.*create_plates"):
        guide(data[:3], 6)


# --- among Pyro's inference algorithms -----------------------------------------------------------------------------------


class VAE:
    """A model whose decoder is registered by ``pyro.module``."""

    def __init__(self, gradient="total", recipe="iaf"):
        self.decoder = nn.Linear(2, 5).double()
        self.guide = fg.AmortizedFlow(self.model, Encoder(5).double(), recipe, gradient=gradient)

    def model(self, data, full_size=None):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", full_size or len(data), subsample_size=len(data)):
            z = pyro.sample("z", dist.Normal(data.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=data)


@pytest.mark.parametrize("gradient", ["total", "path"])
@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("Loss", [Trace_ELBO, TraceGraph_ELBO, RenyiELBO, TraceMeanField_ELBO])
def test_trains_with_every_elbo(gradient, vectorize, Loss):
    data = torch.randn(12, 2, dtype=torch.float64) @ torch.randn(2, 5, dtype=torch.float64)
    vae = VAE(gradient)
    before = vae.decoder.weight.detach().clone()
    options = {"alpha": 0.5} if Loss is RenyiELBO else {}
    loss = Loss(num_particles=3, vectorize_particles=vectorize, max_plate_nesting=1, **options)
    losses = train(vae.model, vae.guide, steps=40, lr=0.02, loss=loss, batches=lambda step: (data[step % 3 :: 3], 12))
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    assert not torch.equal(vae.decoder.weight, before)


def test_the_mean_field_elbo_keeps_the_jacobian():
    data = torch.randn(4, 2, dtype=torch.float64)
    guide = make_guide(several_sites, data)
    losses = []
    for Loss in (Trace_ELBO, TraceMeanField_ELBO):
        pyro.set_rng_seed(0)
        losses.append(Loss(num_particles=5, vectorize_particles=True, max_plate_nesting=2))
        losses[-1] = losses[-1].loss(lambda data: poutine.block(several_sites, hide=["x"])(data), guide, data)
    # The Dirichlet's and the Gamma's entropies have no closed form here: both are means over the same draws.
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_jit_elbo_has_the_mean_of_the_eager_one():
    """Means of 60 values each, within 5 standard errors: the recorded graph draws other random numbers at times."""
    data = torch.randn(4, 5, dtype=torch.float64)
    vae = VAE(recipe=None)
    vae.guide.setup(data)
    perturb(vae.guide.flow, 0.3)
    values = []
    for Loss, options in ((Trace_ELBO, {}), (JitTrace_ELBO, {"ignore_jit_warnings": True})):
        loss = Loss(num_particles=16, vectorize_particles=True, max_plate_nesting=1, **options)
        values.append(torch.tensor([loss.loss_and_grads(vae.model, vae.guide, data) for _ in range(60)]))
    difference = values[0].mean() - values[1].mean()
    assert difference.abs() < 5 * ((values[0].var() + values[1].var()) / 60).sqrt()


def test_marginalises_discrete_sites():
    @config_enumerate
    def mixture(data):
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(data.new_zeros(()), 1.0))
            component = pyro.sample("component", dist.Categorical(data.new_ones(2)))
            loc = z + torch.where(component == 0, -2.0, 2.0)
            pyro.sample("x", dist.Normal(loc, 0.5), obs=data.squeeze(-1))

    data = make_data(8)
    guide = fg.AmortizedFlow(mixture, Encoder(1).double(), "iaf", sites=["z"])
    losses = train(mixture, guide, data, steps=60, loss=TraceEnum_ELBO(max_plate_nesting=1))
    assert sum(losses[-10:]) < sum(losses[:10])


def test_fit_and_draw():
    data = make_data(10)
    guide = fg.AmortizedFlow(conjugate, exact_encoder, None, gradient="path")
    options = {"num_particles": 16, "optim": lambda parameters: torch.optim.Adam(parameters, lr=0.05)}
    result = fg.fit(conjugate, guide, data, num_steps=300, progress=False, seed=0, **options)
    _, _, log_evidence = conjugate_answer(data)
    assert result.draws.elbo.value == pytest.approx(float(log_evidence.sum()), abs=0.05)


def test_predictive_and_handlers():
    data = make_data(4)
    guide = make_guide(conjugate, data)
    for parallel in (False, True):
        draws = Predictive(conjugate, guide=guide, num_samples=7, parallel=parallel, return_sites=("z",))(data)
        assert draws["z"].shape == (7, 4)
    with poutine.mask(mask=False):
        trace = poutine.trace(guide).get_trace(data)
    assert trace.log_prob_sum() == 0
    unscaled = poutine.trace(guide).get_trace(data)
    scaled = poutine.trace(poutine.scale(poutine.replay(guide, trace=unscaled), scale=3.0)).get_trace(data)
    torch.testing.assert_close(scaled.log_prob_sum(), 3 * unscaled.log_prob_sum())


def test_starts_where_it_is_told():
    data = make_data(5)
    start = torch.arange(5.0, dtype=torch.float64)
    guide = fg.AmortizedFlow(
        conjugate, Encoder(1).double(), init_loc_fn=init_to_value(values={"z": start}), init_scale=0.1
    )
    torch.testing.assert_close(guide.median(data)["z"], torch.full((5,), 2.0, dtype=torch.float64))
    low, high = guide.quantiles([0.1586553, 0.8413447], data)["z"]
    torch.testing.assert_close((high - low) / 2, torch.full((5,), 0.1, dtype=torch.float64), rtol=0.1, atol=0)


def test_quantiles_are_those_of_a_heavy_tailed_base():
    """At ν = 2.5 and unit variance, of 1001 draws: within 5 standard errors, where a normal base is 10 of them away."""
    data = make_data(3)
    start = init_to_value(values={"z": data.new_zeros(3)})
    guide = fg.AmortizedFlow(conjugate, Encoder(1).double(), None, init_loc_fn=start, base="student_t").setup(data)
    with torch.no_grad():
        guide.base.log_excess.fill_(math.log(0.5))
    scale = 0.2**0.5
    expected = scale * scipy.stats.t.ppf(0.84, 2.5)
    se = (0.84 * 0.16 / 1001) ** 0.5 * scale / scipy.stats.t.pdf(expected / scale, 2.5)
    assert abs(expected - scipy.stats.norm.ppf(0.84)) > 10 * se
    low, median, high = guide.quantiles([0.16, 0.5, 0.84], data)["z"]
    torch.testing.assert_close(high, torch.full_like(high, expected), rtol=0, atol=5 * se)
    torch.testing.assert_close(low, -high, rtol=0, atol=1e-6)
    torch.testing.assert_close(median, torch.zeros_like(median), rtol=0, atol=1e-6)


@pytest.mark.parametrize("gradient", ["total", "path"])
def test_a_captured_step_with_a_heavy_tailed_base_is_the_step_of_pyro(gradient):
    """From moved parameters, on minibatches whose indices nobody uses, degrees of freedom included."""
    data = make_data(12)
    ends = []
    for make in (SVI, functools.partial(fg.CompiledSVI, backend="replay")):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = make_guide(conjugate, data, RECIPES["planar"], base="student_t", gradient=gradient)
        svi = make(conjugate, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(num_particles=4))
        df = guide.base.df.detach()
        losses = [svi.step(data[step % 3 :: 3], len(data)) for step in range(6)]
        assert not torch.allclose(guide.base.df, df)
        ends.append((torch.tensor(losses), {name: value.detach() for name, value in guide.named_parameters()}))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-8, atol=1e-8)


@every_base
def test_every_parameter_of_base_flow_and_encoder_has_a_gradient_after_one_step(base):
    data = make_data(5)
    guide = fg.AmortizedFlow(conjugate, Encoder(1).double(), "iaf", base=base)
    train(conjugate, guide, data, steps=1)
    guide.zero_grad()
    Trace_ELBO().loss_and_grads(conjugate, guide, data)
    assert all(bool((parameter.grad != 0).any()) for parameter in guide.encoder.parameters())
    assert all(parameter.grad is not None for parameter in guide.flow.parameters())
    assert len(list(guide.base.parameters())) == (base == "student_t")
    assert all(bool((parameter.grad != 0).all()) for parameter in guide.base.parameters())


# --- the parameter store, files and copies -------------------------------------------------------------------------------


@every_base
def test_every_parameter_has_one_name_in_the_store(base):
    data = make_data(5)
    guide = fg.AmortizedFlow(conjugate, Encoder(1).double(), base=base)
    train(conjugate, guide, data, steps=2)
    store = pyro.get_param_store()
    buffers = {
        f"AmortizedFlow.flow.{name}" for name, buffer in guide.flow.named_buffers() if buffer.is_floating_point()
    }
    assert set(store) - buffers == {f"AmortizedFlow.{name}" for name, _ in guide.named_parameters()}
    assert buffers < set(store)
    assert all(store[f"AmortizedFlow.{name}"] is parameter for name, parameter in guide.named_parameters())
    assert any(name.startswith("AmortizedFlow.encoder.") for name in store)


@pytest.mark.parametrize("when", ["before the new guide is set up", "after"])
def test_param_store_round_trip(when, tmp_path):
    data = make_data(5)
    guide = fg.AmortizedFlow(conjugate, Encoder(1).double())
    train(conjugate, guide, data, steps=20)
    expected = guide.quantiles([0.1, 0.5, 0.9], data)["z"]
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    other = fg.AmortizedFlow(conjugate, Encoder(1).double())
    if when == "after":
        other.setup(data)
        other(data)
        pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    other(data)
    torch.testing.assert_close(other.quantiles([0.1, 0.5, 0.9], data)["z"], expected)
    train(conjugate, other, data, steps=20, lr=0.1)
    assert not torch.allclose(other.quantiles([0.1, 0.5, 0.9], data)["z"], expected)


@pytest.mark.parametrize("trained", [False, True])
def test_state_dict_round_trip(trained, tmp_path):
    data = make_data(5)
    guide = fg.AmortizedFlow(conjugate, Encoder(1).double()).setup(data)
    if trained:
        train(conjugate, guide, data, steps=10)
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    pyro.clear_param_store()
    pyro.set_rng_seed(2)
    other = fg.AmortizedFlow(conjugate, Encoder(1).double()).setup(data[:2])
    other.load_state_dict(torch.load(tmp_path / "guide.pt", weights_only=True))
    torch.testing.assert_close(other.median(data)["z"], guide.median(data)["z"])


@every_base
@pytest.mark.parametrize("steps", [0, 3])
def test_copies_and_pickles(steps, base):
    data = make_data(5)
    guide = fg.AmortizedFlow(conjugate, Encoder(1).double(), base=base).setup(data)
    if steps:
        train(conjugate, guide, data, steps=steps)
    expected = guide.quantiles([0.1, 0.9], data)["z"]
    copied = copy.deepcopy(guide)
    buffer = io.BytesIO()
    torch.save(guide, buffer)
    buffer.seek(0)
    for other in (copied, pickle.loads(pickle.dumps(guide)), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(other.quantiles([0.1, 0.9], data)["z"], expected)
    assert guide.model is not None
    assert copied.model is guide.model
    # The one from the file has no model to see the plates of other data with.
    assert other(data)["z"].shape == (5,)
    torch.testing.assert_close(other.median(data[:2])["z"], guide.median(data)["z"][:2])
    with pytest.raises(RuntimeError, match="without its model, .* load the state_dict"):
        other(data[:2])
    train(conjugate, guide, data, steps=2)
    torch.testing.assert_close(copied.quantiles([0.1, 0.9], data)["z"], expected)


def test_module_local_parameters_and_a_torch_optimizer():
    data = make_data(5)
    with pyro.settings.context(module_local_params=True):
        guide = fg.AmortizedFlow(conjugate, Encoder(1).double()).setup(data)
        elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)(conjugate, guide)
        optimizer = torch.optim.Adam(elbo.parameters(), lr=0.05)
        first = elbo(data).item()
        for _ in range(30):
            optimizer.zero_grad()
            elbo(data).backward()
            assert all(parameter.grad is not None for parameter in guide.parameters())
            optimizer.step()
        assert elbo(data).item() < first
    assert len(pyro.get_param_store()) == 0


# --- what it refuses -----------------------------------------------------------------------------------------------------


def with_global(data):
    scale = pyro.sample("scale", dist.LogNormal(data.new_zeros(()), 1.0))
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Normal(data.new_zeros(()), scale))
        pyro.sample("x", dist.Normal(z, 1.0), obs=data.squeeze(-1))


def with_two_plates(data):
    with pyro.plate("groups", 3):
        pyro.sample("a", dist.Normal(data.new_zeros(()), 1.0))
    with pyro.plate("data", len(data)):
        pyro.sample("z", dist.Normal(data.new_zeros(()), 1.0))


def with_discrete(data):
    with pyro.plate("data", len(data)):
        pyro.sample("k", dist.Poisson(data.new_ones(())))


def with_inner_subsample(data):
    with pyro.plate("data", len(data), dim=-1):
        pyro.sample("z", dist.Normal(data.new_zeros(()), 1.0))
        with pyro.plate("times", 10, subsample_size=2, dim=-2):
            pyro.sample("step", dist.Normal(data.new_zeros(()), 1.0))


def with_bounds_of_the_data(data):
    with pyro.plate("data", len(data)):
        pyro.sample("z", dist.Uniform(0.0, 1.0 + data.squeeze(-1).square()))


def with_two_dtypes(data):
    with pyro.plate("data", len(data)):
        pyro.sample("z", dist.Normal(data.new_zeros(()), 1.0))
        pyro.sample("y", dist.Normal(data.new_zeros((), dtype=torch.float32), 1.0))


def without_latents(data):
    with pyro.plate("data", len(data)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=data.squeeze(-1))


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (with_global, {}, ValueError, r"'scale' is not in a plate.*sites=\[\.\.\.\].*AutoGuideList"),
        (with_global, {"sites": ["scale"]}, ValueError, "'scale' is not in a plate"),
        (with_global, {"sites": ["y"]}, ValueError, r"sites \['y'\] are no latents of the model, .* \['scale', 'z'\]"),
        (with_two_plates, {}, ValueError, r"share no plate \('a' in \['groups'\], 'z' in \['data'\]\)"),
        (with_discrete, {}, ValueError, "'k' is discrete, Poisson, and has infinitely many values.*Ways out"),
        (with_inner_subsample, {}, ValueError, "'step' is in plate 'times', which takes 2 of its 10"),
        (with_bounds_of_the_data, {}, ValueError, "bounds of site 'z' differ along plate 'data'"),
        (with_two_dtypes, {}, ValueError, "site 'z' is torch.float64 on .* and site 'y' is torch.float32"),
        (without_latents, {}, RuntimeError, "no latent variables"),
        (conjugate, {"flow": lambda dim, context_dim: None}, ValueError, r"flow\(1, context_dim=6\) must return"),
        (
            conjugate,
            {"flow": lambda dim, context_dim: flows.iaf(dim + 1, context_dim=context_dim)},
            ValueError,
            "with dim = 1 and context_dim = 6",
        ),
        (conjugate, {"flow": "unknown"}, ValueError, "unknown flow 'unknown'; known recipes are continuous_planar"),
        (conjugate, {"gradient": "none"}, ValueError, "gradient must be"),
        (conjugate, {"base": "cauchy"}, ValueError, 'base must be "normal" or "student_t", got \'cauchy\''),
        (conjugate, {"init_scale": 0}, ValueError, "init_scale must be a positive number, got 0"),
        (conjugate, {"sites": "z"}, TypeError, "sites must be a list of names"),
    ],
)
def test_bad_models_and_options(model, options, error, message):
    data = make_data(4)
    with pytest.raises(error, match=message):
        fg.AmortizedFlow(model, Encoder(1).double(), **options).setup(data)


@pytest.mark.parametrize(
    ("encoder", "error", "message"),
    [
        (lambda data: data[:, 0], ValueError, r"shape \(size of 'data', context_dim\), got shape \(4,\)"),
        (lambda data: data.unsqueeze(0), ValueError, r"got shape \(1, 4, 1\)"),
        (lambda data: data[:, :0], ValueError, r"got shape \(4, 0\)"),
        (lambda data: data[:3], ValueError, r"shape \(3, 1\), whose dimension -2 must be 4, the size of plate 'data'"),
        (lambda data: (data, data), TypeError, r"one floating-point tensor, the context, got a tuple.*torch.cat"),
        (lambda data: data.long(), TypeError, "got a tensor of torch.int64"),
        (lambda data: data.float(), ValueError, "encoder returns torch.float32 .* latents are torch.float64"),
        (7, TypeError, "encoder must be a function"),
    ],
)
def test_bad_encoders(encoder, error, message):
    data = make_data(4)
    with pytest.raises(error, match=message):
        fg.AmortizedFlow(conjugate, encoder)(data)


def test_an_encoder_whose_output_changes():
    data = torch.randn(4, 3, dtype=torch.float64)
    guide = fg.AmortizedFlow(several_sites_of_two, lambda data: data).setup(data)
    with pytest.raises(ValueError, match=r"last dimension is 3, as it was when .* got shape \(4, 2\)"):
        guide(data[:, :2])


def several_sites_of_two(data):
    with pyro.plate("data", len(data)):
        pyro.sample("z", dist.Normal(data.new_zeros(2), 1.0).to_event(1))


def test_latents_whose_size_changes():
    def model(data):
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Normal(data.new_zeros(data.shape[-1]), 1.0).to_event(1))

    guide = fg.AmortizedFlow(model, lambda data: data[:, :1]).setup(torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"'z' of shape \(3,\) .* but 'z' of shape \(2,\)"):
        guide(torch.randn(4, 3))
    assert guide(torch.randn(5, 2))["z"].shape == (5, 2)


def test_a_plate_of_create_plates_at_another_dimension():
    data = make_data(4)
    guide = fg.AmortizedFlow(
        conjugate, Encoder(1).double(), create_plates=lambda data: pyro.plate("data", len(data), dim=-2)
    )
    with pytest.raises(ValueError, match="'data' is at dimension -1 in the model, and at -2 by create_plates"):
        guide(data)


def test_a_failed_set_up_leaves_nothing_behind():
    data = make_data(4)
    guide = fg.AmortizedFlow(with_global, Encoder(1).double())
    for _ in range(2):
        with pytest.raises(ValueError, match="not in a plate"):
            guide(data)
    with pytest.raises(RuntimeError, match=r"AmortizedFlow is not set up.*call guide.setup"):
        guide.latent_dim  # noqa: B018


def test_values_of_another_guide_in_the_store():
    data = make_data(4)
    fg.AmortizedFlow(conjugate, Encoder(1).double()).setup(data)
    with pytest.raises(
        ValueError, match=r"'AmortizedFlow.encoder.layers.2.weight' of shape \(6, 8\).*clear_param_store"
    ):
        fg.AmortizedFlow(conjugate, Encoder(1, context_dim=7).double()).setup(data)


def test_an_encoder_that_hides_its_parameters():
    data, network = make_data(4), Encoder(1).double()
    with pytest.warns(UserWarning, match="Pyro knows no parameter of the encoder"):
        fg.AmortizedFlow(conjugate, lambda data: network(data)).setup(data)

    def registered(data):
        pyro.module("network", network)
        return network(data)

    pyro.clear_param_store()
    before = network.layers[0].weight.detach().clone()
    train(conjugate, fg.AmortizedFlow(conjugate, registered), data, steps=3)
    assert not torch.equal(network.layers[0].weight, before)
