"""To ArviZ: groups, shapes and names of dimensions of every kind of model, both generations, messages."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import (
    AutoDelta,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
    init_to_value,
)

import pyro_flowguides as fg
from pyro_flowguides.calibration import Calibration
from pyro_flowguides.diagnostics import arviz as builder
from pyro_flowguides.diagnostics.arviz import Group, to_tree
from pyro_flowguides.diagnostics.groups import draws_groups
from pyro_flowguides.diagnostics.replay import draws_at
from pyro_flowguides.examples import EIGHT_SCHOOLS, EXAMPLES
from pyro_flowguides.model.call import ModelCall

az = pytest.importorskip("arviz")
QUICK = {"num_steps": 5, "num_particles": 4, "progress": False, "seed": 0}


def group_names(tree):
    return {name.strip("/") for name in (tree.groups if hasattr(tree, "children") else tree.groups())} - {""}


def fit_example(example, **changes):
    pyro.clear_param_store()
    fit = fg.fit(example.model, fg.AutoCoupling(example.model), model_kwargs=example.data(), **QUICK)
    return dataclasses.replace(fit, **changes)


# --- shapes -------------------------------------------------------------------------------------------------------------


def scalars(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def events(y):
    vector = pyro.sample("vector", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    matrix = pyro.sample("matrix", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
    pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    pyro.sample("cholesky", dist.LKJCholesky(3, 1.0))
    pyro.deterministic("product", (matrix @ vector.unsqueeze(-1)).squeeze(-1), event_dim=1)
    with pyro.plate("data", 4):
        pyro.sample("y", dist.MultivariateNormal(vector, torch.eye(3)), obs=y)


def plates_in_plates(y):
    outer, inner = pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 4, dim=-1)
    with outer:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with inner:
            pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
            pyro.sample("y", dist.Normal(level, 1.0), obs=y)


def size_one(y):
    with pyro.plate("single", 1):
        x = pyro.sample("x", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x.squeeze(-1), 1.0), obs=y)


def masked(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3), poutine.mask(mask=torch.tensor([True, False, True])):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def partly_observed(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=torch.tensor([True, False, True]))


def minibatch(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])


def several_observed(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("penalty", -(mu**2))
    with pyro.plate("first", 2):
        pyro.sample("a", dist.Normal(mu, 1.0), obs=y[:2])
    with pyro.plate("second", 3):
        pyro.sample("b", dist.Poisson(mu.exp()), obs=y[2:])


def nothing_observed(y):
    with pyro.plate("group", 2):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def scoped(y):
    mu = pyro.sample("scope/mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("scope/y", dist.Normal(mu.sum(-1), 1.0), obs=y)


SHAPES = [
    (scalars, [], {"mu": ()}, {"mu": ()}, {"y": ()}, {"y": ()}),
    (
        events,
        [4, 3],
        {
            "vector": ("vector_dim_0",),
            "matrix": ("matrix_dim_0", "matrix_dim_1"),
            "simplex": ("simplex_dim_0",),
            "cholesky": ("cholesky_dim_0", "cholesky_dim_1"),
            "product": ("product_dim_0",),
        },
        {
            "vector": ("vector_dim_0",),
            "matrix": ("matrix_dim_0", "matrix_dim_1"),
            "simplex": ("simplex_unconstrained_dim_0",),
            "cholesky": ("cholesky_unconstrained_dim_0",),
        },
        {"y": ("data", "y_dim_1")},
        {"y": ("data",)},
    ),
    (
        plates_in_plates,
        [2, 4],
        {"level": ("outer", "level_dim_1"), "weights": ("outer", "inner", "weights_dim_2")},
        {"level": ("outer", "level_dim_1"), "weights": ("outer", "inner", "weights_unconstrained_dim_2")},
        {"y": ("outer", "inner")},
        {"y": ("outer", "inner")},
    ),
    (
        size_one,
        [1],
        {"x": ("single", "x_dim_1")},
        {"x": ("single", "x_dim_1")},
        {"y": ("single",)},
        {"y": ("single",)},
    ),
    (masked, [3], {"mu": ()}, {"mu": ()}, {"y": ("data",)}, {"y": ("data",)}),
    (
        partly_observed,
        [3],
        {"mu": (), "y_unobserved": ("data",), "y": ("data",)},
        {"mu": (), "y_unobserved": ("data",)},
        {"y_observed": ("data",)},
        {"y_observed": ("data",)},
    ),
    (minibatch, [6], {"mu": ()}, {"mu": ()}, {}, {}),
    (
        several_observed,
        [5],
        {"mu": ()},
        {"mu": ()},
        {"a": ("first",), "b": ("second",)},
        {"a": ("first",), "b": ("second",)},
    ),
    (nothing_observed, [], {"x": ("group",)}, {"x": ("group",)}, {}, {}),
    (
        scoped,
        [],
        {"scope.mu": ("scope.mu_dim_0",)},
        {"scope.mu": ("scope.mu_dim_0",)},
        {"scope.y": ()},
        {"scope.y": ()},
    ),
]
SIZES = {"data": 4, "outer": 2, "inner": 4, "single": 1, "first": 2, "second": 3, "group": 2}


@pytest.mark.parametrize(
    ("model", "shape", "posterior", "unconstrained", "observed", "likelihood"),
    SHAPES,
    ids=[row[0].__name__ for row in SHAPES],
)
def test_dimensions(model, shape, posterior, unconstrained, observed, likelihood, tmp_path):
    y = torch.arange(float(np.prod(shape, dtype=int))).reshape(shape)
    tree = fg.to_arviz(AutoNormal(model), y, num_samples=30)

    def dims(group):
        return {name: tuple(array.dims) for name, array in tree[group].data_vars.items()} if group in tree else {}

    def sampled(expected):
        return {name: ("chain", "draw", *own) for name, own in expected.items()}

    assert dims("posterior") == sampled(posterior)
    # A minibatch has no predictive draws: every run would take other elements.
    assert dims("prior") == ({} if model is minibatch else sampled(posterior))
    assert dims("unconstrained_posterior") == sampled(unconstrained)
    assert dims("observed_data") == observed
    assert dims("posterior_predictive") == dims("prior_predictive") == sampled(observed)
    assert dims("log_likelihood") == sampled(likelihood)
    for name, array in tree["posterior"].data_vars.items():
        assert array.shape[:2] == (1, 30), name
        for dim, size in zip(array.dims[2:], array.shape[2:], strict=True):
            assert size == {**SIZES, "data": y.shape[0] if shape else 0}.get(dim, size), (name, dim)
    if observed:
        name = next(iter(observed))
        np.testing.assert_array_equal(
            tree["observed_data"][name].values.shape, tree["posterior_predictive"][name].shape[2:]
        )
    tree.to_netcdf(str(tmp_path / "tree.nc"))
    again = az.from_netcdf(str(tmp_path / "tree.nc"))
    assert group_names(again) == group_names(tree)


def test_user_names_and_labels():
    dims = {"simplex": ["topic"], "y": ["coordinate"] * 2}
    y = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="two dimensions of 'y' are called 'coordinate'"):
        fg.to_arviz(AutoNormal(events), y, num_samples=30, dims=dims)
    tree = fg.to_arviz(
        AutoNormal(events),
        y,
        num_samples=30,
        dims={"simplex": ["topic"], "y": ["data", "coordinate"]},
        coords={"topic": ["a", "b", "c"], "data": list("wxyz"), "coordinate": ["u", "v", "w"]},
    )
    assert tree["posterior"]["simplex"].dims == ("chain", "draw", "topic")
    assert list(tree["posterior"]["topic"].values) == ["a", "b", "c"]
    assert tree["unconstrained_posterior"]["simplex"].dims == ("chain", "draw", "simplex_unconstrained_dim_0")
    assert tree["posterior_predictive"]["y"].dims == ("chain", "draw", "data", "coordinate")
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "data")
    assert list(tree["log_likelihood"]["data"].values) == list("wxyz")


# --- contents -----------------------------------------------------------------------------------------------------------


def test_groups_of_a_fit():
    fit = fit_example(EIGHT_SCHOOLS)
    tree = fit.to_arviz(2000, coords=EIGHT_SCHOOLS.coords)
    assert group_names(tree) == {
        "posterior",
        "unconstrained_posterior",
        "sample_stats",
        "log_likelihood",
        "posterior_predictive",
        "prior",
        "prior_predictive",
        "observed_data",
        "constant_data",
        "variational_fit",
    }
    posterior = tree["posterior"]
    assert list(posterior.coords["school"].values) == list(EIGHT_SCHOOLS.coords["school"])
    np.testing.assert_allclose(
        posterior["theta"], posterior["mu"] + posterior["tau"] * posterior["theta_tilde"], rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(np.log(posterior["tau"]), tree["unconstrained_posterior"]["tau"], atol=1e-4)
    assert set(tree["sample_stats"].data_vars) == {"lp", "log_q", "log_weight"}
    np.testing.assert_allclose(np.exp(tree["sample_stats"]["log_weight"]).sum("draw"), 1)
    np.testing.assert_allclose(tree["constant_data"]["sigma"], EIGHT_SCHOOLS.data()["sigma"].cpu())
    assert set(tree["constant_data"].data_vars) == {"sigma"}
    sigma = EIGHT_SCHOOLS.data()["sigma"].cpu().numpy()
    expected = dist.Normal(torch.tensor(posterior["theta"].values), torch.tensor(sigma)).log_prob(
        EIGHT_SCHOOLS.data()["y"]
    )
    np.testing.assert_allclose(tree["log_likelihood"]["y"], expected.cpu(), rtol=1e-4, atol=1e-4)
    # New data are centred on their own draw, with the known standard errors; 2000 draws know an sd to 1.6%.
    residuals = (tree["posterior_predictive"]["y"] - posterior["theta"]).values / sigma
    np.testing.assert_allclose(residuals.std((0, 1)), 1, atol=0.065)
    # The median of the half-Cauchy prior is its scale, 5; that of a sample has the sd 5 π / 2 / sqrt(2000).
    assert np.median(tree["prior"]["tau"]) == pytest.approx(5, abs=4 * 0.18)
    residuals = (tree["prior_predictive"]["y"] - tree["prior"]["theta"]).values / sigma
    np.testing.assert_allclose(residuals.std((0, 1)), 1, atol=0.065)
    variational = tree["variational_fit"]
    np.testing.assert_array_equal(variational["elbo"], -fit.losses)
    assert variational["num_skipped"] == fit.num_skipped
    assert variational["wall_time"] == fit.wall_time
    assert variational["khat"].values == [fit.khat.value]
    assert variational["final_elbo"].values == [fit.elbo.value]
    attrs = posterior.attrs
    assert attrs["sample_dims"] == ["chain", "draw"]
    assert attrs["sampled_variables"] == ["mu", "tau", "theta_tilde"]
    assert attrs["inference_library"] == "pyro-ppl"
    assert attrs["creation_library"] == attrs["modeling_interface"] == "pyro_flowguides"
    assert attrs["name"] == "eight_schools"
    assert attrs["guide"] == "AutoCoupling"
    assert "created_at" in attrs


def test_restarts_become_chains():
    fit = fit_example(EIGHT_SCHOOLS)
    restarts = tuple(fit.to_posterior(n).chains[0] for n in (300, 400))
    fit = dataclasses.replace(fit, restarts=restarts)
    tree = fit.to_arviz(250, coords=EIGHT_SCHOOLS.coords)
    assert tree["posterior"]["theta"].shape == tree["posterior_predictive"]["y"].shape == (2, 250, 8)
    np.testing.assert_array_equal(tree["posterior"]["mu"][1], restarts[1].values["mu"][:250].cpu())
    np.testing.assert_allclose(np.exp(tree["sample_stats"]["log_weight"]).sum("draw"), 1)
    assert tree["variational_fit"]["khat"].shape == (2,)
    assert np.isfinite(az.rhat(tree["posterior"])["mu"] if hasattr(tree, "children") else az.rhat(tree)["mu"])
    # New data belong to their own draw in every chain: those of others would add the spread of theta.
    residuals = (tree["posterior_predictive"]["y"] - tree["posterior"]["theta"]).values
    standardised = residuals / EIGHT_SCHOOLS.data()["sigma"].cpu().numpy()
    np.testing.assert_allclose(standardised.std(1).mean(-1), 1, atol=4 / (2 * 250 * 8) ** 0.5)
    # 400 draws of the second are there, and no more are made.
    assert fit.to_arviz(5000, prior=False, predictive=False)["posterior"]["mu"].shape == (2, 300)


def test_any_guide_and_draws_give_the_same():
    guide = AutoMultivariateNormal(EIGHT_SCHOOLS.model)
    data = EIGHT_SCHOOLS.data()
    tree = fg.to_arviz(guide, model_kwargs=data, num_samples=50, seed=1)
    again = fg.to_arviz(guide, model_kwargs=data, num_samples=50, seed=1)
    np.testing.assert_array_equal(tree["posterior_predictive"]["y"], again["posterior_predictive"]["y"])
    draws = fg.draw(EIGHT_SCHOOLS.model, guide, model_kwargs=data, num_samples=50, seed=1, log_likelihood=True)
    alone, with_model = fg.to_arviz(draws), fg.to_arviz(draws, model=EIGHT_SCHOOLS.model, model_kwargs=data)
    np.testing.assert_array_equal(tree["posterior"]["theta"], alone["posterior"]["theta"])
    assert "prior" not in alone
    assert group_names(with_model) == group_names(tree)
    assert "posterior_predictive" not in fg.to_arviz(guide, model_kwargs=data, num_samples=30, predictive=False)
    # Resampled draws are no longer those of the guide.
    assert set(fg.to_arviz(draws.resample(20))["sample_stats"].data_vars) == {"lp"}


class Regression(pyro.nn.PyroModule):
    def forward(self, x, y, *, weight=2.0, names=("a",)):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x, weight), obs=y)


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: model.forward, poutine.scale(scale=2.0)])
def test_arguments_that_are_numbers_are_constant_data(wrap):
    x, y = torch.arange(3.0), torch.ones(3)
    tree = fg.to_arviz(AutoNormal(wrap(Regression())), x, y, model_kwargs={"weight": 3.0}, num_samples=30)
    assert {name: array.values.tolist() for name, array in tree["constant_data"].data_vars.items()} == {
        "x": [0.0, 1.0, 2.0],
        "weight": 3.0,
    }
    assert tree["posterior"].attrs["name"] in ("Regression", "forward")


@pytest.mark.parametrize("Guide", [AutoDelta, AutoIAFNormal, AutoLaplaceApproximation, AutoStructured])
def test_every_guide_of_pyro(Guide):
    tree = fg.to_arviz(Guide(EIGHT_SCHOOLS.model), model_kwargs=EIGHT_SCHOOLS.data(), num_samples=30)
    assert tree["posterior"]["theta"].shape == tree["prior"]["theta"].shape == (1, 30, 8)
    # A point has no weights; the Laplace approximation is one until it has been asked for its covariance.
    point = Guide in (AutoDelta, AutoLaplaceApproximation)
    assert set(tree["sample_stats"].data_vars) == {"lp", "log_q"} | (set() if point else {"log_weight"})


def test_the_prior_of_a_guides_model_is_the_prior():
    """Pyro's guides wrap their model so that it starts at initial values."""
    tree = fg.to_arviz(AutoNormal(EIGHT_SCHOOLS.model), model_kwargs=EIGHT_SCHOOLS.data(), num_samples=2000)
    assert np.median(tree["prior"]["tau"]) == pytest.approx(5, abs=4 * 0.18)
    assert float(tree["prior"]["mu"].std()) == pytest.approx(5, rel=0.065)


