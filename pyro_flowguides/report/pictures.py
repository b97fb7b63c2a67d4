"""The pictures of a report as SVG whose colors are those of the page, light or dark; a sentence where there is none to draw."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..diagnostics.plots import is_whole, plot_elbo, plot_marginals, plot_modes, plot_weights
from .arviz_plots import DRAWS_COLOR, pair_figure, predictive_figure
from .content import Report

# In inches. Small ones stand side by side where there is room, and below each other on a telephone.
SMALL, WIDE = (3.0, 2.1), (6.0, 2.6)
MAX_MARGINALS, MAX_PAIRS, MAX_SITES = 12, 6, 4
# More say nothing more.
MAX_DOTS, MAX_OBSERVATIONS, MAX_DRAWS = 1000, 2000, 4000
# Colors that stand for those of the page, which replaces them.
INK, MUTED, SERIES, AREA = "#010203", "#010204", ("#010205", "#010206", "#010207", "#010208"), "#010209"
_OF_PAGE = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    AREA: "var(--area)",
    **{color: f"var(--series-{index})" for index, color in enumerate(SERIES, 1)},
}
_TICKS = {"color": MUTED, "labelcolor": MUTED}


class NoPicture(Exception):
    """There is nothing to draw; the message is a sentence for the reader."""


class Panel:
    """One picture: SVG, with a caption and a text for those who do not see it.

    Arguments:
        svg: The picture.
        caption: What stands above it.
        alt: What is to be seen.
        is_wide: Whether it has a row of its own.
    """

    def __init__(self, svg: str, caption: str, alt: str, *, is_wide: bool = False) -> None:
        self.caption, self.is_wide = caption, is_wide
        self.html = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1)


def marginals(report: Report, number: int = MAX_MARGINALS) -> Iterator[Panel]:
    """The density of each scalar of the table, beside those of the other posteriors."""
    columns = report.finite_columns
    if not columns:
        raise NoPicture("No parameter has finite draws.")
    own = report.guide or "draws"
    # Those that others have, too, come first.
    for label in sorted(columns, key=lambda label: not any(label in each for each in report.beside.values()))[:number]:
        posteriors = {name: {label: _some(each[label])} for name, each in report.beside.items() if label in each}
        reference = report.reference if report.reference in posteriors else None
        shown = dict(sorted(posteriors.items(), key=lambda item: item[0] != reference))
        shown[own] = {label: _some(_equally_weighted(report, columns[label]))}
        with _style():
            figure, ax = _new_figure(SMALL)
            plot_marginals(shown, [label], reference=reference, axes=[ax])
            ax.set_title("")
            if legend := ax.get_legend():
                legend.remove()
            for area in ax.collections:
                area.set_color(AREA)
            svg = _svg(figure)
        yield Panel(svg, label, f"Density of {label} under {', '.join(shown)}")


def legend_of_marginals(report: Report) -> list[tuple[str, str]]:
    """The names of the posteriors in :func:`marginals`, with the color of each as the page names it."""
    others = [name for name in report.beside if name != report.reference]
    colors = [_OF_PAGE[color] for color in SERIES]
    named = [(report.reference, _OF_PAGE[AREA])] if report.reference else []
    own = report.guide or "draws"
    return [*named, *((name, colors[index % len(colors)]) for index, name in enumerate([*others, own]))]


def pairs(report: Report) -> Iterator[Panel]:
    """The draws of the pairs of scalars that are correlated most."""
    columns = {label: column for label, column in report.finite_columns.items() if not is_whole(column)}
    if len(columns) < 2:
        raise NoPicture("There are no two continuous parameters, and so there is no pair to draw.")
    labels = list(columns)
    values = np.stack([_equally_weighted(report, column) for column in columns.values()])
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations = np.corrcoef(values)
    first, second = np.triu_indices(len(labels), 1)
    size = np.abs(correlations[first, second])
    # One that is a multiple of another says nothing; nor does one that is the same in all draws.
    size[~(size < 1 - 1e-6)] = -1.0
    order = np.argsort(-size, kind="stable")[: min(MAX_PAIRS, int((size >= 0).sum()))]
    if not len(order):
        raise NoPicture("No two parameters vary each for itself, and so there is no pair to draw.")
    index = _evenly(values.shape[1], MAX_DOTS)
    for i, j in zip(first[order], second[order], strict=True):
        with _style():
            figure = pair_figure(values[i, index], values[j, index], SMALL)
            svg = _svg(figure, labels[i], labels[j])
        # No −0.
        correlation = f"correlation {round(correlations[i, j], 2) + 0.0:.2f}"
        yield Panel(svg, correlation, f"Draws of {labels[i]} against {labels[j]}, {correlation}")


def predictive(report: Report) -> Iterator[Panel]:
    """The data beside data that the model makes, a panel for each of the first observed sites."""
    if not report.predicted:
        raise NoPicture(report.unpredicted)
    drawn = 0
    for name, predicted in report.predicted.items():
        observed = report.observed.get(name)
        if observed is None or drawn == MAX_SITES:
            continue
        observed, predicted = observed.ravel(), predicted.reshape(len(predicted), -1)
        kept = np.isfinite(observed) & np.isfinite(predicted).all(0)
        observed, predicted = observed[kept].astype(np.float64), predicted[:, kept].astype(np.float64)
        if not observed.size:
            continue
        drawn += 1
        index = _evenly(observed.size, MAX_OBSERVATIONS)
        with _style():
            if observed.size == 1:
                figure, ax = _new_figure(SMALL)
                plot_marginals({"model": {name: predicted[:, 0]}}, [name], axes=[ax])
                ax.get_legend().remove()
                ax.set_title("")
                ax.axvline(observed[0], color=INK)
            else:
                figure = predictive_figure(observed[index], predicted[:, index], SMALL, INK)
            svg = _svg(figure, name, "" if observed.size == 1 else "fraction below")
        yield Panel(svg, name, f"Distribution of the data {name}, and of data that the model makes")
    if not drawn:
        raise NoPicture("The observed values and those of the model are not finite.")


def training(report: Report) -> Iterator[Panel]:
    """The ELBO of every step."""
    if not np.isfinite(report.losses).any():
        raise NoPicture("The losses of the training are not at hand.")
    with _style():
        figure, ax = _new_figure(WIDE)
        plot_elbo({"ELBO": report.losses}, ax=ax)
        ax.get_legend().remove()
        svg = _svg(figure, "step", "ELBO")
    yield Panel(svg, "ELBO of every step", f"ELBO over {len(report.losses)} steps of training", is_wide=True)


def weights(report: Report) -> Iterator[Panel]:
    """The tail of the weights, and the k-hat of every scalar."""
    if report.weights is None:
        raise NoPicture(f"These draws have no importance weights: {report.verdict.reason}.")
    if report.weights.are_constant:
        raise NoPicture("All weights are equal, up to rounding: the guide is exact, and there is no tail to draw.")
    with _style():
        figure, ax = _new_figure(SMALL)
        plot_weights({"weights": report.weights}, ax=ax)
        ax.get_legend().remove()
        svg = _svg(figure, "weight / mean weight", "fraction above")
    yield Panel(svg, f"tail of the weights, k-hat {report.weights.khat}", "Upper tail of the importance weights")
    khats = report.table["khat"].dropna()
    if khats.empty:
        return
    with _style():
        figure, ax = _new_figure(SMALL)
        ax.plot(np.arange(len(khats)), khats, "o", markersize=4, color=SERIES[0])
        ax.axhline(0.7, color=MUTED, linestyle="--", linewidth=1)
        ax.set_ylim(min(0.0, khats.min() - 0.05), max(1.0, khats.max() + 0.05))
        ax.set_xticks([])
        svg = _svg(figure, "parameters, in the order of the table", "k-hat")
    yield Panel(svg, "k-hat of every parameter", f"k-hat of {len(khats)} parameters, at most {khats.max():.2f}")


def modes(report: Report) -> Iterator[Panel]:
    """Where the modes are."""
    if report.modes is None or len(report.modes) < 2:
        raise NoPicture("There is one mode, and so there is nothing to draw.")
    with _style():
        figure, ax = _new_figure(SMALL)
        plot_modes(report.modes, ax=ax)
        svg = _svg(figure, ax.get_xlabel(), ax.get_ylabel())
    yield Panel(svg, "modes, by their mass", f"{len(report.modes)} modes in the plane of two parameters")


def drawn(draw: Callable[[Report], Iterator[Panel]], report: Report) -> list[Panel] | str:
    """The panels of a picture, or the sentence that stands in their place."""
    try:
        return list(draw(report))
    except NoPicture as nothing:
        return str(nothing)
    except ImportError:
        return "Pictures need matplotlib: pip install 'pyro-flowguides[plots]'."
    # Whatever the draws are like, the rest of the report is worth reading.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return f"This picture could not be drawn: {type(error).__name__}: {reason}"


# --- matplotlib -------------------------------------------------------------------------------------------------------


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib as mpl
    from cycler import cycler

    colors = {
        **dict.fromkeys(("text.color", "axes.labelcolor"), INK),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
    }
    options: Any = {
        **colors,
        "axes.prop_cycle": cycler(color=SERIES),
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "font.size": 9.0,
        "svg.fonttype": "none",
        "svg.hashsalt": "report",
        "svg.image_inline": True,
        "figure.dpi": 72.0,
        "figure.constrained_layout.use": False,
    }
    with mpl.rc_context(options):
        yield


def _new_figure(size: tuple[float, float]) -> tuple[Any, Any]:
    # Without pyplot, which would show it in a notebook.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    return figure, figure.subplots()


def _svg(figure: Any, xlabel: str = "", ylabel: str = "") -> str:
    """A figure of one pair of axes as an SVG element with labels, in the colors of the page.

    Labels are written as they are: names of a model may look like formulas.
    """
    from matplotlib.colors import same_color

    (ax,) = [each for each in figure.axes if each.get_visible()]
    # The same margins in every picture, so that they stand in line.
    figure.set_layout_engine(None)
    width, height = figure.get_size_inches()
    left, bottom = (0.65 if ylabel else 0.1) / width, (0.47 if xlabel else 0.3) / height
    ax.set_position((left, bottom, 1 - left - 0.1 / width, 1 - bottom - 0.08 / height))
    for axis, label in ((ax.xaxis, xlabel), (ax.yaxis, ylabel)):
        axis.set_label_text(label, fontsize=9.0, color=INK)
        axis.label.set_parse_math(False)
        axis.set_tick_params(labelsize=8.0, **_TICKS)
    ax.spines[["right", "top"]].set_visible(False)
    # Thousands of marks are smaller as a bitmap, whose colors are those of light and of dark.
    for artist in (*ax.collections, *ax.lines):
        if same_color(_color_of(artist), DRAWS_COLOR):
            artist.set_rasterized(True)
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None}, dpi=150
    )
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg ") :], flags=re.DOTALL)
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg, flags=re.DOTALL)
    # Groups are numbered anew in every picture, and a page has many.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for color, of_page in _OF_PAGE.items():
        svg = svg.replace(color, of_page)
    return svg.strip()


def _color_of(artist: Any) -> Any:
    color = artist.get_color() if hasattr(artist, "get_color") else artist.get_facecolor()[:1]
    return color if isinstance(color, str) else np.ravel(color)[:3]


def _equally_weighted(report: Report, column: np.ndarray) -> np.ndarray:
    """The draws, chosen by their weights where the estimates are weighted."""
    if not report.is_weighted or report.weights is None:
        return column
    index = report.weights.resample(len(column), True, np.random.default_rng(0))
    return column[index]


def _some(column: np.ndarray) -> np.ndarray:
    """As many finite draws as a curve needs."""
    finite = column[np.isfinite(column)]
    return finite[_evenly(len(finite), MAX_DRAWS)]


def _evenly(size: int, number: int) -> np.ndarray:
    """The indices of so many of the elements, evenly spread; of all if there are fewer."""
    return np.linspace(0, size - 1, min(size, number)).astype(int)
