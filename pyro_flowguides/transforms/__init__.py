"""Bijections of R^D with exact log-determinants, one family per file; they know nothing of models."""

from .autoregressive import AffineAutoregressive, Autoregressive, SplineAutoregressive
from .base import Compose, FlowTransform, Inverse
from .coupling import AdditiveCoupling, AffineCoupling, Coupling, SplineCoupling
from .elementwise import Affine, Elementwise, ElementwiseSpline
from .linear import FixedAffine, LowerTriangularAffine, Permutation, Reverse
from .planar import Planar
from .radial import Radial
from .sylvester import Sylvester

__all__ = [
    "AdditiveCoupling",
    "Affine",
    "AffineAutoregressive",
    "AffineCoupling",
    "Autoregressive",
    "Compose",
    "Coupling",
    "Elementwise",
    "ElementwiseSpline",
    "FixedAffine",
    "FlowTransform",
    "Inverse",
    "LowerTriangularAffine",
    "Permutation",
    "Planar",
    "Radial",
    "Reverse",
    "Sylvester",
    "SplineAutoregressive",
    "SplineCoupling",
]
