"""Densities of data by maximum likelihood: what they are, in the data's own units, and what goes wrong."""

import math
import pathlib

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal

import pyro_flowguides as fg
from pyro_flowguides import flows
from pyro_flowguides import transforms as T
from pyro_flowguides.training import DensityFit

QUICK = {"progress": False, "seed": 0, "backend": "replay"}


def small(dim, context_dim=0):
    """A flow with few parameters, whose density takes one pass."""
    return flows.coupling(dim, num_layers=2, hidden_dims=(8,), context_dim=context_dim)


def affine(dim):
    return T.LowerTriangularAffine(dim)


def eager(flow, data, **options):
    """A fit too short to be worth a captured step."""
    return fg.fit_density(flow, data, **{**QUICK, "backend": "eager", "num_steps": 5, **options})


def normal_rows(num_rows=400, dim=2, seed=0, dtype=None):
    return torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- what is fitted ---------------------------------------------------------------------------------------------------


def test_a_normal_law_is_recovered():
    """The maximum of the likelihood of a normal law is known: mean and covariance of the rows."""
    tril = torch.tensor([[2.0, 0.0], [1.5, 0.5]])
    x = torch.tensor([100.0, -3.0]) + normal_rows(1000) @ tril.mT
    fit = fg.fit_density(
        affine, x, validation=None, whiten="diagonal", num_steps=500, batch_size=1000, optim=adam(0.1), **QUICK
    )
    law = MultivariateNormal(x.mean(0), torch.cov(x.mT, correction=0))
    torch.testing.assert_close(fit.log_prob(x[:50]), law.log_prob(x[:50]), atol=0.02, rtol=0)
    assert fit.num_steps == fit.best_step == 500
    assert len(fit.validation_losses) == 0


def adam(rate):
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


def test_whitening_alone_is_the_normal_law_of_the_rows():
    x = torch.tensor([1e4, -3.0]) + normal_rows(1000, dtype=torch.float64) * torch.tensor([300.0, 1e-3]).double()
    fit = eager(small, x, num_steps=1, validation=None, optim=adam(0.0))
    law = MultivariateNormal(x.mean(0), torch.cov(x.mT))
    torch.testing.assert_close(fit.log_prob(x), law.log_prob(x), atol=1e-3, rtol=0)
    assert fit.log_prob(x).dtype == fit.sample(2).dtype == torch.float64


@pytest.mark.parametrize("num_levels", [None, 3], ids=["continuous", "integers"])
def test_the_density_of_a_column_is_one_law_on_its_own_axis(num_levels):
    """Its integral over the line, in the units of the data, is 1; for integers with noise likewise."""
    x = 50 + 4 * normal_rows(200, 1).squeeze(-1).exp() if num_levels is None else torch.randint(0, 3, (200,))
    fit = eager("spline_coupling", x, num_steps=20, num_levels=num_levels)
    grid = torch.linspace(-200.0, 300.0, 200_001)
    density = fit.distribution.log_prob(grid.unsqueeze(-1)).exp().detach()
    assert float(torch.trapezoid(density, grid)) == pytest.approx(1.0, abs=1e-3)


def test_a_density_in_the_plane_integrates_to_one():
    x = normal_rows(300) @ torch.tensor([[2.0, 1.0], [0.0, 0.5]])
    fit = eager("spline_coupling", x, num_steps=20)
    line = torch.linspace(-20.0, 20.0, 401)
    grid = torch.cartesian_prod(line, line)
    density = fit.log_prob(grid).exp().detach().reshape(401, 401)
    assert float(torch.trapezoid(torch.trapezoid(density, line), line)) == pytest.approx(1.0, abs=5e-3)


def test_bits_per_dimension_are_those_of_the_levels():
    """By hand: noise, division by the number of levels, logit, standardisation, each with its log-determinant."""
    x = torch.randint(0, 17, (300, 2, 3), generator=torch.Generator().manual_seed(0))
    alpha = 0.05
    fit = eager(lambda dim: T.Affine(dim), x, num_levels=17, logit=alpha, whiten="diagonal", num_steps=20)
    bits = fit.bits_per_dim(x, seed=1)
    torch.manual_seed(1)
    unit = (x.reshape(300, 6) + torch.rand(300, 6)) / 17
    squeezed = alpha + (1 - 2 * alpha) * unit
    y = squeezed.logit()
    log_det = (math.log(1 - 2 * alpha) - squeezed.log() - (1 - squeezed).log()).sum(-1) - 6 * math.log(17)
    affine, white = fit.density.transform.transforms[:2]
    law = dist.Normal(*_loc_and_scale(affine, white)).to_event(1)
    by_hand = -(law.log_prob(y) + log_det) / (6 * math.log(2))
    assert bits.value == pytest.approx(float(by_hand.mean()), abs=1e-4)
    assert bits.se == pytest.approx(float(by_hand.std()) / 300**0.5, rel=1e-3)
    draws = fit.sample(7, seed=0)
    assert draws.shape == (7, 2, 3)
    assert draws.dtype == torch.int64
    assert set(draws.unique().tolist()) <= set(range(17))


