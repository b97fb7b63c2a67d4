"""Parameters that belong to a fit stay what they were."""

import copy
import functools
import pickle
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

import pyro_flowguides as fg
from pyro_flowguides.model import ownership

Y, OTHER_Y = torch.tensor([1.0, 2.0, 1.5]), torch.tensor([20.0, 21.0, 19.0, 22.0])


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 30.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def model_with_param(y):
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.deterministic("scale_itself", pyro.param("shift", torch.tensor(0.5)))
    mu = pyro.sample("mu", dist.Normal(0.0, 30.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](1, 1)
        self.scale = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

    def forward(self, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 30.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu + self.linear(torch.ones(1)), self.scale), obs=y)


def guide_function(y):
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("spread", torch.tensor(0.1), constraint=dist.constraints.positive)
    pyro.sample("mu", dist.Normal(loc, scale))


def with_decoder():
    decoder = nn.Linear(1, 1)

    def model(y):
        pyro.module("decoder", decoder)
        z = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.deterministic("weight", decoder.weight)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(decoder(z.reshape(1)), 1.0), obs=y)

    return model, decoder


def fitted(model, guide, y, num_steps=20):
    """What a fit does with its parameters."""
    with ownership.private_store(model, guide) as (model, guide):
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        for _ in range(num_steps):
            svi.step(y)
        return ownership.owned(model, guide)


