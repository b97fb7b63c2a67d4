"""What all flow guides share: parameters and buffers in Pyro's store, damping, copies, failed set-ups."""

import copy
import functools
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import Y, conjugate, correlated, eight_schools, train
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList

import pyro_flowguides as fg
from pyro_flowguides.guides.base import FlowGuide


def test_flow_guides_are_flow_guides():
    assert issubclass(fg.AutoFlow, FlowGuide)
    assert issubclass(fg.AmortizedFlow, FlowGuide)


@pytest.mark.parametrize("Guide", [fg.AutoFlow, fg.AmortizedFlow])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flow": "copula"}, "unknown flow 'copula'; known recipes are continuous_planar"),
        ({"init_scale": 0.0}, "init_scale must be a positive number, got 0.0"),
        ({"init_scale": "wide"}, "init_scale must be a positive number"),
        ({"gradient": "score"}, 'gradient must be "total" or "path"'),
        ({"base": "cauchy"}, 'base must be "normal" or "student_t"'),
    ],
)
def test_options_that_are_wrong(Guide, options, message):
    encoder = [lambda y: y] if Guide is fg.AmortizedFlow else []
    with pytest.raises(ValueError, match=f"{Guide.__name__}: {message}"):
        Guide(conjugate, *encoder, **options)


# --- the parameter store -------------------------------------------------------------------------------------------------


def test_the_store_has_every_parameter_and_buffer_of_the_flow():
    guide = fg.AutoFlow(correlated).setup()
    store = pyro.get_param_store()
    for name, parameter in guide.named_parameters():
        assert store[f"AutoFlow.{name}"] is parameter
    state = guide.flow.state_dict()
    shared = {name for name, value in state.items() if value.is_floating_point()}
    assert {"AutoFlow.flow." + name for name in shared} == set(store)


def test_the_store_follows_the_buffers():
    """Through whitening, a loaded state dict and one of a module around the guide."""
    guide = fg.AutoFlow(correlated).setup()
    start = copy.deepcopy(guide.state_dict())

    def shared():
        return {name: pyro.get_param_store()[f"AutoFlow.{name}"].detach() for name, _ in guide.named_parameters()} | {
            f"flow.{name}": pyro.get_param_store()[f"AutoFlow.flow.{name}"].detach()
            for name, buffer in guide.flow.named_buffers()
            if buffer.is_floating_point()
        }

    def same():
        state = guide.state_dict()
        return all(torch.equal(state[name], value) for name, value in shared().items())

    assert same()
    guide.whiten()
    assert same()
    whitened = copy.deepcopy(guide.state_dict())
    assert not torch.equal(whitened["flow.transforms.2.scale"], start["flow.transforms.2.scale"])
    guide.load_state_dict(start)
    assert same()
    torch.nn.ModuleList([guide]).load_state_dict({f"0.{name}": value for name, value in whitened.items()})
    assert same()
    guide.load_state_dict(whitened)
    assert same()


def test_parameters_of_another_model_in_the_store_stay_there():
    """Neither the first attempt nor the next one touches them."""
    fg.AutoPlanar(correlated).setup()
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    guide = fg.AutoPlanar(conjugate)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"holds 'AutoPlanar.flow.* of shape .*clear_param_store"):
            guide.setup(torch.tensor(Y))
    after = pyro.get_param_store()
    assert before.keys() == set(after)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_guide_is_trained_once_a_parameter_is_another():
    guide = fg.AutoFlow(correlated)
    assert not guide.is_trained()
    guide.setup()
    state = copy.deepcopy(guide.state_dict())
    assert not guide.is_trained()
    assert not copy.deepcopy(guide).is_trained()
    guide.whiten()
    assert not guide.is_trained()
    # By as little as one number.
    parameter = next(guide.parameters())
    with torch.no_grad():
        parameter[(0,) * parameter.dim()] += 1e-6
    assert guide.is_trained()
    assert pickle.loads(pickle.dumps(guide)).is_trained()
    pyro.clear_param_store()
    other = fg.AutoFlow(correlated).setup()
    other.load_state_dict(state)
    assert other.is_trained()


# --- damping -------------------------------------------------------------------------------------------------------------


