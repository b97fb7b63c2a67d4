"""Bijections of ℝᴰ with exact log-determinants, one family per file; they know nothing of models."""

from .autoregressive import AffineAutoregressive, Autoregressive, MixtureAutoregressive, SplineAutoregressive
from .base import Compose, FlowTransform, Inverse, detect_nan
from .coupling import AdditiveCoupling, AffineCoupling, Coupling, MixtureCoupling, SplineCoupling, undamp
from .elementwise import ActNorm, Affine, Elementwise, ElementwiseMixture, ElementwiseSpline, Sigmoid
from .image import (
    ImageActNorm,
    ImageCoupling,
    InvertibleConvolution,
    Pixelwise,
    channel_mask,
    checkerboard_mask,
)
from .linear import FixedAffine, LowerTriangularAffine, LULinear, Permutation, Reverse
from .multiscale import Split, Squeeze, Unsqueeze
from .orthogonal import Householder, Orthogonal
from .planar import Planar
from .radial import Radial
from .residual import Residual
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
    "LowerTriangularAffine",
    "MixtureAutoregressive",
    "MixtureCoupling",
    "Orthogonal",
    "Permutation",
    "Pixelwise",
    "Planar",
    "Radial",
    "Residual",
    "Reverse",
    "Sigmoid",
    "SplineAutoregressive",
    "SplineCoupling",
    "Split",
    "Squeeze",
    "Sylvester",
    "Unsqueeze",
    "channel_mask",
    "checkerboard_mask",
    "detect_nan",
    "undamp",
]
