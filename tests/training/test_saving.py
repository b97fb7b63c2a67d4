"""Saved fits: what is read without the model, with it, and with the guide; damaged files; pickles of a script."""

import copy
import json
import math
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from fits import Y, quick
from models import conjugate
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints

import pyro_flowguides as fg
from pyro_flowguides.training import saving

FitResult = fg.FitResult


def scaled(y, x=None):
    """A model with parameters, one of which is constrained."""
    scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    shift = pyro.param("shift", torch.zeros(2))
    mu = pyro.sample("mu", dist.Normal(shift.sum(), scale))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.fixture(scope="module")
def fit():
    pyro.clear_param_store()
    return quick(scaled, fg.AutoPlanar(scaled, num_layers=1), torch.tensor(Y))


@pytest.fixture
def path(fit, tmp_path):
    path = tmp_path / "a.fit"
    fit.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.fit"]
    return path


def test_without_its_model_a_fit_has_its_results(fit, path):
    loaded = FitResult.load(path)
    assert (loaded.elbo, loaded.khat, loaded.ess) == (fit.elbo, fit.khat, fit.ess)
    assert str(loaded.verdict) == str(fit.verdict)
    assert repr(loaded) == repr(fit)
    assert loaded.summary().equals(fit.summary())
    assert torch.equal(loaded.draws.values["mu"], fit.draws.values["mu"])
    np.testing.assert_array_equal(loaded.losses, fit.losses)
    assert loaded.parameters.keys() == fit.parameters.keys()
    tree = loaded.to_arviz(100)
    groups = {
        "posterior",
        "unconstrained_posterior",
        "sample_stats",
        "log_likelihood",
        "observed_data",
        "variational_fit",
    }
    assert (
        groups == {name.strip("/") for name in tree.groups}
        if not callable(tree.groups)
        else groups == set(tree.groups())
    )
    assert tree["log_likelihood"]["y"].shape == (1, 100, 5)
    for call, kind in ((lambda: loaded.guide(torch.tensor(Y)), "guide"), (lambda: loaded.model(), "model")):
        with pytest.raises(ValueError, match=rf"loaded without its {kind} '.*': give it with FitResult.load"):
            call()


def test_with_its_model_a_fit_exports_all_groups(fit, path):
    loaded = FitResult.load(path, model=scaled)
    tree = loaded.to_arviz(50)
    assert tree["posterior_predictive"]["y"].shape == (1, 50, 5)
    assert tree["prior"]["mu"].shape[-1] == 50
    # The model owns the values of the fit.
    with pyro.poutine.trace() as trace:
        loaded.model(torch.tensor(Y))
    for name in ("scale", "shift"):
        torch.testing.assert_close(trace.trace.nodes[name]["value"], fit.parameters[name])
    assert "scale" not in pyro.get_param_store()


@pytest.mark.parametrize("Guide", [lambda model: fg.AutoPlanar(model, num_layers=1), AutoNormal])
def test_with_a_new_guide_a_fit_draws(Guide, tmp_path):
    fit = quick(scaled, Guide(scaled), torch.tensor(Y))
    fit.save(tmp_path / "a.fit")
    loaded = FitResult.load(tmp_path / "a.fit", guide=Guide(scaled))
    one, other = (fg.draw(each.model, each.guide, torch.tensor(Y), num_samples=20, seed=1) for each in (fit, loaded))
    torch.testing.assert_close(one.values["mu"], other.values["mu"])
    torch.testing.assert_close(one.log_p, other.log_p)
    assert len(loaded.to_posterior(30).chains[0]) == 30


def test_restarts_are_saved(tmp_path):
    fit = quick(conjugate, AutoNormal(conjugate), torch.tensor(Y), num_restarts=2, num_steps=3)
    fit.save(tmp_path / "a.fit")
    loaded = FitResult.load(tmp_path / "a.fit")
    assert [draws.elbo for draws in loaded.restarts] == [draws.elbo for draws in fit.restarts]
    assert loaded.to_arviz(30)["posterior"]["mu"].shape == (2, 30)


def test_what_does_not_fit_is_refused(path):
    with pytest.raises(ValueError, match="the fit is of another guide"):
        FitResult.load(path, guide=fg.AutoPlanar(scaled, num_layers=2))
    with pytest.raises(ValueError, match="the model has no parameter 'scale'"):
        FitResult.load(path, model=conjugate)
    with pytest.raises(ValueError, match="plain function does not know its model"):
        FitResult.load(path, guide=lambda y: None)
    with pytest.raises(OSError, match="No such file"):
        FitResult.load(path.with_name("missing"))


def described(**changes):
    text = json.dumps({"format": saving.FORMAT, "version": "0", "content": {"kind": "dict", "items": {}}, **changes})
    return np.frombuffer(text.encode(), dtype=np.uint8)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "format", "lacking", "pickle", "array"])
