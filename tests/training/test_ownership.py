"""A fit owns its parameters: whatever is fitted, cleared or set afterwards, it gives what it gave right after the fit."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from fits import quick
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import pyro_flowguides as fg

# Three groups far apart, the last one of another size.
GROUPS = [torch.tensor([-0.4, 0.1, 0.0]), torch.tensor([9.5, 10.2, 10.1]), torch.tensor([19.8, 20.1, 19.5, 20.3])]


def mean_model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 30.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def mean_function(y):
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    return {"mu": pyro.sample("mu", dist.Normal(loc, scale))}


def each_datum(y):
    """As many latents as data."""
    with pyro.plate("data", len(y)):
        mu = pyro.sample("mu", dist.Normal(0.0, 30.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def uses(fit, y):
    """Everything that a fit is used for, as numbers."""
    options = {"predictive": False, "prior": False}
    pyro.set_rng_seed(7)
    found = {
        "summary": fit.summary().to_numpy(),
        "draws": fit.draws.values["mu"],
        "drawn": fg.draw(fit.model, fit.guide, y, num_samples=50, seed=1).log_weights,
        "arviz": fit.to_arviz(100, seed=1, **options)["posterior"]["mu"].values,
        "Predictive": Predictive(fit.model, guide=fit.guide, num_samples=20)(y)["mu"],
        "resample": fit.draws.resample(30, seed=1).values["mu"],
        "compare": fg.compare({"fit": fit}, num_samples=200, seed=1)["elbo"].to_numpy(),
        "traced": pyro.poutine.trace(fit.guide).get_trace(y).nodes["mu"]["value"],
    }
    if hasattr(fit.guide, "quantiles"):
        found["quantiles"] = fit.guide.quantiles([0.1, 0.9])["mu"]
        found["median"] = fit.guide.median(y)["mu"]
    return {name: value.detach().numpy() if torch.is_tensor(value) else value for name, value in found.items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def fast(model):
    return fg.AutoCoupling(model, num_layers=2)


GUIDES = {"flow": lambda: fast(mean_model), "normal": lambda: AutoNormal(mean_model), "function": lambda: mean_function}


@pytest.mark.parametrize("clears", [False, True])
@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_a_loop_over_groups(make, clears):
    fits, before = [], []
    for y in GROUPS:
        if clears:
            pyro.clear_param_store()
        fits.append(quick(mean_model, make(), y))
        before.append(uses(fits[-1], y))
    pyro.param("loc", torch.tensor(77.0))
    pyro.param("AutoNormal.locs.mu", torch.tensor(77.0))
    for fit, y, expected in zip(fits, GROUPS, before, strict=True):
        assert_same(uses(fit, y), expected)
    assert_same(uses(copy.deepcopy(fits[0]), GROUPS[0]), before[0])
    assert_same(uses(pickle.loads(pickle.dumps(fits[0])), GROUPS[0]), before[0])
    assert fits[0].draws.values["mu"].mean() != fits[1].draws.values["mu"].mean()


@pytest.mark.parametrize("Guide", [fast, AutoNormal])
def test_groups_of_another_size(Guide):
    fits = [quick(each_datum, Guide(each_datum), y) for y in GROUPS]
    assert [fit.draws.values["mu"].shape[1] for fit in fits] == [3, 3, 4]
    for fit, y in zip(fits, GROUPS, strict=True):
        assert fit.guide(y)["mu"].shape == y.shape


@pytest.mark.parametrize("Guide", [fast, AutoNormal])
def test_another_model_with_the_same_guide_class(Guide):
    first = quick(mean_model, Guide(mean_model), GROUPS[0])
    before = uses(first, GROUPS[0])
    second = quick(each_datum, Guide(each_datum), GROUPS[2])
    third = quick(mean_model, Guide(mean_model), GROUPS[0])
    assert_same(uses(first, GROUPS[0]), before)
    assert_same(uses(third, GROUPS[0]), before)
    assert second.guide(GROUPS[2])["mu"].shape == (4,)


@pytest.mark.parametrize("make", [GUIDES["flow"], GUIDES["normal"]], ids=["flow", "normal"])
def test_a_guide_that_was_not_trained_adopts_nothing(make):
    y = GROUPS[0]
    expected = quick(mean_model, make(), y, seed=0)
    stranger = make()
    svi = SVI(mean_model, stranger, pyro.optim.Adam({"lr": 0.5}), Trace_ELBO())
    for _ in range(5):
        svi.step(GROUPS[2])
    assert len(pyro.get_param_store()) > 0
    fit = quick(mean_model, make(), y, seed=0)
    np.testing.assert_array_equal(fit.losses, expected.losses)
    assert_same(uses(fit, y), uses(expected, y))


def test_a_store_is_left_as_it_was():
    pyro.param("mine", torch.tensor(3.0))
    svi = SVI(mean_model, AutoNormal(mean_model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(GROUPS[0])
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    quick(mean_model, AutoNormal(mean_model), GROUPS[2])
    quick(mean_model, mean_function, GROUPS[2])
    after = dict(pyro.get_param_store().items())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


# --- the guide that was given -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [GUIDES["flow"], GUIDES["normal"]], ids=["flow", "normal"])
def test_the_guide_itself_is_trained_and_keeps_its_parameters(make):
    guides = [make() for _ in GROUPS]
    fits = [quick(mean_model, guide, y) for guide, y in zip(guides, GROUPS, strict=True)]
    pyro.clear_param_store()
    for guide, fit, y in zip(guides, fits, GROUPS, strict=True):
        assert guide is not fit.guide
        assert torch.equal(guide.median(y)["mu"], fit.guide.median(y)["mu"])


@pytest.mark.parametrize("make", [GUIDES["flow"], GUIDES["normal"]], ids=["flow", "normal"])
def test_training_further_leaves_the_earlier_fit_alone(make):
    y, guide = GROUPS[0], make()
    first = quick(mean_model, guide, y)
    before = uses(first, y)
    # From the same parameters: the guide that was given, and the copy in the result.
    second, third = (quick(mean_model, each, y, seed=3, num_steps=5) for each in (guide, first.guide))
    np.testing.assert_array_equal(second.losses, third.losses)
    assert_same(uses(second, y), uses(third, y))
    assert_same(uses(first, y), before)
    assert not np.array_equal(uses(second, y)["traced"], before["traced"])


def test_plain_svi_shares_by_name():
    first, second = AutoNormal(mean_model), AutoNormal(mean_model)
    for guide in (first, second):
        SVI(mean_model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(GROUPS[0])
    assert torch.equal(first.locs.mu, second.locs.mu)
    # A guide that was fitted goes on by hand with what it has.
    fitted = AutoNormal(mean_model)
    fit = quick(mean_model, fitted, GROUPS[2])
    start = fit.guide.locs.mu.item()
    assert fitted.locs.mu.item() == start
    svi = SVI(mean_model, fitted, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(3):
        svi.step(GROUPS[2])
    assert start < fitted.locs.mu.item() < start + 0.5
    assert fit.guide.locs.mu.item() == start


# --- parameters of the model --------------------------------------------------------------------------------------------


def with_param(y):
    shift = pyro.param("shift", torch.tensor(0.5))
    scale = pyro.param("noise", torch.tensor(1.0), constraint=dist.constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, 30.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu + shift, scale), obs=y)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.scale = nn.Parameter(torch.tensor(1.0))


class WithClosure:
    """A function that closes over a network; its scale goes into a distribution as it is."""

    def __init__(self):
        self.decoder = Decoder()

    def __call__(self, y):
        decoder = pyro.module("decoder", self.decoder)
        mu = pyro.sample("mu", dist.Normal(0.0, 30.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(decoder.weight * mu, decoder.scale), obs=y)


class WithPyroModule(PyroModule):
    def __init__(self):
        super().__init__()
        self.weight = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)
        self.mu = PyroSample(dist.Normal(0.0, 30.0))

    def forward(self, y):
        mu = self.mu
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(self.weight * mu, 1.0), obs=y)


MODELS = {
    "pyro.param": (lambda: with_param, {"shift", "noise"}),
    "closure": (WithClosure, {"decoder$$$weight", "decoder$$$scale"}),
    "PyroModule": (WithPyroModule, {"weight"}),
}


@pytest.mark.parametrize("Guide", [fast, AutoNormal], ids=["flow", "normal"])
@pytest.mark.parametrize(("make", "names"), MODELS.values(), ids=MODELS)
def test_a_fit_owns_the_parameters_of_the_model(make, names, Guide):
    fits, before = [], []
    model = make()
    for y in GROUPS:
        # One model for all groups, whose network goes on from group to group.
        fits.append(quick(model, Guide(model), y, whiten="init" if Guide is fast else "auto"))
        before.append(uses(fits[-1], y))
    for fit, y, expected in zip(fits, GROUPS, before, strict=True):
        assert fit.parameters.keys() == names
        assert_same(uses(fit, y), expected)
        assert all(name in repr(fit) for name in names)
        assert "owns the parameters" in repr(fit)
    assert_same(uses(copy.deepcopy(fits[0]), GROUPS[0]), before[0])
    assert_same(uses(pickle.loads(pickle.dumps(fits[0])), GROUPS[0]), before[0])
    for name in names:
        assert len({fit.parameters[name].item() for fit in fits}) == 3


@pytest.mark.parametrize(("make", "names"), MODELS.values(), ids=MODELS)
def test_a_model_goes_on_from_the_fit_that_owns_it(make, names):
    model = make()
    first = quick(model, AutoNormal(model), GROUPS[0])
    quick(model, AutoNormal(model), GROUPS[2])
    at_rest = {"num_steps": 1, "optim": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
    again = quick(first.model, first.guide, GROUPS[0], **at_rest)
    for name in names:
        assert torch.equal(again.parameters[name], first.parameters[name]), name
    assert torch.equal(again.guide.locs.mu, first.guide.locs.mu)


def test_a_value_set_by_hand_is_where_the_model_begins():
    pyro.param("shift", torch.tensor(5.0))
    at_rest = {"num_steps": 1, "optim": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
    fit = quick(with_param, AutoNormal(with_param), GROUPS[0], **at_rest)
    assert fit.parameters["shift"] == 5.0
    assert fit.parameters["noise"] == 1.0


def test_a_model_without_parameters_is_the_model_itself():
    fit = quick(mean_model, AutoNormal(mean_model), GROUPS[0])
    assert fit.model is mean_model
    assert fit.parameters == {}
    assert "owns" not in repr(fit)


def test_many_parameters_are_counted():
    def model(y):
        shift = sum(pyro.param(f"p{i}", torch.tensor(0.1)) for i in range(6))
        mu = pyro.sample("mu", dist.Normal(shift, 30.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    fit = quick(model, AutoNormal(model), GROUPS[0])
    assert "owns the parameters p0, p1, p2, p3 and 2 more of the model" in repr(fit)


# --- other processes, other threads -------------------------------------------------------------------------------------

SCRIPT = """
    import pickle, sys
    sys.path[:0] = {paths!r}
    import numpy as np, torch
    import {module} as here
    torch.set_num_threads(1)
    with open({path!r}, "rb") as file:
        fits, expected = pickle.load(file)
    for fit, y, before in zip(fits, here.GROUPS, expected, strict=True):
        found = here.uses(fit, y)
        for name in before:
            np.testing.assert_array_equal(found[name], before[name], err_msg=name)
    print("the same")
