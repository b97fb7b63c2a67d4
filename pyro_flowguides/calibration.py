r"""Calibration by simulation: whether a guide's uncertainty is right on average over data sets that the model makes itself.

Draw :math:`\theta_0` from the prior and y from :math:`p(y \mid \theta_0)`, fit the guide to y, and see where the true value falls
among its draws; again and again. If every fit were the posterior, then

- the rank of :math:`\theta_0` among L draws would be uniform on 0, …, L: Talts, Betancourt, Simpson, Vehtari and Gelman (2018),
  *Validating Bayesian inference algorithms with simulation-based calibration*, arXiv:1804.06788;
- :math:`P_q(\theta < \theta_0)` would be distributed symmetrically about 1/2, as it is for a guide that is right about the
  location alone: Yao, Vehtari, Simpson and Gelman (2018), *Yes, but did it work?*, arXiv:1802.02538, Algorithm 2.

A guide that is too narrow piles ranks up at both ends, one that is too wide in the middle, and one that is shifted is not
symmetric.
"""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from .diagnostics.arviz import Coords, Dims, Group, to_tree
from .diagnostics.draws import Draws
from .diagnostics.replay import simulate
from .diagnostics.summary import scalars
from .model.call import ModelCall
from .processes import alone, find_processes
from .training.division import Division
from .training.fingerprint import describe_options
from .training.fit import fit

# The histogram of ranks has at least this many simulations in a bin, in expectation, and at most this many bins.
MIN_EXPECTED_IN_BIN = 10
MAX_BINS = 20
# The level of all tests of a table together, by Bonferroni's bound.
LEVEL = 0.01

Infer = Callable[[Callable, Callable, int], Draws]
# Ranks, probabilities and names of dimensions of a simulation.
Outcome = tuple[dict[str, np.ndarray], dict[str, np.ndarray], Dims]


