"""What a fit returns."""

import time

import pytest
import torch
from fits import Y, quick
from models import conjugate
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg


def test_reports_what_happened():
    before = time.perf_counter()
    fit = quick(conjugate, fg.AutoCoupling(conjugate), torch.tensor(Y))
    seconds = time.perf_counter() - before
    assert fit.losses.shape == (20,)
    assert (fit.num_skipped, fit.num_rolled_back) == (0, 0)
    assert len(fit.draws) == 10_000
    # Nearly all of the time of the call, whatever the machine.
    assert 0.2 * seconds < fit.wall_time <= seconds
    assert fit.restarts == ()
    assert fit.parameters == {}


def test_a_fit_has_the_estimates_of_its_draws():
    fit = quick(conjugate, AutoNormal(conjugate), torch.tensor(Y))
    assert fit.elbo == fit.draws.elbo
    assert fit.khat == fit.draws.khat
    assert fit.ess == fit.draws.ess
    assert fit.verdict == fit.draws.verdict
    assert 1 < float(fit.ess) < 10_000


def test_a_fit_prints_what_one_wants_to_know():
    fit = quick(conjugate, fg.AutoCoupling(conjugate), torch.tensor(Y))
    assert repr(fit) == (
        f"FitResult of AutoCoupling: ELBO {fit.elbo} after 20 steps, {fit.wall_time:.1f} s; {fit.verdict}"
    )
    assert "±" in str(fit.elbo)


def test_summary_is_that_of_the_draws():
    fit = quick(conjugate, AutoNormal(conjugate), torch.tensor(Y))
    summary = fit.summary(quantiles=[0.5], kind="stats")
    assert summary.loc["mu", "mean"] == pytest.approx(fit.draws.values["mu"].mean().item(), rel=1e-6)
    weighted = fit.summary(weighted=True)
    assert weighted.loc["mu", "mean"] == pytest.approx(float(fit.draws.mean()["mu"]), rel=1e-6)
    assert weighted.loc["mu", "mean"] != summary.loc["mu", "mean"]
