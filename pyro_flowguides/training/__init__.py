"""Fitting a guide to a model."""

from .fit import fit
from .result import FlowFit

__all__ = ["FlowFit", "fit"]
