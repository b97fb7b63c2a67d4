"""The same layer in every library: one table, family → library → constructor.

A constructor takes the dimension and returns ``(parameters, call)``. ``call(z)`` returns the output and log_det of the direction
that the library computes in one pass, or the log density of a whole flow. On every side networks have two hidden layers of 64
with ReLU (the default of all peers), splines have 8 pieces on [−5, 5], and images have convolutions of 64 hidden channels.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pyro.distributions as dist
import pyro.distributions.transforms as P
import torch
from pyro.nn import AutoRegressiveNN, DenseNN
from torch import Tensor, nn

from pyro_flowguides import NormalizingFlow, flows
from pyro_flowguides import transforms as T

OURS = "ours"
HIDDEN = 64
NUM_BINS = 8
BOUND = 5.0
NUM_VECTORS = 8
NUM_REFLECTIONS = 8
NUM_TERMS = 20
NUM_COMPONENTS = 8
NUM_SOLVER_STEPS = 8
# The images, of D numbers, and those of two levels.
IMAGES = {64: (4, 4, 4), 512: (8, 8, 8)}
LARGE_IMAGES = {64: (1, 8, 8), 512: (8, 8, 8)}
NUM_GLOW_STEPS = 4

Call = Callable[[Tensor], tuple[Tensor, ...]]
Layer = tuple[list[nn.Parameter], Call]
FAMILIES: dict[str, dict[str, Callable[[int], Layer]]] = {}
# The D that a family can have, where not all, and the largest product of D and the batch that takes less than minutes.
DIMS: dict[str, Iterable[int]] = {"Glow, one step": IMAGES, "Glow, density of two levels": LARGE_IMAGES}
LARGEST: dict[str, int] = {"continuous, exact trace": 40_960}


def _register(family: str, library: str, requires: str | None = None) -> Callable:
    def decorate(constructor: Callable[[int], Layer]) -> Callable[[int], Layer]:
        if requires is None or importlib.util.find_spec(requires):
            FAMILIES.setdefault(family, {})[library] = constructor
        return constructor

    return decorate


def _layer(module: nn.Module, call: Call) -> Layer:
    """A layer with its parameters moved away from their start, where a network that returns 0 could be unusually cheap."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
            parameter.add_(0.1 * torch.randn_like(parameter) / fan_in**0.5)
    return parameters, call


# --- ours --------------------------------------------------------------------------------------------------------------

_NETWORK: dict[str, Any] = {"hidden_dims": (HIDDEN, HIDDEN), "activation": nn.ReLU}
_SPLINE: dict[str, Any] = {"num_bins": NUM_BINS, "tail_bound": BOUND}
_OURS: dict[str, Callable[[int], T.FlowTransform]] = {
    "planar": T.Planar,
    "radial": T.Radial,
    "sylvester, householder": lambda dim: T.Sylvester(dim, basis="householder", num_reflections=NUM_REFLECTIONS),
    "sylvester, orthogonal": lambda dim: T.Sylvester(dim, NUM_VECTORS),
    "sylvester, basis alone": lambda dim: T.Sylvester(dim, NUM_VECTORS),
    "affine autoregressive": lambda dim: T.AffineAutoregressive(dim, **_NETWORK),
    "spline autoregressive": lambda dim: T.SplineAutoregressive(dim, **_NETWORK, **_SPLINE),
    "affine coupling": lambda dim: T.AffineCoupling(dim, **_NETWORK),
    "additive coupling": lambda dim: T.AdditiveCoupling(dim, **_NETWORK),
    "spline coupling": lambda dim: T.SplineCoupling(dim, **_NETWORK, **_SPLINE),
    "elementwise spline": lambda dim: T.ElementwiseSpline(dim, **_SPLINE),
    "residual, default log_det": lambda dim: T.Residual(dim, hidden_dims=(HIDDEN, HIDDEN)),
    "residual, series with random traces": lambda dim: T.Residual(
        dim, hidden_dims=(HIDDEN, HIDDEN), log_det="hutchinson", num_terms=NUM_TERMS
    ),
    "LU linear": T.LULinear,
    "householder": lambda dim: T.Householder(dim, num_reflections=NUM_REFLECTIONS),
    "permutation": lambda dim: T.Permutation(torch.randperm(dim)),
    "mixture coupling": lambda dim: T.MixtureCoupling(dim, num_components=NUM_COMPONENTS, **_NETWORK),
    "mixture autoregressive": lambda dim: T.MixtureAutoregressive(dim, num_components=NUM_COMPONENTS, **_NETWORK),
    "continuous planar": lambda dim: T.Continuous(dim, T.PlanarField(dim, HIDDEN), num_steps=NUM_SOLVER_STEPS),
    "continuous Sylvester": lambda dim: T.Continuous(
        dim, T.SylvesterField(dim, NUM_VECTORS), num_steps=NUM_SOLVER_STEPS
    ),
    "continuous, exact trace": lambda dim: _continuous_network(dim, "exact"),
    "continuous, random trace": lambda dim: _continuous_network(dim, "hutchinson"),
    "Glow, one step": lambda dim: _glow_step(IMAGES[dim]),
}


