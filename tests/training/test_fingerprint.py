"""A checkpoint knows what it belongs to: what is refused, by which sentence, and what may change."""

import collections
import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from fits import Y
from models import conjugate
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.training import fingerprint

DATA = torch.tensor(Y)


def model(y, scale=1.0):
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(1.0), 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


def narrow(y, scale=1.0):
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(1.0), 1.99))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, scale), obs=y)


def renamed(y, scale=1.0):
    nu = pyro.sample("nu", dist.Normal(y.new_tensor(1.0), 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(nu, scale), obs=y)


def planar(num_layers):
    return lambda model: fg.AutoPlanar(model, num_layers=num_layers)


def affine(**options):
    return lambda model: fg.AutoFlow(model, fg.transforms.Affine, affine=None, **options)


def squared(scale):
    """Recipes with the same parameters, and other functions of them."""

    class Scaled(fg.transforms.Affine):
        def forward_and_log_det(self, z, context=None):
            x, log_det = super().forward_and_log_det(z, context)
            return scale * x, log_det + np.log(scale)

    return lambda model: fg.AutoFlow(model, Scaled, affine=None)


def fitted(path, *, model=model, guide=planar(1), args=(DATA,), resume=True, **options):
    defaults = {
        "num_steps": 4,
        "seed": 0,
        "schedule": "constant",
        "backend": "eager",
        "progress": False,
        "whiten": None,
    }
    if "loss" not in options:
        defaults["num_particles"] = 4
    return fg.fit(
        model, guide(model), *args, checkpoint=fg.Checkpoint(path, every=2, resume=resume), **{**defaults, **options}
    )


def loader(y):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(y), batch_size=5)