"""


@pytest.mark.slow
def test_in_a_fresh_process(tmp_path):
    makes = [GUIDES["flow"], GUIDES["normal"], GUIDES["function"]]
    models = [mean_model, with_param, mean_model]
    fits = [
        quick(model, make() if make() is mean_function else type(make())(model), y)
        for model, make, y in zip(models, makes, GROUPS, strict=True)
    ]
    path = tmp_path / "fits.pickle"
    expected = [uses(fit, y) for fit, y in zip(fits, GROUPS, strict=True)]
    path.write_bytes(pickle.dumps((fits, expected)))
    script = textwrap.dedent(SCRIPT).format(paths=[p for p in sys.path if p], module=__name__, path=str(path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert finished.stdout.strip() == "the same", finished.stderr


def test_two_threads():
    """Pyro's handlers belong to the process: fits wait for one another, and each gives what it gives alone."""
    alone = [quick(mean_model, AutoNormal(mean_model), y) for y in GROUPS]
    together = [None] * 3

    def work(i):
        together[i] = quick(mean_model, AutoNormal(mean_model), GROUPS[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other, y in zip(alone, together, GROUPS, strict=True):
        np.testing.assert_array_equal(one.losses, other.losses)
        assert_same(uses(one, y), uses(other, y))


class Correlation(nn.Module):
    def __init__(self):
        super().__init__()
        self.tril = nn.Parameter(torch.eye(2))


@pytest.mark.parametrize("broadcasts", [True, False])
def test_densities_of_a_fit_are_those_of_its_own_closed_over_parameters(broadcasts):
    """A distribution may hold the parameter itself, and its density is computed after the model has returned."""
    correlation = Correlation()

    def model(y):
        pyro.module("correlation", correlation)
        mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        mu = mu if broadcasts else torch.stack([mu[0], mu[1]])
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.MultivariateNormal(mu.unsqueeze(-2), scale_tril=correlation.tril), obs=y)

    y = torch.randn(5, 2)
    fit = fg.fit(model, AutoNormal(model), y, num_steps=20, num_particles=4, progress=False, seed=0)

    def log_p():
        return fg.draw(fit.model, fit.guide, y, num_samples=10, seed=1).log_p

    before = log_p()
    with torch.no_grad():
        correlation.tril.mul_(5.0)
    torch.testing.assert_close(log_p(), before)
    assert correlation.tril[0, 0].item() > 2
