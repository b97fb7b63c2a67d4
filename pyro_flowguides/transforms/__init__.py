"""Bijections of ℝᴰ with exact log-determinants, one family per file; they know nothing of models."""

from .autoregressive import AffineAutoregressive, Autoregressive, SplineAutoregressive
from .base import Compose, FlowTransform, Inverse
from .continuous import Continuous, OdeError, ode_error
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
from .vector_fields import NetworkField, PlanarField, SylvesterField

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "Affine",
    "AffineAutoregressive",
    "AffineCoupling",
    "Autoregressive",
    "Compose",
    "Continuous",
    "Coupling",
    "Elementwise",
    "ElementwiseSpline",
    "FixedAffine",
    "FlowTransform",
    "Householder",
    "Inverse",
    "LowerTriangularAffine",
    "LULinear",
    "NetworkField",
    "OdeError",
    "Orthogonal",
    "Permutation",
    "Planar",
    "PlanarField",
    "Radial",
    "Residual",
    "Reverse",
    "Reversible",
    "Sigmoid",
    "SplineAutoregressive",
    "SplineCoupling",
    "Sylvester",
    "SylvesterField",
    "detect_nan",
    "ode_error",
    "undamp",
]
