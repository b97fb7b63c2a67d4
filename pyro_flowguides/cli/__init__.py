"""The command line: ``flowguides list``, ``flowguides fit`` and ``flowguides compare``."""

from .commands import main
from .data import read_data

__all__ = ["main", "read_data"]
