"""The command line: the main job end to end, models of the user, and one clear line for bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap

import cli_fuzz
import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch

import pyro_flowguides as fg
from pyro_flowguides.cli import commands, main, output, read_data
from pyro_flowguides.diagnostics.arviz import Group, to_tree
from pyro_flowguides.training import files

FAST = ["--num-steps", "5", "--num-particles", "4", "--no-progress"]
MODEL = """
import pyro
import pyro.distributions as dist
import torch
from helper import SCALE

def model(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, SCALE))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

def no_latents(x):
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=x[0])

def shapes(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 7):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

number = 3
"""


@pytest.fixture
def model_file(tmp_path):
    (tmp_path / "helper.py").write_text("SCALE = 10.0\n")
    path = tmp_path / "my_model.py"
    path.write_text(MODEL)
    return path


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"x": [0.0, 1.0, 2.0], "y": [0.1, 2.2, 3.9]}))
    return path


def test_list(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in ("eight_schools", "eight_schools_centered", "coupling", "planar", "normal"):
        assert f"  {name} " in printed


def test_main_job(tmp_path, capsys):
    out = tmp_path / "results"
    command = ["fit", "eight_schools", "--guide", "coupling", "--compare", "normal", "--out", str(out), *FAST]
    assert main(command) == 0
    printed = capsys.readouterr().out
    header, *rows = printed.splitlines()
    assert header.split() == ["coupling", "normal", "NUTS"]
    labels = [row.split("  ")[0] for row in rows]
    for label in ("ELBO", "k-hat", "mu", "tau", "theta[Choate]", "theta[Mt. Hermon]"):
        assert label in labels
    assert "log Z = -31.311" in printed
    assert "coupling: " in printed
    assert printed.count("  k-hat is the shape of the upper tail of p / q.") == 2
    assert "normal: " in printed
    files = {path.name for path in out.iterdir()}
    assert files == {"eight_schools_coupling.nc", "eight_schools_normal.nc", "eight_schools_marginals.png"}
    assert (out / "eight_schools_marginals.png").read_bytes()[:4] == b"\x89PNG"
    az = pytest.importorskip("arviz")
    posterior = az.from_netcdf(str(out / "eight_schools_normal.nc"))["posterior"]
    assert posterior["theta"].shape == (1, 4000, 8)


@pytest.fixture
def written(tmp_path):
    """Two files of posteriors of the same data, and one of other data."""
    pytest.importorskip("arviz")
    rng = np.random.default_rng(0)
    for name, scale, y in (("exact", 0.5**0.5, 1.0), ("narrow", 0.4, 1.0), ("other", 0.7, 2.0)):
        values = torch.as_tensor(rng.normal(0.5, scale, size=1000))
        y, scale, zero, one = torch.tensor([y, scale, 0.0, 1.0], dtype=torch.float64)
        draws = fg.Draws(
            values={"mu": values},
            unconstrained={"mu": values},
            deterministic={},
            log_p=dist.Normal(zero, one).log_prob(values) + dist.Normal(values, one).log_prob(y),
            log_q=dist.Normal(one / 2, scale).log_prob(values),
            log_likelihood={"y": dist.Normal(values, 1.0).log_prob(y)},
            observed={"y": y},
            dims={"mu": [], "y": []},
        )
        fg.to_arviz(draws).to_netcdf(str(tmp_path / f"{name}.nc"))
    return tmp_path


def test_compare(written, capsys):
    files = [str(written / f"{name}.nc") for name in ("exact", "narrow")]
    assert main(["compare", *files, "--reference", "exact"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["exact", "narrow"]
    table = {row.split()[0]: row.split()[1:] for row in rows}
    # log N(1; 0, 2) for the exact one, and −0.4 / 0.707 of its sd too narrow for the other, in 1000 draws.
    assert float(table["elbo"][0]) == pytest.approx(
        float(dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.0))), abs=1e-3
    )
    assert float(table["sd_error"][1]) == pytest.approx(0.4 / 0.5**0.5 - 1, abs=0.1)
    assert table["khat"][0] == "–"
    assert rows[-4].startswith("exact: exact: every draw has the same weight")
    assert "cannot be estimated" in rows[-3]
    assert rows[-2].startswith("narrow: ")
    assert rows[-1].startswith("  k-hat is the shape")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["exact.nc", "missing.nc"], "there is no file .*missing.nc"),
        (["exact.nc", "other.nc"], "'other' is a fit of another model or of other data than 'exact': site 'y'"),
        (["exact.nc", "text.nc"], "text.nc cannot be read as netCDF"),
        (["empty.nc"], "empty.nc has no group 'posterior'"),
        (["exact.nc", "--reference", "nuts"], "the reference 'nuts' is not among exact"),
    ],
)
def test_compare_what_cannot_be_compared(files, message, written, capsys):
    (written / "text.nc").write_text("no netCDF")
    to_tree({"observed_data": Group({"y": np.zeros(2)}, sample_dims=())}).to_netcdf(str(written / "empty.nc"))
    assert main(["compare", *(str(written / name) if name.endswith(".nc") else name for name in files)]) == 2
    printed = capsys.readouterr()
    assert re.search(message, printed.err), printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert printed.out == ""


def test_centred_eight_schools(capsys):
    assert main(["fit", "eight_schools_centered", "--guide", "planar", *FAST]) == 0
    assert "theta[Choate]" in capsys.readouterr().out


def test_is_installed_as_a_module():
    finished = subprocess.run(
        [sys.executable, "-m", "pyro_flowguides", "--version"], capture_output=True, text=True, check=True
    )
    assert finished.stdout.startswith("pyro_flowguides ")


@pytest.mark.parametrize("suffix", [".json", ".npz", ".csv"])
def test_a_model_of_the_user(model_file, tmp_path, capsys, suffix):
    data = {"x": [0.0, 1.0, 2.0], "y": [0.1, 2.2, 3.9]}
    path = tmp_path / f"data{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(data))
    elif suffix == ".npz":
        np.savez(path, **{name: np.array(values) for name, values in data.items()})
    else:
        pd.DataFrame(data).to_csv(path, index=False)
    assert main(["fit", f"{model_file}:model", "--data", str(path), "--out", str(tmp_path / "out"), *FAST]) == 0
    assert "slope" in capsys.readouterr().out
    assert (tmp_path / "out" / "model_coupling.nc").exists()


def test_data_become_tensors_in_the_default_dtype(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"x": [[1.5, 2.0]], "k": [1, 2], "n": 3, "name": "a"}))
    data = read_data(path)
    assert data["x"].dtype == torch.get_default_dtype()
    assert data["x"].shape == (1, 2)
    assert data["k"].dtype == torch.int64
    assert data["n"] == 3
    assert data["name"] == "a"


def wrong(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    return str(path)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (lambda m, d, t: ["nine_schools"], "unknown model 'nine_schools'; known are eight_schools"),
        (lambda m, d, t: ["eight_schools", "--guide", "copula"], "unknown guide 'copula'; known are coupling"),
        (lambda m, d, t: ["eight_schools", "--compare", "copula"], "unknown guide 'copula'"),
        (lambda m, d, t: ["eight_schools", "--num-steps", "-5"], "--num-steps must be at least 1, got -5"),
        (lambda m, d, t: ["eight_schools", "--data", d], "is a bundled model with its own data"),
        (lambda m, d, t: ["eight_schools", "--out", f"{d}/out"], "cannot be made"),
        (lambda m, d, t: ["missing.py:model", "--data", d], "there is no file missing.py"),
        (lambda m, d, t: [f"{m}:mdel", "--data", d], "has no model 'mdel'"),
        (lambda m, d, t: [f"{m}:number", "--data", d], "has no model 'number'"),
        (lambda m, d, t: [f"{m}:model"], "the model needs the argument 'x': give it in a file"),
        (lambda m, d, t: [f"{m}:model", "--data", "missing.json"], "there is no data file missing.json"),
        (
            lambda m, d, t: [f"{m}:model", "--data", wrong(t, "a.json", '{"y": [1.0]}')],
            "needs the argument 'x', which .*a.json does not have",
        ),
        (
            lambda m, d, t: [f"{m}:model", "--data", wrong(t, "a.json", '{"x": [1], "z": 1}')],
            "'z', which the model does not",
        ),
        (lambda m, d, t: [f"{m}:model", "--data", wrong(t, "a.json", "{")], "cannot be read"),
        (lambda m, d, t: [f"{m}:model", "--data", wrong(t, "a.json", "[1]")], "must hold an object"),
        (
            lambda m, d, t: [f"{m}:model", "--data", wrong(t, "a.json", '{"x": [[1], [1, 2]]}')],
            "not a rectangular array",
        ),
        (lambda m, d, t: [f"{m}:model", "--data", wrong(t, "a.csv", "x\na\n")], "values that are not numbers"),
        (lambda m, d, t: [f"{m}:model", "--data", wrong(t, "a.txt", "")], "data files are .json, .npz or .csv"),
        (lambda m, d, t: [f"{m}:model", "--data", wrong(t, "a.npz", "no")], "cannot be read"),
        (
            lambda m, d, t: [wrong(t, "bad.py", "1 / 0") + ":model"],
            "bad.py, line 1: ZeroDivisionError: division by zero",
        ),
        (lambda m, d, t: [f"{m}:shapes", "--data", d], "my_model.py, line 18: ValueError: Shape mismatch"),
        (
            lambda m, d, t: [f"{m}:no_latents", "--data", wrong(t, "a.json", '{"x": [1.0]}')],
            "found no latent variables",
        ),
        (
            lambda m, d, t: [f"{m}:model", "--data", wrong(t, "a.json", '{"x": [1.0], "y": [NaN]}')],
            "observed site 'y' holds 1 NaN",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(command, message, model_file, data_file, tmp_path, capsys):
    arguments = ["fit", *command(str(model_file), str(data_file), tmp_path)]
    assert main([*arguments, *([] if "--num-steps" in arguments else FAST)]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.strip().splitlines()) == 1
    assert printed.err.startswith("flowguides: ")
    assert re.search(message, printed.err), printed.err
    assert printed.out == ""


# --- whatever a file holds, and whatever a model raises ---------------------------------------------------------------------


@pytest.mark.parametrize("num_cases", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_random_commands_end_with_one_line_and_a_documented_status(num_cases, monkeypatch):
    monkeypatch.setattr(commands, "fit", None)
    found = cli_fuzz.main_fuzz(num_cases)
    assert sum(found["statuses"].values()) == num_cases
    assert set(found["statuses"]) <= {0, 1, 2, 130}
    assert found["statuses"][0] > 0 and found["statuses"][2] > 0


def npz(tmp_path, **arrays):
    np.savez(tmp_path / "a.npz", **arrays)
    return tmp_path / "a.npz"


def renamed(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3.0))
    return (tmp_path / "a.npy").rename(tmp_path / "a.npz")


def damaged(tmp_path, damage):
    path = npz(tmp_path, x=np.arange(100.0))
    content = bytearray(path.read_bytes())
    path.write_bytes(damage(content))
    return path


def flipped(content):
    content[300] ^= 0xFF
    return content


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (renamed, "a.npz is one array, not an archive"),
        (lambda t: damaged(t, lambda content: content[:200]), "a.npz cannot be read: "),
        (lambda t: damaged(t, lambda content: b""), "a.npz cannot be read: "),
        (lambda t: damaged(t, flipped), "a.npz: 'x' cannot be read: Bad CRC-32"),
        (lambda t: npz(t, x=np.array([None])), "a.npz: 'x' cannot be read: Object arrays"),
        (
            lambda t: npz(t, x=np.ones(2, np.longdouble)),
            "a.npz: 'x' has dtype (longdouble|float128), which torch does not",
        ),
        (lambda t: npz(t, x=np.ones(0)), "a.npz: 'x' is empty"),
        (lambda t: wrong(t, "a.json", "[]"), "a.json: a JSON data file must hold an object"),
        (lambda t: wrong(t, "a.json", "[" * 100000), "a.json cannot be read: it is nested too deeply"),
        (lambda t: wrong(t, "a.json", '{"x": null}'), "a.json: 'x' is null, and the model needs it"),
        (lambda t: wrong(t, "a.json", '{"x": {}}'), "a.json: 'x' is an object"),
        (lambda t: wrong(t, "a.json", '{"x": []}'), "a.json: 'x' is empty"),
        (lambda t: wrong(t, "a.json", '{"x": "a"}'), r"line 9: AttributeError: .* \(.*a.json: 'x' is a string\)"),
        (lambda t: wrong(t, "a.json", '{"x": 3}'), r"line 9: AttributeError: .* \(.*a.json: 'x' is a number\)"),
        (lambda t: npz(t, x=np.zeros(())), r"line 9: IndexError: .* \(.*a.npz: 'x' is a single number\)"),
        (lambda t: wrong(t, "a.csv", "x\n1,2\n"), "the rows have more values than the first row has names"),
        (lambda t: wrong(t, "a.csv", ""), "a.csv cannot be read: No columns"),
    ],
)
def test_whatever_a_data_file_holds_is_one_line(make, message, model_file, tmp_path, capsys):
    assert main(["fit", f"{model_file}:model", "--data", str(make(tmp_path)), *FAST]) == 2
    printed = capsys.readouterr()
    assert re.fullmatch(rf"flowguides: .*{message}.*\n", printed.err), printed.err
    assert printed.out == ""


def test_arrays_of_the_other_byte_order_are_read(tmp_path):
    assert torch.equal(
        read_data(npz(tmp_path, x=np.array([1, 2], ">i4")))["x"], torch.tensor([1, 2], dtype=torch.int32)
    )


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("raise KeyError('a')", "KeyError: 'a'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("assert x is not None", "AssertionError"),
        ("open('/no/such/file')", "FileNotFoundError: .*No such file.*"),
        ("raise SystemExit(5)", "SystemExit: 5"),
        ("raise RuntimeError", "RuntimeError"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("helper.fail()", "LookupError: here"),
    ],
)
def test_whatever_a_model_raises_is_one_line_with_its_place(statement, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "fuzz_helper", raising=False)
    (tmp_path / "fuzz_helper.py").write_text("def fail():\n    raise LookupError('here')\n")
    path = tmp_path / "mine.py"
    path.write_text(f"import fuzz_helper as helper\n\ndef model(x=None):\n    {statement}\n")
    assert main(["fit", f"{path}:model", *FAST]) == 2
    place = "fuzz_helper.py, line 2" if "helper" in statement else "mine.py, line 4"
    printed = capsys.readouterr()
    assert re.fullmatch(rf"flowguides: {place}: {message}\n", printed.err), printed.err
    assert printed.out == ""


def test_an_exit_while_the_file_is_run_is_one_line(tmp_path, capsys):
    path = wrong(tmp_path, "mine.py", "import sys\nsys.exit(7)\n")
    assert main(["fit", f"{path}:model"]) == 2
    assert capsys.readouterr().err.endswith("mine.py cannot be run: mine.py, line 2: SystemExit: 7\n")


# --- results: whole or not at all -------------------------------------------------------------------------------------------


@pytest.fixture
def quick_fit(monkeypatch):
    """The real command with a fit that was made before; collects the options that it was asked for."""
    fit, asked = cli_fuzz.stubbed_fit(), []

    def stub(model, guide, **options):
        asked.append({"guide": type(guide).__name__, **options})
        return fit(lambda **kwargs: None, guide, model_kwargs={})

    monkeypatch.setattr(commands, "fit", stub)
    return asked


NEAR = ["fit", "eight_schools", "--guide", "normal"]


def test_a_place_that_cannot_be_written_is_noticed_before_the_fit(quick_fit, tmp_path, capsys):
    (tmp_path / "out" / "eight_schools_normal.nc").mkdir(parents=True)
    assert main([*NEAR, "--out", str(tmp_path / "out")]) == 2
    assert re.search("--out: .*eight_schools_normal.nc cannot be written: .*is a directory", capsys.readouterr().err)
    assert quick_fit == []


def test_two_commands_do_not_write_the_same_files(quick_fit, tmp_path, capsys):
    with files.locked(tmp_path / "eight_schools_normal.nc"):
        assert main([*NEAR, "--out", str(tmp_path)]) == 2
    assert f"process {os.getpid()} is using it" in capsys.readouterr().err
    assert quick_fit == []


@pytest.mark.parametrize("broken", ["write", "replace"])
def test_a_full_disk_is_one_line_and_status_1_and_leaves_what_was_there(
    broken, quick_fit, tmp_path, capsys, monkeypatch
):
    old = tmp_path / "eight_schools_normal.nc"
    old.write_text("old")

    def full(*args):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(files.os, {"write": "fsync", "replace": "replace"}[broken], full)
    assert main([*NEAR, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert printed.err == f"flowguides: {old} could not be written: No space left on device\n"
    assert "mean (sd)" in printed.out
    assert old.read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]


LIMITED = """
    import resource, sys
    sys.path[:0] = {paths!r}
    from pyro_flowguides.cli import main
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    sys.exit(main(["fit", "eight_schools", "--guide", "normal", "--out", {out!r}, *{fast!r}]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of the system")
def test_a_file_that_cannot_grow_does_not_crash_the_process(tmp_path):
    """HDF5 crashes where it writes to such a file itself."""
    script = textwrap.dedent(LIMITED).format(
        paths=[path for path in sys.path if path], out=str(tmp_path / "out"), fast=FAST
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip().endswith("eight_schools_normal.nc could not be written: File too large")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_content_of_a_file_is_what_arviz_writes_itself(tmp_path):
    az = pytest.importorskip("arviz")
    groups = {
        "posterior": Group({"mu": np.random.default_rng(0).normal(size=(2, 5, 3))}, {"mu": ["school"]}),
        "observed_data": Group({"y": np.arange(3)}, {"y": ["school"]}, ()),
    }
    tree = to_tree(groups, {"school": ["a", "b", "c"]}, {"guide": "AutoNormal", "names": ["a", "b"]})
    tree.to_netcdf(str(tmp_path / "theirs.nc"))
    (tmp_path / "ours.nc").write_bytes(output.netcdf(tree))
    ours, theirs = (az.from_netcdf(str(tmp_path / f"{name}.nc")) for name in ("ours", "theirs"))
    for group in groups:
        one, other = ours[group], theirs[group]
        assert one.to_dict() == other.to_dict()
    assert ours.attrs == theirs.attrs


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_standard_output_that_is_full_is_one_line_and_status_1():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "pyro_flowguides", "list"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "flowguides: the standard output could not be written: No space left on device\n"


# --- interrupts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupt_of_the_training_keeps_the_results_so_far(name, status, tmp_path, capsys, monkeypatch):
    az = pytest.importorskip("arviz")
    number, real = getattr(signal, name), commands.fit
    before = signal.getsignal(number)
    started = []

    def interrupted_fit(model, guide, **options):
        started.append(type(guide).__name__)
        stop = [lambda step, loss: signal.raise_signal(number) if step == 12 else None]
        with pytest.warns(UserWarning, match="interrupted after 13 of 50 steps"):
            return real(model, guide, callbacks=stop, backend="eager", **options)

    monkeypatch.setattr(commands, "fit", interrupted_fit)
    options = [
        "--compare",
        "planar",
        "--out",
        str(tmp_path),
        "--num-steps",
        "50",
        "--num-particles",
        "2",
        "--no-progress",
    ]
    assert main([*NEAR, *options]) == status
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].split() == ["normal", "(interrupted)", "NUTS"]
    assert "normal: interrupted after 13 steps; " in printed.out
    assert started == ["AutoNormal"]
    assert az.from_netcdf(str(tmp_path / "eight_schools_normal.nc")).attrs["interrupted"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"eight_schools_normal.nc", "eight_schools_marginals.png"}
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_interrupt_before_or_after_the_training_is_one_line(
    name, status, when, quick_fit, tmp_path, capsys, monkeypatch
):
    def interrupt(*args, **options):
        signal.raise_signal(getattr(signal, name))

    target = (commands, "find_model") if when == "before" else (output, "write_whole")
    monkeypatch.setattr(*target, interrupt)
    assert main([*NEAR, "--out", str(tmp_path)]) == status
    assert capsys.readouterr().err == "flowguides: interrupted\n"
    assert list(tmp_path.iterdir()) == []


# --- options ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"guide": "AutoCoupling", "num_steps": None, "num_particles": None, "seed": 0, "progress": True}),
        (["--guide", "planar"], {"guide": "AutoPlanar"}),
        (["--num-steps", "7"], {"num_steps": 7}),
        (["--num-particles", "9"], {"num_particles": 9}),
        (["--seed", "3"], {"seed": 3}),
        (["--no-progress"], {"progress": False}),
    ],
)
def test_options_reach_the_fit(options, expected, quick_fit, capsys):
    assert main(["fit", "eight_schools", *options]) == 0
    assert len(quick_fit) == 1
    assert quick_fit[0].keys() == {"guide", "model_kwargs", "num_steps", "num_particles", "seed", "progress"}
    assert expected.items() <= quick_fit[0].items()
    assert list(quick_fit[0]["model_kwargs"]) == ["sigma", "y"]


def test_compare_names_further_guides_each_once(quick_fit, capsys):
    assert main([*NEAR, "--compare", "planar", "normal", "planar"]) == 0
    assert [asked["guide"] for asked in quick_fit] == ["AutoNormal", "AutoPlanar"]


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_a_seed_that_cannot_be_is_refused(seed, quick_fit, capsys):
    assert main([*NEAR, "--seed", seed]) == 2
    assert capsys.readouterr().err == f"flowguides: --seed must be from 0 to 4294967295, got {seed}\n"
    assert quick_fit == []


def test_the_seed_decides_the_numbers(model_file, data_file, capsys):
    tables = []
    for seed in ("0", "0", "1"):
        assert (
            main(["fit", f"{model_file}:model", "--guide", "normal", "--data", str(data_file), "--seed", seed, *FAST])
            == 0
        )
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] != tables[2]
