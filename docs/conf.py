"""The configuration of the documentation: ``sphinx-build -W -b html docs docs/_build``. Nothing here needs a network."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS / "_extensions")]

import pyro_flowguides  # noqa: E402 (the path comes first)

project = "pyro_flowguides"
author = copyright = "The authors of pyro_flowguides"
version = release = pyro_flowguides.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "mathml"]
exclude_patterns = ["_build", "jupyter_execute", ".jupyter_cache"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

# The tutorials are run where this says so ("force" or "cache"), in their reduced form with FLOWGUIDES_QUICK=1.
nb_execution_mode = os.environ.get("FLOWGUIDES_TUTORIALS", "off")
nb_execution_timeout = 600
nb_execution_raise_on_error = True

# A method without a docstring fulfils a contract that is documented where it is stated.
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
# As written in the source: the repr of a function would make the whole signature unreadable.
autodoc_preserve_defaults = True
autosummary_generate = False
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = "pyro_flowguides"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["layout.css"]
html_show_sphinx = False


def _readable_default(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """The default that a dataclass makes anew each time is no expression either."""
    return signature and signature.replace("<factory>", "..."), returns


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", _readable_default)


def _copy_pages(source: Path, target: Path) -> None:
    """Sphinx reads what is below its own folder alone."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for page in sorted(source.glob("*.md")):
        if page.name != "README.md":
            shutil.copy(page, target)


_copy_pages(ROOT / "tutorials", DOCS / "tutorials")
if not list((DOCS / "tutorials").iterdir()):
    (DOCS / "tutorials" / "none.md").write_text("# None in this checkout\n")
_copy_pages(ROOT / "benchmarks" / "results", DOCS / "results")
