"""Maximum-likelihood density estimation in two dimensions, ours against Zuko.

The figure is the log-likelihood of held-out points. On both sides the flows have the same kind, number of layers and widths
(SiLU), and the same data, optimiser, steps, batches and seeds. The density of a point takes one pass of the networks on both
sides.

    python -m benchmarks.density_estimation --out benchmarks/results/density_estimation.json [--quick]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
import zuko
from torch import Tensor, nn

from pyro_flowguides import NormalizingFlow, flows
from pyro_flowguides.transforms import FlowTransform

from .common import describe, environment, markdown_table, write_results

_NUM_POINTS = 5000
_BATCH_SIZE = 500
_NUM_STEPS = 1000
_LEARNING_RATE = 5e-3
_SEEDS = (0, 1, 2)
_HIDDEN_DIMS = (32, 32)
_NUM_BINS = 8
# Our result may be lower by this many nats.
_TOLERANCE = 0.05


def two_moons(num_points: int, generator: torch.Generator) -> Tensor:
    """Two half circles that reach into each other, with noise of standard deviation 0.1."""
    angle = math.pi * torch.rand(num_points, generator=generator)
    upper = torch.rand(num_points, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return torch.stack([x, y], -1) + 0.1 * torch.randn(num_points, 2, generator=generator)


def eight_gaussians(num_points: int, generator: torch.Generator) -> Tensor:
    """Eight normal distributions with standard deviation 0.2 on a circle of radius 2."""
    angle = math.pi / 4 * torch.randint(8, (num_points,), generator=generator)
    centre = 2 * torch.stack([angle.cos(), angle.sin()], -1)
    return centre + 0.2 * torch.randn(num_points, 2, generator=generator)


class _Flow(nn.Module):
    """A flow of ours as a density: a module with ``log_prob``."""

    def __init__(self, transform: FlowTransform) -> None:
        super().__init__()
        self.transform = transform

    def log_prob(self, points: Tensor) -> Tensor:
        base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
        return NormalizingFlow(base, self.transform).log_prob(points)


class _ZukoFlow(nn.Module):
    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def log_prob(self, points: Tensor) -> Tensor:
        return self.flow().log_prob(points)


def _zuko_spline_coupling() -> nn.Module:
    return zuko.flows.NICE(
        2,
        transforms=4,
        univariate=zuko.transforms.MonotonicRQSTransform,
        shapes=((_NUM_BINS,), (_NUM_BINS,), (_NUM_BINS - 1,)),
        hidden_features=_HIDDEN_DIMS,
        activation=nn.SiLU,
    )


_DATA = {"two moons": two_moons, "eight gaussians": eight_gaussians}
# name -> library -> constructor
_FLOWS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "MAF, 5 layers": {
        "ours": lambda: _Flow(flows.maf(2, num_layers=5, hidden_dims=_HIDDEN_DIMS)),
        "Zuko": lambda: _ZukoFlow(
            zuko.flows.MAF(2, transforms=5, hidden_features=_HIDDEN_DIMS, activation=nn.SiLU),
        ),
    },
    "RealNVP, 6 layers": {
        "ours": lambda: _Flow(flows.coupling(2, num_layers=6, hidden_dims=_HIDDEN_DIMS)),
        "Zuko": lambda: _ZukoFlow(
            zuko.flows.RealNVP(2, transforms=6, hidden_features=_HIDDEN_DIMS, activation=nn.SiLU),
        ),
    },
    # The inverse of the same recipe: its affine maps act on the data, as Zuko's do, not on the noise.
    "RealNVP, 6 layers, inverted": {
        "ours": lambda: _Flow(flows.coupling(2, num_layers=6, hidden_dims=_HIDDEN_DIMS).inv),
        "Zuko": lambda: _ZukoFlow(
            zuko.flows.RealNVP(2, transforms=6, hidden_features=_HIDDEN_DIMS, activation=nn.SiLU),
        ),
    },
    # The inverse of our recipe: the density then takes the closed form of the spline instead of solving for its root.
    "spline coupling, 4 layers, inverted": {
        "ours": lambda: _Flow(flows.spline_coupling(2, num_layers=4, hidden_dims=_HIDDEN_DIMS, num_bins=_NUM_BINS).inv),
        "Zuko": lambda: _ZukoFlow(_zuko_spline_coupling()),
    },
}


def fit(construct: Callable[[], nn.Module], train: Tensor, test: Tensor, seed: int, num_steps: int) -> dict:
    """Trains one flow; the mean log-likelihood of both sets, and the time."""
    torch.manual_seed(seed)
    flow = construct()
    optimizer = torch.optim.Adam(flow.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    batches = torch.Generator().manual_seed(1000 + seed)
    start = time.perf_counter()
    for _ in range(num_steps):
        batch = train[torch.randint(len(train), (_BATCH_SIZE,), generator=batches)]
        optimizer.zero_grad()
        (-flow.log_prob(batch).mean()).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        log_likelihoods = {
            name: float(flow.log_prob(points).mean()) for name, points in [("train", train), ("test", test)]
        }
    num_parameters = sum(parameter.numel() for parameter in flow.parameters())
    return {**log_likelihoods, "seconds": seconds, "num_parameters": num_parameters}


def to_markdown(results: dict) -> str:
    rows = []
    for entry in results["comparisons"]:
        sides = [f"{entry[side]['mean']:.3f} ± {entry[side]['sd']:.3f}" for side in ("ours", "Zuko")]
        seconds = [statistics.median(run["seconds"] for run in entry[side]["runs"]) for side in ("ours", "Zuko")]
        times = f"{seconds[0]:.1f} / {seconds[1]:.1f}"
        rows.append([entry["data"], entry["flow"], *sides, f"{entry['difference']:+.3f}", times])
    met = sum(entry["difference"] >= -_TOLERANCE for entry in results["comparisons"])
    parts = [
        "# Density estimation: test log-likelihood against Zuko",
        __doc__.split("\n\n")[1].replace("\n", " "),
        f"{describe(results['environment'])} {_NUM_POINTS} training and {_NUM_POINTS} test points, "
        f"{results['num_steps']} steps of Adam at {_LEARNING_RATE} (cosine) with batches of {_BATCH_SIZE}, hidden layers "
        f"{_HIDDEN_DIMS}, {_NUM_BINS} bins; mean and standard deviation over seeds {_SEEDS}, in nats per point; higher is "
        f"better. Inverted: our recipe in its inverse direction, which is the direction of Zuko's flows. {met} of {len(rows)} "
        f"differences are above −{_TOLERANCE}. The machine was shared, which the times include.",
        markdown_table(["data", "flow", "ours", "Zuko", "ours − Zuko", "seconds, ours / Zuko"], rows),
    ]
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="benchmarks/results/density_estimation.json", help="the JSON file to write")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    num_steps = _NUM_STEPS // 10 if options.quick else _NUM_STEPS
    comparisons = []
    for data, sample in _DATA.items():
        generator = torch.Generator().manual_seed(0)
        train, test = sample(_NUM_POINTS, generator), sample(_NUM_POINTS, generator)
        for name, sides in _FLOWS.items():
            runs = {side: [] for side in sides}
            for seed in _SEEDS:
                for side, construct in sides.items():
                    runs[side].append(fit(construct, train, test, seed, num_steps))
            entry = {"data": data, "flow": name}
            for side, side_runs in runs.items():
                values = [run["test"] for run in side_runs]
                entry[side] = {"mean": statistics.mean(values), "sd": statistics.stdev(values), "runs": side_runs}
            entry["difference"] = entry["ours"]["mean"] - entry["Zuko"]["mean"]
            comparisons.append(entry)
            print(
                f"{data:16s} {name:36s} ours {entry['ours']['mean']:.4f}  Zuko {entry['Zuko']['mean']:.4f}"
                f"  difference {entry['difference']:+.4f}",
                flush=True,
            )
    results = {"environment": environment("pyro-ppl", "zuko"), "num_steps": num_steps, "comparisons": comparisons}
    write_results(options.out, results, to_markdown(results))


if __name__ == "__main__":
    main()
