"""Training by maximum likelihood: rows, epochs, the rows that are held out, and how long it goes on."""

import math

import pyro
import pytest
import torch

from pyro_flowguides.training import likelihood
from pyro_flowguides.training.likelihood import Epochs, MaximumLikelihood, Plan, Rows, score, split

PLAN = {
    "num_steps": 3,
    "num_epochs": None,
    "batch_size": 4,
    "patience": None,
    "optim": None,
    "schedule": None,
    "progress": False,
    "backend": "eager",
}


def numbered(num_rows, **options):
    """Rows that tell their number, each with a context that tells it too."""
    x = torch.arange(float(num_rows)).unsqueeze(-1)
    return Rows(x, **{"context": 100 + x, **options})


@pytest.mark.parametrize(("num_rows", "batch_size", "sizes"), [(10, 4, [4, 4]), (8, 4, [4, 4]), (3, 4, [3])])
def test_an_epoch_takes_each_row_once_and_in_a_new_order(num_rows, batch_size, sizes):
    """The rows of the last, incomplete batch come in a later epoch."""
    epochs = Epochs(numbered(num_rows), batch_size)
    assert len(epochs) == len(sizes)
    orders = []
    for _ in range(30):
        batches = list(epochs)
        assert [len(x) for x, _ in batches] == sizes
        for x, context in batches:
            assert torch.equal(context, 100 + x)
        order = torch.cat([x for x, _ in batches]).flatten().tolist()
        assert len(set(order)) == len(order)
        orders.append(order)
    assert len(set(map(tuple, orders))) > 1
    assert {row for order in orders for row in order} == set(range(num_rows))


def test_noise_makes_integers_continuous_once():
    rows = numbered(2000, noisy=True)
    noise = rows.continuous().x - rows.x
    assert 0 <= float(noise.min()) < 0.01
    assert 0.99 < float(noise.max()) <= 1
    assert float(noise.mean()) == pytest.approx(0.5, abs=4 / math.sqrt(12 * 2000))
    assert not torch.equal(rows.continuous().x, rows.continuous().x)
    # What has its noise gets no more of it.
    ready = rows.continuous()
    assert torch.equal(ready.continuous().x, ready.x)
    assert torch.equal(ready.context, rows.context)
    # A part of the rows is noisy as they are.
    part = rows[:5].continuous()
    assert not torch.equal(part.x, rows.x[:5])
    assert torch.equal(part.context, rows.context[:5])


def test_many_rows_are_scored_in_parts(monkeypatch):
    sizes = []

    def log_prob(x, context):
        sizes.append(len(x))
        return (x + 2 * context).squeeze(-1)

    monkeypatch.setattr(likelihood, "SCORED_TOGETHER", 4)
    rows = numbered(10)
    assert torch.equal(score(log_prob, rows), (rows.x + 2 * rows.context).squeeze(-1))
    assert sizes == [4, 4, 2]


def test_rows_that_are_held_out_are_others():
    train, held_out = split("fit", numbered(50), 0.1)
    assert (len(train), len(held_out)) == (45, 5)
    assert sorted(torch.cat([train.x, held_out.x]).flatten().tolist()) == list(range(50))
    assert torch.equal(train.context, 100 + train.x)
    assert torch.equal(held_out.context, 100 + held_out.x)
    again, _ = split("fit", numbered(50), 0.1)
    assert not torch.equal(again.x, train.x)


@pytest.mark.parametrize(
    ("num_rows", "validation", "message"),
    [
        (10, 0.0, "must be a fraction between 0 and 1.* got 0.0"),
        (10, 1.0, "must be a fraction between 0 and 1.* got 1.0"),
        (4, 0.1, "4 rows are too few to hold 0.1 of them out"),
        (4, 0.75, "4 rows are too few to hold 0.75 of them out"),
    ],
)
def test_there_are_rows_on_both_sides(num_rows, validation, message):
    with pytest.raises(ValueError, match=f"^fit: .*{message}"):
        split("fit", numbered(num_rows), validation)


