"""Normalizing-flow guides for Pyro: variational inference with near-NUTS posteriors."""

__version__ = "0.1.0"

from . import bases, flows, transforms
from .calibration import Calibration, check_calibration
from .compiled import IWELBO, CompiledSVI, FlowAnnealedBootstrap
from .diagnostics import (
    Draws,
    Estimate,
    Mode,
    Modes,
    Verdict,
    VerdictKind,
    compare,
    draw,
    find_modes,
    plot_elbo,
    plot_flow,
    plot_marginals,
    plot_modes,
    plot_weights,
    plot_weights_of,
    to_arviz,
)
from .distributions import FlowMixture, NormalizingFlow
from .guides import (
    AmortizedFlow,
    AutoContinuousFlow,
    AutoCoupling,
    AutoFlow,
    AutoIAF,
    AutoMixture,
    AutoPlanar,
    AutoRadial,
    AutoResidual,
    AutoSpline,
    AutoSylvester,
)
from .model.log_density import LogDensity
from .training import Checkpoint, DensityFit, FitResult, fit, fit_density, fit_to_draws

__all__ = [
    "AmortizedFlow",
    "AutoContinuousFlow",
    "AutoCoupling",
    "AutoFlow",
    "AutoIAF",
    "AutoMixture",
    "AutoPlanar",
    "AutoRadial",
    "AutoResidual",
    "AutoSpline",
    "AutoSylvester",
    "Calibration",
    "Checkpoint",
    "CompiledSVI",
    "DensityFit",
    "Draws",
    "Estimate",
    "FitResult",
    "FlowAnnealedBootstrap",
    "FlowMixture",
    "IWELBO",
    "LogDensity",
    "Mode",
    "Modes",
    "NormalizingFlow",
    "Verdict",
    "VerdictKind",
    "__version__",
    "bases",
    "check_calibration",
    "compare",
    "draw",
    "find_modes",
    "fit",
    "fit_density",
    "fit_to_draws",
    "flows",
    "plot_elbo",
    "plot_flow",
    "plot_marginals",
    "plot_modes",
    "plot_weights",
    "plot_weights_of",
    "to_arviz",
    "transforms",
]
