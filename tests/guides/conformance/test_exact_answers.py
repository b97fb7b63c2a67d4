"""The guides on targets whose log Z is known: never above it, and there where the family holds the answer."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_cases import every_flow, every_guide, every_normal_guide, small
from models import Y, conjugate, conjugate_answer, funnel, train
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import init_to_value
from pyro.optim import Adam
from transform_cases import perturb

import pyro_flowguides as fg


@pytest.mark.slow
@every_flow
def test_finds_a_conjugate_posterior(Guide):
    y = torch.tensor(Y, dtype=torch.float64)
    guide = Guide(conjugate, gradient="path", init_scale=0.3)
    train(conjugate, guide, y, steps=500, decay=0.03)
    mean, sd, log_evidence = conjugate_answer(y)
    draws = fg.draw(conjugate, guide, y, num_samples=20_000)
    # The family holds the posterior: four standard errors of 20,000 draws, plus what 600 steps leave.
    assert abs(float(draws.values["mu"].mean()) - mean) < 4 * sd / 20_000**0.5 + 0.02 * sd
    assert abs(float(draws.values["mu"].std()) / sd - 1) < 4 / 40_000**0.5 + 0.03
    elbo = draws.elbo
    assert elbo.value < log_evidence + 4 * elbo.se + 1e-9
    assert elbo.value > log_evidence - 0.01


def correlated_normal():
    """Ten dimensions with a correlation of 0.9 between neighbours; log Z = 0."""
    index = torch.arange(10.0)
    pyro.sample("x", dist.MultivariateNormal(index / 5, 0.9 ** (index.unsqueeze(-1) - index).abs()))


PREDICTORS, RESPONSE = (
    torch.linspace(-1, 1, 8, dtype=torch.float64, device="cpu"),
    [0.1, -0.4, 0.6, 0.2, 1.1, 0.9, 1.8, 1.2],
)


def regression():
    """Intercept and slope with normal priors and known noise: the posterior is normal."""
    x = PREDICTORS.to(torch.zeros(()))
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(intercept + slope * x, 0.5), obs=torch.tensor(RESPONSE))


def regression_log_evidence():
    x = PREDICTORS.to(torch.zeros(()))
    covariance = 4 + 4 * torch.outer(x, x) + 0.25 * torch.eye(len(x))
    return float(dist.MultivariateNormal(torch.zeros(len(x)), covariance).log_prob(torch.tensor(RESPONSE)))


TARGETS = {
    "correlated": (correlated_normal, lambda: 0.0),
    "regression": (regression, regression_log_evidence),
    "funnel": (funnel, lambda: 0.0),
}
every_target = pytest.mark.parametrize(("model", "log_evidence"), TARGETS.values(), ids=TARGETS)


def evidence_check(model, guide, log_evidence, num_draws=2000):
    """log Z is the log of the mean of p/q, of which the ELBO is a lower bound for any flow and parameters."""
    loss = Trace_ELBO(num_particles=num_draws, vectorize_particles=True)
    elbos = torch.tensor([-loss.loss(model, guide) for _ in range(5)])
    standard_error = float(elbos.std() / 5**0.5)
    # With five values the standard error itself is known to 35%.
    assert float(elbos.mean()) < log_evidence + 6 * standard_error + 1e-9
    return float(elbos.mean())


@every_guide
@every_target
def test_loss_is_never_below_minus_log_evidence(Guide, model, log_evidence):
    """At parameters far from the start, where a wrong log-determinant shows, and after training has looked for one."""
    guide = small(Guide)(model).whiten(method="batch_and_match")
    perturb(guide.flow, 1.0)
    evidence_check(model, guide, log_evidence())
    train(model, guide, steps=100, lr=0.01)
    evidence_check(model, guide, log_evidence())


@every_guide
@every_target
def test_mean_ratio_is_the_evidence(Guide, model, log_evidence):
    r"""E_q[p/q] = Z, where the expectation has a variance: a wrong log-determinant of either sign shows.

    A perturbation of the fit that is small enough for a finite variance, and heavier tails than the target's on the funnel.
    """
    guide = small(Guide)(model).whiten(method="batch_and_match")
    for flow in getattr(guide.flow, "components", [guide.flow]):
        perturb(flow.transforms[0], 0.15)
        flow.transforms[-1].scale.mul_(1.3)
    draws = fg.draw(model, guide, num_samples=20_000, seed=0)
    ratios = (draws.log_p - draws.log_q - log_evidence()).exp()
    expected = 1.0
    if model is funnel:
        # The variance is finite in a slice alone: the neck is narrower than the guide, and the mouth is wider.
        v = draws.values["v"].reshape(-1)
        ratios = ratios * ((v > -4) & (v < -2))
        expected = float(dist.Normal(0.0, 3.0).cdf(torch.tensor([-4.0, -2.0])).diff())
    tolerance = 4 * float(ratios.std()) / 20_000**0.5
    assert tolerance < 0.5 * expected
    assert float(ratios.mean()) == pytest.approx(expected, abs=tolerance)


@every_normal_guide
@pytest.mark.parametrize(("model", "log_evidence"), list(TARGETS.values())[:2], ids=list(TARGETS)[:2])
def test_reaches_the_exact_answer(Guide, model, log_evidence):
    """The affine map holds a normal posterior whatever the flow; whitening finds it, and training stays there."""
    guide = small(Guide)(model, gradient="path").whiten(method="batch_and_match")
    elbo = evidence_check(model, guide, log_evidence())
    assert elbo == pytest.approx(log_evidence(), abs=1e-3)
    train(model, guide, steps=30, lr=0.001)
    assert evidence_check(model, guide, log_evidence()) == pytest.approx(log_evidence(), abs=5e-3)


@pytest.mark.slow
@every_normal_guide
@pytest.mark.parametrize(("model", "log_evidence"), list(TARGETS.values())[:2], ids=list(TARGETS)[:2])
def test_trains_to_the_exact_answer(Guide, model, log_evidence):
    """Without whitening, from the prior's median; but a spline is the identity outside of its box, and would stay there."""
    # A longer training has a smaller error of the ELBO, and fit warns where that of the solver is larger.
    guide = Guide(model, init_scale=0.3, **({"num_steps": 8} if issubclass(Guide, fg.AutoContinuousFlow) else {}))
    whiten = "auto" if Guide is fg.AutoSpline else None
    options = {"num_steps": 1500, "num_particles": 32, "seed": 0, "progress": False}
    result = fg.fit(model, guide, whiten=whiten, **options)
    # Radial layers bend so little that they are far slower than the rest.
    tolerance = 0.1 if Guide is fg.AutoRadial else 0.02
    assert result.elbo.value == pytest.approx(log_evidence(), abs=tolerance + 4 * result.elbo.se)


def far_normal():
    """20 and −20 of the guide's first standard deviations away, with a correlation of 0.8."""
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    pyro.sample("x", dist.MultivariateNormal(torch.tensor([2.0, -2.0]), covariance))


def test_affine_map_travels_from_a_narrow_start():
    """By plain SVI, and by steps whose sum, in units of the first standard deviation, is half of the way."""
    start = init_to_value(values={"x": torch.zeros(2)})
    guide = fg.AutoFlow(far_normal, lambda dim: fg.transforms.Permutation(range(dim)), init_loc_fn=start)
    num_steps, lr = 200, 0.05
    assert num_steps * lr * 0.1 < 2.0
    svi = SVI(far_normal, guide, Adam({"lr": lr}), Trace_ELBO(num_particles=100, vectorize_particles=True))
    for _ in range(num_steps):
        svi.step()
    # So few steps leave 0.017 ± 0.001 nat, whatever the seed; a map that falls short of the mean loses several.
    assert fg.draw(far_normal, guide, num_samples=10_000).elbo.value == pytest.approx(0.0, abs=0.04)
