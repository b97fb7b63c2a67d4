"""The table of transforms that every test of the contract runs over; a new family adds its rows here."""

import torch

from pyro_flowguides import transforms as T


def _fixed_affine(dim, context_dim):
    return T.FixedAffine(torch.randn(dim), torch.randn(dim, dim).tril(-1) / dim**0.5 + torch.eye(dim))


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
    "elementwise_spline": lambda dim, context_dim: T.ElementwiseSpline(dim, context_dim=context_dim, tail_bound=3.0),
    "affine": lambda dim, context_dim: T.Affine(dim, context_dim=context_dim),
    "affine_without_hidden_layers": lambda dim, context_dim: T.Affine(dim, context_dim=context_dim, hidden_dims=()),
    "lower_triangular_affine": lambda dim, context_dim: T.LowerTriangularAffine(dim, context_dim=context_dim),
    "act_norm": lambda dim, context_dim: T.ActNorm(dim, context_dim=context_dim),
    "lu_linear": lambda dim, context_dim: T.LULinear(dim, context_dim=context_dim),
    "orthogonal": lambda dim, context_dim: T.Orthogonal(dim, context_dim=context_dim),
    "householder": lambda dim, context_dim: T.Householder(dim, context_dim=context_dim),
    "householder_odd": lambda dim, context_dim: T.Householder(dim, num_reflections=3, context_dim=context_dim),
    "residual": lambda dim, context_dim: T.Residual(dim, hidden_dims=(16, 16), context_dim=context_dim),
    "residual_narrow": lambda dim, context_dim: T.Residual(
        dim, hidden_dims=(8, 5, 6), lipschitz=0.97, context_dim=context_dim
    ),
    "inverse_of_planar": lambda dim, context_dim: T.Inverse(T.Planar(dim, context_dim=context_dim)),
    "compose": lambda dim, context_dim: T.Compose(
        [
            T.AffineCoupling(dim, context_dim=context_dim),
            T.Reverse(dim),
            T.Planar(dim, context_dim=context_dim),
            T.Inverse(T.AffineCoupling(dim, context_dim=context_dim)),
        ]
    ),
}
UNCONDITIONAL = {
    "permutation": lambda dim, context_dim: T.Permutation(torch.randperm(dim)),
    "reverse": lambda dim, context_dim: T.Reverse(dim),
    "fixed_affine": _fixed_affine,
    "fixed_affine_diagonal": lambda dim, context_dim: T.FixedAffine(torch.randn(dim), torch.rand(dim) + 0.5),
    "sigmoid": lambda dim, context_dim: T.Sigmoid(dim),
}
CONTEXT_DIM = 3

CASES = [(name, 0) for name in CONDITIONAL | UNCONDITIONAL] + [(name, CONTEXT_DIM) for name in CONDITIONAL]
# Transforms with parameters that start as the identity. An orthogonal map has no parameters for D = 1 (a rotation) or
# none that matter there (reflections); test_linear.py has their start for D > 1.
_NO_IDENTITY_AT_START = {"compose", "orthogonal", "householder", "householder_odd"}
IDENTITY_AT_START = [case for case in CASES if case[0] in CONDITIONAL and case[0] not in _NO_IDENTITY_AT_START]
# Transforms whose score at far points is beyond the range of float32: that of the sigmoid grows like exp(|z|).
SCORE_OVERFLOWS = {"sigmoid"}


def case_id(case):
    return case[0] + ("_with_context" if case[1] else "")


def build(case, dim, dtype):
    """The transform of a case as it starts, in the given dtype."""
    name, context_dim = case
    return (CONDITIONAL | UNCONDITIONAL)[name](dim, context_dim).to(dtype)


def perturb(transform, scale=1.0):
    """Moves every parameter away from its start: vectors by O(1) noise, matrices by noise of sd 1/√fan-in, times scale.

    At the start even a wrong log-determinant can pass for right.
    """
    with torch.no_grad():
        for parameter in transform.parameters():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
            parameter.add_(scale * torch.randn_like(parameter) / fan_in**0.5)
    return transform


def build_perturbed(case, dim, dtype):
    return perturb(build(case, dim, dtype))


def make_context(case, batch_shape, dtype):
    return torch.randn(*batch_shape, case[1], dtype=dtype) if case[1] else None


def jacobian_and_gradient(transform, z, context):
    """The Jacobian and the gradient of log_det, at every point of a batch, by autograd one row at a time."""
    z = z.detach().requires_grad_()
    x, log_det = transform.forward_and_log_det(z, context)
    rows = [torch.autograd.grad(x[..., i].sum(), z, retain_graph=True)[0] for i in range(transform.dim)]
    (gradient,) = torch.autograd.grad(log_det.sum(), z, allow_unused=True) if log_det.requires_grad else (None,)
    return torch.stack(rows, -2), torch.zeros_like(z) if gradient is None else gradient
