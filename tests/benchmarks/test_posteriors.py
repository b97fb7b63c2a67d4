"""The benchmark's models against other ways to compute the same thing, its check, and its runner.

What needs reference draws runs where FLOWGUIDES_POSTERIORDB names the folder posterior_database of a checkout of posteriordb.
"""

import functools
import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import conjugate, conjugate_answer
from pyro import poutine
from scipy.integrate import solve_ivp

from benchmarks.posteriors import processes, regression, scores, targets, time_series
from benchmarks.posteriors.__main__ import main
from benchmarks.posteriors.check import check, stein_statistics, unconstrained_density
from benchmarks.posteriors.cox import cox_posterior
from benchmarks.posteriors.database import posteriors, reference_draws
from benchmarks.posteriors.definitions import DEFINITIONS
from benchmarks.posteriors.known import KnownPosterior, Reference, by_site, scalar, tensor
from benchmarks.posteriors.report import report
from benchmarks.posteriors.run import read, run

DATABASE = os.environ.get("FLOWGUIDES_POSTERIORDB")


@pytest.fixture(autouse=True)
def default_dtype(dtype):
    """Benchmarks make their data in the default dtype."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(previous)


@pytest.fixture
def double(dtype):
    if dtype != torch.float64:
        pytest.skip("a comparison that single precision does not resolve")


def synthetic_data():
    """Small data sets with the columns that the definitions read."""
    rng = np.random.default_rng(0)
    data = {name: rng.uniform(0.5, 2.0, 9) for name in (*"xyuv", "height", "earn", "mom_iq", "kid_score", "weight")}
    data |= {name: rng.uniform(0.5, 2.0, 9) for name in ("diam1", "diam2", "canopy_height", "total_height", "density")}
    data |= {name: rng.integers(1, 5, 9) for name in ("age_discrete", "educ1", "gender", "income", "partyid7", "k")}
    data |= {name: rng.integers(0, 2, 9) for name in ("mom_hs", "male", "group")}
    data |= {"real_ideo": rng.integers(1, 8, 9), "race_adj": rng.uniform(1, 2, 9), "alpha": [[4, 2], [2, 4]], "K": 2}
    data |= {"sigma": rng.uniform(1, 2, 9), "sigma1": 0.5, "X": rng.normal(size=(9, 3)), "Y": rng.normal(size=9)}
    data |= {"pmualpha": 1.0, "psalpha": 10.0, "pmubeta": 0.0, "psbeta": 0.5}
    data |= {"t0": 0.0, "D": 30.0, "V": 2.0, "times": np.arange(1, 10) / 2, "C_hat": rng.uniform(5, 14, 9)}
    return {name: tensor(value) for name, value in data.items()}


def prior_draws(model, args, num_draws):
    """Latents of every site, away from the start of any guide."""
    traces = [poutine.trace(model).get_trace(*args) for _ in range(num_draws)]
    names = traces[0].stochastic_nodes
    return {name: torch.stack([trace.nodes[name]["value"] for trace in traces]) for name in names}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_every_model_carries_draws_through(name, dtype, tolerance):
    if name == "gp_pois_regr" and dtype != torch.float64:
        pytest.skip("the jitter of its definition is lost in single precision")
    definition = DEFINITIONS[name]
    args = definition.arguments(synthetic_data())
    density, points = unconstrained_density(definition.model, args, prior_draws(definition.model, args, 6))
    together = density(points.reshape(2, 3, -1))
    alone = torch.stack([density(point) for point in points])
    assert together.shape == (2, 3)
    assert alone.isfinite().all()
    torch.testing.assert_close(together.flatten(), alone, rtol=tolerance(1e-10), atol=tolerance(1e-10))


# --- models against loops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 7, 32])
def test_matrix_products_in_pairs(length, tolerance):
    matrices = torch.randn(2, 2, 3, length).exp().requires_grad_()
    expected = torch.eye(2).expand(3, 2, 2)
    for matrix in matrices.permute(3, 2, 0, 1):
        expected = expected @ matrix
    product, log_scale = time_series.matrix_product(matrices)
    assert (product.amax((0, 1)) == 1).all()
    found = (product * log_scale.exp()).permute(2, 0, 1)
    torch.testing.assert_close(found, expected, rtol=tolerance(1e-12), atol=0)
    (gradient,) = torch.autograd.grad(found.log().sum(), matrices)
    (expected_gradient,) = torch.autograd.grad(expected.log().sum(), matrices)
    torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance(1e-10), atol=tolerance(1e-12))


def test_products_of_many_matrices_neither_overflow_nor_vanish():
    matrices = torch.tensor([[3e-30, 1e-30], [2e-30, 5e-30]]).unsqueeze(-1).expand(2, 2, 1000)
    product, log_scale = time_series.matrix_product(matrices)
    # The larger eigenvalue of (3, 1; 2, 5) is 4 + √3.
    assert float(log_scale) / 1000 == pytest.approx(math.log((4 + 3**0.5) * 1e-30), rel=1e-3)
    assert product.isfinite().all()


@pytest.mark.parametrize("length", [3, 4, 5, 13, 14])
def test_forward_algorithm(length, tolerance):
    transition = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    log_emission = torch.randn(2, 5, length)
    weight = log_emission[..., 0].exp().mT
    for t in range(1, length):
        weight = (weight @ transition) * log_emission[..., t].exp().mT
    found = time_series.forward_log_likelihood(transition.unsqueeze(-1), log_emission)
    torch.testing.assert_close(found, weight.sum(-1).log(), rtol=tolerance(1e-12), atol=tolerance(1e-12))


@pytest.mark.parametrize("length", [1, 2, 7, 32])
def test_linear_recursion(length, tolerance):
    inputs, decay = torch.rand(4, length), torch.rand(4)
    expected = [inputs[:, 0]]
    for t in range(1, length):
        expected.append(inputs[:, t] + decay * expected[-1])
    found = time_series.linear_recursion(inputs, decay)
    torch.testing.assert_close(found, torch.stack(expected, -1), rtol=tolerance(1e-12), atol=tolerance(1e-12))


def test_garch_has_the_density_of_its_definition(double):
    y, sigma1 = tensor([4.9, 4.1, 6.2, 5.5, 3.0]), tensor(0.5)
    mu, alpha0, alpha1, beta1 = 4.7, 0.6, 0.3, 0.5
    sigma, expected = 0.5, 0.0
    for t, value in enumerate(y.tolist()):
        if t:
            sigma = (alpha0 + alpha1 * (y[t - 1].item() - mu) ** 2 + beta1 * sigma**2) ** 0.5
        expected += float(dist.Normal(mu, sigma).log_prob(tensor(value)))
    reference = {"mu": mu, "alpha0": alpha0, "alpha1": alpha1, "beta1": beta1}
    latents = time_series.garch11_latents({name: tensor(value) for name, value in reference.items()}, {})
    trace = poutine.trace(poutine.condition(time_series.garch11, latents)).get_trace(y, sigma1)
    assert float(trace.nodes["beta1"]["value"]) == pytest.approx(beta1)
    # Flat in β1 means flat in the fraction but for the length of the interval.
    assert float(trace.log_prob_sum()) == pytest.approx(expected + math.log(1 - alpha1), rel=1e-12)


@pytest.mark.parametrize(
    "parameters", [(0.75, 0.98, 0.9), (1.4, 0.05, 0.5), (0.5, 30.0, 20.0)], ids=["typical", "saturated", "linear"]
)
def test_concentration_solves_its_equation(parameters, double):
    """And its derivatives, which only the last step of Newton's carries, are those of what it returns."""
    times, dose, volume = np.arange(1, 21) / 2, 30.0, 2.0

    def solve(k_a, k_m, v_m):
        def slope(t, c):
            return dose / volume * k_a * np.exp(-k_a * t) - v_m / volume * c / (k_m + c)

        return solve_ivp(slope, (0, 10), [0.0], t_eval=times, rtol=1e-10, atol=1e-12, method="LSODA").y[0]

    nodes, integrals, at_times = processes.collocation(tensor(times), tensor(0.0))

    def found(*values):
        solution = processes.concentration(tensor(dose), tensor(volume), *values, nodes, integrals)
        return solution @ at_times.mT

    inputs = [tensor(value).requires_grad_() for value in parameters]
    concentrations = found(*inputs)
    # The noise of the data is 12 %.
    np.testing.assert_allclose(concentrations.detach().cpu(), solve(*parameters), rtol=1e-3)
    gradient = torch.autograd.grad(concentrations.log().sum(), inputs)
    for i, value in enumerate(parameters):
        step = 1e-5 * value
        above, below = (
            float(found(*map(tensor, (*parameters[:i], value + sign * step, *parameters[i + 1 :]))).log().sum())
            for sign in (1, -1)
        )
        assert float(gradient[i]) == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-7)


