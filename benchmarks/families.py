"""Guides of every family with their defaults on four densities in the plane, as a picture and a table."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide import AutoMultivariateNormal

import pyro_flowguides as fg

from .common import describe, environment, markdown_table, write_results
from .posteriors.targets import ENERGIES, planar_posterior

FAMILIES: dict[str, Callable[[Callable], Any]] = {
    "multivariate normal": AutoMultivariateNormal,
    "radial": fg.AutoRadial,
    "planar": fg.AutoPlanar,
    "Sylvester": fg.AutoSylvester,
    "residual": fg.AutoResidual,
    "coupling": fg.AutoCoupling,
    "IAF": fg.AutoIAF,
    "spline": fg.AutoSpline,
    "mixture coupling": functools.partial(fg.AutoFlow, flow="mixture_coupling"),
    "continuous planar": fg.AutoContinuousFlow,
}
NUM_DRAWS = 200_000
# One round for every family, so that nothing but the family differs.
NUM_STEPS = 3000


def fit_and_draw(target: Any, guide_class: Callable, num_steps: int) -> tuple[np.ndarray, dict[str, float]]:
    """Draws of a fitted guide, and its divergence KL(q, p) = log Z − ELBO in nats."""
    guide = guide_class(target.model)
    fit = fg.fit(target.model, guide, *target.args, seed=0, num_steps=num_steps, progress=False)
    draws = fg.draw(target.model, fit.guide, *target.args, num_samples=NUM_DRAWS, batch_size=NUM_DRAWS)
    gap = target.log_evidence - draws.elbo.value
    scores = {"divergence": gap, "se": draws.elbo.se, "seconds": fit.wall_time}
    return draws.values["z"].cpu().numpy(), scores


def draw_picture(path: Path, points: dict[str, dict[str, np.ndarray]], scores: dict[str, dict[str, dict]]) -> None:
    """Histograms: a row per family and a column per density."""
    import matplotlib.pyplot as plt

    columns = list(ENERGIES)
    _, panels = plt.subplots(len(points), len(columns), figsize=(6.4, 1.5 * len(points)), layout="constrained")
    for row, (family, by_target) in zip(panels, points.items(), strict=True):
        row[0].set_ylabel(family)
        for panel, name in zip(row, columns, strict=True):
            density, *_ = np.histogram2d(*by_target[name].T, bins=80, range=[[-4, 4], [-4, 4]])
            panel.imshow(density.T, origin="lower", extent=(-4, 4, -4, 4), interpolation="bilinear")
            panel.set(xticks=[], yticks=[])
            if family in scores:
                divergence = scores[family][name]["divergence"]
                panel.text(-3.8, -3.7, f"{divergence:.2f} nat", color="white", fontsize="small")
    for panel, name in zip(panels[0], columns, strict=True):
        panel.set_title(name)
    plt.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/families.json")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/families.png"))
    parser.add_argument("--quick", action="store_true", help="50 steps for each fit")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    targets = {name: planar_posterior(name) for name in ENERGIES}
    points = {"the density": {name: target.reference.draws for name, target in targets.items()}}
    scores: dict[str, dict[str, dict]] = {}
    for family, guide_class in FAMILIES.items():
        points[family], scores[family] = {}, {}
        for name, target in targets.items():
            result = fit_and_draw(target, guide_class, 50 if arguments.quick else NUM_STEPS)
            points[family][name], scores[family][name] = result
            print(family, name, scores[family][name], flush=True)
    draw_picture(arguments.picture, points, scores)

    machine = environment("pyro-ppl")
    rows = [
        [family, *(f"{by_target[name]['divergence']:.3f} ± {by_target[name]['se']:.3f}" for name in ENERGIES)]
        for family, by_target in scores.items()
    ]
    text = (
        "# Families: which shapes each can make\n\n"
        "KL(q, p) in nats with its standard error, of guides with their default options after 3000 steps of `fit`, seed 0, "
        "on the densities U1 to U4 of Rezende & Mohamed (2015), arXiv:1505.05770, table 1, within [−4, 4]². Quadrature gives "
        f"log Z. {describe(machine)}\n\n"
    )
    write_results(
        arguments.out, {"environment": machine, "scores": scores}, text + markdown_table(["guide", *ENERGIES], rows)
    )


if __name__ == "__main__":
    main()