def _loc_and_scale(*transforms):
    zero, one = torch.zeros(6), torch.ones(6)
    with torch.no_grad():
        for transform in transforms:
            zero, one = transform(zero), transform(one)
    return zero, one - zero


def test_uniform_integers_cost_the_logarithm_of_their_number():
    x = torch.randint(0, 16, (4000,), generator=torch.Generator().manual_seed(0))
    fit = eager(lambda dim: T.ElementwiseSpline(dim), x, num_levels=16, num_steps=80, batch_size=1000, optim=adam(0.05))
    assert fit.bits_per_dim(x, seed=0).value == pytest.approx(4.0, abs=0.15)


def test_a_density_is_conditional_on_its_context():
    """x = 100 c + noise: location and spread for each context, in its own units."""
    year = 2000 + 10 * torch.rand(2000, generator=torch.Generator().manual_seed(1))
    x = 100 * (year - 2005) + 20 * normal_rows(2000, 1).squeeze(-1)
    fit = eager(small, x, context=year, num_steps=250, optim=adam(2e-2))
    draws = fit.sample(2000, context=torch.tensor([2002.0, 2008.0]), seed=0)
    assert draws.shape == (2000, 2)
    torch.testing.assert_close(draws.mean(0), torch.tensor([-300.0, 300.0]), atol=10.0, rtol=0)
    torch.testing.assert_close(draws.std(0), torch.tensor([20.0, 20.0]), atol=4.0, rtol=0)
    law = dist.Normal(100 * (year[:500] - 2005), 20.0)
    assert float(fit.log_prob(x[:500], year[:500]).detach().mean()) == pytest.approx(
        float(law.log_prob(x[:500]).mean()), abs=0.1
    )
    assert fit.sample(3, context=2002.0).shape == (3,)


@pytest.mark.parametrize("name", ["planar", "radial", "sylvester", "residual", "iaf", "maf"])
@pytest.mark.parametrize("inverted", [False, True], ids=["recipe", "inverted"])
def test_flows_with_a_numerical_inverse_learn_in_both_directions(name, inverted):
    x = normal_rows(200, seed=2)
    x = torch.stack([x[:, 0], x[:, 1] + x[:, 0].square()], -1)

    def flow(dim):
        made = flows.RECIPES[name](dim, num_layers=2)
        return made.inv if inverted else made

    fit = eager(flow, x, num_steps=12, validation=None, batch_size=200)
    assert fit.num_skipped == 0
    assert np.mean(fit.train_losses[-3:]) < np.mean(fit.train_losses[:3]) - 0.003


def test_the_gradient_goes_through_a_numerical_inverse():
    """By the implicit function theorem: it is that of the likelihood, by central differences."""
    x = normal_rows(5, dtype=torch.float64)
    flow = flows.planar(2, num_layers=2).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3)
    parameter = next(flow.parameters())

    def loss():
        z, log_det = flow.inverse_and_log_det(x)
        return -(dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + log_det).mean()

    (gradient,) = torch.autograd.grad(loss(), [parameter])
    for index in range(parameter.numel()):
        values = []
        for move in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.view(-1)[index] += move
                values.append(float(loss()))
                parameter.view(-1)[index] -= move
        assert float(gradient.view(-1)[index]) == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["array", "frame", "float64", "flow", "distribution"])
def test_data_and_flows_come_as_people_have_them(kind):
    x = normal_rows(60)
    flow = T.Affine(2)
    before = [parameter.clone() for parameter in flow.parameters()]
    given = {
        "array": (small, x.numpy()),
        "frame": (small, pd.DataFrame(x.numpy(), columns=["a", "b"])),
        "float64": (small, x.double()),
        "flow": (flow, x),
        "distribution": (fg.NormalizingFlow(dist.StudentT(4.0, torch.zeros(2), 1.0).to_event(1), flow), x),
    }[kind]
    fit = eager(*given)
    assert fit.log_prob(given[1]).dtype == (torch.float64 if kind == "float64" else torch.float32)
    assert all(torch.equal(*pair) for pair in zip(before, flow.parameters(), strict=True))
    if kind == "distribution":
        assert isinstance(fit.distribution.base_dist.base_dist, dist.StudentT)


# --- how it ends ------------------------------------------------------------------------------------------------------


