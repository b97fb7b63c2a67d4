"""SVI whose whole step is captured as one graph."""

from .losses import IWELBO
from .svi import CompiledSVI

__all__ = ["IWELBO", "CompiledSVI"]
