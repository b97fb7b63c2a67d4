"""Rows of data and the fixed maps around a flow: shapes, levels, whitening, contexts, and what has no density."""

import math

import pyro.distributions as dist
import pytest
import torch

import pyro_flowguides as fg
from pyro_flowguides import flows
from pyro_flowguides import transforms as T
from pyro_flowguides.training.density import (
    StandardContext,
    Units,
    context_scale_of,
    flow_and_base,
    gaussian_of,
    location_and_scale,
    with_fixed_maps,
)
from pyro_flowguides.training.likelihood import Rows

IMAGES = Units((2, 3), (4,), num_levels=5)


def test_rows_are_flat_in_the_dtype_of_what_they_are_like():
    x, context = torch.arange(12).reshape(2, 2, 3) % 5, torch.arange(8).reshape(2, 4)
    rows = IMAGES.rows("fit", x, context)
    assert (IMAGES.dim, IMAGES.context_dim) == (6, 4)
    assert (rows.x.dtype, rows.context.dtype, rows.noisy) == (torch.float32, torch.float32, True)
    assert torch.equal(rows.x, x.reshape(2, 6).float())
    assert torch.equal(rows.context, context.float())
    like = torch.zeros(1, dtype=torch.float64)
    assert {each.dtype for each in IMAGES.rows("fit", x, context, like=like).arguments} == {torch.float64}
    plain = Units(())
    assert (plain.dim, plain.context_dim) == (1, 0)
    rows = plain.rows("fit", torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert (rows.x.shape, rows.x.dtype, rows.context, rows.noisy) == ((2, 1), torch.float64, None, False)


NAN = torch.tensor([[1.0, 2.0], [3.0, torch.nan], [torch.inf, 0.0]])


@pytest.mark.parametrize(
    ("units", "x", "context", "message"),
    [
        (Units(()), torch.tensor(1.0), None, r"fit: data must have shape \(rows, \*\(\)\), as the data have, got \(\)"),
        (Units((2,)), torch.zeros(3), None, r"data must have shape \(rows, \*\(2,\)\).* got \(3,\)"),
        (Units((2,)), torch.zeros(3, 2), torch.zeros(3), "data takes no context, and one was given"),
        (Units((2,), ()), torch.zeros(3, 2), None, "data needs a context, one for each row"),
        (
            Units((2,), ()),
            torch.zeros(3, 2),
            torch.zeros(4),
            r"must have shape \(3,\), one for each row of data, got \(4,\)",
        ),
        (Units((2,), (1,)), torch.zeros(3, 2), torch.zeros(3), r"must have shape \(3, 1\)"),
        (Units((2,)), NAN, None, "data holds 2 NaN or infinite numbers among its 6, the first in row 1, column 1"),
        (Units((), (2,)), torch.zeros(3), NAN, "context holds 2 NaN or infinite numbers among its 6"),
        (Units((), num_levels=4), torch.tensor([0.0, 1.0, 2.5]), None, "whole numbers from 0 to 3, got 2.5"),
        (Units((), num_levels=4), torch.tensor([0.0, 1.0, 4.0]), None, "got 4"),
        (Units((), num_levels=4), torch.tensor([0, -1, 3]), None, "got -1"),
        (Units((), num_levels=4), torch.tensor([0, 3, 4]), None, "with num_levels=4 data .* got 4"),
        (Units(()), torch.tensor([0, 3]), None, r"data holds integers \(torch.int64\)"),
    ],
)
def test_rows_that_are_none(units, x, context, message):
    with pytest.raises(ValueError, match=message):
        units.rows("fit", x, context)


def test_levels_at_both_ends_are_levels():
    for dtype in (torch.float32, torch.int64):
        Units((), num_levels=4).rows("fit", torch.tensor([0, 1, 2, 3], dtype=dtype))


@pytest.mark.parametrize("name", ["x", "context"])
def test_what_is_no_tensor(name):
    x, context = (3.0, None) if name == "x" else (torch.zeros(2), "c")
    with pytest.raises(TypeError, match=rf"fit: {'data' if name == 'x' else 'context'} must be an array, .* got"):
        Units((), None if name == "x" else ()).rows("fit", x, context)


# --- whitening --------------------------------------------------------------------------------------------------------


def correlated(num_rows, dtype=torch.float32):
    tril = torch.tensor([[2.0, 0.0, 0.0], [1.5, 0.5, 0.0], [-3.0, 1.0, 1e-2]])
    noise = torch.randn(num_rows, 3, generator=torch.Generator().manual_seed(0))
    return (torch.tensor([100.0, -3.0, 1e-3]) + noise @ tril.mT).to(dtype)


def test_location_and_scale_are_those_of_the_rows():
    x = correlated(50, torch.float64)
    loc, scale = location_and_scale("fit", x, full=True)
    torch.testing.assert_close(loc, x.mean(0))
    torch.testing.assert_close(scale @ scale.mT, torch.cov(x.mT))
    assert torch.equal(scale, scale.tril())
    loc, scale = location_and_scale("fit", x, full=False)
    torch.testing.assert_close(loc, x.mean(0))
    torch.testing.assert_close(scale, x.std(0))
    assert location_and_scale("fit", x.float(), full=True)[0].dtype == torch.float64


def test_correlations_need_twice_as_many_rows_as_columns():
    assert location_and_scale("fit", correlated(6), full=True)[1].shape == (3, 3)
    with pytest.warns(UserWarning, match="fit: 5 points are too few for the correlations of 3 coordinates"):
        assert location_and_scale("fit", correlated(5), full=True)[1].shape == (3,)
    for dim, shape in ((200, (200, 200)), (201, (201,))):
        assert location_and_scale("fit", torch.randn(402, dim), full=True)[1].shape == shape


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_a_constant_is_one_up_to_rounding(size):
    x = size * torch.ones(10, 3)
    x[:, 0] = torch.arange(10.0)
    x[0, 1] *= 1 + 1e-5
    with pytest.raises(ValueError, match=r"fit: column 2 is constant \(1 of 3 are\)"):
        location_and_scale("fit", x, full=False)
    x[0, 2] *= 1 + 2e-7
    with pytest.raises(ValueError, match="coordinate 2 is constant"):
        location_and_scale("fit", x, full=False, what="coordinate")
    x[0, 2] *= 1 + 1e-5
    location_and_scale("fit", x, full=False)


@pytest.mark.parametrize(("size", "is_error"), [(3e-5, False), (3e-6, True), (0.0, True)])
def test_a_column_that_others_determine_is_named(size, is_error):
    x = torch.randn(100, 4, dtype=torch.float64)
    x[:, 2] = x[:, 0] - x[:, 1] + size * torch.randn(100)
    if is_error:
        with pytest.raises(ValueError, match="fit: column 2 is a linear function of those before it"):
            location_and_scale("fit", x, full=True)
    else:
        location_and_scale("fit", x, full=True)


def test_whitening_is_in_the_space_of_the_logit():
    units = Units((2,), num_levels=10, logit=0.1)
    x = 10 * torch.rand(50, 2)
    y = (0.1 + 0.8 * x / 10).logit()
    loc, scale = gaussian_of("fit", Rows(x), units, "diagonal")
    torch.testing.assert_close(loc, y.mean(0))
    torch.testing.assert_close(scale, y.std(0))
    loc, scale = gaussian_of("fit", Rows(x), units, "auto")
    torch.testing.assert_close(scale @ scale.mT, torch.cov(y.mT))
    assert loc.dtype == scale.dtype == torch.float32
    assert [each.tolist() for each in gaussian_of("fit", Rows(x), units, None)] == [[0, 0], [1, 1]]
    # Back from the logit, in the range of the levels, as far beyond it at one end as at the other.
    flow = with_fixed_maps(T.Affine(2), units, (torch.zeros(2), torch.ones(2)), None)
    with torch.no_grad():
        ends = flow(torch.tensor([[-50.0, 50.0]]))
    torch.testing.assert_close(ends, torch.tensor([[-1.25, 11.25]]))


# --- flows and contexts -----------------------------------------------------------------------------------------------


def test_a_context_is_standardised_in_every_direction():
    flow = flows.coupling(2, num_layers=2, hidden_dims=(4,), context_dim=3)
    loc, scale = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 2.0, 1.0])
    standard = StandardContext(flow, loc, scale)
    z, score, context = torch.randn(5, 2), torch.randn(5, 2), torch.randn(5, 3)
    inner = (context - loc) / scale
    with torch.no_grad():
        x, log_det = flow.forward_and_log_det(z, inner)
        for ours, theirs in (
            (standard.forward_and_log_det(z, context), (x, log_det)),
            (standard.inverse_and_log_det(x, context), flow.inverse_and_log_det(x, inner)),
            (standard.forward_with_score(z, score, context), flow.forward_with_score(z, score, inner)),
        ):
            torch.testing.assert_close(ours, theirs)
    assert standard.stochastic_log_det is False
    roulette = flows.residual(2, num_layers=1, log_det="roulette")
    assert StandardContext(roulette, loc, scale).stochastic_log_det is True


def test_a_context_that_does_not_vary_keeps_its_size():
    context = torch.stack([torch.full((4,), 7.0), torch.arange(4.0)], -1)
    loc, scale = context_scale_of(context)
    assert loc.tolist() == [7.0, 1.5]
    assert scale.tolist() == pytest.approx([1.0, math.sqrt(5 / 3)])


def test_a_flow_of_other_sizes_or_without_its_context_is_refused():
    units = Units((2,), (3,))
    with pytest.raises(ValueError, match="dim = 2 and context_dim = 0; the data need dim = 2 and context_dim = 3"):
        flow_and_base("fit", T.Affine(2), units)
    with pytest.raises(TypeError, match="fit: flow must be the name of a recipe, .* got 3"):
        flow_and_base("fit", 3, units)
    law = fg.NormalizingFlow(dist.StudentT(4.0, torch.zeros(2), 1.0).to_event(1), T.Affine(2))
    flow, base = flow_and_base("fit", law, Units((2,)))
    assert flow is law.transform
    assert base() is law.base_dist
    flow, base = flow_and_base("fit", "coupling", units)
    assert (flow.dim, flow.context_dim, base().event_shape) == (2, 3, (2,))
