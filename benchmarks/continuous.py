"""Continuous flows as guides and as densities: what the field of a flow is worth for its time.

    python -m benchmarks.continuous planes moons posteriors traces --out benchmarks/results/continuous.json [--quick]

- ``planes``: a planar field of M units against M planar layers, on the densities U1 to U4 whose log Z is known. The figure of
  Chen et al. (2018), arXiv:1806.07366, with the divergence as a number.
- ``moons``: test log-likelihood of two moons by maximum likelihood, against Zuko's CNF and the recipe of torchcfm's notebook.
- ``posteriors``: a continuous guide beside couplings on three posteriors: gap against seconds.
- ``traces``: the noise of the gradient with the exact trace and with Hutchinson's estimate.

The parts that are not named keep the results that the file already has.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_flowguides as fg
from pyro_flowguides import NormalizingFlow, flows
from pyro_flowguides import transforms as T

from .common import describe, environment, markdown_table, write_results
from .density_estimation import two_moons
from .posteriors.known import KnownPosterior
from .posteriors.targets import ENERGIES, planar_posterior, targets

_SIZES = (2, 8, 32)
_NUM_STEPS = 3000
_NUM_DRAWS = 200_000
_NUM_MOONS, _MOONS_BATCH, _MOONS_STEPS, _MOONS_RATE = 5000, 256, 1000, 1e-2
_SEEDS = (0, 1, 2)


def gap_of(target: KnownPosterior, guide: Any, num_steps: int | None) -> dict[str, float]:
    """Fits a guide; log Z − ELBO in nats with its standard error, the seconds of the fit and the guide's parameters."""
    steps = {} if num_steps is None else {"num_steps": num_steps}
    fit = fg.fit(target.model, guide, *target.args, seed=0, progress=False, **steps)
    draws = fg.draw(target.model, fit.guide, *target.args, num_samples=_NUM_DRAWS, batch_size=20_000)
    return {
        "gap": target.log_evidence - draws.elbo.value,
        "se": draws.elbo.se,
        "khat": float(fit.khat.value),
        "seconds": fit.wall_time,
        "num_parameters": sum(parameter.numel() for parameter in fit.guide.parameters()),
    }


# --- planes -----------------------------------------------------------------------------------------------------------


def planes(quick: bool) -> dict[str, Any]:
    """A planar field with M units and a flow of M planar layers, in turn."""
    recipes: dict[str, Callable[[int], Callable]] = {
        "planar field": lambda size: functools.partial(flows.continuous_planar, num_units=size),
        "planar layers": lambda size: functools.partial(flows.planar, num_layers=size),
    }
    rows: dict[str, Any] = {}
    for name in ENERGIES:
        target = planar_posterior(name)
        for size in _SIZES:
            for kind, recipe in recipes.items():
                guide = fg.AutoFlow(target.model, recipe(size))
                result = gap_of(target, guide, 50 if quick else _NUM_STEPS)
                rows.setdefault(kind, {}).setdefault(str(size), {})[name] = result
                print(kind, size, name, result, flush=True)
    return rows


def planes_to_markdown(rows: dict[str, Any]) -> str:
    table = []
    for kind, sizes in rows.items():
        for size, by_target in sizes.items():
            some = next(iter(by_target.values()))
            cells = [f"{by_target[name]['gap']:.3f} ± {by_target[name]['se']:.3f}" for name in ENERGIES]
            seconds = statistics.median(result["seconds"] for result in by_target.values())
            table.append([kind, size, *cells, f"{seconds:.0f}", str(some["num_parameters"])])
    return (
        "## Planes: planar field and planar layers\n\n"
        f"KL(q, p) in nats with its standard error after {_NUM_STEPS} steps of `fit`, seed 0. Quadrature gives log Z. The field "
        "takes the default number of steps of its solver.\n\n"
        + markdown_table(["flow", "M or K", *ENERGIES, "seconds", "parameters"], table)
    )


# --- moons ------------------------------------------------------------------------------------------------------------


class _Density(nn.Module):
    """A map from data to noise of ours as a density."""

    def __init__(self, to_noise: T.FlowTransform) -> None:
        super().__init__()
        self.to_noise = to_noise

    def log_prob(self, points: Tensor) -> Tensor:
        base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
        return NormalizingFlow(base, self.to_noise.inv).log_prob(points)


class _ZukoDensity(nn.Module):
    def __init__(self) -> None:
        import zuko

        super().__init__()
        self.flow = zuko.flows.CNF(2, hidden_features=(64, 64), exact=True)

    def log_prob(self, points: Tensor) -> Tensor:
        return self.flow().log_prob(points)