def test_mcmc():
    data = EIGHT_SCHOOLS.data()
    mcmc = MCMC(NUTS(EIGHT_SCHOOLS.model, max_tree_depth=3), num_samples=30, warmup_steps=20, disable_progbar=True)
    with pytest.raises(ValueError, match="has not been run yet"):
        fg.to_arviz(mcmc)
    mcmc.run(**data)
    tree = fg.to_arviz(mcmc, coords=EIGHT_SCHOOLS.coords)
    samples = {name: value.cpu() for name, value in mcmc.get_samples().items()}
    np.testing.assert_array_equal(tree["posterior"]["mu"][0], samples["mu"])
    theta = samples["mu"].unsqueeze(-1) + samples["tau"].unsqueeze(-1) * samples["theta_tilde"]
    np.testing.assert_allclose(tree["posterior"]["theta"][0], theta, rtol=1e-4, atol=1e-4)
    trace = poutine.trace(
        poutine.condition(EIGHT_SCHOOLS.model, {name: value[3] for name, value in mcmc.get_samples().items()})
    ).get_trace(**data)
    assert float(tree["sample_stats"]["lp"][0, 3]) == pytest.approx(float(trace.log_prob_sum()), rel=1e-4)
    assert set(tree["sample_stats"].data_vars) == {"lp", "diverging"}
    assert tree["sample_stats"]["diverging"].dtype == bool
    assert tree["log_likelihood"]["y"].shape == tree["posterior_predictive"]["y"].shape == (1, 30, 8)


