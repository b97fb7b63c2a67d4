"""SVI whose whole step is captured as one graph."""

from .losses import IWELBO, KL, Objective, PyroELBO
from .snapshot import Snapshot
from .svi import CompiledSVI

__all__ = ["IWELBO", "KL", "CompiledSVI", "Objective", "PyroELBO", "Snapshot"]
