"""Simulation-based calibration: what it passes, what it flags, by which law, in how many processes."""

import functools
import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy.stats import norm

import pyro_flowguides as fg
from pyro_flowguides.calibration import Calibration, fit_and_draw, symmetry_p_value
from pyro_flowguides.diagnostics.replay import simulate

NUM = 300


def two_effects():
    """Two effects of which their sum alone is observed: a correlated posterior, exactly known."""
    effects = pyro.sample("effects", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(effects.sum(-1), 0.5), obs=torch.tensor(0.0))


def model_factory():
    return two_effects


def guide_with(shift=0.0, scale=1.0, mean_field=False):
    """The exact posterior, moved by a number of its sds and stretched; or its best mean-field approximation."""

    def guide_factory(model):
        y = poutine.trace(model).get_trace().nodes["y"]["value"]
        precision = torch.eye(2) + torch.ones(2, 2) / 0.5**2
        exact = precision.inverse()
        covariance = precision.diagonal().reciprocal().diag() if mean_field else scale**2 * exact
        loc = exact @ torch.full((2,), float(y) / 0.5**2) + shift * exact.diagonal().sqrt()

        def guide():
            pyro.sample("effects", dist.MultivariateNormal(loc, covariance))

        return guide

    return guide_factory


def draw_only(model, guide, seed, num_samples=500):
    return fg.draw(model, guide, num_samples=num_samples, seed=seed)


def calibrate(num_simulations=NUM, **options):
    options = {"guide_factory": guide_with(), "infer": draw_only, "progress": False, **options}
    return fg.check_calibration(model_factory, num_simulations=num_simulations, **options)


def test_an_exact_guide_passes():
    result = calibrate()
    assert result.ranks["effects"].shape == result.probabilities["effects"].shape == (NUM, 2)
    assert result.ranks["effects"].dtype.kind == "i"
    assert 0 <= result.ranks["effects"].min() <= result.ranks["effects"].max() <= 199
    table = result.table()
    assert list(table.index) == ["effects[0]", "effects[1]"]
    assert (table["finding"] == "calibrated").all()
    assert result.verdict == "calibrated: 300 simulations show no departure in 2 scalars"
    # A tenth of the ranks in each tenth: binomial, within four and a half of its sds.
    counts = np.stack([np.histogram(r, np.linspace(0, 200, 11))[0] for r in result.ranks["effects"].T])
    assert (np.abs(counts - NUM / 10) < 4.5 * (NUM * 0.1 * 0.9) ** 0.5).all()
    # The variance of P by that of a uniform number is 1, with the sd of (12 (P − 1/2)²), sqrt(4/5), over sqrt(N).
    np.testing.assert_allclose(table["width"], 1, atol=4 * (0.8 / NUM) ** 0.5)
    np.testing.assert_allclose(table["shift"], 0, atol=4 * (1 / 12 / NUM) ** 0.5)


@pytest.mark.parametrize("scale", [0.5, pytest.param(2.0, marks=pytest.mark.slow)])
def test_a_wrong_width_is_flagged_by_its_law(scale):
    result = calibrate(guide_factory=guide_with(scale=scale))
    table = result.table()
    assert (table["finding"] == ("too narrow" if scale < 1 else "too wide")).all()
    assert result.verdict.startswith("not calibrated: 2 of 2 scalars, over 300 simulations: effects[0] too ")
    # P is beyond its 5% and 95% points as often as a standard normal is beyond scale × 1.645.
    outside = (np.abs(result.probabilities["effects"] - 0.5) > 0.45).mean(0)
    expected = 2 * norm.sf(1.645 * scale)
    # Four sds of the binomial; 500 draws know their own 5% point to 1%, which moves the fraction by little.
    np.testing.assert_allclose(outside, expected, atol=4 * (expected * (1 - expected) / NUM) ** 0.5 + 0.01)
    # The shift stays 0: the test of symmetry has nothing to say.
    assert (table["vsbc_p"] > 0.0025).all()


@pytest.mark.slow
def test_mean_field_on_a_correlated_posterior_is_flagged():
    """The best mean-field normal has the sds of the conditionals, 0.45, where those of the marginals are 0.75."""
    result = calibrate(guide_factory=guide_with(mean_field=True))
    assert (result.table()["finding"] == "too narrow").all()


@pytest.mark.parametrize(
    ("shift", "finding"), [(0.7, "too high"), pytest.param(-0.7, "too low", marks=pytest.mark.slow)]
)
def test_a_shift_is_flagged(shift, finding):
    table = calibrate(200, guide_factory=guide_with(shift=shift)).table()
    assert (table["finding"] == finding).all()
    # The mean of P − 1/2 for z0 − shift: Φ(−shift / √2) − 1/2.
    np.testing.assert_allclose(table["shift"], norm.cdf(-shift / 2**0.5) - 0.5, atol=4 * (1 / 12 / 200) ** 0.5)


