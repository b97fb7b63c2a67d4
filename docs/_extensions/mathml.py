"""Formulas as MathML, which browsers draw themselves: no script, no font and no network."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from docutils.nodes import SkipNode
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.errors import SphinxError

NAMESPACE = "http://www.w3.org/1998/Math/MathML"
ElementTree.register_namespace("", NAMESPACE)


def mathml(latex: str, as_block: bool) -> str:
    """A formula as a ``<math>`` element.

    Raises:
        SphinxError: if the converter does not know a command in it.
    """
    try:
        # The converter has the dots under this name alone.
        source = latex2mathml.tex2mathml(latex.replace(r"\dots", r"\ldots"), as_block=as_block)
    except Exception as error:
        raise SphinxError(f"no MathML for {latex!r}: {error}") from error
    # HTML knows the name of this character, XML does not.
    formula = ElementTree.fromstring(source.replace("&ApplyFunction;", "\u2061"))
    for element in formula.iter(f"{{{NAMESPACE}}}munderover"):
        _lower_subscript(element)
    return ElementTree.tostring(formula, encoding="unicode")


def _lower_subscript(element: ElementTree.Element) -> None:
    """The converter sets the subscript of an accented letter beneath it; this sets it beside."""
    base, subscript, accent = element
    if accent.get("stretchy") != "false":
        return  # a sum with its limits
    accented = ElementTree.Element(f"{{{NAMESPACE}}}mover", accent="true")
    accented.extend([base, accent])
    element.tag = f"{{{NAMESPACE}}}msub"
    element[:] = [accented, subscript]


def _visit_inline(translator: Any, node: Any) -> None:
    translator.body.append(mathml(node.astext(), as_block=False))
    raise SkipNode


def _visit_block(translator: Any, node: Any) -> None:
    translator.body.append(f'<div class="math">{mathml(node.astext(), as_block=True)}</div>')
    raise SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the renderer ``html_math_renderer = "mathml"``."""
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