class _NotebookDensity(nn.Module):
    """The recipe of torchcfm's maximum-likelihood notebook: four linear layers of width 64 with SELU, 100 Euler steps and the
    trace by autograd. Here the gradient goes through the steps, which is faster than the adjoint equation of the notebook.
    """

    NUM_STEPS = 100

    def __init__(self) -> None:
        super().__init__()
        sizes = [3, 64, 64, 64]
        layers: list[nn.Module] = []
        for size, following in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(size, following), nn.SELU()]
        self.net = nn.Sequential(*layers, nn.Linear(64, 2))

    def log_prob(self, points: Tensor) -> Tensor:
        x, log_det, step = points.clone().requires_grad_(True), points.new_zeros(len(points)), 1 / self.NUM_STEPS
        with torch.enable_grad():
            for index in range(self.NUM_STEPS):
                time_column = torch.full_like(x[:, :1], index * step)
                velocity = self.net(torch.cat([x, time_column], -1))
                trace = sum(
                    torch.autograd.grad(velocity[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[-1])
                )
                x, log_det = x + step * velocity, log_det + step * trace
        return dist.Normal(0.0, 1.0).log_prob(x).sum(-1) + log_det


def _moons_sides() -> dict[str, Callable[[], nn.Module]]:
    return {
        "planar field, 64 units": lambda: _Density(flows.continuous_planar(2, num_units=64)),
        "network field, 64 × 64": lambda: _Density(flows.ffjord(2, hidden_dims=(64, 64))),
        "Zuko's CNF, 64 × 64": _ZukoDensity,
        "recipe of torchcfm's notebook": _NotebookDensity,
    }


def _train_by_fit(flow: _Density, train: Tensor, seed: int, num_steps: int) -> Callable[[Tensor], Tensor]:
    fit = fg.fit_density(
        flow.to_noise.inv,
        train,
        validation=None,
        batch_size=_MOONS_BATCH,
        num_steps=num_steps,
        optim=functools.partial(torch.optim.Adam, lr=_MOONS_RATE),
        seed=seed,
        progress=False,
    )
    return fit.log_prob


def _train_by_hand(flow: nn.Module, train: Tensor, seed: int, num_steps: int) -> Callable[[Tensor], Tensor]:
    optimizer = torch.optim.Adam(flow.parameters(), lr=_MOONS_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    batches = torch.Generator().manual_seed(1000 + seed)
    for _ in range(num_steps):
        batch = train[torch.randint(len(train), (_MOONS_BATCH,), generator=batches)]
        optimizer.zero_grad()
        (-flow.log_prob(batch).mean()).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    return flow.log_prob


def moons(quick: bool) -> dict[str, Any]:
    """All sides on the same points with the same batches, steps and rates, in turn."""
    generator = torch.Generator().manual_seed(0)
    train, test = two_moons(_NUM_MOONS, generator), two_moons(_NUM_MOONS, generator)
    num_steps = _MOONS_STEPS // 50 if quick else _MOONS_STEPS
    rows: dict[str, Any] = {}
    for seed in _SEEDS[: 1 if quick else None]:
        for name, construct in _moons_sides().items():
            torch.manual_seed(seed)
            flow = construct()
            start = time.perf_counter()
            train_one = _train_by_fit if isinstance(flow, _Density) else _train_by_hand
            log_prob = train_one(flow, train, seed, num_steps)
            seconds = time.perf_counter() - start
            value = float(log_prob(test).detach().mean())
            num_parameters = sum(parameter.numel() for parameter in flow.parameters())
            run = {"test": value, "seconds": seconds, "num_parameters": num_parameters}
            rows.setdefault(name, []).append(run)
            print(name, seed, run, flush=True)
    return rows


def moons_to_markdown(rows: dict[str, Any]) -> str:
    table = []
    for name, runs in rows.items():
        values = [run["test"] for run in runs]
        table.append(
            [
                name,
                ", ".join(f"{value:.3f}" for value in values),
                f"{statistics.median(run['seconds'] for run in runs):.1f}",
                str(runs[0]["num_parameters"]),
            ]
        )
    return (
        "## Two moons by maximum likelihood\n\n"
        f"Test log-likelihood in nats per point, one figure per seed: {_NUM_MOONS} training and test points, {_MOONS_STEPS} "
        f"steps of Adam at {_MOONS_RATE} with a cosine, batches of {_MOONS_BATCH}. Ours are trained by `fit_density`. The "
        "notebook of torchcfm reports 326 s on a GPU node for 1000 steps.\n\n"
        + markdown_table(["density", "test log-likelihood", "seconds", "parameters"], table)
    )


# --- posteriors -------------------------------------------------------------------------------------------------------


def posteriors(quick: bool, sonar: Path | None) -> dict[str, Any]:
    """Guides with their defaults on the funnel in ten dimensions, the centred eight schools and sonar."""
    known = targets(sonar)
    guides = {"continuous": fg.AutoContinuousFlow, "coupling": fg.AutoCoupling}
    rows: dict[str, Any] = {}
    for name in ("eight_schools_centered", "funnel_10", "sonar"):
        if name not in known:
            continue
        target = known[name]()
        for kind, guide_class in guides.items():
            rows.setdefault(name, {})[kind] = gap_of(target, guide_class(target.model), 50 if quick else _NUM_STEPS)
            print(name, kind, rows[name][kind], flush=True)
    return rows


def posteriors_to_markdown(rows: dict[str, Any]) -> str:
    table = [
        [name, kind, f"{result['gap']:.4f} ± {result['se']:.4f}", f"{result['khat']:.2f}", f"{result['seconds']:.0f}"]
        for name, kinds in rows.items()
        for kind, result in kinds.items()
    ]
    return (
        "## Posteriors\n\n"
        f"log Z − ELBO in nats after {_NUM_STEPS} steps of `fit` with default options, seed 0.\n\n"
        + markdown_table(["posterior", "guide", "gap", "k-hat", "seconds"], table)
    )


# --- traces -----------------------------------------------------------------------------------------------------------


def traces(quick: bool) -> dict[str, Any]:
    """The variance of one particle's gradient of the ELBO, exact trace against Hutchinson's, at the same parameters."""
    rows: dict[str, Any] = {}
    num_gradients = 20 if quick else 400
    for dim in (10, 50):
        torch.manual_seed(0)
        field = T.NetworkField(dim, hidden_dims=(64, 64))
        with torch.no_grad():
            for parameter in field.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        for trace in ("exact", "hutchinson"):
            flow = T.Continuous(dim, field, trace=trace)
            gradients = []
            start = time.perf_counter()
            for seed in range(num_gradients):
                torch.manual_seed(seed)
                z = torch.randn(1, dim)
                x, log_det = flow.forward_and_log_det(z)
                scale = (x[:, :1] / 2).exp()
                log_p = dist.Normal(0.0, 3.0).log_prob(x[:, 0]) + dist.Normal(0.0, scale).log_prob(x[:, 1:]).sum(-1)
                loss = -(log_p + log_det).mean()
                gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(field.parameters()))]))
            seconds = (time.perf_counter() - start) / num_gradients
            stacked = torch.stack(gradients)
            rows.setdefault(str(dim), {})[trace] = {
                "total_variance": float(stacked.var(0).sum()),
                "squared_mean": float(stacked.mean(0).square().sum()),
                "milliseconds": 1000 * seconds,
            }
            print(dim, trace, rows[str(dim)][trace], flush=True)
    return rows


