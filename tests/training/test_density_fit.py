"""The fit of a density: what it prints, draws, scores, and reads from a file."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch

from pyro_flowguides import transforms as T
from pyro_flowguides.bases import StandardNormal
from pyro_flowguides.training import DensityFit, saving
from pyro_flowguides.training.density import Density, FixedBase, Units, with_fixed_maps


def fit_of(units, density=None, **changes):
    """A fit as ``fit_density`` would return it."""
    fields = {
        "train_losses": np.zeros(5),
        "validation_losses": np.array([3.0, 2.5, 2.75]),
        "validation_steps": np.array([0, 3, 5]),
        "best_step": 3,
        "stopped_early": False,
        "num_skipped": 1,
        "num_rolled_back": 2,
        "wall_time": 1.25,
    }
    return DensityFit(density=density, units=units, **{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "1.2 s, parameters of step 3, validation loss 2.5 nats"),
        ({"best_step": 5}, "1.2 s, validation loss 2.5 nats"),
        ({"stopped_early": True}, "1.2 s, stopped early, parameters of step 3, validation loss 2.5 nats"),
        (
            {"interrupted": True, "stopped_early": True},
            "1.2 s, interrupted, parameters of step 3, validation loss 2.5 nats",
        ),
        ({"best_step": 5, "validation_losses": np.array([])}, "1.2 s"),
    ],
)
def test_what_it_prints(changes, expected):
    assert repr(fit_of(Units((2,)), **changes)) == f"DensityFit of rows of shape (2,): 5 steps, {expected}"


def shifted(units, loc=3.0, scale=2.0):
    """The normal law of this location and scale, in a shape."""
    gaussian = torch.full((units.dim,), loc), torch.full((units.dim,), scale)
    return Density(StandardNormal(units.dim), with_fixed_maps(T.Affine(units.dim), units, gaussian, None))


def test_draws_have_the_shape_of_the_data():
    fit = fit_of(Units((2, 3)), shifted(Units((2, 3))))
    draws = fit.sample(4000, seed=0)
    assert draws.shape == (4000, 2, 3)
    torch.testing.assert_close(draws.mean((0, 1, 2)), torch.tensor(3.0), atol=5 * 2 / 24_000**0.5, rtol=0)
    assert float(draws.std()) == pytest.approx(2.0, rel=0.03)
    assert torch.equal(draws, fit.sample(4000, seed=0))
    assert fit.sample().shape == (1, 2, 3)
    assert not draws.requires_grad


def test_whole_numbers_are_cut_off_at_the_levels():
    units = Units((2,), num_levels=4)
    draws = fit_of(units, shifted(units, loc=2.0, scale=1.5)).sample(20_000, seed=0)
    assert draws.dtype == torch.int64
    law = dist.Normal(2.0, 1.5)
    below = [float(law.cdf(torch.tensor(float(end)))) for end in (1, 2, 3)]
    expected = np.diff([0.0, *below, 1.0])
    found = [float((draws == level).float().mean()) for level in range(4)]
    assert found == pytest.approx(expected, abs=4 * 0.5 / 40_000**0.5)


def test_scores_are_means_over_rows_for_each_number_in_bits():
    fit = fit_of(Units((3,)), shifted(Units((3,))))
    x = torch.randn(50, 3)
    nats = dist.Normal(3.0, 2.0).log_prob(x).sum(-1)
    torch.testing.assert_close(fit.log_prob(x), nats)
    bits = -nats / (3 * math.log(2))
    found = fit.bits_per_dim(x)
    assert found.value == pytest.approx(float(bits.mean()), rel=1e-5)
    assert found.se == pytest.approx(float(bits.std()) / 50**0.5, rel=1e-5)
    assert math.isnan(fit.bits_per_dim(x[:1]).se)


def test_the_noise_of_whole_numbers_follows_the_seed():
    units = Units((1,), num_levels=4)
    fit = fit_of(units, shifted(units))
    x = torch.tensor([[0], [3], [1]])
    one, same, other = (fit.bits_per_dim(x, seed=seed) for seed in (0, 0, 1))
    assert one == same != other


def test_a_base_that_is_fixed_is_no_parameter():
    base = FixedBase(dist.StudentT(4.0, torch.zeros(2), 1.0).to_event(1))
    assert list(base.parameters()) == []
    density = Density(base, T.Affine(2))
    assert density.distribution().base_dist is base.distribution


def test_a_file_of_something_else_is_refused(tmp_path):
    units = Units((2,))
    fit_of(units, shifted(units), recipe="nice").save(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"DensityFit.load: the file is of another flow: "):
        DensityFit.load(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="of another flow"):
        DensityFit.load(tmp_path / "a.npz", flow="planar")
    saving.write(tmp_path / "other.npz", {"draws": [1]})
    with pytest.raises(ValueError, match=r"DensityFit.load: '.*other.npz' is no saved density: 'units'"):
        DensityFit.load(tmp_path / "other.npz")
    again = DensityFit.load(tmp_path / "a.npz", flow=T.Affine(2))
    assert (again.recipe, again.best_step, again.num_steps) == ("nice", 3, 5)
    assert (again.num_skipped, again.num_rolled_back, again.wall_time) == (1, 2, 1.25)
    assert torch.equal(again.log_prob(torch.ones(1, 2)), shifted(units).log_prob(torch.ones(1, 2)))
