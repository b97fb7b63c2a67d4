r"""Base distributions of a flow whose parameters are learnt with it.

Each is a module that returns a fresh distribution over :math:`\mathbb{R}^D` when it is called, so that its parameters go into
an optimiser, a ``state_dict`` and to another device like the parameters of the flow. The coordinates are independent.

Where f is affine far out, as most flows are, :math:`f(z)` has the tails of z: no number of layers makes a heavy tail out of
a normal one (Jaini et al. 2020, *Tails of Lipschitz triangular flows*, arXiv:1907.04481). :class:`StudentT` starts
with heavy tails and learns how heavy they are.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from .checks import check_positive_integer

# From here on the series of log Γ(a + ½) − log Γ(a) is exact to the last digit of float64.
_SERIES_FROM = 20.0


class Base(nn.Module):
    """A module that returns a distribution over vectors of dim independent coordinates.

    The distributions check no arguments: a check waits for the device at every step of training.

    Arguments:
        dim: The number D of coordinates, at least 1.

    Raises:
        ValueError: if ``dim < 1``.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = check_positive_integer(type(self).__name__, "dim", dim)

    def forward(self) -> dist.TorchDistribution:
        """The distribution with the parameters as they are now, of event shape ``(dim,)``."""
        raise NotImplementedError(f"{type(self).__name__} must implement forward")

    def fixed_draws(self, num_pairs: int) -> Tensor:
        """The centre and pairs of draws mirrored at it; they change with the parameters alone, never from call to call.

        Arguments:
            num_pairs: The number of pairs.

        Returns:
            Draws of shape ``(2·num_pairs + 1, dim)``, the centre first.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement fixed_draws")

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class StandardNormal(Base):
    """The standard normal, without parameters.

    Arguments:
        dim: The number D of coordinates.

    Raises:
        ValueError: if ``dim < 1``.

    Example:
        >>> StandardNormal(3)().sample((5,)).shape
        torch.Size([5, 3])
    """

    zeros: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        # Knows dtype and device; nothing that a file would have to hold.
        self.register_buffer("zeros", torch.zeros(dim), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        return _normal(self.zeros, torch.ones_like(self.zeros))

    def fixed_draws(self, num_pairs: int) -> Tensor:
        return _mirrored(_fixed_normals(num_pairs, self.dim).to(self.zeros))


class DiagonalNormal(Base):
    r"""Independent normals :math:`z = \mu + e^{s} \odot \varepsilon` with location and scale free; starts as the standard one.

    Arguments:
        dim: The number D of coordinates.

    Raises:
        ValueError: if ``dim < 1``.

    Example:
        The mean and the standard deviation of data, by maximum likelihood:

        >>> data = 3.0 + 0.5 * torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
        >>> base = DiagonalNormal(1)
        >>> optimizer = torch.optim.Adam(base.parameters(), lr=0.05)
        >>> for _ in range(300):
        ...     optimizer.zero_grad()
        ...     loss = -base().log_prob(data).mean()
        ...     loss.backward()
        ...     optimizer.step()
        >>> print(f"{base.loc.item():.1f} ± {base.log_scale.exp().item():.1f}")
        3.0 ± 0.5
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.loc = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.zeros(dim))

    def forward(self) -> dist.TorchDistribution:
        return _normal(self.loc, self.log_scale.exp())

    def fixed_draws(self, num_pairs: int) -> Tensor:
        return self.loc + self.log_scale.exp() * _mirrored(_fixed_normals(num_pairs, self.dim).to(self.loc))


