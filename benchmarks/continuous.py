"""Continuous flows as guides and as densities: what the field of a flow is worth for its time.

    python -m benchmarks.continuous planes moons moons_seconds posteriors traces [--quick]

- ``planes``: a planar field of M units against M planar layers, on the densities U1 to U4 whose log Z is known. The figure of
  Chen et al. (2018), arXiv:1806.07366, with the divergence as a number.
- ``moons``: test log-likelihood of two moons by maximum likelihood, against Zuko's CNF and the recipe of torchcfm's notebook.
- ``moons_seconds``: the time of these four.
- ``posteriors``: a continuous guide beside couplings on three posteriors: gap against seconds.
- ``traces``: the noise of the gradient with the exact trace and with Hutchinson's estimate.

``--only TEXT`` runs what has TEXT in its label, such as "field 32 U3" or "sonar". All else keeps the results that the file has.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
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
from pyro_flowguides.transforms.continuous import is_continuous

from .common import describe, environment, markdown_table, write_results
from .density_estimation import two_moons
from .posteriors.targets import ENERGIES, planar_posterior, targets

_SIZES = (2, 8, 32)
_NUM_STEPS = 3000
_NUM_DRAWS = 200_000
_INIT_SCALE = 1.5
# A field takes larger steps than the default ones, which planar layers and couplings take.
_FIELD_RATE = 0.05
_RATES = (0.01, _FIELD_RATE)
_NUM_MOONS, _MOONS_BATCH, _MOONS_STEPS, _MOONS_RATE = 5000, 256, 1000, 1e-2
_NUM_SEEDS = 3
_NUM_TURNS = 3


def gap_of(log_evidence: float | None, model: Callable, guide: Any, *args: Any, **options: Any) -> dict[str, float]:
    """Fits a guide; log Z − ELBO in nats with its standard error, the fit's seconds of the processor, and more of the guide."""
    assert log_evidence is not None
    start = time.process_time()
    fit = fg.fit(model, guide, *args, seed=0, progress=False, **options)
    seconds = time.process_time() - start
    # With four times the steps of the solver, so that the density is right.
    for module in fit.guide.modules():
        if isinstance(module, T.Continuous):
            module.steps = module.steps.finer().finer()
    draws = fg.draw(model, fit.guide, *args, num_samples=_NUM_DRAWS, batch_size=20_000)
    return {
        "gap": log_evidence - draws.elbo.value,
        "se": draws.elbo.se,
        "khat": float(fit.khat.value),
        "seconds": seconds,
        "num_parameters": sum(parameter.numel() for parameter in fit.guide.parameters()),
        **({"ode_error": fit.guide.ode_error().log_det} if is_continuous(fit.guide.flow) else {}),
    }


Wanted = Callable[[str], bool]


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The old results, with the new ones in their place."""
    both = {key: merge(old[key], value) if isinstance(old.get(key), dict) else value for key, value in new.items()}
    return {**old, **both}


# --- planes -----------------------------------------------------------------------------------------------------------


def planes(quick: bool, wanted: Wanted) -> dict[str, Any]:
    """A planar field with M units and a flow of M planar layers, in turn."""
    recipes: dict[str, Callable[[int], Callable]] = {
        "planar field": lambda size: functools.partial(flows.continuous_planar, num_units=size, num_steps=4),
        "planar layers": lambda size: functools.partial(flows.planar, num_layers=size),
    }
    num_steps = 50 if quick else _NUM_STEPS
    rows: dict[str, Any] = {}
    for name in ENERGIES:
        target = planar_posterior(name)
        for size in _SIZES:
            for kind, recipe in recipes.items():
                if not wanted(f"{kind} {size} {name}"):
                    continue
                results = []
                for rate in _RATES:
                    guide = fg.AutoFlow(target.model, recipe(size), init_scale=_INIT_SCALE)
                    result = gap_of(
                        target.log_evidence,
                        target.model,
                        guide,
                        *target.args,
                        temper="linear",
                        num_steps=num_steps,
                        num_particles=256,
                        whiten=None,
                        optim=functools.partial(torch.optim.Adam, lr=rate),
                    )
                    results.append({**result, "num_steps": num_steps, "rate": rate})
                    print(kind, size, name, results[-1], flush=True)
                best = min(results, key=lambda result: result["gap"])
                rows.setdefault(kind, {}).setdefault(str(size), {})[name] = best
    return rows


def planes_to_markdown(rows: dict[str, Any]) -> str:
    table = []
    for kind, sizes in rows.items():
        for size, by_target in sizes.items():
            some = next(iter(by_target.values()))
            cells = [
                f"{by_target[name]['gap']:.3f} ± {by_target[name]['se']:.3f}" if name in by_target else "not run"
                for name in ENERGIES
            ]
            seconds = max(result["seconds"] for result in by_target.values())
            errors = [result["ode_error"] for result in by_target.values() if "ode_error" in result]
            error = f"{max(errors):.0e}" if errors else "–"
            table.append(
                [kind, size, str(some["num_steps"]), *cells, error, f"{seconds:.0f}", str(some["num_parameters"])]
            )
    return (
        "## Planes: planar field and planar layers\n\n"
        "KL(q, p) in nats with its standard error after one fit, seed 0; quadrature gives log Z. Both kinds "
        f"start as a normal of scale {_INIT_SCALE} in unconstrained space. Both are trained on "
        "e^(−βU), with β from 0.01 to 1 over the first half of the steps, much as Rezende & Mohamed did. Both have "
        f"a fit at each of the learning rates {', '.join(map(str, _RATES))} with a cosine, and the better one counts. The field "
        "takes 4 steps of Runge-Kutta in "
        "training and 16 where it is judged; the error is the mean one of log q by these 16. Errors and seconds of the "
        "processor, those of one fit, are the largest of a row.\n\n"
        + markdown_table(["flow", "M or K", "steps", *ENERGIES, "error", "seconds", "parameters"], table)
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
    trace by autograd; points times 3 less 1; Adam with the defaults of torch. Here the gradient goes through the steps, which
    is faster than the adjoint equation of the notebook.
    """

    NUM_STEPS, SCALE = 100, 3.0

    def __init__(self) -> None:
        super().__init__()
        sizes = [3, 64, 64, 64]
        layers: list[nn.Module] = []
        for size, following in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(size, following), nn.SELU()]
        self.net = nn.Sequential(*layers, nn.Linear(64, 2))

    def log_prob(self, points: Tensor) -> Tensor:
        x, step = (self.SCALE * points - 1).requires_grad_(True), 1 / self.NUM_STEPS
        log_det = points.new_full((len(points),), 2 * math.log(self.SCALE))
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
        "64 units, planar field": lambda: _Density(flows.continuous_planar(2, num_units=64)),
        "64 × 64, network field": lambda: _Density(flows.ffjord(2, hidden_dims=(64, 64))),
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
    if own_rate := isinstance(flow, _NotebookDensity):
        optimizer = torch.optim.Adam(flow.parameters())
    batches = torch.Generator().manual_seed(1000 + seed)
    for _ in range(num_steps):
        batch = train[torch.randint(len(train), (_MOONS_BATCH,), generator=batches)]
        optimizer.zero_grad()
        (-flow.log_prob(batch).mean()).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), torch.inf if own_rate else 10.0)
        optimizer.step()
        if not own_rate:
            schedule.step()
    return flow.log_prob


