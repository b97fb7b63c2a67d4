"""A fuzz of the command line: random files, models and options, with a fit that takes milliseconds.

``python tests/cli_fuzz.py NUM_CASES [SEED]`` prints a line of JSON with the number of cases by exit status. Every case must end
with a documented status, without a traceback, and with at most one line of its own on the standard error; a directory for
results must hold whole files only.
"""

import contextlib
import io
import json
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np
import torch
from fits import Y, quick
from models import conjugate
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from pyro_flowguides.cli import commands, main
from pyro_flowguides.diagnostics.arviz import Group, to_tree

MODELS = {
    "good": "mu = pyro.sample('mu', dist.Normal(0.0, 1.0))\n    pyro.sample('y', dist.Normal(mu, 1.0).expand([len(x)]), obs=x)",
    "shape": "n = x.shape[0]",
    "integer": "for i in range(x): pass",
    "key": "raise KeyError('a')",
    "zero": "1 / 0",
    "assertion": "assert False",
    "os": "raise OSError(28, 'No space left')",
    "exit": "raise SystemExit(3)",
    "exit0": "raise SystemExit",
    "nothing": "raise ValueError",
    "lines": "raise RuntimeError('two\\nlines')",
    "recursion": "return good_recursion(x)",
    "no text": "raise NoText",
    "interrupt": "raise KeyboardInterrupt",
    "memory": "raise MemoryError",
    "stop": "raise StopIteration",
    "group": "raise UnicodeDecodeError('utf-8', b'a', 0, 1, 'b')",
}
SOURCE = """
import pyro
import pyro.distributions as dist

class NoText(Exception):
    def __str__(self):
        raise ValueError

def good_recursion(x):
    return good_recursion(x)

"""
FILES = {
    "syntax": "def model(:",
    "exits": "import sys; sys.exit(7)",
    "raises": "raise KeyError",
    "empty": "",
    "binary": None,
    "default": "def model(x=1):\n    1 / 0",
}
JSON = [
    *(
        "{}",
        "[]",
        "null",
        "3",
        '"a"',
        "",
        "{",
        '{"x": null}',
        '{"x": "a"}',
        '{"x": {"a": 1}}',
        '{"x": []}',
        '{"x": [[]]}',
    ),
    *(
        '{"x": [1, 2]}',
        '{"x": [1.5]}',
        '{"x": 3}',
        '{"x": true}',
        '{"x": [null]}',
        '{"x": [[1], [1, 2]]}',
        '{"y": [1]}',
    ),
    *('{"x": 1e999}', '{"x": [1e999]}', '{"x": [' + "9" * 400 + "]}", '{"x": ' + "9" * 5000 + "}", '{"x": ["a"]}'),
    *('{"x": ' + "[" * 100000 + "]" * 100000 + "}", '{"x": ' + "[" * 200 + "]" * 200 + "}", '{"x": [NaN], "z": 1}'),
]
ARRAYS = [
    *(
        np.arange(3.0),
        np.zeros(()),
        np.zeros(0),
        np.array(["a"]),
        np.array([None]),
        np.array([1j]),
        np.zeros(2, "M8[s]"),
    ),
    *(np.ones(2, np.longdouble), np.ones(2, ">f8"), np.ones(2, np.float16), np.ones(2, bool), np.ones((1, 2, 3))),
    *(np.ones(2, np.uint64), np.array(b"a"), np.zeros(2, [("a", "f8")]), np.array([2**63], dtype=np.uint64)),
]
CSV = ["x\n1\n2\n", "x\na\n", "x\n", "", "x,x\n1,2\n", "x\n1,2\n", "x,y\n1\n", '"x\n1', "\0", "x\n1\n\n2\n"]


