"""One fit: its rounds, its steps, how it ends, and the guard against steps that do harm."""

import functools
import re
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from fits import Y, faulty, quick, scale_only, skewed
from models import conjugate
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.training import loop, schedules, steps


@pytest.fixture
def short_rounds(monkeypatch):
    monkeypatch.setattr(schedules, "FIRST_NUM_STEPS", 10)
    monkeypatch.setattr(loop, "NUM_STEPS", 15)


def subsampled(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])


def fit(model, guide, *args, **options):
    return fg.fit(model, guide, *args, **{"seed": 0, "progress": False, "backend": "eager", **options})


# --- rounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short_rounds")
def test_an_exact_guide_has_quick():
    assert fit(conjugate, fg.AutoFlow(conjugate), torch.tensor(Y)).losses.shape == (4,)


@pytest.mark.usefixtures("short_rounds")
def test_a_poor_guide_has_all_rounds_while_it_gains():
    steps, particles = [], []

    def watched():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        particles.append(mu.numel())
        pyro.sample("x", dist.Normal(0.0, (1.5 * mu).exp()))

    result = fit(watched, fg.AutoFlow(watched), whiten=None, callbacks=[lambda step, loss: steps.append(step)])
    assert steps == list(range(70))
    assert result.losses.shape == (70,)
    assert [particles.count(number) for number in (256, 512, 1024)] == [10, 20, 40]


@pytest.mark.usefixtures("short_rounds")
def test_a_guide_that_gains_nothing_stops_after_two_rounds(monkeypatch):
    monkeypatch.setattr(steps, "LEARNING_RATE", 0.0)
    # By chance alone the ELBO rises by more than its noise in one case of six: not with this seed.
    assert fit(skewed, scale_only(skewed), num_particles=4, seed=1).losses.shape == (30,)


def test_the_learning_rate_is_back_at_the_start_of_a_round(short_rounds):
    progress = []

    def schedule(fraction):
        progress.append(fraction)
        return 1.0

    fit(skewed, fg.AutoFlow(skewed), num_particles=4, whiten=None, schedule=schedule)
    assert progress.count(0.0) >= 3
    assert max(progress) < 1


@pytest.mark.usefixtures("short_rounds")
def test_the_first_round_alone_is_tempered(monkeypatch, capsys):
    """With a guide that stays what it is, and the density to the power 1/2 at first."""
    monkeypatch.setattr(steps, "LEARNING_RATE", 0.0)
    options = {"num_particles": 1000, "whiten": None, "progress": True}
    found = fit(skewed, scale_only(skewed), temper=lambda progress: 0.5 if progress < 1 else 1.0, **options)
    draws, shown = found.draws, capsys.readouterr().err
    first, second = found.losses[:10].mean(), found.losses[10:30].mean()
    tempered, plain = draws.log_q - 0.5 * draws.log_p, draws.log_q - draws.log_p
    assert first == pytest.approx(float(tempered.mean()), abs=5 * float(tempered.std()) / 100)
    assert second == pytest.approx(float(plain.mean()), abs=5 * float(plain.std()) / 100)
    assert f"elbo at beta 0.50={-first:.3f}" in shown
    assert f"elbo={-found.losses[10:30].mean():.3f}" in shown


@pytest.mark.usefixtures("short_rounds")
@pytest.mark.parametrize(
    ("make", "args", "options"),
    [
        (AutoNormal, (), {"loss": Trace_ELBO()}),
        (AutoNormal, (), {"optim": pyro.optim.Adam({"lr": 0.01})}),
        (AutoNormal, (), {"num_steps": 15}),
        (AutoNormal, (torch.tensor(Y),), {"batches": [torch.tensor(Y)]}),
        (AutoNormal, (torch.tensor(Y),), {}),
        (functools.partial(fg.AutoFlow, flow=lambda dim: fg.transforms.Residual(dim, log_det="roulette")), (), {}),
    ],
    ids=["loss", "Pyro's optimiser", "num_steps", "batches", "subsampled", "random log q"],
)
def test_quick_where_the_weights_cannot_end_it(make, args, options):
    model = subsampled if args else skewed
    assert fit(model, make(model), *args, **options).losses.shape == (15,)


