"""A report on a posterior: one HTML file with the verdict, the estimates, pictures, and how it was made."""

from .content import Report, gather
from .page import fragment, page

__all__ = ["Report", "fragment", "gather", "page"]
