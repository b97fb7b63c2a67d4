"""What to make of a fit: draws with their densities, importance weights, ArviZ, pandas, plots."""

from .draws import Draws, draw
from .importance import Estimate
from .plots import plot_elbo, plot_flow, plot_marginals, plot_weights

__all__ = ["Draws", "Estimate", "draw", "plot_elbo", "plot_flow", "plot_marginals", "plot_weights"]
