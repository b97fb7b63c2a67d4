"""Steps that are not finite, and explosions: what they leave unchanged, and what is taken back."""

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from models import conjugate
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from svi_cases import OPTIMIZERS, compiled, observations, per_parameter

import pyro_flowguides as fg
from pyro_flowguides import CompiledSVI
from pyro_flowguides.compiled.rollback import NUM_DEVIATIONS, SLACK, ExplosionDetector, Watch


@pytest.fixture
def y(dtype):
    return observations(dtype)


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
    svi = compiled(switched(broken), backend="eager", max_nonfinite_steps=4)
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


# --- explosions -------------------------------------------------------------------------------------------------------


def judged(windows):
    detector = ExplosionDetector()
    return [detector.judge(window) for window in windows]


def test_explosions():
    noise = [10.0 + (-1) ** i for i in range(50)]  # mean 10, standard deviation 1: the bound is 30 and a little
    assert judged([noise, noise]) == ["good", "good"]
    assert judged([noise, [*noise[:40], *[31.0] * 10]]) == ["good", "exploded"]
    # Nine are too few, or not in a row, and not above.
    assert judged([noise, [*noise[:41], *[31.0] * 9]]) == ["good", "bad"]
    assert judged([noise, [31.0, 10.0] * 25]) == ["good", "bad"]
    assert judged([noise, [30.0] * 50]) == ["good", "good"]
    # Across windows.
    assert judged([noise, [*noise[:45], *[31.0] * 5], [*[31.0] * 5, *noise[:45]]]) == ["good", "bad", "exploded"]
    # Nothing to judge by.
    assert judged([[float("nan")] * 50, noise]) == ["bad", "good"]
    # Losses that are not finite are bad as well, but one of them does not spoil a window.
    assert judged([noise, [float("nan")] * 50]) == ["good", "exploded"]
    assert judged([noise, [float("nan"), *noise[1:]], [31.0] * 10]) == ["good", "good", "exploded"]


def test_losses_that_are_constant_up_to_rounding_do_not_explode():
    assert judged([[100.0] * 50, [100.001] * 50]) == ["good", "good"]


@pytest.mark.parametrize("backend", ["eager", "replay"])
def test_a_matrix_without_a_factorisation_makes_a_step_that_is_not_finite(backend):
    """Far from 0 the matrix is not positive definite; a draw of several may lie there."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        matrix = torch.eye(2) * (4.0 - x.square().sum(-1))[..., None, None]
        pyro.factor("volume", torch.linalg.cholesky(matrix).diagonal(dim1=-1, dim2=-2).log().sum(-1))

    pyro.set_rng_seed(0)
    guide = AutoNormal(model, init_scale=0.7, init_loc_fn=init_to_value(values={"x": torch.zeros(2)}))
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
    svi = fg.CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.001}), elbo, backend=backend)
    losses = svi.run(150)
    assert 5 < int(losses.isnan().sum()) < 100
    assert svi.num_skipped == int(losses.isnan().sum())
    assert all(parameter.isfinite().all() for parameter in guide.parameters())
    assert len(svi.captures) == (backend == "replay")


def test_losses_are_judged_by_the_last_good_window():
    detector = ExplosionDetector()
    window = np.array([1.0, 2.0, 3.0, np.nan])
    assert detector.judge(window) == "good"
    expected = 2.0 + NUM_DEVIATIONS * np.std([1.0, 2.0, 3.0]) + SLACK * 3.0
    assert detector.bound == pytest.approx(expected)
    # One loss beyond the bound makes a window bad, which leaves the bound as it is; a loss at the bound does not.
    assert detector.judge([1.0, detector.bound + 1e-6]) == "bad"
    assert detector.bound == pytest.approx(expected)
    assert detector.judge([1.0]) == "bad"
    assert ExplosionDetector().judge([1.0]) == "bad"
    assert ExplosionDetector().judge([detector.bound, 1.0]) == "good"
    # Ten in a row are an explosion, those that are not finite among them; then the count starts again.
    for _ in range(2):
        assert detector.judge([expected + 1, np.nan] * 4) == "bad"
        assert detector.judge([expected + 1]) == "bad"
        assert detector.judge([np.inf, 1.0, 1.0]) == "exploded"
    assert detector.judge([1.0, 2.0, 3.0]) == "good"


# --- the watch ---------------------------------------------------------------------------------------------------------


def watched(watch, losses, finite=None):
    """The verdicts on these losses, with the number of losses before each."""
    verdicts = []
    for number, loss in enumerate(losses, 1):
        is_finite = np.isfinite(loss) if finite is None else finite[number - 1]
        if watch.add(torch.tensor(loss), torch.tensor(bool(is_finite))):
            verdicts.append((number, watch.judge()))
    return verdicts


NAN = float("nan")


@pytest.mark.parametrize(
    ("every", "most", "losses", "expected"),
    [
        (4, 9, [1.0, 2.0] * 6, [(4, "good"), (8, "good"), (12, "good")]),
        (4, 3, [1.0, 2.0] * 3, [(3, "good"), (6, "good")]),
        # In a row, also from one window to the next.
        (4, 6, [1.0, 2.0, NAN, NAN, NAN, NAN, NAN, NAN], [(4, "good"), (8, "lost")]),
        (4, 6, [1.0, 2.0, NAN, NAN, NAN, NAN, NAN, 1.0], [(4, "good"), (8, "bad")]),
        (4, 6, [NAN, NAN, NAN, 1.0, NAN, NAN, NAN, NAN], [(4, "bad"), (8, "bad")]),
        (4, 4, [NAN, NAN, NAN, 1.0], [(4, "bad")]),
        (2, 6, [NAN] * 6, [(2, "bad"), (4, "bad"), (6, "lost")]),
        (10, 50, [1.0, 2.0] * 5 + [99.0] * 10, [(10, "good"), (20, "exploded")]),
    ],
)
def test_losses_are_judged_together(every, most, losses, expected):
    assert watched(Watch(every, most), losses) == expected


def test_a_finite_loss_without_a_finite_gradient_is_lost_too():
    assert watched(Watch(4, 4), [1.0, 2.0, 1.0, 2.0], [False] * 4) == [(4, "lost")]


@pytest.mark.parametrize("cut", [3, 4, 5, 8])
def test_a_watch_goes_on_from_its_state(cut):
    losses = [1.0, 2.0, NAN, NAN, NAN, NAN, 50.0, NAN, NAN, NAN, NAN, NAN]
    whole = watched(Watch(4, 5), losses)
    first, second = Watch(4, 5), Watch(4, 5)
    before = watched(first, losses[:cut])
    second.load_state_dict(first.state_dict(), torch.device("cpu"))
    after = [(cut + number, verdict) for number, verdict in watched(second, losses[cut:])]
    assert before + after == whole == [(4, "good"), (8, "bad"), (12, "lost")]


def test_a_watch_that_begins_anew_has_nothing_to_judge_by():
    watch = Watch(4, 50)
    watch.good = "a snapshot"
    assert watched(watch, [1.0, 2.0, 1.0, 2.0]) == [(4, "good")]
    watch.begin_anew()
    assert watch.good is None
    assert watched(watch, [100.0, 200.0, 100.0, 200.0]) == [(4, "good")]
