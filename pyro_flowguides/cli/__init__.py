"""The command line: ``flowguides list``, ``fit``, ``compare`` and ``report``."""

from .commands import main
from .data import read_data

__all__ = ["main", "read_data"]
