"""The pages keep their promises: their code runs, their names and links exist, their numbers come from result files."""

import importlib
import pkgutil
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import pyro_flowguides as fg

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# What conf.py copies into docs/ belongs to its own folder.
COPIED = {DOCS / "results": ROOT / "benchmarks" / "results", DOCS / "tutorials": ROOT / "tutorials"}
GENERATED = {"_build", "jupyter_execute", "results", "tutorials"}
WRITTEN = sorted(path for path in DOCS.rglob("*.md") if path.relative_to(DOCS).parts[0] not in GENERATED)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *WRITTEN]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.md"))
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.md"))

CODE = re.compile(r"^```([\w{}]+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Steps, draws, rows and layers are cut to what shows that the code runs.
REDUCED = [
    (r"\bnum_layers=\d{2}", "num_layers=4"),
    (r"\brange\(\d{3,}\)", "range(5)"),
    (r"\.run\(\d{3,}", ".run(20"),
    (r"\b(warmup_steps|num_samples)=\d{2,3}, (?=warmup|disable)", r"\1=30, "),
    (r"\b\d{1,2}_?000\b", "100"),
]
# Eight seconds and more each.
SLOW_PAGES = {
    "docs/choosing_a_guide.md",
    "docs/how_to/density.md",
    "docs/how_to/discrete.md",
    "docs/how_to/gpu.md",
    "docs/how_to/initialise.md",
    "docs/how_to/log_density.md",
    "docs/how_to/migrate.md",
    "docs/how_to/minibatch.md",
    "docs/how_to/neutra.md",
    "docs/how_to/own_transform.md",
    "docs/how_to/ownership.md",
    "docs/how_to/report.md",
    "docs/how_to/restarts.md",
    "docs/how_to/several_modes.md",
    "docs/how_to/weighted_draws.md",
}


def page_id(path):
    return str(path.relative_to(ROOT))


def python_blocks(page):
    return [code for language, code in CODE.findall(page.read_text()) if language == "python"]


def prose(page):
    return CODE.sub("", page.read_text())


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page_id(page), marks=pytest.mark.slow if page_id(page) in SLOW_PAGES else [])
        for page in PAGES
        if python_blocks(page)
    ],
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """All blocks of a page, one after the other, as a reader would run them."""
    loop = importlib.import_module("pyro_flowguides.training.loop")
    schedules = importlib.import_module("pyro_flowguides.training.schedules")
    monkeypatch.setattr(loop, "NUM_STEPS", 10)
    monkeypatch.setattr(loop, "NUM_FINAL_DRAWS", 500)
    monkeypatch.setattr(schedules, "FIRST_NUM_STEPS", 10)
    # Each round captures its step anew.
    monkeypatch.setattr(schedules, "NUM_ROUNDS", 1)
    monkeypatch.chdir(tmp_path)
    code = "\n".join(python_blocks(page))
    for pattern, replacement in REDUCED:
        code = re.sub(pattern, replacement, code)
    try:
        exec(compile(code, page_id(page), "exec"), {"__name__": "a_page"})
    finally:
        plt.close("all")


def test_every_public_name_is_on_the_page_of_names():
    listed = {}
    for line in (DOCS / "names.md").read_text().splitlines():
        if line.startswith(".. currentmodule::"):
            names = listed.setdefault(line.split()[-1], set())
        elif re.fullmatch(r"   [A-Za-z_]+", line):
            names.add(line.strip())
    assert listed["pyro_flowguides"] == set(fg.__all__) - {"__version__"}
    assert listed["pyro_flowguides.transforms"] == set(fg.transforms.__all__)
    assert listed["pyro_flowguides.flows"] == {*fg.flows.RECIPES, *fg.flows.IMAGE_RECIPES}
    for module, names in listed.items():
        for name in names:
            documented = getattr(importlib.import_module(module), name)
            assert documented.__doc__, f"{module}.{name} has no docstring"


def exists(dotted):
    """Whether ``pyro_flowguides.<dotted>`` is a module, or a name in one, or an attribute of that."""
    owner, _, name = f"pyro_flowguides.{dotted}".rpartition(".")
    try:
        pkgutil.resolve_name(f"{owner}.{name}")
    except (ImportError, AttributeError):
        try:
            # A field without a default is no attribute of its class.
            return name in getattr(pkgutil.resolve_name(owner), "__annotations__", {})
        except (ImportError, AttributeError):
            return False
    return True


def test_existing_and_missing_names_are_told_apart():
    assert exists("AutoFlow.whiten") and exists("training.schedules.cosine") and exists("FitResult.draws")
    assert not exists("AutoFlow.whitten") and not exists("diagnostics.nothing") and not exists("fitt")


@pytest.mark.parametrize("page", PAGES + TUTORIALS + RESULTS, ids=page_id)
def test_quoted_names_exist(page):
    text = page.read_text()
    names = set(re.findall(r"\b(?:fg|pyro_flowguides)\.((?:\w+\.)*[A-Za-z_]\w*)", text))
    assert not sorted(name for name in names if not exists(name))
    for module in re.findall(r"python -m (benchmarks(?:\.\w+)+)", text):
        assert pkgutil.resolve_name(module), f"there is no {module}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name != "design"], ids=page_id)
def test_quoted_files_and_tests_exist(page):
    for path, test in re.findall(
        r"`((?:tests|benchmarks|pyro_flowguides|docs|tutorials)/[\w./-]*)(?:::(\w+))?`", prose(page)
    ):
        assert (ROOT / path).exists(), f"there is no {path}"
        if test:
            assert f"def {test}(" in (ROOT / path).read_text(), f"there is no {test} in {path}"


def anchors(page):
    """The anchors of headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def source_of(path):
    for copy, original in COPIED.items():
        if path.is_relative_to(copy):
            return original / path.relative_to(copy)
    return path


@pytest.mark.parametrize("page", PAGES + TUTORIALS, ids=page_id)
def test_internal_links_resolve(page):
    text = prose(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    links = [link for link in links if not re.match(r"[a-z]+:", link)]
    documents = [re.sub(r".*<(.*)>", r"\1", link) + ".md" for link in re.findall(r"\{doc\}`([^`]+)`", text)]
    for link in links + documents:
        path, _, anchor = link.partition("#")
        target = source_of((page.parent / path).resolve()) if path else page
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in anchors(target), f"{target.name} has no heading #{anchor}"


# --- numbers -------------------------------------------------------------------------------------------------------------

MEASURED = re.compile(r"\d[\d.,]*\s*(?:nats?|ms|milliseconds|seconds|times (?:faster|slower))\b")


@pytest.mark.parametrize("page", [page for page in WRITTEN if page.parent.name != "design"], ids=page_id)
def test_measured_numbers_are_not_typed(page):
    assert not MEASURED.findall(prose(page))


def test_the_benchmark_page_shows_result_files_alone():
    assert RESULTS
    assert not re.search(r"\d", prose(DOCS / "benchmarks.md"))
    for page in RESULTS:
        assert page.with_suffix(".json").exists(), f"{page.name} has no result file beside it"


def test_the_numbers_of_the_readme_are_those_of_the_files_they_name():
    section = (ROOT / "README.md").read_text().split("## Measured\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert rows
    for row in rows:
        (path,) = re.findall(r"\((benchmarks/results/\w+\.md)\)", row)
        recorded = set(re.findall(r"\d+\.\d+", (ROOT / path).read_text()))
        quoted = set(re.findall(r"\d+\.\d+", re.sub(r"\]\(.*?\)|arXiv:[\d.]+", "", row)))
        assert quoted and quoted <= recorded, f"{quoted - recorded} is not in {path}"
