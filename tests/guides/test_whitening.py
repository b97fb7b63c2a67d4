"""The Gaussian found before training."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import COVARIANCE, Y, conjugate, correlated, funnel, kitchen_sink
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import init_to_value

import pyro_flowguides as fg
from pyro_flowguides.guides.gaussians import gaussian_elbo
from pyro_flowguides.guides.many_dimensions import best_diagonal_gaussian, diagonal_batch_and_match, mode
from pyro_flowguides.guides.whitening import (
    batch_and_match,
    best_gaussian,
    coordinate_scales,
    quasi_newton_path,
    whiten,
)
from pyro_flowguides.model.call import ModelCall
from pyro_flowguides.model.target import Target


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


@pytest.mark.parametrize("dim", [1, 5, 40, 250])
def test_a_model_that_is_run_draw_by_draw_is_whitened_by_few_runs(dim):
    sd = torch.logspace(0, 1, dim, dtype=torch.float64)
    runs = []

    def model():
        runs.append(1)
        x = pyro.sample("x", dist.Normal(torch.full((dim,), 3.0, dtype=torch.float64), sd).to_event(1))
        # A look at a latent.
        assert float(x.detach().sum()) < 1e9

    guide = fg.AutoFlow(model).whiten(vectorize=False)
    assert len(runs) < 2700
    torch.testing.assert_close(guide.fixed_map.loc, torch.full((dim,), 3.0, dtype=torch.float64), rtol=0.0, atol=1e-2)
    scale = guide.fixed_map.scale
    torch.testing.assert_close(scale.square().sum(-1).sqrt() if scale.dim() == 2 else scale, sd, rtol=1e-2, atol=0.0)


def test_scales_that_differ_by_sixteen_powers_of_ten():
    sd = torch.tensor([1e-8, 1.0, 1e8], dtype=torch.float64)
    loc = torch.tensor([3e-8, 0.0, -2e8], dtype=torch.float64)
    covariance = torch.outer(sd, sd) * COVARIANCE.to(loc.device) / 2
    target = gaussian_target(loc, covariance)
    identity = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(coordinate_scales(target, torch.zeros_like(loc)).log10(), sd.log10(), rtol=0.0, atol=2.0)
    found_loc, found_tril = best_gaussian(target, torch.zeros_like(loc), 0.1 * identity)
    torch.testing.assert_close(found_loc / sd, loc / sd, rtol=1e-6, atol=1e-6)
    assert gaussian_elbo(target, found_loc, found_tril) == pytest.approx(0.0, abs=1e-3)


def test_a_model_that_looks_at_a_latent_is_whitened_draw_by_draw_after_a_warning():
    def model():
        x = pyro.sample("x", dist.Normal(3.0, 1.0))
        sign = 1.0 if x > -50 else -1.0
        pyro.sample("y", dist.Normal(sign * x, 1.0), obs=torch.tensor(5.0))

    with pytest.warns(UserWarning, match=r"every draw is a run of its own.*sign = 1.0 if x > -50"):
        guide = fg.AutoFlow(model).whiten()
    torch.testing.assert_close(
        guide.fixed_map.loc.double(), torch.tensor([4.0], dtype=torch.float64), rtol=0.0, atol=0.01
    )


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
    torch.testing.assert_close(guide.fixed_map.loc, torch.arange(3.0, dtype=torch.float64), rtol=0, atol=1e-6)
    covariance = guide.fixed_map.scale @ guide.fixed_map.scale.mT
    torch.testing.assert_close(covariance, COVARIANCE.to(covariance.device), rtol=0, atol=1e-6)
    assert fg.draw(correlated, guide, num_samples=1000).elbo.value == pytest.approx(0.0, abs=1e-6)


# A path alone ends in the neck of the funnel from every other start.
@pytest.mark.parametrize(
    ("model", "method"),
    [(model, method) for model in (funnel, kitchen_sink) for method in ("auto", "batch_and_match")]
    + [(kitchen_sink, "pathfinder")],
)
def test_improves_the_elbo(model, method):
    guide = fg.AutoFlow(model).setup()
    before = fg.draw(model, guide, num_samples=2000).elbo
    guide.whiten(method=method)
    after = fg.draw(model, guide, num_samples=2000).elbo
    assert after.value > before.value + 4 * (before.se + after.se)


def test_init_leaves_the_map():
    guide = fg.AutoFlow(correlated).setup()
    before = guide.fixed_map.scale.clone()
    guide.whiten(method="init")
    torch.testing.assert_close(guide.fixed_map.scale, before, rtol=0, atol=0)


def test_a_trained_guide_is_refused():
    y = torch.tensor(Y)
    guide = fg.AutoFlow(conjugate)
    guide.whiten(y)
    guide.whiten(y)  # not trained yet
    SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(y)
    with pytest.raises(ValueError, match="has been trained"):
        guide.whiten(y)


def test_unknown_method():
    with pytest.raises(ValueError, match="method must be one of init, auto, batch_and_match, pathfinder, got 'mode'"):
        fg.AutoFlow(correlated).whiten(method="mode")


@pytest.mark.parametrize("method", ["auto", "pathfinder"])
def test_whitening_leaves_no_gradients_in_the_model(method):
    scale = torch.nn.Parameter(torch.tensor(1.0))

    def model():
        pyro.module("scales", torch.nn.ParameterList([scale]))
        pyro.sample("x", dist.Normal(0.0, scale))

    fg.AutoFlow(model).whiten(method=method)
    assert scale.grad is None


def test_whiten_as_a_function_of_a_target():
    target = Target(ModelCall(correlated), fg.AutoFlow(correlated).setup().latents)
    start = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    loc, scale = whiten(target, start, "batch_and_match")
    torch.testing.assert_close(loc, torch.arange(3.0, dtype=torch.float64), rtol=0, atol=1e-5)
    assert scale.shape == (3, 3)
    loc, scale = whiten(target, (start[0], torch.ones(3, dtype=torch.float64)), "batch_and_match")
    assert scale.shape == (3,)
    with pytest.raises(
        ValueError, match="method must be one of init, auto, batch_and_match, pathfinder, got 'laplace'"
    ):
        whiten(target, start, "laplace")


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
        torch.testing.assert_close(guide.fixed_map.scale, scale, rtol=1e-3, atol=0)
        torch.testing.assert_close(guide.fixed_map.loc, loc, rtol=0, atol=1e-3)
    with pytest.raises(
        ValueError, match=r'"pathfinder" is for at most 200.*here are 300; use one of auto, batch_and_match'
    ):
        guide.whiten(method="pathfinder")


def test_diagonal_start_at_the_mode_where_the_start_is_lost():
    dim = 250
    loc = torch.linspace(-300, 300, dim, dtype=torch.float64)

    def log_density(points):
        return dist.Normal(loc, 1e-3).log_prob(points).sum(-1)

    start = torch.zeros(dim, dtype=torch.float64), torch.full((dim,), 0.1, dtype=torch.float64)
    found = best_diagonal_gaussian(log_density, *start, mode(log_density, start[0]))
    assert gaussian_elbo(log_density, *found) == pytest.approx(0.0, abs=1e-3)


def grouped(y, group, num_groups):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau, sd = pyro.sample("tau", dist.HalfNormal(1.0)), pyro.sample("sd", dist.HalfNormal(1.0))
    with pyro.plate("groups", num_groups):
        a = pyro.sample("a", dist.Normal(mu, tau))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(a[..., group], sd), obs=y)


def test_a_centred_model_of_many_groups_is_whitened():
    """Its mode is at tau = 0, where the optimiser leaves the numbers that a prior can be drawn from."""
    generator = torch.Generator().manual_seed(1)
    group = torch.arange(1000) % 250
    y = torch.randn(250, generator=generator)[group] + 0.5 * torch.randn(1000, generator=generator)
    pyro.set_rng_seed(1)
    guide = fg.AutoFlow(grouped).whiten(y, group, 250)
    # The scale of the noise, the last of three globals.
    assert float(guide.fixed_map.loc[2].exp()) == pytest.approx(0.5, abs=0.2)
    assert float(guide.fixed_map.scale.max()) < 1.0


def test_whitening_runs_the_model_without_drawing_from_its_priors():
    class Counting(dist.Normal):
        drawn = 0

        def __call__(self, *shape):
            Counting.drawn += 1
            return super().__call__(*shape)

        def sample(self, *shape, **options):
            Counting.drawn += 1
            return super().sample(*shape, **options)

    def model():
        pyro.sample("x", Counting(0.0, 1.0))

    guide = fg.AutoFlow(model).setup()
    before = Counting.drawn
    guide.whiten(method="batch_and_match")
    # Once to see the plates.
    assert Counting.drawn - before <= 2


@pytest.mark.parametrize("method", [pytest.param("batch_and_match", marks=pytest.mark.slow), "pathfinder"])
def test_no_trial_point_ends_the_search(method):
    """Far from its start this density raises, for one point of a batch as for all of them."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        if bool((x.abs() > 1.5).any()):
            raise ValueError("too far away")
        pyro.sample("y", dist.Normal(x.sum(-1), 0.05), obs=torch.tensor(1.0))

    pyro.set_rng_seed(0)
    guide = fg.AutoFlow(model, init_loc_fn=init_to_value(values={"x": torch.zeros(2)})).whiten(method=method)
    torch.testing.assert_close(guide.median()["x"].sum(), torch.tensor(1.0), rtol=0, atol=0.1)


def test_an_error_at_the_start_is_an_error_of_whitening():
    target = Target(ModelCall(correlated), fg.AutoFlow(correlated).setup().latents)
    target.log_prob = lambda points: points @ torch.zeros(7)
    with pytest.raises(RuntimeError, match="size"):
        whiten(target, (torch.zeros(3), torch.eye(3)), "auto")
