"""CompiledSVI: the same steps as Pyro's SVI; nothing that a graph has baked in goes stale; refusals; rollbacks; memory."""

import functools
import os
import random
import types
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from models import conjugate
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal

import pyro_flowguides as fg
from pyro_flowguides import CompiledSVI
from pyro_flowguides.compiled import svi as svi_module

Y = [0.3, 1.4, 2.2, 0.7, 1.9]


@pytest.fixture
def y(dtype):
    return torch.tensor(Y, dtype=dtype)


def compiled(model, guide=None, *, rate=0.05, elbo=None, **options):
    guide = AutoNormal(model) if guide is None else guide
    return CompiledSVI(model, guide, pyro.optim.Adam({"lr": rate}), elbo or Trace_ELBO(), **options)


def parameters():
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


# --- the same steps as Pyro -------------------------------------------------------------------------------------------


def per_parameter(name):
    return {"lr": 0.1} if "locs" in name else {"lr": 0.01}


OPTIMIZERS = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.05}),
    "AdamW": lambda: pyro.optim.AdamW({"lr": 0.05, "weight_decay": 0.1}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.9, "clip_norm": 0.7}),
    "SGD": lambda: pyro.optim.SGD({"lr": 0.001, "momentum": 0.9}),
    "RMSprop": lambda: pyro.optim.RMSprop({"lr": 0.01}),
    "for each parameter": lambda: pyro.optim.Adam(per_parameter),
    "clip_args": lambda: pyro.optim.Adam({"lr": 0.05}, {"clip_norm": 0.5}),
    "scheduler": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.8}
    ),
}


