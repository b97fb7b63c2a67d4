"""Modes: found from many starts, weighed, named where a symmetry maps one to another, and lost by a guide."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from fits import quick
from models import eight_schools, funnel
from pyro.infer.autoguide import AutoDelta, AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.diagnostics.verdicts import Verdict, after_search
from pyro_flowguides.model.ascent import ascend, negative_hessians, without_errors
from pyro_flowguides.model.mode_search import max_modes


def mixture(masses, locs, scale=1.0):
    """The log density of a mixture of normals, with a batch of points or a single one."""
    logs, centers = torch.tensor(masses).log(), torch.as_tensor(locs)
    dim = centers.shape[-1]

    def log_density(x):
        squared = ((x.unsqueeze(-2) - centers) / scale).square().sum(-1)
        return (logs - squared / 2).logsumexp(-1) - dim / 2 * math.log(2 * math.pi * scale**2)

    return fg.LogDensity(log_density, dim)


def apart(number, dim, distance=10.0):
    """Centres that are all as far from each other."""
    return distance / 2**0.5 * torch.eye(dim)[:number]


# --- ascent --------------------------------------------------------------------------------------------------------------


def test_all_starts_climb_a_curved_ridge_together():
    def ridge(x):
        return -x[:, 0].square() / 2 - 10 * (x[:, 1] - x[:, 0].square()).square()

    starts = 10 * torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ascent = ascend(ridge, starts, 100)
    assert bool(ascent.arrived.all())
    assert ascent.points.abs().max() < 0.1
    assert ascent.num_steps < 100
    # Each by itself comes to the same place.
    torch.testing.assert_close(ascend(ridge, starts[:1], 100).points[0], ascent.points[0], rtol=1e-8, atol=1e-8)


def test_a_density_that_rises_without_an_end_has_no_maximum():
    def neck(x):
        return -4.5 * x[:, 0] - x[:, 1:].square().sum(-1) * torch.exp(-x[:, 0])

    ascent = ascend(neck, torch.ones(3, 5, dtype=torch.float64), 50)
    assert not bool(ascent.arrived.any())


def test_a_start_without_a_density_does_not_hold_up_the_others():
    def normal(x):
        if bool((x > 100).any()):
            raise ValueError("out of range")
        return -x.square().sum(-1)

    starts = torch.tensor([[3.0], [200.0], [-2.0]], dtype=torch.float64)
    ascent = ascend(without_errors(normal), starts, 50)
    assert ascent.arrived.tolist() == [True, False, True]


def test_curvature_is_that_of_a_normal():
    precision = torch.tensor([[2e4, 30.0], [30.0, 0.5]], dtype=torch.float64)
    points = torch.zeros(1, 2, dtype=torch.float64)
    found = negative_hessians(lambda x: -((x @ precision) * x).sum(-1) / 2, points, 1e-4)
    torch.testing.assert_close(found[0], precision, rtol=1e-6, atol=1e-6)


# --- masses --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masses", "dim"), [((0.7, 0.3), 2), ((0.7, 0.3), 10), ((0.7, 0.3), 50), ((0.6, 0.3, 0.1), 10)]
)
def test_masses_of_a_mixture_of_normals(masses, dim):
    locs = apart(len(masses), dim)
    modes = fg.find_modes(mixture(masses, locs), seed=0)
    assert len(modes) == len(masses)
    for mode, mass, loc in zip(modes, masses, locs.double(), strict=True):
        assert mode.mass.se < 0.03
        assert abs(mode.mass.value - mass) < 4 * mode.mass.se + 1e-3
        torch.testing.assert_close(mode.values["x"].double(), loc, rtol=0, atol=0.02)
        # What a mixture of guides would start from.
        torch.testing.assert_close(mode.loc, loc, rtol=0, atol=0.02)
        torch.testing.assert_close(mode.scale_tril, torch.eye(dim).double(), rtol=0, atol=0.02)
        assert mode.log_mass == pytest.approx(math.log(mass), abs=0.1)
        assert mode.is_definite
        assert mode.khat < 0.7
        assert math.isnan(mode.drawn)


def test_further_starts_follow_while_modes_are_found_by_one_start_only():
    grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)) * 12
    modes = fg.find_modes(mixture([1 / 16] * 16, grid), num_starts=32, seed=0)
    assert len(modes) == 16
    assert modes.num_starts > 64
    assert all(abs(mode.mass.value - 1 / 16) < 4 * mode.mass.se for mode in modes)


def test_modes_of_different_widths():
    narrow, wide = torch.tensor([20.0, 0.0]), torch.tensor([-20.0, 0.0])

    def log_density(x):
        first = -(x - narrow).square().sum(-1) / 2
        second = -((x - wide) / 4.0).square().sum(-1) / 2 - 2 * math.log(4.0)
        return torch.logaddexp(first, second)

    modes = fg.find_modes(fg.LogDensity(log_density, 2), num_starts=256, seed=0)
    assert [round(mode.mass.value, 1) for mode in modes] == [0.5, 0.5]


@pytest.mark.slow
def test_forty_modes_in_the_plane_are_found():
    locs = 80 * torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) - 40
    modes = fg.find_modes(mixture([1 / 40] * 40, locs, scale=math.log1p(math.e)), num_starts=256, seed=0)
    assert sum(mode.mass.value for mode in modes) == pytest.approx(1)
    # Every centre has its mode, which may be that of several.
    found = torch.stack([mode.loc for mode in modes]).float()
    distances = torch.cdist(locs, found).min(-1).values
    assert (distances < 3).sum() >= 38
    assert torch.logsumexp(torch.tensor([mode.log_mass for mode in modes]), 0) == pytest.approx(0, abs=0.1)


# --- no false modes ------------------------------------------------------------------------------------------------------


def banana():
    x = pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0))
    pyro.sample("y", dist.Normal(x**2, 0.2))


X = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))


def logistic():
    beta = pyro.sample("beta", dist.Normal(torch.zeros(4), 2.0).to_event(1))
    with pyro.plate("data", 60):
        pyro.sample("y", dist.Bernoulli(logits=(X * beta).sum(-1)), obs=(X[:, 0] > 0.3).float())


def correlations():
    scales = pyro.sample("scales", dist.LogNormal(torch.zeros(3), 1.0).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(3, torch.tensor(2.0)))
    with pyro.plate("data", 20):
        pyro.sample(
            "y", dist.MultivariateNormal(torch.zeros(3), scale_tril=scales.unsqueeze(-1) * factor), obs=X[:20, :3]
        )


def non_centered():
    mu, tau = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, 10.0), obs=y)


def ten_dimensional_funnel():
    return funnel(10)


UNIMODAL = [eight_schools, non_centered, ten_dimensional_funnel, banana, logistic, correlations]


@pytest.mark.parametrize("model", UNIMODAL, ids=lambda model: model.__name__)
def test_no_false_mode(model):
    guide = AutoNormal(model)
    fit = quick(model, guide, num_steps=50, search_modes=True)
    assert fit.modes is not None
    assert fit.modes.lost == ()
    assert len(fit.modes) <= 1
    assert fit.verdict.lost_mass == 0


@pytest.mark.slow
@pytest.mark.parametrize("model", UNIMODAL, ids=lambda model: model.__name__)
def test_no_more_than_one_mode_without_a_guide(model):
    assert len(fg.find_modes(model, seed=0)) <= 1


def standard(x):
    return -x.square().sum(-1) / 2


def spike(x):
    """A second maximum of ten times the density, with a thousandth of the mass."""
    return torch.logaddexp(standard(x), math.log(10.0) - ((x - 8) / 0.01).square().sum(-1) / 2)


def flat_top(x):
    """By Laplace's method the second maximum, which does not bend, has most of the mass; it has a thousandth."""
    return torch.logaddexp(standard(x), -3 - ((x - 15) / 0.3).pow(4).sum(-1))