class Case:
    """One random command in a directory of its own."""

    def __init__(self, rng, folder):
        self.rng, self.folder = rng, folder

    def arguments(self):
        rng = self.rng
        command = rng.choices(["fit", "compare", "list", "none"], [16, 3, 1, 1])[0]
        if command == "fit":
            return ["fit", self.model(), *self.data(), *self.options()]
        if command == "compare":
            names = [self.netcdf(index) for index in range(rng.randint(1, 2))]
            return ["compare", *names, *rng.choice([[], ["--reference", "a0"], ["--reference", "b"]])]
        return [command] if command == "list" else rng.choice([[], ["--version"], ["--help"], ["fit"], ["no"]])

    def model(self):
        kind = self.rng.random()
        if kind < 0.1:
            return self.rng.choice(
                ["eight_schools", "nine_schools", "", ":", "no.py:model", f"{self.folder}:model", "\udcff:m"]
            )
        path = self.folder / self.rng.choice(["model.py"] * 8 + ["model.txt", "mo del.py"])
        if kind < 0.25:
            text = FILES[self.rng.choice(list(FILES))]
            path.write_bytes(self.rng.randbytes(50) if text is None else text.encode())
        else:
            body = MODELS[self.rng.choice(["good"] * 6 + list(MODELS))]
            path.write_text(f"{SOURCE}def model(x):\n    {body}\n")
        return f"{path}:{self.rng.choice(['model'] * 12 + ['mdel', '', 'dist', 'NoText'])}"

    def data(self):
        rng = self.rng
        kind = rng.choices(["json", "npz", "csv", "npy", "none", "odd"], [5, 5, 2, 1, 1, 1])[0]
        if kind == "none":
            return []
        if kind == "odd":
            return ["--data", rng.choice([str(self.folder), "/dev/null", "no.json", str(self.folder / "a.txt")])]
        path = self.folder / f"data.{'npz' if kind == 'npy' else kind}"
        if kind == "json":
            path.write_text(rng.choice(['{"x": [1.0, 2.0]}'] * 15 + JSON))
        elif kind == "csv":
            path.write_text(rng.choice(CSV))
        elif kind == "npy":
            with open(path, "wb") as file:
                np.save(file, np.arange(3.0))
        else:
            with open(path, "wb") as file:
                save = rng.choice([np.savez, np.savez_compressed])
                save(file, **{rng.choice(["x"] * 9 + ["a/b", "y"]): rng.choice(ARRAYS[:1] * 10 + ARRAYS)})
        if rng.random() < 0.25:
            self.damage(path)
        return ["--data", str(path)]

    def damage(self, path):
        content = bytearray(path.read_bytes())
        kind = self.rng.choice(["cut", "flip", "flip", "empty", "append"])
        if kind == "cut":
            content = content[: self.rng.randint(0, len(content))]
        elif kind == "flip" and content:
            for _ in range(self.rng.randint(1, 8)):
                content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        elif kind == "empty":
            content = b""
        else:
            content += self.rng.randbytes(20)
        path.write_bytes(content)

    def options(self):
        rng, found = self.rng, []
        numbers = ["1", "7", "3", "5", "2", "9", "11", "0", "-1", "x", "1.5", "99999999999999999999999", "", "9" * 5000]
        for option in ("--num-steps", "--num-particles", "--seed"):
            if rng.random() < 0.2:
                found += [option, rng.choice(["1", "2", *numbers])]
        if rng.random() < 0.3:
            found += ["--guide", rng.choice(["normal", "planar", "normal", "planar", "copula", ""])]
        if rng.random() < 0.2:
            found += ["--compare", *rng.choices(["normal", "planar", "copula"], k=rng.randint(0, 2))]
        if rng.random() < 0.4:
            (self.folder / "file").write_text("")
            (self.folder / "taken" / "model_coupling.nc").mkdir(parents=True, exist_ok=True)
            out = rng.choice(
                ["out", "out", "out/deep", "file", "file/out", "taken", "x" * 300, "/proc/out", "/dev/null/out"]
            )
            found += ["--out", str(self.folder / out)]
        return [*found, *rng.choice([[], [], [], ["--no-progress"], ["--no-progress"], ["--unknown"]])]

    def netcdf(self, index):
        rng, path = self.rng, self.folder / f"a{index}.nc"
        kind = rng.choice(["good", "good", "text", "missing", "empty", "odd", "damaged"])
        if kind == "missing":
            return str(path)
        if kind == "text":
            path.write_text("no netCDF")
            return str(path)
        variables = {"mu": rng.choice([np.zeros((1, 30)), np.zeros((0, 0)), np.full((1, 30), np.nan)])}
        groups = {
            "good": {"posterior": Group({"mu": np.random.default_rng(index).normal(size=(1, 30))})},
            "empty": {"posterior": Group({})},
            "odd": {"posterior": Group(variables), "sample_stats": Group({"log_q": np.zeros((1, 30))})},
        }
        to_tree(groups.get(kind, groups["good"])).to_netcdf(str(path))
        if kind == "damaged":
            content = path.read_bytes()
            path.write_bytes(content[: rng.randint(0, len(content) - 1)])
        return str(path)


class SmallFit(commands.FitResult):
    """A fit that is exported at once."""

    def to_arviz(self, *args, **kwargs):
        return to_tree({"posterior": Group({"mu": np.zeros((1, 3))})})


def stubbed_fit():
    """What takes the place of fit: one run of the model, and always the same result."""
    real = quick(conjugate, AutoNormal(conjugate), torch.tensor(Y), num_steps=2)
    result = SmallFit(**{**vars(real), "draws": real.draws[:50]})

    def fit(model, guide, *, model_kwargs, **options):
        with torch.no_grad(), poutine.block():
            model(**model_kwargs)
        return result

    return fit


def run(rng, folder):
    """One case; returns its status, or raises AssertionError."""
    arguments = Case(rng, folder).arguments()
    out, err = io.StringIO(), io.StringIO()
    modules, path = set(sys.modules), list(sys.path)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status, by_parser = main(arguments), False
        except SystemExit as end:
            status, by_parser = end.code, True
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name in ("model", "mo del"):
            del sys.modules[name]
    shown = (arguments, status, err.getvalue()[-2000:])
    assert status in ((0, 2) if by_parser else (0, 1, 2, 130)), shown
    assert "Traceback" not in err.getvalue(), shown
    if not by_parser:
        lines = err.getvalue().splitlines()
        assert len(lines) == (status != 0), shown
        assert all(line.startswith("flowguides: ") for line in lines), shown
        assert status == 130 or status == 0 or "interrupted" not in lines[0], shown
    left = [file.name for file in folder.rglob(".*") if file.is_file()]
    assert not left, (shown, left)
    return status


def main_fuzz(num_cases, seed=0):
    """Runs the cases; the numbers by status."""
    warnings.simplefilter("ignore")
    commands.fit = stubbed_fit()
    plot = commands.Output.write_picture
    # A picture takes half a second.
    commands.Output.write_picture = lambda self, *args: self.picture
    rng, found, slowest = random.Random(seed), Counter(), 0.0
    try:
        for _ in range(num_cases):
            with tempfile.TemporaryDirectory() as folder:
                began = time.process_time()
                found[run(rng, Path(folder))] += 1
                slowest = max(slowest, time.process_time() - began)
    finally:
        commands.Output.write_picture = plot
    return {"cases": num_cases, "statuses": dict(sorted(found.items())), "slowest_s": round(slowest, 2)}


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")
    print(json.dumps(main_fuzz(*map(int, sys.argv[1:]))))