def trajectory(make, num_steps, y):
    """Losses and parameters of some steps from the same start."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = make(AutoNormal(conjugate))
    losses = []
    for _ in range(num_steps):
        losses.append(svi.step(y))
        if isinstance(svi.optim, pyro.optim.PyroLRScheduler):
            svi.optim.step()
    return losses, parameters()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["replay", "eager"])
def test_the_same_steps_as_pyro(name, backend, y):
    optimizer = OPTIMIZERS[name]
    ours = trajectory(lambda guide: CompiledSVI(conjugate, guide, optimizer(), Trace_ELBO(), backend=backend), 12, y)
    theirs = trajectory(lambda guide: SVI(conjugate, guide, optimizer(), Trace_ELBO()), 12, y)
    tolerance = 1e-10 if y.dtype == torch.float64 else 1e-4
    np.testing.assert_allclose(ours[0], theirs[0], rtol=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for key, value in ours[1].items():
        torch.testing.assert_close(value, theirs[1][key], rtol=tolerance, atol=tolerance)


def test_steps_and_runs_are_the_same(y):
    def losses(advance):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        return advance(compiled(conjugate, backend="replay"))

    by_step = losses(lambda svi: [svi.step(y) for _ in range(60)])
    by_run = losses(lambda svi: svi.run(60, y).tolist())
    assert by_step == by_run


@pytest.mark.slow
def test_inductor_draws_the_same_numbers(y):
    if not svi_module.backends.has_compiler(y.device):
        pytest.skip("no compiler")
    runs = {}
    for backend in ("replay", "inductor"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = compiled(conjugate, fg.AutoPlanar(conjugate, num_layers=1), backend=backend)
        runs[backend] = svi.run(20, y), parameters()
        assert all(capture.compiled == (backend == "inductor") for capture in svi._captures.values())
    torch.testing.assert_close(runs["inductor"][0], runs["replay"][0], rtol=1e-4, atol=1e-4)
    for key, value in runs["inductor"][1].items():
        torch.testing.assert_close(value, runs["replay"][1][key], rtol=1e-4, atol=1e-4)


def test_the_step_leaves_buffers_as_pyro_does():
    """The running means of BatchNorm, and tensors that a model counts in, see each step once."""
    ends = []
    for make in (
        SVI,
        functools.partial(CompiledSVI, backend="replay"),
        functools.partial(CompiledSVI, backend="eager"),
    ):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        norm, calls = torch.nn.BatchNorm1d(2), torch.zeros(())

        def model(x, norm=norm, calls=calls):
            calls.add_(1)
            pyro.module("norm", norm)
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(mu, 1.0).expand([2]).to_event(1), obs=norm(x))

        x = torch.tensor([[0.1, 2.0], [0.7, -1.0], [0.4, 0.3]])
        svi = make(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        svi.guide(x)  # Runs the model once, for the shapes of its sites.
        for _ in range(4):
            svi.step(x)
        ends.append((norm.running_mean.clone(), norm.running_var.clone(), int(norm.num_batches_tracked), float(calls)))
    for end in ends[1:]:
        torch.testing.assert_close(end[:2], ends[0][:2])
        assert end[2:] == ends[0][2:]


# --- nothing goes stale -----------------------------------------------------------------------------------------------

SCALE = 1.0
settings = types.ModuleType("settings_of_the_test")
settings.scale = 1.0


def scaled(get):
    """A model whose prior has a standard deviation from somewhere."""

    def model():
        pyro.sample("x", dist.Normal(0.0, get()))

    return model


class WithAttribute:
    scale = 1.0

    def __init__(self):
        self.own = 1.0

    def by_class(self):
        pyro.sample("x", dist.Normal(0.0, self.scale))

    def by_instance(self):
        pyro.sample("x", dist.Normal(0.0, self.own))

    def __call__(self):
        pyro.sample("x", dist.Normal(0.0, SCALE))


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self):
        pyro.sample("x", dist.Normal(0.0, self.scale if self.training else 3.0))


def closure_float():
    scale = 1.0

    def change():
        nonlocal scale
        scale = 3.0

    return scaled(lambda: scale), change


def closure_list():
    values = [1.0]
    return scaled(lambda: values[0]), lambda: values.__setitem__(0, 3.0)


def closure_dict():
    values = {"scale": 1.0}
    return scaled(lambda: values["scale"]), lambda: values.update(scale=3.0)


def closure_array():
    values = np.ones(1)
    return scaled(lambda: torch.as_tensor(values[0]).clone()), lambda: values.fill(3.0)


def closure_tensor_rebound():
    scale = torch.tensor(1.0)

    def change():
        nonlocal scale
        scale = torch.tensor(3.0)

    return scaled(lambda: scale), change


def closure_tensor_edited():
    scale = torch.tensor(1.0)
    return scaled(lambda: scale), lambda: scale.fill_(3.0)


def closure_tensor_folded():
    """The function of the tensor is a constant of the graph, computed once."""
    log_scale = torch.tensor(0.0)
    return scaled(lambda: log_scale.exp()), lambda: log_scale.fill_(np.log(3.0))


def global_variable():
    def change():
        global SCALE
        SCALE = 3.0

    return scaled(lambda: SCALE), change


def global_seen_by_a_method():
    def change():
        global SCALE
        SCALE = 3.0

    return WithAttribute(), change


def attribute_of_a_module_of_python():
    return scaled(lambda: settings.scale), lambda: setattr(settings, "scale", 3.0)


def attribute_of_the_instance():
    owner = WithAttribute()
    return owner.by_instance, lambda: setattr(owner, "own", 3.0)


def attribute_of_the_class():
    return WithAttribute().by_class, lambda: setattr(WithAttribute, "scale", 3.0)


def scale_of_a_handler():
    handler = poutine.scale(scale=1.0)

    def model():
        with handler:
            pyro.sample("x", dist.Normal(0.0, 1.0))

    return model, lambda: setattr(handler, "scale", 3.0)


def wrapped_in_a_handler():
    model = poutine.scale(scaled(lambda: 1.0), scale=1.0)
    handler = next(part for part in model.args if isinstance(part, poutine.scale_messenger.ScaleMessenger))
    return model, lambda: setattr(handler, "scale", 3.0)


def train_and_eval():
    module = Module()
    return module, lambda: module.eval()


def rebound_buffer():
    module = Module()
    return module, lambda: module.register_buffer("scale", torch.tensor(3.0))


CHANGES = [
    closure_float,
    closure_list,
    closure_dict,
    closure_array,
    closure_tensor_rebound,
    closure_tensor_edited,
    closure_tensor_folded,
    global_variable,
    global_seen_by_a_method,
    attribute_of_a_module_of_python,
    attribute_of_the_instance,
    attribute_of_the_class,
    scale_of_a_handler,
    wrapped_in_a_handler,
    train_and_eval,
    rebound_buffer,
]


def at_two():
    pyro.sample("x", dist.Delta(pyro.param("at", torch.tensor(2.0))))


@pytest.fixture
def restored(monkeypatch):
    monkeypatch.setitem(globals(), "SCALE", 1.0)
    monkeypatch.setattr(settings, "scale", 1.0)
    monkeypatch.setattr(WithAttribute, "scale", 1.0)


@pytest.mark.parametrize("make", CHANGES, ids=lambda make: make.__name__)
def test_what_changes_is_seen(make, restored):
    model, change = make()
    svi = CompiledSVI(model, at_two, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(), backend="replay")
    before = svi.step()
    assert before == pytest.approx(-float(dist.Normal(0.0, 1.0).log_prob(torch.tensor(2.0))))
    assert svi.step() == before
    change()
    changed = svi.step()
    assert changed == pytest.approx(Trace_ELBO().loss(model, at_two))
    assert changed != pytest.approx(before)
    assert svi.step() == changed
    assert svi.backend == "replay"


def with_scale(scale, x=None):
    pyro.sample("x", dist.Normal(0.0, torch.as_tensor(scale)).expand([1]).to_event(1))


def delta_with_scale(scale, x=None):
    pyro.sample("x", dist.Delta(pyro.param("at", torch.full((1,), 2.0)), event_dim=1))


@pytest.mark.parametrize(
    "values",
    [
        (1.0, 3.0),
        (1, 3),
        (torch.tensor(1.0), torch.tensor(3.0)),
        (torch.tensor(1.0), torch.tensor([3.0])),
        (torch.tensor(1.0), torch.tensor(3.0, dtype=torch.float64)),
        (torch.tensor(1.0), torch.tensor(3.0, requires_grad=True)),
        (np.array(1.0), np.array(3.0)),
        (types.SimpleNamespace(scale=1.0), types.SimpleNamespace(scale=3.0)),
    ],
    ids=["float", "int", "tensor", "shape", "dtype", "requires_grad", "array", "object"],
)
def test_arguments_that_change(values):
    def model(given):
        with_scale(getattr(given, "scale", given))

    svi = CompiledSVI(model, delta_with_scale, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(), backend="replay")
    for value in (*values, *values):
        expected = Trace_ELBO().loss(model, delta_with_scale, value)
        assert svi.step(value) == pytest.approx(expected, rel=1e-5)
    only_values = isinstance(values[0], torch.Tensor) and isinstance(values[1], torch.Tensor)
    same = only_values and values[0].shape == values[1].shape and values[0].dtype == values[1].dtype
    assert len(svi._captures) == (1 if same and not values[1].requires_grad else 2)


def test_an_object_given_as_an_argument_is_looked_into():
    given = types.SimpleNamespace(scale=1.0)

    def model(given):
        with_scale(given.scale)

    svi = CompiledSVI(model, delta_with_scale, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(), backend="replay")
    before = svi.step(given)
    given.scale = 3.0
    assert svi.step(given) != pytest.approx(before)


def test_the_default_dtype_is_seen():
    before = torch.get_default_dtype()
    svi = compiled(scaled(lambda: 1.0), at_two, backend="replay", rate=0.0)
    try:
        svi.run(2)
        torch.set_default_dtype(torch.float32 if before == torch.float64 else torch.float64)
        svi.step()
    finally:
        torch.set_default_dtype(before)
    assert len(svi._captures) == 2


def test_captures_are_bounded_and_what_keeps_changing_runs_eagerly():
    """An argument that is a new number at each step, such as an annealed weight, must not be captured again and again."""
    svi = CompiledSVI(with_scale, delta_with_scale, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(), backend="replay")
    scales = [1.0 + 0.1 * step for step in range(svi_module.MAX_CAPTURES + svi_module.MAX_WASTED + 3)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = [svi.step(scale) for scale in scales]
    assert len(caught) == 1
    assert "keeps changing" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert len(svi._captures) <= svi_module.MAX_CAPTURES
    assert losses == pytest.approx(
        [Trace_ELBO().loss(with_scale, delta_with_scale, scale) for scale in scales], rel=1e-5
    )


def test_a_variable_that_keeps_changing_runs_eagerly():
    scale = torch.tensor(1.0)
    holder = {"scale": 1.0}
    svi = compiled(scaled(lambda: holder["scale"] * scale), at_two, backend="replay", rate=0.0)

    def step(value):
        holder["scale"] = value
        return svi.step()

    with pytest.warns(
        UserWarning, match="keeps changing.*'scale' was 6.0 when the step was captured and is 7.0"
    ) as caught:
        losses = [step(1.0 + number) for number in range(8)]
    assert len(caught) == 1
    expected = [-float(dist.Normal(0.0, 1.0 + step).log_prob(torch.tensor(2.0))) for step in range(8)]
    assert losses == pytest.approx(expected, rel=1e-5)


def test_a_cleared_store_starts_again():
    for guide in (at_two, AutoDelta(scaled(lambda: 1.0))):
        pyro.clear_param_store()
        svi = compiled(scaled(lambda: 1.0), guide, backend="replay")
        svi.run(3)
        pyro.clear_param_store()
        svi.step()
        assert list(pyro.get_param_store().keys())
        before = parameters()
        svi.step()
        assert any(not torch.equal(before[name], value) for name, value in parameters().items())
    pyro.clear_param_store()
    svi = compiled(scaled(lambda: 1.0), at_two, backend="replay")
    first = svi.step()
    svi.step()
    pyro.clear_param_store()
    assert svi.step() == first


def test_a_loaded_store_is_trained_on(tmp_path, y):
    svi = compiled(conjugate, backend="replay")
    svi.run(3, y)
    path = tmp_path / "params.pt"
    pyro.get_param_store().save(path)
    saved = parameters()
    svi.run(3, y)
    pyro.get_param_store().load(path)
    svi.step(y)
    now = parameters()
    for name, value in now.items():
        assert not torch.equal(value, saved[name])
        torch.testing.assert_close(value, saved[name], atol=0.2, rtol=0.2)
    torch.testing.assert_close(svi.guide.median(y)["mu"], now["AutoNormal.locs.mu"])


def test_a_state_loaded_between_steps(y):
    guide = fg.AutoPlanar(conjugate, num_layers=1)
    svi = compiled(conjugate, guide, backend="replay", rate=0.0)
    svi.step(y)
    state = {name: value + 0.5 if value.is_floating_point() else value for name, value in guide.state_dict().items()}
    guide.load_state_dict(state)
    pyro.set_rng_seed(1)
    loss = svi.step(y)
    pyro.set_rng_seed(1)
    assert loss == pytest.approx(Trace_ELBO().loss(conjugate, guide, y), rel=1e-5)
    for name, value in guide.state_dict().items():
        torch.testing.assert_close(value, state[name])


def test_another_dtype_between_steps(y):
    with pyro.settings.context(module_local_params=True):
        guide = fg.AutoPlanar(conjugate, num_layers=1)
        svi = compiled(conjugate, guide, backend="replay")
        svi.run(3, y.float())
        guide.to(torch.float64)
        before = [parameter.detach().clone() for parameter in guide.parameters()]
        svi.run(3, y.double())
        for parameter, old in zip(guide.parameters(), before, strict=True):
            assert parameter.dtype == torch.float64
            assert not torch.equal(parameter, old)


def test_a_frozen_parameter_stays(y):
    svi = compiled(conjugate, backend="replay")
    svi.step(y)
    guide = svi.guide
    loc = (
        dict(guide.named_parameters())["locs.mu_unconstrained"]
        if False
        else next(leaf for name, leaf in guide.named_parameters() if "locs" in name)
    )
    loc.requires_grad_(False)
    before = parameters()
    svi.run(3, y)
    after = parameters()
    assert torch.equal(after["AutoNormal.locs.mu"], before["AutoNormal.locs.mu"])
    assert not torch.equal(after["AutoNormal.scales.mu"], before["AutoNormal.scales.mu"])
    loc.requires_grad_(True)
    svi.run(3, y)
    assert not torch.equal(parameters()["AutoNormal.locs.mu"], before["AutoNormal.locs.mu"])


# --- refusals ---------------------------------------------------------------------------------------------------------


def data_dependent_if(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    if mu > 0:  # the line that a warning must name
        mu = 2 * mu
    pyro.sample("y", dist.Normal(mu, 1.0).expand(y.shape).to_event(1), obs=y)


def item(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    weight = mu.abs().item()  # the line that a warning must name
    pyro.sample("y", dist.Normal(mu * weight, 1.0).expand(y.shape).to_event(1), obs=y)


def boolean_index(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    chosen = mu[mu > 0]
    pyro.factor("chosen", -(chosen**2).sum())
    pyro.factor("y", -((mu - y) ** 2).sum())


def to_numpy(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    weight = 1 + float(np.abs(mu.detach().numpy()))
    pyro.sample("y", dist.Normal(mu * weight, 1.0).expand(y.shape).to_event(1), obs=y)


def python_random(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu * random.random(), 1.0).expand(y.shape).to_event(1), obs=y)


def numpy_random(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mu * np.random.rand(), 1.0).expand(y.shape).to_event(1), obs=y)


def long_loop(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    state = mu
    for _ in range(5000):
        state = 0.99 * state + 0.01
    pyro.sample("y", dist.Normal(state, 1.0).expand(y.shape).to_event(1), obs=y)


def sequential_plate(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for index in pyro.plate("data", len(y), subsample_size=2):
        pyro.sample(f"y_{index}", dist.Normal(mu, 1.0), obs=y[index])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (data_dependent_if, r"after sample site 'mu', .*line \d+: if mu > 0.*: it looks at the value of a tensor"),
        (
            item,
            r"after sample site 'mu', .*line \d+: weight = mu.abs\(\).item\(\).*: it looks at the value of a tensor",
        ),
        (boolean_index, "selects elements by a condition"),
        (to_numpy, "is not that of the captured step"),
        (python_random, "is not that of the captured step"),
        (numpy_random, "is not that of the captured step"),
        (long_loop, "operations, .* of them after sample site 'mu': a loop in Python"),
        (sequential_plate, r"after sample site 'data', .*line \d+: for index in pyro.plate"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_captured_runs_eagerly_with_one_warning(model, message, monkeypatch):
    monkeypatch.setattr(svi_module.capture, "MAX_OPERATIONS", 4000)
    y = torch.tensor(Y)
    guide = AutoNormal(model)
    guide(y)
    initial = pyro.get_param_store().get_state()
    initial["params"] = {name: value.detach().clone().requires_grad_() for name, value in initial["params"].items()}

    def losses(svi):
        pyro.get_param_store().set_state(
            {
                **initial,
                "params": {name: value.detach().clone().requires_grad_() for name, value in initial["params"].items()},
            }
        )
        pyro.set_rng_seed(0)
        return [svi.step(y) for _ in range(4)]

    with pytest.warns(UserWarning, match=message) as caught:
        ours = losses(compiled(model, guide))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    theirs = losses(SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_counter_of_steps_runs_eagerly():
    """It counts the runs of the model that capturing has made, but never goes stale."""
    count = 0

    def model(y):
        nonlocal count
        count += 1
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("annealed", -min(1.0, count / 100) * ((mu - y) ** 2).sum())

    def guide(y):
        pyro.sample("mu", dist.Delta(pyro.param("at", torch.tensor(0.5))))

    y = torch.tensor(Y)
    svi = compiled(model, guide, rate=0.0)
    with pytest.warns(UserWarning, match="eagerly") as caught:
        losses = [svi.step(y) for _ in range(10)]
    assert len(caught) == 1
    rises = np.diff(losses)
    assert rises[-3:] == pytest.approx(float(((0.5 - y) ** 2).sum()) / 100, rel=1e-3)


def test_a_warning_points_to_the_line_of_a_run():
    svi = compiled(data_dependent_if)
    with pytest.warns(UserWarning, match="eagerly") as caught:
        svi.run(2, torch.tensor(Y))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("kind", ["backend", "average", "optim", "schedule", "no gradient"])
def test_wrong_options(kind, y):
    adam = pyro.optim.Adam({"lr": 0.1})
    if kind == "backend":
        with pytest.raises(ValueError, match="backend must be one of auto, replay, inductor, eager, got 'jit'"):
            CompiledSVI(conjugate, AutoNormal(conjugate), adam, Trace_ELBO(), backend="jit")
    elif kind == "average":
        with pytest.raises(ValueError, match="average must be between 0 and 1, got 1.5"):
            CompiledSVI(conjugate, AutoNormal(conjugate), adam, Trace_ELBO(), average=1.5)
    elif kind == "optim":
        with pytest.raises(TypeError, match="optim must be a Pyro optimiser or a function"):
            CompiledSVI(conjugate, AutoNormal(conjugate), 0.1, Trace_ELBO())
    elif kind == "schedule":
        with pytest.raises(ValueError, match="takes no schedule; use Pyro's own"):
            CompiledSVI(
                conjugate,
                AutoNormal(conjugate),
                pyro.optim.Adam(per_parameter),
                Trace_ELBO(),
                schedule=lambda step: 1.0,
            )
    else:
        svi = CompiledSVI(lambda: None, lambda: None, adam, Trace_ELBO())
        with pytest.raises(ValueError, match="no gradient to any parameter"):
            svi.step()


def test_parameters_on_several_devices():
    if not torch.cuda.is_available():
        pytest.skip("needs two devices")

    def guide():
        pyro.sample("x", dist.Delta(pyro.param("x_at", torch.zeros((), device="cpu"))))
        pyro.sample("z", dist.Delta(pyro.param("z_at", torch.zeros((), device="cuda"))))

    def model():
        pyro.sample("x", dist.Normal(torch.zeros((), device="cpu"), 1.0))
        pyro.sample("z", dist.Normal(torch.zeros((), device="cuda"), 1.0))

    with pytest.raises(ValueError, match="on several devices"):
        compiled(model, guide).step()


# --- guard ------------------------------------------------------------------------------------------------------------


def switched(broken):
    """A model whose likelihood is NaN while a tensor says so."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("broken", torch.where(broken, torch.nan, -1.0) * (mu - 1) ** 2)

    return model