def plateau(x):
    return -(x.abs() - 5).clamp(min=0).square().sum(-1)


def improper(x):
    """A flat direction without an end."""
    return -x[..., 0].square() / 2


def ring(x):
    """A ridge without ends: it bends nowhere along its way."""
    return -((x.norm(dim=-1) - 3) / 0.1).square() / 2


def heavy_tail(x):
    return -2 * torch.log1p(x.square()).sum(-1)


@pytest.mark.parametrize("log_density", [spike, flat_top, plateau, improper, ring, heavy_tail])
def test_no_false_mode_beside_a_guide(log_density):
    model = fg.LogDensity(log_density, 2)

    def guide():
        pyro.sample("x", dist.Normal(torch.zeros(2), 2.0).to_event(1))

    modes = fg.find_modes(model, guide=guide, seed=0)
    assert modes.lost == ()
    assert str(modes) == f"{modes.num_starts} starts found no other mode."


def neck(x):
    """Rises without an end towards a neck that has no mass."""
    return -0.9 * x[..., 0] - x[..., 0].abs() / 2 - x[..., 1:].square().sum(-1) * torch.exp(-2 * x[..., 0]) / 2


def test_where_nothing_comes_to_a_maximum_nothing_is_said_of_other_modes():
    model = fg.LogDensity(neck, 3)
    fit = quick(model, AutoNormal(model), num_steps=20, search_modes=True)
    assert len(fit.modes) == 0
    assert (
        "none of 128 starts came to a maximum of the density, so nothing is known of other modes" in fit.modes.finding
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_latent_in_either_precision(dtype):
    def log_density(x):
        locs = torch.tensor([-6.0, 6.0], dtype=dtype)
        return (torch.tensor([0.7, 0.3], dtype=dtype).log() - (x - locs).square() / 2).logsumexp(-1)

    model = fg.LogDensity(log_density, 1)
    with pyro.validation_enabled(False):
        modes = fg.find_modes(model, seed=0)
    assert [round(mode.mass.value, 1) for mode in modes] == [0.7, 0.3]
    torch.testing.assert_close(modes[0].loc, torch.tensor([-6.0]).double(), rtol=0, atol=1e-2)


def test_many_latents_take_bounded_batches():
    largest = []

    def log_density(x):
        largest.append(x.numel())
        return -x.square().sum(-1) / 2

    modes = fg.find_modes(fg.LogDensity(log_density, 300), num_starts=8, seed=0)
    assert len(modes) == 1
    # All Hessians at once would take 4 · 128 · 300 points.
    assert max(largest) <= 8192 * 300
    # Their Hessians, at 8 bytes for a number, would take 2 GB at 256 modes.
    assert max_modes(1000) == 16


# --- symmetries ----------------------------------------------------------------------------------------------------------

DATA = torch.tensor([-2.1, -1.8, -2.6, -1.5, -2.0, -2.9, 2.2, 1.6, 2.4, 1.9, 2.8, 2.1, 1.4, 2.3])


def components(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[z], scale[z]), obs=y)


