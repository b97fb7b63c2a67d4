"""The contracts of a transform and of a guide as checks that a user runs on transforms and guides of their own."""

from .guides import check_guide
from .transforms import check_transform

__all__ = ["check_guide", "check_transform"]