def test_a_model_that_cannot_be_vectorised():
    def model(y):
        with pyro.plate("group", 3):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w.sum(), 0.1), obs=y)

    with pytest.warns(UserWarning, match="mixes the draws") as warned:
        tree = fg.to_arviz(AutoNormal(model), torch.tensor(0.0), num_samples=30)
    assert len(warned) == 1
    residuals = tree["posterior_predictive"]["y"] - tree["posterior"]["w"].sum("group")
    # Far below the 1.7 that the sum of other draws would leave.
    assert float(abs(residuals).max()) < 0.5


def test_what_cannot_be_sampled_is_left_out_with_a_warning():
    def model(y):
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"mu": torch.tensor(0.0)}))
    with pytest.warns(UserWarning, match="no group prior, .* prior=False"):
        tree = fg.to_arviz(guide, torch.tensor(0.5), num_samples=30)
    assert "prior" not in tree
    assert tree["posterior_predictive"]["y"].shape == (1, 30)
    fg.to_arviz(guide, torch.tensor(0.5), num_samples=30, prior=False)


# --- messages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "coords", "message"),
    [
        ({"posterior": Group({"x": np.zeros((1, 5, 2))}, {"x": ["x"]})}, {}, "'x' is the name of a dimension and of a"),
        ({"posterior": Group({"x": np.zeros((1, 5, 2))}, {"x": ["draw"]})}, {}, "called 'draw', which ArviZ keeps"),
        (
            {"posterior": Group({"x": np.zeros((1, 5, 2, 2))}, {"x": ["a", "a"]})},
            {},
            "two dimensions of 'x' are called",
        ),
        (
            {"posterior": Group({"x": np.zeros((1, 5))}, {"x": ["a"]})},
            {},
            r"has 0 dimensions beside \['chain', 'draw'\], and 1",
        ),
        (
            {"posterior": Group({"x": np.zeros((1, 5, 2)), "y": np.zeros((1, 5, 3))}, {"x": ["a"], "y": ["a"]})},
            {},
            "'a' of group posterior has 2 elements before 'y' and 3 in it",
        ),
        ({"posterior": Group({"s/x": np.zeros((1, 5)), "s.x": np.zeros((1, 5))})}, {}, "would be called 's.x'"),
        (
            {"posterior": Group({"x": np.zeros((1, 5, 2))}, {"x": ["a"]})},
            {"a": ["u"]},
            "'a' of group posterior has 2 elements and 1 labels",
        ),
        (
            {"posterior": Group({"x": np.zeros((1, 5, 2))}, {"x": ["a"]})},
            {"b": ["u"]},
            "labels for 'b', which is no dimension; there are a, chain, draw",
        ),
    ],
)
def test_names_that_clash(groups, coords, message):
    with pytest.raises(ValueError, match=message):
        to_tree(groups, coords)