def test_a_damaged_file_is_refused_and_executes_nothing(damage, path, tmp_path):
    content, trace = bytearray(path.read_bytes()), tmp_path / "trace"

    class Malicious:
        def __reduce__(self):
            return trace.write_text, ("executed",)

    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("no fit")
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(Malicious()))
    else:
        with open(path, "wb") as file:
            if damage == "array":
                np.savez(file, description=np.array([Malicious()], dtype=object))
            else:
                np.savez(file, description=described(format=0) if damage == "format" else described())
    trace.unlink(missing_ok=True)
    reason = {
        "format": f": its format is 0, and this version reads {saving.FORMAT}",
        "lacking": ": it lacks 'losses'",
    }.get(damage, "")
    with pytest.raises(ValueError, match=rf"^FitResult.load: '.*a\.fit' is (damaged or )?no saved fit{reason}"):
        FitResult.load(path)
    assert not trace.exists()


def test_copies_and_pickles_of_a_fit_are_fits():
    fit = quick(conjugate, fg.AutoPlanar(conjugate, num_layers=1), torch.tensor(Y), num_steps=2)
    for again in (copy.deepcopy(fit), pickle.loads(pickle.dumps(fit))):
        assert again.elbo == fit.elbo
        assert torch.equal(again.draws.values["mu"], fit.draws.values["mu"])


SCRIPT = """
    import pickle, sys, warnings
    import pyro, pyro.distributions as dist, torch
    import pyro_flowguides as fg

    def model():
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    fit = fg.fit(model, fg.AutoPlanar(model, num_layers=1), num_steps=2, num_particles=2, progress=False, backend="eager")
    with open(sys.argv[1], "wb") as file:
        pickle.dump(fit, file)
    assert pickle.load(open(sys.argv[1], "rb")).elbo == fit.elbo
    fit.save(sys.argv[2])
"""


def test_a_fit_of_a_script_is_loaded_or_refused_with_a_sentence(tmp_path):
    script, pickled, saved = tmp_path / "script.py", tmp_path / "fit.pickle", tmp_path / "a.fit"
    script.write_text(textwrap.dedent(SCRIPT))
    subprocess.run([sys.executable, str(script), str(pickled), str(saved)], check=True)
    with pytest.raises(pickle.UnpicklingError, match=r"needs 'model', .* \(__main__\): define it .* fit.save\(path\)"):
        pickle.loads(pickled.read_bytes())
    assert "mu" in FitResult.load(saved).summary().index


def test_values_come_back_as_they_were(tmp_path):
    content = {
        "plain": [None, True, 3, 0.1, "text", math.inf],
        "nested": {"a": ({"b": [1, (2,)]}, []), "empty": {}},
        "tensor": torch.arange(6.0, dtype=torch.float64).reshape(2, 3),
        "array": np.array([1, 2], dtype=np.int32),
        "scalar": torch.tensor(2),
    }
    path = tmp_path / "a.npz"
    saving.write(path, content | {"parameter": torch.nn.Parameter(torch.ones(2))})
    found = saving.read(path)
    parameter = found.pop("parameter")
    assert torch.equal(parameter, torch.ones(2))
    assert list(found) == list(content)
    for name in ("plain", "nested"):
        assert found[name] == content[name]
    for name in ("tensor", "scalar"):
        assert torch.equal(found[name], content[name])
        assert found[name].dtype == content[name].dtype
    assert isinstance(found["array"], np.ndarray)
    np.testing.assert_array_equal(found["array"], content["array"], strict=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array(["a"], dtype=object), "an array of objects cannot be written without a pickle"),
        ({1: 2}, "a dict whose keys are not strings cannot be written"),
        ([object()], "a object cannot be written without a pickle"),
    ],
)
def test_what_cannot_be_written(value, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        saving.write(tmp_path / "a.npz", {"value": value})
    assert not list(tmp_path.iterdir())
    assert not saving.can_be_written({"value": value})
    assert saving.can_be_written({"value": [1, torch.ones(2)]})


@pytest.mark.parametrize("value", [object(), torch.tensor([1.0, 2.0])])
def test_arguments_that_cannot_be_saved_leave_the_results(value, tmp_path):
    """A model of an object of one's own: the file has no arguments, and says so where the model is given."""

    def model(given):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(0.3))

    fit = quick(model, AutoNormal(model), value, num_steps=1)
    fit.save(tmp_path / "a.fit")
    assert "mu" in FitResult.load(tmp_path / "a.fit").summary().index
    if isinstance(value, torch.Tensor):
        assert torch.equal(FitResult.load(tmp_path / "a.fit", model=model).args[0], value)
    else:
        with pytest.raises(
            ValueError, match="FitResult.load: the arguments of the model were no arrays or plain values"
        ):
            FitResult.load(tmp_path / "a.fit", model=model)


def test_a_parameter_of_another_shape_is_refused(fit, path):
    def other(y, x=None):
        pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
        pyro.param("shift", torch.zeros(3))
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=r"the model has no parameter 'shift' of shape \(2,\)"):
        FitResult.load(path, model=other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_only_a_module_has_values_to_be_given_to_a_guide(tmp_path):
    def guide(y):
        pyro.sample("mu", dist.Normal(pyro.param("at", torch.tensor(0.3)), 1.0))

    fit = quick(conjugate, guide, torch.tensor(Y), num_steps=1)
    fit.save(tmp_path / "a.fit")
    for given in (guide, AutoNormal(conjugate)):
        with pytest.raises(ValueError, match="the values of a guide that is a plain function are not saved"):
            FitResult.load(tmp_path / "a.fit", model=conjugate, guide=given)
