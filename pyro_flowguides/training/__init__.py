"""Fitting a guide to a model, and a density to data."""

from .checkpoint import Checkpoint
from .density_fit import DensityFit
from .fit import fit
from .fit_density import fit_density
from .from_draws import fit_to_draws
from .result import FitResult

__all__ = ["Checkpoint", "DensityFit", "FitResult", "fit", "fit_density", "fit_to_draws"]