def moons(quick: bool, wanted: Wanted) -> dict[str, Any]:
    """All sides on the same points with the same batches, steps and rates, in turn."""
    generator = torch.Generator().manual_seed(0)
    train, test = two_moons(_NUM_MOONS, generator), two_moons(_NUM_MOONS, generator)
    num_steps = _MOONS_STEPS // 50 if quick else _MOONS_STEPS
    rows: dict[str, Any] = {}
    for seed in range(1 if quick else _NUM_SEEDS):
        for name, construct in _moons_sides().items():
            # A run of the others takes minutes.
            if not wanted(f"{name} {seed}") or (seed > 0 and not name.endswith("field")):
                continue
            torch.manual_seed(seed)
            flow = construct()
            if isinstance(flow, _Density):
                log_prob = _train_by_fit(flow, train, seed, num_steps)
            else:
                log_prob = _train_by_hand(flow, train, seed, num_steps)
            value = float(log_prob(test).detach().mean())
            num_parameters = sum(parameter.numel() for parameter in flow.parameters())
            run = {"test": value, "num_parameters": num_parameters}
            rows.setdefault(name, {})[str(seed)] = run
            print(name, seed, run, flush=True)
    return rows


def moons_seconds(quick: bool, wanted: Wanted) -> dict[str, Any]:
    """Seconds of the processor for all steps of each side, in turns; those of the slow sides from a part of the steps."""
    generator = torch.Generator().manual_seed(0)
    train = two_moons(_NUM_MOONS, generator)
    rows: dict[str, list[float]] = {}
    for _ in range(1 if quick else _NUM_TURNS):
        for name, construct in _moons_sides().items():
            if not wanted(name):
                continue
            torch.manual_seed(0)
            flow = construct()
            start = time.process_time()
            if isinstance(flow, _Density):
                # All of them: the first steps capture the others.
                num_steps = _MOONS_STEPS // 50 if quick else _MOONS_STEPS
                _train_by_fit(flow, train, 0, num_steps)
            else:
                num_steps = _MOONS_STEPS // 50
                _train_by_hand(flow, train, 0, num_steps)
            seconds = (time.process_time() - start) * _MOONS_STEPS / num_steps
            rows.setdefault(name, []).append(seconds)
            print(name, seconds, flush=True)
    return {name: {"seconds": statistics.median(seconds)} for name, seconds in rows.items()}


def moons_seconds_to_markdown(rows: dict[str, Any]) -> str:
    return (
        "## Seconds on two moons\n\n"
        f"Seconds of the processor for {_MOONS_STEPS} steps, capturing included: medians of {_NUM_TURNS} turns. A turn has all "
        f"steps of ours, and {_MOONS_STEPS // 50} of the others, whose time is that of as many more. The notebook of torchcfm "
        "itself reports 326 s for its 1000 steps.\n\n"
        + markdown_table(["density", "seconds"], [[name, f"{row['seconds']:.1f}"] for name, row in rows.items()])
    )