def separate_sites(y):
    first = pyro.sample("first", dist.Normal(torch.tensor(0.0), 3.0))
    second = pyro.sample("second", dist.Normal(torch.tensor(0.0), 3.0))
    each = dist.Normal(torch.stack([first, second], -1), 1.0)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), each), obs=y)


def hidden_markov(y):
    transition = pyro.sample("transition", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    with pyro.plate("states", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    start = torch.ones(2).log()
    pyro.sample("y", dist.DiscreteHMM(start, transition.log(), dist.Normal(loc, 0.5), duration=len(y)), obs=y)


def up_to_sign():
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    pyro.sample("y", dist.Normal(x[..., 0] ** 2, 0.5), obs=torch.tensor(9.0))


@pytest.mark.parametrize(
    ("model", "args", "words"),
    [
        (components, (DATA,), "the elements of 'weights', 'loc' and 'scale' in the order 1, 0"),
        (separate_sites, (DATA,), "'first' and 'second' exchanged"),
        (hidden_markov, (DATA,), "the elements of 'transition' and 'loc' in the order 1, 0"),
        (up_to_sign, (), "the sign of 'x' changed"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_symmetric_modes_are_named(model, args, words):
    modes = fg.find_modes(model, *args, seed=0)
    assert len(modes) == 2
    assert modes[0].symmetric_to is None
    assert (modes[1].symmetric_to, modes[1].symmetry) == (0, words)
    # The two have the same mass.
    assert abs(modes[0].mass.value - 0.5) < 4 * modes[0].mass.se
    assert words in repr(modes)


def test_modes_without_a_symmetry_have_none():
    modes = fg.find_modes(mixture((0.55, 0.45), apart(2, 2)), seed=0)
    assert [mode.symmetric_to for mode in modes] == [None, None]


# --- beside a guide ------------------------------------------------------------------------------------------------------


def test_a_guide_that_draws_both_modes_has_lost_none():
    model = mixture((0.6, 0.4), apart(2, 2))

    def guide():
        locs, scale = apart(2, 2), torch.ones(2, 2)
        each = dist.Normal(locs, scale).to_event(1)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.5, 0.5])), each))

    modes = fg.find_modes(model, guide=guide, seed=0)
    assert modes.lost == ()
    assert [round(mode.drawn, 1) for mode in modes] == [0.5, 0.5]
    assert [round(mode.mass.value, 1) for mode in modes] == [0.6, 0.4]
    assert str(modes) == f"{modes.num_starts} starts found no other mode."


