"""fit: the defaults, the guard, the options, the errors."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from models import conjugate, conjugate_answer, correlated
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value

import pyro_flowguides as fg
from pyro_flowguides.examples import EIGHT_SCHOOLS
from pyro_flowguides.training.schedules import Progress, find_schedule

Y = [0.3, 1.4, 2.2, 0.7, 1.9]


def quick(model, guide, *args, **options):
    """A short fit, without a captured step where that is not what is tested."""
    defaults = {"num_steps": 20, "num_particles": 8, "seed": 0, "progress": False, "backend": "eager"}
    return fg.fit(model, guide, *args, **{**defaults, **options})


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
    assert coupling.elbo.value < -31.311 + 4 * coupling.elbo.se
    assert coupling.elbo.value > -31.311 - 0.05
    assert coupling.elbo.value > normal.elbo.value + 0.1
    summary = coupling.summary()
    for label, mean, sd in [("mu", 4.397, 3.318), ("tau", 3.598, 3.220), ("theta[0]", 6.212, 5.593)]:
        assert abs(summary.loc[label, "mean"] - mean) < 0.1 * sd
        assert abs(summary.loc[label, "sd"] / sd - 1) < 0.05
    assert str(coupling.verdict).startswith("good")


def test_reports_what_happened():
    fit = quick(conjugate, fg.AutoCoupling(conjugate), torch.tensor(Y))
    assert fit.losses.shape == (20,)
    assert fit.num_skipped == 0
    assert len(fit.draws) == 10_000
    assert fit.wall_time > 0


def test_a_fit_prints_what_one_wants_to_know():
    fit = quick(conjugate, fg.AutoCoupling(conjugate), torch.tensor(Y))
    assert repr(fit).startswith(f"FlowFit of AutoCoupling: ELBO {fit.elbo} after 20 steps, ")
    assert repr(fit).endswith(str(fit.verdict))
    assert "tensor" not in repr(fit)


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
    assert np.isfinite(fit.elbo.value)


def faulty(broken):
    """A model whose likelihood is NaN while a tensor says so."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("broken", torch.where(broken, torch.nan, -1.0) * (mu - 1) ** 2)

    return model


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
    assert np.isfinite(fit.elbo.value)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_too_many_skipped_steps_end_with_the_site(backend):
    broken = torch.tensor(False)
    model = faulty(broken)

    def break_model(step, loss):
        broken.fill_(True)

    with pytest.raises(RuntimeError, match="steps in a row .* site 'broken' of the model has log-probability nan"):
        quick(
            model,
            fg.AutoPlanar(model, num_layers=1),
            torch.tensor(Y),
            max_skipped=3,
            callbacks=[break_model],
            backend=backend,
        )


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


def test_a_model_that_does_not_vectorise_is_looped_over():
    def model(x, y):
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = x @ slope  # shape (n,): with a batch of slopes this is an error
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    x, y = torch.randn(5, 2), torch.randn(5)
    with pytest.warns(UserWarning, match="cannot be vectorised over draws") as caught:
        fit = quick(model, fg.AutoPlanar(model), x, y, num_steps=3, num_particles=2, whiten="init")
    (message,) = {str(warning.message) for warning in caught}
    assert "docs/how_to/vectorise.md" in message
    # Pyro's table of sites is no sentence.
    assert "Trace Shapes" not in message
    assert len(fit.draws) == 1000
    assert fit.draws.values["slope"].shape == (1000, 2)


