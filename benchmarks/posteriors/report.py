"""The tables of a run: medians over the seeds, by posterior, and their median and worst over the posteriors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ..common import describe, markdown_table

Records = Sequence[dict]


@dataclass(frozen=True)
class Column:
    """A figure of a record: its title, its keys, its digits, and its part in the summary over the posteriors."""

    title: str
    path: tuple[str, ...]
    digits: int
    summarised: bool = True
    less_is_worse: bool = False

    def value(self, record: dict) -> float | None:
        """The figure, or None where the record does not have it."""
        for key in self.path:
            record = record.get(key, {})
        return record if isinstance(record, (int, float)) else None

    def cell(self, value: float | None) -> str:
        if value is None or math.isnan(value):
            return "–"
        return f"{value:.{self.digits}f}" if abs(value) < 1e4 else f"{value:.1e}"

    def worst(self, values: Sequence[float]) -> float:
        return min(values) if self.less_is_worse else max(values)


def _distance(title: str, name: str) -> list[Column]:
    """The columns of a distance: for the draws, for the weighted draws, and for a perfect guide."""
    return [
        Column(title, ("raw", name), 3),
        Column("PSIS", ("psis", name), 3),
        Column("floor", ("floor", name), 3, summarised=False),
    ]


COLUMNS = [
    *_distance("mean error", "mean_error"),
    *_distance("sd error", "sd_error"),
    *_distance("W₁", "wasserstein"),
    Column("ELBO", ("elbo",), 3, summarised=False),
    Column("± se", ("elbo_se",), 4, summarised=False),
    Column("gap", ("gap",), 4),
    Column("k-hat", ("khat",), 2),
    Column("± se", ("khat_se",), 2, summarised=False),
    Column("ESS/N", ("ess_fraction",), 4, less_is_worse=True),
    Column("s", ("seconds",), 1),
    Column("whitening s", ("whitening_seconds",), 1),
    Column("steps", ("steps",), 0),
]
NOTE = (
    "Each figure is the median over the seeds. Mean error: the largest |mean − mean_ref| / sd_ref among the scalars of a "
    "posterior; sd error: the largest |sd / sd_ref − 1|; W₁: the 1-Wasserstein distance of the marginals over sd_ref, averaged "
    "over the scalars (K_m and V_m on the log scale); PSIS: the same for the draws with their smoothed importance weights; "
    "floor: the score of draws from the reference itself, which is its Monte-Carlo error. Gap: log Z − ELBO, in nats, where "
    "log Z is known. Seconds: the whole fit, with whitening and the final draws; whitening: whitening alone, measured "
    "separately."
)


def report(records: Records) -> str:
    """Markdown: a summary, a table for every guide, the failures, and the machines.

    Raises:
        ValueError: if there is no record.
    """
    if not records:
        raise ValueError("report: there are no results yet; run the benchmark first")
    configurations = list(dict.fromkeys(_configuration(record) for record in records))
    parts = ["# Posteriors: the distance of fitted guides", NOTE, _summary(records, configurations)]
    if len(configurations) > 1:
        parts += ["## Gap", _gaps(records, configurations)]
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
    """A row for each guide: median / worst over the posteriors."""
    columns = [column for column in COLUMNS if column.summarised]
    rows = []
    for configuration in configurations:
        chosen = [record for record in records if _configuration(record) == configuration]
        fitted = [record for record in chosen if "error" not in record]
        good = sum(record["verdict"].startswith(("good", "exact")) for record in fitted)
        counts = [str(len(_by_posterior(chosen))), str(len(chosen) - len(fitted)), f"{good} of {len(fitted)}"]
        rows.append([configuration, *counts, *(_median_and_worst(column, fitted) for column in columns)])
    return markdown_table(["guide", "posteriors", "failed", "good", *(column.title for column in columns)], rows)


def _gaps(records: Records, configurations: Sequence[str]) -> str:
    """A row for each posterior whose evidence is known, a column for each guide."""
    gap = next(column for column in COLUMNS if column.title == "gap")
    by_posterior = _by_posterior([record for record in records if "gap" in record])
    rows = [
        [
            name,
            *(
                gap.cell(_median(gap, [record for record in some if _configuration(record) == configuration]))
                for configuration in configurations
            ),
        ]
        for name, some in by_posterior.items()
    ]
    return markdown_table(["posterior", *configurations], rows)


def _median_and_worst(column: Column, records: Records) -> str:
    medians = [_median(column, some) for some in _by_posterior(records).values()]
    present = [value for value in medians if value is not None]
    return f"{column.cell(median(present))} / {column.cell(column.worst(present))}" if present else "–"


def _table(records: Records) -> str:
    """A row for each posterior: the medians over the seeds."""
    by_posterior = _by_posterior([record for record in records if "error" not in record])
    rows = [[name, *(column.cell(_median(column, some)) for column in COLUMNS)] for name, some in by_posterior.items()]
    return markdown_table(["posterior", *(column.title for column in COLUMNS)], rows)


def _by_posterior(records: Records) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(record["posterior"], []).append(record)
    return groups


def _median(column: Column, records: Records) -> float | None:
    present = [value for value in map(column.value, records) if value is not None]
    return median(present) if present else None


def _configuration(record: dict) -> str:
    options = {"steps": record["num_steps"], "particles": record["num_particles"]}
    return ", ".join([record["guide"], *(f"{value} {unit}" for unit, value in options.items() if value is not None)])


def _fit_name(record: dict) -> str:
    return f"{record['posterior']}, {_configuration(record)}, seed {record['seed']}"
