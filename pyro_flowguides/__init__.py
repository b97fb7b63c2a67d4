"""Normalizing-flow guides for Pyro: variational inference with near-NUTS posteriors."""

__version__ = "0.1.0"

from . import bases, flows, transforms
from .amortized import AmortizedFlow
from .diagnostics import Draws, Estimate, draw
from .flows import NormalizingFlow
from .guides import AutoCoupling, AutoFlow, AutoIAF, AutoPlanar, AutoRadial, AutoResidual, AutoSpline, AutoSylvester
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
    "CompiledSVI",
    "Draws",
    "Estimate",
    "FlowFit",
    "IWELBO",
    "NormalizingFlow",
    "__version__",
    "bases",
    "draw",
    "fit",
    "flows",
    "transforms",
]
