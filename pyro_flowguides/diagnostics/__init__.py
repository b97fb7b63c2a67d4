"""What to make of a fit: draws with their densities, importance weights, ArviZ, pandas, plots."""

from .draws import Draws, draw
from .importance import Estimate

__all__ = ["Draws", "Estimate", "draw"]