@dataclass(frozen=True)
class Calibration:
    """Where the true values fell among the draws of their fits. Made by :func:`check_calibration`.

    Attributes:
        ranks: By site, how many of the L draws are below the true value, shape ``(num_simulations,) + shape``.
        probabilities: By site, the fraction of all draws that is below it, of the same shape.
        num_samples: The number L of draws that a true value is ranked among.
        dims: The names of the dimensions of a site.
    """

    ranks: Mapping[str, np.ndarray]
    probabilities: Mapping[str, np.ndarray]
    num_samples: int
    dims: Dims

    def table(self, *, coords: Coords | None = None) -> pd.DataFrame:
        r"""A pandas table with one row per scalar.

        Columns: ``sbc_p``, the p-value of the :math:`\chi^2` test that the ranks are uniform; ``vsbc_p``, the p-value of
        :func:`symmetry_p_value`; ``shift``, the mean of P − 1/2 (positive: the guide is too low); ``width``, the variance of P
        divided by the variance of a uniform number (above 1: too narrow); and ``finding`` in words. A p-value
        counts where it is below 1 % divided by the number of all tests of the table.

        Arguments:
            coords: Labels along a dimension, by the name of its plate.
        """
        from scipy.stats import chisquare

        ranks = scalars(self.ranks, self.dims, coords or {})
        probabilities = scalars(self.probabilities, self.dims, coords or {})
        level = LEVEL / (2 * len(ranks))
        rows = {}
        for label, rank in ranks.items():
            p = probabilities[label]
            counts, expected = self._histogram(rank)
            sbc_p, vsbc_p = float(chisquare(counts, expected).pvalue), symmetry_p_value(p)
            shift, width = float(p.mean() - 0.5), float(12 * ((p - 0.5) ** 2).mean())
            rows[label] = [sbc_p, vsbc_p, shift, width, _finding(sbc_p < level, vsbc_p < level, shift, width)]
        return pd.DataFrame.from_dict(rows, orient="index", columns=["sbc_p", "vsbc_p", "shift", "width", "finding"])

    def _histogram(self, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The counts in bins of neighbouring ranks, and what uniform ranks would give: bins may differ by one rank."""
        num_bins = max(2, min(MAX_BINS, len(ranks) // MIN_EXPECTED_IN_BIN, self.num_samples + 1))
        edges = np.linspace(0, self.num_samples + 1, num_bins + 1).round().astype(int)
        counts = np.histogram(ranks, edges)[0]
        return counts, len(ranks) * np.diff(edges) / (self.num_samples + 1)

    @property
    def verdict(self) -> str:
        """What the table finds, in a sentence."""
        findings = self.table()["finding"]
        wrong = findings[findings != "calibrated"]
        number = len(next(iter(self.ranks.values())))
        if wrong.empty:
            return f"calibrated: {number} simulations show no departure in {len(findings)} scalars"
        shown = "; ".join(f"{label} {finding}" for label, finding in list(wrong.items())[:5])
        more = "" if len(wrong) <= 5 else f"; and {len(wrong) - 5} more"
        return f"not calibrated: {len(wrong)} of {len(findings)} scalars, over {number} simulations: {shown}{more}"

    def to_arviz(self, *, coords: Coords | None = None) -> Any:
        """The groups ``prior_sbc``, integer ranks, and ``prior_vsbc``, probabilities, both with the simulations as draws.

        On ArviZ 1.x ``arviz.plot_ecdf_pit(tree, group="prior_vsbc")`` shows the probabilities against a uniform law.

        Arguments:
            coords: Labels along a dimension, by the name of its plate.
        """
        return to_tree(
            {
                group: Group({name: value[None] for name, value in values.items()}, self.dims)
                for group, values in (("prior_sbc", self.ranks), ("prior_vsbc", self.probabilities))
            },
            coords,
            {"modeling_interface": "pyro_flowguides", "num_samples": self.num_samples},
        )


def symmetry_p_value(probabilities: np.ndarray) -> float:
    r"""The p-value of the hypothesis that numbers are distributed symmetrically about 1/2.

    The statistic D is the distance of Kolmogorov and Smirnov between P and 1 − P, as in VSBC. These are not two independent
    samples, and the usual p-value would be too small. Under symmetry the signs of P − 1/2, from the farthest to the nearest, are
    a fair random walk, and n D is its largest distance from 0, whose law is exact for every n. Butler (1969), *A test for
    symmetry using the sample distribution function*, Annals of Mathematical Statistics 40(6). Cost O(n² D).

    Arguments:
        probabilities: The numbers P, shape (n,); those that are exactly 1/2 say nothing and are left out.

    Example:
        >>> symmetry_p_value(np.array([0.9, 0.8, 0.7]))
        0.25
    """
    distance = probabilities - 0.5
    steps = np.sign(distance[np.argsort(-np.abs(distance), kind="stable")])
    steps = steps[steps != 0]
    reached = int(np.abs(np.cumsum(steps)).max(initial=0))
    if reached == 0:
        return 1.0
    # The probabilities of the places of a walk that has not been as far as that before.
    inside = np.zeros(2 * reached + 1)
    inside[reached] = 1.0
    for _ in steps:
        inside[1:-1] = 0.5 * (inside[:-2] + inside[2:])
        inside[[0, -1]] = 0.0
    return float(1 - inside.sum())


def fit_and_draw(model: Callable, guide: Callable, seed: int, **options: Any) -> Draws:
    """The draws of :func:`fit`, with its options; the default of ``infer`` in :func:`check_calibration`."""
    # Only the draws count.
    return fit(
        model, guide, seed=seed, progress=False, **{"search_modes": False, "distributed": "independent", **options}
    ).draws


def check_calibration(
    model_factory: Callable[[], Callable],
    guide_factory: Callable[[Callable], Callable],
    num_simulations: int,
    *,
    infer: Infer = fit_and_draw,
    num_samples: int = 199,
    num_processes: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Simulates data from the model, fits the guide to each data set and ranks the true values among the draws.

    Under ``torchrun`` the simulations are divided between the processes, all of which have to call this and get the same result;
    a fit is then of one process alone, and averages nothing.

    Cost: ``num_simulations`` fits. One hundred simulations detect a guide whose standard deviations are half of what they should
    be, several hundred one that is off by a fifth.

    Arguments:
        model_factory: Makes the model, a function without arguments (``functools.partial`` binds them, arrays and frames as for
            ``fit``); its observed sites are simulated, so that only the shapes of its data count. Its priors must be proper.
            Called once in every process.
        guide_factory: Makes a guide for a model that observes simulated data; a class such as ``AutoCoupling`` will do.
        num_simulations: How many data sets.
        infer: A function of model, guide and seed that returns :class:`Draws`; by default it fits. With
            ``functools.partial(fit_and_draw, num_steps=500)`` it fits with other options.
        num_samples: The number L of draws that a true value is ranked among, the first L that ``infer`` returns.
        num_processes: How many processes to start for the fits (in every process of ``torchrun``). With more than one, the three
            functions must be importable by name, which lambdas are not.
        seed: The seed of the first simulation; the others follow. The result does not depend on the number of processes.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: if a number is too small, there are several processes and a function cannot be sent to them, or the processes
            of ``torchrun`` were given different numbers.
        RuntimeError: if a simulation or its fit fails, with its seed; the first error is its cause.

    Example, in a module of its own::

        def model_factory():
            data = EIGHT_SCHOOLS.data()
            return functools.partial(EIGHT_SCHOOLS.model, **data)

        if __name__ == "__main__":
            result = fg.check_calibration(model_factory, fg.AutoCoupling, 200, num_processes=4)
            print(result.verdict)
            print(result.table(coords=EIGHT_SCHOOLS.coords))
    """
    for name, number, least in (
        ("num_simulations", num_simulations, 20),
        ("num_samples", num_samples, 1),
        ("num_processes", num_processes, 1),
    ):
        if number < least:
            raise ValueError(f"check_calibration: {name} must be at least {least}, got {number}")
    one = partial(_simulate_and_rank, model_factory, guide_factory, infer, num_samples)
    seeds = range(seed, seed + num_simulations)
    if (processes := find_processes()) is None:
        results = _results(one, seeds, num_processes, progress)
    else:
        given = {"num_simulations": num_simulations, "num_samples": num_samples, "seed": seed}
        Division(processes, "independent").check_same("check_calibration", describe_options(given))
        own = partial(
            _results, one, seeds[processes.rank :: processes.size], num_processes, progress and processes.is_first
        )
        results = {done: result for part in processes.gather_from(own) for done, result in part.items()}
    ranks, probabilities = (
        {name: np.stack([results[i][part][name] for i in seeds]) for name in results[seed][part]} for part in (0, 1)
    )
    return Calibration(ranks, probabilities, num_samples, results[seed][2])


def _results(one: Callable[[int], Outcome], seeds: range, num_processes: int, progress: bool) -> dict[int, Outcome]:
    """Results by their seeds."""
    results = {}
    with tqdm(total=len(seeds), disable=not progress, desc="calibration") as bar:
        for done, result in _run(one, seeds, num_processes):
            results[done] = result
            bar.update()
    return results


def _run(one: Callable[[int], Outcome], seeds: range, num_processes: int) -> Iterator[tuple[int, Outcome]]:
    """Results with their seeds, in the order in which they come."""
    if num_processes == 1:
        for seed in seeds:
            yield seed, one(seed)
        return
    try:
        pickle.dumps(one)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            "check_calibration: model_factory, guide_factory and infer must be importable by name to run in several processes, "
            f"which lambdas and inner functions are not; or leave num_processes at 1. The error was: {error}"
        ) from error
    # A fresh interpreter each: torch's threads and CUDA do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context, initializer=_one_thread) as executor:
        futures = {executor.submit(one, seed): seed for seed in seeds}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            executor.shutdown(cancel_futures=True)


