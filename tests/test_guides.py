"""The guides among Pyro's inference algorithms: they must pass for AutoNormal."""

import copy
import functools
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from models import conjugate, conjugate_answer, correlated, funnel, kitchen_sink
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
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
from pyro.infer.reparam import NeuTraReparam
from pyro.optim import ClippedAdam
from transform_cases import perturb

import pyro_flowguides as fg
from pyro_flowguides.tracing import latent_sites


class StudentTFlow(fg.AutoFlow):
    """The base with parameters of its own, as a guide among the others."""

    def __init__(self, model, **options):
        super().__init__(model, base="student_t", **options)


NORMAL_GUIDES = {
    "flow": fg.AutoFlow,
    "coupling": fg.AutoCoupling,
    "iaf": fg.AutoIAF,
    "planar": fg.AutoPlanar,
    "radial": fg.AutoRadial,
    "residual": fg.AutoResidual,
    "spline": fg.AutoSpline,
    "sylvester": fg.AutoSylvester,
}
GUIDES = {**NORMAL_GUIDES, "student_t": StudentTFlow}
every_guide = pytest.mark.parametrize("Guide", GUIDES.values(), ids=GUIDES)
every_normal_guide = pytest.mark.parametrize("Guide", NORMAL_GUIDES.values(), ids=NORMAL_GUIDES)
Y = [0.3, 1.4, 2.2, 0.7, 1.9]


def train(model, guide, *args, steps=200, lr=0.02, decay=1.0, loss=None):
    loss = loss or Trace_ELBO(num_particles=32, vectorize_particles=True)
    svi = SVI(
        model, guide, ClippedAdam({"lr": lr, "lrd": decay ** (1 / steps) if steps else 1.0, "clip_norm": 1e9}), loss
    )
    return [svi.step(*args) for _ in range(steps)]


@every_guide
@pytest.mark.parametrize("gradient", ["total", "path"])
@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("Loss", [Trace_ELBO, TraceGraph_ELBO, RenyiELBO])
def test_trains_with_every_elbo(Guide, gradient, vectorize, Loss):
    y = torch.tensor(Y)
    guide = Guide(conjugate, gradient=gradient)
    options = {"alpha": 0.5} if Loss is RenyiELBO else {}
    losses = train(conjugate, guide, y, steps=40, loss=Loss(num_particles=8, vectorize_particles=vectorize, **options))
    assert guide.is_trained()
    # From a start that is four times too narrow, the loss falls by most of its distance to the answer.
    _, _, log_evidence = conjugate_answer(y)
    assert sum(losses[-10:]) / 10 + log_evidence < 0.5 * (losses[0] + log_evidence)


@pytest.mark.parametrize(
    "prior", [dist.LogNormal(1.0, 0.5), dist.Beta(2.0, 3.0), dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0]))]
)
def test_mean_field_elbo_keeps_the_jacobian(prior):
    """Pyro's own autoguides lose it: their loss against an exact LogNormal guide is 0.99 instead of 0."""

    def model():
        with pyro.plate("plate", 2):
            pyro.sample("x", prior)

    guide = fg.AutoFlow(model).whiten()
    losses = {}
    for Loss in (Trace_ELBO, TraceMeanField_ELBO):
        pyro.set_rng_seed(0)
        losses[Loss] = Loss(num_particles=50, vectorize_particles=True, max_plate_nesting=1).loss(model, guide)
    assert losses[TraceMeanField_ELBO] == pytest.approx(losses[Trace_ELBO], abs=1e-4)
    if isinstance(prior, dist.LogNormal):
        assert losses[TraceMeanField_ELBO] == pytest.approx(0.0, abs=1e-4)


def test_path_gradient_under_jit_is_refused():
    guide = fg.AutoCoupling(correlated, gradient="path")
    with pytest.raises(NotImplementedError, match="cannot record the path gradient"):
        train(correlated, guide, steps=1, loss=JitTrace_ELBO())


