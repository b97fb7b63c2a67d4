"""What ArviZ draws for a report, in the generation that is installed and in the other one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import pyro_flowguides as fg
from pyro_flowguides.report import arviz_plots

pytest.importorskip("matplotlib")

# Without torch, which the interpreter with the other generation has not.
SCRIPT = """
import importlib, sys, types
root = sys.argv[1]
for name, path in (("", ""), (".diagnostics", "/diagnostics"), (".report", "/report")):
    package = types.ModuleType("pyro_flowguides" + name)
    package.__path__ = [root + path]
    sys.modules["pyro_flowguides" + name] = package
plots = importlib.import_module("pyro_flowguides.report.arviz_plots")
assert "torch" not in sys.modules
"""
DRAWN = """
import numpy as np
x = np.random.default_rng(0).normal(size=(50, 8))
for figure in (plots.pair_figure(x[:, 0], x[:, 1], (3.0, 2.0)), plots.predictive_figure(x[0], x, (3.0, 2.0), "#010203")):
    (ax,) = [each for each in figure.axes if each.get_visible()]
    assert tuple(figure.get_size_inches()) == (3.0, 2.0)
    print(len(ax.collections), len(ax.lines), sum(line.get_color() == "#010203" for line in ax.lines))
"""


def test_pairs_and_data_are_drawn_on_one_pair_of_axes():
    x = np.random.default_rng(0).normal(size=(50, 8))
    (ax,) = arviz_plots.pair_figure(x[:, 0], x[:, 1], (3.0, 2.0)).axes
    np.testing.assert_allclose(ax.collections[0].get_offsets(), x[:, :2])
    (ax,) = arviz_plots.predictive_figure(x[0], x, (3.0, 2.0), "#010203").axes
    assert [line.get_color() for line in ax.lines].count("#010203") == 1
    assert len(ax.lines) >= 51


def test_it_needs_no_torch():
    subprocess.run([sys.executable, "-c", SCRIPT, str(Path(fg.__file__).parent)], check=True)


@pytest.mark.slow
def test_under_the_other_generation_of_arviz():
    """FLOWGUIDES_ARVIZ1_PYTHON names an interpreter with ArviZ 1.x and matplotlib."""
    interpreter = os.environ.get("FLOWGUIDES_ARVIZ1_PYTHON")
    if not interpreter or subprocess.run([interpreter, "-c", "import matplotlib"], capture_output=True).returncode:
        pytest.skip("no environment with the other generation of ArviZ and matplotlib: set FLOWGUIDES_ARVIZ1_PYTHON")
    command = [interpreter, "-c", SCRIPT + DRAWN, str(Path(fg.__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "0", "0", "0", "51", "1"]