# --- schedules and the end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("cosine", [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0]),
        ("step", [1, 1, 0.1, 0.01, 0.01]),
        ("warm_up", [0, *(0.5 * (1 + np.cos(np.pi * (p - 0.05) / 0.95)) for p in (0.25, 0.5, 0.75)), 0]),
    ],
)
def test_schedules(schedule, expected):
    function = find_schedule(schedule)
    assert [function(progress) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx(expected, abs=1e-12)
    if schedule == "warm_up":
        assert function(0.025) == pytest.approx(0.5)


def test_what_is_left_of_a_converged_fit_goes_by_faster():
    progress = Progress(1000)
    assert [progress.fraction(step) for step in (0, 500)] == [0, 0.5]
    progress.converged_at = 400
    assert progress.end == 500
    assert progress.fraction(400) == 0.4
    assert progress.fraction(450) == pytest.approx(0.7)
    assert progress.fraction(500) == pytest.approx(1.0)
    progress.converged_at = 950
    assert progress.end == 1000


def test_a_fit_that_has_converged_ends_early():
    fit = quick(conjugate, fg.AutoPlanar(conjugate, num_layers=1), torch.tensor(Y), num_steps=2000, tolerance=1e-3)
    assert len(fit.losses) == 300


def test_a_fit_that_still_improves_goes_on():
    """Without whitening, at a small learning rate, the bound rises for long."""
    fit = quick(
        conjugate,
        AutoNormal(conjugate, init_scale=0.01),
        100 + torch.tensor(Y),
        num_steps=400,
        tolerance=1e-3,
        schedule="constant",
        num_particles=16,
    )
    assert len(fit.losses) == 400


def test_the_average_of_the_parameters_is_returned():
    y = torch.tensor(Y)
    visited = []
    guide = AutoNormal(conjugate)
    quick(
        conjugate,
        guide,
        y,
        num_steps=10,
        average=0.99,
        callbacks=[lambda *_: visited.append(pyro.param("AutoNormal.locs.mu").item())],
    )
    # So long a memory is the plain mean of so few steps.
    assert pyro.param("AutoNormal.locs.mu").item() == pytest.approx(np.mean(visited), rel=1e-5)


# --- minibatches ------------------------------------------------------------------------------------------------------


def minibatch_model(y, size=40):
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 2.0))
    with pyro.plate("data", size, subsample_size=len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def test_minibatches_give_the_answer_of_the_full_data(dtype):
    y = torch.linspace(-1.0, 3.0, 40, dtype=dtype)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(y), batch_size=10, shuffle=True)
    guide = fg.AutoFlow(minibatch_model, lambda dim: fg.transforms.Affine(dim), affine=None)
    fit = quick(
        minibatch_model,
        guide,
        y,
        batches=loader,
        num_steps=1500,
        num_particles=16,
        optim=lambda parameters: torch.optim.Adam(parameters, lr=0.1),
        whiten=None,
        backend="auto",
    )
    precision = 1 / 4 + 40
    mean, sd = float(y.sum()) / precision, precision**-0.5
    summary = fit.summary()
    assert abs(summary.loc["mu", "mean"] - mean) < 0.25 * sd
    assert abs(summary.loc["mu", "sd"] / sd - 1) < 0.15
    assert len(fit.losses) == 1500


@pytest.mark.parametrize("kind", ["tuples", "dicts", "tensors"])
def test_batches_are_arguments(kind):
    y = torch.tensor(Y)
    sizes = []

    def model(y):
        sizes.append(len(y))
        conjugate(y)

    parts = [y[:3], y[3:]]
    batches = {"tuples": [(part,) for part in parts], "dicts": [{"y": part} for part in parts], "tensors": parts}[kind]
    fit = quick(model, fg.AutoPlanar(model, num_layers=1), batches=batches, num_steps=4, whiten=None)
    assert len(fit.losses) == 4
    assert set(sizes) == {3, 2}


def test_batches_that_cannot_be_repeated():
    y = torch.tensor(Y)
    with pytest.raises(ValueError, match="give a list or a DataLoader, not a generator"):
        quick(conjugate, fg.AutoPlanar(conjugate, num_layers=1), y, batches=((y,) for _ in range(3)), whiten=None)