SGD = functools.partial(torch.optim.SGD, lr=0.1)
# The options of the fit that wrote the checkpoint, those of the one that is to continue, and the sentence.
OTHERS = {
    "values": ({}, {"args": (DATA + 100,)}, r"argument 1 was float\d+ \[5\] on cpu with values \w+, and is .* here"),
    "one value": ({}, {"args": (torch.cat([DATA[:4], DATA[4:] + 1e-3]),)}, "argument 1 was"),
    "dtype": ({}, {"args": (DATA.double() if DATA.dtype == torch.float32 else DATA.float(),)}, "was float"),
    "shape": ({}, {"args": (DATA[:4],)}, r"site 'y' was observed, Normal, .*\[5\] on cpu, and is .*\[4\] on cpu"),
    "keyword": ({}, {"model_kwargs": {"scale": 2.0}}, "argument 'scale' was none, and is 2.0 here"),
    "number": (
        {"model_kwargs": {"scale": 3.0}},
        {"model_kwargs": {"scale": 2.0}},
        "argument 'scale' was 3.0, and is 2.0",
    ),
    "batches": ({"batches": [(DATA,)]}, {"batches": [(DATA + 1,)]}, "batches was .*, and is"),
    "loader": (
        {"batches": loader(DATA)},
        {"batches": loader(DATA + 1)},
        r"batches was .*tensors=\[float\d+ \[5\] on cpu with values ",
    ),
    "prior": ({}, {"model": narrow}, "site 'mu' of the model had log-density .*, and has .* here"),
    "site": ({}, {"model": renamed}, "site 'nu' was none, and is latent, Normal"),
    "guide": ({}, {"guide": AutoNormal}, "of another guide: guide was AutoPlanar, and is AutoNormal here"),
    "layers": ({}, {"guide": planar(2)}, r"of another guide: guide\.flow\.\S+ was none, and is PyroPlanar here"),
    "recipe": (
        {"guide": squared(1.0)},
        {"guide": squared(2.0)},
        "site '_AutoFlow_latent' of the guide had log-density",
    ),
    "gradient": (
        {"guide": affine()},
        {"guide": affine(gradient="path")},
        r"guide\.gradient was 'total', and is 'path' here",
    ),
    "optimizer": ({}, {"optim": SGD}, r"optim was Adam \[.*, and is SGD \["),
    "learning rate": (
        {"optim": SGD},
        {"optim": lambda ps: torch.optim.SGD(ps, lr=0.2)},
        "optim was SGD .*, and is SGD",
    ),
    "Pyro's": (
        {"optim": pyro.optim.Adam({"lr": 0.1}), "schedule": None},
        {"optim": pyro.optim.Adam({"lr": 0.2}), "schedule": None},
        "optim was PyroOptim .*0.1.*, and is PyroOptim .*0.2",
    ),
    "by parameter": (
        {"optim": pyro.optim.Adam(lambda name: {"lr": 0.1}), "schedule": None},
        {"optim": pyro.optim.Adam(lambda name: {"lr": 0.2}), "schedule": None},
        "optim was .*'lr', 0.1.*, and is .*'lr', 0.2",
    ),
    "loss": ({}, {"loss": Trace_ELBO(num_particles=4)}, "loss was None, and is PyroELBO"),
    "its particles": (
        {"loss": Trace_ELBO(num_particles=4)},
        {"loss": Trace_ELBO(num_particles=5)},
        "loss was PyroELBO.*num_particles=4.*and is .*num_particles=5",
    ),
    "seed": ({}, {"seed": 1}, "seed was 0, and is 1 here"),
    "particles": ({}, {"num_particles": 5}, "num_particles was 4, and is 5 here"),
    "schedule": ({}, {"schedule": "cosine"}, "schedule was factors 1, .*, and is factors 1, 0.99"),
    "temper": ({}, {"temper": "linear"}, "temper was none, and is inverse temperatures 0.01, "),
    "more steps of a rise of the temperature": (
        {"temper": "linear"},
        {"temper": "linear", "num_steps": 8},
        "of a fit with num_steps = 4, here it is 8: .* and without temper",
    ),
    "whitening": ({}, {"whiten": "auto"}, "whiten was None, and is 'auto'"),
    "average": ({}, {"ema_decay": 0.9}, "ema_decay was None, and is 0.9 here"),
    "fewer steps": ({}, {"num_steps": 3}, "of a fit with num_steps = 4, here it is 3"),
    "more steps of another schedule": (
        {"schedule": "cosine"},
        {"schedule": "cosine", "num_steps": 8},
        "of a fit with num_steps = 4, here it is 8: .* possible where learning rate and temperature do not depend",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_fit_is_refused_and_its_difference_named(name, tmp_path):
    before, after, message = OTHERS[name]
    path = tmp_path / "fit.pt"
    # It is finished: without a look at what it belongs to, it would be returned as the result.
    fitted(path, resume=False, **before)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=rf"^fit: checkpoint '.*fit\.pt' does not fit: it is .*{message}"):
        fitted(path, **{**before, **after})
    assert path.read_bytes() == content


def test_another_version_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "fit.pt"
    fitted(path, resume=False)
    monkeypatch.setattr(fingerprint, "version", lambda: "0.0.1")
    with pytest.raises(ValueError, match=r"version of pyro_flowguides was .*, and is 0\.0\.1 here"):
        fitted(path)


def test_what_may_change(tmp_path):
    path, moved = tmp_path / "fit.pt", tmp_path / "moved.pt"
    whole = fitted(path, resume=False)
    path.rename(moved)
    steps = []
    again = fitted(moved, backend="replay", max_nonfinite_steps=7, callbacks=[lambda step, loss: steps.append(step)])
    np.testing.assert_array_equal(again.losses, whole.losses)
    assert steps == []


@pytest.mark.parametrize("options", [{}, {"optim": pyro.optim.Adam({"lr": 0.1}), "schedule": None}])
def test_more_steps_are_those_of_a_longer_fit(options, tmp_path):
    fitted(tmp_path / "fit.pt", resume=False, **options)
    more = fitted(tmp_path / "fit.pt", num_steps=9, **options)
    whole = fitted(tmp_path / "whole.pt", num_steps=9, **options)
    np.testing.assert_array_equal(more.losses, whole.losses)
    assert more.elbo == whole.elbo


def test_the_same_objects_a_second_time_are_no_other_fit(tmp_path):
    """In a notebook the guide, the loss and the loader of an interrupted fit are given again."""
    path = tmp_path / "fit.pt"
    guide, loss = AutoNormal(conjugate), Trace_ELBO(num_particles=4, vectorize_particles=True)
    batches = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(DATA), batch_size=5, shuffle=True, generator=torch.Generator()
    )
    options = {"num_steps": 4, "progress": False, "backend": "eager", "batches": batches, "loss": loss}
    stop = [lambda step, loss: step == 1]
    fg.fit(conjugate, guide, checkpoint=fg.Checkpoint(path, every=2), callbacks=stop, **options)
    resumed = fg.fit(conjugate, guide, checkpoint=fg.Checkpoint(path, every=2, resume=True), **options)
    assert len(resumed.losses) == 4


