"""The groups of a posterior in ArviZ: shapes and names of dimensions of every kind of model, and what is in them."""

import dataclasses

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from draw_cases import QUICK, fit_example, group_names, nothing_observed, scalar_model
from pyro import poutine
from pyro.infer.autoguide import AutoNormal, init_to_value

import pyro_flowguides as fg
from pyro_flowguides.diagnostics.groups import draws_groups
from pyro_flowguides.examples import EIGHT_SCHOOLS

az = pytest.importorskip("arviz")


# --- shapes -----------------------------------------------------------------------------------------------------------


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


def scoped(y):
    mu = pyro.sample("scope/mu", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("scope/y", dist.Normal(mu.sum(-1), 1.0), obs=y)


SHAPES = [
    (scalar_model, [], {"mu": ()}, {"mu": ()}, {"y": ()}, {"y": ()}),
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


# --- contents ---------------------------------------------------------------------------------------------------------


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


def test_the_prior_of_a_guides_model_is_the_prior():
    """Pyro's guides wrap their model so that it starts at initial values."""
    tree = fg.to_arviz(AutoNormal(EIGHT_SCHOOLS.model), model_kwargs=EIGHT_SCHOOLS.data(), num_samples=2000)
    assert np.median(tree["prior"]["tau"]) == pytest.approx(5, abs=4 * 0.18)
    assert float(tree["prior"]["mu"].std()) == pytest.approx(5, rel=0.065)


def test_factors_flags_and_scopes_can_be_reported():
    def model(y):
        mu = pyro.sample("scope/mu", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", -(mu**2))
        pyro.deterministic("positive", mu > 0)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    fit = fg.fit(model, fg.AutoCoupling(model), torch.tensor([0.5, 1.0]), **QUICK)
    summary = fit.summary()
    assert 0 < summary.loc["positive", "mean"] < 1
    tree = fit.to_arviz(50)
    assert set(tree["observed_data"].data_vars) == {"y"}
    assert "scope.mu" in tree["posterior"].data_vars


def test_a_model_that_mixes_draws():
    def model(y):
        with pyro.plate("group", 3):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(w.sum(), 0.1), obs=y)

    tree = fg.to_arviz(AutoNormal(model), torch.tensor(0.0), num_samples=30)
    residuals = tree["posterior_predictive"]["y"] - tree["posterior"]["w"].sum("group")
    # Far below the 1.7 that the sum of other draws would leave.
    assert float(abs(residuals).max()) < 0.5


def test_what_cannot_be_sampled_is_left_out_with_a_warning():
    def model(y):
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"mu": torch.tensor(0.0)}))
    with pytest.warns(UserWarning, match="no group prior, .* prior=False") as warned:
        tree = fg.to_arviz(guide, torch.tensor(0.5), num_samples=30)
    assert [warning.filename for warning in warned] == [__file__]
    assert "prior" not in tree
    assert tree["posterior_predictive"]["y"].shape == (1, 30)
    fg.to_arviz(guide, torch.tensor(0.5), num_samples=30, prior=False)


# --- messages ---------------------------------------------------------------------------------------------------------


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


def test_chains_of_different_models():
    draws = [
        fg.draw(model, AutoNormal(model), torch.tensor(0.3), num_samples=5)
        for model in (scalar_model, nothing_observed)
    ]
    with pytest.raises(ValueError, match="chain 1 is a fit of another model than chain 0"):
        draws_groups(draws, {})
