"""Bundled models with their data: for the command line, the tutorials and the tests."""

from .eight_schools import EIGHT_SCHOOLS, EIGHT_SCHOOLS_CENTERED
from .example import Example

EXAMPLES: dict[str, Example] = {example.name: example for example in (EIGHT_SCHOOLS, EIGHT_SCHOOLS_CENTERED)}

__all__ = ["EXAMPLES", "EIGHT_SCHOOLS", "EIGHT_SCHOOLS_CENTERED", "Example"]