def test_the_cox_process_has_the_density_of_its_parts(tmp_path, double):
    points = np.random.default_rng(0).random((20, 2))
    path = tmp_path / "points.csv"
    path.write_text("\n".join(['"","x","y"', *(f'"{i}",{x},{y}' for i, (x, y) in enumerate(points))]))
    posterior = cox_posterior(path, 3)
    counts, mean, _ = posterior.args
    assert counts.sum() == 20
    assert counts[0] == ((points[:, 0] < 1 / 3) & (points[:, 1] < 1 / 3)).sum()
    cells = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0)).to(counts)
    covariance = 1.91 * torch.exp(-33 * torch.cdist(cells, cells) / 3)
    f = mean + torch.randn(9)
    expected = dist.MultivariateNormal(mean.expand(9), covariance).log_prob(f)
    expected += (dist.Poisson(f.exp() / 9).log_prob(counts) + torch.lgamma(counts + 1) + counts * math.log(9)).sum()
    trace = poutine.trace(poutine.condition(posterior.model, data={"f": f})).get_trace(*posterior.args)
    torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=1e-10, atol=0)
    assert set(targets.targets(pines=path)) >= {"cox_256", "cox_1600"}


# --- evidence ----------------------------------------------------------------------------------------------------------


def log_joint(model, args, values):
    """Of many points at once, by the model itself."""
    with pyro.validation_enabled(False):
        trace = poutine.trace(poutine.condition(model, values)).get_trace(*args)
        trace.compute_log_prob()
    return sum(site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample")


@pytest.mark.parametrize(
    ("model", "evidence"),
    [
        (regression.flat_regression, regression.flat_log_evidence),
        (regression.half_cauchy_regression, regression.half_cauchy_log_evidence),
        (regression.normal_regression, regression.normal_regression_log_evidence),
    ],
)
def test_evidence_of_a_regression_is_the_integral_of_its_density(model, evidence, double):
    x = tensor([[-1.0], [0.5], [2.0], [0.1], [-0.4], [1.2]])
    y = tensor([-0.9, 0.8, 1.7, 0.3, -0.1, 0.6])
    beta, log_sigma = torch.linspace(-5, 7, 1201), torch.linspace(-4, 4, 801)
    grid = torch.cartesian_prod(beta, log_sigma)
    log_density = log_joint(model, (x, y), {"beta": grid[:, :1], "sigma": grid[:, 1].exp()}) + grid[:, 1]
    log_integral = float(log_density.logsumexp(0)) + math.log(12 / 1200 * 8 / 800)
    # What lies outside of the grid: the tail of σ has a power of −4.
    assert evidence(x, y) == pytest.approx(log_integral, abs=1e-4)


def test_a_compressed_regression_has_the_density_of_its_rows(tolerance):
    x, y = torch.randn(40, 3), torch.randn(40)
    values = {"b": torch.randn(5, 3), "Intercept": torch.randn(5), "sigma": torch.rand(5) + 0.5}
    rows = dist.Normal(values["Intercept"].unsqueeze(-1) + values["b"] @ x.mT, values["sigma"].unsqueeze(-1))
    expected = rows.log_prob(y).sum(-1) + dist.Normal(0.0, 1.0).log_prob(values["b"]).sum(-1)
    expected += dist.StudentT(3.0, 8.0, 10.0).log_prob(values["Intercept"])
    expected += dist.StudentT(3.0, 0.0, 10.0).log_prob(values["sigma"]) + math.log(2)
    found = log_joint(regression.heavy_tailed_regression, regression.triangular_factor(x, y), values)
    torch.testing.assert_close(found, expected, rtol=tolerance(1e-12), atol=tolerance(1e-12))


def importance_log_evidence(model, args, latents_of, num_draws=200_000):
    """log Z and its standard error, from draws of a wide normal around the posterior: (draws by site, log density)."""
    values, log_q = latents_of(num_draws)
    log_weights = log_joint(model, args, values) - log_q
    weights = (log_weights - log_weights.max()).exp()
    return float(weights.mean().log() + log_weights.max()), float(weights.std() / weights.mean()) / num_draws**0.5


@pytest.mark.parametrize("kind", ["line", "autoregression", "heavy tails"])
def test_evidence_of_other_regressions_agrees_with_importance_sampling(kind, double):
    torch.manual_seed(0)
    x = torch.randn(30, 2)
    x = x - x.mean(0)
    y = 3.0 + x @ tensor([0.5, -1.0]) + 0.7 * torch.randn(30)
    if kind == "line":
        model, evidence, names = regression.line, regression.line_log_evidence, ("alpha", "beta")
        args = x[:, 0], y, tensor([2.0, 1.5]), tensor([0.0, 0.8])
    elif kind == "autoregression":
        model, evidence, names = regression.autoregression, regression.autoregression_log_evidence, ("alpha", "beta")
        args = x, y
    else:
        model, evidence, names = (
            regression.heavy_tailed_regression,
            regression.heavy_tailed_log_evidence,
            ("Intercept", "b"),
        )
        args = regression.triangular_factor(x, y)
    slopes = () if kind == "line" else (2,)

    def latents(num_draws):
        design = torch.cat([torch.ones(30, 1), x[:, :1] if kind == "line" else x], -1)
        factor = torch.linalg.cholesky(torch.linalg.inv(design.mT @ design))
        solution = torch.linalg.lstsq(design, y).solution
        scale = float((y - design @ solution).std())
        proposal = dist.MultivariateStudentT(tensor(8.0), solution, 1.2 * scale * factor)
        sigma_proposal = dist.LogNormal(tensor(math.log(scale)), 0.25)
        coefficients, sigma = proposal.sample([num_draws]), sigma_proposal.sample([num_draws])
        values = {
            names[0]: coefficients[:, 0],
            names[1]: coefficients[:, 1:].reshape(num_draws, *slopes),
            "sigma": sigma,
        }
        return values, proposal.log_prob(coefficients) + sigma_proposal.log_prob(sigma)

    estimate, se = importance_log_evidence(model, args, latents)
    assert se < 0.01
    assert evidence(*args) == pytest.approx(estimate, abs=4 * se)


# --- targets -----------------------------------------------------------------------------------------------------------


def test_eight_schools_is_exact(double):
    posterior = targets.eight_schools()
    assert posterior.log_evidence == pytest.approx(-31.311, abs=5e-4)
    moments = dict(
        zip(posterior.reference.names, zip(posterior.reference.mean, posterior.reference.sd, strict=True), strict=True)
    )
    assert moments["mu"] == pytest.approx((4.397, 3.318), abs=5e-4)
    assert moments["tau"] == pytest.approx((3.598, 3.220), abs=5e-4)
    assert moments["theta[1]"] == pytest.approx((6.212, 5.593), abs=5e-4)
    log_tau = np.log(scalar({"tau": posterior.reference.draws[:, 1]}, "tau"))
    size = len(log_tau)
    assert log_tau.mean() == pytest.approx(0.802, abs=4 * 1.171 / size**0.5)
    assert log_tau.std() == pytest.approx(1.171, rel=4 * 2 / size**0.5)


@pytest.mark.parametrize(("name", "log_evidence"), [("U1", 1.8775), ("U2", 2.0821), ("U3", 2.6417), ("U4", 2.6846)])
def test_planar_densities(name, log_evidence, double):
    posterior = targets.planar_posterior(name)
    assert posterior.log_evidence == pytest.approx(log_evidence, abs=6e-5)
    # The model's own density integrates to the same: the mean of importance weights of uniform draws.
    torch.manual_seed(0)
    weights = 64 * log_joint(posterior.model, posterior.args, {"z": 8 * torch.rand(200_000, 2) - 4}).exp()
    assert float(weights.mean()) == pytest.approx(math.exp(log_evidence), abs=4 * float(weights.std()) / 200_000**0.5)
    for i in range(2):
        noise = posterior.reference.sd[i] / len(posterior.reference.draws) ** 0.5
        assert posterior.reference.draws[:, i].mean() == pytest.approx(posterior.reference.mean[i], abs=4 * noise)


@pytest.mark.parametrize("name", targets.targets())
def test_models_of_the_targets_pass_the_check(name, double):
    assert check(targets.targets()[name]()).passed


def test_funnel_is_normalised(tolerance):
    posterior = targets.funnel_posterior(3)
    trace = poutine.trace(poutine.condition(targets.funnel, {"v": tensor(1.0), "x": tensor([0.3, -2.0])})).get_trace(
        *posterior.args
    )
    expected = -0.5 * (1 / 9 + (0.09 + 4.0) / math.e) - math.log(3) - 1.0 - 1.5 * math.log(2 * math.pi)
    assert float(trace.log_prob_sum()) == pytest.approx(expected, rel=tolerance(1e-12))


def test_sonar_is_a_logistic_regression(tmp_path, tolerance):
    path = tmp_path / "sonar.csv"
    path.write_text("x1,x2,label\n1,5,0\n2,3,1\n6,1,1\n")
    posterior = targets.targets(path)["sonar"]()
    design, labels = posterior.args
    assert labels.tolist() == [0, 1, 1]
    torch.testing.assert_close(design[:, 0], torch.ones(3))
    torch.testing.assert_close(design[:, 1:].mean(0), torch.zeros(2), rtol=0, atol=tolerance(1e-12))
    torch.testing.assert_close(design[:, 1:].square().mean(0), torch.ones(2))


# --- the check ---------------------------------------------------------------------------------------------------------


def test_steins_identities_hold_for_the_right_density_alone(double):
    """The statistics are standard normal for the right score, and far off for a wrong location, scale or power."""
    torch.manual_seed(0)
    loc, factor = tensor([1.0, -2.0, 0.5]), tensor([[1.0, 0, 0], [0.9, 0.5, 0], [-3.0, 1.0, 0.1]])
    points = loc + torch.randn(10_000, 3) @ factor.mT
    precision = torch.linalg.inv(factor @ factor.mT)

    def largest(scores):
        return [float(statistic.abs().max()) for statistic in stein_statistics(points, scores)]

    right = largest(-(points - loc) @ precision)
    assert max(right) < 4
    shifted = largest(-(points - loc - 0.1 * factor[:, 0]) @ precision)
    assert shifted[0] > 6
    tempered = largest(-1.1 * (points - loc) @ precision)
    assert tempered[0] < 4 < 6 < tempered[1]


def normal_mean(y, masked=False):
    """The conjugate model without a plate."""
    prior = dist.Normal(y.new_tensor(1.0), 2.0)
    mu = pyro.sample("mu", prior.mask(False) if masked else prior)
    pyro.sample("y", dist.Normal(mu.unsqueeze(-1), 1.0).to_event(1), obs=y)


def test_a_missing_prior_is_found_out(double):
    y = tensor([0.3, 0.1, 0.8])
    mean, sd, _ = conjugate_answer(y)
    latents = {"mu": tensor(np.random.default_rng(0).normal(mean, sd, 10_000))}
    assert check(KnownPosterior("conjugate", normal_mean, (y,), latents=latents)).passed
    without_prior = functools.partial(normal_mean, masked=True)
    assert not check(KnownPosterior("flat", without_prior, (y,), latents=latents)).passed


def test_a_model_that_mixes_draws_is_found_out(double):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 1.0))
        pyro.factor("mixed", 0.01 * mu.mean().expand(mu.shape))

    latents = {"mu": tensor(np.random.default_rng(0).normal(size=10_000))}
    found = check(KnownPosterior("mixing", model, (tensor(0.0),), latents=latents))
    assert found.worst_alone > 1e-6
    assert not found.passed


