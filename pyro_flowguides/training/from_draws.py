"""``fit_to_draws``: a guide that starts from draws of MCMC."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from ..guides.auto import AutoFlow
from ..guides.mixture import AutoMixture
from ..model.call import ModelCall
from ..model.latents import Latents, LatentSite
from ..model.ownership import private_store
from .density import location_and_scale
from .likelihood import MaximumLikelihood, Plan, Rows, split
from .steps import OptimizerFactory

NUM_STEPS = 1000
OWNER = "fit_to_draws"


def fit_to_draws(
    guide: AutoFlow,
    draws: Any,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    validation: float | None = 0.1,
    num_steps: int = NUM_STEPS,
    batch_size: int = 256,
    patience: int | None = 10,
    seed: int | None = None,
    progress: bool = True,
    optim: OptimizerFactory | None = None,
    schedule: str | Callable[[float], float] | None = None,
) -> AutoFlow:
    r"""Starts a guide from draws of the posterior, such as those of a short run of NUTS; :func:`fit` can go on from there.

    The fixed map of the guide becomes the mean and the covariance of the draws; then the flow is trained by maximum likelihood,

    .. math:: \max_q \frac1N \sum_n \log q(x_n),

    on the unconstrained draws. This minimises KL(p, q), which covers every mode that the draws are in, where ``fit`` minimises
    KL(q, p). A fit that follows goes on from there as from any trained guide: it starts over if a Gaussian is better by more than
    a nat of ELBO, and never with ``whiten=None``.

    With few draws it is the held-out ones that end the training; at worst the guide is the normal law of the draws.

    Arguments:
        guide: An :class:`AutoFlow` that has not been trained.
        draws: A dict of site to values ``(n,) + shape``, as ``MCMC.get_samples()`` returns it; an ``InferenceData`` or
            ``DataTree`` with a group posterior, or this group itself; or unconstrained vectors ``(n, guide.latent_dim)``. Other
            variables than the latent sites are not read.
        args: The positional arguments of the model.
        model_kwargs: The keyword arguments of the model.
        validation: The fraction of the draws that is held out, or None.
        num_steps: The number of steps.
        batch_size: The number of draws in a step.
        patience: The number of looks at the held-out draws without a better one that ends the training; None for no end.
        seed: Seeds Pyro first, if given.
        progress: Whether to show a progress bar.
        optim: A function from a list of parameters to a torch optimiser.
        schedule: As in :func:`fit`.

    Returns:
        The guide, trained; a copy, where it belongs to an earlier fit.

    Raises:
        TypeError: if the guide is no :class:`AutoFlow`, or the draws are none of these.
        ValueError: if the guide has been trained, a site is missing, a shape is wrong, a draw is not finite or outside of its
            support, a latent does not vary, or the support of a site depends on other latents.
    """
    if not isinstance(guide, AutoFlow) or isinstance(guide, AutoMixture):
        raise TypeError(
            f"{OWNER}: the guide must be an AutoFlow with one flow, such as AutoCoupling(model), got {type(guide).__name__}"
        )
    plan = Plan(num_steps, None, batch_size, patience, optim, schedule, progress)
    plan.check(OWNER)
    if seed is not None:
        pyro.set_rng_seed(seed)
    call = ModelCall.given(OWNER, guide.model, args, model_kwargs)
    with private_store(guide.model, guide) as (_, inner):
        assert isinstance(inner, AutoFlow)
        inner.setup(*call.args, **call.kwargs)
        if inner.is_trained():
            raise ValueError(
                f"{OWNER}: this {type(inner).__name__} has been trained, and its fixed map is part of what it learnt; make a new "
                "guide"
            )
        x = unconstrained(inner.latents, draws).to(inner.fixed_map.loc)
        loc, scale = location_and_scale(OWNER, x, full=inner.fixed_map.scale.dim() == 2, what="latent coordinate")
        full = inner.fixed_map.scale.dim() == 2 and scale.dim() == 1
        inner.put_map(loc, scale.diag() if full else scale)
        train, held_out = (Rows(x), None) if validation is None else split(OWNER, Rows(x), validation)

        def log_prob(x: Tensor, context: Tensor | None = None) -> Tensor:
            return inner.log_prob(x)

        MaximumLikelihood(OWNER, log_prob, train, held_out, plan).run()
    return inner


def unconstrained(latents: Latents, draws: Any) -> Tensor:
    """Draws as vectors of the flat unconstrained space, shape ``(n, latents.dim)``.

    Arguments:
        latents: The latents of the model.
        draws: As in :func:`fit_to_draws`.

    Raises:
        TypeError: if they are nothing of the kind.
        ValueError: if a site is missing, a shape is wrong, or a value is not finite or outside of its support.
    """
    if isinstance(draws, (Tensor, np.ndarray)):
        x = torch.as_tensor(draws)
        if x.dim() != 2 or x.shape[1] != latents.dim:
            raise ValueError(f"{OWNER}: unconstrained draws must have shape (n, {latents.dim}), got {tuple(x.shape)}")
    else:
        values, num_leading = _values_by_site(draws)
        x = torch.cat([_part(site, values, num_leading) for site in latents.sites], -1)
    if len(x) < 2 or not bool(x.isfinite().all()):
        raise ValueError(f"{OWNER}: it takes at least two draws, all of them finite; got {len(x)}")
    return x


def _values_by_site(draws: Any) -> tuple[Mapping[str, Any], int]:
    """Values by site, and the number of dimensions that count draws: chains and draws in ArviZ, draws elsewhere."""
    # An InferenceData and a Dataset are mappings as well.
    group = draws.posterior if hasattr(draws, "posterior") else draws
    if not hasattr(group, "data_vars"):
        if isinstance(draws, Mapping):
            return draws, 1
        raise TypeError(
            f"{OWNER}: draws must be a dict of site to values, an InferenceData or DataTree with a group posterior, or "
            f"unconstrained vectors, got {type(draws).__name__}"
        )
    return {name: group[name].values for name in group.data_vars}, 2


def _part(site: LatentSite, values: Mapping[str, Any], num_leading: int) -> Tensor:
    """The part of the vectors that is of one site."""
    if site.varies:
        raise ValueError(
            f"{OWNER}: the support of site '{site.name}' depends on other latents; give unconstrained vectors instead"
        )
    if site.name not in values:
        raise ValueError(f"{OWNER}: there are no draws of latent site '{site.name}', only of {sorted(values)}")
    value = torch.as_tensor(values[site.name])
    if tuple(value.shape[num_leading:]) != tuple(site.shape):
        raise ValueError(
            f"{OWNER}: draws of site '{site.name}' must have shape (n, *{tuple(site.shape)}), got {tuple(value.shape)}"
        )
    if not value.is_floating_point():
        value = value.to(torch.get_default_dtype())
    value = value.reshape(-1, *site.shape)
    part = site.transform.inv(value).reshape(len(value), -1)
    if site.kept is not None:
        part = part[:, site.kept]
    if not bool(part.isfinite().all()):
        raise ValueError(f"{OWNER}: a draw of site '{site.name}' is not finite, or outside of the support of its prior")
    return part