def test_a_plate_with_a_name_that_arviz_keeps():
    def model():
        with pyro.plate("draw", 2):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"'x' is called 'draw', .*rename the plate, or name the dimension with dims"):
        fg.to_arviz(AutoNormal(model), num_samples=30)
    tree = fg.to_arviz(AutoNormal(model), num_samples=30, dims={"x": ["pull"]})
    assert tree["posterior"]["x"].dims == ("chain", "draw", "pull")
    with pytest.raises(ValueError, match="dims names 'z', which is no site; there are x"):
        fg.to_arviz(AutoNormal(model), num_samples=30, dims={"z": ["pull"]})


def test_sources_that_are_none():
    with pytest.raises(TypeError, match="a fit, Draws, a guide or a pyro.infer.MCMC, not dict"):
        fg.to_arviz({})
    with pytest.raises(ValueError, match="does not know its model: give it with model="):
        fg.to_arviz(lambda: None)


def test_values_of_another_model():
    with pytest.raises(ValueError, match="not draws of this model: site 'x' has none; the model has no site 'mu'"):
        draws_at(ModelCall(nothing_observed, (None,)), {"mu": torch.zeros(5)}, "the draws come from elsewhere")
    draws = [
        fg.draw(model, AutoNormal(model), torch.tensor(0.3), num_samples=5) for model in (scalars, nothing_observed)
    ]
    with pytest.raises(ValueError, match="chain 1 is a fit of another model than chain 0"):
        draws_groups(draws, {})


