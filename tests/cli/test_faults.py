"""The command line and whatever goes wrong: files, models, full disks, interrupts; and that options do what they say."""

import os
import re
import signal
import subprocess
import sys
import textwrap

import cli_fuzz
import numpy as np
import pytest
import torch
from cli_cases import FAST, wrong

from pyro_flowguides.cli import commands, main, output, read_data
from pyro_flowguides.diagnostics.arviz import Group, to_tree
from pyro_flowguides.training import files

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
    fits = {f"eight_schools_normal.{suffix}" for suffix in ("nc", "html")}
    assert {path.name for path in tmp_path.iterdir()} == fits | {"eight_schools_marginals.png"}
    assert "the training had not ended" in (tmp_path / "eight_schools_normal.html").read_text()
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
        (
            [],
            {
                "guide": "AutoCoupling",
                "num_steps": None,
                "num_particles": None,
                "search_modes": None,
                "max_seconds": None,
                "seed": 0,
                "progress": True,
            },
        ),
        (["--guide", "planar"], {"guide": "AutoPlanar"}),
        (["--num-steps", "7"], {"num_steps": 7}),
        (["--num-particles", "9"], {"num_particles": 9}),
        (["--seed", "3"], {"seed": 3}),
        (["--no-progress"], {"progress": False}),
        (["--search-modes"], {"search_modes": True}),
        (["--max-seconds", "90"], {"max_seconds": 90.0}),
        (["--no-search-modes"], {"search_modes": False}),
    ],
)
def test_options_reach_the_fit(options, expected, quick_fit, capsys):
    assert main(["fit", "eight_schools", *options]) == 0
    assert len(quick_fit) == 1
    of_fit = {"num_steps", "num_particles", "search_modes", "max_seconds", "seed", "progress"}
    assert quick_fit[0].keys() == {"guide", "model_kwargs", *of_fit}
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


def test_control_characters_do_not_break_the_line(model_file, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("x\x1b5\x0b\n")
    assert main(["fit", f"{model_file}:model", "--data", str(tmp_path / "a.csv"), *FAST]) == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    assert r"x\x1b5" in printed
