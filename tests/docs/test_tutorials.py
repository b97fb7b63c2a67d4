"""Every tutorial runs from its first cell to its last, with few steps and draws, and names nothing that is not there."""

import ast
import importlib
import re
from pathlib import Path

import pyro
import pytest
import torch

import pyro_flowguides as fg

plt = pytest.importorskip("matplotlib.pyplot")

TUTORIALS = Path(__file__).parents[2] / "tutorials"
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The two that need the fewest seconds run always.
FAST = {"01_eight_schools"}
PAGES = sorted(TUTORIALS.glob("[0-9][0-9]_*.md"))
# What a tutorial may need beyond the package and its plots.
OPTIONAL = {"sklearn", "statsmodels"}


def cells(path):
    """The code of every cell, after as many empty lines as put its lines where they are in the page."""
    text = path.read_text(encoding="utf-8")
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in CELL.finditer(text)]


def imports(path):
    nodes = [node for cell in cells(path) for node in ast.walk(ast.parse(cell))]
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return {
        name.split(".")[0] for name in modules + [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    }


@pytest.fixture
def reduced(monkeypatch, tmp_path):
    """Few steps and draws, an empty folder to work in, no windows; what a page sets for itself is put back after it."""
    monkeypatch.setenv("FLOWGUIDES_QUICK", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    dtype = torch.get_default_dtype()
    with pyro.settings.context(module_local_params=False):
        yield
    torch.set_default_dtype(dtype)
    plt.close("all")


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=[] if path.stem in FAST else pytest.mark.slow) for path in PAGES]
)
# ArviZ 0.23 with the newest pandas.
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame")
# Fits of few steps are poor, and ArviZ says so.
@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto distribution:UserWarning")
def test_a_tutorial_runs(path, reduced):
    for module in imports(path) & OPTIONAL:
        pytest.importorskip(module)
    # One dictionary for all cells, as in a notebook.
    names = {"__name__": path.stem}
    for cell in cells(path):
        exec(compile(cell, path, "exec"), names)


def test_there_are_tutorials_and_the_contents_list_them_all():
    contents = (TUTORIALS / "README.md").read_text(encoding="utf-8")
    assert PAGES
    assert sorted(re.findall(r"\]\((\d\d_\w+)\.md\)", contents)) == [path.stem for path in PAGES]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_names_of_the_library_in_a_page_exist(path):
    for name in re.findall(r"\bfg((?:\.[A-Za-z_]\w*)+)", path.read_text(encoding="utf-8")):
        value = fg
        for part in name.split(".")[1:]:
            assert hasattr(value, part), f"{path.name}: fg{name}"
            value = getattr(value, part)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_what_a_page_imports_from_the_library_exists(path):
    nodes = [node for cell in cells(path) for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.ImportFrom)]
    for node in nodes:
        if node.module.startswith("pyro_flowguides"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), node.module
