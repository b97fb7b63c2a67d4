"""A report as one HTML file, and as a fragment for notebooks. Whatever comes from a model is escaped; nothing needs a script."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import pandas as pd

from ..checks import version
from ..diagnostics.verdicts import MAX_MEAN_ERROR, MAX_SD_ERROR, NEGLIGIBLE_MASS, Verdict, VerdictKind
from . import pictures
from .content import MAX_ROWS, Report
from .style import STYLE

_HEADLINES = {
    VerdictKind.EXACT: ("good", "Exact. Use the draws as they are."),
    VerdictKind.GOOD: ("good", "Good. Use the draws as they are."),
    VerdictKind.GOOD_ONCE_WEIGHTED: ("warn", "Good once weighted. Weigh or resample the draws before you use them."),
    VerdictKind.DOUBTFUL: ("bad", "Doubtful. Do not rely on these draws yet."),
    VerdictKind.UNKNOWN: ("unknown", "Unknown. Nothing says how good these draws are."),
}
# What is drawn, and a sentence on how to read it.
_PICTURES = (
    (
        "Pairs",
        "Every dot is a draw. These are the pairs of parameters that are correlated most. A bent or funnel-shaped cloud is hard "
        "for a simple guide.",
        pictures.pairs,
    ),
    (
        "Does the model make data like yours?",
        "The bold line is your data, and each blue line is a set of data that the fitted model has made. A line gives the "
        "fraction of the data below a value. Yours should look like one of them.",
        pictures.predictive,
    ),
    (
        "Training",
        "The ELBO should have stopped rising. The bold curve is the average of the pale one.",
        pictures.training,
    ),
    (
        "Weights",
        "The first picture shows how many draws have a weight above a value: the faster it falls the better. The second shows "
        "k-hat for the mean of every parameter: below the dashed line at 0.7, weighted estimates are reliable.",
        pictures.weights,
    ),
)
_LOST = ("bad", "Doubtful. A mode of the posterior is missing in these draws.")
_TITLES = {
    "mean": "mean",
    "sd": "sd",
    "khat": "k-hat",
    "mean_error": "error of mean",
    "sd_error": "error of sd",
}
_ERROR_LIMITS = {"mean_error": MAX_MEAN_ERROR, "sd_error": MAX_SD_ERROR}
# In a notebook, a fit is one cell among many.
NUM_ROWS_IN_NOTEBOOK, NUM_PICTURES_IN_NOTEBOOK = 10, 3


def page(report: Report) -> str:
    """The whole HTML file."""
    title = f"{report.model or 'Posterior'}{' by ' if report.guide else ''}{report.guide}"
    guide = f" <span>by {escape(report.guide)}</span>" if report.guide else ""
    sections = "".join(
        [
            f"<h1>{escape(report.model or 'Posterior')}{guide}</h1>",
            verdict_box(report),
            _estimates(report),
            _marginals(report),
            *(_pictures(title, how, pictures.drawn(draw, report)) for title, how, draw in _PICTURES),
            _modes(report),
            _how_it_was_made(report),
        ]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>body {{ margin: 0; }}{STYLE}</style>\n</head>\n"
        f'<body class="fg-report">\n<main>\n{sections}\n</main>\n</body>\n</html>\n'
    )


def fragment(report: Report) -> str:
    """A small part of the report for a notebook: verdict, the head of the table, a picture."""
    shown = report.table.head(NUM_ROWS_IN_NOTEBOOK)
    more = len(report.all_columns) - len(shown)
    rest = f'<p class="how">{more:,} more in <code>fit.summary()</code>.</p>' if more > 0 else ""
    panels = pictures.drawn(lambda each: pictures.marginals(each, NUM_PICTURES_IN_NOTEBOOK), report)
    picture = "" if isinstance(panels, str) else _grid(panels)
    return f'<div class="fg-report"><style>{STYLE}</style>{verdict_box(report)}{table_of(shown)}{rest}{picture}</div>'


def escape(text: object) -> str:
    """A text of the user or of a model for HTML."""
    return html.escape(str(text))


def headline(verdict: Verdict) -> tuple[str, str]:
    """The tone of a verdict and its sentence."""
    return _LOST if verdict.lost_mass > NEGLIGIBLE_MASS else _HEADLINES[verdict.kind]


def verdict_box(report: Report) -> str:
    """The verdict with what it rests on."""
    verdict, draws = report.verdict, report.draws
    tone, sentence = headline(verdict)
    text = str(verdict)
    # The headline says what stands before the colon. What stands behind the reason is known of other modes, and what to do.
    findings, _, rest = text.partition(": ")[2].partition(f"{verdict.reason}.")
    findings += f"{verdict.reason}."
    sentences = [findings[:1].upper() + findings[1:], rest.strip()]
    if verdict.kind is not VerdictKind.UNKNOWN:
        sentences.append(verdict.khat_meaning)
    figures = {
        "ELBO": "" if math.isnan(draws.elbo.value) else str(draws.elbo),
        "k-hat": "" if math.isnan(draws.khat.value) else str(draws.khat),
        "effective draws": ""
        if math.isnan(verdict.ess_fraction)
        else f"{verdict.ess_fraction * len(draws):,.0f} of {len(draws):,}",
    }
    shown = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in figures.items() if value)
    rests = "".join(f"<p>{escape(each)}</p>" for each in sentences if each)
    return (
        f'<div class="fg-verdict {tone}"><strong>{escape(sentence)}</strong>{rests}'
        + (f'<dl class="fg-figures">{shown}</dl>' if shown else "")
        + "</div>"
    )


# --- parts ----------------------------------------------------------------------------------------------------------------


def _estimates(report: Report) -> str:
    sentences = ["Mean, standard deviation and quantiles of every parameter."]
    if len(report.all_columns) > MAX_ROWS:
        which = "with the largest expected errors" if report.weights else "that come first"
        sentences = [f"The {MAX_ROWS} of {len(report.all_columns):,} parameters {which}."]
    if report.is_weighted:
        sentences.append("All of it is of the weighted draws.")
    if report.weights is not None:
        sentences.append(
            "The last columns say by how much mean and sd are expected to be off, in posterior sds and relative. What is too "
            "much is red."
        )
    if report.non_finite:
        names = ", ".join(report.non_finite[:5]) + (" and more" if len(report.non_finite) > 5 else "")
        sentences.append(f"Some draws of {names} are not finite, and there are no pictures of them.")
    return _section("Estimates", " ".join(sentences), table_of(report.table))


def table_of(table: pd.DataFrame) -> str:
    """A summary as an HTML table in a box of its own that scrolls."""
    head = "".join(f"<th>{escape(_TITLES.get(name, name))}</th>" for name in table.columns)
    rows = "".join(
        f"<tr><th>{escape(label)}</th>{''.join(_cell(name, row[name], row['sd']) for name in table.columns)}</tr>"
        for label, row in table.iterrows()
    )
    return _scrolling(f"<thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody>")


def _cell(column: str, value: float, sd: float) -> str:
    if not math.isfinite(value):
        return "<td>–</td>"
    if column == "khat":
        return f"<td>{value:.2f}</td>"
    if column in _ERROR_LIMITS:
        text = f"{max(value, 0.01):.2f} sd" if column == "mean_error" else f"{max(value, 0.01):.0%}"
        return f'<td class="off">{text}</td>' if value > _ERROR_LIMITS[column] else f"<td>{text}</td>"
    return f"<td>{number(value, sd)}</td>"


def number(value: float, sd: float) -> str:
    """A number with as many digits as its standard deviation makes worth reading."""
    size = sd if math.isfinite(sd) and sd > 0 else abs(value)
    decimals = 2 if size == 0 else 2 - math.floor(math.log10(size))
    return f"{value:.3g}" if decimals > 6 or abs(value) >= 1e7 else f"{value:,.{max(0, decimals)}f}"


def _marginals(report: Report) -> str:
    how = "The higher a curve, the more probable the value."
    if report.reference:
        how += f" The area is {report.reference}; a curve should lie on its edge."
    if len(report.finite_columns) > pictures.MAX_MARGINALS:
        how += f" These are {pictures.MAX_MARGINALS} of them; the table has more."
    legend = ""
    if report.beside:
        marks = "".join(
            f'<span style="--mark: {color}">{escape(name)}</span>'
            for name, color in pictures.legend_of_marginals(report)
        )
        legend = f'<div class="fg-legend">{marks}</div>'
    return _pictures("Marginals", how, pictures.drawn(pictures.marginals, report), before=legend)


def _modes(report: Report) -> str:
    if report.modes is None:
        not_searched = "" if report.verdict.unseen != Verdict.unseen else "Modes were not looked for. "
        return _section("Modes", not_searched + report.verdict.unseen)
    if len(report.modes) < 2:
        return _section("Modes", report.verdict.unseen)
    table = report.modes.to_dataframe()
    shown = [["where", "mass", "drawn", "starts", "remark"]]
    for _, row in table.iterrows():
        drawn = row.get("drawn", math.nan)
        shown.append(
            [
                str(row["where"]),
                f"{row['mass']:.0%} ± {row['mass_se']:.0%}",
                "–" if math.isnan(drawn) else f"{drawn:.0%}",
                str(row["starts"]),
                str(row["remark"]),
            ]
        )
    head = "".join(f"<th{' class=text' if name in ('where', 'remark') else ''}>{name}</th>" for name in shown[0])
    rows = "".join(
        "<tr>"
        + "".join(f"<td{' class=text' if i in (0, 4) else ''}>{escape(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in shown[1:]
    )
    text = str(report.modes)
    how = f"{text[:1].upper()}{text[1:]} Mass is the part of the posterior that belongs to a mode, drawn the part of the draws."
    body = _scrolling(f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>")
    panels = pictures.drawn(pictures.modes, report)
    return _section("Modes", how, body + (_none(panels) if isinstance(panels, str) else _grid(panels)))


def _how_it_was_made(report: Report) -> str:
    versions = "".join(_fact(name, text) for name, text in report.versions.items())
    facts = "".join(_fact(name, text) for name, text in report.facts.items())
    again = (
        f"<pre>{escape(report.again)}</pre>"
        if report.again
        else '<p class="none">The call that made this fit is not on record.</p>'
    )
    return (
        _section("How it was run", "", f'<dl class="facts">{facts}</dl>')
        + _section("How to make it again", "", again)
        + _section("Versions", "", f'<dl class="facts">{versions}</dl>')
        + f'<p class="how">Made by pyro_flowguides {escape(version())}.</p>'
    )


def _fact(name: str, text: str) -> str:
    return f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>"


def _pictures(title: str, how: str, panels: Sequence[pictures.Panel] | str, *, before: str = "") -> str:
    if isinstance(panels, str):
        return _section(title, "", _none(panels))
    return _section(title, how, before + _grid(panels))


def _grid(panels: Sequence[pictures.Panel]) -> str:
    figures = "".join(
        f"<figure{' class=wide' if each.is_wide else ''}><figcaption>{escape(each.caption)}</figcaption>{each.html}</figure>"
        for each in panels
    )
    return f'<div class="fg-grid">{figures}</div>'


def _none(sentence: str) -> str:
    return f'<p class="none">{escape(sentence)}</p>'


def _section(title: str, how: str, body: str = "") -> str:
    sentence = f'<p class="how">{escape(how)}</p>' if how else ""
    return f"<section><h2>{escape(title)}</h2>{sentence}{body}</section>\n"


def _scrolling(content: str) -> str:
    return f'<div class="fg-scroll" tabindex="0"><table>{content}</table></div>'