@pytest.mark.parametrize("backend", ["replay", "eager"])
@pytest.mark.parametrize("optimizer", ["Adam", "SGD", "for each parameter"])
def test_a_step_that_is_not_finite_changes_nothing(backend, optimizer, y):
    broken = torch.tensor(False)
    model = switched(broken)
    svi = CompiledSVI(model, AutoNormal(model), OPTIMIZERS[optimizer](), Trace_ELBO(), backend=backend)
    for _ in range(3):
        svi.step(y)
    before = svi.snapshot()
    broken.fill_(True)
    assert np.isnan(svi.step(y))
    after = svi.snapshot()
    for name, rows in before.rows.items():
        assert torch.equal(after.rows[name], rows)
    assert str(before.optimizer) == str(after.optimizer)
    assert svi.num_skipped == 1
    assert svi.scalars.step == 3
    broken.fill_(False)
    assert np.isfinite(svi.step(y))
    after = svi.snapshot()
    for name, rows in before.rows.items():
        assert not torch.equal(after.rows[name], rows)
    assert svi.num_skipped == 1


def test_too_many_skipped_steps_are_an_error(y):
    broken = torch.tensor(False)
    svi = compiled(switched(broken), backend="eager", max_skipped=4)
    svi.run(4, y)
    broken.fill_(True)
    with pytest.raises(
        RuntimeError, match="4 steps in a row .* up to step 8; site 'broken' of the model has log-prob.* nan"
    ):
        svi.run(10, y)


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_an_exploding_learning_rate_is_taken_back(optimizer, y):
    def schedule(step):
        return 1e3 if step >= 100 else 1.0

    make = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}[optimizer]
    svi = CompiledSVI(
        conjugate,
        fg.AutoPlanar(conjugate, num_layers=1),
        lambda leaves: make(leaves, lr=0.01),
        Trace_ELBO(),
        backend="replay",
        schedule=schedule,
    )
    svi.run(100, y)
    good = [parameter.clone() for parameter in svi.guide.parameters()]
    svi.run(50, y)
    assert svi.num_rolled_back == 1
    assert svi.learning_rate_scale == 0.5
    for parameter, old in zip(svi.guide.parameters(), good, strict=True):
        assert torch.equal(parameter, old)


