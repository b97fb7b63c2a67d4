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