# --- two generations of ArviZ -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES.values(), ids=list(EXAMPLES))
def test_the_usual_calls(example, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    path = tmp_path / "fit.nc"
    fit_example(example).to_arviz(500, coords=example.coords).to_netcdf(str(path))
    tree = az.from_netcdf(str(path))
    old = builder.arviz_generation() == 0
    plots = ["plot_trace", "plot_ppc"] if old else ["plot_trace_dist", "plot_ppc_dist"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one chain, of a k-hat after five steps, and of libraries at odds
        assert len(az.summary(tree)) == len(fit_example(example).summary())
        assert np.isfinite(float(az.loo(tree).se))
        assert len(az.compare({"one": tree, "other": tree})) == 2
        for name in [*plots, "plot_forest"]:
            getattr(az, name)(tree)
        az.plot_pair(tree, var_names=["mu", "tau"])
    plt.close("all")


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """Keeps what is given to the builder, for the interpreter that has the other generation."""
    contents = []

    def record(groups, coords=None, attrs=None):
        fields = {name: (dict(g.variables), dict(g.dims), tuple(g.sample_dims)) for name, g in groups.items()}
        contents.append((fields, coords, attrs))
        return to_tree(groups, coords, attrs)

    monkeypatch.setattr("pyro_flowguides.diagnostics.posterior.to_tree", record)
    return contents


@pytest.mark.slow
def test_under_the_other_generation_of_arviz(recorded, tmp_path):
    """The same content in both containers, each file opened by the other, the usual calls on every example.

    ArviZ 1.x needs Python 3.12: FLOWGUIDES_ARVIZ1_PYTHON names an interpreter that has it, without torch.
    """
    interpreter = os.environ.get("FLOWGUIDES_ARVIZ1_PYTHON")
    if not interpreter or not Path(interpreter).exists():
        pytest.skip("no environment with the other generation of ArviZ: set FLOWGUIDES_ARVIZ1_PYTHON")
    trees = {}
    for name, example in EXAMPLES.items():
        trees[name] = fit_example(example).to_arviz(200, coords=example.coords)
        trees[name].to_netcdf(str(tmp_path / f"{name}.nc"))
        (tmp_path / f"{name}.pickle").write_bytes(pickle.dumps(recorded[-1]))
    ranks = np.random.default_rng(0).integers(0, 100, size=(50, 2))
    calibration = Calibration({"x": ranks}, {"x": (ranks + 0.5) / 100}, 99, {"x": ["group"]})
    calibration.to_arviz().to_netcdf(str(tmp_path / "calibration.nc"))
    script = Path(__file__).with_name("other_generation.py")
    command = [interpreter, str(script), str(Path(fg.__file__).parent), str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert found["generation"] == 1
    assert found["khat"] == pytest.approx(0.75, abs=0.3)
    assert found["calls"]["calibration"] == ["plot_ecdf_pit"]
    for name, tree in trees.items():
        assert found["types"][name] == "DataTree"
        assert found["dims"][name] == ["chain", "draw", "school"]
        assert {"summary", "loo", "compare", "plot_ppc_dist", "plot_pair"} <= set(found["calls"][name])
        other = az.from_netcdf(str(tmp_path / f"{name}_other.nc"))
        assert group_names(other) == group_names(tree)
        for group in group_names(tree):
            theirs, ours = other[group], tree[group]
            assert set(theirs.data_vars) == set(ours.data_vars)
            for variable in ours.data_vars:
                assert theirs[variable].dims == ours[variable].dims
                np.testing.assert_array_equal(theirs[variable].values, ours[variable].values)
            for dim in ours.coords:
                np.testing.assert_array_equal(theirs[dim].values, ours[dim].values)
            ignored = {"created_at"}
            assert set(theirs.attrs) - ignored == set(ours.attrs) - ignored


def test_numpy_modules_need_no_torch():
    """The part of the test above that any machine can run."""
    code = Path(__file__).with_name("other_generation.py").read_text().split("def calls")[0]
    root = Path(fg.__file__).parent
    subprocess.run([sys.executable, "-c", code, str(root), "."], check=True)