# --- restarts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "Guide", [lambda model: fg.AutoPlanar(model, num_layers=2), AutoNormal], ids=["flow", "normal"]
)
def test_the_best_of_several_restarts_is_kept(Guide):
    y = torch.tensor(Y)
    guide = Guide(conjugate)
    options = {"whiten": None} if isinstance(guide, fg.AutoFlow) else {}
    fit = quick(conjugate, guide, y, num_restarts=3, num_steps=15, **options)
    assert fit.guide is guide
    elbos = [draws.elbo.value for draws in fit.restarts]
    assert len(elbos) == 3
    assert len({round(elbo, 9) for elbo in elbos}) == 3
    assert fit.elbo.value == max(elbos)
    # The guide itself is the best one.
    again = fg.draw(conjugate, guide, y, num_samples=10_000).elbo
    assert abs(again.value - fit.elbo.value) < 4 * (again.se**2 + fit.elbo.se**2) ** 0.5 + 1e-6
    assert abs(again.value - min(elbos)) > abs(again.value - fit.elbo.value)
    # And what Pyro's store holds is what the guide holds.
    stored = pyro.get_param_store()._params
    for name, leaf in guide.named_parameters():
        assert stored[f"{type(guide).__name__}.{name.removesuffix('_unconstrained')}"] is leaf


def test_a_restart_is_the_fit_of_its_seed():
    y = torch.tensor(Y)
    several = quick(conjugate, fg.AutoPlanar(conjugate, num_layers=2), y, num_restarts=2, seed=5, whiten=None)
    for index in (0, 1):
        pyro.clear_param_store()
        pyro.set_rng_seed(77)  # What was drawn before does not matter.
        single = quick(conjugate, fg.AutoPlanar(conjugate, num_layers=2), y, seed=5 + index, whiten=None)
        torch.testing.assert_close(several.restarts[index].values["mu"], single.draws.values["mu"])


def test_restarts_of_a_model_with_a_network():
    torch.manual_seed(0)
    network = torch.nn.Linear(1, 1)

    def model(y):
        pyro.module("network", network)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(network(mu.unsqueeze(-1)).squeeze(-1), 1.0), obs=y)

    y = torch.tensor(Y)
    guide = fg.AutoPlanar(model, num_layers=1)
    fit = quick(model, guide, y, num_restarts=2, whiten=None, num_steps=60)
    again = fg.draw(model, guide, y, num_samples=10_000).elbo
    assert abs(again.value - fit.elbo.value) < 4 * (again.se**2 + fit.elbo.se**2) ** 0.5 + 1e-6
    for name, leaf in network.named_parameters():
        assert torch.equal(pyro.param(f"network$$${name}"), leaf)


def test_an_interrupt_ends_the_restarts():
    calls = []

    def interrupt(step, loss):
        calls.append(step)
        if len(calls) == 8:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted after 3 of 5 steps"):
        fit = quick(
            conjugate, AutoNormal(conjugate), torch.tensor(Y), num_steps=5, num_restarts=4, callbacks=[interrupt]
        )
    assert len(fit.restarts) == 2


def test_a_restart_that_fails_is_left_out():
    broken = torch.tensor(False)
    model = faulty(broken)
    steps = []

    def break_second(step, loss):
        steps.append(step)
        broken.fill_(7 <= len(steps) < 11)

    with pytest.warns(UserWarning, match="restart 1 of 3 failed: .* in a row") as caught:
        fit = quick(
            model,
            AutoNormal(model),
            torch.tensor(Y),
            num_steps=6,
            num_restarts=3,
            max_skipped=3,
            callbacks=[break_second],
        )
    assert len(fit.restarts) == 2
    assert caught[0].filename == __file__


# --- bad input --------------------------------------------------------------------------------------------------------