def test_a_rollback_halves_the_rates_of_a_pyro_optimiser(y):
    """It has one torch optimiser for each parameter, whose rates are its own."""
    moves = []
    for scale in (1.0, 0.5):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = CompiledSVI(
            conjugate, AutoNormal(conjugate), pyro.optim.SGD(per_parameter), Trace_ELBO(), backend="eager"
        )
        svi.step(y)
        before = svi.snapshot().parameters
        svi.learning_rate_scale = scale
        svi.step(y)
        after = svi.snapshot().parameters
        moves.append(torch.stack([after[name] - before[name] for name in before]))
        assert {group["lr"] for each in svi.optim.optim_objs.values() for group in each.param_groups} == {0.1, 0.01}
    torch.testing.assert_close(moves[1], 0.5 * moves[0])


# --- memory -----------------------------------------------------------------------------------------------------------


def resident_megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_replays_take_no_memory(y):
    svi = compiled(conjugate, backend="replay")
    svi.run(2000, y)
    sizes = []
    for _ in range(10):
        svi.run(2000, y)
        sizes.append(resident_megabytes())
    # One number kept for each step would be half a megabyte.
    assert np.polyfit(np.arange(10), sizes, 1)[0] * 10 < 2.0


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_captures_take_a_bounded_amount_of_memory(y):
    sizes = []
    svi = compiled(conjugate, backend="replay")
    for size in range(1, 31):
        svi._num_wasted = 0
        svi.step(torch.ones(size, dtype=y.dtype))
        sizes.append(resident_megabytes())
    assert len(svi._captures) == svi_module.MAX_CAPTURES
    # torch.jit.trace never gives back some megabytes of each trace.
    assert sizes[-1] - sizes[9] < 20 * 8


def test_other_arguments_may_use_other_parameters():
    def model(y, shifted):
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc if shifted else 0.0, scale), obs=y)

    def guide(y, shifted):
        pass

    y = torch.tensor([1.0, 2.0, 4.0])
    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), backend="replay")
    for step in range(4):
        for shifted in (False, True):
            expected = Trace_ELBO().loss(model, guide, y, shifted)
            assert svi.step(y, shifted) == pytest.approx(expected, rel=1e-5)
            if step and shifted:
                assert svi.loss_and_gradients(y, True)[1]["loc"] != 0
                assert svi.loss_and_gradients(y, False)[1]["loc"] == 0
    assert sum(captured is not None for captured in svi._captures.values()) == 2