@every_guide
@pytest.mark.parametrize("vectorize", [False, True])
def test_jit_elbo_is_the_eager_one(Guide, vectorize):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(1.0, 2.0))
        with pyro.plate("data", len(Y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.tensor(Y)
    guide = Guide(model).setup(y)
    perturb(guide.flow)
    results = []
    for Loss, options in ((Trace_ELBO, {}), (JitTrace_ELBO, {"ignore_jit_warnings": True})):
        loss = Loss(num_particles=4, vectorize_particles=vectorize, max_plate_nesting=1, **options)
        loss.loss_and_grads(model, guide, y)  # the first call of a Jit ELBO records, with random numbers of its own
        guide.zero_grad()
        pyro.set_rng_seed(3)
        value = loss.loss_and_grads(model, guide, y)
        results.append((value, [parameter.grad.clone() for parameter in guide.parameters()]))
    (eager_loss, eager_gradients), (jit_loss, jit_gradients) = results
    assert jit_loss == pytest.approx(eager_loss, rel=1e-5)
    for jit_gradient, eager_gradient in zip(jit_gradients, eager_gradients, strict=True):
        torch.testing.assert_close(jit_gradient, eager_gradient, rtol=1e-4, atol=1e-4)


@every_guide
@pytest.mark.parametrize("gradient", ["total", "path"])
def test_marginalises_discrete_sites(Guide, gradient):
    @config_enumerate
    def mixture(y):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        with pyro.plate("data", len(y)):
            component = pyro.sample("component", dist.Categorical(torch.ones(2)))
            pyro.sample("y", dist.Normal(loc[..., component], 1.0), obs=y)

    y = torch.tensor([-3.0, -2.5, 3.0, 2.0])
    guide = Guide(poutine.block(mixture, hide=["component"]), gradient=gradient)
    losses = train(mixture, guide, y, steps=60, lr=0.005, loss=TraceEnum_ELBO(max_plate_nesting=1))
    assert sum(losses[-10:]) < sum(losses[:10])


@every_guide
def test_finds_a_conjugate_posterior(Guide):
    y = torch.tensor(Y, dtype=torch.float64)
    guide = Guide(conjugate, gradient="path", init_scale=0.3)
    train(conjugate, guide, y, steps=500, decay=0.03)
    mean, sd, log_evidence = conjugate_answer(y)
    draws = fg.draw(conjugate, guide, y, num_samples=20_000)
    # The family holds the posterior: four standard errors of 20,000 draws, plus what 600 steps leave.
    assert abs(float(draws.values["mu"].mean()) - mean) < 4 * sd / 20_000**0.5 + 0.02 * sd
    assert abs(float(draws.values["mu"].std()) / sd - 1) < 4 / 40_000**0.5 + 0.03
    elbo = draws.elbo()
    assert elbo.value < log_evidence + 4 * elbo.se + 1e-9
    assert elbo.value > log_evidence - 0.01


@every_guide
@pytest.mark.parametrize(("model", "log_evidence"), [(correlated, 0.0), (funnel, 0.0)], ids=["correlated", "funnel"])
def test_elbo_never_exceeds_the_log_evidence(Guide, model, log_evidence):
    """A wrong log-determinant shows here: training finds it and drives the ELBO above log Z."""
    guide = Guide(model)
    train(model, guide, steps=400, lr=0.005)
    elbo = fg.draw(model, guide, num_samples=20_000).elbo()
    assert elbo.value < log_evidence + 4 * elbo.se
    assert elbo.value > log_evidence - 1.5


@every_normal_guide
def test_starts_where_it_is_told(Guide):
    guide = Guide(conjugate, init_loc_fn=init_to_value(values={"mu": torch.tensor(7.0)}), init_scale=0.01)
    guide(torch.tensor(Y))
    torch.testing.assert_close(guide.median()["mu"], torch.tensor(7.0))
    low, high = guide.quantiles([0.16, 0.84])["mu"]
    assert float(high - low) == pytest.approx(0.02, rel=0.05)


@every_guide
def test_every_support(Guide):
    guide = Guide(kitchen_sink)
    losses = train(kitchen_sink, guide, steps=3)
    assert all(loss == loss for loss in losses)
    prototype = poutine.trace(kitchen_sink).get_trace()
    result = guide()
    median, quantiles = guide.median(), guide.quantiles([0.1, 0.5, 0.9])
    for name, site in latent_sites(prototype):
        for value in (result[name], median[name]):
            assert value.shape == site["value"].shape
            assert site["fn"].support.check(value).all(), name
        assert quantiles[name].shape == (3, *site["value"].shape)
        if name in ("simplex", "cholesky"):
            # The median is that of unconstrained space, which such a map does not take to the coordinates' medians.
            continue
        # The median of an even and an odd number of draws may differ by half the distance of two draws.
        torch.testing.assert_close(quantiles[name][1], median[name], rtol=1e-4, atol=1e-4)


def test_quantiles_of_a_normal():
    guide = fg.AutoFlow(correlated)
    guide.setup()
    levels = [0.05, 0.25, 0.5, 0.75, 0.95]
    expected = guide._whitening.loc + 0.1 * dist.Normal(0.0, 1.0).icdf(torch.tensor(levels)).unsqueeze(-1)
    # The standard error of the 5% quantile of 10,001 draws is 2% of the sd.
    torch.testing.assert_close(guide.quantiles(levels)["x"], expected.double(), rtol=0, atol=0.1 * 4 * 0.021)


@every_guide
def test_median_does_not_jitter(Guide):
    guide = Guide(correlated).setup()
    perturb(guide.flow.transforms[0])
    first, second = guide.median()["x"], guide.median()["x"]
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@every_guide
def test_setup_builds_everything(Guide):
    y = torch.tensor(Y)
    guide = Guide(conjugate)
    assert guide.setup(y) is guide
    names = [name for name, _ in guide.named_parameters()]
    assert names
    assert len(names) == len(set(names)) == len({id(parameter) for parameter in guide.parameters()})
    guide.setup(y)
    assert [name for name, _ in guide.named_parameters()] == names


@every_guide
def test_every_parameter_has_one_name_in_the_store(Guide):
    guide = Guide(conjugate)
    train(conjugate, guide, torch.tensor(Y), steps=2)
    store = pyro.get_param_store()
    parameters = [name for name in store if not name.startswith(f"{Guide.__name__}.whitening")]
    assert sorted(parameters) == sorted(f"{Guide.__name__}.{name}" for name, _ in guide.named_parameters())
    assert all(store[f"{Guide.__name__}.{name}"] is parameter for name, parameter in guide.named_parameters())


@every_guide
def test_second_guide_shares_the_store(Guide):
    y = torch.tensor(Y)
    first = Guide(conjugate)
    train(conjugate, first, y, steps=20)
    second = Guide(conjugate).setup(y)
    assert second.is_trained()
    torch.testing.assert_close(second.quantiles([0.1, 0.9])["mu"], first.quantiles([0.1, 0.9])["mu"])
    before = [parameter.clone() for parameter in first.parameters()]
    train(conjugate, second, y, steps=5)
    assert any(not torch.equal(a, b) for a, b in zip(before, first.parameters(), strict=True))


@every_guide
@pytest.mark.parametrize("when", ["before the new guide is set up", "after"])
def test_param_store_round_trip(Guide, when, tmp_path):
    """The fixed map travels with the parameters: its start is random (init_to_median draws from the prior)."""
    y = torch.tensor(Y)
    guide = Guide(conjugate)
    guide.whiten(y)
    train(conjugate, guide, y, steps=20)
    expected = guide.quantiles([0.1, 0.5, 0.9])["mu"]
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    other = Guide(conjugate)
    if when == "after":
        other.setup(y)
        other(y)
        pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    other(y)
    torch.testing.assert_close(other.quantiles([0.1, 0.5, 0.9])["mu"], expected)
    before = expected.clone()
    train(conjugate, other, y, steps=20, lr=0.1)
    assert not torch.allclose(other.quantiles([0.1, 0.5, 0.9])["mu"], before)


@every_guide
@pytest.mark.parametrize("trained", [False, True])
def test_state_dict_round_trip(Guide, trained, tmp_path):
    y = torch.tensor(Y)
    guide = Guide(conjugate).setup(y)
    if trained:
        guide.whiten(y)
        train(conjugate, guide, y, steps=10)
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    pyro.clear_param_store()
    pyro.set_rng_seed(2)
    other = Guide(conjugate).setup(y)
    other.load_state_dict(torch.load(tmp_path / "guide.pt", weights_only=True))
    torch.testing.assert_close(other.quantiles([0.1, 0.9])["mu"], guide.quantiles([0.1, 0.9])["mu"])


@every_guide
@pytest.mark.parametrize("steps", [0, 3])
def test_copies_and_pickles(Guide, steps):
    y = torch.tensor(Y)
    guide = Guide(conjugate).setup(y)
    train(conjugate, guide, y, steps=steps)
    expected = guide.quantiles([0.1, 0.9])["mu"]
    copied = copy.deepcopy(guide)
    buffer = io.BytesIO()
    torch.save(guide, buffer)
    buffer.seek(0)
    for other in (copied, pickle.loads(pickle.dumps(guide)), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(other.quantiles([0.1, 0.9])["mu"], expected)
    assert guide.model is not None
    assert copied.model is guide.model
    train(conjugate, guide, y, steps=2)
    # The copy has parameters of its own until it runs and meets the store under their common name.
    torch.testing.assert_close(copied.quantiles([0.1, 0.9])["mu"], expected)


@every_guide
def test_float64_model_under_a_float32_default(Guide):
    y = torch.tensor(Y, dtype=torch.float64)
    guide = Guide(conjugate)
    losses = train(conjugate, guide, y, steps=3)
    assert all(parameter.dtype == torch.float64 for parameter in guide.parameters())
    assert guide(y)["mu"].dtype == torch.float64
    assert guide.median()["mu"].dtype == torch.float64
    assert all(loss == loss for loss in losses)


@every_guide
def test_module_local_parameters_and_a_torch_optimizer(Guide):
    y = torch.tensor(Y)
    with pyro.settings.context(module_local_params=True):
        guide = Guide(conjugate).setup(y)
        elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)(conjugate, guide)
        optimizer = torch.optim.Adam(elbo.parameters(), lr=0.05)
        first = elbo(y).item()
        for _ in range(50):
            optimizer.zero_grad()
            elbo(y).backward()
            assert all(parameter.grad is not None for parameter in guide.parameters())
            optimizer.step()
        assert elbo(y).item() < first
    assert len(pyro.get_param_store()) == 0


@every_guide
def test_predictive_and_handlers(Guide):
    y = torch.tensor(Y)
    guide = Guide(conjugate).setup(y)
    for parallel in (False, True):
        draws = Predictive(conjugate, guide=guide, num_samples=7, parallel=parallel, return_sites=("mu",))(y)
        assert draws["mu"].numel() == 7
    with poutine.mask(mask=False):
        trace = poutine.trace(guide).get_trace(y)
    assert trace.log_prob_sum() == 0
    unscaled = poutine.trace(guide).get_trace(y)
    scaled = poutine.trace(poutine.scale(poutine.replay(guide, trace=unscaled), scale=3.0)).get_trace(y)
    torch.testing.assert_close(scaled.log_prob_sum(), 3 * unscaled.log_prob_sum())


@every_guide
def test_neutra(Guide):
    guide = Guide(funnel).setup()
    train(funnel, guide, steps=20, lr=0.005)
    guide.requires_grad_(False)
    neutra = NeuTraReparam(guide)
    mcmc = MCMC(NUTS(neutra.reparam(funnel), max_tree_depth=3), num_samples=5, warmup_steps=5, disable_progbar=True)
    mcmc.run()
    latent = mcmc.get_samples()["v_shared_latent"]
    assert neutra.transform_sample(latent.unsqueeze(-2))["v"].shape[0] == 5


def test_in_a_guide_list_with_other_guides():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a, b), obs=y)

    y = torch.tensor(Y)
    guide = AutoGuideList(model)
    guide.append(fg.AutoCoupling(poutine.block(model, expose=["a"])))
    guide.append(AutoNormal(poutine.block(model, expose=["b"])))
    losses = train(model, guide, y, steps=5)
    assert all(loss == loss for loss in losses)
    assert set(guide.median(y)) == {"a", "b"}
    assert set(guide.quantiles([0.5], y)) == {"a", "b"}


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