@pytest.mark.usefixtures("short_rounds")
def test_a_round_that_does_harm_is_taken_back():
    """Parameters and buffers are those from before the round."""
    values = []

    def schedule(progress):
        return 1.0 if len(values) < 10 else 30.0

    def remember(step, loss):
        guide.counter += 1
        values.append([value.detach().clone() for value in guide.state_dict().values()])

    guide = fg.AutoFlow(skewed)
    guide.register_buffer("counter", torch.zeros(()))
    result = fit(skewed, guide, num_particles=4, schedule=schedule, callbacks=[remember])
    assert len(result.losses) == 30
    assert guide.counter == 10
    for value, expected in zip(guide.state_dict().values(), values[9], strict=True):
        assert torch.equal(value, expected)
    for parameter, last in zip(guide.parameters(), values[-1], strict=False):
        assert not torch.equal(parameter, last)
    # The guide is poor after ten steps: the mean of its weights is that of a few draws.
    ours, theirs = (
        draws.log_weights.median() for draws in (result.draws, fg.draw(skewed, guide, num_samples=10_000, seed=1))
    )
    assert abs(float(ours - theirs)) < 0.1


ONE_BY_ONE = {"vectorizes": False}
PYRO = pyro.optim.Adam({"lr": 0.1})


@pytest.mark.parametrize(
    ("options", "tracer", "expected"),
    [
        ({}, {}, [(1000, 256), (2000, 512), (4000, 1024)]),
        ({"num_particles": 7}, {}, [(1000, 7), (2000, 7), (4000, 7)]),
        ({"num_steps": 30}, {}, [(30, 256)]),
        ({"num_steps": 30, "num_particles": 7}, {}, [(30, 7)]),
        ({"loss": "own"}, {}, [(3000, 256)]),
        ({"batches": []}, {}, [(3000, 256)]),
        ({"optim": PYRO}, {}, [(3000, 256)]),
        ({"optim": torch.optim.Adam}, {}, [(1000, 256), (2000, 512), (4000, 1024)]),
        ({}, ONE_BY_ONE, [(3000, 8)]),
        ({"num_particles": 7}, ONE_BY_ONE, [(3000, 7)]),
        ({}, {"has_weights": False}, [(3000, 256)]),
        ({}, {"start_sd": 0.1}, [(400, 256), (1000, 256), (2000, 512), (4000, 1024)]),
        ({"num_steps": 30}, {"start_sd": 0.1}, [(30, 256)]),
    ],
)
def test_the_rounds_that_fit_is_documented_to_have(options, tracer, expected):
    given = {"num_steps": None, "num_particles": None, "loss": None, "batches": None, "optim": None, **options}
    has_weights = tracer.get("has_weights", True)
    fit = types.SimpleNamespace(
        options=types.SimpleNamespace(**given),
        tracer=types.SimpleNamespace(vectorizes=tracer.get("vectorizes", True)),
        _has_weights=lambda: has_weights,
        _find_start_sd=lambda: tracer.get("start_sd", 1.0),
    )
    assert list(loop.Loop._choose_rounds(fit, None)) == expected


def test_a_good_start_needs_a_short_round_alone(monkeypatch):
    """A Gaussian posterior, whitened: the other rounds are left out, and random numbers are as without the look at the start."""
    monkeypatch.setattr(schedules, "FIRST_NUM_STEPS", 50)
    y = torch.tensor(Y)
    short = fit(conjugate, fg.AutoCoupling(conjugate), y)
    assert len(short.losses) == 20
    asked_for = fit(conjugate, fg.AutoCoupling(conjugate), y, num_steps=20)
    np.testing.assert_array_equal(short.losses, asked_for.losses)
    # Flattened at first, the target is not the one of the start.
    assert len(fit(conjugate, fg.AutoCoupling(conjugate), y, temper="linear").losses) >= 50


HALF = lambda progress: 1.0 if progress < 0.5 else 0.1  # noqa: E731


