"""Normalizing-flow guides for Pyro: variational inference with near-NUTS posteriors."""

__version__ = "0.1.0"

from . import bases, flows, transforms
from .amortized import AmortizedFlow
from .calibration import Calibration, calibration
from .compare import compare
from .diagnostics import Draws, Estimate, draw, plot_elbo, plot_flow, plot_marginals, plot_weights
from .flows import NormalizingFlow
from .guides import AutoCoupling, AutoFlow, AutoIAF, AutoPlanar, AutoRadial, AutoResidual, AutoSpline, AutoSylvester
from .posteriors import to_arviz
from .training import IWELBO, CompiledSVI, FlowFit, fit

__all__ = [
    "AmortizedFlow",
    "AutoCoupling",
    "AutoFlow",
    "AutoIAF",
    "AutoPlanar",
    "AutoRadial",
    "AutoResidual",
    "AutoSpline",
    "AutoSylvester",
    "Calibration",
    "CompiledSVI",
    "Draws",
    "Estimate",
    "FlowFit",
    "IWELBO",
    "NormalizingFlow",
    "__version__",
    "bases",
    "calibration",
    "compare",
    "draw",
    "fit",
    "flows",
    "plot_elbo",
    "plot_flow",
    "plot_marginals",
    "plot_weights",
    "to_arviz",
    "transforms",
]
