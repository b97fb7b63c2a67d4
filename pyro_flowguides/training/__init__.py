"""Fitting a guide to a model."""

from .checkpoint import Checkpoint
from .fit import fit
from .result import FitResult

__all__ = ["Checkpoint", "FitResult", "fit"]