def test_p_values_have_their_size():
    """Uniform ranks: p-values below a level are as rare as it says, by the binomial law over 1000 tables."""
    rng = np.random.default_rng(0)
    ranks = {"x": rng.integers(0, 100, size=(150, 1000))}
    table = Calibration(ranks, {"x": (ranks["x"] + rng.uniform(size=(150, 1000))) / 100}, 99, {"x": []}).table()
    for column in ("sbc_p", "vsbc_p"):
        for level in (0.01, 0.05, 0.3):
            spread = (level * (1 - level) / 1000) ** 0.5
            # Discrete statistics: the size may be smaller than the level, by the probability of one value of theirs.
            assert level - 4 * spread - 0.05 < (table[column] <= level).mean() < level + 4 * spread, (column, level)


def test_symmetry_against_all_walks():
    """The law of the largest distance of a fair walk, by going through all of them."""
    num = 9
    walks = np.array(list(itertools.product([-1, 1], repeat=num)))
    largest = np.abs(walks.cumsum(1)).max(1)
    magnitudes = np.linspace(0.49, 0.1, num)
    for walk in walks[::37]:
        shuffle = np.random.default_rng(0).permutation(num)
        expected = (largest >= np.abs(walk.cumsum()).max()).mean()
        assert symmetry_p_value(0.5 + (walk * magnitudes)[shuffle]) == pytest.approx(expected)
    assert symmetry_p_value(np.full(5, 0.5)) == 1.0


def test_bins_of_ranks_that_do_not_divide_evenly():
    """With 100 ranks in 15 bins, bins have 6 or 7 of them, and so many more are expected there."""
    ranks = np.tile(np.arange(100), 3)
    counts, expected = Calibration({"x": ranks}, {"x": ranks / 100}, 99, {"x": []})._histogram(ranks)
    np.testing.assert_allclose(counts, expected)
    assert len(counts) == 20
    counts, expected = Calibration({"x": ranks}, {"x": ranks / 100}, 99, {"x": []})._histogram(ranks[:155])
    assert len(counts) == 15
    assert counts.sum() == pytest.approx(expected.sum()) == 155
    assert set(np.round(expected * 100 / 155)) == {6, 7}


def test_a_fit_does_not_repeat_the_noise_of_its_simulation():
    """Under the seed of its simulation it would draw the true values again."""
    seeds, data = [], []

    def simulated(seed):
        pyro.set_rng_seed(seed)
        return simulate(two_effects)[1]["y"]

    def infer(model, guide, seed):
        seeds.append(seed)
        data.append(poutine.trace(model).get_trace().nodes["y"]["value"])
        return draw_only(model, guide, seed)

    calibrate(20, infer=infer, seed=3)
    assert data == [simulated(3 + i) for i in range(20)]
    assert not any(torch.equal(simulated(seed), y) for seed, y in zip(seeds, data, strict=True))
    assert len(set(seeds)) == 20


@pytest.mark.slow
def test_fits_by_default():
    infer = functools.partial(fit_and_draw, num_steps=1, num_particles=2)
    result = calibrate(20, guide_factory=fg.AutoCoupling, infer=infer)
    assert result.table()["width"].between(0.2, 2.2).all()
    assert not list(pyro.get_param_store().keys())


def importable_guide(model):
    return guide_with()(model)


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(device):
    if device.type != "cpu":
        pytest.skip("the default device of the tests does not reach other processes")
    one, two = (calibrate(20, guide_factory=importable_guide, num_processes=number) for number in (1, 2))
    np.testing.assert_array_equal(one.ranks["effects"], two.ranks["effects"])
    with pytest.raises(ValueError, match="must be importable by name to run in several processes"):
        calibrate(20, num_processes=2)


def test_to_arviz():
    ranks = {"x": np.arange(60).reshape(20, 3)}
    result = Calibration(ranks, {"x": ranks["x"] / 60}, 60, {"x": ["group"]})
    tree = result.to_arviz(coords={"group": ["a", "b", "c"]})
    assert tree["prior_sbc"]["x"].dims == ("chain", "draw", "group")
    assert tree["prior_sbc"]["x"].shape == (1, 20, 3)
    assert tree["prior_sbc"]["x"].dtype.kind == "i"
    np.testing.assert_array_equal(tree["prior_vsbc"]["x"][0], ranks["x"] / 60)
    assert list(result.table(coords={"group": ["a", "b", "c"]}).index) == ["x[a]", "x[b]", "x[c]"]


def test_what_cannot_be_calibrated():
    with pytest.raises(ValueError, match="num_simulations must be at least 20, got 19"):
        calibrate(19)
    with pytest.raises(ValueError, match="num_processes must be at least 1, got 0"):
        calibrate(20, num_processes=0)
    with pytest.raises(
        RuntimeError, match="seed 7 failed: ValueError: there are 500 draws, and num_samples asks for 501"
    ):
        calibrate(20, num_samples=501, seed=7)

    def nothing_observed():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(RuntimeError, match="the model observes nothing"):
        fg.check_calibration(lambda: nothing_observed, guide_with(), 20, progress=False)