@pytest.mark.parametrize(
    ("then", "now", "num_over", "taken", "schedule", "is_same"),
    [
        ([20], [40], 0, 20, {"temper": schedules.rezende_mohamed}, True),
        ([20], [40], 0, 20, {"temper": schedules.linear}, False),
        ([10, 20], [10, 40], 1, 5, {"temper": schedules.linear}, True),
        ([10, 20], [10, 20], 1, 5, schedules.cosine, True),
        ([20], [40], 0, 20, schedules.constant, True),
        ([20], [40], 0, 20, None, True),
        ([40], [20], 0, 20, None, True),
        ([40], [20], 0, 21, None, False),
        ([20], [40], 0, 20, schedules.cosine, False),
        ([20], [40], 0, 10, HALF, True),
        ([20], [40], 0, 11, HALF, False),
        ([10, 20], [10, 40], 1, 5, None, True),
        ([10, 20], [10, 40], 0, 5, None, False),
        ([10, 20], [11, 40], 1, 5, None, False),
        ([10, 20, 40], [10, 20, 80], 2, 5, None, True),
        ([10, 20, 40], [10, 20, 80], 1, 5, None, False),
        ([10, 20, 40], [10, 21, 80], 2, 5, None, False),
        ([10, 20, 40], [10, 20], 1, 5, None, False),
    ],
)
def test_other_numbers_of_steps_are_the_same_fit_where_the_steps_so_far_are(
    then, now, num_over, taken, schedule, is_same
):
    given = {"schedule": None, "temper": None, **(schedule if isinstance(schedule, dict) else {"schedule": schedule})}
    saved = {"num_steps": then, "scores": [[0.0]] * num_over, "training": {"losses": [0.0] * taken}}
    if is_same:
        schedules.check_num_steps(saved, now, **given)
    else:
        before, after = (" + ".join(map(str, each)) for each in (then, now))
        with pytest.raises(ValueError, match=re.escape(f"of a fit with num_steps = {before}, here it is {after}:")):
            schedules.check_num_steps(saved, now, **given)


# --- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short_rounds")
def test_a_callback_ends_all_rounds():
    result = fit(skewed, scale_only(skewed), callbacks=[lambda step, loss: step == 12])
    assert result.losses.shape == (13,)


def test_an_interrupt_returns_what_was_reached():
    def interrupt(step, loss):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted after 4 of 20 steps"):
        fit = quick(conjugate, AutoNormal(conjugate), torch.tensor(Y), callbacks=[interrupt])
    whole = quick(conjugate, AutoNormal(conjugate), torch.tensor(Y), num_steps=20)
    np.testing.assert_array_equal(fit.losses, whole.losses[:4])
    assert len(fit.draws) == 10_000
    assert fit.guide.locs.mu != whole.guide.locs.mu


def test_an_interrupt_ends_all_rounds(short_rounds):
    def interrupt(step, loss):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted after 5 of 10 steps"):
        assert len(fit(skewed, scale_only(skewed), callbacks=[interrupt]).losses) == 5


@pytest.mark.parametrize(("at", "num_steps"), [(1, 10), (2, 30)])
def test_an_interrupt_of_the_draws_between_rounds_ends_the_training(at, num_steps, short_rounds, monkeypatch):
    """They are made again; another interrupt, or one of the last draws, ends the fit."""
    judgements = interrupted_draws(monkeypatch, {at})
    result = fit(skewed, scale_only(skewed), num_particles=4)
    assert result.interrupted
    assert len(result.losses) == num_steps
    assert len(judgements) == at + 1
    assert len(result.draws) == 10_000


@pytest.mark.parametrize(("at", "rounds"), [({1, 2}, None), ({1}, 5)])
def test_an_interrupt_of_the_last_draws_ends_the_fit(at, rounds, short_rounds, monkeypatch):
    interrupted_draws(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt):
        fit(skewed, scale_only(skewed), num_particles=4, num_steps=rounds)


def interrupted_draws(monkeypatch, at):
    real, judgements = loop.draw_traced, []

    def draw(tracer, number, **options):
        if number > loop.NUM_FIRST_DRAWS:
            judgements.append(number)
            if len(judgements) in at:
                raise KeyboardInterrupt
        return real(tracer, number, **options)

    monkeypatch.setattr(loop, "draw_traced", draw)
    return judgements


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_an_interrupt_before_the_first_step(ema_decay, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    guide = AutoNormal(conjugate)
    monkeypatch.setattr(fg.CompiledSVI, "compile_step", interrupt)
    with pytest.warns(UserWarning, match="interrupted after 0 of 20 steps"):
        fit = quick(conjugate, guide, torch.tensor(Y), ema_decay=ema_decay)
    assert len(fit.losses) == 0
    assert len(fit.draws) == 10_000


def test_the_moving_average_of_the_parameters_is_returned():
    guide, visited = AutoNormal(conjugate), []
    quick(
        conjugate,
        guide,
        torch.tensor(Y),
        num_steps=10,
        ema_decay=0.99,
        callbacks=[lambda *_: visited.append(guide.locs.mu.item())],
    )
    # A memory that long is the plain mean of ten steps.
    assert guide.locs.mu.item() == pytest.approx(np.mean(visited), rel=1e-5)


def test_shows_a_progress_bar(capsys):
    quick(conjugate, fg.AutoCoupling(conjugate), torch.tensor(Y), progress=False)
    assert capsys.readouterr().err == ""
    quick(conjugate, fg.AutoCoupling(conjugate), torch.tensor(Y), progress=True)
    assert "AutoCoupling" in capsys.readouterr().err
    # By default there is one.
    fg.fit(conjugate, AutoNormal(conjugate), torch.tensor(Y), num_steps=1, backend="eager")
    assert "AutoNormal" in capsys.readouterr().err
    fg.fit_density("nice", torch.randn(20, 2), num_steps=1)
    assert "fit_density" in capsys.readouterr().err
    fg.fit_to_draws(fg.AutoFlow(conjugate), torch.randn(20, 1), torch.tensor(Y), num_steps=1)
    assert "fit_to_draws" in capsys.readouterr().err


class Bar:
    """A progress bar that remembers."""

    def __init__(self, **options):
        self.options, self.counts, self.shown = options, [], []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, count):
        self.counts.append(count)

    def set_postfix(self, shown, refresh):
        self.shown.append(shown)


