"""Minibatches as the arguments of the steps."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from fits import Y, quick
from models import conjugate
from pyro import poutine

import pyro_flowguides as fg
from pyro_flowguides.model.call import ModelCall
from pyro_flowguides.training.batches import Batches, warn_of_plate_of_the_batch


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


@pytest.mark.filterwarnings("ignore:fit. observed site 'y' is in plate 'data' of size")
@pytest.mark.parametrize("kind", ["tuples", "dicts", "tensors"])
def test_batches_are_arguments_in_turn(kind):
    y = torch.tensor(Y)
    parts = [y[:3], y[3:]]
    batches = {"tuples": [(part,) for part in parts], "dicts": [{"y": part} for part in parts], "tensors": parts}[kind]
    losses = {}
    for each in (batches, [batches[0]], [batches[1]]):
        guide = fg.AutoFlow(conjugate, lambda dim: fg.transforms.Affine(dim), affine=None)
        fit = quick(conjugate, guide, y, batches=each, num_steps=3, whiten=None, schedule=lambda progress: 0.0)
        losses[len(each), id(each[0])] = fit.losses
    both, first, second = losses.values()
    # The same random numbers, since nothing learns.
    assert both.tolist() == [first[0], second[1], first[2]]


def test_the_first_batch_stands_for_arguments_that_are_not_given():
    y = torch.tensor(Y)
    guide = fg.AutoFlow(conjugate)
    fit = quick(conjugate, guide, batches=[y[:3], y[3:]], num_steps=1)
    assert torch.equal(fit.args[0], y[:3])
    assert torch.equal(fit.draws.observed["y"], y[:3])


def test_batches_that_cannot_be_repeated():
    y = torch.tensor(Y)
    with pytest.raises(ValueError, match="give a list or a DataLoader, not a generator"):
        quick(conjugate, fg.AutoPlanar(conjugate, num_layers=1), y, batches=((y,) for _ in range(3)), whiten=None)


@pytest.mark.parametrize("generator", [None, 3])
def test_batches_are_taken_up_where_they_were_left(generator):
    def loader():
        own = None if generator is None else torch.Generator().manual_seed(generator)
        return torch.utils.data.DataLoader(torch.arange(10), batch_size=3, shuffle=True, generator=own)

    batches = Batches(loader())
    for _ in range(6):
        next(batches)
    state = batches.state_dict()
    expected = [next(batches)[0][0].tolist() for _ in range(2)]
    torch.manual_seed(99)
    again = Batches(loader())
    again.load_state_dict(state)
    assert [next(again)[0][0].tolist() for _ in range(2)] == expected


def plate_of_the_batch(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.mark.parametrize("with_all", [True, False])
def test_a_plate_of_the_size_of_the_batch_is_named(with_all):
    """Each step takes its batch for all of the data: an sd of 0.32 where the data give 0.16."""
    y = torch.linspace(-1.0, 3.0, 40)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(y), batch_size=10)
    with pytest.warns(UserWarning, match="'y' is in plate 'data' of size 10, the size of a batch"):
        quick(plate_of_the_batch, fg.AutoFlow(plate_of_the_batch), *[y] * with_all, batches=loader, whiten=None)


def test_a_plate_with_its_full_size_is_not_suspicious():
    y = torch.linspace(-1.0, 3.0, 40)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(y), batch_size=10)
    quick(minibatch_model, fg.AutoFlow(minibatch_model), y, batches=loader, whiten=None)


def scaled_to_the_data(y):
    with poutine.scale(scale=4.0):
        plate_of_the_batch(y)


def two_plates(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("groups", 3):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=torch.zeros(3))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "num_rows", "size", "as_list", "is_named"),
    [
        (plate_of_the_batch, 40, 10, True, True),
        (plate_of_the_batch, 10, 10, False, True),
        (plate_of_the_batch, 40, 40, False, False),
        (plate_of_the_batch, 10, 10, True, False),
        (scaled_to_the_data, 40, 10, False, False),
        (two_plates, 40, 10, True, True),
    ],
    ids=["list", "loader", "all of the data", "batches as large as the data", "scaled", "second plate"],
)
def test_which_plates_are_those_of_a_batch(model, num_rows, size, as_list, is_named, recwarn):
    """A plate of another size than at the arguments of the fit; where there are none, one as large as a batch of a loader."""
    y = torch.linspace(-1.0, 3.0, 40)
    batches = [y[:size]]
    if not as_list:
        batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(y), batch_size=size)
    prototype = poutine.trace(model).get_trace(y[:num_rows])
    warn_of_plate_of_the_batch(ModelCall(model, (y[:size],)), batches, prototype)
    found = [str(each.message) for each in recwarn]
    assert len(found) == is_named
    assert all("site 'y' is in plate 'data' of size 10" in each for each in found)


@pytest.mark.parametrize(
    ("scheduler", "options", "rate"),
    [("ExponentialLR", {"gamma": 0.9}, 0.1 * 0.9**20), ("ReduceLROnPlateau", {"patience": 0, "threshold": 1e9}, None)],
)
def test_a_scheduler_of_pyro_is_stepped(scheduler, options, rate):
    arguments = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, **options}
    optim = getattr(pyro.optim, scheduler)(arguments)
    quick(conjugate, fg.AutoFlow(conjugate), torch.tensor(Y), optim=optim, whiten=None)
    rates = {group["lr"] for each in optim.optim_objs.values() for group in each.optimizer.param_groups}
    assert max(rates) == pytest.approx(rate) if rate else max(rates) < 0.01
