"""The ELBO of the Gaussians that the methods of whitening find.

    python -m benchmarks.whitening --database PATH --out benchmarks/results/whitening.json

PATH is the folder ``posterior_database`` of a checkout of posteriordb, which has the data sets. The funnel and the centred eight
schools need no file.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

from pyro_flowguides import AutoFlow
from pyro_flowguides.guides.gaussians import gaussian_elbo
from pyro_flowguides.guides.whitening import batch_and_match, quasi_newton_path
from pyro_flowguides.model.call import ModelCall
from pyro_flowguides.model.target import Target

from .common import describe, environment, markdown_table, write_results
from .models import DTYPE, eight_schools_centered, funnel
from .posteriors.database import read_data

_SEEDS = (0, 1)


def _tensor(values: float | list) -> torch.Tensor:
    return torch.tensor(values, dtype=DTYPE)


def kilpisjarvi(database: Path) -> Callable:
    """A regression on years that are not centred, with a wide prior for the residual scale."""
    data = read_data(database, "kilpisjarvi_mod")
    x, y = _tensor(data["x"]), _tensor(data["y"])

    def model() -> None:
        alpha = pyro.sample("alpha", dist.Normal(_tensor(float(data["pmualpha"])), float(data["psalpha"])))
        beta = pyro.sample("beta", dist.Normal(_tensor(float(data["pmubeta"])), float(data["psbeta"])))
        sigma = pyro.sample("sigma", dist.HalfCauchy(_tensor(1e3)))
        with pyro.plate("years", len(x)):
            pyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=y)

    return model


def diamonds(database: Path) -> Callable:
    """A regression of 5000 prices on 24 collinear columns, by its sufficient statistics."""
    data = read_data(database, "diamonds")
    x, y = _tensor(data["X"])[:, 1:], _tensor(data["Y"])
    x = x - x.mean(0)
    n, xx, xy = len(y), x.mT @ x, x.mT @ y

    def model() -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(x.shape[1], dtype=DTYPE), 1.0).to_event(1))
        intercept = pyro.sample("intercept", dist.StudentT(_tensor(3.0), 8.0, 10.0))
        sigma = pyro.sample("sigma", dist.HalfCauchy(_tensor(10.0)))
        squares = y @ y - 2 * b @ xy - 2 * intercept * y.sum() + n * intercept**2 + ((b @ xx) * b).sum(-1)
        pyro.factor("likelihood", -0.5 * squares / sigma**2 - n * sigma.log() - 0.5 * n * math.log(2 * math.pi))

    return model


def gp_pois_regr(database: Path) -> Callable:
    """A Gaussian process with Poisson counts."""
    data = read_data(database, "gp_pois_regr")
    x, k = _tensor(data["x"]), _tensor(data["k"])

    def model() -> None:
        rho = pyro.sample("rho", dist.Gamma(_tensor(25.0), 4.0))
        alpha = pyro.sample("alpha", dist.HalfNormal(_tensor(2.0)))
        f = pyro.sample("f", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
        distance = (x[:, None] - x).square()
        covariance = alpha[..., None, None] ** 2 * torch.exp(-distance / (2 * rho[..., None, None] ** 2))
        factor, _ = torch.linalg.cholesky_ex(covariance + 1e-10 * torch.eye(len(x), dtype=DTYPE))
        rate = (factor @ f[..., None])[..., 0].exp()
        pyro.sample("k", dist.Poisson(rate).to_event(1), obs=k)

    return model


# How to make the model of each posterior, from the folder of the database.
POSTERIORS: dict[str, Callable[[Path], Callable[[], None]]] = {
    "kilpisjarvi": kilpisjarvi,
    "diamonds": diamonds,
    "gp_pois_regr": gp_pois_regr,
    "funnel": lambda database: funnel,
    "eight_schools_centered": lambda database: eight_schools_centered,
}


def measure(model: Callable[[], None], seed: int) -> dict[str, float]:
    """The ELBO of every Gaussian, and the seconds that the search took."""
    # A guide that is set up by hand has its parameters in Pyro's store.
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = AutoFlow(model).setup()
    # The guide's model starts at the prior median, as it does in whiten.
    target = Target(ModelCall(guide.model), guide.latents).log_prob
    start = (guide.fixed_map.loc, guide.fixed_map.scale)
    clock = time.perf_counter()
    path = quasi_newton_path(target, *start)
    gaussians = {
        "start": start,
        "quasi-Newton path": path,
        "batch and match from the start": batch_and_match(target, *start),
        "batch and match from the path": batch_and_match(target, *path),
    }
    seconds = time.perf_counter() - clock
    return {name: gaussian_elbo(target, *gaussian) for name, gaussian in gaussians.items()} | {"seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--database", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: [measure(make(options.database), seed) for seed in _SEEDS] for name, make in POSTERIORS.items()}
    machine = environment("pyro-ppl")
    columns = list(next(iter(results.values()))[0])
    rows = [[name, *(", ".join(f"{run[c]:.2f}" for run in runs) for c in columns)] for name, runs in results.items()]
    markdown = "\n\n".join(
        [
            "# Whitening: the ELBO of the Gaussian found",
            f"In nats, for seeds {_SEEDS}. Every method starts at the prior median with a scale of 0.1. {describe(machine)}",
            markdown_table(["posterior", *columns], rows),
        ]
    )
    write_results(options.out, {"environment": machine, "results": results}, markdown)
    print(markdown)


if __name__ == "__main__":
    main()