def damped(guide):
    """Whether the couplings are, all of them."""
    (state,) = {module.damped for module in guide.modules() if isinstance(module, fg.transforms.Coupling)}
    return state


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_plain_training_at_a_high_rate_does_not_explode(seed):
    """From a start a tenth as wide as the prior, ten couplings widen together."""
    pyro.set_rng_seed(seed)
    guide = fg.AutoFlow(eight_schools)
    elbo = Trace_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(eight_schools, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    for _ in range(200):
        svi.step()
    # −31.2 where it is exact, and −57 where it starts.
    loss = Trace_ELBO(num_particles=5000, vectorize_particles=True, max_plate_nesting=1).loss(eight_schools, guide)
    assert loss < 40


@pytest.mark.parametrize("local", [False, True])
def test_couplings_are_damped_until_the_guide_is_whitened(local):
    with pyro.settings.context(module_local_params=local):
        guide = fg.AutoFlow(correlated).setup()
        assert damped(guide)
        assert damped(guide.whiten(method="init"))
        start = copy.deepcopy(guide.state_dict())
        assert not damped(guide.whiten())
        assert not damped(copy.deepcopy(guide))
        assert not damped(pickle.loads(pickle.dumps(guide)))
        whitened = copy.deepcopy(guide.state_dict())
        guide.load_state_dict(start)
        assert damped(guide)
        torch.nn.ModuleList([guide]).load_state_dict({f"0.{name}": value for name, value in whitened.items()})
        assert not damped(guide)


def test_which_flows_are_damped():
    two = functools.partial(fg.flows.coupling, num_layers=2)
    for flow, options, expected in (
        ("coupling", {}, True),
        ("nice", {}, True),
        ("spline_coupling", {}, True),
        ("coupling", {"damped": False}, False),
        (fg.flows.coupling, {}, True),
        (two, {}, True),
        (functools.partial(two, damped=False), {}, False),
        (functools.partial(two, damped=True), {"damped": False}, True),
        # The user's own.
        (lambda dim: fg.flows.coupling(dim), {}, False),
        (lambda dim: fg.flows.coupling(dim, damped=True), {"damped": False}, True),
    ):
        pyro.clear_param_store()
        assert damped(fg.AutoFlow(correlated, flow, **options).setup()) is expected
    assert damped(fg.AutoSpline(correlated, damped=False).setup()) is False


def test_amortized_flows_are_damped_if_told():
    y = torch.tensor(Y)

    def model(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    for options, expected in (({}, False), ({"damped": True}, True)):
        pyro.clear_param_store()
        guide = fg.AmortizedFlow(model, lambda y: y.unsqueeze(-1), **options).setup(y)
        assert damped(guide) is expected
        guide.undamp()
        assert not damped(guide)


def test_undamped_guides_are_the_same_function():
    guide = fg.AutoFlow(correlated).setup()
    points = torch.randn(5, 3, dtype=torch.float64)
    before = guide.flow(points)
    guide.undamp()
    # The last layers start at 1e-8 of their usual range.
    torch.testing.assert_close(guide.flow(points), before, rtol=0, atol=1e-9)
    assert not damped(guide)
    assert not guide.is_trained()


def test_fit_ends_damping_without_whitening_too():
    guide = fg.AutoFlow(correlated)
    fg.fit(correlated, guide, num_steps=2, num_particles=2, whiten=None, progress=False)
    assert not damped(guide)
    parts = AutoGuideList(correlated)
    parts.append(fg.AutoFlow(correlated))
    fg.fit(correlated, parts, num_steps=2, num_particles=2, progress=False)
    assert not damped(parts)


def test_a_guide_that_was_trained_while_damped_stays_the_same():
    guide = fg.AutoFlow(correlated)
    train(correlated, guide, steps=3)
    points = torch.randn(5, 3, dtype=torch.float64)
    before = guide.flow(points)
    guide.undamp()
    assert damped(guide)
    torch.testing.assert_close(guide.flow(points), before, rtol=0, atol=0)


@pytest.mark.parametrize("whiten", [False, True])
def test_a_store_and_a_state_dict_bring_the_law_along(whiten, tmp_path):
    """From a guide that was damped and one that was not, to one of the other kind."""
    points = 4 * torch.randn(20, 3, dtype=torch.float64)
    trained = fg.AutoFlow(correlated).setup()
    if whiten:
        trained.whiten()
    train(correlated, trained, steps=5, lr=0.05)
    expected = trained.flow(points).detach()
    state = copy.deepcopy(trained.state_dict())
    pyro.get_param_store().save(tmp_path / "store")

    pyro.clear_param_store()
    loaded = fg.AutoFlow(correlated).setup()
    if not whiten:
        loaded.whiten()
    loaded.load_state_dict(state)
    torch.testing.assert_close(loaded.flow(points), expected, rtol=0, atol=0)

    pyro.clear_param_store()
    stored = fg.AutoFlow(correlated).setup()
    if not whiten:
        stored.whiten()
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    stored()
    torch.testing.assert_close(stored.flow(points), expected, rtol=0, atol=0)

    # A flow outside of a guide, from the state dict alone.
    flow = fg.flows.coupling(3).double()
    flow.load_state_dict(trained.flow.transforms[0].state_dict())
    torch.testing.assert_close(flow(points), trained.flow.transforms[0](points), rtol=0, atol=0)


def test_undamping_needs_a_flow():
    with pytest.raises(RuntimeError, match="is not set up"):
        fg.AutoFlow(correlated).undamp()
