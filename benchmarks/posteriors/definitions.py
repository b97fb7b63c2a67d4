"""The posteriors of posteriordb (Magnusson et al. 2024, arXiv:2407.04967) that the benchmark knows, by the name of their model.

A row has the Pyro model, the map from the data to its arguments and, where they differ, the map from the parameters of the
reference draws to its latent sites.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from . import processes, regression, schools, time_series
from .regression import centred, columns, standardised, with_interaction

Data = dict[str, Tensor]


@dataclass(frozen=True)
class Definition:
    """The way from data and reference draws to a posterior of the benchmark.

    Attributes:
        model: The Pyro model.
        arguments: The map from the data to its arguments.
        latents: The map from the parameters of the reference and the data to its latent sites; by default the parameters.
        log_scale: Parameters without a usable sd, which are judged on the log scale.
        log_evidence: The map from the arguments of the model to log Z, where there is a formula.
    """

    model: Callable
    arguments: Callable[[Data], tuple[Tensor, ...]]
    latents: Callable[[Data, Data], Data] = lambda reference, data: reference
    log_scale: tuple[str, ...] = ()
    log_evidence: Callable[..., float] | None = None


def _flat(design: Callable[[Data], Tensor], response: Callable[[Data], Tensor]) -> Definition:
    def arguments(data: Data) -> tuple[Tensor, Tensor]:
        return design(data), response(data)

    return Definition(regression.flat_regression, arguments, log_evidence=regression.flat_log_evidence)


def _kidscore(design: Callable[[Data], Tensor]) -> Definition:
    def arguments(data: Data) -> tuple[Tensor, Tensor]:
        return design(data), data["kid_score"]

    return Definition(regression.half_cauchy_regression, arguments, log_evidence=regression.half_cauchy_log_evidence)


def _volume(data: Data) -> Tensor:
    return data["diam1"] * data["diam2"] * data["canopy_height"]


MESQUITE = ("diam1", "diam2", "canopy_height", "total_height", "density")

DEFINITIONS: dict[str, Definition] = {
    "eight_schools_centered": Definition(
        schools.centered, lambda d: (d["y"], d["sigma"]), log_evidence=schools.log_evidence
    ),
    "eight_schools_noncentered": Definition(
        schools.noncentered,
        lambda d: (d["y"], d["sigma"]),
        schools.noncentered_latents,
        log_evidence=schools.log_evidence,
    ),
    "arK": Definition(
        regression.autoregression,
        regression.autoregressive_arguments,
        log_evidence=regression.autoregression_log_evidence,
    ),
    "garch11": Definition(
        time_series.garch11,
        lambda d: (d["y"], d["sigma1"]),
        time_series.garch11_latents,
    ),
    "gp_pois_regr": Definition(
        processes.poisson_process,
        lambda d: (d["x"], d["k"]),
        processes.poisson_process_latents,
    ),
    "hmm_example": Definition(
        time_series.gaussian_hmm,
        lambda d: (d["y"],),
        functools.partial(time_series.increment_latents, names=("mu",)),
    ),
    "hmm_drive_0": Definition(
        time_series.exponential_hmm,
        lambda d: (d["u"], d["v"], d["alpha"]),
        functools.partial(time_series.increment_latents, names=("phi", "lambda")),
    ),
    "one_comp_mm_elim_abs": Definition(
        processes.compartment, processes.compartment_arguments, log_scale=("K_m", "V_m")
    ),
    "kilpisjarvi": Definition(regression.line, regression.line_arguments, log_evidence=regression.line_log_evidence),
    "blr": Definition(
        regression.normal_regression,
        lambda d: (d["X"], d["y"]),
        log_evidence=regression.normal_regression_log_evidence,
    ),
    "diamonds": Definition(
        regression.heavy_tailed_regression,
        lambda d: regression.triangular_factor(centred(d["X"][:, 1:]), d["Y"]),
        log_evidence=regression.heavy_tailed_log_evidence,
    ),
    "nes": _flat(regression.election_design, lambda d: d["partyid7"]),
    "kidscore_momhs": _kidscore(lambda d: columns(1, d["mom_hs"])),
    "kidscore_momhsiq": _kidscore(lambda d: columns(1, d["mom_hs"], d["mom_iq"])),
    "kidscore_interaction": _kidscore(lambda d: with_interaction(d["mom_hs"], d["mom_iq"])),
    "kidscore_interaction_c": _flat(
        lambda d: with_interaction(centred(d["mom_hs"]), centred(d["mom_iq"])), lambda d: d["kid_score"]
    ),
    "kidscore_interaction_z": _flat(
        lambda d: with_interaction(standardised(d["mom_hs"]) / 2, standardised(d["mom_iq"]) / 2),
        lambda d: d["kid_score"],
    ),
    "logearn_height": _flat(lambda d: columns(1, d["height"]), lambda d: d["earn"].log()),
    "log10earn_height": _flat(lambda d: columns(1, d["height"]), lambda d: d["earn"].log10()),
    "logearn_logheight_male": _flat(lambda d: columns(1, d["height"].log(), d["male"]), lambda d: d["earn"].log()),
    "logearn_interaction_z": _flat(
        lambda d: with_interaction(standardised(d["height"]), d["male"]), lambda d: d["earn"].log()
    ),
    "mesquite": _flat(lambda d: columns(1, *(d[name] for name in MESQUITE), d["group"]), lambda d: d["weight"]),
    "logmesquite": _flat(
        lambda d: columns(1, *(d[name].log() for name in MESQUITE), d["group"]), lambda d: d["weight"].log()
    ),
    "logmesquite_logva": _flat(
        lambda d: columns(1, _volume(d).log(), (d["diam1"] * d["diam2"]).log(), d["group"]),
        lambda d: d["weight"].log(),
    ),
    "logmesquite_logvolume": _flat(lambda d: columns(1, _volume(d).log()), lambda d: d["weight"].log()),
}