def test_the_parameters_are_those_of_the_best_look():
    """Twenty rows are learnt by heart, and held-out rows become less likely."""
    x, others = normal_rows(20), normal_rows(500, seed=1)
    fit = eager("spline_coupling", x, validation=others, patience=2, num_steps=2000, optim=adam(2e-2))
    assert fit.stopped_early
    assert fit.num_steps < 2000
    looks = fit.validation_losses
    assert fit.best_step == fit.validation_steps[looks.argmin()] < fit.num_steps
    assert len(looks) - 1 - looks.argmin() == 2
    assert float(-fit.log_prob(others).detach().mean()) == pytest.approx(looks.min(), abs=1e-5)
    assert "stopped early" in repr(fit)


def test_the_same_seed_gives_the_same_numbers():
    one, same, other = (eager(small, normal_rows(), seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(one.train_losses, same.train_losses)
    assert not np.array_equal(one.train_losses, other.train_losses)


@pytest.mark.parametrize("num_levels", [None, 4])
@pytest.mark.parametrize("seed", [None, 0])
def test_a_resumed_fit_is_the_same_bit_for_bit(tmp_path, num_levels, seed):
    x = normal_rows(120) if num_levels is None else torch.randint(0, 4, (120, 2))
    torch.manual_seed(5)
    options = {"num_levels": num_levels, "num_steps": 130, "seed": seed, "batch_size": 50}
    checkpoint = fg.Checkpoint(tmp_path / "whole", every=60)
    whole = eager(small, x, checkpoint=checkpoint, **options)
    torch.manual_seed(5)

    def stop(step, loss):
        if step == 70:
            raise SystemExit

    path = tmp_path / "fit"
    with pytest.raises(SystemExit):
        eager(small, x, checkpoint=fg.Checkpoint(path, every=60), callbacks=[stop], **options)
    torch.manual_seed(99)
    resumed = eager(small, x, checkpoint=fg.Checkpoint(path, every=60, resume=True), **options)
    assert np.array_equal(whole.train_losses, resumed.train_losses)
    assert np.array_equal(whole.validation_losses, resumed.validation_losses)
    assert all(
        torch.equal(*pair) for pair in zip(whole.density.parameters(), resumed.density.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match="another fit: batch_size was 50, and is 40"):
        eager(small, x, checkpoint=fg.Checkpoint(path, resume=True), **{**options, "batch_size": 40})
    with pytest.raises(ValueError, match="another fit: data was"):
        eager(
            small,
            x + 1 if num_levels is None else x * 0 + 1 - x % 2,
            checkpoint=fg.Checkpoint(path, resume=True),
            **options,
        )


@pytest.mark.parametrize("kind", [str, pathlib.Path, fg.Checkpoint])
def test_a_checkpoint_may_be_a_path(kind, tmp_path):
    path = tmp_path / "fit"
    eager(small, X, checkpoint=kind(path), num_steps=1)
    assert [file.name for file in tmp_path.iterdir()] == ["fit"]
    with pytest.raises(FileExistsError, match="fit' exists"):
        eager(small, X, checkpoint=kind(path), num_steps=1)


def test_a_rate_that_explodes_is_guarded():
    x = normal_rows(300)
    options = {"schedule": lambda progress: 1.0 if progress < 0.5 else 3e3, "patience": None}
    fit = eager("coupling", x, num_steps=200, **options)
    assert fit.num_rolled_back > 0
    assert float(-fit.log_prob(x).detach().mean()) < 3.2


def test_a_fit_is_saved_and_read_without_a_pickle(tmp_path):
    x, c = normal_rows(80), normal_rows(80, 1)
    fit = eager("maf", x, context=c)
    fit.save(tmp_path / "maf.npz")
    again = DensityFit.load(tmp_path / "maf.npz")
    torch.testing.assert_close(again.log_prob(x, c), fit.log_prob(x, c), rtol=0, atol=0)
    assert repr(again) == repr(fit)
    own = eager(small, x)
    own.save(tmp_path / "own.npz")
    with pytest.raises(ValueError, match="give it with flow="):
        DensityFit.load(tmp_path / "own.npz")
    with pytest.raises(ValueError, match="of another flow"):
        DensityFit.load(tmp_path / "own.npz", flow="maf")
    torch.testing.assert_close(DensityFit.load(tmp_path / "own.npz", flow=small).log_prob(x), own.log_prob(x))
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"DensityFit\.load: .* is damaged"):
        DensityFit.load(tmp_path / "bad.npz")


# --- what goes wrong --------------------------------------------------------------------------------------------------

X = normal_rows(30)
WRONG = {
    "NaN": (
        small,
        torch.where(torch.arange(60).reshape(30, 2) == 7, torch.nan, X),
        {},
        "data holds 1 NaN .* row 3, column 1",
    ),
    "integers": (small, torch.randint(0, 4, (30, 2)), {}, "data holds integers .* give num_levels=K"),
    "levels": (small, torch.full((30, 2), 5), {"num_levels": 4}, "whole numbers from 0 to 3, got 5"),
    "constant": (small, torch.stack([X[:, 0], torch.full((30,), 0.1)], -1), {}, r"column 1 is constant \(1 of 2 are\)"),
    "collinear": (
        small,
        torch.stack([X[:, 0], 2 * X[:, 0]], -1),
        {},
        "column 1 is a linear function of those before it",
    ),
    "rows": (small, X[:1], {}, "give at least two rows"),
    "too few": (small, X[:4], {}, "4 rows are too few to hold 0.1 of them out"),
    "number": (small, 3.0, {}, "data must be an array"),
    "recipe": ("copling", X, {}, "unknown flow 'copling'"),
    "size": (T.Affine(3), X, {}, "the flow has dim = 3 and context_dim = 0; the data need dim = 2"),
    "no context": (lambda dim, context_dim: T.Affine(dim), X, {"context": X}, "takes no context"),
    "context": (small, X, {"context": X[:20]}, r"the context must have shape \(30, 2\)"),
    "validation": (small, X, {"validation": 1.5}, "validation must be a fraction between 0 and 1"),
    "validation is true": (small, X, {"validation": True}, "validation must be a fraction, .* got True"),
    "validation is whole": (small, X, {"validation": 5}, "validation must be a fraction, .* got 5"),
    "validation is text": (small, X, {"validation": "a"}, "validation must be a fraction, .* got 'a'"),
    "validation rows": (small, X, {"validation": torch.zeros(5, 3)}, r"validation must have shape \(rows, \*\(2,\)\)"),
    "length": (small, X, {"num_epochs": 3}, "num_steps or num_epochs, not both"),
    "whiten": (small, X, {"whiten": "full"}, 'whiten must be "auto", "diagonal" or None'),
    "one level": (small, torch.zeros(30, 2), {"num_levels": 1}, "num_levels must be at least 2, got 1"),
    "half": (small, torch.zeros(30, 2), {"num_levels": 2, "logit": 0.5}, "logit must be between 0 and 0.5, .* got 0.5"),
    "nothing cut": (small, torch.zeros(30, 2), {"num_levels": 2, "logit": 0.0}, "logit must be .* got 0.0"),
    "no columns": (small, torch.zeros(30, 0), {}, r"data of shape \(30, 0\) have nothing to fit"),
    "no rows": (small, torch.tensor(1.0), {}, "data must be an array, .* with rows"),
    "validation context": (
        small,
        X,
        {"context": X, "validation": X},
        "validation needs a context, one for each row",
    ),
    "logit": (small, X, {"logit": 0.05}, "logit is for integers"),
}


@pytest.mark.parametrize(("flow", "data", "options", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_fitted_is_an_error_that_says_why(flow, data, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        eager(flow, data, **options)


def test_few_rows_of_many_columns_are_standardised_with_a_warning():
    with pytest.warns(UserWarning, match="27 points are too few for the correlations of 20 coordinates"):
        eager(small, normal_rows(30, 20))


def test_contexts_of_another_shape_are_refused():
    fit = eager(small, X, context=torch.stack([X[:, 0], X[:, 1]], -1), num_steps=1)
    assert fit.sample(3, context=[0.5, 1.0]).shape == (3, 2)
    assert fit.sample(3, context=torch.zeros(4, 5, 2)).shape == (3, 4, 5, 2)
    for context in (0.5, torch.zeros(3)):
        with pytest.raises(ValueError, match=r"DensityFit: a context must end in shape \(2,\), got \((3,)?\)"):
            fit.sample(3, context=context)
    with pytest.raises(ValueError, match="DensityFit: give context="):
        fit.sample(3)


def test_held_out_rows_of_ones_own_have_the_dtype_and_the_context_of_the_others():
    x, c = X.double(), X[:, :1]
    fit = eager(small, x, context=c, validation=(X[:7], c[:7]), num_steps=1)
    assert fit.validation_losses.tolist() == pytest.approx(
        [fit.validation_losses[0], -float(fit.log_prob(x[:7], c[:7]).detach().mean())]
    )
    bare = eager(small, x, validation=[[0.1, 0.2], [0.3, 0.4], [1.0, 2.0]], num_steps=1)
    rows = torch.tensor([[0.1, 0.2], [0.3, 0.4], [1.0, 2.0]])
    assert bare.validation_losses[-1] == pytest.approx(-float(bare.log_prob(rows).detach().mean()))


def test_rows_of_another_shape_are_refused():
    fit = eager(small, X)
    with pytest.raises(ValueError, match=r"x must have shape \(rows, \*\(2,\)\)"):
        fit.log_prob(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="x takes no context"):
        fit.log_prob(X, X)
    with pytest.raises(ValueError, match="there is no context in this density"):
        fit.sample(3, context=X)
