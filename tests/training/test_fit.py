"""fit: the defaults, what each option does, and the errors."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from fits import Y, quick
from models import conjugate, conjugate_answer, correlated
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.examples import EIGHT_SCHOOLS


@pytest.mark.parametrize("Guide", [fg.AutoFlow, fg.AutoCoupling, fg.AutoPlanar])
def test_exact_where_the_family_holds_the_posterior(Guide):
    y = torch.tensor(Y, dtype=torch.float64)
    fit = quick(conjugate, Guide(conjugate), y)
    mean, sd, log_evidence = conjugate_answer(y)
    # Whitening finds the normal posterior, and the path gradient of an exact guide is 0: every draw has weight p(y).
    assert fit.elbo.value == pytest.approx(log_evidence, abs=1e-6)
    assert fit.elbo.se < 1e-6
    assert np.isnan(fit.khat.value)
    assert str(fit.verdict).startswith("exact")
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
    elbo = coupling.elbo.value
    assert -31.311 - 0.05 < elbo < -31.311 + 4 * coupling.elbo.se
    assert elbo > normal.elbo.value + 0.1
    summary = coupling.summary()
    for label, mean, sd in [("mu", 4.397, 3.318), ("tau", 3.598, 3.220), ("theta[0]", 6.212, 5.593)]:
        assert abs(summary.loc[label, "mean"] - mean) < 0.1 * sd
        assert abs(summary.loc[label, "sd"] / sd - 1) < 0.05
    assert str(coupling.verdict).startswith("good")


def test_same_seed_same_fit():
    y = torch.tensor(Y)
    first, second, other = (quick(conjugate, AutoNormal(conjugate), y, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.losses, second.losses)
    assert first.elbo == second.elbo
    assert (first.losses != other.losses).all()


def test_a_second_call_continues():
    y = torch.tensor(Y)
    guide = fg.AutoCoupling(conjugate)
    quick(conjugate, guide, y, whiten=None, num_steps=3)
    before = [parameter.clone() for parameter in guide.parameters()]
    quick(conjugate, guide, y, num_steps=3)
    assert any(not torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))
    with pytest.raises(ValueError, match="has been trained"):
        quick(conjugate, guide, y, whiten="batch_and_match")


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, "path"), ({"loss": Trace_ELBO(), "num_particles": None}, "total")],
    ids=["default", "loss"],
)
def test_the_path_gradient_is_for_the_default_loss_alone(options, expected):
    seen = []

    def watched(y):
        seen.append(guide.gradient_now)
        conjugate(y)

    guide = fg.AutoCoupling(watched)
    quick(watched, guide, torch.tensor(Y), num_steps=3, whiten="init", **options)
    assert seen.count(expected) >= 3
    assert ("path" in seen) is (expected == "path")
    assert guide.gradient == "total"


# --- what each option does -------------------------------------------------------------------------------------------


class DoubledELBO(Trace_ELBO):
    def differentiable_loss(self, model, guide, *args, **kwargs):
        return 2 * super().differentiable_loss(model, guide, *args, **kwargs)


class DoubledObjective:
    def loss(self, model, guide, args, kwargs):
        return 2 * Trace_ELBO().differentiable_loss(model, guide, *args, **kwargs)


def doubled_function(model, guide, *args, **kwargs):
    return 2 * Trace_ELBO().differentiable_loss(model, guide, *args, **kwargs)


@pytest.mark.parametrize("loss", [DoubledELBO(num_particles=3), DoubledObjective(), doubled_function])
def test_a_loss_is_used_in_place_of_the_default(loss):
    """Where a guide is exact every draw has the same loss, here twice the usual one."""
    y = torch.tensor(Y, dtype=torch.float64)
    fit = quick(conjugate, fg.AutoFlow(conjugate), y, num_steps=1, num_particles=None, loss=loss)
    assert fit.losses[0] == pytest.approx(-2 * conjugate_answer(y)[2], abs=1e-6)


def start_and_end(**options):
    """The location of AutoNormal before and after one step."""
    guide = AutoNormal(conjugate)
    with pyro.get_param_store().scope():
        guide(torch.tensor(Y))
    before = guide.locs.mu.item()
    quick(conjugate, guide, torch.tensor(Y), num_steps=1, **options)
    return before, guide.locs.mu.item()


@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_an_optimiser_of_torch(rate):
    before, after = start_and_end(optim=lambda parameters: torch.optim.Adam(parameters, lr=rate))
    # The first step of Adam has the length of the learning rate.
    assert abs(after - before) == pytest.approx(rate, rel=1e-4)


@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_an_optimiser_of_pyro(rate):
    before, after = start_and_end(optim=pyro.optim.ClippedAdam({"lr": rate}))
    assert abs(after - before) == pytest.approx(rate, rel=1e-4)


def test_the_step_of_plain_gradient_descent_is_in_proportion_to_its_rate():
    moves = []
    for rate in (1e-3, 2e-3):
        before, after = start_and_end(optim=lambda parameters, rate=rate: torch.optim.SGD(parameters, lr=rate))
        moves.append(after - before)
    assert moves[1] == pytest.approx(2 * moves[0], rel=1e-4)


@pytest.mark.parametrize(
    ("whiten", "is_moved"), [("auto", True), ("batch_and_match", True), (None, False), ("init", False)]
)
def test_whitening(whiten, is_moved):
    y = torch.tensor(Y, dtype=torch.float64)
    mean, sd, log_evidence = conjugate_answer(y)
    fit = quick(conjugate, fg.AutoFlow(conjugate), y, num_steps=1, whiten=whiten)
    fixed_map = fit.guide.flow.transforms[-1]
    found = [fixed_map.loc.item(), fixed_map.scale.item(), float(fit.losses[0])]
    for value, exact in zip(found, [mean, sd, -log_evidence], strict=True):
        assert (abs(value - exact) < 1e-6) is is_moved


@pytest.mark.parametrize(("options", "expected"), [({"num_particles": 5}, 5), ({"num_particles": None}, 256)])
def test_the_number_of_particles(options, expected):
    sizes = []

    def watched(y):
        mu = pyro.sample("mu", pyro.distributions.Normal(0.0, 1.0))
        sizes.append(mu.numel())
        pyro.sample("z", pyro.distributions.Normal(mu, 1.0), obs=y)

    quick(watched, AutoNormal(watched), torch.tensor(0.5), num_steps=7, **options)
    assert sizes.count(expected) == 7


def test_a_backend_is_that_of_the_step():
    """A captured step does not run the model any more; an eager one does at every step."""
    runs = []

    def watched(y):
        runs.append(1)
        conjugate(y)

    calls = {}
    for backend in ("eager", "replay"):
        runs.clear()
        quick(watched, AutoNormal(watched), torch.tensor(Y), num_steps=100, backend=backend)
        calls[backend] = len(runs)
    assert calls["eager"] >= 100 > calls["replay"]


def test_callbacks_see_every_step_and_may_end_the_training():
    seen = []
    first = quick(conjugate, AutoNormal(conjugate), torch.tensor(Y), callbacks=[lambda *each: seen.append(each)])
    assert [step for step, _ in seen] == list(range(20))
    np.testing.assert_array_equal([loss for _, loss in seen], first.losses)
    fit = quick(conjugate, AutoNormal(conjugate), torch.tensor(Y), callbacks=[lambda step, loss: step == 4])
    np.testing.assert_array_equal(fit.losses, first.losses[:5])


def test_keyword_arguments_reach_model_and_guide():
    y = torch.tensor(Y)
    one = quick(conjugate, AutoNormal(conjugate), y)
    other = quick(conjugate, AutoNormal(conjugate), model_kwargs={"y": y})
    np.testing.assert_array_equal(one.losses, other.losses)


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


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_guide_that_is_none():
    with pytest.raises(TypeError, match=r"such as AutoCoupling\(model\), got the class AutoCoupling"):
        quick(conjugate, fg.AutoCoupling, torch.tensor(Y))
    with pytest.raises(TypeError, match="must be a guide of the model.*got 'coupling'"):
        quick(conjugate, "coupling", torch.tensor(Y))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_steps": -5}, ValueError, "num_steps must be at least 1, got -5"),
        ({"num_steps": 2.5}, TypeError, "num_steps must be an integer, got 2.5"),
        ({"num_particles": 0}, ValueError, "num_particles must be at least 1, got 0"),
        ({"max_nonfinite_steps": 0}, ValueError, "max_nonfinite_steps must be at least 1, got 0"),
        ({"schedule": "linear"}, ValueError, "unknown schedule 'linear'"),
        ({"temper": "cosine"}, ValueError, "unknown temper 'cosine'"),
        ({"temper": "rezende_mohamed"}, ValueError, "must rise to 1 in the first round"),
        (
            {"temper": "linear", "loss": Trace_ELBO(), "num_particles": None},
            ValueError,
            "temper belongs to the default loss",
        ),
        ({"loss": Trace_ELBO()}, ValueError, "num_particles belongs to the default loss"),
        ({"optim": pyro.optim.Adam({"lr": 1.0}), "schedule": "cosine"}, ValueError, "has its own schedulers"),
        ({"loss": 3.0, "num_particles": None}, TypeError, "loss must be an ELBO of Pyro, an objective"),
        ({"optim": "adam"}, TypeError, "optim must be a Pyro optimiser or a function"),
        ({"whiten": "mode"}, ValueError, "method must be"),
        ({"batches": pd.DataFrame({"y": Y})}, TypeError, "batches is a frame, .*; give a list of frames"),
        ({"num_restarts": 0}, ValueError, "num_restarts must be at least 1, got 0"),
        ({"checkpoint": "no/such/directory/file"}, ValueError, "the directory of checkpoint .* does not exist"),
        ({"ema_decay": 2.0}, ValueError, "ema_decay must be between 0 and 1, got 2.0"),
        ({"backend": "jit"}, ValueError, "backend must be one of"),
    ],
)
def test_options_that_are_wrong(options, error, message):
    with pytest.raises(error, match=message):
        quick(conjugate, fg.AutoCoupling(conjugate), torch.tensor(Y), **options)


def test_parameters_that_are_local_to_modules_are_trained_too():
    with pyro.settings.context(module_local_params=True):
        first, second = (quick(correlated, fg.AutoCoupling(correlated), whiten=None) for _ in range(2))
    assert not pyro.get_param_store()
    # The second guide starts anew, and not where the first has ended; and both learn.
    assert np.array_equal(first.losses, second.losses)
    # Without whitening a single loss may be far off.
    assert np.median(first.losses[-5:]) < np.median(first.losses[:5])


@pytest.mark.slow
def test_a_solver_that_leaves_more_than_the_error_of_the_elbo_is_a_warning():
    def bent():
        v = pyro.sample("v", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(2 * v**2, 0.3))

    options = {"num_steps": 150, "num_particles": 16, "seed": 0, "progress": False}
    with pytest.warns(
        UserWarning, match=r"fit: the solver .* AutoContinuousFlow leaves an error of .* twice the num_steps"
    ):
        coarse = fg.fit(bent, fg.AutoContinuousFlow(bent, solver="euler", num_steps=1, num_units=8), **options)
    assert coarse.guide.ode_error().log_det > coarse.elbo.se
    fine = fg.fit(bent, fg.AutoContinuousFlow(bent, num_steps=8, num_units=8), **options)
    assert fine.guide.ode_error().log_det < fine.elbo.se
