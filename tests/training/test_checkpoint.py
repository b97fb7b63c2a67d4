"""Checkpoints: a fit that is cut off and resumed is the fit that was not; damaged, foreign and unwritable files."""

import errno
import functools
import json
import os
import random
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from fits import Y, skewed
from fits import scale_only as small
from models import conjugate
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.training import files, loop, schedules

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


def bootstrap():
    """An objective with a buffer, which is a state of its own."""
    return fg.FlowAnnealedBootstrap(8, num_intermediate=1, num_leapfrog_steps=1, buffer_size=32, num_updates=3)


def mirrored(y):
    """Two modes, of which one is the image of the other."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu.abs(), 1.0), obs=y)


def mixture(model):
    return fg.AutoMixture(model, fg.transforms.Affine, affine=None)


def rates(name):
    return {"lr": 0.1} if "locs" in name else {"lr": 0.01}


CASES = {
    "flow": (conjugate, lambda model: fg.AutoPlanar(model, num_layers=1), dict),
    "flow, whitened": (conjugate, small, lambda: {"whiten": "batch_and_match"}),
    "normal": (conjugate, AutoNormal, dict),
    "replayed": (conjugate, small, lambda: {"backend": "replay"}),
    "mixture": (mirrored, mixture, lambda: {"backend": "replay", "whiten": "auto"}),
    "average": (conjugate, small, lambda: {"ema_decay": 0.9}),
    "annealed draws": (conjugate, small, lambda: {"loss": bootstrap(), "num_particles": None}),
    "tempered": (conjugate, small, lambda: {"temper": lambda progress: min(1.0, 0.1 + 1.1 * progress)}),
    "tempered, replayed": (conjugate, small, lambda: {"temper": "linear", "backend": "replay"}),
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
    callbacks = [kill, *options.pop("callbacks", ())]
    return fg.fit(model, guide, *args, callbacks=callbacks, **{**defaults, **options})


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


def test_explosions_and_their_counts_are_resumed(tmp_path):
    """Cut off just before an explosion and after it: what it is judged by, and taken back to, is of the time before."""

    def exploding(progress):
        return 1e4 if 0.4 <= progress < 0.5 else 1.0

    options = {"num_steps": 200, "optim": functools.partial(torch.optim.SGD, lr=1e-3), "schedule": exploding}
    whole = run("SGD", tmp_path / "whole.pt", **options)
    assert whole.num_rolled_back > 0
    for kill_at in (79, 180):
        path = tmp_path / f"{kill_at}.pt"
        with pytest.raises(Killed):
            run("SGD", path, kill_at, **options)
        resumed = run("SGD", path, resume=True, **options)
        np.testing.assert_array_equal(resumed.losses, whole.losses)
        assert (resumed.num_rolled_back, resumed.num_skipped) == (whole.num_rolled_back, whole.num_skipped)
        for name, value in values(resumed.guide).items():
            assert torch.equal(value, values(whole.guide)[name]), name


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


def test_the_random_states_of_numpy_and_python_are_resumed(tmp_path):
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)

    def noisy(model, guide, y):
        return elbo.differentiable_loss(model, guide, y) * (1 + np.random.random() + random.random())

    options = {"loss": noisy, "num_particles": None, "num_steps": 12}
    whole = run("normal", tmp_path / "whole.pt", **options)
    with pytest.raises(Killed):
        run("normal", tmp_path / "fit.pt", kill_at=8, **options)
    random.seed(99)
    np.random.seed(99)
    resumed = run("normal", tmp_path / "fit.pt", resume=True, **{**options, "seed": 0})
    np.testing.assert_array_equal(resumed.losses, whole.losses)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("num_kills", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_again_and_again(num_kills):
    """kill -9 at random moments, in the middle of a write or not, until the fit gets to its end."""
    script = str(Path(__file__).parent.parent / "kills.py")
    done = subprocess.run([sys.executable, script, str(num_kills)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] >= num_kills
    assert found["bit_for_bit"] == found["fits"] > 0


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_checkpoint_and_ends_nothing(broken, tmp_path, monkeypatch):
    path = tmp_path / "fit.pt"
    with pytest.raises(Killed):
        run("flow", path, kill_at=10)
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    whole = run("flow")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, broken, full)
        # Once, though all of the remaining writes fail.
        with pytest.warns(UserWarning, match=r"fit.pt' could not be written: No space left on device; the") as caught:
            resumed = run("flow", path, resume=True)
    assert len(caught) == 1
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["fit.pt"]
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    np.testing.assert_array_equal(run("flow", path, resume=True).losses, whole.losses)


def test_the_next_attempt_to_write_is_made(tmp_path, monkeypatch):
    path = tmp_path / "fit.pt"
    real, calls = os.replace, []

    def full_at_first(*args):
        calls.append(args)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*args)

    monkeypatch.setattr(files.os, "replace", full_at_first)
    with pytest.warns(UserWarning, match="could not be written"):
        whole = run("flow", path)
    assert len(calls) == 5
    np.testing.assert_array_equal(run("flow", path, resume=True).losses, whole.losses)


LIMITED = """
    import resource, sys, warnings
    sys.path[:0] = {paths!r}
    import {module} as here
    path = here.Path({path!r})
    warnings.simplefilter("ignore")
    with here.pytest.raises(here.Killed):
        here.run("flow", path, kill_at=10)
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, resource.RLIM_INFINITY))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        here.run("flow", path, resume=True)
    assert path.read_bytes() == before
    print([str(each.message) for each in caught if "written" in str(each.message)])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of the system")