def test_errors_include_those_of_a_lost_mode():
    """The guide is exact on the mode of 0.6; the other one is 4 away in a site of which the log is the normal coordinate."""

    def model():
        level = pyro.sample("level", dist.Categorical(torch.tensor([0.6, 0.4])), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(torch.tensor([0.0, 20.0])[level], 1.0))
        pyro.sample("scale", dist.LogNormal(torch.tensor([0.0, 4.0])[level], 0.5))

    def guide():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("scale", dist.LogNormal(0.0, 0.5))

    draws = fg.draw(model, guide, num_samples=10_000, seed=0)
    modes = fg.find_modes(model, guide=draws, seed=0)
    (lost,) = modes.lost
    assert float(lost.mean["x"]) == pytest.approx(20, abs=0.1) and float(lost.sd["x"]) == pytest.approx(1, abs=0.1)
    mean, sd = math.exp(4 + 0.125), math.exp(4 + 0.125) * math.sqrt(math.exp(0.25) - 1)
    assert float(lost.mean["scale"]) == pytest.approx(mean, rel=0.05)
    assert float(lost.sd["scale"]) == pytest.approx(sd, rel=0.1)
    table = draws.summary(kind="diagnostics", modes=modes)
    off = 8 / math.sqrt(1 + 0.24 * 400)
    assert table.loc["x", "mean_error"] == pytest.approx(-off, abs=0.03)
    assert table.loc["x", "sd_error"] == pytest.approx(1 / math.sqrt(1 + 0.24 * 400) - 1, abs=0.01)
    verdict = draws.judge(modes)
    assert verdict.kind is fg.VerdictKind.DOUBTFUL and verdict.mean_error == pytest.approx(off, abs=0.05)
    assert "the mean of x is expected to be off by about 0.8" in str(verdict)
    assert draws.verdict.kind is fg.VerdictKind.EXACT and draws.judge(None) is draws.verdict


def test_a_small_lost_mode_is_named_and_does_not_make_a_fit_doubtful():
    good = Verdict(fg.VerdictKind.GOOD, 0.3, 0.95, 10_000, "no mean is off")
    verdict = after_search(good, "a mode at x = 3 with about 2% of the mass has not been drawn.", 0.02)
    assert verdict.kind is fg.VerdictKind.GOOD
    assert str(verdict).endswith("is off. A mode at x = 3 with about 2% of the mass has not been drawn.")


def test_images_of_a_drawn_mode_are_told_apart():
    center = torch.tensor([-6.0, 0.0, 6.0])
    images = torch.stack([center[list(order)] for order in itertools.permutations(range(3))])
    model = mixture([1 / 6] * 6, images)

    def guide():
        pyro.sample("x", dist.Normal(center, 1.0).to_event(1))

    modes = fg.find_modes(model, guide=guide, seed=0)
    assert [mode.symmetric_to for mode in modes] == [None, 0, 0, 0, 0, 0]
    assert str(modes).startswith("5 modes with about 83% of the mass have not been drawn, the heaviest at ")
    assert str(modes).endswith(
        "; all are images of modes that have been, by symmetries of the model; what these leave unchanged is right."
    )


# --- errors --------------------------------------------------------------------------------------------------------------


def only_discrete():
    pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (banana, {"num_starts": 0}, "num_starts must be at least 1"),
        (only_discrete, {}, "no continuous latent sites"),
        (
            banana,
            {"guide": AutoDelta(banana)},
            "cannot be compared with modes: the guide gives site 'x' a single point",
        ),
    ],
)
def test_errors(model, options, message):
    with pytest.raises(ValueError, match=message):
        fg.find_modes(model, **options)