# --- bad input --------------------------------------------------------------------------------------------------------


def no_latents():
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))


def discrete():
    pyro.sample("k", dist.Bernoulli(0.5))


def projected_normal():
    pyro.sample("direction", dist.ProjectedNormal(torch.ones(3)))


def sequential_plate():
    for i in pyro.plate("loop", 2):
        pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0))


def local_latents():
    with pyro.plate("rows", 10, subsample_size=3):
        pyro.sample("local", dist.Normal(0.0, 1.0))


@every_guide
@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (no_latents, RuntimeError, "found no latent variables"),
        (discrete, ValueError, "discrete.*site 'k'"),
        (projected_normal, ValueError, "site 'direction'"),
        (sequential_plate, NotImplementedError, "sequential"),
        (local_latents, NotImplementedError, "latent site 'local' is inside plate 'rows', which takes 3 of its 10"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_models_that_cannot_be_guided(Guide, model, error, message):
    guide = Guide(model)
    for _ in range(2):  # a failed set-up leaves nothing behind that the next call would take for done
        with pytest.raises(error, match=f"(?is){message}"):
            guide()


def test_start_that_is_not_finite():
    guide = fg.AutoFlow(conjugate, init_loc_fn=init_to_value(values={"mu": torch.tensor(float("inf"))}))
    with pytest.raises(ValueError, match="init_loc_fn gives site 'mu' a value that is not finite"):
        guide(torch.tensor(Y))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"flow": "copula"}, ValueError, "unknown flow 'copula'; known recipes are coupling"),
        ({"init_scale": 0.0}, ValueError, "init_scale must be a positive number, got 0.0"),
        ({"init_scale": "wide"}, ValueError, "init_scale must be a positive number"),
        ({"affine": "full"}, ValueError, 'affine must be "lower_triangular"'),
        ({"gradient": "score"}, ValueError, 'gradient must be "total" or "path"'),
        ({"base": "cauchy"}, ValueError, 'base must be "normal" or "student_t"'),
    ],
)
def test_options_that_are_wrong(options, error, message):
    with pytest.raises(error, match=message):
        fg.AutoFlow(conjugate, **options)


