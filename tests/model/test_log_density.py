"""Log densities without a Pyro model, against densities whose integrals are known."""

import math

import numpy as np
import pyro
import pytest
import torch
from fits import quick
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints

import pyro_flowguides as fg
from pyro_flowguides.model.call import ModelCall
from pyro_flowguides.model.target import Target

PRECISION = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
LOG_Z = math.log(2 * math.pi) - 0.5 * float(torch.logdet(PRECISION))


def of_a_point(x):
    return -0.5 * x @ PRECISION @ x


def of_both(x):
    return -0.5 * ((x @ PRECISION) * x).sum(-1)


def of_a_batch(x):
    return -0.5 * torch.einsum("ni,ij,nj->n", x, PRECISION, x)


def of_numpy(x):
    precision = PRECISION.double().numpy()
    return -0.5 * x @ precision @ x, -precision @ x


FUNCTIONS = {"a point": of_a_point, "both": of_both, "a batch": of_a_batch}


@pytest.fixture(autouse=True)
def double():
    """Integrals are compared to more digits than float32 has."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def precise(function):
    return lambda x: function(x.float()).to(x)


@pytest.mark.parametrize("takes", FUNCTIONS)
def test_a_gaussian_has_its_elbo_whatever_the_function_takes(takes):
    density = fg.LogDensity(precise(FUNCTIONS[takes]), 2)
    assert density.takes == takes
    # Whitening finds the Gaussian, so that nothing is left to learn.
    fit = quick(density, fg.AutoCoupling(density), num_steps=1)
    assert abs(fit.elbo.value - LOG_Z) < 1e-3
    assert fit.verdict.kind is fg.VerdictKind.EXACT or fit.khat.value < 0.7
    assert list(fit.summary().index) == ["x[0]", "x[1]"]


def test_a_function_of_numpy_with_its_gradient():
    density = fg.LogDensity.from_numpy(of_numpy, 2, names=["a", "b"])
    fit = quick(density, fg.AutoCoupling(density), num_steps=2)
    assert fit.elbo.value == pytest.approx(LOG_Z, abs=1e-3)
    assert list(fit.summary().index) == ["a", "b"]
    x = torch.tensor([[0.3, -1.0], [2.0, 0.5]], requires_grad=True)
    value = density.log_prob(a=x[:, 0], b=x[:, 1])
    (gradient,) = torch.autograd.grad((torch.tensor([1.0, 2.0]) * value).sum(), x)
    torch.testing.assert_close(gradient, -torch.tensor([[1.0], [2.0]]) * (x @ PRECISION.double()))


def test_a_captured_fit_of_a_function_of_numpy_warns_once():
    density = fg.LogDensity.from_numpy(of_numpy, 2)
    with pytest.warns(UserWarning, match="cannot capture") as caught:
        fit = quick(density, fg.AutoPlanar(density, num_layers=1), num_steps=5, backend="auto")
    assert len(caught) == 1 and fit.elbo.value == pytest.approx(LOG_Z, abs=1e-2)


# --- Jacobians ---------------------------------------------------------------------------------------------------------


def log_integral(density, box, points):
    """The log of the integral of a density over unconstrained space, by the midpoint rule on a grid."""
    guide = fg.AutoPlanar(density, num_layers=1).setup()
    target = Target(ModelCall(density), guide.latents)
    step = 2 * box / points
    axis = torch.arange(points) * step - box + step / 2
    grid = torch.cartesian_prod(*[axis] * guide.latent_dim).reshape(-1, guide.latent_dim)
    return float(target.log_prob(grid).logsumexp(0)) + guide.latent_dim * math.log(step)


CONCENTRATION = torch.tensor([2.0, 3.0, 1.5], dtype=torch.float64)
WITH_SUPPORT = {
    "gamma": (lambda rate: 2 * rate.log() - rate, {"rate": ()}, constraints.positive, math.lgamma(3.0)),
    "beta": (lambda p: p.log() + 2 * (1 - p).log(), {"p": ()}, constraints.unit_interval, math.log(1 / 12)),
    "dirichlet": (
        lambda p: ((CONCENTRATION - 1) * p.log()).sum(-1),
        {"p": 3},
        {"p": constraints.simplex},
        float(CONCENTRATION.lgamma().sum() - CONCENTRATION.sum().lgamma()),
    ),
    "two gammas": (lambda x: (x.log() - x).sum(-1), 2, constraints.positive, 0.0),
    "banana": (
        lambda x: -0.5 * (x[..., 0] ** 2 + (x[..., 1] - x[..., 0] ** 2) ** 2),
        2,
        None,
        math.log(2 * math.pi),
    ),
}


@pytest.mark.parametrize("name", WITH_SUPPORT)
def test_the_integral_over_unconstrained_space(name):
    function, shapes, supports, expected = WITH_SUPPORT[name]
    density = fg.LogDensity(function, shapes, supports=supports)
    assert density.takes == "both"
    one = isinstance(shapes, dict) and shapes != {"p": 3}
    assert log_integral(density, 25.0, 4000 if one else 500) == pytest.approx(expected, abs=1e-4)


def test_a_fit_with_supports_finds_the_moments():
    density = fg.LogDensity(lambda rate: 2 * rate.log() - rate, {"rate": ()}, supports={"rate": constraints.positive})
    fit = quick(density, fg.AutoSpline(density), num_steps=200, num_particles=32)
    draws = fit.draws
    # Gamma(3, 1): mean 3, variance 3; 10,000 draws, a fit that is near.
    assert float(draws.values["rate"].mean()) == pytest.approx(3.0, abs=0.2)
    assert fit.elbo.value < math.lgamma(3.0) + 4 * fit.elbo.se
    assert fit.elbo.value == pytest.approx(math.lgamma(3.0), abs=0.02)


# --- the rest of the library, and Pyro ---------------------------------------------------------------------------------


def test_shapes_by_name_and_in_order():
    def joint(tau, theta):
        return -tau - 0.5 * (theta**2).sum(-1) / tau**2 - 3 * tau.log()

    supports = {"tau": constraints.positive}
    by_name = fg.LogDensity(joint, {"tau": (), "theta": (3,)}, supports=supports)
    in_order = fg.LogDensity(joint, [(), 3], names=["tau", "theta"], supports=supports)
    values = {"tau": torch.tensor(0.7), "theta": torch.tensor([0.1, -0.2, 0.3])}
    assert by_name.log_prob(**values) == in_order.log_prob(**values) == joint(**values)
    assert list(fg.LogDensity(lambda a, b: a + b, [(), ()]).priors) == ["x_0", "x_1"]
    tree = fg.to_arviz(fg.AutoPlanar(by_name, num_layers=1), num_samples=50)
    assert dict(tree.posterior.sizes) == {"chain": 1, "draw": 50, "theta_dim_0": 3}
    assert "prior" not in tree.groups()


def test_pyro_takes_it_as_a_model():
    density = fg.LogDensity(of_both_double, 2)
    for vectorize in (False, True):
        pyro.clear_param_store()
        svi = SVI(
            density, AutoNormal(density), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(4, vectorize_particles=vectorize)
        )
        assert math.isfinite(svi.step())
    mcmc = MCMC(NUTS(density), num_samples=20, warmup_steps=20, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["x"].shape == (20, 2)
    assert (
        fg.compare({"mcmc": mcmc, "fit": quick(density, fg.AutoPlanar(density, num_layers=1), num_steps=1)}).shape[0]
        == 2
    )


def of_both_double(x):
    return -0.5 * ((x @ PRECISION.double()) * x).sum(-1)


def test_draws_of_the_flat_prior_are_in_the_support():
    density = fg.LogDensity(lambda p: p.log().sum((-1, -2)), {"p": (2, 3)}, supports=constraints.simplex)
    drawn = density.priors["p"].expand([5]).sample()
    assert drawn.shape == (5, 2, 3)
    torch.testing.assert_close(drawn.sum(-1), torch.ones(5, 2))


def test_a_function_of_a_point_refuses_a_batch():
    density = fg.LogDensity(lambda x: -(x**2).sum(), 3)
    assert density.takes == "a point"
    with pytest.raises(ValueError, match="of one point, and is given several"):
        density.log_prob(x=torch.ones(4, 3))


@pytest.mark.parametrize(
    ("error", "message", "function", "shapes", "options"),
    [
        (ValueError, r"For one point it returned a tensor of shape \(2,\); for two", lambda x: x, 2, {}),
        (ValueError, "For one point it raised RuntimeError: mine", lambda x: exec("raise RuntimeError('mine')"), 2, {}),
        (TypeError, "returns a float64 and no tensor.*from_numpy", lambda x: np.sum(x.numpy()), 2, {}),
        (
            ValueError,
            "the support of 'x' must be a continuous constraint",
            of_both,
            2,
            {"supports": constraints.boolean},
        ),
        (
            ValueError,
            "no map from the real line to the support Dependent",
            of_both,
            2,
            {"supports": constraints.dependent},
        ),
        (
            ValueError,
            "'a' has shape .* needs at least 1 dimensions",
            lambda a: a,
            {"a": ()},
            {"supports": constraints.simplex},
        ),
        (
            ValueError,
            "supports names 'b'; the names are a",
            lambda a: a,
            {"a": ()},
            {"supports": {"b": constraints.real}},
        ),
        (ValueError, "names must be 2 different names", of_both, 2, {"names": ["a"]}),
        (ValueError, "has its names already", lambda a: a, {"a": ()}, {"names": ["a"]}),
        (TypeError, "names must be a list of names", of_both, 2, {"names": "ab"}),
        (TypeError, "dim_or_shapes must be an integer", of_both, 2.5, {}),
        (ValueError, "a size of 'a' must be at least 1", lambda a: a, {"a": (0,)}, {}),
        (TypeError, "function must be a function", 3, 2, {}),
    ],
)
def test_bad_input(error, message, function, shapes, options):
    with pytest.raises(error, match=message):
        fg.LogDensity(function, shapes, **options)


def test_a_gradient_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"gradient of a point must be of shape \(2,\), got \(1,\)"):
        fg.LogDensity.from_numpy(lambda x: (0.0, x[:1]), 2)


def test_a_density_that_is_nan_at_every_start():
    density = fg.LogDensity(lambda x: torch.nan * x.sum(-1), 2)
    with pytest.raises(
        ValueError, match="not finite at the start: site 'log_density' of the model has log-probability nan"
    ):
        quick(density, fg.AutoPlanar(density, num_layers=1))


class StanModel:
    """What BridgeStan's models have, for a normal with a positive scale: y ~ normal(mu, sigma), flat priors."""

    data = np.array([0.3, 1.4, 2.2, 0.7, 1.9])

    def param_unc_num(self):
        return 2

    def param_unc_names(self):
        return ["mu.1", "sigma"]

    def param_constrain(self, theta_unc):
        return np.array([theta_unc[0], np.exp(theta_unc[1])])

    def log_density_gradient(self, theta_unc, *, propto=True, jacobian=True, out=None):
        assert theta_unc.dtype == np.float64
        error, precision = self.data - theta_unc[0], np.exp(-2 * theta_unc[1])
        value = -0.5 * precision * error @ error - len(self.data) * theta_unc[1] + jacobian * theta_unc[1]
        slope = [precision * error.sum(), precision * error @ error - len(self.data) + jacobian]
        return value - (not propto) * 0.5 * len(self.data) * math.log(2 * math.pi), np.array(slope)


def test_a_model_of_bridgestan():
    model = StanModel()
    density = fg.LogDensity.from_numpy(model.log_density_gradient, model.param_unc_num(), names=model.param_unc_names())
    fit = quick(density, fg.AutoCoupling(density), num_steps=50)
    values = torch.stack([fit.draws.values[name] for name in model.param_unc_names()], -1).numpy()
    constrained = np.array([model.param_constrain(point) for point in values])
    # The posterior of mu is centred at the mean of the data, with t errors on 3 degrees of freedom.
    assert np.median(constrained[:, 0]) == pytest.approx(model.data.mean(), abs=0.1)
    assert (constrained[:, 1] > 0).all()
