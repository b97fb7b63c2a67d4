"""Imports between modules of the package go one way: no circle, and none to a room above."""

import ast
from pathlib import Path

import pytest

import pyro_flowguides

ROOT = Path(pyro_flowguides.__file__).parent
# From the ground to the roof. A room is a folder or a file of the package, and imports from rooms before it alone.
ROOMS = [
    "checks",
    "internals",
    "processes",
    "examples",
    "transforms",
    "bases",
    "distributions",
    "image_flows",
    "flows",
    "recipes",
    "model",
    "guides",
    "diagnostics",
    "report",
    "compiled",
    "training",
    "calibration",
    "__init__",
    "cli",
    "__main__",
    "testing",
]


def module_files(root):
    """Every module of a package by its dotted name below the package; the package itself is ``""``."""
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
        for path in root.rglob("*.py")
    }


def imports(name, path, known, package):
    """The modules of the package that a module imports anywhere, under TYPE_CHECKING and within functions too, with lines."""
    is_package = path.name == "__init__.py"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, _, rest = alias.name.partition(".")
                if top == package:
                    yield rest, node.lineno
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = name.split(".") if name else []
                up = node.level - is_package
                base = parts[: len(parts) - up] if up else parts
                target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            else:
                top, _, target = node.module.partition(".")
                if top != package:
                    continue
            for alias in node.names:
                inner = f"{target}.{alias.name}".strip(".")
                yield (inner if inner in known else target), node.lineno


def room(module):
    return module.split(".")[0] or "__init__"


def graph_of(root):
    known = module_files(root)
    return {name: dict(imports(name, path, known, root.name)) for name, path in known.items()}


def upward(graph):
    """Sentences about the imports of a room from one that stands after it."""
    return [
        f"{module or '__init__'} (line {line}) imports {target or '__init__'}"
        for module, targets in graph.items()
        for target, line in targets.items()
        if ROOMS.index(room(target)) > ROOMS.index(room(module))
    ]


def circle(graph):
    """The modules of a circle of imports, if there is one."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        path.append(module)
        for target in graph.get(module, ()):
            found = visit(target)
            if found:
                return found
        done.add(path.pop())
        return None

    return next(filter(None, map(visit, graph)), None)


def test_every_room_has_its_place():
    assert {room(module) for module in module_files(ROOT)} == set(ROOMS)


def test_no_import_goes_up():
    assert upward(graph_of(ROOT)) == []


def test_no_circle_of_imports():
    assert circle(graph_of(ROOT)) is None


@pytest.mark.parametrize(
    ("files", "expected_circle", "expected_upward"),
    [
        ({"transforms/base.py": "from .. import checks"}, None, []),
        ({"transforms/base.py": "import torch, os.path\nfrom torch import nn"}, None, []),
        (
            {"model/a.py": "from .b import x", "model/b.py": "def f():\n    from . import a"},
            ["model.a", "model.b", "model.a"],
            [],
        ),
        (
            {"guides/a.py": "if TYPE_CHECKING:\n    from ..training.fit import fit"},
            None,
            ["guides.a (line 2) imports training.fit"],
        ),
        ({"model/a.py": "import package.guides.b"}, None, ["model.a (line 1) imports guides.b"]),
        ({"model/a.py": "from package.guides import b"}, None, ["model.a (line 1) imports guides.b"]),
        ({"checks.py": "from . import __version__"}, None, ["checks (line 1) imports __init__"]),
        ({"bases.py": "from .flows import coupling"}, None, ["bases (line 1) imports flows"]),
    ],
)
def test_what_the_rule_sees(files, expected_circle, expected_upward, tmp_path):
    """The rule on small packages: relative and absolute imports, within functions and under TYPE_CHECKING."""
    root = tmp_path / "package"
    for name in ("__init__.py", "checks.py", "bases.py", "flows.py", "guides/b.py", "training/fit.py", *files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files.get(name, ""))
    for folder in ("model", "guides", "training", "transforms"):
        (root / folder).mkdir(exist_ok=True)
        (root / folder / "__init__.py").write_text("")
    graph = graph_of(root)
    assert circle(graph) == expected_circle
    assert upward(graph) == expected_upward