@pytest.mark.parametrize("every", [None, 30])
def test_the_progress_bar_counts_all_steps_and_shows_the_mean_elbo_of_the_last_ones(every, tmp_path, monkeypatch):
    bars = []
    monkeypatch.setattr(steps, "tqdm", lambda **options: bars.append(Bar(**options)) or bars[-1])
    broken = torch.tensor(False)
    model = faulty(broken)

    def break_one(step, loss):
        broken.fill_(step == 54)

    checkpoint = every and fg.Checkpoint(tmp_path / "fit.pt", every=every)
    options = {"num_steps": 120, "checkpoint": checkpoint, "progress": True}
    fit = quick(model, AutoNormal(model), torch.tensor(Y), callbacks=[break_one], **options)
    (bar,) = bars
    assert (bar.options["total"], bar.options["disable"], bar.options["desc"]) == (120, False, "AutoNormal")
    counts = [50, 50, 20] if every is None else [30] * 4
    assert [count for count in bar.counts if count] == counts
    ends = np.cumsum(counts)
    assert [shown["elbo"] for shown in bar.shown] == [
        f"{-np.nanmean(fit.losses[end - count : end]):.3f}" for count, end in zip(counts, ends, strict=True)
    ]
    assert [shown["skipped"] for shown in bar.shown] == [int(end > 55) for end in ends]
    if every:
        quick(
            model,
            AutoNormal(model),
            torch.tensor(Y),
            **{**options, "checkpoint": fg.Checkpoint(tmp_path / "fit.pt", resume=True)},
        )
        # What was done before counts at once.
        assert bars[1].counts == [120]


# --- the guard --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_step_that_is_not_finite_changes_nothing(backend):
    y, broken = torch.tensor(Y), torch.tensor(False)
    model = faulty(broken)
    guide = fg.AutoCoupling(model, num_layers=2)
    before = {}

    def break_third_step(step, loss):
        before[step] = [parameter.clone() for parameter in guide.parameters()]
        broken.fill_(step == 2)

    fit = quick(model, guide, y, num_steps=6, callbacks=[break_third_step], backend=backend)
    assert fit.num_skipped == 1
    assert np.isnan(fit.losses[3])
    assert np.isfinite(np.delete(fit.losses, 3)).all()
    assert all(torch.equal(a, b) for a, b in zip(before[2], before[3], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before[3], before[4], strict=True))
    assert np.isfinite(float(fit.elbo))


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_too_many_steps_that_are_not_finite_end_with_the_site(backend):
    broken = torch.tensor(False)
    model = faulty(broken)
    steps = []

    def break_model(step, loss):
        steps.append(step)
        broken.fill_(True)

    with pytest.raises(RuntimeError, match="3 steps in a row .* site 'broken' of the model has log-probability nan"):
        quick(
            model,
            fg.AutoPlanar(model, num_layers=1),
            torch.tensor(Y),
            max_nonfinite_steps=3,
            callbacks=[break_model],
            backend=backend,
        )
    assert len(steps) <= 6


@pytest.mark.slow
def test_an_exploding_learning_rate_is_taken_back():
    fit = quick(
        conjugate,
        fg.AutoPlanar(conjugate),
        torch.tensor(Y),
        num_steps=300,
        optim=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        schedule=lambda progress: 1e4 if 0.4 <= progress < 0.5 else 1.0,
        backend="auto",
        whiten="init",
    )
    assert fit.num_rolled_back >= 1
    assert np.isfinite(fit.losses[-50:]).all()
    assert fit.losses[-50:].mean() < fit.losses[:50].mean() + 1.0
