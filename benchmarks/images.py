"""Flows for images: densities of handwritten digits, and the latent field of a log-Gaussian Cox process.

    python -m benchmarks.images digits cox --pines CSV --out benchmarks/results/images.json [--quick]

- ``digits``: the 1797 digits of 8 × 8 pixels that come with scikit-learn, with uniform noise that makes their 17 grey values
  continuous. Bits per dimension of held-out digits, for flows of about the same number of parameters.
- ``cox``: the positions of 126 pines in a 16 × 16 grid. Guides with image flows against vector couplings and a multivariate
  normal: the gap to log Z, which annealed importance sampling estimates.

The results are written after every fit. The part that is not named keeps the results that the file already has.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import pyro_flowguides as fg
from pyro_flowguides import flows
from pyro_flowguides import transforms as T
from pyro_flowguides.transforms import FlowTransform
from pyro_flowguides.transforms.univariate import MixtureOfLogistics

from .common import describe, environment, markdown_table, write_results

_SIDE, _NUM_LEVELS = 8, 17
_NUM_TEST = 300
_NUM_PARAMETERS = 30_000
_NUM_STEPS, _BATCH_SIZE, _LEARNING_RATE = (500, 1500), 128, 4e-3
_LOGIT = 0.05
_SEEDS = (0, 1, 2)
_COX_SIDE, _COX_STEPS, _COX_PARTICLES = 16, (250,), 64


# --- digits -----------------------------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor]:
    """The grey values from 0 to 16 of training and test digits, shape ``(N, 1, 8, 8)``."""
    grey = torch.as_tensor(load_digits().images).long().unsqueeze(1)
    grey = grey[torch.randperm(len(grey), generator=torch.Generator().manual_seed(0))]
    return grey[_NUM_TEST:], grey[:_NUM_TEST]


Recipe = Callable[[int, int], FlowTransform]
_glow_image = functools.partial(flows.glow_image, shape=(1, _SIDE, _SIDE))

# Each with the width of its networks as the second argument. Mixtures are given the other way round, from data to noise: the
# direction that training takes is then the one that needs no root.
FLOWS: dict[str, Recipe] = {
    "RealNVP, 8 couplings": lambda dim, width: flows.coupling(dim, num_layers=8, hidden_dims=(width, width)),
    "Glow of vectors, 4 steps": lambda dim, width: flows.glow(dim, num_layers=4, hidden_dims=(width, width)),
    "Flow++, 4 couplings of 4 components": lambda dim, width: (
        flows.mixture_coupling(dim, num_layers=4, num_components=4, hidden_dims=(width, width)).inv
    ),
    "Glow image, 1 level of 8 steps": lambda dim, width: _glow_image(
        dim, num_levels=1, num_steps=8, hidden_channels=width
    ),
    "Glow image, 2 levels of 4 steps": lambda dim, width: _glow_image(
        dim, num_levels=2, num_steps=4, hidden_channels=width
    ),
    "Glow image with Flow++ couplings, 1 level of 6 steps": lambda dim, width: (
        _glow_image(dim, num_levels=1, num_steps=6, hidden_channels=width, univariate=MixtureOfLogistics(4)).inv
    ),
}


def count(flow: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in flow.parameters())


def width_for(recipe: Recipe, num_parameters: int) -> int:
    """The width with which the flow has about so many parameters."""
    return min(range(4, 257), key=lambda width: abs(count(recipe(_SIDE**2, width)) - num_parameters))


def measure(recipe: Recipe, width: int, seed: int, lengths: Sequence[int]) -> tuple[dict[str, Any], Tensor]:
    """Trains a flow by maximum likelihood; its figures on the test digits and some of its samples.

    A tenth of the training digits says when to stop, and which of the lengths of the training is the better one.
    """
    train, test = digits()
    started = time.process_time()
    fits = [
        fg.fit_density(
            lambda dim: recipe(dim, width),
            train,
            num_levels=_NUM_LEVELS,
            logit=_LOGIT,
            # Pixels stay where they are. Mean and covariance are worse on the validation digits, for flows of vectors too.
            whiten="diagonal",
            batch_size=_BATCH_SIZE,
            num_steps=num_steps,
            optim=functools.partial(torch.optim.Adam, lr=_LEARNING_RATE),
            seed=seed,
            progress=False,
        )
        for num_steps in lengths
    ]
    seconds = time.process_time() - started
    fit = min(fits, key=lambda fit: fit.validation_losses.min())
    # The same noise for all flows.
    bits = fit.bits_per_dim(test, seed=0)
    figures = {
        "seed": seed,
        "bits_per_dim": bits.value,
        "se": bits.se,
        "best_step": fit.best_step,
        "length": lengths[fits.index(fit)],
        "cpu_seconds": seconds,
        "num_parameters": count(recipe(_SIDE**2, width)),
        "width": width,
    }
    return figures, fit.sample(16, seed=0)


def draw_picture(path: Path, samples: dict[str, Tensor]) -> None:
    """A row of samples for every flow, below a row of test digits."""
    import matplotlib.pyplot as plt

    rows = {"test digits": digits()[1][:16], **samples}
    _, panels = plt.subplots(len(rows), 16, figsize=(10, 0.55 * len(rows)), layout="constrained")
    for line, (name, images) in zip(panels, rows.items(), strict=True):
        line[0].set_ylabel(name.split(",")[0], rotation=0, ha="right", va="center", fontsize=8)
        for panel, image in zip(line, images, strict=True):
            panel.imshow(image.reshape(_SIDE, _SIDE).cpu(), cmap="gray_r", vmin=0, vmax=_NUM_LEVELS - 1)
            panel.set(xticks=[], yticks=[])
    plt.savefig(path, dpi=130)
    plt.close("all")


def run_digits(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows so far, after every fit."""
    rows: dict[str, list[dict]] = {}
    samples: dict[str, Tensor] = {}
    lengths = (60,) if options.quick else _NUM_STEPS
    widths = {name: width_for(recipe, _NUM_PARAMETERS) for name, recipe in FLOWS.items()}
    for seed in _SEEDS[: 1 if options.quick else None]:
        for name, recipe in FLOWS.items():
            figures, drawn = measure(recipe, widths[name], seed, lengths)
            rows.setdefault(name, []).append(figures)
            samples.setdefault(name, drawn)
            print(name, figures, flush=True)
            draw_picture(options.picture, samples)
            yield rows


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
                f"{statistics.median(run['best_step'] for run in runs):.0f}",
                f"{statistics.median(run['cpu_seconds'] for run in runs):.0f}",
            ]
        )
    se = statistics.median(run["se"] for runs in rows.values() for run in runs)
    return (
        "## Digits: bits per dimension\n\n"
        f"{_NUM_TEST} held-out digits of 8 × 8 pixels with {_NUM_LEVELS} grey values; uniform noise makes them continuous. At "
        f"most {' or '.join(map(str, _NUM_STEPS))} steps of `fit_density` on the logit of the values, in batches of "
        f"{_BATCH_SIZE}, with Adam at learning rate {_LEARNING_RATE:g}. A tenth of the training digits decides which step of "
        "which of the two is kept; the seconds are those of both. The widths are such that each flow has about "
        f"{_NUM_PARAMETERS} parameters. "
        "Means over seeds; a seed decides on weights, batches and the validation digits. The "
        f"standard error from the test digits is {se:.3f}, the same digits for all flows. A uniform guess takes "
        f"{math.log2(_NUM_LEVELS):.3f} bits.\n\n"
        + markdown_table(
            ["flow", "parameters", "bits per dimension", "each seed", "steps until the best", "CPU seconds"], table
        )
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


def log_joint(field: Tensor, counts: Tensor, tril: Tensor) -> Tensor:
    """The log-density of fields of shape ``(N, 256)``, with the counts."""
    trace = pyro.poutine.trace(pyro.condition(cox_process, {"field": field}))
    sites = trace.get_trace(counts.expand(len(field), -1), tril)
    sites.compute_log_prob()
    return sites.nodes["field"]["log_prob"] + sites.nodes["counts"]["log_prob"]


def log_evidence(guide: fg.AutoFlow, *data: Tensor, num_particles: int = 128) -> dict[str, float]:
    """log Z with its standard error, by annealed importance sampling from a guide that is a normal.

    Neal (2001), *Annealed importance sampling*. In the coordinates of the normal, each of 200 temperatures takes one step of
    Hamiltonian Monte Carlo with five leapfrog steps.
    """
    generator = torch.Generator().manual_seed(0)
    data = tuple(tensor.double() for tensor in data)
    with torch.no_grad():
        dim = guide.latent_dim
        loc = guide.flow(torch.zeros(dim)).double()
        scale = guide.flow(torch.eye(dim)).double().mT - loc.unsqueeze(-1)
    log_volume = torch.linalg.slogdet(scale).logabsdet + 0.5 * len(loc) * math.log(2 * math.pi)
    noise = functools.partial(torch.randn, num_particles, len(loc), generator=generator, dtype=loc.dtype)

    def log_ratio(z: Tensor) -> Tensor:
        return log_joint(loc + z @ scale.mT, *data) + log_volume + 0.5 * z.square().sum(-1)

    def log_density(z: Tensor, power: float) -> Tensor:
        return power * log_ratio(z) - 0.5 * z.square().sum(-1)

    def gradient(z: Tensor, power: float) -> Tensor:
        z = z.detach().requires_grad_()
        return torch.autograd.grad(log_density(z, power).sum(), z)[0]

    def hmc(z: Tensor, power: float, step: float = 0.25) -> Tensor:
        momentum = noise()
        moved, end = z, momentum + 0.5 * step * gradient(z, power)
        for index in range(5):
            moved = moved + step * end
            end = end + (step if index < 4 else 0.5 * step) * gradient(moved, power)
        log_accept = log_density(moved, power) - log_density(z, power)
        log_accept = log_accept - 0.5 * (end.square() - momentum.square()).sum(-1)
        accepted = torch.rand(num_particles, generator=generator, dtype=z.dtype).log() < log_accept
        return torch.where(accepted.unsqueeze(-1), moved, z).detach()

    z, log_weights = noise(), loc.new_zeros(num_particles)
    powers = torch.linspace(0, 1, 201).tolist()
    for before, power in zip(powers, powers[1:], strict=False):
        with torch.no_grad():
            log_weights = log_weights + (power - before) * log_ratio(z)
        z = hmc(z, power)
    weights = (log_weights - log_weights.max()).exp()
    return {
        "value": float(log_weights.max() + weights.mean().log()),
        "se": float(weights.std() / weights.mean()) / math.sqrt(num_particles),
    }


_cox_image = functools.partial(flows.glow_image, shape=(1, _COX_SIDE, _COX_SIDE), num_levels=2, num_steps=4)


def image_and_splines(dim: int) -> FlowTransform:
    """An image flow, whose networks treat all cells alike, and then a spline for each cell."""
    return T.Compose([_cox_image(dim), T.ElementwiseSpline(dim)])


GUIDES: dict[str, Callable[[], Any]] = {
    # Affine maps alone.
    "multivariate normal": lambda: fg.AutoFlow(cox_process, T.Affine),
    "couplings of vectors": lambda: fg.AutoFlow(cox_process, "coupling"),
    "spline couplings of vectors": lambda: fg.AutoFlow(cox_process, "spline_coupling"),
    "a spline of each cell": lambda: fg.AutoFlow(cox_process, T.ElementwiseSpline),
    "image flow, 2 levels": lambda: fg.AutoFlow(cox_process, _cox_image),
    "image flow, 2 levels, and a spline of each cell": lambda: fg.AutoFlow(cox_process, image_and_splines),
}


def measure_guide(make: Callable[[], Any], data: tuple[Tensor, Tensor], num_steps: int) -> tuple[dict[str, Any], Any]:
    """The figures of a guide after so many steps, and the guide."""
    started = time.process_time()
    fit = fg.fit(cox_process, make(), *data, seed=0, num_steps=num_steps, num_particles=_COX_PARTICLES, progress=False)
    seconds = time.process_time() - started
    draws = fg.draw(cox_process, fit.guide, *data, num_samples=20_000, batch_size=2000)
    figures = {
        "num_steps": num_steps,
        "elbo": draws.elbo.value,
        "se": draws.elbo.se,
        "khat": float(draws.khat.value),
        "cpu_seconds": seconds,
        "num_parameters": count(fit.guide),
    }
    return figures, fit.guide


def run_cox(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows so far, after every fit."""
    if options.pines is None:
        raise SystemExit("cox needs --pines CSV")
    data = pine_counts(options.pines), prior_tril()
    rows: dict[str, Any] = {"guides": {}}
    for num_steps in (20,) if options.quick else _COX_STEPS:
        for name, make in GUIDES.items():
            figures, guide = measure_guide(make, data, num_steps)
            rows["guides"].setdefault(name, []).append(figures)
            if name == "multivariate normal" and "log_evidence" not in rows:
                rows["log_evidence"] = log_evidence(guide, *data)
                print("log Z", rows["log_evidence"], flush=True)
            print(name, figures, flush=True)
            yield rows


def cox_to_markdown(rows: dict[str, Any]) -> str:
    log_z = rows["log_evidence"]
    table = [
        [
            name,
            str(run["num_parameters"]),
            str(run["num_steps"]),
            f"{log_z['value'] - run['elbo']:.3f} ± {run['se']:.3f}",
            f"{run['khat']:.2f}",
            f"{run['cpu_seconds']:.0f}",
        ]
        for name, runs in rows["guides"].items()
        for run in runs
    ]
    return (
        "## A log-Gaussian Cox process on a 16 × 16 grid\n\n"
        f"Pines in the unit square, a latent field of 256 cells. `fit` with {_COX_PARTICLES} particles, seed 0. The gap is log Z "
        f"− ELBO in nats, from 20,000 draws of each guide; log Z = {log_z['value']:.3f} ± {log_z['se']:.3f} by annealed "
        "importance sampling from the multivariate normal.\n\n"
        + markdown_table(["guide", "parameters", "steps", "gap", "k-hat", "CPU seconds"], table)
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
        for rows in run(options):
            results[part] = {"environment": environment("pyro-ppl", "scikit-learn"), "rows": rows}
            write_results(options.out, results, to_markdown(results))


def to_markdown(results: dict[str, Any]) -> str:
    sections = [
        section(results[part]["rows"]) + "\n\n" + describe(results[part]["environment"])
        for part, (_, section) in _PARTS.items()
        if part in results
    ]
    return "\n\n".join(["# Flows for images", *sections])


if __name__ == "__main__":
    main()
