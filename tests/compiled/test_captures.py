"""Captured steps: one for each kind of arguments; how many are kept; what cannot be captured; when they are compiled."""

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
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from svi_cases import at_two, compiled, observations, scaled

from pyro_flowguides import CompiledSVI
from pyro_flowguides.compiled import backends, capture, captures
from pyro_flowguides.compiled.arguments import Arguments
from pyro_flowguides.compiled.chunks import Program
from pyro_flowguides.model import recording


@pytest.fixture
def y(dtype):
    return observations(dtype)


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
    assert len(svi.captures) == (1 if same and not values[1].requires_grad else 2)


def test_the_default_dtype_is_seen():
    before = torch.get_default_dtype()
    svi = compiled(scaled(lambda: 1.0), at_two, backend="replay", rate=0.0)
    try:
        svi.run(2)
        torch.set_default_dtype(torch.float32 if before == torch.float64 else torch.float64)
        svi.step()
    finally:
        torch.set_default_dtype(before)
    assert len(svi.captures) == 2


def test_captures_are_bounded_and_what_keeps_changing_runs_eagerly():
    """An argument that is a new number at each step, such as an annealed weight, must not be captured again and again."""
    svi = CompiledSVI(with_scale, delta_with_scale, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(), backend="replay")
    scales = [1.0 + 0.1 * step for step in range(captures.MAX_CAPTURES + captures.MAX_WASTED + 3)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = [svi.step(scale) for scale in scales]
    assert len(caught) == 1
    assert "keeps changing" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert len(svi.captures) <= captures.MAX_CAPTURES
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


def number_of_a_parameter(y):
    """Right where it was captured, and wrong as soon as the parameter has moved."""
    slope = pyro.param("slope", torch.tensor(1.0))
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("y", -((mu - y) ** 2).sum() - 100 * slope * float(slope.detach().numpy()))


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
        (number_of_a_parameter, "is not that of the captured step"),
        (long_loop, "operations, .* of them after sample site 'mu': a loop in Python"),
        (sequential_plate, r"after sample site 'data', .*line \d+: for index in pyro.plate"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_captured_runs_eagerly_with_one_warning(model, message, monkeypatch):
    monkeypatch.setattr(recording, "MAX_OPERATIONS", 4000)
    y = observations(torch.get_default_dtype())
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

    y = observations(torch.get_default_dtype())
    svi = compiled(model, guide, rate=0.0)
    with pytest.warns(UserWarning, match="eagerly") as caught:
        losses = [svi.step(y) for _ in range(10)]
    assert len(caught) == 1
    rises = np.diff(losses)
    assert rises[-3:] == pytest.approx(float(((0.5 - y) ** 2).sum()) / 100, rel=1e-3)


def test_a_warning_points_to_the_line_of_a_run():
    svi = compiled(data_dependent_if)
    with pytest.warns(UserWarning, match="eagerly") as caught:
        svi.run(2, observations(torch.get_default_dtype()))
    assert caught[0].filename == __file__


def resident_megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_captures_take_a_bounded_amount_of_memory(y, monkeypatch):
    monkeypatch.setattr(captures, "MAX_WASTED", 100)
    sizes = []
    svi = compiled(conjugate, backend="replay")
    for size in range(1, 31):
        svi.step(torch.ones(size, dtype=y.dtype))
        sizes.append(resident_megabytes())
    assert len(svi.captures) == captures.MAX_CAPTURES
    # torch.jit.trace never gives back some megabytes of each trace.
    assert sizes[-1] - sizes[9] < 20 * 8


@pytest.mark.parametrize(("steps_left", "is_compiled"), [(0, False), (10, False), (10_000_000, True)])
def test_auto_compiles_where_it_pays(steps_left, is_compiled, monkeypatch, y):
    """Not before its speed is known, and not for few steps."""
    monkeypatch.setattr(backends, "has_compiler", lambda device: True)
    monkeypatch.setattr(backends, "compile_with_inductor", lambda module, inputs: module)
    svi = compiled(conjugate, backend="auto")
    svi.step(y)
    for _ in range(captures.MIN_NUM_RUNS):
        svi.compile_step((y,), {}, steps_left)()
    assert svi.captures.num_compiled == 0
    svi.compile_step((y,), {}, steps_left)()
    assert svi.captures.num_compiled == is_compiled


# --- the cache ---------------------------------------------------------------------------------------------------------


def key_of(size):
    return Arguments((torch.zeros(size),), {}).key()


def used(num_runs, difference=None, constants=()):
    """What was captured and has run so many times; perhaps something has changed since."""
    guards = types.SimpleNamespace(difference=lambda: difference, changed_constants=lambda: list(constants))
    step = captures.CapturedStep(None, lambda: None, guards)
    for _ in range(num_runs):
        step(())
    return step


def test_the_step_that_was_not_used_for_longest_is_dropped():
    cache = captures.Captures()
    steps = [used(captures.MIN_NUM_RUNS) for _ in range(captures.MAX_CAPTURES)]
    for size, step in enumerate(steps):
        assert cache.find(key_of(size)) is None
        cache.add(key_of(size), step)
    assert len(cache) == captures.MAX_CAPTURES
    assert cache.find(key_of(0)) is steps[0]
    assert cache.find(key_of(100)) is None
    cache.add(key_of(100), steps[0])
    assert [cache.find(key_of(size)) is steps[size] for size in (0, 2, 3, 4, 5, 6, 7)] == [True] * 7
    assert cache.find(key_of(1)) is None


def test_a_step_whose_surroundings_have_changed_is_dropped_with_what_others_write_to():
    cache, constant = captures.Captures(), torch.zeros(3)
    cache.add(key_of(1), used(captures.MIN_NUM_RUNS, "'a' is another", [constant]))
    assert cache.find(key_of(1)) is None
    assert len(cache) == 0
    assert [each is constant for each in cache.varying] == [True]


@pytest.mark.parametrize(("num_runs", "is_waste"), [(0, True), (49, True), (50, False), (60, False)])
def test_only_steps_that_hardly_ran_are_wasted(num_runs, is_waste):
    """Five of them are too many."""
    cache = captures.Captures()
    for number in range(5):
        cache.add(key_of(1), used(num_runs, f"'a' is {number}"))
        if number == 4 and is_waste:
            with pytest.raises(captures.CaptureError, match="keeps changing, .* and now 'a' is 4. Give what changes"):
                cache.find(key_of(1))
        else:
            assert cache.find(key_of(1)) is None


@pytest.mark.parametrize(("steps_left", "pays"), [(8900, False), (9100, True)])
def test_compiling_pays_where_half_of_the_time_left_is_three_times_its_own(steps_left, pays):
    """Steps of 10 ms (in the median) from 100 operations, which take 10 s + 100 · 0.05 s to compile."""
    graph = torch.fx.Graph()
    for number in range(99):
        graph.placeholder(f"x{number}")
    graph.output(())
    step = captures.CapturedStep(Program((torch.fx.GraphModule({}, graph),)), lambda: None, None)
    step.seconds.extend([0.01] * 48)
    assert not step._pays(10**9)
    step.seconds.extend([5.0, 5.0])
    assert step._pays(steps_left) is pays


class _Mark:
    """A mark on the stream of a GPU at a number of milliseconds."""

    def __init__(self, at):
        self.at, self.has_waited = at, False

    def synchronize(self):
        self.has_waited = True

    def elapsed_time(self, other):
        assert other.has_waited
        return other.at - self.at


@pytest.mark.parametrize(("milliseconds", "pays"), [(9.0, False), (11.0, True)])
def test_on_a_gpu_the_time_of_the_device_decides(milliseconds, pays):
    """30 s for compiling, thrice its own 10 s, against half of 6000 steps."""
    step = captures.CapturedStep(Program(()), lambda: None, None)
    step.laps = [(_Mark(1000.0 * lap), _Mark(1000.0 * lap + milliseconds)) for lap in range(captures.MIN_NUM_RUNS)]
    assert step.num_runs == captures.MIN_NUM_RUNS
    assert step._pays(6000) is step._pays(6000) is pays
    assert not step.laps and step.seconds == pytest.approx([milliseconds / 1e3] * captures.MIN_NUM_RUNS)


def test_the_choice_of_a_compiler_is_made_once(monkeypatch):
    seen = []
    monkeypatch.setattr(backends, "has_compiler", lambda device: seen.append(device) or True)
    monkeypatch.setattr(backends, "compile_with_inductor", lambda module, inputs: lambda: "compiled")
    step = captures.CapturedStep(Program((None,)), lambda: "replayed", None)
    example = [torch.zeros(2)]
    step.choose_backend("replay", lambda: example, 10**9)
    step.choose_backend("auto", lambda: example, 10**9)
    assert (step(()), step.is_settled, step.is_compiled, seen) == ("replayed", False, False, [])
    for _ in range(2):
        step.choose_backend("inductor", lambda: example, 0)
        assert (step(()), step.is_settled, step.is_compiled) == ("compiled", True, True)
    assert seen == [torch.device("cpu")]


# --- the check against the step itself ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "error", "difference"),
    [
        (torch.float64, 0.9e-7, None),
        (torch.float64, 1.2e-7, "found"),
        (torch.float32, 0.9e-3, None),
        (torch.float32, 1.2e-3, "found"),
    ],
)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_captured_and_eager_numbers_may_differ_by_rounding(what, dtype, error, difference):
    """Relative to the largest of the numbers, 100 here."""
    loss, gradients = (
        torch.tensor(-100.0, dtype=dtype),
        [torch.zeros(1, dtype=dtype), torch.tensor([1.0, 100.0], dtype=dtype)],
    )
    ours = (loss + 100 * error, gradients) if what == "loss" else (loss, [gradients[0], gradients[1] - 100 * error])
    assert capture.compare(ours, (loss, gradients)) == (difference and what)


def test_numbers_that_are_not_finite_must_be_so_on_both_sides():
    one, nan = torch.tensor(1.0), torch.tensor(torch.nan)
    assert capture.compare((nan, [nan]), (nan, [nan])) is None
    assert capture.compare((nan, [one]), (one, [one])) == "loss"
    assert capture.compare((one, [one]), (nan, [one])) == "loss"
    assert capture.compare((one, [one, nan]), (one, [one, one])) == "gradient"
    assert capture.compare((one, [one, nan]), (one, [one, nan])) is None
    assert capture.compare((one, [2 * one, nan]), (one, [one, nan])) == "gradient"