def test_values_are_described():
    same = [
        (torch.arange(3), torch.arange(3)),
        (np.array(["a"], dtype=object), np.array(["a"], dtype=object)),
        ({"a": [1, (2.0, None)]}, {"a": [1, (2.0, None)]}),
        (torch.ones(2).conj(), torch.ones(2)),
        (torch.eye(3).to_sparse(), torch.eye(3).to_sparse()),
    ]
    for one, other in same:
        assert fingerprint.describe(one) == fingerprint.describe(other)
    different = [
        (torch.arange(3), torch.arange(3).flip(0)),
        (torch.zeros(()), torch.ones(())),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2), torch.zeros(1, 2)),
        (np.zeros(2), np.ones(2)),
        (np.array(["a"], dtype=object), np.array(["b"], dtype=object)),
        ({"a": 1}, {"a": 2}),
        ([1], [1, 1]),
        (functools.partial(max, 1), functools.partial(max, 2)),
        (lambda x: x + 1, lambda x: x + 2),
    ]
    for one, other in different:
        assert fingerprint.describe(one) != fingerprint.describe(other), (one, other)


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ({"seed": "0"}, {"seed": "0"}, None),
        ({"seed": "0", "loss": "a"}, {"seed": "1", "loss": "b"}, "it is of another fit: seed was 0, and is 1 here"),
        ({"loss": "a", "seed": "0"}, {"seed": "1", "loss": "a"}, "it is of another fit: seed was 0, and is 1 here"),
        ({"old": "0"}, {}, "it is of another fit: old was 0, and is none here"),
        ({}, {"new": "0"}, "it is of another fit: new was none, and is 0 here"),
        ({"guide.flow": "A"}, {"guide.flow": "B"}, "it is of another guide: guide.flow was A, and is B here"),
        ({"guide": "A"}, {"guide": "B"}, "it is of another guide: guide was A, and is B here"),
        ({"a guide": "A"}, {"a guide": "B"}, "it is of another fit: a guide was A, and is B here"),
        # Texts too long to be shown begin a little before the place where they differ.
        ({"x": "a" * 120}, {"x": "b"}, f"it is of another fit: x was {'a' * 120}, and is b here"),
        ({"x": "a" * 121}, {"x": "b"}, f"it is of another fit: x was {'a' * 120}…, and is b here"),
        (
            {"x": 100 * "." + "a" + 50 * "."},
            {"x": 100 * "." + "b"},
            f"it is of another fit: x was …{40 * '.'}a{50 * '.'}…, and is {100 * '.'}b here",
        ),
        ({"x": 200 * "."}, {"x": 150 * "."}, f"it is of another fit: x was …{90 * '.'}…, and is …{40 * '.'}… here"),
    ],
)
def test_the_first_difference_is_named(there, here, message):
    assert fingerprint.difference(there, here) == message


@pytest.mark.parametrize(
    ("there", "here", "is_same"),
    [
        (1.0, 1.0 + 0.9e-5, True),
        (1.0, 1.0 - 1.5e-5, False),
        (-1e4, -1e4 + 0.09, True),
        (-1e4, -1e4 - 0.15, False),
        (0.0, 0.9e-5, True),
        (0.0, 1.5e-5, False),
        (math.nan, math.nan, True),
        (-math.inf, -math.inf, True),
        (math.nan, 0.0, False),
        (0.0, None, False),
        (None, 0.0, False),
    ],
)
def test_log_densities_are_the_same_up_to_rounding(there, here, is_same):
    there, here = ({"x": 0.5} | ({} if value is None else {"y": value}) for value in (there, here))
    found = fingerprint.density_difference(there, here)
    assert (found is None) is is_same
    assert is_same or "it is of another model or guide: with its parameters y had log-density" in found


def test_what_values_are_described_by():
    assert fingerprint.describe({"a": [1, (2.5, None)], "b": "c"}) == "{'a': [1, [2.5, None]], 'b': 'c'}"
    assert fingerprint.describe(torch.nn.ReLU) == "ReLU"
    assert fingerprint.describe(len) == "len"
    assert fingerprint.describe(functools.partial(len, 1, two=2)) == "len([1], {'two': 2})"
    # Attributes of objects of torch and Pyro; of others nothing but their class and length.
    assert fingerprint.describe(dist.constraints.interval(0.0, 2.0)) == "_Interval(lower_bound=0.0, upper_bound=2.0)"
    assert fingerprint.describe(collections.deque([1, 2])) == "deque of length 2"
    assert fingerprint.describe(object()) == "object"
    # Not deeper than four levels.
    assert fingerprint.describe([[[[[1]]]]]) == "[[[[[1]]]]]"
    assert fingerprint.describe([[[[[[1], 2]]]]]) == "[[[[[list, 2]]]]]"


def test_functions_are_described_by_their_numbers_names_and_closures():
    def make(number, exponent=2):
        def inner(x, scale=3):
            return number * torch.sin(x) ** scale

        return inner

    one, same, other = make(1), make(1), make(2)
    assert fingerprint.describe(one) == fingerprint.describe(same) != fingerprint.describe(other)
    for part in ("inner", "'sin'", "[1]", "[3]"):
        assert part in fingerprint.describe(one)

    def not_filled():
        return later

    description = fingerprint.describe(not_filled)
    later = 5
    assert description.startswith("not_filled")
    assert fingerprint.describe(not_filled) != description
