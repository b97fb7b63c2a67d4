"""The table of the benchmark."""

from __future__ import annotations

import statistics
from typing import Any

from ..common import describe, markdown_table
from .run import MAX_MEAN_ERROR, MAX_SD_ERROR, NUM_ROUNDS, PLAIN_STEPS, STEPS_PER_ROUND

_HEADER = [
    "model",
    "ran",
    "steps/s",
    "by hand",
    "ratio",
    "fit, s",
    "verdict",
    "error of mean, sd",
    "once weighted",
    "log Z error",
    "verdict and error",
    "AutoNormal, s",
    "its errors",
    "reference",
]


def report(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown of all rows, with medians and counts in front."""
    lines = [_line(name, row) for name, row in rows.items()]
    return "\n\n".join(
        [
            "# Models as their users write them",
            "Steps of a default fit per second, captured, of the model written for one draw and of the same model with batch "
            f"dimensions carried through by hand: medians of {NUM_ROUNDS} rounds of {STEPS_PER_ROUND} steps in turn, and the "
            "median of their ratios. Then one `fit(model, AutoFlow(model), …)` with its defaults, and `AutoNormal` with "
            f"{PLAIN_STEPS} steps of Pyro's SVI (ClippedAdam, 0.01), of the model as written. Errors: the largest among all "
            "scalars, of a mean in sd, and of an sd relative to it. "
            f"The limits are {MAX_MEAN_ERROR} and {MAX_SD_ERROR:.0%}; the references are exact to about 0.015 and 1 % "
            "(HMC, NUTS), or far better (quadrature).",
            _summary(list(rows.values())),
            markdown_table(_HEADER, lines),
            _environments(rows),
        ]
    )


def _summary(rows: list[dict[str, Any]]) -> str:
    ratios = [row["speed"]["ratio"] for row in rows if "ratio" in row["speed"]]
    fits = [row["fit"] for row in rows if "error" not in row["fit"]]
    ways = [row["speed"].get("way", "failed") for row in rows]
    counted = ", ".join(f"{ways.count(way)} {way}" for way in dict.fromkeys(ways))
    agree = [fit["agreement"] for fit in fits]
    parts = [
        f"{len(rows)} models: {counted}.",
        f"Ratio of speeds: median {statistics.median(ratios):.2f}, worst {min(ratios):.2f}." if ratios else "",
        f"{len(fits)} fits; {sum(map(_within, fits))} within the limits; verdicts: "
        + ", ".join(f"{agree.count(each)} {each}" for each in dict.fromkeys(agree))
        + ".",
    ]
    return " ".join(filter(None, parts))


def _within(fit: dict[str, Any]) -> bool:
    judged = fit["weighted" if fit["verdict"] == "GOOD_ONCE_WEIGHTED" else "raw"]
    return judged["mean"] <= MAX_MEAN_ERROR and judged["sd"] <= MAX_SD_ERROR


def _line(name: str, row: dict[str, Any]) -> list[str]:
    speed, fit, plain = row["speed"], row["fit"], row["AutoNormal"]
    return [
        name,
        _failed(speed) if "error" in speed else speed["way"],
        _number(speed.get("steps_per_second"), ".0f"),
        _number(speed.get("steps_per_second_by_hand"), ".0f"),
        _number(speed.get("ratio"), ".2f"),
        *_fit(fit),
        *([_failed(plain), ""] if "error" in plain else [f"{plain['seconds']:.1f}", _errors(plain)]),
        row["reference"],
    ]


def _fit(fit: dict[str, Any]) -> list[str]:
    if "error" in fit:
        return [_failed(fit), "", "", "", "", ""]
    return [
        f"{fit['seconds']:.1f}",
        fit["verdict"].lower().replace("_", " "),
        _errors(fit["raw"]),
        _errors(fit["weighted"]),
        _number(fit.get("log_z_error"), ".3f"),
        fit["agreement"],
    ]


def _errors(found: dict[str, Any]) -> str:
    return f"{found['mean']:.3f}, {100 * found['sd']:.1f} %"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _failed(part: dict[str, Any]) -> str:
    return f"failed: {part['error'][:60]}"


def _environments(rows: dict[str, dict[str, Any]]) -> str:
    kinds: dict[str, list[str]] = {}
    for name, row in rows.items():
        kinds.setdefault(f"Commit {row['commit']}: {describe(row['environment'])}", []).append(name)
    return "\n\n".join(kinds if len(kinds) == 1 else [f"{kind} ({', '.join(names)})" for kind, names in kinds.items()])
