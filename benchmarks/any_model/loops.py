"""What it costs to record a loop over time, by its length, and from which length on ``fit`` refuses."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine

from pyro_flowguides.model import recording
from pyro_flowguides.model.batched import BatchedModel
from pyro_flowguides.model.call import ModelCall
from pyro_flowguides.model.sites import latent_sites

from ..common import describe, environment, markdown_table, write_results
from .series import local_level, volatility

LENGTHS = (35, 100, 250, 500, 1000, 2000)
MODELS = {"stochastic volatility": volatility, "local level, in place": local_level}


def loops(out: Path) -> None:
    """Records each model for series of several lengths, and writes a table."""
    rows = [{"model": name, "length": length, **cost(name, length)} for name in MODELS for length in LENGTHS]
    machine = environment("pyro-ppl", "pyro-flowguides")
    lines = [
        [row["model"], str(row["length"]), f"{row['seconds']:.1f}" if row["error"] is None else row["error"]]
        for row in rows
    ]
    markdown = (
        "# Recording a loop over time\n\n"
        "Seconds to record the log joint of one draw with its gradient; a fit records it once, and captures the step as well. "
        f"More than {recording.MAX_OPERATIONS} operations are refused. {describe(machine)}\n\n"
    )
    table = markdown_table(["model", "time steps", "seconds, or why not"], lines)
    write_results(out, {"environment": machine, "rows": rows}, markdown + table)
    print(table)


def cost(name: str, length: int) -> dict[str, Any]:
    """The time to record a model, and the error where it is refused."""
    pyro.set_rng_seed(0)
    model, y = MODELS[name], 0.3 * torch.randn(length)
    with pyro.validation_enabled(False):
        trace = poutine.trace(model).get_trace(y)
        values = {site: value["value"].unsqueeze(0) for site, value in latent_sites(trace)}
        batched = BatchedModel(ModelCall(model, (y,), {}), trace, list(values))
        begin = time.perf_counter()
        try:
            batched.log_prob(values)
        except recording.CaptureError as error:
            return {"seconds": time.perf_counter() - begin, "error": str(error)}
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "error": None}