def facts(model, guide, y):
    """Draws of the guide and the model's values at them."""
    pyro.set_rng_seed(1)
    guide_trace = pyro.poutine.trace(guide).get_trace(y)
    with ownership.values_in_place(model, guide):
        trace = pyro.poutine.trace(pyro.poutine.replay(model, trace=guide_trace)).get_trace(y)
        trace.compute_log_prob()
        values = {
            name: site["value"].detach().clone() for name, site in trace.nodes.items() if site["type"] == "sample"
        }
        return {**values, "log_p": trace.log_prob_sum().detach()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


PAIRS = {
    "AutoNormal": lambda: (model, AutoNormal(model)),
    "AutoCoupling": lambda: (model, fg.AutoCoupling(model)),
    "functions": lambda: (model_with_param, guide_function),
    "function and AutoNormal": lambda: (model_with_param, AutoNormal(model_with_param)),
    "PyroModule": lambda: ((m := Regression()), AutoNormal(m)),
    "closure": lambda: ((m := with_decoder()[0]), AutoNormal(m)),
    "list of guides": lambda: (model, guide_list()),
}


def guide_list():
    guide = AutoGuideList(model)
    guide.append(AutoNormal(pyro.poutine.block(model, expose=["mu"])))
    return guide


every_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def disturb(model, guide):
    """Everything that changes parameters elsewhere."""
    fitted(model, guide if not isinstance(guide, nn.Module) else type(guide)(model), OTHER_Y)
    store = pyro.get_param_store()
    pyro.clear_param_store()
    for name in (
        "AutoNormal.locs.mu",
        "AutoCoupling.flow.x",
        "loc",
        "scale",
        "shift",
        "decoder$$$weight",
        "linear.weight",
    ):
        pyro.param(name, torch.tensor(77.0))
    state = store.get_state()
    pyro.clear_param_store()
    store.set_state(state)


@every_pair
def test_nothing_changes_what_a_fit_owns(pair):
    model, guide = pair()
    own_model, own_guide, _ = fitted(model, guide, Y)
    before = facts(own_model, own_guide, Y)
    assert not torch.equal(before["mu"], facts(*fitted(*pair(), OTHER_Y)[:2], Y)["mu"])
    if not isinstance(guide, AutoGuideList):
        disturb(model, guide)
    assert_same(facts(own_model, own_guide, Y), before)


@every_pair
def test_a_guide_that_is_trained_further_leaves_the_fit_alone(pair):
    model, guide = pair()
    own_model, own_guide, _ = fitted(model, guide, Y)
    before = facts(own_model, own_guide, Y)
    again_model, again_guide, _ = fitted(model, guide, OTHER_Y, num_steps=40)
    third = fitted(own_model, own_guide, OTHER_Y, num_steps=40)
    assert_same(facts(own_model, own_guide, Y), before)
    # All three are different.
    draws = [facts(*each, Y)["mu"] for each in ((again_model, again_guide), third[:2], (own_model, own_guide))]
    assert len({round(float(each), 6) for each in draws}) >= 2


@every_pair
def test_training_goes_on_from_what_a_fit_owns(pair):
    """Without a step in between nothing changes; the step count alone is 0, so that parameters are found by a run."""
    model, guide = pair()
    own_model, own_guide, parameters = fitted(model, guide, Y)
    with ownership.private_store(own_model, own_guide) as (trained_model, trained_guide):
        Trace_ELBO().loss(trained_model, trained_guide, Y)
        again_model, again_guide, again = ownership.owned(trained_model, trained_guide)
    assert_same(again, parameters)
    assert_same(facts(again_model, again_guide, Y), facts(own_model, own_guide, Y))


@every_pair
def test_copies_and_pickles(pair):
    model, guide = pair()
    own_model, own_guide, _ = fitted(model, guide, Y)
    before = facts(own_model, own_guide, Y)
    assert_same(facts(*copy.deepcopy((own_model, own_guide)), Y), before)
    if "<locals>" not in getattr(getattr(own_model, "function", own_model), "__qualname__", ""):
        again = pickle.loads(pickle.dumps((own_model, own_guide)))
        assert_same(facts(*again, Y), before)


def test_what_the_model_has_trained_is_known():
    own_model, _, parameters = fitted(model_with_param, AutoNormal(model_with_param), Y)
    assert set(parameters) == {"scale", "shift"}
    assert parameters["scale"].item() > 0
    assert parameters["scale"].item() != 1.0


@pytest.mark.parametrize("make", [AutoNormal, fg.AutoCoupling])
def test_a_model_without_parameters_stays_itself(make):
    own_model, _, parameters = fitted(model, make(model), Y)
    assert own_model is model
    assert parameters == {}


def test_a_module_that_a_function_closes_over_gets_back_what_it_had():
    model, decoder = with_decoder()
    own_model, own_guide, _ = fitted(model, AutoNormal(model), Y)
    with torch.no_grad():
        decoder.weight.fill_(5.0)
    values = facts(own_model, own_guide, Y)
    assert decoder.weight.item() == 5.0
    assert values["weight"].item() != 5.0
    alone = Predictive(own_model, guide=own_guide, num_samples=3)(Y)
    assert torch.equal(alone["weight"], values["weight"].expand_as(alone["weight"]))


def test_a_module_of_another_size_is_named():
    model, decoder = with_decoder()
    own_model, own_guide, _ = fitted(model, AutoNormal(model), Y)
    decoder.weight = nn.Parameter(torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"parameter 'decoder\$\$\$weight' has shape \(2, 1\)"):
        facts(own_model, own_guide, Y)


@pytest.mark.parametrize("make", [AutoNormal, fg.AutoCoupling])
def test_a_guide_never_takes_a_stranger_s_parameters(make):
    pyro.set_rng_seed(0)
    guide = make(model)
    guide(Y)
    for name, _ in list(pyro.get_param_store().named_parameters()):
        value = pyro.get_param_store()[name].detach().clone()
        pyro.get_param_store()[name] = value + 3.0
    guide = make(model)
    with ownership.private_store(model, guide) as (_, trained):
        trained(Y)
        values = {name: leaf.detach().clone() for name, leaf in trained.named_parameters()}
    pyro.clear_param_store()
    alone = make(model)
    alone(Y)
    for name, leaf in alone.named_parameters():
        if "locs" in name or "scales" in name or "affine" in name:
            torch.testing.assert_close(values[name], leaf.detach())


def test_a_trained_guide_keeps_its_parameters_to_itself():
    guides = [AutoNormal(model), AutoNormal(model)]
    for guide, y in zip(guides, (Y, OTHER_Y), strict=True):
        fitted(model, guide, y, num_steps=60)
    medians = [guide.median()["mu"].item() for guide in guides]
    assert medians[0] < 3 < 5 < medians[1]
    assert [guide(Y)["mu"].isfinite().item() for guide in guides] == [True, True]
    assert [guide.median()["mu"].item() for guide in guides] == medians
    assert not list(pyro.get_param_store())


def test_an_error_leaves_the_store_as_it_was():
    pyro.param("mine", torch.tensor(3.0))

    def fail():
        with ownership.private_store(model, guide_function):
            pyro.param("loc", torch.tensor(1.0))
            pyro.clear_param_store()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(pyro.get_param_store()) == ["mine"]


def test_hand_set_values_of_functions_are_where_a_fit_begins():
    pyro.param("loc", torch.tensor(40.0))
    with ownership.private_store(model, guide_function):
        assert pyro.param("loc", torch.tensor(0.0)).item() == 40.0
        pyro.get_param_store()["loc"] = torch.tensor(41.0)
    assert pyro.param("loc").item() == 40.0


def test_one_thread_at_a_time():
    inside, most = [], []

    def work():
        with ownership.private_store(model, guide_function):
            inside.append(1)
            most.append(len(inside))
            fitted(model, guide_function, Y, num_steps=5)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


def test_svi_by_hand_goes_on_with_a_guide_that_was_fitted():
    guide = AutoNormal(model)
    fitted(model, guide, Y)
    before = guide(Y)["mu"].item()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1.0}), Trace_ELBO())
    for _ in range(30):
        svi.step(OTHER_Y)
    assert guide(Y)["mu"].item() > before + 5


def test_a_partial_model_is_wrapped():
    own_model, own_guide, parameters = fitted(functools.partial(model_with_param), AutoNormal(model_with_param), Y)
    assert set(parameters) == {"scale", "shift"}
    assert set(facts(own_model, own_guide, Y)) >= {"mu", "scale_itself"}


@pytest.mark.parametrize("make", [AutoNormal, fg.AutoCoupling])
@pytest.mark.parametrize("whose", ["fit", "user"])
def test_a_guide_that_is_frozen_stays_frozen(make, whose):
    guide = make(model)
    _, own_guide, _ = fitted(model, guide, Y)
    frozen = (own_guide if whose == "fit" else guide).requires_grad_(False)
    for each in (frozen, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        each(Y)
        assert not [name for name, leaf in each.named_parameters() if leaf.requires_grad]
