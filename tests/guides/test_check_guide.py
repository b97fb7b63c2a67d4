"""The public contract suite accepts guides that keep the contract, and names what others break."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import Y
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_value
from torch import nn

import pyro_flowguides as fg
from pyro_flowguides.guides.delta import LatentDelta
from pyro_flowguides.testing import check_guide
from pyro_flowguides.testing.guides import (
    check_copies,
    check_densities,
    check_elbos,
    check_estimates,
    check_gradients,
    check_parameters,
    check_particles,
    check_predictive,
    check_sites,
    moved_parameters,
)

planar = functools.partial(fg.flows.planar, num_layers=1)


def positive():
    pyro.sample("x", dist.LogNormal(torch.zeros(()), 1.0))


def in_plates(y, batch_size=2):
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), 0.5))
    with pyro.plate("rows", len(y), subsample_size=batch_size) as index:
        local = pyro.sample("local", dist.Normal(torch.zeros(()), scale))
        pyro.sample("y", dist.Normal(local, 0.5), obs=y[index])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 3)

    def forward(self, y):
        return self.linear(y.unsqueeze(-1))


def local(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)


def test_guides_that_keep_it():
    y = torch.tensor(Y)
    check_guide(fg.AmortizedFlow(local, Encoder(), planar_of), local, y)
    check_guide(fg.AutoFlow(in_plates, planar), in_plates, y)


def planar_of(dim, context_dim):
    return fg.flows.planar(dim, num_layers=1, context_dim=context_dim)


def test_it_leaves_the_guide_as_it_was():
    guide = fg.AutoFlow(positive, planar).setup()
    state = {name: value.clone() for name, value in guide.state_dict().items()}
    pyro.set_rng_seed(5)
    expected = torch.rand(3)
    pyro.set_rng_seed(5)
    check_guide(guide, positive)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert all(torch.equal(value, state[name]) for name, value in guide.state_dict().items())
    assert not guide.is_trained()


def test_it_finds_what_pyros_own_guides_lose():
    """The Jacobian under TraceMeanField_ELBO, and the model of a guide that was copied."""

    def model():
        pyro.sample("x", dist.LogNormal(1.0, 0.5))

    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"x": torch.tensor(3.0)}))
    guide()
    for check in (check_sites, check_densities, check_particles, check_parameters, check_gradients, check_estimates):
        check(guide, model)
    with pytest.raises(AssertionError, match="TraceMeanField_ELBO.* differs from Trace_ELBO by"):
        check_elbos(guide, model)
    with pytest.raises(AssertionError, match="the guide has lost its model to a copy by deepcopy"):
        check_copies(guide, model)


class WrongJacobian(fg.AutoFlow):
    def _sample_sites(self, unconstrained, made):
        ((site, point),) = unconstrained
        return {"x": pyro.sample("x", LatentDelta(site.transform(point), 0.0 * point.sum(-1), 0))}


class OutsideOfTheSupport(fg.AutoFlow):
    def _sample_sites(self, unconstrained, made):
        ((site, point),) = unconstrained
        return {"x": pyro.sample("x", LatentDelta(-site.transform(point), 0.0, 0))}


class ReturnsNothing(fg.AutoFlow):
    def forward(self, *args, **kwargs):
        super().forward(*args, **kwargs)
        return {}


class JitteringMedian(fg.AutoFlow):
    def median(self, *args, **kwargs):
        return {"x": torch.rand(())}


class FallingQuantiles(fg.AutoFlow):
    def quantiles(self, levels, *args, **kwargs):
        return {name: value.flip(0) for name, value in super().quantiles(levels, *args, **kwargs).items()}


class HiddenState(fg.AutoFlow):
    """Draws by a number that is neither a parameter nor a buffer."""

    def get_posterior(self, *args, **kwargs):
        self.count = getattr(self, "count", 0) + 1
        return fg.NormalizingFlow(dist.Normal(torch.full((1,), float(self.count)), 1.0).to_event(1), self.flow)


class ParameterOnTheSide(fg.AutoFlow):
    def _build(self, args, kwargs):
        latents = super()._build(args, kwargs)
        self._parameters["side"] = nn.Parameter(torch.zeros(2))
        return latents


class WrongLogDet(fg.transforms.FlowTransform):
    """x = z·e^a with a log-determinant that is half of the right one, forward alone."""

    def __init__(self, dim):
        super().__init__(dim)
        self.a = nn.Parameter(torch.zeros(dim))

    def forward_and_log_det(self, z, context=None):
        return z * self.a.exp(), 0.5 * self.a.sum().expand(z.shape[:-1])

    def inverse_and_log_det(self, x, context=None):
        return x * (-self.a).exp(), -self.a.sum().expand(x.shape[:-1])


class TakesOneDraw(fg.AutoFlow):
    """Ignores the plates outside."""

    def get_posterior(self, *args, **kwargs):
        drawn = super().get_posterior().rsample()
        return dist.Delta(drawn, event_dim=1)


@pytest.mark.parametrize(
    ("Guide", "check", "message"),
    [
        (WrongJacobian, check_densities, 'log-density of site "x" and minus log.*differ by'),
        (OutsideOfTheSupport, check_sites, '1 values of site "x" are outside of its support.*biject_to'),
        (ReturnsNothing, check_sites, 'must return the value of site "x" by its name'),
        (JitteringMedian, check_estimates, 'median of site "x" differs from call to call'),
        (FallingQuantiles, check_estimates, 'quantiles of site "x" fall where the levels rise'),
        (HiddenState, check_copies, 'draws of site "x" from the guide and from a copy by .* differ by'),
        (ParameterOnTheSide, check_parameters, 'parameter "side" is no param site'),
        (ParameterOnTheSide, check_gradients, 'parameter "side" gets no gradient'),
        (TakesOneDraw, check_particles, "all values of site .* are the same"),
        (
            functools.partial(fg.AutoFlow, flow=WrongLogDet),
            check_densities,
            "log q of site .* at a copy of it differ by",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_guides_that_break_it(Guide, check, message):
    guide = Guide(positive) if isinstance(Guide, functools.partial) else Guide(positive, planar)
    guide()
    with moved_parameters(guide, 0.3), pytest.raises(AssertionError, match=message):
        check(guide, positive)


def test_a_guide_that_lacks_a_site():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AutoDelta(pyro.poutine.block(model, hide=["z"]))
    with pytest.raises(AssertionError, match='latent site "z" of the model is not in the guide'):
        check_sites(guide, model)


def test_predictive_draws_every_site():
    guide = fg.AutoFlow(in_plates, planar).setup(torch.tensor(Y))
    check_predictive(guide, in_plates, torch.tensor(Y))
