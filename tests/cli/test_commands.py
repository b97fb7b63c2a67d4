"""The command line: the main job end to end, models of the user, and one clear line for bad input."""

import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from cli_cases import FAST, wrong

import pyro_flowguides as fg
from pyro_flowguides.cli import main, read_data
from pyro_flowguides.diagnostics.arviz import Group, to_tree


def test_list(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for name in ("eight_schools", "eight_schools_centered", "coupling", "planar", "normal"):
        assert f"  {name} " in printed


def test_main_job(tmp_path, capsys):
    out = tmp_path / "results"
    command = [
        "fit",
        "eight_schools",
        "--guide",
        "coupling",
        "--compare",
        "normal",
        "--out",
        str(out),
        *FAST,
        "--report",
    ]
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
    fits = {f"eight_schools_{guide}.{suffix}" for guide in ("coupling", "normal") for suffix in ("nc", "html")}
    assert files == fits | {"eight_schools_marginals.png"}
    report = (out / "eight_schools_coupling.html").read_text()
    assert "flowguides fit eight_schools --guide coupling" in report
    # Of the other guide and of the reference, beside this one.
    assert re.findall(r"--mark: [^>]*>(\w+)<", report) == ["NUTS", "normal", "AutoCoupling"]
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


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--search-modes", "128 starts found no other mode"),
        pytest.param("--no-search-modes", "never reaches cannot be detected", marks=pytest.mark.slow),
    ],
)
def test_what_is_known_of_other_modes_is_printed_and_kept_in_the_file(
    model_file, data_file, tmp_path, capsys, flag, sentence
):
    pytest.importorskip("arviz")
    assert main(["fit", f"{model_file}:model", "--data", str(data_file), "--out", str(tmp_path), flag, *FAST]) == 0
    assert sentence in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "model_coupling.nc")]) == 0
    assert sentence in capsys.readouterr().out


def test_report_of_a_file(written, capsys):
    files = [str(written / f"{name}.nc") for name in ("exact", "narrow")]
    assert main(["report", files[0], "--beside", files[1], "--reference", "narrow"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {written / 'exact.html'}"
    page = (written / "exact.html").read_text()
    assert "Exact. Use the draws as they are." in page
    assert "narrow</span>" in page
    other = written / "other_place.html"
    assert main(["report", files[0], "--out", str(other)]) == 0
    assert "narrow" not in other.read_text()
    assert main(["report", files[0], "--reference", "nuts"]) == 2
    assert "the reference 'nuts' is not among" in capsys.readouterr().err
    assert main(["report", files[0], "--out", str(written / "missing" / "a.html")]) == 1
    assert "could not be written: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--report"], ["--out", ".", "--no-report"]])
def test_a_report_may_be_had_alone_or_left_out(flags, tmp_path, monkeypatch, model_file, data_file):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    assert main(["fit", f"{model_file}:model", "--data", str(data_file), "--guide", "normal", *FAST, *flags]) == 0
    suffixes = {path.suffix for path in set(tmp_path.iterdir()) - before}
    assert ".html" in suffixes if "--report" in flags else suffixes == {".nc", ".png"}
    assert ".nc" not in suffixes or "--report" not in flags


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


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (lambda m, d, t: ["nine_schools"], "unknown model 'nine_schools'; known are eight_schools"),
        (lambda m, d, t: ["eight_schools", "--guide", "copula"], "unknown guide 'copula'; known are coupling"),
        (lambda m, d, t: ["eight_schools", "--compare", "copula"], "unknown guide 'copula'"),
        (lambda m, d, t: ["eight_schools", "--num-steps", "-5"], "--num-steps must be at least 1, got -5"),
        (lambda m, d, t: ["eight_schools", "--max-seconds", "0"], "--max-seconds must be above 0, got 0.0"),
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
