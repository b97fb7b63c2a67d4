"""Flows for images: densities of handwritten digits, and the latent field of a log-Gaussian Cox process.

    python -m benchmarks.images digits cox --pines CSV --out benchmarks/results/images.json [--quick]

- ``digits``: the 1797 digits of 8 × 8 pixels that come with scikit-learn, with uniform noise that makes their 17 grey values
  continuous. Bits per dimension of held-out digits, for flows of about the same number of parameters.
- ``cox``: the positions of 126 pines in a 16 × 16 grid, a guide of vector couplings against a guide that is an image flow.

The part that is not named keeps the results that the file already has.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import pyro_flowguides as fg
from pyro_flowguides import flows
from pyro_flowguides.transforms import FlowTransform

from .common import describe, environment, markdown_table, write_results

_SIDE, _NUM_LEVELS = 8, 17
_NUM_TEST = 300
_NUM_PARAMETERS = 100_000
_NUM_STEPS, _BATCH_SIZE, _LEARNING_RATE = 3000, 256, 2e-3
_SEEDS = (0, 1, 2)
_COX_SIDE, _COX_STEPS, _COX_PARTICLES = 16, 2000, 64


# --- digits -----------------------------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    """The grey values from 0 to 16 of training and test digits, shape ``(N, 1, 8, 8)``."""
    grey = torch.as_tensor(load_digits().images).long().unsqueeze(1)
    grey = grey[torch.randperm(len(grey), generator=torch.Generator().manual_seed(0))]
    return grey[_NUM_TEST:], grey[:_NUM_TEST]


Recipe = Callable[[int, int], FlowTransform]

# Each with the width of its networks as the second argument.
FLOWS: dict[str, Recipe] = {
    "RealNVP, 8 couplings": lambda dim, width: flows.coupling(dim, num_layers=8, hidden_dims=(width, width)),
    "Glow of vectors, 8 steps": lambda dim, width: flows.glow(dim, num_layers=8, hidden_dims=(width, width)),
    "Flow++ couplings, 8": lambda dim, width: flows.mixture_coupling(dim, num_layers=8, hidden_dims=(width, width)),
    "Glow image, 1 level": lambda dim, width: flows.glow_image(
        dim, shape=(1, _SIDE, _SIDE), num_levels=1, num_steps=8, hidden_channels=width
    ),
    "Glow image, 2 levels": lambda dim, width: flows.glow_image(
        dim, shape=(1, _SIDE, _SIDE), num_levels=2, num_steps=4, hidden_channels=width
    ),
    "RealNVP image": lambda dim, width: flows.realnvp_image(
        dim, shape=(1, _SIDE, _SIDE), num_levels=2, hidden_channels=width
    ),
}


def count(flow: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in flow.parameters())


def width_for(recipe: Recipe, num_parameters: int) -> int:
    """The width with which the flow has about so many parameters."""
    return min(range(4, 257, 2), key=lambda width: abs(count(recipe(_SIDE**2, width)) - num_parameters))


def measure(recipe: Recipe, width: int, seed: int, num_steps: int) -> tuple[dict[str, Any], Tensor]:
    """Trains one flow by maximum likelihood; its figures on the test digits and some of its samples."""
    train, test = digits()
    # The map from data to noise is the direction that training takes.
    fit = fg.fit_density(
        lambda dim: recipe(dim, width).inv,
        train,
        num_levels=_NUM_LEVELS,
        batch_size=_BATCH_SIZE,
        num_steps=num_steps,
        optim=functools.partial(torch.optim.Adam, lr=_LEARNING_RATE),
        seed=seed,
        progress=False,
    )
    bits = fit.bits_per_dim(test)
    figures = {
        "bits_per_dim": bits.value,
        "se": bits.se,
        "best_step": fit.best_step,
        "seconds": fit.wall_time,
        "num_parameters": count(recipe(_SIDE**2, width)),
        "width": width,
    }
    return figures, fit.sample(16)


def draw_picture(path: Path, samples: dict[str, Tensor]) -> None:
    """A row of samples for every flow, below a row of test digits."""
    import matplotlib.pyplot as plt

    rows = {"test digits": digits()[1][:16], **samples}
    _, panels = plt.subplots(len(rows), 16, figsize=(8, 0.62 * len(rows)), layout="constrained")
    for line, (name, images) in zip(panels, rows.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
        for panel, image in zip(line, images, strict=True):
            panel.imshow(image.reshape(_SIDE, _SIDE).cpu(), cmap="gray_r", vmin=0, vmax=_NUM_LEVELS - 1)
            panel.set(xticks=[], yticks=[])
    plt.savefig(path, dpi=130)


def run_digits(options: argparse.Namespace) -> dict[str, Any]:
    rows: dict[str, list[dict]] = {}
    samples: dict[str, Tensor] = {}
    num_steps = 60 if options.quick else _NUM_STEPS
    widths = {name: width_for(recipe, _NUM_PARAMETERS) for name, recipe in FLOWS.items()}
    for seed in _SEEDS[: 1 if options.quick else None]:
        for name, recipe in FLOWS.items():
            figures, drawn = measure(recipe, widths[name], seed, num_steps)
            rows.setdefault(name, []).append(figures)
            samples.setdefault(name, drawn)
            print(name, seed, figures, flush=True)
    draw_picture(options.picture, samples)
    return rows


def digits_to_markdown(rows: dict[str, Any]) -> str:
    table = []
    for name, runs in rows.items():
        values = [run["bits_per_dim"] for run in runs]
        table.append(
            [
                name,
                str(runs[0]["num_parameters"]),
                f"{statistics.mean(values):.3f}",
                ", ".join(f"{value:.3f}" for value in values),
                f"{statistics.median(run['seconds'] for run in runs):.0f}",
            ]
        )
    return (
        "## Digits: bits per dimension\n\n"
        f"{_NUM_TEST} held-out digits of 8 × 8 pixels with {_NUM_LEVELS} grey values; uniform noise makes them continuous. At "
        f"most {_NUM_STEPS} steps of `fit_density` in batches of {_BATCH_SIZE}; those with the best validation likelihood "
        f"are kept. Widths are such that each flow has about {_NUM_PARAMETERS} parameters. A uniform guess takes "
        f"{math.log2(_NUM_LEVELS):.3f} bits.\n\n"
        + markdown_table(["flow", "parameters", "bits per dimension", "each seed", "seconds"], table)
    )


# --- Cox process ------------------------------------------------------------------------------------------------------


def pine_counts(path: Path) -> Tensor:
    """The number of pines in each cell of a 16 × 16 grid on the unit square."""
    lines = path.read_text().strip().splitlines()[1:]
    points = torch.tensor([[float(cell) for cell in line.split(",")[1:]] for line in lines])
    cells = (points * _COX_SIDE).long().clamp(max=_COX_SIDE - 1)
    return torch.bincount(cells[:, 0] * _COX_SIDE + cells[:, 1], minlength=_COX_SIDE**2).float()


def prior_tril() -> Tensor:
    """The Cholesky factor of the prior of the field: variance 1.91, correlation exp(−33 r) at distance r."""
    axis = torch.arange(_COX_SIDE, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    covariance = 1.91 * (-torch.cdist(grid, grid) / (_COX_SIDE / 33)).exp()
    return torch.linalg.cholesky(covariance).float()


def cox_process(counts: Tensor, tril: Tensor) -> None:
    """A Gaussian field that is the logarithm of an intensity, and the counts in its cells."""
    area = 1 / counts.shape[-1]
    loc = counts.new_full(counts.shape[-1:], math.log(126) - 1.91 / 2)
    field = pyro.sample("field", dist.MultivariateNormal(loc, scale_tril=tril))
    pyro.sample("counts", dist.Poisson(area * field.exp()).to_event(1), obs=counts)


def run_cox(options: argparse.Namespace) -> dict[str, Any]:
    if options.pines is None:
        raise SystemExit("cox needs --pines CSV")
    data = pine_counts(options.pines), prior_tril()
    shape = (1, _COX_SIDE, _COX_SIDE)
    recipes = {
        "vector couplings": "coupling",
        "image flow, 2 levels": functools.partial(flows.glow_image, shape=shape, num_levels=2, num_steps=4),
    }
    rows: dict[str, Any] = {}
    for name, recipe in recipes.items():
        guide = fg.AutoFlow(cox_process, recipe)
        fit = fg.fit(
            cox_process,
            guide,
            *data,
            seed=0,
            num_steps=20 if options.quick else _COX_STEPS,
            num_particles=_COX_PARTICLES,
            progress=False,
        )
        draws = fg.draw(cox_process, fit.guide, *data, num_samples=20_000, batch_size=2000)
        rows[name] = {
            "elbo": draws.elbo.value,
            "se": draws.elbo.se,
            "khat": float(fit.khat.value),
            "seconds": fit.wall_time,
            "num_parameters": count(fit.guide),
        }
        print(name, rows[name], flush=True)
    return rows


def cox_to_markdown(rows: dict[str, Any]) -> str:
    table = [
        [name, f"{r['elbo']:.3f} ± {r['se']:.3f}", f"{r['khat']:.2f}", f"{r['seconds']:.0f}", str(r["num_parameters"])]
        for name, r in rows.items()
    ]
    return (
        "## A log-Gaussian Cox process on a 16 × 16 grid\n\n"
        f"Pines in the unit square, a latent field of 256 cells. {_COX_STEPS} steps of `fit` with {_COX_PARTICLES} particles, "
        "seed 0; ELBO in nats, higher is better.\n\n"
        + markdown_table(["guide", "ELBO", "k-hat", "seconds", "parameters"], table)
    )


_PARTS = {"digits": (run_digits, digits_to_markdown), "cox": (run_cox, cox_to_markdown)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="+", choices=_PARTS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/images.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/digits.png"))
    parser.add_argument("--pines", type=Path, help="the CSV file of the pines")
    parser.add_argument("--quick", action="store_true", help="a few steps of each fit")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for part in options.parts:
        run, _ = _PARTS[part]
        rows = run(options)
        results[part] = {"environment": environment("pyro-ppl", "scikit-learn"), "rows": rows}
    sections = [
        to_markdown(results[part]["rows"]) + "\n\n" + describe(results[part]["environment"])
        for part, (_, to_markdown) in _PARTS.items()
        if part in results
    ]
    write_results(options.out, results, "\n\n".join(["# Flows for images", *sections]))


if __name__ == "__main__":
    main()