def _one_thread() -> None:
    # The processes share the cores.
    torch.set_num_threads(1)


def _simulate_and_rank(
    model_factory: Callable[[], Callable],
    guide_factory: Callable[[Callable], Callable],
    infer: Infer,
    num_samples: int,
    seed: int,
) -> Outcome:
    """One simulation, its fit, and where the true values fall."""
    pyro.set_rng_seed(seed)
    try:
        model = _with_tensors(model_factory())
        # The guides of all simulations have the same names of parameters.
        # In a process that torchrun has started, or that such a one has, nothing is averaged either.
        with pyro.get_param_store().scope(), alone():
            true_values, data = simulate(model)
            if not data:
                raise ValueError("the model observes nothing; it must have its data, of which only the shapes count")
            # Another seed: a fit that repeats the noise of the simulation would know the true values.
            fit_seed = int(torch.randint(2**31, ()))
            draws = infer(
                poutine.condition(model, data=data), guide_factory(poutine.condition(model, data=data)), fit_seed
            )
        if len(draws) < num_samples:
            raise ValueError(f"there are {len(draws)} draws, and num_samples asks for {num_samples}")
        below = {
            name: value < true_values[name]
            for name, value in draws.values.items()
            if value.is_floating_point() and name not in draws.summed_out
        }
    except Exception as error:
        raise RuntimeError(
            f"check_calibration: the simulation with seed {seed} failed: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error

    def numpy(value: Tensor) -> np.ndarray:
        return value.cpu().numpy()

    return (
        {name: numpy(value[:num_samples].sum(0)) for name, value in below.items()},
        {name: numpy(value.double().mean(0)) for name, value in below.items()},
        draws.dims,
    )


def _with_tensors(model: Callable) -> Callable:
    """A model whose arguments are bound by ``functools.partial``, with the tensors that they become."""
    if not isinstance(model, partial):
        return model
    call = ModelCall.given("check_calibration", model.func, model.args, model.keywords)
    return partial(call.model, *call.args, **call.kwargs)


def _finding(not_uniform: bool, not_symmetric: bool, shift: float, width: float) -> str:
    if not_symmetric:
        return "too low" if shift > 0 else "too high"
    if not_uniform:
        return "too narrow" if width > 1 else "too wide"
    return "calibrated"
