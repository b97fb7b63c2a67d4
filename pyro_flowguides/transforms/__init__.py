"""Bijections of R^D with exact log-determinants, one family per file; they know nothing of models."""

from .base import Compose, FlowTransform, Inverse
from .coupling import AdditiveCoupling, AffineCoupling, Coupling
from .elementwise import ActNorm, Affine, Elementwise, Sigmoid
from .linear import FixedAffine, LowerTriangularAffine, LULinear, Permutation, Reverse
from .orthogonal import Householder, Orthogonal
from .planar import Planar
from .residual import Residual

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "Affine",
    "AffineCoupling",
    "Compose",
    "Coupling",
    "Elementwise",
    "FixedAffine",
    "FlowTransform",
    "Householder",
    "Inverse",
    "LULinear",
    "LowerTriangularAffine",
    "Orthogonal",
    "Permutation",
    "Planar",
    "Residual",
    "Reverse",
    "Sigmoid",
]