def _continuous_network(dim: int, trace: str) -> T.FlowTransform:
    return T.Continuous(dim, T.NetworkField(dim, (HIDDEN, HIDDEN)), trace=trace, num_steps=NUM_SOLVER_STEPS)


def _glow_step(shape: tuple[int, int, int]) -> T.FlowTransform:
    coupling = T.ImageCoupling(shape, hidden_channels=HIDDEN, activation=nn.ReLU)
    return T.Compose([T.ImageActNorm(shape), T.InvertibleConvolution(shape), coupling])


def _ours(constructor: Callable[[int], T.FlowTransform]) -> Callable[[int], Layer]:
    def construct(dim: int) -> Layer:
        transform = constructor(dim)
        return _layer(transform, transform.forward_and_log_det)

    return construct


class BjorckSylvester(T.Sylvester):
    """Our orthogonal Sylvester flow, with Q by the iteration of its paper instead of a QR decomposition."""

    def _orthonormal_columns(self, raw: Tensor) -> Tensor:
        q = raw.reshape(self.dim, self.num_vectors)
        q = q / torch.linalg.matrix_norm(q)
        identity = torch.eye(self.num_vectors, dtype=q.dtype)
        for _ in range(100):
            defect = identity - q.mT @ q
            if torch.linalg.matrix_norm(defect.detach()) < 1e-6:
                break
            q = torch.addmm(q, q, defect, alpha=0.5)
        return q


def _basis_alone(constructor: Callable[[int], T.Sylvester]) -> Callable[[int], Layer]:
    """The orthonormal columns of a D × M matrix, the parameter of the layer; the points are not used."""

    def construct(dim: int) -> Layer:
        transform = constructor(dim)
        matrix = nn.Parameter(torch.randn(dim * transform.num_vectors))
        return [matrix], lambda z: (transform._orthonormal_columns(matrix), z.new_zeros(()))

    return construct


for _family, _constructor in _OURS.items():
    _register(_family, OURS)(_basis_alone(_constructor) if "alone" in _family else _ours(_constructor))
_register("sylvester, orthogonal", "Björck iteration")(_ours(lambda dim: BjorckSylvester(dim, NUM_VECTORS)))
_register("sylvester, basis alone", "Björck iteration")(_basis_alone(lambda dim: BjorckSylvester(dim, NUM_VECTORS)))


@_register("Glow, density of two levels", OURS)
def _glow_density(dim: int) -> Layer:
    flow = flows.glow_image(
        dim, shape=LARGE_IMAGES[dim], num_levels=2, num_steps=NUM_GLOW_STEPS, hidden_channels=HIDDEN
    )
    density = NormalizingFlow(dist.Normal(torch.zeros(dim), 1.0).to_event(1), flow)
    return _layer(flow, lambda z: (density.log_prob(z),))


# --- Pyro --------------------------------------------------------------------------------------------------------------


def _pyro_layer(transform: Any) -> Layer:
    def call(z: Tensor) -> tuple[Tensor, Tensor]:
        x = transform(z)
        # Pyro caches log_det, or the parts of it, in the call.
        return x, transform.log_abs_det_jacobian(z, x)

    return _layer(transform, call) if isinstance(transform, nn.Module) else ([], call)


