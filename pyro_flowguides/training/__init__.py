"""Fitting a guide to a model."""

from .fit import fit
from .losses import IWELBO
from .result import FlowFit
from .svi import CompiledSVI

__all__ = ["IWELBO", "CompiledSVI", "FlowFit", "fit"]
