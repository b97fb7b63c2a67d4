"""The tables of a run: medians over the seeds, by posterior, and their median and worst over the posteriors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

from ..common import describe, markdown_table

Records = Sequence[dict]

# Column, its value in a record, and its digits.
COLUMNS: dict[str, tuple[Callable[[dict], float | None], int]] = {
    "mean error": (lambda record: _nested(record, "raw", "mean_error"), 3),
    "PSIS": (lambda record: _nested(record, "psis", "mean_error"), 3),
    "floor": (lambda record: _nested(record, "floor", "mean_error"), 3),
    "sd error": (lambda record: _nested(record, "raw", "sd_error"), 3),
    "PSIS ": (lambda record: _nested(record, "psis", "sd_error"), 3),
    "floor ": (lambda record: _nested(record, "floor", "sd_error"), 3),
    "W₁": (lambda record: _nested(record, "raw", "wasserstein"), 3),
    "floor  ": (lambda record: _nested(record, "floor", "wasserstein"), 3),
    "ELBO": (lambda record: record.get("elbo"), 3),
    "± se": (lambda record: record.get("elbo_se"), 4),
    "gap": (lambda record: record.get("gap"), 4),
    "k-hat": (lambda record: record.get("khat"), 2),
    "± se ": (lambda record: record.get("khat_se"), 2),
    "ESS/N": (lambda record: record.get("ess_fraction"), 4),
    "s": (lambda record: record.get("seconds"), 1),
    "whitening s": (lambda record: record.get("whitening_seconds"), 1),
    "steps": (lambda record: record.get("steps"), 0),
}
# Where less is worse, and what cannot be compared between posteriors.
_LESS_IS_WORSE, _NOT_COMPARABLE = {"ESS/N"}, {"ELBO"}
NOTE = (
    "Each figure is the median over the seeds. Mean error: the largest |mean − mean_ref| / sd_ref among the scalars of a "
    "posterior; sd error: the largest |sd / sd_ref − 1|; W₁: the 1-Wasserstein distance of the marginals over sd_ref, averaged "
    "over the scalars (K_m and V_m on the log scale); PSIS: the same for the draws with their smoothed importance weights; "
    "floor: what draws of the reference itself would score by the Monte-Carlo error of the reference. Gap: log Z − ELBO, in "
    "nats, where log Z is known. Seconds: all of the fit, whitening and its final draws included; whitening: its part, "
    "measured apart."
)


def report(records: Records) -> str:
    """Markdown: a summary, a table for every guide, the failures, and the machines.

    Raises:
        ValueError: if there is no record.
    """
    if not records:
        raise ValueError("report: there are no results yet; run the benchmark first")
    configurations = list(dict.fromkeys(_configuration(record) for record in records))
    parts = ["# Posteriors: how close the guides come", NOTE, _summary(records, configurations)]
    for configuration in configurations:
        chosen = [record for record in records if _configuration(record) == configuration]
        parts += [f"## {configuration}", _table(chosen)]
    failures = [record for record in records if "error" in record]
    if failures:
        lines = [f"- {_fit_name(record)}: {record['error']}" for record in failures]
        parts += ["## Fits that failed", "\n".join(lines)]
    descriptions = dict.fromkeys(describe(record["environment"]) for record in records)
    return "\n\n".join([*parts, "\n\n".join(descriptions)])


def _summary(records: Records, configurations: Sequence[str]) -> str:
    """One row for each guide: median / worst over the posteriors."""
    columns = [column for column in COLUMNS if column not in _NOT_COMPARABLE and not column.startswith(("±", "floor"))]
    header = ["guide", "posteriors", "failed", "good", *(column.strip() for column in columns)]
    rows = []
    for configuration in configurations:
        chosen = [record for record in records if _configuration(record) == configuration]
        fitted = [record for record in chosen if "error" not in record]
        good = [record for record in fitted if record["verdict"].startswith(("good", "exact"))]
        medians = _medians(fitted)
        cells = [_median_and_worst(column, [row[column] for row in medians.values()]) for column in columns]
        counts = [len({record["posterior"] for record in chosen}), len(chosen) - len(fitted)]
        rows.append([configuration, *map(str, counts), f"{len(good)} of {len(fitted)}", *cells])
    return markdown_table(header, rows)


def _table(records: Records) -> str:
    medians = _medians([record for record in records if "error" not in record])
    rows = [
        [name, *(_cell(row[column], digits) for column, (_, digits) in COLUMNS.items())]
        for name, row in medians.items()
    ]
    return markdown_table(["posterior", *(column.strip() for column in COLUMNS)], rows)


def _medians(records: Records) -> dict[str, dict[str, float | None]]:
    """By posterior and column, the median over the seeds that have the figure."""
    names = dict.fromkeys(record["posterior"] for record in records)
    return {
        name: {
            column: _median([value(record) for record in records if record["posterior"] == name])
            for column, (value, _) in COLUMNS.items()
        }
        for name in names
    }


def _median_and_worst(column: str, values: Sequence[float | None]) -> str:
    present = [value for value in values if value is not None]
    if not present:
        return "–"
    worst = min(present) if column in _LESS_IS_WORSE else max(present)
    digits = COLUMNS[column][1]
    return f"{_cell(median(present), digits)} / {_cell(worst, digits)}"


def _median(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return median(present) if present else None


def _cell(value: float | None, digits: int) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.1e}"


def _nested(record: dict, group: str, name: str) -> float | None:
    return record[group][name] if group in record else None


def _configuration(record: dict) -> str:
    options = [f"{value} {unit}" for unit, value in _options(record).items() if value is not None]
    return ", ".join([record["guide"], *options])


def _options(record: dict) -> dict[str, int | None]:
    return {"steps": record["num_steps"], "particles": record["num_particles"]}


def _fit_name(record: dict) -> str:
    return f"{record['posterior']}, {_configuration(record)}, seed {record['seed']}"
