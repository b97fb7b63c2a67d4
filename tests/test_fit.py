"""fit: the defaults, the guard, the options, the errors."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import conjugate, conjugate_answer, correlated
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.examples import EIGHT_SCHOOLS

Y = [0.3, 1.4, 2.2, 0.7, 1.9]


def quick(model, guide, *args, **options):
    return fg.fit(model, guide, *args, **{"num_steps": 20, "num_particles": 8, "seed": 0, "progress": False, **options})


@pytest.mark.parametrize("Guide", [fg.AutoFlow, fg.AutoCoupling, fg.AutoPlanar])
def test_exact_where_the_family_holds_the_posterior(Guide):
    y = torch.tensor(Y, dtype=torch.float64)
    fit = quick(conjugate, Guide(conjugate), y)
    mean, sd, log_evidence = conjugate_answer(y)
    # Whitening finds the normal posterior, and the path gradient of an exact guide is 0: every draw has weight p(y).
    assert fit.elbo == pytest.approx(log_evidence, abs=1e-6)
    assert fit.elbo_se < 1e-6
    assert np.isnan(fit.khat)
    assert fit.verdict.startswith("exact")
    summary = fit.summary()
    assert abs(summary.loc["mu", "mean"] - mean) < 4 * sd / 10_000**0.5
    assert abs(summary.loc["mu", "sd"] / sd - 1) < 4 / 20_000**0.5


@pytest.mark.slow
def test_eight_schools_with_the_defaults():
    """ELBO, and mean and sd of mu, tau and theta[0] against the exact answers, beside those of AutoNormal."""
    data = EIGHT_SCHOOLS.data()
    coupling = fg.fit(
        EIGHT_SCHOOLS.model, fg.AutoCoupling(EIGHT_SCHOOLS.model), model_kwargs=data, seed=0, progress=False
    )
    normal = fg.fit(EIGHT_SCHOOLS.model, AutoNormal(EIGHT_SCHOOLS.model), model_kwargs=data, seed=0, progress=False)
    assert coupling.elbo < -31.311 + 4 * coupling.elbo_se
    assert coupling.elbo > -31.311 - 0.05
    assert coupling.elbo > normal.elbo + 0.1
    summary = coupling.summary()
    for label, mean, sd in [("mu", 4.397, 3.318), ("tau", 3.598, 3.220), ("theta[0]", 6.212, 5.593)]:
        assert abs(summary.loc[label, "mean"] - mean) < 0.1 * sd
        assert abs(summary.loc[label, "sd"] / sd - 1) < 0.05
    assert coupling.verdict.startswith("good")


def test_reports_what_happened():
    fit = quick(conjugate, fg.AutoCoupling(conjugate), torch.tensor(Y))
    assert fit.losses.shape == (20,)
    assert fit.num_skipped == 0
    assert len(fit.draws) == 10_000
    assert fit.wall_time > 0


def test_same_seed_same_fit():
    y = torch.tensor(Y)
    fits = []
    for _ in range(2):
        pyro.clear_param_store()
        fits.append(quick(conjugate, fg.AutoCoupling(conjugate), y))
    np.testing.assert_array_equal(fits[0].losses, fits[1].losses)
    assert fits[0].elbo == fits[1].elbo


def test_a_second_call_continues():
    y = torch.tensor(Y)
    guide = fg.AutoCoupling(conjugate)
    quick(conjugate, guide, y, whiten=None, num_steps=3)
    before = [parameter.clone() for parameter in guide.parameters()]
    quick(conjugate, guide, y, num_steps=3)
    assert any(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))
    with pytest.raises(ValueError, match="has been trained"):
        quick(conjugate, guide, y, whiten="batch_and_match")


def test_the_path_gradient_is_for_the_fit_alone():
    y = torch.tensor(Y)
    guide = fg.AutoCoupling(conjugate)
    seen = []
    quick(conjugate, guide, y, num_steps=2, callbacks=[lambda step, loss: seen.append(guide.gradient)])
    assert seen == ["path", "path"]
    assert guide.gradient == "total"
    quick(
        conjugate,
        guide,
        y,
        num_steps=1,
        num_particles=None,
        loss=Trace_ELBO(),
        callbacks=[lambda *_: seen.append(guide.gradient)],
    )
    assert seen[-1] == "total"


@pytest.mark.parametrize(
    "options",
    [
        {"loss": TraceGraph_ELBO(num_particles=4, vectorize_particles=True), "num_particles": None},
        {"optim": pyro.optim.ClippedAdam({"lr": 0.01})},
        {"optim": lambda parameters: torch.optim.SGD(parameters, lr=1e-3)},
        {"schedule": "constant"},
        {"schedule": lambda progress: 1 - progress},
        {"whiten": None},
        {"whiten": "init"},
        {"num_particles": 1, "whiten": None},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(options):
    y = torch.tensor(Y)
    fit = quick(conjugate, fg.AutoCoupling(conjugate), y, **options)
    assert np.isfinite(fit.losses).all()
    assert fit.guide.is_trained()


def test_the_schedule_is_followed():
    rates = []

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    y = torch.tensor(Y)
    for schedule in ("cosine", "constant"):
        quick(
            conjugate,
            fg.AutoCoupling(conjugate),
            y,
            num_steps=4,
            schedule=schedule,
            optim=lambda parameters: Recorder(parameters, lr=0.1),
        )
    expected = [0.1 * 0.5 * (1 + np.cos(np.pi * step / 4)) for step in range(4)]
    assert rates == pytest.approx([*expected, 0.1, 0.1, 0.1, 0.1])


def test_a_callback_ends_the_training():
    y = torch.tensor(Y)
    fit = quick(conjugate, fg.AutoCoupling(conjugate), y, callbacks=[lambda step, loss: step == 4])
    assert len(fit.losses) == 5


def test_an_interrupt_returns_what_was_reached():
    def interrupt(step, loss):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted after 4 of 20 steps"):
        fit = quick(conjugate, fg.AutoCoupling(conjugate), torch.tensor(Y), callbacks=[interrupt])
    assert len(fit.losses) == 4
    assert np.isfinite(fit.elbo)


class Faulty:
    """A model whose likelihood is NaN at some of its calls."""

    def __init__(self, wrong):
        self.calls, self.wrong = 0, wrong

    def __call__(self, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        self.calls += 1
        pyro.factor("broken", torch.nan * mu if self.wrong(self.calls) else -((mu - 1) ** 2))


def test_a_step_that_is_not_finite_changes_nothing():
    y = torch.tensor(Y)
    model = Faulty(lambda call: False)
    guide = fg.AutoCoupling(model)
    before = {}

    def break_third_step(step, loss):
        before[step] = [parameter.clone() for parameter in guide.parameters()]
        model.wrong = lambda call: step == 2

    fit = quick(model, guide, y, num_steps=6, callbacks=[break_third_step])
    assert fit.num_skipped == 1
    assert np.isnan(fit.losses[3])
    assert np.isfinite(np.delete(fit.losses, 3)).all()
    assert all(torch.equal(a, b) for a, b in zip(before[2], before[3], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before[3], before[4], strict=True))
    assert np.isfinite(fit.elbo)


def test_too_many_skipped_steps_end_with_the_site():
    model = Faulty(lambda call: False)

    def break_model(step, loss):
        model.wrong = lambda call: True

    with pytest.raises(RuntimeError, match="3 steps in a row .* site 'broken' of the model has log-probability nan"):
        quick(model, fg.AutoCoupling(model), torch.tensor(Y), max_skipped=3, callbacks=[break_model])


def test_a_model_that_does_not_vectorise_is_looped_over():
    def model(x, y):
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = x @ slope  # shape (n,): with a batch of slopes this is an error
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    x, y = torch.randn(5, 2), torch.randn(5)
    with pytest.warns(UserWarning, match="cannot be vectorised over draws"):
        fit = quick(model, fg.AutoPlanar(model), x, y, num_steps=3, num_particles=2, whiten="init")
    assert len(fit.draws) == 1000
    assert fit.draws.values["slope"].shape == (1000, 2)


# --- bad input --------------------------------------------------------------------------------------------------------


def infinite(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("wall", torch.where(mu.isfinite(), -torch.inf, 0.0))


@pytest.mark.parametrize("Guide", [fg.AutoCoupling, AutoNormal])
def test_nan_in_the_data(Guide):
    y = torch.tensor([0.3, float("nan"), 1.0])
    for validate in (True, False):
        with (
            pyro.validation_enabled(validate),
            pytest.raises(ValueError, match="observed site 'y' holds 1 NaN among its 3 values"),
        ):
            quick(conjugate, Guide(conjugate), y)


@pytest.mark.parametrize("Guide", [fg.AutoCoupling, AutoNormal])
def test_no_finite_elbo_at_the_start(Guide):
    with pytest.raises(ValueError, match="not finite at the start: site 'wall' of the model has log-probability -inf"):
        quick(infinite, Guide(infinite), torch.tensor(Y))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_steps": -5}, ValueError, "num_steps must be at least 1, got -5"),
        ({"num_steps": 2.5}, TypeError, "num_steps must be an integer, got 2.5"),
        ({"num_particles": 0}, ValueError, "num_particles must be at least 1, got 0"),
        ({"max_skipped": 0}, ValueError, "max_skipped must be at least 1, got 0"),
        ({"schedule": "linear"}, ValueError, "unknown schedule 'linear'"),
        ({"loss": Trace_ELBO()}, ValueError, "num_particles belongs to the default loss"),
        ({"optim": pyro.optim.Adam({"lr": 1.0}), "schedule": "cosine"}, ValueError, "has its own schedulers"),
        ({"optim": "adam"}, TypeError, "optim must be a Pyro optimiser or a function"),
        ({"whiten": "mode"}, ValueError, "method must be"),
        ({"num_restarts": 3}, NotImplementedError, "num_restarts is not available yet"),
        ({"checkpoint": "here"}, NotImplementedError, "not available yet"),
        ({"checkpoint_every": 10}, NotImplementedError, "not available yet"),
        ({"resume": True}, NotImplementedError, "not available yet"),
    ],
)
def test_options_that_are_wrong(options, error, message):
    with pytest.raises(error, match=message):
        quick(conjugate, fg.AutoCoupling(conjugate), torch.tensor(Y), **options)


def test_another_guide_has_nothing_to_whiten():
    with pytest.raises(ValueError, match="needs a guide of this library; AutoNormal has no fixed map"):
        quick(correlated, AutoNormal(correlated), whiten="batch_and_match")


def test_shows_a_progress_bar(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tqdm without its notebook widgets
        quick(conjugate, fg.AutoCoupling(conjugate), torch.tensor(Y), progress=True)
    assert "AutoCoupling" in capsys.readouterr().err


def test_parameters_that_are_local_to_modules_are_trained_too():
    with pyro.settings.context(module_local_params=True):
        first, second = (quick(correlated, fg.AutoCoupling(correlated), whiten=None) for _ in range(2))
    assert not pyro.get_param_store()
    # The second guide starts anew, and not where the first has ended; and both learn.
    assert np.array_equal(first.losses, second.losses)
    assert first.losses[-5:].mean() < first.losses[:5].mean()
