"""The table of transforms that every test of the contract runs over; a new family adds its rows here."""

import torch

from pyro_flowguides import transforms as T
from pyro_flowguides.testing.law import perturb


def _fixed_affine(dim, context_dim):
    return T.FixedAffine(torch.randn(dim), torch.randn(dim, dim).tril(-1) / dim**0.5 + torch.eye(dim))


def _fixed_low_rank_affine(dim, context_dim):
    # Orthonormal to the last digit of float64.
    directions = torch.linalg.qr(torch.randn(dim, min(dim, 2), dtype=torch.float64)).Q
    scale = T.LowRank(torch.rand(dim).double() + 0.5, directions, 2 * torch.rand(min(dim, 2)).double() + 0.2)
    return T.FixedAffine(torch.randn(dim).double(), scale)


def _image_shape(dim):
    return (4, 4, 4) if dim == 64 else (dim, 1, 1)


# name -> constructor(dim, context_dim)
CONDITIONAL = {
    "planar": lambda dim, context_dim: T.Planar(dim, context_dim=context_dim),
    "radial": lambda dim, context_dim: T.Radial(dim, context_dim=context_dim),
    "sylvester_qr": lambda dim, context_dim: T.Sylvester(dim, min(dim, 3), context_dim=context_dim),
    "sylvester_qr_full": lambda dim, context_dim: T.Sylvester(dim, dim, context_dim=context_dim),
    "sylvester_householder": lambda dim, context_dim: T.Sylvester(dim, basis="householder", context_dim=context_dim),
    "sylvester_triangular": lambda dim, context_dim: T.Sylvester(dim, basis="triangular", context_dim=context_dim),
    "sylvester_triangular_reversed": lambda dim, context_dim: T.Sylvester(
        dim, basis="triangular", reverse=True, context_dim=context_dim
    ),
    "affine_coupling": lambda dim, context_dim: T.AffineCoupling(dim, context_dim=context_dim, hidden_dims=(8,)),
    "affine_coupling_checkerboard": lambda dim, context_dim: T.AffineCoupling(
        dim, mask="checkerboard", flip=True, context_dim=context_dim
    ),
    "affine_coupling_mask": lambda dim, context_dim: T.AffineCoupling(
        dim, mask=torch.arange(dim) % 3 == 1, context_dim=context_dim
    ),
    "affine_coupling_damped": lambda dim, context_dim: T.AffineCoupling(dim, context_dim=context_dim, damped=True),
    "additive_coupling": lambda dim, context_dim: T.AdditiveCoupling(dim, context_dim=context_dim),
    "affine_autoregressive": lambda dim, context_dim: T.AffineAutoregressive(
        dim, context_dim=context_dim, hidden_dims=(8,)
    ),
    "affine_autoregressive_narrow": lambda dim, context_dim: T.AffineAutoregressive(
        dim, context_dim=context_dim, hidden_dims=(2, 1, 3)
    ),
    "inverse_of_affine_autoregressive": lambda dim, context_dim: T.Inverse(
        T.AffineAutoregressive(dim, context_dim=context_dim)
    ),
    "spline_coupling": lambda dim, context_dim: T.SplineCoupling(dim, context_dim=context_dim, tail_bound=3.0),
    "spline_autoregressive": lambda dim, context_dim: T.SplineAutoregressive(
        dim, context_dim=context_dim, num_bins=5, tail_bound=3.0
    ),
    "mixture_coupling": lambda dim, context_dim: T.MixtureCoupling(dim, context_dim=context_dim, num_components=4),
    "mixture_autoregressive": lambda dim, context_dim: T.MixtureAutoregressive(
        dim, context_dim=context_dim, num_components=2
    ),
    "elementwise_spline": lambda dim, context_dim: T.ElementwiseSpline(dim, context_dim=context_dim, tail_bound=3.0),
    "affine": lambda dim, context_dim: T.Affine(dim, context_dim=context_dim),
    "affine_without_hidden_layers": lambda dim, context_dim: T.Affine(dim, context_dim=context_dim, hidden_dims=()),
    "lower_triangular_affine": lambda dim, context_dim: T.LowerTriangularAffine(dim, context_dim=context_dim),
    "standardized": lambda dim, context_dim: T.Standardized(
        T.ElementwiseSpline(dim, context_dim=context_dim, tail_bound=3.0), torch.randn(dim), torch.rand(dim) + 0.5
    ),
    "low_rank_affine": lambda dim, context_dim: T.LowRankAffine(dim, 3, context_dim=context_dim),
    "act_norm": lambda dim, context_dim: T.ActNorm(dim, context_dim=context_dim),
    "lu_linear": lambda dim, context_dim: T.LULinear(dim, context_dim=context_dim),
    "orthogonal": lambda dim, context_dim: T.Orthogonal(dim, context_dim=context_dim),
    "householder": lambda dim, context_dim: T.Householder(dim, context_dim=context_dim),
    "householder_odd": lambda dim, context_dim: T.Householder(dim, num_reflections=3, context_dim=context_dim),
    "residual": lambda dim, context_dim: T.Residual(dim, hidden_dims=(16, 16), context_dim=context_dim),
    "residual_narrow": lambda dim, context_dim: T.Residual(
        dim, hidden_dims=(8, 5, 6), lipschitz=0.97, context_dim=context_dim
    ),
    "continuous_planar": lambda dim, context_dim: T.Continuous(
        dim, T.PlanarField(dim, 4, context_dim=context_dim), num_steps=8
    ),
    "continuous_sylvester": lambda dim, context_dim: T.Continuous(
        dim, T.SylvesterField(dim, min(dim, 3), context_dim=context_dim), num_steps=8
    ),
    "continuous_network": lambda dim, context_dim: T.Continuous(
        dim, T.NetworkField(dim, (8,), context_dim=context_dim), num_steps=3
    ),
    "pixelwise": lambda dim, context_dim: T.Pixelwise(
        _image_shape(dim), T.AffineCoupling(_image_shape(dim)[0], context_dim=context_dim)
    ),
    "invertible_convolution": lambda dim, context_dim: T.InvertibleConvolution(
        _image_shape(dim), context_dim=context_dim
    ),
    "image_act_norm": lambda dim, context_dim: T.ImageActNorm(_image_shape(dim), context_dim=context_dim),
    "image_coupling_channel": lambda dim, context_dim: T.ImageCoupling(
        _image_shape(dim), hidden_channels=5, context_dim=context_dim
    ),
    "image_coupling_checkerboard": lambda dim, context_dim: T.ImageCoupling(
        (1, 8, dim // 8) if dim == 64 else (1, dim, 1),
        T.univariate.RationalQuadraticSpline(3, 3.0),
        mask="checkerboard",
        flip=True,
        hidden_channels=4,
        context_dim=context_dim,
    ),
    "split": lambda dim, context_dim: T.Split(dim, T.AffineCoupling(max(dim // 2, 1), context_dim=context_dim)),
    "inverse_of_planar": lambda dim, context_dim: T.Inverse(T.Planar(dim, context_dim=context_dim)),
    "compose": lambda dim, context_dim: T.Compose(
        [
            T.AffineCoupling(dim, context_dim=context_dim),
            T.Reverse(dim),
            T.Planar(dim, context_dim=context_dim),
            T.Inverse(T.AffineCoupling(dim, context_dim=context_dim)),
        ]
    ),
    "reversible": lambda dim, context_dim: T.Reversible(
        [
            T.AffineCoupling(dim, context_dim=context_dim),
            T.Compose([T.Reverse(dim), T.ActNorm(dim, context_dim=context_dim)]),
            T.Inverse(T.AdditiveCoupling(dim, flip=True, context_dim=context_dim)),
        ]
    ),
}
UNCONDITIONAL = {
    "permutation": lambda dim, context_dim: T.Permutation(torch.randperm(dim)),
    "reverse": lambda dim, context_dim: T.Reverse(dim),
    "fixed_affine": _fixed_affine,
    "fixed_affine_diagonal": lambda dim, context_dim: T.FixedAffine(torch.randn(dim), torch.rand(dim) + 0.5),
    "fixed_affine_low_rank": _fixed_low_rank_affine,
    "sigmoid": lambda dim, context_dim: T.Sigmoid(dim),
}
CONTEXT_DIM = 3

CASES = [(name, 0) for name in CONDITIONAL | UNCONDITIONAL] + [(name, CONTEXT_DIM) for name in CONDITIONAL]
# Transforms with parameters that start as the identity. An orthogonal map has no parameters for D = 1 (a rotation) or
# none that matter there (reflections); test_linear.py has their start for D > 1.
_NO_IDENTITY_AT_START = {"compose", "reversible", "orthogonal", "householder", "householder_odd"}
IDENTITY_AT_START = [case for case in CASES if case[0] in CONDITIONAL and case[0] not in _NO_IDENTITY_AT_START]
# Transforms whose score at far points is beyond the range of float32: that of the sigmoid grows like exp(|z|).
SCORE_OVERFLOWS = {"sigmoid"}
# log_det and score of these are right up to the error of a solver, here with few steps; test_continuous.py has many.
SOLVED = {"continuous_planar", "continuous_sylvester", "continuous_network"}


def case_id(case):
    return case[0] + ("_with_context" if case[1] else "")


def build(case, dim, dtype):
    """The transform of a case as it starts, in the given dtype."""
    name, context_dim = case
    return (CONDITIONAL | UNCONDITIONAL)[name](dim, context_dim).to(dtype)


def build_perturbed(case, dim, dtype):
    return perturb(build(case, dim, dtype))


def make_context(case, batch_shape, dtype):
    return torch.randn(*batch_shape, case[1], dtype=dtype) if case[1] else None


def check_finite_with_gradients(transform, z):
    """Forward, inverse and score have finite values, and finite gradients to the points and the parameters."""
    z = z.clone().requires_grad_()
    x, log_det, score = transform.forward_with_score(z, -z.detach())
    z_back, inverse_log_det = transform.inverse_and_log_det(x.detach().requires_grad_())
    for value in (x, log_det, score, z_back, inverse_log_det):
        assert value.isfinite().all()
    (x.sum() + log_det.sum() + z_back.sum() + inverse_log_det.sum()).backward()
    assert z.grad.isfinite().all()
    for parameter in transform.parameters():
        assert parameter.grad.isfinite().all()
    return x.detach(), z_back.detach()


def check_far_points_come_back(transform, scale):
    """In float32 and, to more digits, in float64."""
    z = scale * torch.randn(20, transform.dim)
    x, z_back = check_finite_with_gradients(transform, z)
    torch.testing.assert_close(transform(z_back), x, rtol=2e-4, atol=1e-5 * scale)
    exact, _ = transform.double().inverse_and_log_det(transform(z.double()))
    torch.testing.assert_close(exact, z.double(), rtol=1e-9, atol=1e-9)
