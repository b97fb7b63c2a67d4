"""The kind of Gaussian that is found above 200 dimensions, and what becomes of a guide that gets it."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flowguides as fg
from pyro_flowguides.guides.gaussians import gaussian_elbo
from pyro_flowguides.guides.many_dimensions import best_gaussian_in_many_dimensions

DIM = 210
UNITS = torch.logspace(-1, 1, DIM, dtype=torch.float64)


def factor(kind):
    """The lower triangular factor of a correlation matrix, times the units."""
    basis = torch.linalg.qr(torch.randn(DIM, 2, dtype=torch.float64)).Q
    index = torch.arange(DIM, dtype=torch.float64)
    correlations = {
        "diagonal": torch.eye(DIM, dtype=torch.float64),
        "directions": torch.eye(DIM, dtype=torch.float64)
        + basis @ (torch.tensor([50.0, 400.0]).double().diag() @ basis.mT),
        # An autoregressive process: no direction stands out.
        "full": 0.8 ** (index - index.unsqueeze(-1)).abs(),
    }
    return UNITS.unsqueeze(-1) * torch.linalg.cholesky(correlations[kind])


@pytest.mark.parametrize("kind", ["diagonal", "directions", "full"])
def test_the_cheapest_kind_that_fits(kind):
    loc, scale_tril = torch.linspace(-3, 3, DIM, dtype=torch.float64), factor(kind)
    log_density = dist.MultivariateNormal(loc, scale_tril=scale_tril).log_prob
    start = torch.zeros_like(loc), torch.full_like(loc, 0.1)
    found_loc, scale = best_gaussian_in_many_dimensions(log_density, *start)
    if kind == "directions":
        assert isinstance(scale, fg.transforms.LowRank)
        assert len(scale.stretches) < 20
    else:
        assert scale.shape == ((DIM,) if kind == "diagonal" else (DIM, DIM))
    assert gaussian_elbo(log_density, found_loc, scale) == pytest.approx(0.0, abs=0.3)


SCALES = {
    "diagonal": lambda: UNITS,
    "directions": lambda: fg.transforms.LowRank(
        UNITS, torch.linalg.qr(torch.randn(DIM, 2, dtype=torch.float64)).Q, torch.tensor([3.0, 0.2]).double()
    ),
    "full": lambda: factor("full"),
}


def model():
    pyro.sample("x", dist.Normal(torch.zeros(DIM, dtype=torch.float64), 1.0).to_event(1))


def make_guide():
    return fg.AutoFlow(model, flow=lambda dim: fg.transforms.Affine(dim), affine=None).setup()


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("other", SCALES)
def test_a_guide_takes_a_scale_of_any_kind_from_a_copy_a_file_and_the_store(kind, other):
    guide = make_guide()
    guide.put_map(torch.zeros(DIM).double(), SCALES[other]())
    guide.put_map(torch.arange(DIM).double(), SCALES[kind]())
    x = torch.randn(3, DIM, dtype=torch.float64)
    expected = guide.log_prob(x)
    second = make_guide()
    torch.testing.assert_close(second.log_prob(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(guide).log_prob(x), expected, rtol=0, atol=0)
    pyro.clear_param_store()
    third = make_guide()
    third.put_map(torch.zeros(DIM).double(), SCALES[other]())
    third.load_state_dict(guide.state_dict())
    torch.testing.assert_close(third.log_prob(x), expected, rtol=0, atol=0)
    assert type(third.fixed_map.whole_scale) is type(guide.fixed_map.whole_scale)


def test_a_captured_step_sees_another_kind_of_scale():
    def make_svi():
        return fg.CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.0}), pyro.infer.Trace_ELBO())

    guide = make_guide()
    svi = make_svi()
    svi.step()
    guide.put_map(torch.zeros(DIM).double(), SCALES["directions"]())
    losses = []
    for each in (svi, make_svi()):
        pyro.set_rng_seed(0)
        losses.append(each.step())
    assert losses[0] == losses[1]


def wide(dim):
    def model():
        pyro.sample("x", dist.Normal(torch.full((dim,), 2.0, dtype=torch.float64), 3.0).to_event(1))

    return model


@pytest.mark.parametrize(
    ("dim", "affine", "has_splines", "num_couplings"),
    [
        (200, "LowerTriangularAffine", False, 16),
        (201, "LowerTriangularAffine", True, 16),
        (1000, "LowerTriangularAffine", True, 16),
        (1001, "LowRankAffine", True, 4),
    ],
)
def test_the_default_flow_of_many_dimensions(dim, affine, has_splines, num_couplings):
    guide = fg.AutoFlow(wide(dim)).setup()
    body, *maps = guide.flow.transforms
    assert [type(each).__name__.removeprefix("Pyro") for each in maps] == [
        affine,
        "FixedAffine",
        *["Standardized"] * has_splines,
    ]
    assert sum(isinstance(each, fg.transforms.AffineCoupling) for each in body.transforms) == num_couplings


def test_the_parameters_of_the_default_flow_grow_with_the_number_of_latents():
    sizes = []
    for dim in (1500, 3000):
        pyro.clear_param_store()
        sizes.append(sum(parameter.numel() for parameter in fg.AutoFlow(wide(dim)).setup().parameters()))
    assert sizes[1] < 2.01 * sizes[0]


def test_splines_have_the_units_of_the_fixed_map():
    guide = fg.AutoFlow(wide(201)).setup()
    scale = 3 * torch.linalg.cholesky(0.5 * torch.eye(201).double() + 0.5)
    guide.put_map(torch.full((201,), 2.0).double(), scale)
    splines = guide.flow.transforms[-1]
    torch.testing.assert_close(splines.loc, torch.full_like(splines.loc, 2.0), rtol=0, atol=0)
    torch.testing.assert_close(splines.scale, torch.full_like(splines.loc, 3.0), rtol=1e-12, atol=0)
    # They start as the identity.
    x = torch.randn(5, 201, dtype=torch.float64)
    expected = dist.MultivariateNormal(torch.full((201,), 2.0).double(), scale_tril=scale).log_prob(x)
    torch.testing.assert_close(guide.log_prob(x), expected, rtol=1e-6, atol=1e-4)