def test_the_fewest_rows_on_both_sides():
    assert [len(each) for each in split("fit", numbered(3), 0.3)] == [2, 1]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"num_epochs": 2}, ValueError, "give num_steps or num_epochs, not both"),
        ({"num_steps": None, "num_epochs": 0}, ValueError, "num_epochs must be at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"patience": 0}, ValueError, "patience must be at least 1"),
        ({"max_nonfinite_steps": 0}, ValueError, "max_nonfinite_steps must be at least 1"),
        ({"optim": "adam"}, TypeError, "optim must be a function"),
        ({"optim": pyro.optim.Adam({"lr": 0.1})}, TypeError, "optim must be a function"),
    ],
)
def test_a_plan_names_what_is_wrong(options, kind, message):
    with pytest.raises(kind, match=f"^fit_density: {message}"):
        Plan(**{**PLAN, **options}).check("fit_density")
    Plan(**PLAN).check("fit_density")


# --- the training -----------------------------------------------------------------------------------------------------


@pytest.fixture
def frequent_looks(monkeypatch):
    monkeypatch.setattr(likelihood, "CHECK_EVERY", 5)


def trained(losses, num_rows=8, **options):
    """A training whose held-out rows have these losses, look by look, and whose parameter moves by 1 in every step."""
    given = iter(losses)
    module = torch.nn.Module()
    module.at = torch.nn.Parameter(torch.zeros(()))

    def log_prob(x, context=None):
        pyro.module("density", module)
        return module.at - 0 * x.sum(-1) if len(x) > 1 else -torch.full((1,), next(given))

    plan = Plan(**{**PLAN, "optim": lambda leaves: torch.optim.SGD(leaves, lr=1.0), "schedule": "constant", **options})
    training = MaximumLikelihood("fit_density", log_prob, Rows(torch.zeros(num_rows, 1)), Rows(torch.zeros(1, 1)), plan)
    with pyro.get_param_store().scope():
        training.run()
    return training, float(module.at.detach())


@pytest.mark.usefixtures("frequent_looks")
def test_the_parameters_are_those_of_the_best_look():
    """Looks at the start, every 5 steps, and at the end."""
    steps = [0, 5, 10, 15, 17]
    for best in range(5):
        losses = [3.0, 3.0, 3.0, 3.0, 3.0]
        losses[best] = 2.0
        training, at = trained(losses, num_steps=17)
        assert [step for step, _ in training.looks] == steps
        assert [loss for _, loss in training.looks] == losses
        assert training.best_step == steps[best]
        assert at == pytest.approx(steps[best], abs=1e-3)
        assert not training.stopped_early


@pytest.mark.usefixtures("frequent_looks")
@pytest.mark.parametrize(
    ("losses", "patience", "num_looks", "best"),
    [
        ([5.0, 4.0, 4.0, 4.5, 3.0], 2, 4, 5),
        ([5.0, 4.0, 4.0, 3.0, 3.5], 2, 5, 15),
        ([5.0, 6.0, 7.0, 8.0, 9.0], 1, 2, 0),
        ([5.0, 6.0, 7.0, 8.0, 9.0], None, 5, 0),
        ([math.nan, 6.0, math.nan, 5.0, 7.0], 3, 5, 15),
    ],
)
def test_patience_counts_the_looks_since_the_best_one(losses, patience, num_looks, best):
    training, at = trained(losses, num_steps=20, patience=patience)
    assert len(training.looks) == num_looks
    assert training.stopped_early is (num_looks < 5)
    assert training.best_step == best
    assert at == pytest.approx(best, abs=1e-3)


@pytest.mark.usefixtures("frequent_looks")
def test_a_look_once_in_an_epoch_is_enough():
    training, _ = trained([3.0, 2.0, 4.0], num_rows=40, num_steps=17)
    assert [step for step, _ in training.looks] == [0, 10, 17]


def test_epochs_are_counted_in_steps():
    training = MaximumLikelihood(
        "fit_density", None, Rows(torch.zeros(11, 1)), None, Plan(**{**PLAN, "num_steps": None, "num_epochs": 3})
    )
    assert training.num_steps == 3 * (11 // 4)