def _pyro_spline_sizes(num_coordinates: int) -> list[int]:
    return [num_coordinates * size for size in (NUM_BINS, NUM_BINS, NUM_BINS - 1)]


def _pyro_made(dim: int, param_dims: list[int]) -> AutoRegressiveNN:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about hidden layers narrower than D
        return AutoRegressiveNN(dim, [HIDDEN, HIDDEN], param_dims=param_dims)


def _pyro_affine_coupling(dim: int) -> Any:
    network = DenseNN(dim // 2, [HIDDEN, HIDDEN], [dim - dim // 2] * 2)
    return P.AffineCoupling(dim // 2, network)


def _pyro_spline_coupling(dim: int) -> Any:
    network = DenseNN(dim // 2, [HIDDEN, HIDDEN], _pyro_spline_sizes(dim - dim // 2))
    return P.SplineCoupling(dim, dim // 2, network, NUM_BINS, BOUND, order="quadratic", identity=True)


def _pyro_spline_autoregressive(dim: int) -> Any:
    network = _pyro_made(dim, [NUM_BINS, NUM_BINS, NUM_BINS - 1])
    return P.SplineAutoregressive(dim, network, NUM_BINS, BOUND, order="quadratic")


_PYRO: dict[str, Callable[[int], Any]] = {
    "planar": P.Planar,
    "radial": P.Radial,
    "sylvester, householder": lambda dim: P.Sylvester(dim, count_transforms=NUM_REFLECTIONS),
    "affine autoregressive": lambda dim: P.AffineAutoregressive(_pyro_made(dim, [1, 1])),
    "spline autoregressive": _pyro_spline_autoregressive,
    "affine coupling": _pyro_affine_coupling,
    "spline coupling": _pyro_spline_coupling,
    "elementwise spline": lambda dim: P.Spline(dim, NUM_BINS, BOUND, order="quadratic"),
    "householder": lambda dim: P.Householder(dim, count_transforms=NUM_REFLECTIONS),
    "permutation": lambda dim: P.Permute(torch.randperm(dim)),
}
for _family, _constructor in _PYRO.items():
    _register(_family, "Pyro")(lambda dim, constructor=_constructor: _pyro_layer(constructor(dim)))

# --- Zuko --------------------------------------------------------------------------------------------------------------


def _zuko_layer(lazy: Any) -> Layer:
    return _layer(lazy, lambda z: lazy().call_and_ladj(z))


def _zuko_spline() -> dict[str, Any]:
    from zuko.transforms import MonotonicRQSTransform

    return {"univariate": MonotonicRQSTransform, "shapes": ((NUM_BINS,), (NUM_BINS,), (NUM_BINS - 1,))}


def _zuko_autoregressive(dim: int, **options: Any) -> Layer:
    from zuko.flows import MaskedAutoregressiveTransform

    return _zuko_layer(MaskedAutoregressiveTransform(dim, hidden_features=(HIDDEN, HIDDEN), **options))


def _zuko_coupling(dim: int, **options: Any) -> Layer:
    from zuko.flows import GeneralCouplingTransform

    mask = torch.arange(dim) < dim // 2
    return _zuko_layer(GeneralCouplingTransform(dim, mask=mask, hidden_features=(HIDDEN, HIDDEN), **options))


@_register("affine autoregressive", "Zuko", "zuko")
def _(dim: int) -> Layer:
    return _zuko_autoregressive(dim)


@_register("spline autoregressive", "Zuko", "zuko")
def _(dim: int) -> Layer:
    return _zuko_autoregressive(dim, **_zuko_spline())


@_register("affine coupling", "Zuko", "zuko")
def _(dim: int) -> Layer:
    return _zuko_coupling(dim)


@_register("additive coupling", "Zuko", "zuko")
def _(dim: int) -> Layer:
    from zuko.transforms import AdditiveTransform

    return _zuko_coupling(dim, univariate=AdditiveTransform, shapes=((),))


@_register("spline coupling", "Zuko", "zuko")
def _(dim: int) -> Layer:
    return _zuko_coupling(dim, **_zuko_spline())


@_register("elementwise spline", "Zuko", "zuko")
def _(dim: int) -> Layer:
    from zuko.flows import ElementWiseTransform

    return _zuko_layer(ElementWiseTransform(dim, **_zuko_spline()))


@_register("LU linear", "Zuko", "zuko")
def _(dim: int) -> Layer:
    from zuko.lazy import UnconditionalTransform
    from zuko.transforms import LULinearTransform

    return _zuko_layer(UnconditionalTransform(LULinearTransform, torch.eye(dim)))


def _zuko_continuous(dim: int, exact: bool) -> Layer:
    from zuko.flows.continuous import FFJTransform

    return _zuko_layer(FFJTransform(dim, exact=exact, hidden_features=(HIDDEN, HIDDEN)))


@_register("continuous, exact trace", "Zuko", "zuko")
def _(dim: int) -> Layer:
    return _zuko_continuous(dim, exact=True)


@_register("continuous, random trace", "Zuko", "zuko")
def _(dim: int) -> Layer:
    return _zuko_continuous(dim, exact=False)


@_register("permutation", "Zuko", "zuko")
def _(dim: int) -> Layer:
    from zuko.transforms import PermutationTransform

    return [], PermutationTransform(torch.randperm(dim)).call_and_ladj


# --- normflows and nflows ----------------------------------------------------------------------------------------------


class _Network(nn.Sequential):
    """The network of a coupling, with a second argument (a context), which these libraries pass."""

    # Both libraries divide some of the outputs by its square root.
    hidden_features = HIDDEN

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__(
            nn.Linear(size_in, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, size_out)
        )

    def forward(self, inputs: Tensor, context: None = None) -> Tensor:
        return super().forward(inputs)


def _mask(dim: int) -> Tensor:
    return (torch.arange(dim) >= dim // 2).long()


_MADE: dict[str, Any] = {"hidden_features": HIDDEN, "num_blocks": 1, "use_residual_blocks": False}
_TAILS: dict[str, Any] = {"num_bins": NUM_BINS, "tails": "linear", "tail_bound": BOUND}


def _normflows(family: str, inverse: bool = False) -> Callable:
    def decorate(constructor: Callable[[int], nn.Module]) -> None:
        @_register(family, "normflows", "normflows")
        def construct(dim: int) -> Layer:
            module = constructor(dim)
            return _layer(module, module.inverse if inverse else module.forward)

    return decorate


@_normflows("planar")
def _(dim: int) -> nn.Module:
    from normflows.flows import Planar

    return Planar((dim,))


@_normflows("radial")
def _(dim: int) -> nn.Module:
    from normflows.flows import Radial

    return Radial((dim,))


@_normflows("affine autoregressive")
def _(dim: int) -> nn.Module:
    from normflows.flows import MaskedAffineAutoregressive

    return MaskedAffineAutoregressive(dim, **_MADE)


@_normflows("spline autoregressive")
def _(dim: int) -> nn.Module:
    from normflows.flows.neural_spline.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressive

    return MaskedPiecewiseRationalQuadraticAutoregressive(dim, **_MADE, **_TAILS)


@_normflows("affine coupling")
def _(dim: int) -> nn.Module:
    from normflows.flows import AffineCouplingBlock
    from normflows.nets import MLP

    return AffineCouplingBlock(MLP([dim - dim // 2, HIDDEN, HIDDEN, 2 * (dim // 2)]))


@_normflows("additive coupling")
def _(dim: int) -> nn.Module:
    from normflows.flows import AffineCouplingBlock
    from normflows.nets import MLP

    return AffineCouplingBlock(MLP([dim - dim // 2, HIDDEN, HIDDEN, dim // 2]), scale=False)


@_normflows("spline coupling")
def _(dim: int) -> nn.Module:
    from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling

    return PiecewiseRationalQuadraticCoupling(_mask(dim), _Network, **_TAILS)


@_normflows("LU linear", inverse=True)
def _(dim: int) -> nn.Module:
    from normflows.flows import InvertibleAffine

    return InvertibleAffine(dim)


@_normflows("permutation")
def _(dim: int) -> nn.Module:
    from normflows.flows import Permute

    return Permute(dim)


@_register("Glow, one step", "normflows", "normflows")
def _(dim: int) -> Layer:
    from normflows.flows import GlowBlock

    shape = IMAGES[dim]
    block = GlowBlock(shape[0], HIDDEN)
    # The first call sets the scales from the points.
    block.inverse(torch.randn(64, *shape))
    return _layer(block, lambda z: block.inverse(z.reshape(-1, *shape)))


@_register("Glow, density of two levels", "normflows", "normflows")
def _(dim: int) -> Layer:
    import normflows

    channels, height, width = LARGE_IMAGES[dim]
    coarse = (8 * channels, height // 4, width // 4)
    fine = (2 * channels, height // 2, width // 2)
    levels = [
        [*(normflows.flows.GlowBlock(size, HIDDEN) for _ in range(NUM_GLOW_STEPS)), normflows.flows.Squeeze()]
        for size in (8 * channels, 4 * channels)
    ]
    bases = [normflows.distributions.DiagGaussian(shape, trainable=False) for shape in (coarse, fine)]
    flow = normflows.MultiscaleFlow(bases, levels, [normflows.flows.Merge()], class_cond=False)
    images = (channels, height, width)
    flow.log_prob(torch.randn(64, *images), None)
    return _layer(flow, lambda z: (flow.log_prob(z.reshape(-1, *images), None),))


def _normflows_residual(dim: int, num_terms: int | None) -> Layer:
    from normflows.flows import Residual
    from normflows.nets import LipschitzMLP
    from normflows.utils import update_lipschitz

    network = LipschitzMLP([dim, HIDDEN, HIDDEN, dim], lipschitz_const=0.9 ** (1 / 3))
    module = Residual(network, n_power_series=num_terms)
    layer = _layer(module, module.inverse)
    update_lipschitz(module, 50)
    return layer


# An unbiased estimate from about four terms; ours is exact up to 128 hidden units.
_register("residual, default log_det", "normflows", "normflows")(lambda dim: _normflows_residual(dim, None))
_register("residual, series with random traces", "normflows", "normflows")(
    lambda dim: _normflows_residual(dim, NUM_TERMS)
)


def _nflows(family: str) -> Callable:
    def decorate(constructor: Callable[[int], nn.Module]) -> None:
        @_register(family, "nflows", "nflows")
        def construct(dim: int) -> Layer:
            module = constructor(dim)
            return _layer(module, module.forward)

    return decorate


@_nflows("affine autoregressive")
def _(dim: int) -> nn.Module:
    from nflows.transforms import MaskedAffineAutoregressiveTransform

    return MaskedAffineAutoregressiveTransform(dim, **_MADE)


@_nflows("spline autoregressive")
def _(dim: int) -> nn.Module:
    from nflows.transforms import MaskedPiecewiseRationalQuadraticAutoregressiveTransform

    return MaskedPiecewiseRationalQuadraticAutoregressiveTransform(dim, **_MADE, **_TAILS)


@_nflows("affine coupling")
def _(dim: int) -> nn.Module:
    from nflows.transforms import AffineCouplingTransform

    return AffineCouplingTransform(_mask(dim), _Network)


@_nflows("additive coupling")
def _(dim: int) -> nn.Module:
    from nflows.transforms import AdditiveCouplingTransform

    return AdditiveCouplingTransform(_mask(dim), _Network)


@_nflows("spline coupling")
def _(dim: int) -> nn.Module:
    from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform

    return PiecewiseRationalQuadraticCouplingTransform(_mask(dim), _Network, **_TAILS)


@_nflows("elementwise spline")
def _(dim: int) -> nn.Module:
    from nflows.transforms import PiecewiseRationalQuadraticCDF

    return PiecewiseRationalQuadraticCDF(dim, **_TAILS)


@_nflows("LU linear")
def _(dim: int) -> nn.Module:
    from nflows.transforms import LULinear

    return LULinear(dim)


@_nflows("householder")
def _(dim: int) -> nn.Module:
    from nflows.transforms import HouseholderSequence

    return HouseholderSequence(dim, NUM_REFLECTIONS)


@_nflows("permutation")
def _(dim: int) -> nn.Module:
    from nflows.transforms import RandomPermutation

    return RandomPermutation(dim)
