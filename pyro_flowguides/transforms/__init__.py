"""Bijections of R^D with exact log-determinants, one family per file; they know nothing of models."""

from .base import Compose, FlowTransform, Inverse
from .coupling import AdditiveCoupling, AffineCoupling, Coupling
from .elementwise import Affine, Elementwise
from .linear import FixedAffine, LowerTriangularAffine, Permutation, Reverse
from .planar import Planar
from .residual import Residual

__all__ = [
    "AdditiveCoupling",
    "Affine",
    "AffineCoupling",
    "Compose",
    "Coupling",
    "Elementwise",
    "FixedAffine",
    "FlowTransform",
    "Inverse",
    "LowerTriangularAffine",
    "Permutation",
    "Planar",
    "Residual",
    "Reverse",
]
