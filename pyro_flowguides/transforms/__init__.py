"""Bijections of ℝᴰ with exact log-determinants, one family per file; they know nothing of models."""

from .autoregressive import AffineAutoregressive, Autoregressive, MixtureAutoregressive, SplineAutoregressive
from .base import Compose, FlowTransform, Inverse
from .continuous import Continuous, OdeError, ode_error
from .coupling import AdditiveCoupling, AffineCoupling, Coupling, MixtureCoupling, SplineCoupling, undamp
from .elementwise import ActNorm, Affine, Elementwise, ElementwiseMixture, ElementwiseSpline, Sigmoid
from .fixed import FixedAffine, LowRank, Standardized
from .image import (
    ImageActNorm,
    ImageCoupling,
    InvertibleConvolution,
    Pixelwise,
    channel_mask,
    checkerboard_mask,
)
from .linear import LowerTriangularAffine, LowRankAffine, LULinear, Permutation, Reverse
from .multiscale import Split, Squeeze, Unsqueeze
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
    "ElementwiseMixture",
    "ElementwiseSpline",
    "FixedAffine",
    "FlowTransform",
    "Householder",
    "ImageActNorm",
    "ImageCoupling",
    "Inverse",
    "InvertibleConvolution",
    "LULinear",
    "NetworkField",
    "OdeError",
    "LowRank",
    "LowRankAffine",
    "LowerTriangularAffine",
    "MixtureAutoregressive",
    "MixtureCoupling",
    "Orthogonal",
    "Permutation",
    "Pixelwise",
    "Planar",
    "PlanarField",
    "Radial",
    "Residual",
    "Reverse",
    "Reversible",
    "Sigmoid",
    "SplineAutoregressive",
    "SplineCoupling",
    "Split",
    "Squeeze",
    "Standardized",
    "Sylvester",
    "SylvesterField",
    "Unsqueeze",
    "channel_mask",
    "checkerboard_mask",
    "detect_nan",
    "ode_error",
    "undamp",
]