def test_flow_of_the_wrong_size():
    guide = fg.AutoFlow(conjugate, lambda dim: fg.flows.planar(dim + 1))
    with pytest.raises(ValueError, match=r"flow\(1\) must return a FlowTransform with dim = 1"):
        guide(torch.tensor(Y))


@pytest.mark.parametrize("affine", ["lower_triangular", "diagonal", None])
def test_any_recipe_and_affine_map(affine):
    guide = fg.AutoFlow(correlated, lambda dim: fg.transforms.AffineCoupling(dim), affine=affine)
    losses = train(correlated, guide, steps=5)
    assert all(loss == loss for loss in losses)


@pytest.mark.parametrize("name", fg.flows.RECIPES)
def test_every_recipe_by_its_name(name):
    guide = fg.AutoFlow(correlated, name)
    losses = train(correlated, guide, steps=3, loss=Trace_ELBO(num_particles=4, vectorize_particles=True))
    assert all(loss == loss for loss in losses)
    assert guide.is_trained()


# --- a base with parameters -------------------------------------------------------------------------------------------


def test_quantiles_follow_the_degrees_of_freedom():
    """The fixed draws are those of the base as it is now, and 10,001 of them know its 5% quantile to 4%."""
    guide = StudentTFlow(correlated).setup()
    for df in (10.0, 2.5):
        with torch.no_grad():
            guide.base.log_excess.fill_(df - 2).log_()
        half_width = (df - 2) ** 0.5 / df**0.5 * scipy.stats.t(df).ppf(0.95)
        low, high = (guide.quantiles([0.05, 0.95])["x"] - guide._whitening.loc) / 0.1
        torch.testing.assert_close(high, torch.full_like(high, half_width), rtol=0.04, atol=0)
        torch.testing.assert_close(low, -high, rtol=1e-2, atol=0)


