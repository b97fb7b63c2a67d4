"""The Gaussian found before training."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import COVARIANCE, conjugate, correlated, funnel, kitchen_sink
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, init_to_value

import pyro_flowguides as fg
from pyro_flowguides.guides.whitening import (
    batch_and_match,
    best_diagonal_gaussian,
    best_gaussian,
    diagonal_batch_and_match,
    gaussian_elbo,
    hessian,
    laplace,
    quasi_newton_path,
)


def gaussian_target(loc, covariance):
    target = dist.MultivariateNormal(loc, covariance)
    return target.log_prob


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("start_scale", [0.1, 1.0, 100.0])
def test_finds_a_normal_posterior(dim, start_scale):
    loc = torch.linspace(-2, 3, dim, dtype=torch.float64)
    covariance = COVARIANCE.to(loc.device)[:dim, :dim]
    target = gaussian_target(loc, covariance)
    start = torch.zeros(dim, dtype=torch.float64), start_scale * torch.eye(dim, dtype=torch.float64)
    found_loc, found_tril = batch_and_match(target, *start)
    torch.testing.assert_close(found_loc, loc, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found_tril @ found_tril.mT, covariance, rtol=1e-5, atol=1e-6)
    assert gaussian_elbo(target, found_loc, found_tril) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("dim", [1, 3])
def test_finds_a_normal_posterior_that_is_narrow_and_far_away(dim):
    """Where batch and match from the start is lost, the path leads."""
    loc = torch.linspace(-50, 300, dim, dtype=torch.float64)
    covariance = 1e-4 * COVARIANCE.to(loc.device)[:dim, :dim]
    target = gaussian_target(loc, covariance)
    start = torch.zeros(dim, dtype=torch.float64), 0.1 * torch.eye(dim, dtype=torch.float64)
    assert gaussian_elbo(target, *batch_and_match(target, *start)) < -100
    found_loc, found_tril = best_gaussian(target, *start)
    assert gaussian_elbo(target, found_loc, found_tril) > -0.01
    torch.testing.assert_close(found_loc, loc, rtol=0, atol=1e-3)


def test_the_path_alone_finds_a_normal_posterior():
    loc = torch.linspace(-2, 3, 3, dtype=torch.float64)
    target = gaussian_target(loc, COVARIANCE.to(loc.device))
    found = quasi_newton_path(target, torch.zeros_like(loc), torch.eye(3, dtype=torch.float64))
    # The last steps of the path bring less than a millionth of a nat each.
    assert gaussian_elbo(target, *found) > -0.05


def test_survives_scores_that_are_not_finite():
    normal = gaussian_target(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))

    def target(points):
        # The square root has no gradient at negative numbers.
        return normal(points) + 0 * (25.0 - points.square().sum(-1)).sqrt()

    start = torch.zeros(2, dtype=torch.float64), 100 * torch.eye(2, dtype=torch.float64)
    _, scale_tril = batch_and_match(target, *start)
    torch.testing.assert_close(scale_tril @ scale_tril.mT, torch.eye(2, dtype=torch.float64), rtol=0, atol=0.05)


@pytest.mark.parametrize("vectorize", [True, False])
def test_guide_moves_to_the_posterior(vectorize):
    guide = fg.AutoFlow(correlated).whiten(vectorize=vectorize)
    torch.testing.assert_close(guide._whitening.loc, torch.arange(3.0, dtype=torch.float64), rtol=0, atol=1e-6)
    covariance = guide._whitening.scale @ guide._whitening.scale.mT
    torch.testing.assert_close(covariance, COVARIANCE.to(covariance.device), rtol=0, atol=1e-6)
    assert fg.draw(correlated, guide, num_samples=1000).elbo.value == pytest.approx(0.0, abs=1e-6)


# A path alone ends in the neck of the funnel from every other start.
@pytest.mark.parametrize(
    ("model", "method"),
    [(model, method) for model in (funnel, kitchen_sink) for method in ("auto", "batch_and_match")]
    + [(kitchen_sink, "path")],
)
def test_improves_the_elbo(model, method):
    guide = fg.AutoFlow(model).setup()
    before = fg.draw(model, guide, num_samples=2000).elbo
    guide.whiten(method=method)
    after = fg.draw(model, guide, num_samples=2000).elbo
    assert after.value > before.value + 4 * (before.se + after.se)


def test_init_leaves_the_map():
    guide = fg.AutoFlow(correlated).setup()
    before = guide._whitening.scale.clone()
    guide.whiten(method="init")
    torch.testing.assert_close(guide._whitening.scale, before, rtol=0, atol=0)


def test_a_trained_guide_is_refused():
    y = torch.tensor([0.3, 1.4])
    guide = fg.AutoFlow(conjugate)
    guide.whiten(y)
    guide.whiten(y)  # not trained yet
    SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(y)
    with pytest.raises(ValueError, match="has been trained"):
        guide.whiten(y)


def test_unknown_method():
    with pytest.raises(
        ValueError, match="method must be one of init, auto, batch_and_match, path, laplace, got 'mode'"
    ):
        fg.AutoFlow(correlated).whiten(method="mode")


# --- before whitening -------------------------------------------------------------------------------------------------


def eight_schools():
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0)))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        effect = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
        error = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
        pyro.sample("obs", dist.Normal(theta, error), obs=effect)


@pytest.mark.parametrize("seed", [0, 1])
def test_plain_training_at_a_high_rate_does_not_explode(seed):
    """From a start a tenth as wide as the prior, ten couplings widen together."""
    pyro.set_rng_seed(seed)
    guide = fg.AutoFlow(eight_schools)
    elbo = Trace_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(eight_schools, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    for _ in range(200):
        svi.step()
    # −31.2 where it is exact, and −57 where it starts.
    assert fg.draw(eight_schools, guide, num_samples=5000).elbo.value > -40


def held_back(guide):
    """Whether the couplings are, all of them."""
    couplings = [module for module in guide.modules() if isinstance(module, fg.transforms.Coupling)]
    (state,) = {(coupling.damped, float(coupling.conditioner.slowdown) > 1) for coupling in couplings}
    assert state in ((True, True), (False, False))
    return state[0]


@pytest.mark.parametrize("local", [False, True])
def test_couplings_are_held_back_until_the_guide_is_whitened(local):
    with pyro.settings.context(module_local_params=local):
        guide = fg.AutoFlow(correlated).setup()
        assert held_back(guide)
        assert held_back(guide.whiten(method="init"))
        start = copy.deepcopy(guide.state_dict())
        assert not held_back(guide.whiten())
        assert not held_back(copy.deepcopy(guide))
        assert not held_back(pickle.loads(pickle.dumps(guide)))
        whitened = copy.deepcopy(guide.state_dict())
        guide.load_state_dict(start)
        assert held_back(guide)
        torch.nn.ModuleList([guide]).load_state_dict({f"0.{name}": value for name, value in whitened.items()})
        assert not held_back(guide)


def test_letting_go_leaves_the_weights_in_use():
    guide = fg.AutoFlow(correlated).setup()
    network = guide.flow.transforms[0].transforms[0].conditioner
    points = torch.randn(5, 1, dtype=torch.float64)
    before = network(points)
    stored = network.layers[0].weight.detach().clone()
    guide.let_go()
    torch.testing.assert_close(network.layers[0].weight.detach(), stored / 8, rtol=0, atol=0)
    torch.testing.assert_close(network(points), before, rtol=0, atol=0)
    assert not guide.is_trained()


def test_fit_lets_go_without_whitening_too():
    guide = fg.AutoFlow(correlated)
    fg.fit(correlated, guide, num_steps=2, num_particles=2, whiten=None, progress=False)
    assert not held_back(guide)
    parts = AutoGuideList(correlated)
    parts.append(fg.AutoFlow(correlated))
    fg.fit(correlated, parts, num_steps=2, num_particles=2, progress=False)
    assert not held_back(parts)


def test_a_guide_that_was_trained_while_held_back_stays_the_same():
    guide = fg.AutoFlow(correlated)
    svi = SVI(correlated, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step()
    points = torch.randn(5, 3, dtype=torch.float64)
    before = guide.flow(points)
    guide.let_go()
    assert held_back(guide)
    torch.testing.assert_close(guide.flow(points), before, rtol=0, atol=0)


def test_a_store_and_a_state_dict_bring_the_law_along(tmp_path):
    """From a guide that was held back and one that was not, to one of the other kind."""
    points = 4 * torch.randn(20, 3, dtype=torch.float64)
    for whiten in (False, True):
        pyro.clear_param_store()
        trained = fg.AutoFlow(correlated).setup()
        if whiten:
            trained.whiten()
        svi = SVI(correlated, trained, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(num_particles=10))
        for _ in range(5):
            svi.step()
        expected = trained.flow(points).detach()
        state = copy.deepcopy(trained.state_dict())
        pyro.get_param_store().save(tmp_path / "store")

        pyro.clear_param_store()
        loaded = fg.AutoFlow(correlated).setup()
        if not whiten:
            loaded.whiten()
        loaded.load_state_dict(state)
        torch.testing.assert_close(loaded.flow(points), expected, rtol=0, atol=0)

        pyro.clear_param_store()
        stored = fg.AutoFlow(correlated).setup()
        if not whiten:
            stored.whiten()
        pyro.clear_param_store()
        pyro.get_param_store().load(tmp_path / "store")
        stored()
        torch.testing.assert_close(stored.flow(points), expected, rtol=0, atol=0)


def test_letting_go_needs_a_flow():
    with pytest.raises(RuntimeError, match="is not set up"):
        fg.AutoFlow(correlated).let_go()


# --- Laplace ----------------------------------------------------------------------------------------------------------


def test_hessian_is_that_of_autograd():
    def log_density(points):
        a, b, c = points.unbind(-1)
        return -(a**4) - (a * b).exp() + (b * c).sin()

    point = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
    expected = torch.autograd.functional.hessian(lambda x: log_density(x.unsqueeze(0)).sum(), point)
    torch.testing.assert_close(hessian(log_density, point), expected)


@pytest.mark.parametrize("vectorize", [True, False])
def test_laplace_is_exact_for_a_normal_posterior(vectorize):
    guide = fg.AutoFlow(correlated).whiten(method="laplace", vectorize=vectorize)
    scale = guide._whitening.scale
    torch.testing.assert_close(guide._whitening.loc, torch.arange(3.0, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(scale @ scale.mT, COVARIANCE.to(scale.device), rtol=1e-6, atol=1e-8)


def test_laplace_of_a_gamma_posterior():
    """In log space the density is that of exp(αx − βeˣ): its mode is log(α/β), its curvature there α."""

    def model():
        pyro.sample("x", dist.Gamma(torch.tensor(5.0, dtype=torch.float64), 2.0))

    guide = fg.AutoFlow(model).whiten(method="laplace")
    assert guide._whitening.loc.item() == pytest.approx(math.log(5 / 2), abs=1e-5)
    assert guide._whitening.scale.item() == pytest.approx(5**-0.5, rel=1e-4)


def test_laplace_leaves_no_gradients_in_the_model():
    scale = torch.nn.Parameter(torch.tensor(1.0))

    def model():
        pyro.module("scales", torch.nn.ParameterList([scale]))
        pyro.sample("x", dist.Normal(0.0, scale))

    for method in ("laplace", "auto"):
        pyro.clear_param_store()
        fg.AutoFlow(model).whiten(method=method)
    assert scale.grad is None


def test_laplace_without_a_maximum_warns_and_takes_the_path():
    """A saddle along one axis: the density grows to both sides, slowly, for ever."""

    def target(points):
        return -0.5 * points[..., 0].square() + 0.5 * (1 + points[..., 1].square()).log()

    start = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    with pytest.warns(UserWarning, match="no maximum with a negative definite Hessian.*quasi-Newton path"):
        loc, scale_tril = laplace(target, *start)
    assert loc.isfinite().all()
    assert scale_tril.isfinite().all()


# --- many dimensions --------------------------------------------------------------------------------------------------


def test_diagonal_batch_and_match_is_the_full_one_in_one_dimension():
    loc, scale = torch.tensor([3.0], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)
    target = gaussian_target(loc, torch.diag(scale.square()))
    found = diagonal_batch_and_match(target, torch.zeros_like(loc), torch.ones_like(scale))
    torch.testing.assert_close(found[0], loc, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1], scale, rtol=1e-5, atol=0)


def test_many_dimensions_get_a_diagonal_map():
    dim = 300
    loc, scale = torch.linspace(-5, 5, dim, dtype=torch.float64), torch.logspace(-2, 1, dim, dtype=torch.float64)

    def model():
        with pyro.plate("many", dim):
            pyro.sample("x", dist.Normal(loc, scale))

    # From afar it is the mode that leads; batch and match alone starts near enough.
    for method, start in (("auto", torch.zeros_like(loc)), ("batch_and_match", loc + scale)):
        pyro.clear_param_store()
        guide = fg.AutoFlow(model, affine="diagonal", init_loc_fn=init_to_value(values={"x": start}), init_scale=0.1)
        guide.whiten(method=method)
        torch.testing.assert_close(guide._whitening.scale, scale, rtol=1e-3, atol=0)
        torch.testing.assert_close(guide._whitening.loc, loc, rtol=0, atol=1e-3)
    with pytest.raises(
        ValueError, match=r'"laplace" is for at most 200.*here are 300; use one of auto, batch_and_match'
    ):
        guide.whiten(method="laplace")


def test_diagonal_start_at_the_mode_where_the_start_is_lost():
    dim = 250
    loc = torch.linspace(-300, 300, dim, dtype=torch.float64)

    def log_density(points):
        return dist.Normal(loc, 1e-3).log_prob(points).sum(-1)

    start = torch.zeros(dim, dtype=torch.float64), torch.full((dim,), 0.1, dtype=torch.float64)
    found = best_diagonal_gaussian(log_density, *start)
    assert gaussian_elbo(log_density, *found) == pytest.approx(0.0, abs=1e-3)