def test_the_message_of_a_write_that_fails_is_that_of_the_system(tmp_path):
    """A limit on the size of files stands for a full disk; torch's own message would be about its stream."""
    script = textwrap.dedent(LIMITED).format(
        paths=[p for p in sys.path if p], module=__name__, path=str(tmp_path / "fit.pt")
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("could not be written: File too large; ") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["fit.pt"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a directory", "'.*a directory' cannot be written: Is a directory|cannot be written: .*is a directory"),
        ("x" * 300, "cannot be written: File name too long"),
        ("a file/fit.pt", "the directory of checkpoint '.*' does not exist"),
        ("/proc/fit.pt", "cannot be written: No such file or directory"),
    ],
)
def test_a_path_that_cannot_be_written_is_noticed_before_the_training(path, message, tmp_path):
    if path.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("needs /proc")
    (tmp_path / "a directory").mkdir()
    (tmp_path / "a file").write_text("")
    with pytest.raises(ValueError, match=message):
        run("flow", tmp_path / path, kill_at=0)


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


@pytest.mark.parametrize("num_flips", [150, pytest.param(1500, marks=pytest.mark.slow)])
def test_every_flipped_byte_is_noticed_or_harmless(num_flips, tmp_path):
    """The numbers of a checkpoint are either refused or those that were written."""
    path = tmp_path / "fit.pt"
    content = {"numbers": torch.arange(num_flips * 1.0), "random": [1, 2, 3]}
    fg.Checkpoint(path).save(content)
    good = path.read_bytes()
    refused = 0
    for place in random.Random(0).sample(range(len(good)), num_flips):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
        try:
            loaded = fg.Checkpoint(path, resume=True).load()
        except ValueError:
            refused += 1
            continue
        assert torch.equal(loaded["numbers"], content["numbers"]), place
        assert loaded["random"] == content["random"]
    assert refused > num_flips // 3


class Malicious:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


@pytest.mark.parametrize("where", ["alone", "inside"])
def test_a_file_that_would_execute_code_is_refused(where, tmp_path):
    path, trace = tmp_path / "fit.pt", tmp_path / "trace"
    run("flow", path, num_steps=7)
    content = torch.load(path, weights_only=True)
    torch.save(Malicious(trace) if where == "alone" else {**content, "best": Malicious(trace)}, path)
    with pytest.raises(ValueError, match="cannot be read, it is damaged or no checkpoint; delete it to start again"):
        run("flow", path, resume=True, num_steps=7)
    assert not trace.exists()


KEYS = ["fingerprint", "log_densities", "modules", "num_steps", "losses", "scores", "num_skipped", "best", "training"]
WRONG = {
    **{f"no {key}": lambda content, key=key: content.pop(key) for key in KEYS},
    "no svi": lambda content: content["training"].pop("svi"),
    "no random state": lambda content: content["training"].pop("states"),
    "no watch": lambda content: content["training"]["svi"].pop("watch"),
    "no arguments": lambda content: content["fingerprint"].pop("arguments"),
    "torch's": lambda content: content["training"]["states"][0][0].update(torch=torch.zeros(3, dtype=torch.uint8)),
    "torch's type": lambda content: content["training"]["states"][0][0].update(torch=1),
    "numpy's": lambda content: content["training"]["states"][0][0].update(numpy=["MT19937", [1, 2], 0, 0, 0.0]),
    "numpy's name": lambda content: content["training"]["states"][0][0].update(numpy=["PCG", [1] * 624, 0, 0, 0.0]),
    "Python's": lambda content: content["training"]["states"][0][0].update(python=(3, (1, 2), None)),
    "losses": lambda content: content.update(losses=["a"]),
    "scores": lambda content: content.update(scores=[[1.0]]),
    "training": lambda content: content.update(training=None),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_content_that_lacks_something_is_a_clear_error(name, tmp_path):
    path = tmp_path / "fit.pt"
    run("flow", path, num_steps=7)
    content = torch.load(path, weights_only=True)
    WRONG[name](content)
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"^fit: checkpoint '.*fit\.pt' (is damaged or incomplete|does not fit)"):
        run("flow", path, resume=True, num_steps=7)


def test_a_second_fit_on_the_same_path_is_refused(tmp_path):
    path = tmp_path / "fit.pt"
    refused = []

    def second(step, loss):
        if step == 10:
            for resume in (True, False):
                with pytest.raises(BlockingIOError, match=rf"fit.pt' belongs to another fit, process {os.getpid()}"):
                    run("flow", path, resume=resume)
                refused.append(resume)

    whole = run("flow", path, callbacks=[second])
    assert refused == [True, False]
    np.testing.assert_array_equal(whole.losses, run("flow").losses)
    assert [file.name for file in tmp_path.iterdir()] == ["fit.pt"]


def test_restarts_reserve_their_common_path(tmp_path):
    path = tmp_path / "fit.pt"

    def second(step, loss):
        if step == 3:
            with pytest.raises(BlockingIOError, match="belongs to another fit"):
                run("flow", path, num_restarts=2, num_steps=5)

    run("flow", path, num_restarts=2, num_steps=5, callbacks=[second])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fit-0.pt", "fit-1.pt"]


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


def test_the_defaults_of_a_checkpoint():
    assert repr(fg.Checkpoint("a/fit.pt")) == "Checkpoint('a/fit.pt', every=500, resume=False)"
    assert repr(fg.Checkpoint("fit.pt", 7, True).of_restart(2)) == "Checkpoint('fit-2.pt', every=7, resume=True)"


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
        "fingerprint",
        "log_densities",
        "modules",
        "num_steps",
        "losses",
        "start_sd",
        "scores",
        "num_skipped",
        "num_rolled_back",
        "best",
        "training",
    }
