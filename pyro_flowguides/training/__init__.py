"""Fitting a guide to a model."""

from .fit import FlowFit, fit

__all__ = ["FlowFit", "fit"]
