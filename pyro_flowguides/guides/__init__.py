"""Autoguides whose posterior is a normalizing flow."""

from .amortized import AmortizedFlow
from .auto import AutoFlow
from .base import FlowGuide
from .mixture import AutoMixture
from .named import (
    AutoContinuousFlow,
    AutoCoupling,
    AutoIAF,
    AutoPlanar,
    AutoRadial,
    AutoResidual,
    AutoSpline,
    AutoSylvester,
)

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
    "FlowGuide",
]