def test_starts_with_the_scale_it_is_told_whatever_the_tails():
    guide = StudentTFlow(conjugate, init_scale=0.01)
    guide(torch.tensor(Y))
    _, scale = guide._loc_scale()
    # The variance of 10,001 draws with 10 degrees of freedom has a standard error of 2%.
    assert float(scale) == pytest.approx(0.01, rel=0.04)


def test_heavy_tails_are_learnt():
    """A guide with a normal base cannot follow these tails: its importance weights have none or infinite variance."""

    def heavy():
        pyro.sample("x", dist.StudentT(torch.full((2,), 3.0, dtype=torch.float64), 0.0, 1.0).to_event(1))

    two_planar = functools.partial(fg.flows.planar, num_layers=2)
    results = {}
    for Guide in (fg.AutoFlow, StudentTFlow):
        guide = Guide(heavy, flow=two_planar, gradient="path", init_scale=1.0)
        train(heavy, guide, steps=400, lr=0.02)
        results[Guide] = fg.draw(heavy, guide, num_samples=5000, seed=0)
    assert (guide.base.df < 5).all()
    assert results[StudentTFlow].elbo().value > -0.01 > results[fg.AutoFlow].elbo().value
    assert results[StudentTFlow].ess().value > results[fg.AutoFlow].ess().value


def test_base_of_neutra_is_that_of_the_guide():
    guide = StudentTFlow(correlated).setup()
    assert guide.get_base_dist().event_shape == (3,)
    torch.testing.assert_close(guide.get_base_dist().base_dist.df, guide.base.df)


@pytest.mark.parametrize("log_det", ["hutchinson", "roulette"])
def test_neutra_with_a_random_log_det_is_refused(log_det):
    recipe = functools.partial(fg.flows.residual, num_layers=1, log_det=log_det)
    guide = fg.AutoFlow(correlated, recipe).setup()
    train(correlated, guide, steps=1)
    with pytest.raises(ValueError, match=r"random estimate.*NeuTra.*log_det='exact'"):
        poutine.trace(NeuTraReparam(guide).reparam(correlated)).get_trace()
