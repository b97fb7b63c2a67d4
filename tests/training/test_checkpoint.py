"""Checkpoints: a fit that is cut off and resumed is the fit that was not; damaged, foreign and unwritable files."""

import errno
import functools
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from fits import Y, skewed
from fits import scale_only as small
from models import conjugate
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.training import checkpoint as checkpoints
from pyro_flowguides.training import loop, schedules

NUM_STEPS = 30


class Killed(BaseException):
    """Ends a fit on the spot, as SIGKILL does."""


def minibatch(y):
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 2.0))
    with pyro.plate("data", len(Y), subsample_size=len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def loader(generator=None):
    data = torch.utils.data.TensorDataset(torch.tensor(Y))
    return torch.utils.data.DataLoader(data, batch_size=2, shuffle=True, generator=generator)


def rates(name):
    return {"lr": 0.1} if "locs" in name else {"lr": 0.01}


CASES = {
    "flow": (conjugate, lambda model: fg.AutoPlanar(model, num_layers=1), dict),
    "flow, whitened": (conjugate, small, lambda: {"whiten": "batch_and_match"}),
    "normal": (conjugate, AutoNormal, dict),
    "replayed": (conjugate, small, lambda: {"backend": "replay"}),
    "average": (conjugate, small, lambda: {"ema_decay": 0.9}),
    "SGD": (conjugate, small, lambda: {"optim": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9)}),
    "Pyro's Adam": (conjugate, AutoNormal, lambda: {"optim": pyro.optim.Adam({"lr": 0.02})}),
    "Pyro's, by parameter": (conjugate, AutoNormal, lambda: {"optim": pyro.optim.Adam(rates)}),
    "batches": (minibatch, small, lambda: {"batches": loader()}),
    "batches, with a generator": (minibatch, small, lambda: {"batches": loader(torch.Generator().manual_seed(3))}),
}


def values(guide):
    return {name: value.detach().clone() for name, value in guide.state_dict().items()}


def run(case, path=None, kill_at=None, resume=False, **options):
    """A fit, which may be killed."""
    model, Guide, more = CASES[case]
    guide = Guide(model)

    def kill(step, loss):
        if step == kill_at:
            raise Killed

    defaults = {
        "num_steps": NUM_STEPS,
        "num_particles": 4,
        "progress": False,
        "backend": "eager",
        "whiten": None,
        "seed": 0,
    }
    if not isinstance(guide, fg.AutoFlow):
        defaults["whiten"] = "auto"
    defaults.update(more())
    if path is not None:
        defaults.update(checkpoint=fg.Checkpoint(path, every=7, resume=resume))
    args = (torch.tensor(Y),)
    return fg.fit(model, guide, *args, callbacks=[kill], **{**defaults, **options})


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_fit_is_the_fit_without_interruption(case, tmp_path):
    whole = run(case, tmp_path / "whole.pt")
    expected = values(whole.guide)
    plain = run(case)
    np.testing.assert_array_equal(plain.losses, whole.losses)
    path = tmp_path / "killed.pt"
    with pytest.raises(Killed):
        run(case, path, kill_at=17)
    random.seed(99)  # Whatever has happened in between.
    resumed = run(case, path, resume=True)
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    for name, value in values(resumed.guide).items():
        assert torch.equal(value, expected[name]), name
    assert resumed.elbo == whole.elbo


def test_a_finished_fit_is_not_continued(tmp_path):
    path = tmp_path / "fit.pt"
    whole = run("flow", path)
    again = run("flow", path, resume=True)
    np.testing.assert_array_equal(again.losses, whole.losses)
    assert again.elbo == whole.elbo


def test_counts_and_rollbacks_are_resumed(tmp_path):
    def exploding(progress):
        return 1e4 if 0.4 <= progress < 0.5 else 1.0

    options = {
        "num_steps": 300,
        "optim": functools.partial(torch.optim.SGD, lr=1e-3),
        "schedule": exploding,
    }
    whole = run("SGD", tmp_path / "whole.pt", **options)
    assert whole.num_rolled_back > 0
    path = tmp_path / "fit.pt"
    with pytest.raises(Killed):
        run("SGD", path, kill_at=180, **options)
    resumed = run("SGD", path, resume=True, **options)
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    assert (resumed.num_rolled_back, resumed.num_skipped) == (whole.num_rolled_back, whole.num_skipped)


def test_restarts_are_resumed_one_by_one(tmp_path):
    path = tmp_path / "fit.pt"
    whole = run("flow", num_restarts=3)
    steps = []

    def kill_in_the_second(step, loss):
        steps.append(step)
        if len(steps) == NUM_STEPS + 10:
            raise Killed

    options = {
        "num_steps": NUM_STEPS,
        "num_particles": 4,
        "progress": False,
        "backend": "eager",
        "whiten": None,
        "seed": 0,
    }
    options.update(checkpoint=fg.Checkpoint(path, every=7), num_restarts=3)
    with pytest.raises(Killed):
        fg.fit(conjugate, CASES["flow"][1](conjugate), torch.tensor(Y), callbacks=[kill_in_the_second], **options)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fit-0.pt", "fit-1.pt"]
    resumed = run("flow", path, resume=True, num_restarts=3)
    assert [float(draws.elbo) for draws in resumed.restarts] == [float(draws.elbo) for draws in whole.restarts]


