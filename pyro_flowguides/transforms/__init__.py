"""Bijections of ℝᴰ with exact log-determinants, one family per file; they know nothing of models."""

from .autoregressive import AffineAutoregressive, Autoregressive, SplineAutoregressive
from .base import Compose, FlowTransform, Inverse
from .coupling import AdditiveCoupling, AffineCoupling, Coupling, SplineCoupling, undamp
from .elementwise import ActNorm, Affine, Elementwise, ElementwiseSpline, Sigmoid
from .linear import FixedAffine, LowerTriangularAffine, LULinear, Permutation, Reverse
from .nan import detect_nan
from .orthogonal import Householder, Orthogonal
from .planar import Planar
from .radial import Radial
from .residual import Residual
from .reversible import Reversible
from .sylvester import Sylvester

__all__ = [
    "ActNorm",
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
    "Householder",
    "Inverse",
    "LowerTriangularAffine",
    "LULinear",
    "Orthogonal",
    "Permutation",
    "Planar",
    "Radial",
    "Residual",
    "Reverse",
    "Reversible",
    "Sigmoid",
    "SplineAutoregressive",
    "SplineCoupling",
    "Sylvester",
    "detect_nan",
    "undamp",
]
