r"""A log density without a Pyro model: any function of torch, or a function of numpy with its gradient, as a model.

It stands for the model :math:`p(x) = \exp f(x)` with flat priors, over the support of every site. The ELBO of a guide is then a
lower bound of :math:`\log \int \exp f(x)\,dx`, the log of the constant that normalises the density.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to

from ..checks import check_positive_integer
from .sites import unchanged_random_state

# Where a value is drawn from before anything is known, in unconstrained space, as Stan does it.
RADIUS = 2.0
# Relative; of the values of a function at two points together and alone.
TOLERANCE = 1e-4

Shape = int | Sequence[int]


class LogDensity:
    r"""A log density as a Pyro model, to be fitted, drawn from and exported like any other.

    Usage::

        banana = fg.LogDensity(lambda x: -0.5 * (x[0] ** 2 + (x[1] - x[0] ** 2) ** 2), 2)
        fit = fg.fit(banana, fg.AutoCoupling(banana))

    The function is of one point, or of a batch of points: this is found out by calling it. A function of one point returns a
    tensor of shape (), and a function of a batch one of shape ``(N,)`` for values with N as their first dimension. Functions of
    one point are recorded and batched like models, see docs/how_to/vectorise.md.

    The density is one of the values themselves, in their supports. The map from unconstrained space and its Jacobian are not part
    of the function. It need not be normalised; ``fit.elbo`` bounds the log of its integral.

    Arguments:
        function: A function that returns log p. For a number of dimensions it takes one vector; for a dict of shapes it takes
            one tensor for every name, as keyword arguments; for a list of shapes it takes one tensor for each, in their order.
        dim_or_shapes: The number of dimensions D, of a site "x" of shape (D,); or shapes by name; or a list of shapes. A shape is
            a tuple, or an integer for a vector; a scalar has shape ().
        supports: The constraint of every value (``torch.distributions.constraints``), by name, or one for all; by default, and
            where a name is left out, real.
        names: For a number of dimensions, a name for every coordinate, each of which becomes a site of its own; for a list of
            shapes, their names, by default "x_0", "x_1", ….

    Attributes:
        takes: What the function takes: "a point", "a batch" or "both".
        priors: The flat prior of every value, by name.

    Raises:
        TypeError: if the function does not return a tensor.
        ValueError: if shapes, names and supports do not fit together, a support has no map to the real line, or the function
            takes neither one point nor a batch of points; the message says what it did with both.

    Example:
        >>> import pyro_flowguides as fg
        >>> gamma = fg.LogDensity(lambda rate: 2 * rate.log() - rate, {"rate": ()}, supports={"rate": constraints.positive})
        >>> gamma.describe()
        "'rate' of shape () in GreaterThan(lower_bound=0.0)"
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        dim_or_shapes: int | Mapping[str, Shape] | Sequence[Shape],
        *,
        supports: constraints.Constraint | Mapping[str, constraints.Constraint] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        if not callable(function):
            raise TypeError(f"LogDensity: function must be a function that returns log p, got {function!r}")
        self.function = function
        shapes, self._pack = _layout(dim_or_shapes, names)
        self.priors = {name: _flat(name, shape, _support_of(name, supports)) for name, shape in shapes.items()}
        unknown = sorted(set(supports) - set(shapes)) if isinstance(supports, Mapping) else []
        if unknown:
            raise ValueError(f"LogDensity: supports names '{unknown[0]}'; the names are {', '.join(shapes)}")
        self.takes = self._find_out()

    @classmethod
    def from_numpy(
        cls,
        function: Callable[[np.ndarray], tuple[float, np.ndarray]],
        dim: int,
        *,
        supports: constraints.Constraint | Mapping[str, constraints.Constraint] | None = None,
        names: Sequence[str] | None = None,
    ) -> LogDensity:
        """A log density that is computed outside of torch, with its gradient.

        The function is called point by point, and a step that calls it is run eagerly, after one warning.

        Arguments:
            function: A function from a vector of float64 to log p and its gradient, such as the method
                ``log_density_gradient`` of a model of BridgeStan. Where a point is not allowed it returns ``-inf`` and zeros.
            dim: The number of dimensions.
            supports: As for the class.
            names: As for the class.

        Example:
            >>> normal = LogDensity.from_numpy(lambda x: (-0.5 * x @ x, -x), 3)
            >>> normal.log_prob(x=torch.ones(3))
            tensor(-1.5000)
        """
        if not callable(function):
            raise TypeError(f"LogDensity: function must return log p and its gradient, got {function!r}")
        return cls(NumpyFunction(function), dim, supports=supports, names=names)

    def __call__(self) -> dict[str, Tensor]:
        """Runs the model: samples every value from its flat prior, and adds log p."""
        values = {name: pyro.sample(name, prior) for name, prior in self.priors.items()}
        # NaN at a draw is the business of whoever draws: training skips it, and the start of a fit names this site.
        with pyro.validation_enabled(False):
            pyro.factor("log_density", self.log_prob(**values))
        return values

    def log_prob(self, **values: Tensor) -> Tensor:
        """log p of values, which may have batch dimensions on the left.

        Arguments:
            values: The values by name.

        Returns:
            A tensor of the batch shape.

        Raises:
            ValueError: if there are batch dimensions, and the function is of one point alone; Pyro's own vectorised ELBOs
                cannot use it then, ``fit`` and ``draw`` can.
        """
        first = next(iter(self.priors))
        batch_shape = values[first].shape[: values[first].dim() - self.priors[first].event_dim]
        if self.takes == "a batch":
            flat = [each.reshape(-1, *self.priors[name].event_shape) for name, each in values.items()]
            return self._run(dict(zip(values, flat, strict=True))).reshape(batch_shape)
        if batch_shape and self.takes == "a point":
            raise ValueError("LogDensity: the function is of one point, and is given several")
        return self._run(values)

    def describe(self) -> str:
        """Names, shapes and supports in words."""
        return ", ".join(
            f"'{name}' of shape {tuple(prior.event_shape)} in {prior.values_in}" for name, prior in self.priors.items()
        )

    def _run(self, values: Mapping[str, Tensor]) -> Tensor:
        args, kwargs = self._pack(values)
        return self.function(*args, **kwargs)

    @torch.no_grad()
    def _find_out(self) -> str:
        """Whether the function takes a point, a batch of points or both; by its values at two points."""
        points = [{name: prior.at(fraction) for name, prior in self.priors.items()} for fraction in (0.0, 0.5)]
        several = {name: torch.stack([point[name] for point in points]) for name in self.priors}
        with unchanged_random_state():
            alone = [self._attempt(point) for point in points]
            together = self._attempt(several)
        one_by_one = [one for one in alone if isinstance(one, Tensor) and one.shape == ()]
        all_at_once = isinstance(together, Tensor) and together.shape == (2,)
        if len(one_by_one) == 2:
            expected = torch.stack(one_by_one)
            if all_at_once and torch.allclose(together, expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
                return "both"
            return "a point"
        if all_at_once:
            return "a batch"
        for result in (alone[0], together):
            if not isinstance(result, (Tensor, Exception)):
                raise TypeError(
                    f"LogDensity: the function returns a {type(result).__name__} and no tensor; write it with torch's functions, "
                    "or give a function of numpy that returns log p and its gradient to LogDensity.from_numpy"
                )
        error = next((each for each in (alone[0], together) if isinstance(each, Exception)), None)
        raise ValueError(
            f"LogDensity: the function of {self.describe()} must return a tensor of shape () for one point, or of shape (N,) "
            f"for a batch of N points. For one point it {_outcome(alone[0])}; for two points, with 2 as the first dimension of "
            f"every value, it {_outcome(together)}"
        ) from error

    def _attempt(self, values: Mapping[str, Tensor]) -> Any:
        try:
            return self._run(values)
        except Exception as error:
            return error


class FlatPrior(dist.ImproperUniform):
    """The flat density on a support, for the set-up of a guide: a draw is uniform on (−2, 2) in unconstrained space."""

    @property
    def values_in(self) -> Any:
        """The support of the values, without what makes events of them."""
        support: Any = self.support
        return support.base_constraint if isinstance(support, constraints.independent) else support

    def at(self, fraction: float) -> Tensor:
        """A point without randomness: unconstrained coordinates from −fraction to fraction."""
        to_support = biject_to(self.support)
        shape = torch.Size(to_support.inverse_shape(self.event_shape))
        return to_support(torch.linspace(-fraction, fraction, max(shape.numel(), 2))[: shape.numel()].reshape(shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlatPrior:
        return type(self)(self.support, torch.Size(batch_shape), self.event_shape)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        to_support = biject_to(self.support)
        shape = to_support.inverse_shape(torch.Size(sample_shape) + self.batch_shape + self.event_shape)
        with torch.no_grad():
            return to_support(RADIUS * (2 * torch.rand(shape) - 1))


class NumpyFunction:
    """A function of a vector of numpy, with its gradient, as a function of torch of one point or of many.

    Arguments:
        function: From a vector to log p and its gradient.
    """

    def __init__(self, function: Callable[[np.ndarray], tuple[float, np.ndarray]]) -> None:
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        """log p of points of shape ``(..., D)``."""
        return _Outside.apply(x, self.function)  # type: ignore[no-any-return,no-untyped-call]


class _Outside(torch.autograd.Function):
    """log p and its gradient by a function of numpy, point by point."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[np.ndarray], tuple[float, np.ndarray]]) -> Tensor:
        points = x.detach().cpu().double().numpy().reshape(-1, x.shape[-1])
        results = [function(point) for point in points]
        gradients = np.array([gradient for _, gradient in results], dtype=np.float64)
        if gradients.shape != points.shape:
            raise ValueError(
                f"LogDensity: the gradient of a point must be of shape ({x.shape[-1]},), got {gradients.shape[1:]}"
            )
        ctx.save_for_backward(torch.as_tensor(gradients).reshape(x.shape).to(x))
        return torch.tensor([float(value) for value, _ in results], dtype=x.dtype, device=x.device).reshape(
            x.shape[:-1]
        )

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return outputs[0].unsqueeze(-1) * gradient, None


Pack = Callable[[Mapping[str, Tensor]], tuple[tuple, dict[str, Tensor]]]


def _layout(dim_or_shapes: Any, names: Sequence[str] | None) -> tuple[dict[str, tuple[int, ...]], Pack]:
    """The shape of every site, and how the function takes their values."""
    if isinstance(names, str):
        raise TypeError(f"LogDensity: names must be a list of names, got the string {names!r}")
    if isinstance(dim_or_shapes, Mapping):
        if names is not None:
            raise ValueError("LogDensity: a dict of shapes has its names already; leave names out")
        return {name: _shape(name, shape) for name, shape in dim_or_shapes.items()}, _by_name
    if isinstance(dim_or_shapes, Sequence) and not isinstance(dim_or_shapes, str):
        given = _unique(names or [f"x_{index}" for index in range(len(dim_or_shapes))], len(dim_or_shapes))
        return {name: _shape(name, shape) for name, shape in zip(given, dim_or_shapes, strict=True)}, _in_order
    dim = check_positive_integer("LogDensity", "dim_or_shapes", dim_or_shapes)
    if names is None:
        return {"x": (dim,)}, _in_order
    return dict.fromkeys(_unique(names, dim), ()), _as_vector


def _by_name(values: Mapping[str, Tensor]) -> tuple[tuple, dict[str, Tensor]]:
    return (), dict(values)


def _in_order(values: Mapping[str, Tensor]) -> tuple[tuple, dict[str, Tensor]]:
    return tuple(values.values()), {}


def _as_vector(values: Mapping[str, Tensor]) -> tuple[tuple, dict[str, Tensor]]:
    return (torch.stack(list(values.values()), -1),), {}


def _unique(names: Sequence[str], number: int) -> list[str]:
    if len(names) != number or len(set(names)) != number:
        raise ValueError(f"LogDensity: names must be {number} different names, got {list(names)}")
    return list(names)


def _shape(name: str, shape: Any) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    return tuple(check_positive_integer("LogDensity", f"a size of '{name}'", size) for size in sizes)


def _support_of(name: str, supports: Any) -> Any:
    return supports.get(name, constraints.real) if isinstance(supports, Mapping) else supports or constraints.real


def _flat(name: str, shape: tuple[int, ...], support: Any) -> FlatPrior:
    try:
        if not isinstance(support, constraints.Constraint) or support.is_discrete:
            raise ValueError(
                f"LogDensity: the support of '{name}' must be a continuous constraint, such as constraints.positive, got "
                f"{support!r}"
            )
        missing = len(shape) - support.event_dim
        if missing < 0:
            raise ValueError(
                f"LogDensity: '{name}' has shape {shape}, and its support {support} needs at least {support.event_dim} dimensions"
            )
        event = constraints.independent(support, missing) if missing else support
        biject_to(event).inverse_shape(torch.Size(shape))
    except NotImplementedError as error:
        raise ValueError(
            f"LogDensity: there is no map from the real line to the support {support} of '{name}'"
        ) from error
    return FlatPrior(event, torch.Size(), torch.Size(shape))


def _outcome(result: Any) -> str:
    if isinstance(result, Exception):
        return f"raised {type(result).__name__}: {' '.join(str(result).split())[:200]}"
    return f"returned a tensor of shape {tuple(result.shape)}"