@pytest.mark.parametrize(
    ("kill_at", "harm"), [(5, False), (10, False), (17, False), (29, False), (35, False), (17, True)]
)
def test_a_resumed_fit_has_the_rounds_of_one_without_interruption(kill_at, harm, tmp_path, monkeypatch):
    monkeypatch.setattr(schedules, "FIRST_NUM_STEPS", 10)
    if harm:
        monkeypatch.setattr(loop, "got_worse", lambda scores: len(scores) == 2)

    def run(path, kill_at=None, resume=False, **options):
        def kill(step, loss):
            if step == kill_at:
                raise Killed

        checkpoint = fg.Checkpoint(path, every=4, resume=resume)
        options = {"checkpoint": checkpoint, "whiten": None, "num_particles": 4, "seed": 0, **options}
        return fg.fit(skewed, small(skewed), callbacks=[kill], progress=False, backend="eager", **options)

    whole = run(tmp_path / "whole.pt")
    path = tmp_path / "killed.pt"
    with pytest.raises(Killed):
        run(path, kill_at)
    resumed = run(path, resume=True)
    assert len(whole.losses) > (25 if harm else 35)
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    assert resumed.elbo == whole.elbo
    with pytest.raises(ValueError, match=r"of a fit with num_steps = 10 \+ 20 \+ 40, here it is 50"):
        run(path, resume=True, num_steps=50)


@pytest.mark.parametrize("kill_at", [5, 17])
def test_parameters_of_an_earlier_fit_do_not_matter(kill_at, tmp_path, monkeypatch):
    """A fresh process has not seen what stood in Pyro's store when the checkpoint was written."""
    monkeypatch.setattr(schedules, "FIRST_NUM_STEPS", 10)
    monkeypatch.setattr(loop, "got_worse", lambda scores: len(scores) == 2)

    def model():
        shift = pyro.param("shift", torch.tensor(0.0))
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(shift, (1.5 * mu).exp()))

    def run(path, kill_at=None, resume=False):
        def kill(step, loss):
            if step == kill_at:
                raise Killed

        checkpoint = fg.Checkpoint(path, every=4, resume=resume)
        options = {"checkpoint": checkpoint, "whiten": None, "num_particles": 4, "seed": 0, "backend": "eager"}
        return fg.fit(model, small(model), callbacks=[kill], progress=False, **options)

    whole = run(tmp_path / "whole.pt")
    pyro.param("of an earlier fit", torch.zeros(3))
    with pytest.raises(Killed):
        run(tmp_path / "killed.pt", kill_at)
    pyro.clear_param_store()
    pyro.param("of another one", torch.zeros(2))
    resumed = run(tmp_path / "killed.pt", resume=True)
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    assert resumed.elbo == whole.elbo
    assert torch.equal(resumed.parameters["shift"], whole.parameters["shift"])
    for name, value in values(resumed.guide).items():
        assert torch.equal(value, values(whole.guide)[name]), name


class Encoder(pyro.nn.PyroModule):
    """A guide with a network whose buffers change in training."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(1)
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, y):
        loc = self.linear(self.norm(y.unsqueeze(-1))).mean()
        pyro.sample("mu", dist.Normal(loc, 0.5))


def test_buffers_are_resumed(tmp_path):
    def run(path, kill_at=None, resume=False):
        def kill(step, loss):
            if step == kill_at:
                raise Killed

        torch.manual_seed(0)
        checkpoint = fg.Checkpoint(path, every=4, resume=resume)
        options = {"num_steps": 12, "num_particles": 2, "seed": 0, "backend": "eager", "progress": False}
        return fg.fit(conjugate, Encoder(), torch.tensor(Y), callbacks=[kill], checkpoint=checkpoint, **options)

    with warnings.catch_warnings():
        # A guide of one draw at a time is no question here.
        warnings.simplefilter("ignore")
        whole = run(tmp_path / "whole.pt")
        with pytest.raises(Killed):
            run(tmp_path / "killed.pt", kill_at=6)
        resumed = run(tmp_path / "killed.pt", resume=True)
    assert whole.guide.norm.num_batches_tracked > 12
    for name, value in values(resumed.guide).items():
        if name != "norm.num_batches_tracked":
            assert torch.equal(value, values(whole.guide)[name]), name
    np.testing.assert_array_equal(resumed.losses, whole.losses)


SCRIPT = """
    import sys
    sys.path[:0] = {paths!r}
    import {module} as here
    here.run("batches", {path!r}, resume=True, ema_decay=0.9, num_steps=400)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_again_and_again(tmp_path):
    """kill -9 at random moments, in the middle of a write or not, until the fit gets to its end."""
    whole = run("batches", tmp_path / "whole.pt", ema_decay=0.9, num_steps=400)
    expected = values(whole.guide)
    path = tmp_path / "fit.pt"
    script = textwrap.dedent(SCRIPT).format(paths=[p for p in sys.path if p], module=__name__, path=path)
    script = script.replace(repr(path), f"__import__('pathlib').Path({str(path)!r})")
    moments = random.Random(0)
    kills = 0
    for _ in range(3):
        before = path.stat().st_mtime_ns if path.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
        # Once it is on its way.
        while process.poll() is None and (path.stat().st_mtime_ns if path.exists() else 0) == before:
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills > 0
    resumed = run("batches", path, resume=True, ema_decay=0.9, num_steps=400)
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    for name, value in values(resumed.guide).items():
        assert torch.equal(value, expected[name]), name


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_checkpoint(broken, tmp_path, monkeypatch):
    path = tmp_path / "fit.pt"
    with pytest.raises(Killed):
        run("flow", path, kill_at=10)
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.os, broken, full)
        with pytest.raises(OSError, match="No space left"):
            run("flow", path, resume=True)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["fit.pt"]
    np.testing.assert_array_equal(run("flow", path, resume=True).losses, run("flow").losses)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "text", "other"])
