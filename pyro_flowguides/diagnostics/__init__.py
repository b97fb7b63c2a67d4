"""What to make of a fit: draws with their densities, importance weights, ArviZ, pandas, plots."""

from .compare import compare
from .draws import Draws
from .importance import Estimate
from .mode_finder import find_modes
from .modes import Mode, Modes
from .plots import plot_elbo, plot_flow, plot_marginals, plot_modes, plot_weights, plot_weights_of
from .posterior import to_arviz
from .sampling import draw
from .verdicts import Verdict, VerdictKind

__all__ = [
    "Draws",
    "Estimate",
    "Mode",
    "Modes",
    "Verdict",
    "VerdictKind",
    "compare",
    "draw",
    "find_modes",
    "plot_elbo",
    "plot_flow",
    "plot_marginals",
    "plot_modes",
    "plot_weights",
    "plot_weights_of",
    "to_arviz",
]
