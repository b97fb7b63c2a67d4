"""The state of a guide: names, parameter store, state dict, copies, files and compiled copies."""

import copy
import io
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_cases import every_guide, small
from models import Y, conjugate, correlated, train
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuideList
from pyro.nn import PyroModule

import pyro_flowguides as fg


def test_second_guide_shares_the_store():
    y = torch.tensor(Y)
    first = fg.AutoFlow(conjugate)
    train(conjugate, first, y, steps=20)
    second = fg.AutoFlow(conjugate).setup(y)
    assert second.is_trained()
    torch.testing.assert_close(second.quantiles([0.1, 0.9])["mu"], first.quantiles([0.1, 0.9])["mu"])
    before = [parameter.clone() for parameter in first.parameters()]
    train(conjugate, second, y, steps=5)
    assert any(not torch.equal(a, b) for a, b in zip(before, first.parameters(), strict=True))


@every_guide
@pytest.mark.parametrize("when", ["before the new guide is set up", "after"])
def test_param_store_round_trip(Guide, when, tmp_path):
    """The fixed map travels with the parameters: its start is random (init_to_median draws from the prior)."""
    y = torch.tensor(Y)
    guide = Guide(conjugate)
    guide.whiten(y)
    train(conjugate, guide, y, steps=20)
    expected = guide.quantiles([0.1, 0.5, 0.9])["mu"]
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    other = Guide(conjugate)
    if when == "after":
        other.setup(y)
        other(y)
        pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    other(y)
    torch.testing.assert_close(other.quantiles([0.1, 0.5, 0.9])["mu"], expected)
    before = expected.clone()
    train(conjugate, other, y, steps=20, lr=0.1)
    assert not torch.allclose(other.quantiles([0.1, 0.5, 0.9])["mu"], before)


@pytest.mark.parametrize("trained", [False, True])
def test_state_dict_round_trip(trained, tmp_path):
    y = torch.tensor(Y)
    guide = fg.AutoFlow(conjugate).setup(y)
    if trained:
        guide.whiten(y)
        train(conjugate, guide, y, steps=10)
    torch.save(guide.state_dict(), tmp_path / "guide.pt")
    pyro.clear_param_store()
    pyro.set_rng_seed(2)
    other = fg.AutoFlow(conjugate).setup(y)
    other.load_state_dict(torch.load(tmp_path / "guide.pt", weights_only=True))
    torch.testing.assert_close(other.quantiles([0.1, 0.9])["mu"], guide.quantiles([0.1, 0.9])["mu"])


@pytest.mark.parametrize("steps", [0, 3])
def test_copies_and_pickles(steps):
    y = torch.tensor(Y)
    guide = fg.AutoFlow(conjugate).setup(y)
    train(conjugate, guide, y, steps=steps)
    expected = guide.quantiles([0.1, 0.9])["mu"]
    copied = copy.deepcopy(guide)
    buffer = io.BytesIO()
    torch.save(guide, buffer)
    buffer.seek(0)
    for other in (copied, pickle.loads(pickle.dumps(guide)), torch.load(buffer, weights_only=False)):
        torch.testing.assert_close(other.quantiles([0.1, 0.9])["mu"], expected)
    assert guide.model is not None
    assert copied.model is guide.model
    train(conjugate, guide, y, steps=2)
    # The copy has parameters of its own until it runs and meets the store under their common name.
    torch.testing.assert_close(copied.quantiles([0.1, 0.9])["mu"], expected)


def serialised():
    pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("plate", 2):
        pyro.sample("y", dist.LogNormal(0.0, 1.0))
        pyro.sample("z", dist.Beta(2.0, 2.0))


def in_a_list(Guide):
    def build(model):
        guide = AutoGuideList(model)
        guide.append(AutoDelta(poutine.block(model, expose=["x"])))
        inner = AutoGuideList(poutine.block(model, hide=["x"]))
        inner.flow_part = Guide(poutine.block(model, hide=["x"]))
        guide.append(inner)
        return guide

    return build


@every_guide
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("jit", [False, True], ids=["torch.save", "torch.jit"])
def test_serves_from_a_file(Guide, nested, jit):
    guide = (in_a_list(small(Guide)) if nested else small(Guide))(serialised)
    guide()
    pyro.set_rng_seed(0)
    expected = guide.call()
    parameters = {name: parameter.detach().clone() for name, parameter in guide.named_parameters()}
    buffer = io.BytesIO()
    if jit:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            torch.jit.save(torch.jit.trace_module(guide, {"call": ()}, check_trace=False), buffer)
        pyro.clear_param_store()
    else:
        torch.save(guide, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer) if jit else torch.load(buffer, weights_only=False)
    pyro.set_rng_seed(0)
    for value, expected_value in zip(loaded.call(), expected, strict=True):
        torch.testing.assert_close(value, expected_value)
    found = dict(loaded.named_parameters())
    assert set(found) == set(parameters)
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name].data, parameter)


@every_guide
def test_moves_between_dtypes(Guide):
    guide = Guide(correlated).setup().float()
    assert guide()["x"].dtype == torch.float32
    guide.double()
    assert guide()["x"].dtype == torch.float64
    posterior = guide.get_posterior()
    assert posterior.log_prob(posterior.sample((3,)).clone()).dtype == torch.float64


def test_model_is_no_submodule():
    model = PyroModule()
    model.forward = lambda: pyro.sample("x", dist.Normal(0.0, 1.0))
    guide = fg.AutoFlow(model).setup()
    assert model not in list(guide.modules())
