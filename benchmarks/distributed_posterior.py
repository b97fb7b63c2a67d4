"""The posterior of 20,000 rows from one process and from two that divide the rows, weighed on all rows.

    python -m benchmarks.distributed_posterior [--quick]

The negative binomial regression of the RAND health insurance experiment, as in the tutorial on minibatches. In both cases a
process takes batches of 200 rows. The importance weights are of all rows, so that both estimate the same posterior, with a
Monte-Carlo error that they tell.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import pyro_flowguides as fg

from .common import describe, environment, in_processes, markdown_table, write_results

_NUM_STEPS, _NUM_PARTICLES, _BATCH_SIZE, _NUM_SOME, _NUM_DRAWS = 2000, 16, 200, 2000, 2000


def visits_to_the_doctor() -> tuple[Tensor, Tensor, list[str]]:
    """Standardised covariates with an intercept, the visits, and the names of the coefficients."""
    import statsmodels.api as sm

    data = sm.datasets.randhie.load_pandas()
    exog = data.exog
    design = np.column_stack([np.ones(len(exog)), (exog - exog.mean()) / exog.std()])
    visits = torch.tensor(data.endog.to_numpy(), dtype=torch.float32)
    return torch.tensor(design, dtype=torch.float32), visits, ["intercept", *exog.columns]


def work(num_steps: int, num_draws: int) -> dict[str, Any] | None:
    """Means of the coefficients, their standard errors and sds, in the first process."""
    torch.set_num_threads(1)
    x, visits, names = visits_to_the_doctor()

    def model(x: Tensor, visits: Tensor) -> None:
        with pyro.plate("coefficient", x.shape[-1]):
            beta = pyro.sample("beta", dist.Normal(0.0, 2.0))
        alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
        with pyro.plate("row", len(design), subsample_size=len(x)):
            logits = beta @ x.T + alpha.log()
            pyro.sample("visits", dist.NegativeBinomial(1 / alpha, logits=logits), obs=visits)

    design = x
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:_NUM_SOME]
    loader = DataLoader(TensorDataset(x, visits), batch_size=_BATCH_SIZE, shuffle=True, drop_last=True)
    fit = fg.fit(
        model,
        fg.AutoCoupling(model),
        x[some],
        visits[some],
        batches=loader,
        num_steps=num_steps,
        num_particles=_NUM_PARTICLES,
        seed=1,
        progress=False,
    )
    if int(os.environ.get("RANK", 0)):
        return None
    draws = fg.draw(model, fit.guide, x, visits, num_samples=num_draws, seed=2)
    values = {name: np.asarray(value) for name, value in draws.posterior().items()}
    table = np.column_stack([values["beta"], values["alpha"]])
    weights = draws.weights.weights
    mean = weights @ table
    # Of a self-normalised estimate.
    se = np.sqrt(((weights[:, None] * (table - mean)) ** 2).sum(0))
    sd = np.sqrt(weights @ (table - mean) ** 2)
    return {
        "names": [*names, "alpha"],
        "mean": mean.tolist(),
        "se": se.tolist(),
        "sd": sd.tolist(),
        "khat": draws.khat.value,
        "ess": draws.ess.value,
        "seconds": fit.wall_time,
    }


def run(num_processes: int, num_steps: int, num_draws: int) -> dict[str, Any]:
    """The result of :func:`work` in so many new processes."""
    return in_processes(
        "benchmarks.distributed_posterior", num_processes, "--worker", "--steps", num_steps, "--draws", num_draws
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=_NUM_STEPS)
    parser.add_argument("--draws", type=int, default=_NUM_DRAWS)
    parser.add_argument("--quick", action="store_true", help="few steps and draws")
    parser.add_argument("--worker", action="store_true", help="fit in this process")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "distributed_posterior.json")
    options = parser.parse_args()
    if options.worker:
        result = work(options.steps, options.draws)
        if result is not None:
            print(json.dumps(result), flush=True)
        return
    num_steps, num_draws = (60, 200) if options.quick else (options.steps, options.draws)
    machine = environment("pyro-ppl", "pyro_flowguides", "statsmodels")
    one, two = (run(number, num_steps, num_draws) for number in (1, 2))
    distances = [
        abs(first - second) / np.hypot(first_se, second_se)
        for first, second, first_se, second_se in zip(one["mean"], two["mean"], one["se"], two["se"], strict=True)
    ]
    rows = [
        [
            name,
            f"{one['mean'][index]:.4f} ± {one['se'][index]:.4f}",
            f"{two['mean'][index]:.4f} ± {two['se'][index]:.4f}",
            f"{distances[index]:.1f}",
            f"{two['sd'][index] / one['sd'][index]:.3f}",
        ]
        for index, name in enumerate(one["names"])
    ]
    header = ["", "one process, mean", "two, mean", "difference in standard errors", "ratio of the sds"]
    write_results(
        options.out,
        {"environment": machine, "one": one, "two": two},
        "# The posterior of two processes that divide the rows, against one\n\n"
        "Negative binomial regression on 20,190 rows, `AutoCoupling`, batches of 200 rows in each process, "
        f"{num_steps} steps, {num_draws} draws weighed on all rows. k-hat {one['khat']:.2f} for one process and "
        f"{two['khat']:.2f} for two, effective draws {one['ess']:.0f} and {two['ess']:.0f}. "
        f"The largest of {len(rows)} differences is {max(distances):.1f} standard errors.\n\n"
        f"{markdown_table(header, rows)}\n\n{describe(machine)}\n",
    )
    print(f"largest difference: {max(distances):.1f} standard errors", flush=True)


if __name__ == "__main__":
    main()
