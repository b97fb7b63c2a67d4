"""``find_modes``: a search for the modes of a model, from its starts to modes with values and masses."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from torch import Tensor

from ..checks import check_positive_integer, warn
from ..guides.auto import init_or_feasible
from ..model import mode_search, supports
from ..model.ascent import Ascent, ascend
from ..model.call import ModelCall
from ..model.enumeration import is_summed_out
from ..model.latents import Latents
from ..model.maxima import MAX_DIM, Coordinates, coordinates, first_starts, prior_draws, rounding
from ..model.missing import FillMissing
from ..model.mode_search import Climb, Maxima, Metered
from ..model.sites import is_subsample, quiet_trace, unchanged_random_state
from ..model.target import ERRORS_OF_MODELS, Target
from ..processes import Processes
from .draws import Draws, to_numpy
from .importance import Estimate
from .mode_masses import MIN_DRAWS_OF_A_MODE, Comparison, Masses, compare, weigh
from .modes import Mode, Modes
from .sampling import draw_traced
from .summary import scalars
from .symmetry import find_symmetries
from .tracer import Tracer

NUM_STARTS = 128
NUM_DRAWS = 8192
# Where every draw is a run of the model.
NUM_LOOPED_STARTS, NUM_LOOPED_DRAWS = 16, 1024
# Up to so many points a batch of the target takes the same time, about that of a training step of a flow.
SMALL_BATCH = 256
# What a search may take by default for each training step: of a flow, of a guide whose steps are cheaper, and where every draw is
# a run of the model, a tenth of its eight runs.
POINTS_PER_STEP = {"flow": SMALL_BATCH / 20, "cheap": SMALL_BATCH / 48, "looped": 0.8}
# Setting up, whitening and capturing a flow takes as long as so many of its steps.
STEPS_BEFORE_THE_FIRST = {"flow": 400, "cheap": 0, "looped": 0}
# By default there is no search that could not take so many steps with all of its starts.
MIN_STEPS = 30
# The number of scalars that say where a mode is.
NUM_SHOWN = 3


def find_modes(
    model: Callable,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    guide: Callable | Draws | None = None,
    num_starts: int = NUM_STARTS,
    seed: int | None = None,
) -> Modes:
    """The modes of a posterior with the mass of each, and which of them a guide has not drawn.

    Starts are draws of the prior, draws of the guide inflated by 1 to 30, and uniform points in boxes of many sizes. All climb
    log p together by L-BFGS, one batch of values and scores per step. Maxima are distinct if they are apart in the metric of
    their Hessians and log p falls between them. The mass of each is measured by importance sampling from a Student-t distribution
    around it. As long as a batch of starts finds new modes, or some mode was found by a single start only, there is another
    batch, up to 16.

    A maximum with less than a hundredth of the mass of the heaviest mode is none: the density of a model may have no maximum, or
    one far from all of its mass. A start whose density rises without an end is left out. With a guide, the masses of the modes
    that it draws are those of its weighted draws. Which modes count as lost:
    :func:`pyro_flowguides.diagnostics.mode_masses.compare`.

    Cost: up to 200 batches of ``num_starts`` gradients for each batch of starts, 4 D gradients for every mode, and 8192 values,
    or 1024 where every draw is a run of the model. The Hessians take D² numbers each; there are 256 modes at most, and fewer
    above 256 latents.

    Arguments:
        model: The model. Its discrete latents are summed out.
        args: Its positional arguments.
        model_kwargs: Its keyword arguments.
        guide: A guide of the model, or its draws (``fit.draws``).
        num_starts: The number of starts of a batch.
        seed: Seeds Pyro first, if given.

    Returns:
        The modes.

    Raises:
        ValueError: if ``num_starts`` is below 1, the model has no continuous latents, or the draws of the guide have no weights,
            since the data are subsampled for example; or if there are more than 1000 latents.

    Example:
        >>> import pyro_flowguides as fg, torch
        >>> two = fg.LogDensity(lambda x: torch.logaddexp(-(x - 5).square().sum() / 2, -(x + 5).square().sum() / 2), 2)
        >>> modes = find_modes(two, seed=0)
        >>> [f"{mode.mass.value:.1f}" for mode in modes]
        ['0.5', '0.5']
    """
    check_positive_integer("find_modes", "num_starts", num_starts)
    call = ModelCall.given("find_modes", model, args, model_kwargs)
    if seed is not None:
        pyro.set_rng_seed(seed)
    tracer, draws = None, None
    with call.explaining("find_modes"), pyro.validation_enabled(False):
        if isinstance(guide, Draws):
            draws = guide
        elif guide is not None:
            tracer = Tracer(call, guide, differentiable=True)
            draws = draw_traced(tracer, 10_000 if tracer.vectorizes else 1000)
        search = Search(call, tracer, draws)
        return search.run(num_starts, NUM_DRAWS if search.target.runs_together else NUM_LOOPED_DRAWS)


def search_after_fit(
    tracer: Tracer,
    draws: Draws,
    num_steps: int,
    *,
    is_flow: bool,
    asked_for: bool | None,
    seed: int,
    processes: Processes | None = None,
) -> Modes | None:
    """A search within a tenth of what a fit has cost, that leaves the random numbers of the fit as they are.

    What it may cost is counted in points of the target and not in seconds, so that the same fit has the same modes again.

    Arguments:
        tracer: What traces the fitted guide with its model.
        draws: Its draws.
        num_steps: The number of training steps.
        is_flow: Whether the guide has a flow; the steps of others are cheaper, and pay for less.
        asked_for: Whether to search in any case, or where that is cheap (None), or not at all.
        seed: The seed of the search.
        processes: The processes that have the same model, data and draws, and climb with a part of the starts each.

    Returns:
        The modes; None if there was no search.
    """
    together = tracer.vectorizes
    num_starts, num_draws = (NUM_STARTS, NUM_DRAWS) if together else (NUM_LOOPED_STARTS, NUM_LOOPED_DRAWS)
    num_draws //= 4
    kind = ("flow" if is_flow else "cheap") if together else "looped"
    allowance = math.inf if asked_for else (num_steps + STEPS_BEFORE_THE_FIRST[kind]) * POINTS_PER_STEP[kind]
    needed = MIN_STEPS * (SMALL_BATCH if together else num_starts) + num_draws
    if asked_for is False or allowance < needed:
        return None

    def find(climb: Climb = mode_search.climb) -> Modes | None:
        try:
            search = Search(tracer.call, tracer, draws)
            # The curvature of two maxima.
            if allowance < needed + 8 * search.dim:
                return None
        except ERRORS_OF_MODELS as error:
            if asked_for:
                warn(f"fit: modes were not looked for: {error}")
            return None
        try:
            return search.run(num_starts, num_draws, allowance, climb)
        except ERRORS_OF_MODELS as error:
            warn(f"fit: the search for modes failed: {' '.join(str(error).split())[:300]}")
            return None

    with unchanged_random_state(), pyro.validation_enabled(False):
        pyro.set_rng_seed(seed)
        if processes is None:
            return find()
        own = functools.cache(lambda: Search(tracer.call, tracer, draws))

        def help(task: tuple[Tensor, float]) -> tuple[Ascent, float]:
            return own().climb_part(processes.rank, processes.size, *task)

        def lead(ask: Callable[[tuple[Tensor, float]], list[tuple[Ascent, float]]]) -> Modes | None:
            return find(_climb_together(ask))

        return processes.led(lead, help)


def _climb_together(ask: Callable[[tuple[Tensor, float]], list[tuple[Ascent, float]]]) -> Climb:
    """Ascents of which every process follows a part."""

    def climb(log_density: Metered, starts: Tensor, rounding: float) -> Ascent:
        parts = ask((starts, log_density.left))
        log_density.left -= max(used for _, used in parts)
        points, values, arrived = (
            starts.clone(),
            starts.new_empty(len(starts)),
            starts.new_empty(len(starts), dtype=torch.bool),
        )
        for rank, (part, _) in enumerate(parts):
            own = slice(rank, None, len(parts))
            points[own], values[own], arrived[own] = part.points, part.values, part.arrived
        return Ascent(points, values, arrived, max(part.num_steps for part, _ in parts))

    return climb


class Search:
    """A search for modes of one model.

    Arguments:
        call: The model with its arguments.
        tracer: What traces the model with its guide, whose way to run many draws is used; None to find out.
        draws: Draws of the guide, if there is one.

    Raises:
        ValueError: if there cannot be a search; the message says why.
    """

    def __init__(self, call: ModelCall, tracer: Tracer | None, draws: Draws | None) -> None:
        self.latents = latents_of(call, "find_modes")
        if draws is not None:
            reason = draws.elbo_error or draws.weights_error or draws.weights.error
            missing = [site.name for site in self.latents.sites if site.name not in draws.unconstrained]
            if reason is None and missing:
                reason = f"they lack site '{missing[0]}'"
            if reason is not None:
                raise ValueError(f"find_modes: the draws of the guide cannot be compared with modes: {reason}")
        self.call, self.draws, self.dim = call, draws, len(self.latents.init_loc)
        if self.dim > MAX_DIM:
            raise ValueError(
                f"find_modes: the model has {self.dim} latents; the curvature of a mode is a matrix of {self.dim} × {self.dim}, "
                f"which is too large above {MAX_DIM}"
            )
        vectorize, batched = (None, None) if tracer is None else (tracer.vectorizes, tracer.batched)
        with unchanged_random_state():
            self.target = Target(call, self.latents, vectorize=vectorize, batched=batched)
        self.rounding = rounding(self.latents)
        self.drawn = None if draws is None else pack(self.latents, draws)

    def run(
        self, num_starts: int, num_draws: int, allowance: float = math.inf, climb_all: Climb = mode_search.climb
    ) -> Modes:
        """Searches; see :func:`find_modes`.

        Arguments:
            num_starts: The number of starts of a batch.
            num_draws: The number of draws to measure masses with.
            allowance: How many points of the target may be asked for, about.
            climb_all: Follows the ascents of a batch of starts.
        """
        prior = prior_draws(self.call, self.latents)
        within = self._coordinates(prior if self.drawn is None else self.drawn)
        log_density = self._metered(within, allowance - num_draws)

        def climb(points: Tensor) -> Tensor:
            return ascend(log_density, points, mode_search.MAX_STEPS, rounding=self.rounding).points

        maxima, total = mode_search.search(
            log_density,
            first_starts(prior, num_starts, within),
            # Without a guide the first batch knows nothing of the scale of the posterior.
            min_batches=2 if self.drawn is None else 1,
            rounding=self.rounding,
            climb=climb_all,
        )
        if not len(maxima):
            return Modes((), total, 0, self.draws is not None)
        maxima = maxima.heaviest(max(2, num_draws // MIN_DRAWS_OF_A_MODE))
        masses = weigh(log_density, maxima, num_draws)
        if self.drawn is None or self.draws is None:
            found = Comparison.without_guide(masses)
        else:
            log_weights = self.draws.log_weights.double() - within.log_det
            found = compare(masses, within.standard(self.drawn), log_weights, self.draws.weights.shape, climb)
        modes = self._modes(found, maxima, within)
        return Modes(modes, total, sum(mode.num_found for mode in modes), self.draws is not None)

    def climb_part(self, rank: int, size: int, starts: Tensor, left: float) -> tuple[Ascent, float]:
        """Every n-th of the ascents of a search beside a guide, and how many points of the target they took.

        Arguments:
            rank: Which of them.
            size: The number n of such parts.
            starts: All starts, shape (starts, D).
            left: How many points may be asked for, about.
        """
        part = starts[rank::size]
        if not len(part):
            return Ascent(part, part.sum(-1), part.sum(-1) > 0, 0), 0.0
        assert self.drawn is not None
        log_density = self._metered(self._coordinates(self.drawn), left)
        ascent = mode_search.climb(log_density, part, self.rounding)
        # Without a limit there is no difference.
        return ascent, 0.0 if math.isinf(left) else left - log_density.left

    def _coordinates(self, points: Tensor) -> Coordinates:
        return coordinates(points, self.latents.init_loc, full=self.drawn is not None)

    def _metered(self, within: Coordinates, left: float) -> Metered:
        return Metered(within.log_density(self.target.log_prob), left, SMALL_BATCH if self.target.runs_together else 1)

    def _modes(self, found: Comparison, maxima: Maxima, within: Coordinates) -> tuple[Mode, ...]:
        points = within.original(maxima.points)
        order = np.lexsort((-found.mass, found.is_lost))
        order = order[found.mass[order] >= mode_search.MIN_MASS * found.mass.max()]
        with torch.no_grad(), pyro.validation_enabled(False):
            values = self.target.constrain(points.to(self.latents.init_loc.dtype))
        proposals = found.masses.maxima
        means, sds = self._moments(found.masses, within)
        symmetries = find_symmetries(self.latents, self.target.log_prob, values, points, order)
        places = self._places(values, order)
        return tuple(
            Mode(
                values={name: value[index] for name, value in values.items()},
                mean={name: mean[index].cpu() for name, mean in means.items()},
                sd={name: sd[index].cpu() for name, sd in sds.items()},
                log_density=float(maxima.values[index]),
                mass=Estimate(float(found.mass[index]), float(found.mass_se[index])),
                drawn=float(found.shares[index]),
                is_lost=bool(found.is_lost[index]),
                khat=float(found.masses.khats[index]),
                num_found=int(maxima.counts[index]),
                is_definite=bool(maxima.definite[index]),
                symmetric_to=symmetries[rank][0],
                symmetry=symmetries[rank][1],
                where=places[rank],
                loc=within.original(proposals.points[index]),
                scale_tril=within.scale_tril @ proposals.scale_trils[index],
                log_mass=float(found.nats[index] + within.log_det),
            )
            for rank, index in enumerate(order.tolist())
        )

    def _moments(self, masses: Masses, within: Coordinates) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Means and standard deviations of the sites within every mode, ``(modes,) + site shape``, float64; NaN if unknown."""
        weights = masses.weights()
        # A draw without density weighs nothing, whatever its value is.
        used = weights.sum(-1) > 0
        weights = weights[used].mT
        # 0 / 0 = NaN of a mode whose draws have no density.
        totals = weights.sum(-1, keepdim=True)
        with torch.no_grad(), pyro.validation_enabled(False):
            values = self.target.constrain(within.original(masses.points[used]).to(self.latents.init_loc.dtype))
        means, sds = {}, {}
        for name, value in values.items():
            rows = value.double().reshape(len(value), math.prod(value.shape[1:]))
            mean = weights @ rows / totals
            # About the mean, and not by the mean square: modes are narrow.
            variance = (
                torch.stack([own @ (rows - center) ** 2 for own, center in zip(weights, mean, strict=True)]) / totals
            )
            means[name], sds[name] = (each.reshape(-1, *value.shape[1:]) for each in (mean, variance.sqrt()))
        return means, sds

    def _places(self, values: Mapping[str, Tensor], order: np.ndarray) -> list[str]:
        """Where each mode is, by the scalars that tell it best from the guide's draws, or from the other modes."""
        dims = {} if self.draws is None else self.draws.dims
        named = scalars({name: to_numpy(value) for name, value in values.items()}, dims, {})
        labels, table = list(named), np.stack(list(named.values()), -1)[order].astype(np.float64)
        if self.draws is not None:
            drawn = scalars({name: to_numpy(self.draws.values[name]) for name in values}, dims, {})
            center = np.array([drawn[label].mean() for label in labels])
            spread = np.array([drawn[label].std() for label in labels])
        else:
            center, spread = table.mean(0), np.ones(len(labels))
        # An ascent ends near 0 and not at it.
        table = np.where(np.abs(table) < 1e-3 * np.abs(table).max(), 0.0, table)
        away = np.abs(table - center) / np.maximum(spread, 1e-12)
        places = []
        for row, distance in zip(table, away, strict=True):
            # In the order of the sites: the ones that matter most are chosen, not sorted.
            chosen = np.sort(np.argsort(-np.round(distance, 3), kind="stable")[:NUM_SHOWN])
            rest = ", …" if len(labels) > NUM_SHOWN else ""
            places.append(", ".join(f"{labels[index]} = {row[index]:.3g}" for index in chosen) + rest)
        return places


def latents_of(call: ModelCall, owner: str) -> Latents:
    """The continuous latent sites of a model in one flat vector.

    Raises:
        ValueError: if it has none, or they cannot be laid out.
    """

    def hidden(site: Any) -> bool:
        return bool(site["type"] != "sample" or site["is_observed"] or is_subsample(site) or is_summed_out(site))

    init = InitMessenger(functools.partial(init_or_feasible, init_to_median))
    with quiet_trace(), unchanged_random_state(), torch.no_grad():
        model = poutine.block(init(FillMissing()(call.model)), hide_fn=hidden)
        trace = poutine.trace(model).get_trace(*call.args, **call.kwargs)
        latents = Latents.whole(trace, owner)
    if not latents.sites:
        raise ValueError(f"{owner}: the model has no continuous latent sites")
    return supports.mark_varying(latents, call, trace)


def pack(latents: Latents, draws: Draws) -> Tensor:
    """The flat vectors of draws, shape (S, D), float64."""
    parts = []
    for site in latents.sites:
        part = draws.unconstrained[site.name].reshape(len(draws), -1)
        parts.append(part if site.kept is None else part[:, site.kept.to(part.device)])
    return torch.cat(parts, -1).double()
