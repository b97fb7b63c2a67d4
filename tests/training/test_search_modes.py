"""``fit`` looks for modes that its guide has lost: when, at what cost, and without a trace in the training."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from fits import quick
from models import conjugate
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_value

import pyro_flowguides as fg
from pyro_flowguides.diagnostics import mode_finder
from pyro_flowguides.diagnostics.posterior import posterior_from_tree
from pyro_flowguides.model.target import Target


def two_normals(distance=10.0, masses=(0.6, 0.4)):
    """The log density of two normals in the plane, for a batch of points or a single one."""
    logs, centers = torch.tensor(masses).log(), distance / 2**0.5 * torch.eye(2)

    def log_density(x):
        return (logs - (x.unsqueeze(-2) - centers).square().sum(-1) / 2).logsumexp(-1) - math.log(2 * math.pi)

    return fg.LogDensity(log_density, 2)


def one_of_two(model, **options):
    """A fit of the first of two normals."""
    pyro.clear_param_store()
    guide = AutoNormal(model, init_loc_fn=lambda site: torch.tensor([7.0, 0.0]), init_scale=1.0)
    return quick(model, guide, **{"num_steps": 100, "search_modes": True, **options})


@pytest.fixture(scope="module")
def lost():
    return one_of_two(two_normals())


def test_a_fit_names_the_mode_that_its_guide_has_lost(lost):
    assert len(lost.modes) == 2
    first, second = lost.modes
    assert (first.is_lost, second.is_lost) == (False, True)
    assert (first.drawn, second.drawn) == (pytest.approx(1.0, abs=0.01), pytest.approx(0.0, abs=0.01))
    assert second.mass.value == pytest.approx(0.4, abs=0.03)
    assert lost.modes.lost == (second,)
    assert lost.draws.verdict.kind in (fg.VerdictKind.GOOD, fg.VerdictKind.EXACT, fg.VerdictKind.GOOD_ONCE_WEIGHTED)
    assert lost.verdict.kind is fg.VerdictKind.DOUBTFUL
    assert lost.verdict.lost_mass == lost.modes.lost_mass
    sentence = f"doubtful: a mode at {second.where} with about {second.mass.value:.0%} of the mass has not been drawn"
    assert str(lost.verdict).startswith(sentence)
    assert second.where == "x[0] = 0, x[1] = 7.07"
    assert sentence in repr(lost)


def test_modes_of_a_fit_are_saved_and_exported(lost, tmp_path):
    lost.save(tmp_path / "a.fit")
    loaded = fg.FitResult.load(tmp_path / "a.fit")
    assert repr(loaded.modes) == repr(lost.modes)
    assert str(loaded.verdict) == str(lost.verdict)
    torch.testing.assert_close(loaded.modes[1].scale_tril, lost.modes[1].scale_tril, rtol=0, atol=0)
    tree = lost.to_arviz(50, prior=False, predictive=False)
    assert tree.attrs["modes"] == lost.modes.finding
    assert posterior_from_tree(tree).modes == (lost.modes.finding, lost.modes.lost_mass)


def test_the_search_changes_nothing_else():
    y = torch.tensor([0.3, 1.4, 2.2])
    fits = []
    for search in (True, False):
        pyro.clear_param_store()
        fits.append(quick(conjugate, fg.AutoPlanar(conjugate, num_layers=1), y, seed=3, search_modes=search))
        # Neither does what is drawn next.
        fits[-1].next = torch.rand(())
    first, second = fits
    assert first.losses.tolist() == second.losses.tolist()
    assert torch.equal(first.draws.log_q, second.draws.log_q)
    assert first.next == second.next
    assert second.modes is None
    assert str(second.verdict).endswith("A mode that the guide never reaches cannot be detected.")
    assert str(first.verdict).endswith("128 starts found no other mode.")


@pytest.mark.parametrize(
    ("make", "num_steps", "is_searched"),
    [(fg.AutoPlanar, 20, False), (fg.AutoPlanar, 100, True), (AutoNormal, 190, False)],
)
def test_by_default_there_is_a_search_where_it_is_cheap(make, num_steps, is_searched, monkeypatch):
    monkeypatch.setattr(mode_finder, "MIN_STEPS", 1)
    monkeypatch.setitem(mode_finder.STEPS_BEFORE_THE_FIRST, "flow", 90)
    fit = quick(conjugate, make(conjugate), torch.tensor([0.3, 1.4]), num_steps=num_steps)
    assert (fit.modes is not None) is is_searched


# --- kinds of models -----------------------------------------------------------------------------------------------------


def up_to_sign(y):
    """One draw at a time: a positive or a negative mean explains the data as well."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    pyro.sample("y", dist.Normal(mu if mu > 0 else -mu, 0.5), obs=y)


