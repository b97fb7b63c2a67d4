"""SVI whose whole step is captured as one graph."""

from .bootstrap import FlowAnnealedBootstrap
from .losses import IWELBO, KL, Objective, PyroELBO
from .snapshot import Snapshot
from .svi import CompiledSVI

__all__ = ["IWELBO", "KL", "CompiledSVI", "FlowAnnealedBootstrap", "Objective", "PyroELBO", "Snapshot"]