def test_a_damaged_file_is_refused(damage, tmp_path):
    path = tmp_path / "fit.pt"
    run("flow", path, num_steps=7)
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(
            content[:middle] + bytes(255 - byte for byte in content[middle : middle + 200]) + content[middle + 200 :]
        )
    elif damage == "text":
        path.write_text("not a checkpoint")
    else:
        torch.save({"weights": torch.ones(3)}, path)
    with pytest.raises(ValueError, match=r"checkpoint.*fit\.pt|fit\.pt.*checkpoint"):
        run("flow", path, resume=True, num_steps=7)


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path):
    """The numbers of a checkpoint are either refused or those that were written."""
    path = tmp_path / "fit.pt"
    content = {"numbers": torch.arange(100.0), "random": [1, 2, 3]}
    fg.Checkpoint(path).save(content)
    good = path.read_bytes()
    refused = 0
    for place in random.Random(0).sample(range(len(good)), 150):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
        try:
            loaded = fg.Checkpoint(path, resume=True).load()
        except ValueError:
            refused += 1
            continue
        assert torch.equal(loaded["numbers"], content["numbers"]), place
        assert loaded["random"] == content["random"]
    assert refused > 50


def test_a_checkpoint_of_another_fit_is_refused(tmp_path):
    path = tmp_path / "fit.pt"
    run("flow", path)
    with pytest.raises(ValueError, match="of a fit with num_steps = 30, here it is 31"):
        run("flow", path, resume=True, num_steps=31)

    def other(y):
        pyro.sample("mu", dist.Normal(torch.zeros(2, dtype=y.dtype), 1.0).to_event(1))

    with pytest.raises(ValueError, match="of another guide"):
        fg.fit(
            other,
            small(other),
            torch.tensor(Y),
            checkpoint=fg.Checkpoint(path, resume=True),
            num_steps=30,
            progress=False,
        )
    with pytest.raises(ValueError, match="of another guide"):
        fg.fit(
            conjugate,
            AutoNormal(conjugate),
            torch.tensor(Y),
            checkpoint=fg.Checkpoint(path, resume=True),
            num_steps=30,
            progress=False,
        )

    def hand_written(y):
        pyro.sample("mu", dist.Delta(pyro.param("at", y.new_tensor(0.0))))

    with pytest.raises(ValueError, match="of another guide"):
        fg.fit(
            conjugate,
            hand_written,
            torch.tensor(Y),
            checkpoint=fg.Checkpoint(path, resume=True),
            num_steps=30,
            progress=False,
        )


def test_a_model_parameter_of_another_shape_is_refused(tmp_path):
    def model_of(size):
        def model(y):
            shift = pyro.param("shift", torch.zeros(size, dtype=y.dtype))
            mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 1.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(mu + shift.sum(), 1.0), obs=y)

        return model

    options = {
        "num_steps": 3,
        "progress": False,
        "backend": "eager",
        "num_particles": 2,
    }
    path = tmp_path / "fit.pt"
    fg.fit(model_of(2), AutoNormal(model_of(2)), torch.tensor(Y), checkpoint=path, **options)
    with pytest.raises(ValueError, match=r"parameter 'shift' has shape \[2\] there and \[3\] here"):
        fg.fit(
            model_of(3),
            AutoNormal(model_of(3)),
            torch.tensor(Y),
            checkpoint=fg.Checkpoint(path, resume=True),
            **options,
        )


def test_a_checkpoint_is_not_overwritten(tmp_path):
    path = tmp_path / "fit.pt"
    run("flow", path)
    before = path.read_bytes()
    with pytest.raises(
        FileExistsError, match=r"exists; give Checkpoint\(.*, resume=True\) to continue from it, or delete it"
    ):
        run("flow", path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("case", ["flow", "normal", "SGD", "Pyro's, by parameter", "batches"])
def test_a_checkpoint_holds_no_code(case, tmp_path):
    path = tmp_path / "fit.pt"
    run(case, path, num_steps=7)
    content = torch.load(path, weights_only=True)
    assert set(content) == {
        "format",
        "modules",
        "num_steps",
        "losses",
        "scores",
        "num_skipped",
        "num_rolled_back",
        "best",
        "training",
    }
