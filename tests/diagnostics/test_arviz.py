"""The container of ArviZ, in both of its generations: names that clash, the usual calls, one read by the other."""

import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from draw_cases import fit_example, group_names

import pyro_flowguides as fg
from pyro_flowguides.calibration import Calibration
from pyro_flowguides.diagnostics.arviz import Group, arviz_generation, to_tree
from pyro_flowguides.examples import EXAMPLES

az = pytest.importorskip("arviz")


@pytest.mark.parametrize(
    ("groups", "coords", "message"),
    [
        ({"posterior": Group({"x": np.zeros((1, 5, 2))}, {"x": ["x"]})}, {}, "'x' is the name of a dimension and of a"),
        ({"posterior": Group({"x": np.zeros((1, 5, 2))}, {"x": ["draw"]})}, {}, "called 'draw', which ArviZ keeps"),
        (
            {"posterior": Group({"x": np.zeros((1, 5, 2, 2))}, {"x": ["a", "a"]})},
            {},
            "two dimensions of 'x' are called",
        ),
        (
            {"posterior": Group({"x": np.zeros((1, 5))}, {"x": ["a"]})},
            {},
            r"has 0 dimensions beside \['chain', 'draw'\], and 1",
        ),
        (
            {"posterior": Group({"x": np.zeros((1, 5, 2)), "y": np.zeros((1, 5, 3))}, {"x": ["a"], "y": ["a"]})},
            {},
            "'a' of group posterior has 2 elements before 'y' and 3 in it",
        ),
        ({"posterior": Group({"s/x": np.zeros((1, 5)), "s.x": np.zeros((1, 5))})}, {}, "would be called 's.x'"),
        (
            {"posterior": Group({"x": np.zeros((1, 5, 2))}, {"x": ["a"]})},
            {"a": ["u"]},
            "'a' of group posterior has 2 elements and 1 labels",
        ),
        (
            {"posterior": Group({"x": np.zeros((1, 5, 2))}, {"x": ["a"]})},
            {"b": ["u"]},
            "labels for 'b', which is no dimension; there are a, chain, draw",
        ),
    ],
)
def test_names_that_clash(groups, coords, message):
    with pytest.raises(ValueError, match=message):
        to_tree(groups, coords)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES.values(), ids=list(EXAMPLES))
def test_the_usual_calls(example, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    path = tmp_path / "fit.nc"
    fit_example(example).to_arviz(500, coords=example.coords).to_netcdf(str(path))
    tree = az.from_netcdf(str(path))
    old = arviz_generation() == 0
    plots = ["plot_trace", "plot_ppc"] if old else ["plot_trace_dist", "plot_ppc_dist"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one chain, of a k-hat after five steps, and of libraries at odds
        assert len(az.summary(tree)) == len(fit_example(example).summary())
        assert np.isfinite(float(az.loo(tree).se))
        assert len(az.compare({"one": tree, "other": tree})) == 2
        for name in [*plots, "plot_forest"]:
            getattr(az, name)(tree)
        az.plot_pair(tree, var_names=["mu", "tau"])
    plt.close("all")


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    """Keeps what is given to the builder, for the interpreter that has the other generation."""
    contents = []

    def record(groups, coords=None, attrs=None):
        fields = {name: (dict(g.variables), dict(g.dims), tuple(g.sample_dims)) for name, g in groups.items()}
        contents.append((fields, coords, attrs))
        return to_tree(groups, coords, attrs)

    monkeypatch.setattr("pyro_flowguides.diagnostics.posterior.to_tree", record)
    return contents


@pytest.mark.slow
def test_under_the_other_generation_of_arviz(recorded, tmp_path):
    """The same content in both containers, each file opened by the other, the usual calls on every example.

    ArviZ 1.x needs Python 3.12: FLOWGUIDES_ARVIZ1_PYTHON names an interpreter that has it, without torch.
    """
    interpreter = os.environ.get("FLOWGUIDES_ARVIZ1_PYTHON")
    if not interpreter or not Path(interpreter).exists():
        pytest.skip("no environment with the other generation of ArviZ: set FLOWGUIDES_ARVIZ1_PYTHON")
    trees = {}
    for name, example in EXAMPLES.items():
        trees[name] = fit_example(example).to_arviz(200, coords=example.coords)
        trees[name].to_netcdf(str(tmp_path / f"{name}.nc"))
        (tmp_path / f"{name}.pickle").write_bytes(pickle.dumps(recorded[-1]))
    ranks = np.random.default_rng(0).integers(0, 100, size=(50, 2))
    calibration = Calibration({"x": ranks}, {"x": (ranks + 0.5) / 100}, 99, {"x": ["group"]})
    calibration.to_arviz().to_netcdf(str(tmp_path / "calibration.nc"))
    script = Path(__file__).with_name("other_generation.py")
    command = [interpreter, str(script), str(Path(fg.__file__).parent), str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert found["generation"] == 1
    assert found["khat"] == pytest.approx(0.75, abs=0.3)
    assert found["calls"]["calibration"] == ["plot_ecdf_pit"]
    for name, tree in trees.items():
        assert found["types"][name] == "DataTree"
        assert found["dims"][name] == ["chain", "draw", "school"]
        assert {"summary", "loo", "compare", "plot_ppc_dist", "plot_pair"} <= set(found["calls"][name])
        other = az.from_netcdf(str(tmp_path / f"{name}_other.nc"))
        assert group_names(other) == group_names(tree)
        for group in group_names(tree):
            theirs, ours = other[group], tree[group]
            assert set(theirs.data_vars) == set(ours.data_vars)
            for variable in ours.data_vars:
                assert theirs[variable].dims == ours[variable].dims
                np.testing.assert_array_equal(theirs[variable].values, ours[variable].values)
            for dim in ours.coords:
                np.testing.assert_array_equal(theirs[dim].values, ours[dim].values)
            ignored = {"created_at"}
            assert set(theirs.attrs) - ignored == set(ours.attrs) - ignored


def test_numpy_modules_need_no_torch():
    """The part of the test above that any machine can run."""
    code = Path(__file__).with_name("other_generation.py").read_text().split("def calls")[0]
    root = Path(fg.__file__).parent
    subprocess.run([sys.executable, "-c", code, str(root), "."], check=True)


@pytest.mark.parametrize(("version", "generation"), [("0.23.1", 0), ("1.0.0", 1), ("2.1", 1)])
def test_generations_of_arviz(version, generation, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", {"arviz": version}.__getitem__)
    assert arviz_generation.__wrapped__() == generation