def infinite(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.factor("wall", torch.where(mu.isfinite(), -torch.inf, 0.0))


def test_a_guide_that_is_none():
    with pytest.raises(TypeError, match=r"such as AutoCoupling\(model\), got the class AutoCoupling"):
        quick(conjugate, fg.AutoCoupling, torch.tensor(Y))
    with pytest.raises(TypeError, match="must be a guide of the model.*got 'coupling'"):
        quick(conjugate, "coupling", torch.tensor(Y))


def test_a_discrete_site_that_nobody_sums_out():
    def mixture(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            which = pyro.sample("which", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(mu * which, 1.0), obs=y)

    guide = fg.AutoCoupling(poutine.block(mixture, hide=["which"]))
    with pytest.raises(ValueError, match="leaves out the discrete site 'which', and the default loss does not sum"):
        quick(mixture, guide, torch.tensor(Y))


@pytest.mark.parametrize("Guide", [fg.AutoCoupling, AutoNormal])
def test_nan_in_the_data(Guide):
    y = torch.tensor([0.3, float("nan"), 1.0])
    for validate in (True, False):
        with (
            pyro.validation_enabled(validate),
            pytest.raises(ValueError, match="observed site 'y' holds 1 NaN among its 3 values"),
        ):
            quick(conjugate, Guide(conjugate), y)


def test_some_draws_at_the_start_may_have_no_density():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(mu < 0, -torch.inf, 0.0))

    for seed in range(5):
        pyro.clear_param_store()
        fit = quick(model, AutoNormal(model, init_scale=1.0), num_steps=5, num_particles=1, seed=seed)
        assert len(fit.losses) == 5


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
        ({"num_restarts": 0}, ValueError, "num_restarts must be at least 1, got 0"),
        ({"checkpoint": "no/such/directory/file"}, ValueError, "the directory of checkpoint .* does not exist"),
        ({"checkpoint_every": 10}, ValueError, "need a file, checkpoint="),
        ({"resume": True}, ValueError, "need a file, checkpoint="),
        ({"tolerance": -1.0}, ValueError, "tolerance must be at least 0, got -1.0"),
        ({"average": 2.0}, ValueError, "average must be between 0 and 1, got 2.0"),
        ({"backend": "jit"}, ValueError, "backend must be one of"),
    ],
)
def test_options_that_are_wrong(options, error, message):
    with pytest.raises(error, match=message):
        quick(conjugate, fg.AutoCoupling(conjugate), torch.tensor(Y), **options)


def badly_scaled(x, y):
    """An intercept and a slope that depend on one another, at a scale far from that of their priors."""
    intercept = pyro.sample("intercept", dist.Normal(y.new_tensor(0.0), 100.0))
    slope = pyro.sample("slope", dist.Normal(y.new_tensor(0.0), 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(intercept + slope * x, 0.5), obs=y)


def test_parts_of_a_list_start_at_the_medians_of_a_whitened_flow():
    """A product cannot hold the correlation; its parts start at the posterior's means, and fit leaves their maps there."""
    x = torch.linspace(0.0, 10.0, 30, dtype=torch.float64)
    y = 87.0 + 3.0 * x + 0.5 * torch.randn(30, dtype=torch.float64)
    design = torch.stack([torch.ones_like(x), x], -1)
    precision = design.mT @ design / 0.25 + torch.diag(torch.tensor([1e-4, 1e-2], dtype=torch.float64))
    mean = torch.linalg.solve(precision, design.mT @ y / 0.25)
    whole = fg.AutoFlow(badly_scaled).whiten(x, y)
    start = init_to_value(values=whole.median(x, y))
    guide = AutoGuideList(badly_scaled)
    for site in ("intercept", "slope"):
        part = poutine.block(badly_scaled, expose=[site])
        guide.append(fg.AutoPlanar(part, num_layers=1, init_loc_fn=start, init_scale=0.01))
    guide(x, y)
    maps = [(part.flow.transforms[-1].loc.clone(), part.flow.transforms[-1].scale.clone()) for part in guide]
    medians = guide.median(x, y)
    sd = precision.inverse().diag().sqrt()
    for index, site in enumerate(("intercept", "slope")):
        assert abs(medians[site] - mean[index]) < 0.01 * sd[index]
    quick(badly_scaled, guide, x, y, num_steps=3)
    for part, (loc, scale) in zip(guide, maps, strict=True):
        torch.testing.assert_close(part.flow.transforms[-1].loc, loc, rtol=0, atol=0)
        torch.testing.assert_close(part.flow.transforms[-1].scale, scale, rtol=0, atol=0)


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
    # Without whitening a single loss may be far off.
    assert np.median(first.losses[-5:]) < np.median(first.losses[:5])
