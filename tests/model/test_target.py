"""log p of the flat vector of the latents."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import COVARIANCE, Y, conjugate, correlated, kitchen_sink
from pyro import poutine
from torch.distributions import biject_to

from pyro_flowguides.model.call import ModelCall
from pyro_flowguides.model.latents import Latents
from pyro_flowguides.model.target import Target


def make_target(model, *args, vectorize=True, **kwargs):
    with torch.no_grad():
        latents = Latents.whole(
            poutine.trace(poutine.block(model, expose_fn=is_latent)).get_trace(*args, **kwargs), "test"
        )
    return Target(ModelCall(model, args, kwargs), latents, vectorize=vectorize)


def is_latent(message):
    return (
        message["type"] == "sample" and not message["is_observed"] and "_Subsample" not in type(message["fn"]).__name__
    )


def test_it_is_the_density_of_the_model():
    target = make_target(correlated)
    points = torch.randn(6, 3, dtype=torch.float64)
    expected = dist.MultivariateNormal(torch.arange(3.0, dtype=torch.float64), COVARIANCE).log_prob(points)
    torch.testing.assert_close(target.log_prob(points), expected)


@pytest.mark.parametrize("vectorize", [True, False])
def test_it_counts_priors_likelihood_and_jacobians(vectorize):
    """Site by site, at one point after the other, by Pyro's own trace."""
    target = make_target(kitchen_sink, vectorize=vectorize)
    points = torch.randn(4, target.latents.dim)
    found = target.log_prob(points)
    values = target.constrain(points)
    for index in range(4):
        given = {name: value[index] for name, value in values.items()}
        trace = poutine.trace(poutine.condition(kitchen_sink, data=given)).get_trace()
        expected = float(trace.log_prob_sum())
        for name, value in given.items():
            transform = biject_to(trace.nodes[name]["fn"].support)
            point = transform.inv(value)
            expected += float(transform.log_abs_det_jacobian(point, value).sum())
        assert float(found[index]) == pytest.approx(expected, rel=1e-4)


def test_the_score_is_that_of_the_density():
    target = make_target(conjugate, torch.tensor(Y, dtype=torch.float64))
    points = torch.tensor([[0.0], [2.0]], dtype=torch.float64).requires_grad_()
    (score,) = torch.autograd.grad(target.log_prob(points).sum(), points)
    expected = (1.0 - points) / 4 + (torch.tensor(Y, dtype=torch.float64) - points).sum(-1, keepdim=True)
    torch.testing.assert_close(score, expected.detach())


def test_a_second_derivative_is_an_error_and_no_wrong_number():
    target = make_target(conjugate, torch.tensor(Y, dtype=torch.float64))
    points = torch.tensor([[0.0], [2.0]], dtype=torch.float64).requires_grad_()
    (score,) = torch.autograd.grad(target.log_prob(points).square().sum(), points, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        score.sum().backward()


def test_it_is_float64_for_a_model_in_float32():
    target = make_target(conjugate, torch.tensor(Y))
    points = torch.zeros(3, 1, dtype=torch.float64)
    assert target.latents.init_loc.dtype == torch.float32
    assert target.log_prob(points).dtype == torch.float64


def test_values_have_the_shapes_and_supports_of_the_sites():
    target = make_target(kitchen_sink)
    prototype = poutine.trace(kitchen_sink).get_trace().nodes
    for name, value in target.constrain(torch.randn(5, target.latents.dim)).items():
        assert value.shape == (5, *prototype[name]["value"].shape)
        assert prototype[name]["fn"].support.check(value).all()


def noisy(y, batch_size):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()), 10.0))
    with pyro.plate("data", len(y), subsample_size=batch_size) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])


def test_a_minibatch_of_data_is_kept():
    y = torch.randn(1000)
    target = make_target(noisy, y, 50)
    points = torch.randn(3, 1)
    first = target.log_prob(points)
    torch.testing.assert_close(target.log_prob(points), first, rtol=0, atol=0)
    other = make_target(noisy, y, 50).log_prob(points)
    assert (other - first).abs().max() > 1


def hierarchy(y, batch_size=None):
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(()), 0.5))
    with pyro.plate("rows", len(y), subsample_size=batch_size) as index:
        local = pyro.sample("local", dist.Normal(torch.zeros(()), scale))
        pyro.sample("y", dist.Normal(local, 0.5), obs=y[index])


@pytest.mark.parametrize("batch_size", [2, 3])
def test_local_latents_see_the_whole_plate(batch_size):
    """The mean over minibatches that divide the plate is the density of the whole; the Jacobians count once."""
    y = torch.randn(6, dtype=torch.float64)
    whole, parts = make_target(hierarchy, y), make_target(hierarchy, y, batch_size)
    points = torch.randn(4, 7)
    torch.testing.assert_close(parts.log_prob(points), whole.log_prob(points), rtol=1e-5, atol=1e-5)
    assert parts.constrain(points)["local"].shape == (4, 6)


def test_a_minibatch_that_is_given_is_refused():
    def model(index):
        with pyro.plate("rows", 6, subsample=index):
            pyro.sample("local", dist.Normal(0.0, 1.0))

    with pytest.raises(
        ValueError, match="site 'local' is inside plate 'rows', of which these arguments.*one minibatch"
    ):
        make_target(model, torch.tensor([1, 2]))