class StudentT(Base):
    r"""Independent Student-t distributions whose degrees of freedom are learnt, one for every coordinate.

    .. math:: q_0(z) = \prod_i \frac{\Gamma(\frac{\nu_i + 1}{2})}{\Gamma(\frac{\nu_i}{2}) \sqrt{\pi \nu_i}\, c_i}
        \left(1 + \frac{z_i^2}{\nu_i c_i^2}\right)^{-\frac{\nu_i + 1}{2}}, \qquad \nu_i = \nu_{\min} + e^{\theta_i}

    with :math:`c_i = 1`, or :math:`c_i = \sqrt{(\nu_i - 2)/\nu_i}` for unit variance. A draw is
    :math:`z_i = c_i \sqrt{\nu_i (U^{-2/\nu_i} - 1)} \cos(2\pi V)` with U and V uniform (Bailey 1994, *Polar generation of
    random variates with the t-distribution*, Mathematics of Computation 62): a smooth function of ν, which becomes the
    normal draw of Box and Muller as ν grows. Unlike a ratio of a normal and a gamma draw it needs no rejection, so that it
    runs in a captured graph and can be repeated with other ν on the same uniforms. Learnable degrees of freedom in flows:
    Jaini et al. (2020), arXiv:1907.04481; Laszkiewicz et al. (2022), arXiv:2206.10311.

    Arguments:
        dim: The number D of coordinates.
        df: The degrees of freedom to start with; one number, or one for every coordinate.
        min_df: The floor of the degrees of freedom, at least 1, so that the mean is finite.
        unit_variance: Scale every coordinate to variance 1, for which ``min_df`` must be at least 2.

    Raises:
        ValueError: if ``dim < 1``, ``df`` is not above ``min_df``, or ``min_df`` is too small.

    Example:
        The tails of data, learnt with a flow by maximum likelihood:

        >>> from pyro_flowguides import NormalizingFlow, transforms
        >>> _ = torch.manual_seed(0)
        >>> data = 5.0 + 2.0 * StudentT(1, df=3.0)().sample((5000,))
        >>> base, transform = StudentT(1, df=5.0), transforms.Affine(1)
        >>> optimizer = torch.optim.Adam([*base.parameters(), *transform.parameters()], lr=0.05)
        >>> for _ in range(500):
        ...     optimizer.zero_grad()
        ...     loss = -NormalizingFlow(base(), transform).log_prob(data).mean()
        ...     loss.backward()
        ...     optimizer.step()
        >>> print(f"{base.df.item():.0f} degrees of freedom")
        3 degrees of freedom
    """

    def __init__(
        self, dim: int, df: float | Tensor = 10.0, *, min_df: float = 2.0, unit_variance: bool = False
    ) -> None:
        super().__init__(dim)
        if not min_df >= (2 if unit_variance else 1):
            reason = "2, for a variance to scale" if unit_variance else "1"
            raise ValueError(f"StudentT: min_df must be at least {reason}, got {min_df}")
        excess = torch.as_tensor(df, dtype=torch.get_default_dtype()) - min_df
        if excess.dim() > 0 and excess.shape != (dim,):
            raise ValueError(f"StudentT: df must be one number or have shape ({dim},), got shape {tuple(excess.shape)}")
        if not bool(((excess > 0) & excess.isfinite()).all()):
            raise ValueError(f"StudentT: df must be finite and above min_df = {min_df}, got {df}")
        self.min_df = float(min_df)
        self.unit_variance = unit_variance
        self.log_excess = nn.Parameter(excess.log().expand(dim).clone())

    @property
    def df(self) -> Tensor:
        """The degrees of freedom, shape (D,)."""
        return self.min_df + self.log_excess.exp()

    @property
    def scale(self) -> Tensor:
        """The scale c of every coordinate, shape (D,)."""
        if not self.unit_variance:
            return torch.ones_like(self.log_excess)
        # ν − 2 is not computed from ν: adding the floor has rounded it.
        return ((self.log_excess.exp() + (self.min_df - 2)) / self.df).sqrt()

    def forward(self) -> dist.TorchDistribution:
        return _StudentT(self.df, self.scale).to_event(1)

    def fixed_draws(self, num_pairs: int) -> Tensor:
        uniforms = torch.rand(2, num_pairs, self.dim, generator=_generator(), dtype=torch.float64, device="cpu")
        return _mirrored(self.scale * _polar(self.df, *uniforms.to(self.log_excess)))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, min_df={self.min_df}, unit_variance={self.unit_variance}"


class _StudentT(dist.TorchDistribution):
    """Scalar Student-t distributions around 0, drawn by polar coordinates."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real
    has_rsample = True

    def __init__(self, df: Tensor, scale: Tensor) -> None:
        self.df, self.scale = df, scale
        super().__init__(df.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _StudentT:
        return _StudentT(self.df.expand(batch_shape), self.scale.expand(batch_shape))

    @property
    def mean(self) -> Tensor:
        return torch.zeros_like(self.df)

    @property
    def variance(self) -> Tensor:
        return torch.where(self.df > 2, self.scale.square() * self.df / (self.df - 2).clamp(min=0), math.inf)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        first = torch.rand(shape, dtype=self.df.dtype, device=self.df.device)
        second = torch.rand(shape, dtype=self.df.dtype, device=self.df.device)
        return self.scale * _polar(self.df, first, second)

    def log_prob(self, value: Tensor) -> Tensor:
        half = self.df / 2
        tail = (half + 0.5) * torch.log1p((value / self.scale).square() / self.df)
        return _log_gamma_ratio(half) - 0.5 * (math.pi * self.df).log() - self.scale.log() - tail


def _normal(loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
    return dist.Normal(loc, scale, validate_args=False).to_event(1)


def _polar(df: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Student-t draws from two uniform numbers each; −log U is taken from 1 − U, which never is 0."""
    # At radius 0 the derivative of the root is infinite, and once in some 10⁷ draws of float32 the uniform is 0.
    energy = -torch.log1p(-first.clamp(min=torch.finfo(first.dtype).eps))
    return (df * torch.expm1(2 * energy / df)).sqrt() * torch.cos(2 * math.pi * second)


def _log_gamma_ratio(a: Tensor) -> Tensor:
    """log Γ(a + ½) − log Γ(a), by its series where the difference of the two would cancel."""
    far = a > _SERIES_FROM
    near_a, far_a = torch.where(far, 1.0, a), torch.where(far, a, _SERIES_FROM)
    inverse = 1 / far_a
    square = inverse.square()
    series = 0.5 * far_a.log() - inverse * (1 / 8 - square * (1 / 192 - square * (1 / 640 - square * (17 / 14336))))
    return torch.where(far, series, torch.lgamma(near_a + 0.5) - torch.lgamma(near_a))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _fixed_normals(num_pairs: int, dim: int) -> Tensor:
    return torch.randn(num_pairs, dim, generator=_generator(), dtype=torch.float64, device="cpu")


def _mirrored(half: Tensor) -> Tensor:
    return torch.cat([half.new_zeros(1, half.shape[-1]), half, -half])