def moons_to_markdown(rows: dict[str, Any]) -> str:
    table = []
    for name, runs in rows.items():
        some = next(iter(runs.values()))
        table.append(
            [
                name,
                ", ".join(f"{run['test']:.3f}" for run in runs.values()),
                str(some["num_parameters"]),
            ]
        )
    return (
        "## Two moons by maximum likelihood\n\n"
        f"Test log-likelihood in nats per point, one figure per seed (one seed for the others): {_NUM_MOONS} training and test "
        f"points, {_MOONS_STEPS} steps of Adam at {_MOONS_RATE} with a cosine, batches of {_MOONS_BATCH}. Ours are trained by "
        "`fit_density`. The recipe of the notebook has its own scale of the data and its own optimiser, Adam at 0.001 without a "
        "schedule."
        "\n\n" + markdown_table(["density", "test log-likelihood", "parameters"], table)
    )


# --- posteriors -------------------------------------------------------------------------------------------------------


def posteriors(quick: bool, wanted: Wanted, sonar: Path | None) -> dict[str, Any]:
    """Guides with their defaults on the funnel in ten dimensions, the centred eight schools and sonar; the continuous one also at
    a larger learning rate.
    """
    known = targets(sonar)
    fast = {"optim": functools.partial(torch.optim.Adam, lr=_FIELD_RATE)}
    kinds: dict[str, tuple[Callable, dict[str, Any]]] = {
        "continuous": (fg.AutoContinuousFlow, {}),
        f"continuous, rate {_FIELD_RATE}": (fg.AutoContinuousFlow, fast),
        "coupling": (fg.AutoCoupling, {}),
    }
    rows: dict[str, Any] = {}
    for name in ("eight_schools_centered", "funnel_10", "sonar"):
        if name not in known:
            continue
        target = known[name]()
        for kind, (guide_class, options) in kinds.items():
            if not wanted(f"{name} {kind}"):
                continue
            rows.setdefault(name, {})[kind] = gap_of(
                target.log_evidence,
                target.model,
                guide_class(target.model),
                *target.args,
                num_steps=50 if quick else _NUM_STEPS,
                **options,
            )
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
        f"log Z − ELBO in nats after {_NUM_STEPS} steps of `fit` with default options, seed 0; seconds of the "
        "processor. The solver judges with 32 steps what was trained with 8.\n\n"
        + markdown_table(["posterior", "guide", "gap", "k-hat", "seconds"], table)
    )


# --- traces -----------------------------------------------------------------------------------------------------------


def traces(quick: bool, wanted: Wanted) -> dict[str, Any]:
    """The variance of one particle's gradient of the ELBO, exact trace against Hutchinson's, at the same parameters."""
    rows: dict[str, Any] = {}
    num_gradients = 20 if quick else 400
    for dim in (10, 50):
        if not wanted(str(dim)):
            continue
        torch.manual_seed(0)
        field = T.NetworkField(dim, hidden_dims=(64, 64))
        with torch.no_grad():
            for parameter in field.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        for trace in ("exact", "hutchinson"):
            flow = T.Continuous(dim, field, trace=trace)
            gradients = []
            start = time.process_time()
            for seed in range(num_gradients):
                torch.manual_seed(seed)
                z = torch.randn(1, dim)
                x, log_det = flow.forward_and_log_det(z)
                scale = (x[:, :1] / 2).exp()
                log_p = dist.Normal(0.0, 3.0).log_prob(x[:, 0]) + dist.Normal(0.0, scale).log_prob(x[:, 1:]).sum(-1)
                loss = -(log_p + log_det).mean()
                gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(field.parameters()))]))
            seconds = (time.process_time() - start) / num_gradients
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
    "moons_seconds": moons_seconds_to_markdown,
    "posteriors": posteriors_to_markdown,
    "traces": traces_to_markdown,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="+", choices=_PARTS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/continuous.json"))
    parser.add_argument("--sonar", type=Path, help="the CSV file of the sonar data")
    parser.add_argument("--only", default="", help="a part of the labels of what to run")
    parser.add_argument("--quick", action="store_true", help="a few steps of each fit")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    runs = {
        "planes": planes,
        "moons": moons,
        "moons_seconds": moons_seconds,
        "posteriors": functools.partial(posteriors, sonar=options.sonar),
        "traces": traces,
    }
    for part in options.parts:
        rows = runs[part](options.quick, lambda label: options.only in label)
        rows = merge(results.get(part, {}).get("rows", {}), rows)
        results[part] = {"environment": environment("pyro-ppl", "zuko"), "rows": rows}
    sections = [
        to_markdown(results[part]["rows"]) + "\n\n" + describe(results[part]["environment"])
        for part, to_markdown in _PARTS.items()
        if part in results
    ]
    write_results(options.out, results, "\n\n".join(["# Continuous flows", *sections]))


if __name__ == "__main__":
    main()
