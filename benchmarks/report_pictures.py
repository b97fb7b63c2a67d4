"""The reports in the documentation: three fits, their reports, and pictures of these by a browser.

    python -m benchmarks.report_pictures --reports DIR [--only NAME …] [--pictures docs/images]

A fit that DIR holds already is not made again. The pictures need Chromium: ``chromium`` on the path.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.examples import EXAMPLES

WIDTH = 1000
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]


def two_groups(y: torch.Tensor) -> None:
    """A mixture of two normals whose labels are summed out."""
    weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
    center = pyro.sample("center", dist.Normal(0.0, 3.0))
    gap = pyro.sample("gap", dist.LogNormal(1.0, 0.5))
    with pyro.plate("data", len(y)):
        label = pyro.sample("label", dist.Bernoulli(weight))
        pyro.sample("y", dist.Normal(center + (label - 0.5) * gap, 0.6), obs=y)


class Case(NamedTuple):
    """A fit to report on: its model, guide and data, what is drawn beside it, and how much of the page is shown, in pixels."""

    model: Callable
    guide: Callable
    data: dict[str, Any]
    options: dict[str, Any]
    height: int


def cases() -> dict[str, Case]:
    schools, centered = EXAMPLES["eight_schools"], EXAMPLES["eight_schools_centered"]
    y = torch.tensor([-1.6, -1.1, -0.9, -0.4, -0.1, 0.2, 0.6, 1.2, 1.4, 1.8])
    return {
        "eight_schools": Case(schools.model, fg.AutoCoupling, schools.data(), _beside_nuts(schools), 1510),
        "doubtful": Case(centered.model, AutoNormal, centered.data(), _beside_nuts(centered), 1450),
        "discrete": Case(two_groups, fg.AutoCoupling, {"y": y}, {}, 1650),
    }


def _beside_nuts(example: Any) -> dict[str, Any]:
    return {"coords": example.coords, "beside": {"NUTS": example.reference()}, "reference": "NUTS"}


def fitted(case: Case, path: Path) -> fg.FitResult:
    """The fit in a file, which is made first where there is none."""
    if not path.exists():
        fg.fit(case.model, case.guide(case.model), model_kwargs=case.data, num_steps=1000, seed=0).save(path)
    return fg.FitResult.load(path, model=case.model)


def photograph(page: Path, picture: Path, height: int) -> None:
    """The upper part of a page, by Chromium."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("report_pictures: there is no Chromium on the path")
    with tempfile.TemporaryDirectory() as profile:
        options = [f"--user-data-dir={profile}", f"--window-size={WIDTH},{height}", f"--screenshot={picture.resolve()}"]
        subprocess.run([browser, *FLAGS, *options, page.resolve().as_uri()], check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(cases()), default=list(cases()))
    parser.add_argument("--pictures", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    options.reports.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        case = cases()[name]
        page = options.reports / f"{name}.html"
        fitted(case, page.with_suffix(".npz")).report(page, **case.options)
        photograph(page, options.pictures / f"report_{name}.png", case.height)


if __name__ == "__main__":
    main()
