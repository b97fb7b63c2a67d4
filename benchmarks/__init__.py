"""Comparisons with other libraries of normalizing flows; not part of the installed package."""