@pytest.mark.filterwarnings("ignore:The model cannot be vectorised")
def test_a_lost_mode_of_a_model_that_runs_draw_by_draw():
    guide = AutoNormal(up_to_sign, init_loc_fn=lambda site: torch.tensor(3.0))
    fit = quick(up_to_sign, guide, torch.tensor(3.0), num_steps=50, search_modes=True)
    assert fit.vectorization == "looped"
    (lost,) = fit.modes.lost
    assert lost.where.startswith("mu = -2.9")
    assert abs(lost.mass.value - 0.5) < 4 * lost.mass.se


def one_label(y):
    """Discrete latents are summed out, and the labels are arbitrary."""
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        pyro.sample("y", dist.Normal(loc[z], 0.5), obs=y)


def test_a_lost_labelling():
    guide = AutoNormal(
        poutine.block(one_label, hide=["z"]), init_loc_fn=init_to_value(values={"loc": torch.tensor([-2.0, 2.0])})
    )
    y = torch.tensor([-2.1, -1.8, -2.6, 2.2, 1.6, 2.4])
    fit = quick(one_label, guide, y, num_steps=50, search_modes=True)
    (lost,) = fit.modes.lost
    assert lost.symmetric_to == 0
    sentence = (
        "has not been drawn; it is mode 0 of fit.modes with the elements of 'loc' in the order 1, 0; what this leaves"
    )
    assert sentence in str(fit.verdict)


def subsampled(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])


@pytest.mark.parametrize(
    ("model", "guide", "options", "reason"),
    [
        (conjugate, AutoDelta, {}, "a single point"),
        (subsampled, AutoNormal, {}, "minibatch"),
        (conjugate, AutoNormal, {"batches": True}, "a batch"),
    ],
    ids=["point", "subsampled", "batches"],
)
def test_where_there_can_be_no_search(model, guide, options, reason, monkeypatch):
    # As after many steps.
    monkeypatch.setitem(mode_finder.POINTS_PER_STEP, "cheap", 1e6)
    y = torch.tensor([0.3, 1.4, 2.0])
    args = (y,)
    if options:
        options, args = {"batches": [y]}, ()
    with pytest.warns(UserWarning, match=f"fit: modes were not looked for: .*{reason}"):
        assert quick(model, guide(model), *args, search_modes=True, **options).modes is None
    # Nobody has asked.
    assert quick(model, guide(model), *args, **options).modes is None


def test_a_model_with_too_many_latents_for_a_hessian(monkeypatch):
    monkeypatch.setattr(mode_finder, "MAX_DIM", 1)
    with pytest.warns(UserWarning, match="modes were not looked for.*the model has 2 latents; .*a matrix of 2 × 2"):
        assert one_of_two(two_normals()).modes is None


# --- cost, repetition, interrupts ----------------------------------------------------------------------------------------


def rough(x):
    """Every batch of starts finds new modes."""
    return torch.cos(3 * x).sum(-1) - x.square().sum(-1) / 200


def walled(x):
    """A batch with a point outside has no density, and is halved until that is found."""
    if bool((x[..., 0] > 1).any()):
        raise ValueError("out of range")
    return -x.square().sum(-1) / 200


@pytest.mark.parametrize(("log_density", "num_modes"), [(rough, 20), (walled, 1)])
@pytest.mark.filterwarnings("ignore:The model cannot be vectorised")
def test_what_a_search_asks_of_the_target_is_bounded(monkeypatch, log_density, num_modes):
    number, log_prob = [0], Target.log_prob

    def counted(self, x):
        number[0] += max(len(x), mode_finder.SMALL_BATCH)
        return log_prob(self, x)

    monkeypatch.setattr(Target, "log_prob", counted)
    model = fg.LogDensity(log_density, 2)
    monkeypatch.setitem(mode_finder.POINTS_PER_STEP, "cheap", 200)
    fit = quick(model, AutoNormal(model, init_scale=0.1), num_steps=100)
    assert len(fit.modes) >= num_modes
    # Symmetries, and masses where the model raises, are beside the allowance.
    assert number[0] < 2 * 200 * 100


def test_a_fit_that_goes_on_from_its_checkpoint_finds_the_same_modes(tmp_path):
    model = two_normals()
    whole = one_of_two(model, checkpoint=tmp_path / "a.pt")
    again = one_of_two(model, checkpoint=fg.Checkpoint(tmp_path / "a.pt", resume=True))
    assert repr(again.modes) == repr(whole.modes)


def test_an_interrupt_ends_the_search_and_keeps_the_fit(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(mode_finder.Search, "run", interrupted)
    fit = one_of_two(two_normals())
    assert fit.modes is None
    assert fit.interrupted
    assert len(fit.losses) == 100
    assert re.search("A mode that the guide never reaches cannot be detected", str(fit.verdict))


def test_a_search_that_fails_does_not_take_the_fit_with_it(monkeypatch):
    def failing(*args):
        raise RuntimeError("no convergence")

    monkeypatch.setattr(mode_finder.Search, "run", failing)
    with pytest.warns(UserWarning, match="fit: the search for modes failed: no convergence"):
        assert one_of_two(two_normals()).modes is None