def test_check_says_what_is_wrong():
    y = tensor([0.3])
    with pytest.raises(ValueError, match="'bare' has no draws"):
        check(KnownPosterior("bare", normal_mean, (y,)))
    with pytest.raises(ValueError, match=r"latent sites \['mu'\], but the draws have \['theta'\]"):
        check(KnownPosterior("misnamed", normal_mean, (y,), latents={"theta": torch.zeros(400)}))
    values = torch.randn(400)
    values[7] = math.nan
    with pytest.raises(ValueError, match="at 1 of 400 reference draws; the first is draw 7"):
        check(KnownPosterior("broken", normal_mean, (y,), latents={"mu": values}))


# --- the database ------------------------------------------------------------------------------------------------------


def write_zipped(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(path.stem, json.dumps(content))


@pytest.fixture
def small_database(tmp_path):
    """A posterior of a known model, with draws of two chains, and one of a model that is not known."""
    entry = {"name": "toy-blr", "model_name": "blr", "data_name": "toy", "reference_posterior_name": "toy-blr"}
    for one in (entry, entry | {"name": "toy-unknown", "model_name": "unknown"}):
        path = tmp_path / "posteriors" / f"{one['name']}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(one))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 2))
    write_zipped(tmp_path / "data" / "data" / "toy.json.zip", {"X": x.tolist(), "y": (x @ [1, -1]).tolist()})
    chains = [{name: rng.normal(size=5).tolist() for name in ("beta[1]", "beta[2]", "sigma")} for _ in range(2)]
    write_zipped(tmp_path / "reference_posteriors" / "draws" / "draws" / "toy-blr.json.zip", chains)
    return tmp_path, chains


def test_database_is_read(small_database):
    folder, chains = small_database
    found = posteriors(folder)
    assert list(found) == ["toy-blr"]
    posterior = found["toy-blr"]()
    assert posterior.reference.names == ("beta[1]", "beta[2]", "sigma")
    expected = np.array([[*chain["beta[2]"]] for chain in chains]).ravel()
    np.testing.assert_allclose(posterior.reference.draws[:, 1], expected)
    torch.testing.assert_close(posterior.latents["beta"][:, 1], tensor(expected))
    assert posterior.args[0].shape == (20, 2)
    assert math.isfinite(posterior.log_evidence)


def test_a_folder_that_is_no_database(tmp_path):
    with pytest.raises(FileNotFoundError, match="give the folder posterior_database"):
        posteriors(tmp_path)


def test_scalars_by_name():
    values = {"mu": np.arange(1.0, 4), "beta": np.arange(12.0).reshape(3, 2, 2)}
    np.testing.assert_array_equal(scalar(values, "beta[2,1]"), [2, 6, 10])
    np.testing.assert_allclose(scalar(values, "log mu"), np.log([1, 2, 3]))
    names = ("mu", *(f"beta[{i},{j}]" for i in (1, 2) for j in (1, 2)))
    again = by_site({name: scalar(values, name) for name in names})
    assert list(again) == ["mu", "beta"]
    np.testing.assert_array_equal(again["beta"], values["beta"])
    with pytest.raises(KeyError, match="'gamma' belongs to no site; there are mu, beta"):
        scalar(values, "gamma")


needs_database = pytest.mark.skipif(DATABASE is None, reason="FLOWGUIDES_POSTERIORDB names no database")


@needs_database
@pytest.mark.slow
def test_every_known_posterior_of_the_database_passes_the_check(double):
    failed = [name for name, load in posteriors(Path(DATABASE)).items() if not check(load()).passed]
    assert not failed


@needs_database
def test_reference_draws_of_eight_schools_have_the_exact_moments():
    """What the noise of a reference means: 10,000 draws."""
    draws = reference_draws(Path(DATABASE), "eight_schools-eight_schools_noncentered")
    reference = targets.eight_schools().reference
    for i, name in enumerate(reference.names):
        assert len(draws[name]) == 10_000
        assert np.mean(draws[name]) == pytest.approx(reference.mean[i], abs=5 * reference.sd[i] / 100)


# --- scores ------------------------------------------------------------------------------------------------------------


def normal_reference():
    draws = np.random.default_rng(1).normal([1.0, -2.0], [2.0, 0.5], (10_000, 2))
    return Reference(("a", "b"), draws, np.array([1.0, -2.0]), np.array([2.0, 0.5]))


def test_distances_of_shifted_and_scaled_draws():
    reference = normal_reference()
    draws = np.random.default_rng(2).normal([1.0, -2.0], [2.0, 0.5], (100_000, 2))
    moved = draws.copy()
    moved[:, 1] += 0.2
    moved[:, 0] = 1.0 + 1.3 * (draws[:, 0] - 1.0)
    found = scores.distances(moved, reference)
    # Four standard errors of a mean and of an sd, in units of the sd.
    assert found["mean_error"] == pytest.approx(0.4, abs=4 / 100_000**0.5)
    assert found["mean_error_of"] == "b"
    assert found["sd_error"] == pytest.approx(0.3, abs=4 * 1.3 / 200_000**0.5)
    assert found["sd_error_of"] == "a"
    # A shift by 0.4 sds, and a stretch: E|0.3 x| = 0.3 √(2/π).
    noise = 4 * (1 / 10_000 + 1 / 100_000) ** 0.5
    assert found["wasserstein"] == pytest.approx((0.4 + 0.3 * (2 / math.pi) ** 0.5) / 2, abs=noise)


def test_weights_correct_the_distances():
    reference = normal_reference()
    rng = np.random.default_rng(3)
    draws = rng.normal([1.5, -2.0], [2.0, 0.5], (100_000, 2))
    weights = np.exp(0.5 * ((draws[:, 0] - 1.5) ** 2 - (draws[:, 0] - 1.0) ** 2) / 4)
    assert scores.distances(draws, reference)["mean_error"] == pytest.approx(0.25, abs=0.02)
    weighted = scores.distances(draws, reference, weights)
    assert weighted["mean_error"] < 0.02
    assert weighted["sd_error"] < 0.02
    assert weighted["wasserstein"] < 4 / 10_000**0.5


def test_noise_floor_is_the_error_of_so_many_draws():
    floor = scores.noise_floor(normal_reference())
    # The larger of two means of 10,000 draws: between a half and four standard errors.
    assert 0.005 < floor["mean_error"] < 0.04
    assert 0.0035 < floor["sd_error"] < 0.03
    assert 0 < floor["wasserstein"] < 0.04


# --- the runner --------------------------------------------------------------------------------------------------------


def conjugate_posterior():
    y = tensor([0.3, 0.1, 0.8])
    mean, sd, log_evidence = conjugate_answer(y)
    draws = np.random.default_rng(0).normal(mean, sd, (10_000, 1))
    return KnownPosterior("conjugate", conjugate, (y,), Reference.from_draws(("mu",), draws), log_evidence=log_evidence)


def broken_posterior():
    return KnownPosterior("broken", conjugate, (tensor([0.3, math.nan]),))


@pytest.mark.slow
def test_run_records_failures_and_goes_on_where_it_was(tmp_path, double):
    loaded = []

    def load():
        loaded.append(1)
        return conjugate_posterior()

    settings = {"out": tmp_path, "num_steps": 30, "num_particles": 16}
    run({"broken": broken_posterior, "conjugate": load}, ["default", "normal"], [0], **settings)
    records = {(record["posterior"], record["guide"]): record for record in read(tmp_path / "runs.jsonl")}
    assert len(records) == 4
    assert "observed site 'y' holds 1 NaN" in records["broken", "default"]["error"]
    good = records["conjugate", "default"]
    assert good["steps"] == 30
    assert abs(good["gap"]) < 0.05
    assert good["raw"]["mean_error"] < 0.1
    assert good["whitening_seconds"] > 0
    assert records["conjugate", "normal"]["whitening_seconds"] is None
    assert good["environment"]["versions"]["torch"]

    run({"broken": broken_posterior, "conjugate": load}, ["default", "normal"], [0, 1], **settings)
    assert len(read(tmp_path / "runs.jsonl")) == 8
    assert len(loaded) == 4

    text = report(read(tmp_path / "runs.jsonl"))
    assert "| default, 30 steps, 16 particles | 2 | 2 |" in text
    assert "- broken, default, 30 steps, 16 particles, seed 0: ValueError" in text
    assert "torch" in text.splitlines()[-1]


def test_report_takes_the_median_over_seeds_and_the_worst_over_posteriors():
    def record(posterior, seed, mean_error, ess):
        return {
            "posterior": posterior,
            "guide": "default",
            "seed": seed,
            "num_steps": None,
            "num_particles": None,
            "elbo": -1.0,
            "ess_fraction": ess,
            "khat": None,
            "verdict": "good: …",
            "raw": {"mean_error": mean_error, "sd_error": 0.0, "wasserstein": 0.0},
            "environment": {"processor": "one", "cpu_count": 1, "torch_threads": 1, "python": "3", "versions": {}},
        }

    values = [("a", 0, 0.1, 0.9), ("a", 1, 0.3, 0.8), ("a", 2, 0.2, 0.7), ("b", 0, 0.6, 0.5)]
    text = report(
        [{**record(*value), "psis": record(*value)["raw"], "floor": record(*value)["raw"]} for value in values]
    )
    summary = next(line for line in text.splitlines() if line.startswith("| default"))
    # The medians of a and b are 0.2 and 0.6.
    assert summary.startswith("| default | 2 | 0 | 4 of 4 | 0.400 / 0.600 |")
    assert "| 0.6500 / 0.5000 |" in summary
    with pytest.raises(ValueError, match="run the benchmark first"):
        report([])


@pytest.mark.slow
def test_command_line(tmp_path, small_database, capsys):
    folder, _ = small_database
    out = tmp_path / "results"
    assert main(["check", "--only", "funnel_2", "--out", str(out / "check.json")]) == 0
    assert json.loads((out / "check.json").read_text())["results"]["funnel_2"]["passed"]
    arguments = ["run", "--only", "funnel_2", "--seeds", "3", "--steps", "2", "--particles", "4", "--out", str(out)]
    assert main(arguments) == 0
    assert read(out / "runs.jsonl")[0]["seed"] == 3
    assert main([*arguments[1:5], "--steps", "2", "--particles", "4", "--guides", "normal", "--out", str(out)]) == 0
    assert [record["guide"] for record in read(out / "runs.jsonl")] == ["default", "normal"]
    assert "funnel_2" in (out / "report.md").read_text()
    assert main(["report", "--out", f"{out},{tmp_path / 'none'}", "--results", str(tmp_path / "all.json")]) == 0
    assert json.loads((tmp_path / "all.json").read_text())["results"] == read(out / "runs.jsonl")
    assert (tmp_path / "all.md").read_text() == (out / "report.md").read_text()
    for wrong, message in (
        (["--guides", "defualt"], "unknown guides defualt"),
        (["--database", str(folder), "--only", "toy"], "unknown posteriors toy; there are toy-blr"),
    ):
        with pytest.raises(SystemExit):
            main(["run", "--out", str(out), *wrong])
        assert message in capsys.readouterr().err
