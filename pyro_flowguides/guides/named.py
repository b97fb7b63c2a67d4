"""Guides that fix the flow: a few lines over :class:`AutoFlow` each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from .. import flows
from .auto import AutoFlow


class AutoCoupling(AutoFlow):
    """A guide of affine couplings (RealNVP), see :func:`pyro_flowguides.flows.coupling`: the first choice for most models.

    Arguments:
        model: The model.
        num_layers: The number of couplings; by default 10, or 16 above 30 latent dimensions.
        hidden_dims: The hidden layers of each network; by default two of 32, or of 64 and 32 above 30 latent dimensions.
        options: The options of :class:`AutoFlow`.

    References:
        Dinh, Sohl-Dickstein & Bengio (2017), *Density estimation using Real NVP*, arXiv:1605.08803.
    """

    def __init__(
        self,
        model: Callable,
        *,
        num_layers: int | None = None,
        hidden_dims: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        recipe = functools.partial(flows.coupling, num_layers=num_layers, hidden_dims=hidden_dims)
        super().__init__(model, recipe, **options)


class AutoPlanar(AutoFlow):
    """A guide of planar flows, see :func:`pyro_flowguides.flows.planar`: few parameters, and little flexibility.

    Arguments:
        model: The model.
        num_layers: The number of planar layers.
        options: The options of :class:`AutoFlow`.

    References:
        Rezende & Mohamed (2015), *Variational inference with normalizing flows*, arXiv:1505.05770.
    """

    def __init__(self, model: Callable, *, num_layers: int = 16, **options: Any) -> None:
        super().__init__(model, functools.partial(flows.planar, num_layers=num_layers), **options)


class AutoRadial(AutoFlow):
    """A guide of radial flows, see :func:`pyro_flowguides.flows.radial`: very few parameters, and less flexible than planar.

    Arguments:
        model: The model.
        num_layers: The number of radial layers.
        options: The options of :class:`AutoFlow`.

    References:
        Rezende & Mohamed (2015), *Variational inference with normalizing flows*, arXiv:1505.05770.
    """

    def __init__(self, model: Callable, *, num_layers: int = 16, **options: Any) -> None:
        super().__init__(model, functools.partial(flows.radial, num_layers=num_layers), **options)


class AutoSylvester(AutoFlow):
    """A guide of Sylvester flows, see :func:`pyro_flowguides.flows.sylvester`: the best of those without networks.

    Arguments:
        model: The model.
        num_layers: The number of Sylvester layers.
        num_vectors: The number of directions that each layer bends; the latent dimension where that is less.
        basis: ``"qr"``, ``"householder"`` or ``"triangular"``.
        options: The options of :class:`AutoFlow`.

    References:
        van den Berg, Hasenclever, Tomczak & Welling (2018), *Sylvester normalizing flows for variational inference*,
        arXiv:1803.05649.
    """

    def __init__(
        self, model: Callable, *, num_layers: int = 8, num_vectors: int = 8, basis: str = "qr", **options: Any
    ) -> None:
        recipe = functools.partial(flows.sylvester, num_layers=num_layers, num_vectors=num_vectors, basis=basis)
        super().__init__(model, recipe, **options)


class AutoIAF(AutoFlow):
    """A guide of inverse autoregressive flows, see :func:`pyro_flowguides.flows.iaf`: one pass to draw, D to score a point.

    Arguments:
        model: The model.
        num_layers: The number of autoregressive layers.
        hidden_dims: The hidden layers of each network; by default two of 32, or of 64 above 30 latent dimensions.
        options: The options of :class:`AutoFlow`.

    References:
        Kingma et al. (2016), *Improving variational inference with inverse autoregressive flow*, arXiv:1606.04934.
    """

    def __init__(
        self, model: Callable, *, num_layers: int = 3, hidden_dims: Sequence[int] | None = None, **options: Any
    ) -> None:
        recipe = functools.partial(flows.iaf, num_layers=num_layers, hidden_dims=hidden_dims)
        super().__init__(model, recipe, **options)


class AutoSpline(AutoFlow):
    """A guide of spline couplings, see :func:`pyro_flowguides.flows.spline_coupling`: for several modes and sharp edges.

    Arguments:
        model: The model.
        num_layers: The number of couplings.
        hidden_dims: The hidden layers of each network; by default two of 32, or of 64 above 30 latent dimensions.
        num_bins: The number of pieces of each spline.
        tail_bound: Outside of ±tail_bound, in whitened coordinates, a spline is the identity.
        options: The options of :class:`AutoFlow`.

    References:
        Durkan, Bekasov, Murray & Papamakarios (2019), *Neural spline flows*, arXiv:1906.04032.
    """

    def __init__(
        self,
        model: Callable,
        *,
        num_layers: int = 4,
        hidden_dims: Sequence[int] | None = None,
        num_bins: int = 8,
        tail_bound: float = 5.0,
        **options: Any,
    ) -> None:
        recipe = functools.partial(
            flows.spline_coupling,
            num_layers=num_layers,
            hidden_dims=hidden_dims,
            num_bins=num_bins,
            tail_bound=tail_bound,
        )
        super().__init__(model, recipe, **options)


class AutoResidual(AutoFlow):
    """A guide of residual flows, see :func:`pyro_flowguides.flows.residual`: every coordinate moves in every layer.

    Arguments:
        model: The model.
        num_layers: The number of residual layers.
        hidden_dims: The hidden layers of each network.
        lipschitz: The bound of the Lipschitz constant of each network, below 1.
        log_det: How the log-determinant is computed; the default is exact for networks of this size.
        options: The options of :class:`AutoFlow`.

    References:
        Chen, Behrmann, Duvenaud & Jacobsen (2019), *Residual flows for invertible generative modeling*, arXiv:1906.02735.
    """

    def __init__(
        self,
        model: Callable,
        *,
        num_layers: int = 8,
        hidden_dims: Sequence[int] = (32, 32),
        lipschitz: float = 0.9,
        log_det: str = "auto",
        **options: Any,
    ) -> None:
        recipe = functools.partial(
            flows.residual, num_layers=num_layers, hidden_dims=hidden_dims, lipschitz=lipschitz, log_det=log_det
        )
        super().__init__(model, recipe, **options)


class AutoContinuousFlow(AutoFlow):
    """A guide of a continuous flow: draws follow a vector field. It is not Pyro's ``AutoContinuous``, a base class of autoguides.

    See :func:`pyro_flowguides.flows.continuous_planar`, :func:`pyro_flowguides.flows.continuous_sylvester` and
    :func:`pyro_flowguides.flows.ffjord`.

    Planar and Sylvester fields learn best at a learning rate of about 0.05:
    ``fit(model, guide, data, optim=functools.partial(torch.optim.Adam, lr=0.05))``, see docs/design/continuous.md.

    Arguments:
        model: The model.
        field: ``"planar"`` or ``"sylvester"``, whose traces have closed forms, or ``"network"`` (FFJORD).
        num_layers: The number of flows, one after the other, each with a field of its own.
        num_units: The number of ridges of a planar or Sylvester field.
        hidden_dims: The hidden layers of a network.
        num_steps: The number of steps of the solver. More of them leave a smaller error of the density, see :meth:`ode_error`.
        solver: The solver, see :class:`~pyro_flowguides.transforms.Continuous`.
        trace: ``"exact"``, or ``"hutchinson"`` for a network in many dimensions; then the fit has no weights and no verdict.
        kinetic, jacobian: The weights of the regularisation.
        options: The options of :class:`AutoFlow`.

    Raises:
        ValueError: if the field is unknown.
        TypeError: if ``num_units`` is given with a network.

    References:
        Chen, Rubanova, Bettencourt & Duvenaud (2018), *Neural ordinary differential equations*, arXiv:1806.07366.
        Grathwohl et al. (2019), *FFJORD*, arXiv:1810.01367.
    """

    def __init__(
        self,
        model: Callable,
        *,
        field: str = "planar",
        num_layers: int = 1,
        num_units: int | None = None,
        hidden_dims: Sequence[int] | None = None,
        num_steps: int = 8,
        solver: str = "rk4",
        trace: str = "exact",
        kinetic: float = 0.0,
        jacobian: float = 0.0,
        **options: Any,
    ) -> None:
        if field not in _FIELDS:
            raise ValueError(f"AutoContinuousFlow: field must be one of {', '.join(map(repr, _FIELDS))}, got {field!r}")
        sizes = {"num_units": num_units, "hidden_dims": hidden_dims}
        recipe = functools.partial(
            _FIELDS[field],
            num_layers=num_layers,
            num_steps=num_steps,
            solver=solver,
            trace=trace,
            kinetic=kinetic,
            jacobian=jacobian,
            **{name: size for name, size in sizes.items() if size is not None},
        )
        super().__init__(model, recipe, **options)


_FIELDS: dict[str, Callable[..., Any]] = {
    "planar": flows.continuous_planar,
    "sylvester": flows.continuous_sylvester,
    "network": flows.ffjord,
}