def traces_to_markdown(rows: dict[str, Any]) -> str:
    table = [
        [dim, trace, f"{r['total_variance']:.3g}", f"{r['squared_mean']:.3g}", f"{r['milliseconds']:.1f}"]
        for dim, by_trace in rows.items()
        for trace, r in by_trace.items()
    ]
    return (
        "## Exact trace and Hutchinson's estimate\n\n"
        "Gradients of the ELBO of a funnel at one particle, in a network field (64, 64) away from its start: the variance summed "
        "over parameters, the squared norm of the mean gradient, and the time of one gradient without capture.\n\n"
        + markdown_table(["D", "trace", "variance", "squared mean", "ms"], table)
    )


_PARTS = {
    "planes": planes_to_markdown,
    "moons": moons_to_markdown,
    "posteriors": posteriors_to_markdown,
    "traces": traces_to_markdown,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="+", choices=_PARTS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/continuous.json"))
    parser.add_argument("--sonar", type=Path, help="the CSV file of the sonar data")
    parser.add_argument("--quick", action="store_true", help="a few steps of each fit")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for part in options.parts:
        if part == "posteriors":
            rows = posteriors(options.quick, options.sonar)
        else:
            rows = {"planes": planes, "moons": moons, "traces": traces}[part](options.quick)
        results[part] = {"environment": environment("pyro-ppl", "zuko"), "rows": rows}
    sections = [
        to_markdown(results[part]["rows"]) + "\n\n" + describe(results[part]["environment"])
        for part, to_markdown in _PARTS.items()
        if part in results
    ]
    write_results(options.out, results, "\n\n".join(["# Continuous flows", *sections]))


if __name__ == "__main__":
    main()
