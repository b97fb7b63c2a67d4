r"""The verdict on a guide in words: a prediction of the errors of its draws, from their importance weights. Numpy alone.

A guide is good if no mean of its draws is expected to be off by more than a tenth of the posterior's sd, and no sd by more than a
tenth of itself; good once weighted if this holds of the weighted draws; else doubtful. The expected errors are those of
:mod:`pyro_flowguides.diagnostics.errors`. Yao et al. (2018), *Yes, but did it work?*, arXiv:1802.02538, judge by
:math:`\hat k` alone.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from .errors import Errors, Unseen, moment_errors
from .importance import ImportanceWeights, effective_number, khat_threshold

# In sds of the posterior, and relative.
MAX_MEAN_ERROR = MAX_SD_ERROR = 0.1
# Of fewer draws, even of the posterior itself, the standard error of a mean is larger than that.
MIN_EFFECTIVE = round(MAX_MEAN_ERROR**-2)
# A lost mode with a larger fraction of the mass makes every verdict doubtful; so does a single draw.
NEGLIGIBLE_MASS = 0.03
# With a larger fraction of effective draws there is hardly any weight in the tail, however heavy it is.
WELL_FITTED_ESS = 0.9
# With a smaller fraction of effective draws, correct marginals say little about all scalars together.
LOW_ESS = 0.5
MODES_LOST = (
    "doubtful: {unseen} The draws are of the other modes alone: {reason}. Fit AutoMixture, which starts at all modes, or fit "
    "from the lost mode as well, see docs/how_to/several_modes.md."
)


class VerdictKind(enum.Enum):
    """What can be said about a guide; the value is the sentence, for the reason and what is known of other modes."""

    EXACT = "exact: {reason}. {unseen}"
    GOOD = "good: {reason}. {unseen}"
    GOOD_ONCE_WEIGHTED = "good once the draws are weighted or resampled: {reason}. {unseen}"
    DOUBTFUL = (
        "doubtful: {reason}. Try, in this order, another parameterisation of the model (non-centred for weak data), "
        "base='student_t' for heavy tails, a flow with more layers, more steps, and NUTS in the space of the flow (NeuTra)."
    )
    UNKNOWN = "unknown: {reason}."


@dataclass(frozen=True)
class Verdict:
    """Whether to believe a guide, by the importance weights of its draws; ``print`` gives the sentence. Made by :func:`judge`.

    Attributes:
        kind: Exact, good, good once weighted, doubtful or unknown.
        khat: The Pareto shape of the weights' tail; NaN where all weights are equal or unknown.
        ess_fraction: The effective sample size as a fraction of the draws; NaN where it is unknown.
        num_draws: The number S of draws.
        reason: The findings, or why there are none, in words.
        unseen: What is known of modes that the guide has not drawn, in a sentence.
        lost_mass: The fraction of the mass of modes that it has not drawn, as far as they are known.
        mean_error: The largest expected error of a mean of the draws, in sds of the posterior; NaN where it is unknown, as the
            next three.
        sd_error: The largest expected error of an sd of the draws, relative to the sd of the posterior.
        weighted_mean_error: As ``mean_error``, of the weighted draws.
        weighted_sd_error: As ``sd_error``, of the weighted draws.
    """

    kind: VerdictKind
    khat: float
    ess_fraction: float
    num_draws: int
    reason: str
    unseen: str = "A mode that the guide never reaches cannot be detected."
    lost_mass: float = 0.0
    mean_error: float = math.nan
    sd_error: float = math.nan
    weighted_mean_error: float = math.nan
    weighted_sd_error: float = math.nan

    def __str__(self) -> str:
        if self.lost_mass > NEGLIGIBLE_MASS:
            return MODES_LOST.format(reason=self.reason, unseen=self.unseen)
        return self.kind.value.format(reason=self.reason, unseen=self.unseen)

    @property
    def khat_meaning(self) -> str:
        r"""What k-hat says here, in words.

        Weights of Pareto shape k are reliable from about :math:`10^{1 / (1 - \max(0, k))}` draws on: Vehtari et al. (2024),
        *Pareto smoothed importance sampling*, arXiv:1507.02646.

        Example:
            >>> print(Verdict(VerdictKind.DOUBTFUL, 0.75, 0.5, 10_000, "…").khat_meaning)
            k-hat is the shape of the upper tail of p / q. At 0.75, weights would be reliable from about 10,000 draws on; there
            are 10,000.
            >>> print(Verdict(VerdictKind.DOUBTFUL, 1.2, 0.01, 10_000, "…").khat_meaning)
            k-hat is the shape of the upper tail of p / q. From 1 on, as here, no number of draws makes the weights reliable.
        """
        if self.kind is VerdictKind.UNKNOWN:
            return f"k-hat, the shape of the upper tail of p / q, is unknown: {self.reason}."
        if math.isnan(self.khat):
            return "k-hat, the shape of the upper tail of p / q, cannot be estimated where p / q is the same at every draw."
        start = "k-hat is the shape of the upper tail of p / q."
        if self.khat >= 1:
            return f"{start} From 1 on, as here, no number of draws makes the weights reliable."
        exponent = 1 / (1 - max(0.0, self.khat))
        needed = (
            f"about {round(10**exponent, 1 - math.floor(exponent)):,.0f}" if exponent < 12 else f"10^{exponent:.0f}"
        )
        return f"{start} At {self.khat:.2f}, weights would be reliable from {needed} draws on; there are {self.num_draws:,}."


def judge(scalars: Mapping[str, np.ndarray], weights: ImportanceWeights, unseen: Unseen | None = None) -> Verdict:
    """What the weights of draws say about the guide.

    It takes less than a tenth of a second for 100 scalars of 10,000 draws.

    Arguments:
        scalars: The draws of every scalar by its label, each of shape (S,).
        weights: Of the draws.
        unseen: What is known of a part of the posterior that no draw has reached.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=10_000)  # of a standard normal guide, for a posterior with mean 0.3
        >>> verdict = judge({"x": x}, ImportanceWeights(-0.5 * (x - 0.3) ** 2, -0.5 * x**2))
        >>> verdict.kind.name, f"{verdict.mean_error:.1f}", f"{verdict.weighted_mean_error:.2f}"
        ('GOOD_ONCE_WEIGHTED', '0.3', '0.01')
    """
    num_draws = len(weights)
    if weights.error:
        return Verdict(VerdictKind.UNKNOWN, math.nan, math.nan, num_draws, weights.error)
    ess_fraction = effective_number(weights.weights) / num_draws
    found = Verdict(VerdictKind.EXACT, weights.shape, ess_fraction, num_draws, "")
    if weights.are_constant and unseen is None:
        return replace(found, reason="every draw has the same weight, up to rounding")
    if num_draws < MIN_EFFECTIVE:
        reason = f"{num_draws} draws are too few to tell an error of {MAX_MEAN_ERROR} sd; draw at least {MIN_EFFECTIVE}"
        return replace(found, kind=VerdictKind.UNKNOWN, reason=reason)
    errors = moment_errors(scalars, weights, unseen)
    labels, is_determined = np.array(list(scalars)), errors.sampling_sd <= MAX_SD_ERROR / 2
    raw, weighted = (_Worst.of(each, labels, is_determined) for each in (errors.raw, errors.weighted))
    are_small = raw.is_small or weighted.is_small
    if weights.unexplained_mass > NEGLIGIBLE_MASS or _is_boundless(found) or not are_small:
        kind = VerdictKind.DOUBTFUL
    else:
        kind = VerdictKind.GOOD if raw.is_small else VerdictKind.GOOD_ONCE_WEIGHTED
    found = replace(
        found,
        kind=kind,
        mean_error=raw.mean,
        sd_error=raw.sd,
        weighted_mean_error=weighted.mean,
        weighted_sd_error=weighted.sd,
    )
    effective = format(ess_fraction, ".0%" if ess_fraction > 0.1 else ".2%")
    clauses = [
        *_special(found, weights, errors.raw),
        _finding(raw, weighted),
        *_draws_apart(weights, labels[~is_determined]),
        f"k-hat is {found.khat:.2f} and {effective} of the draws are effective",
    ]
    return replace(found, reason="; ".join(clauses))


@dataclass(frozen=True)
class _Worst:
    """The largest expected errors, and the scalars that have them."""

    mean: float
    mean_of: str
    sd: float
    sd_of: str

    @classmethod
    def of(cls, errors: Errors, labels: np.ndarray, is_determined: np.ndarray) -> _Worst:
        if not len(labels):
            return cls(0.0, "nothing", 0.0, "nothing")
        mean, sd = errors.mean, np.where(is_determined, errors.sd, 0.0)
        first, second = int(mean.argmax()), int(sd.argmax())
        return cls(float(mean[first]), str(labels[first]), float(sd[second]), str(labels[second]))

    @property
    def is_small(self) -> bool:
        return self.mean <= MAX_MEAN_ERROR and self.sd <= MAX_SD_ERROR

    @property
    def bound(self) -> str:
        return f"no mean is expected to be off by more than {_in_sds(self.mean)} and no sd by more than {_percent(self.sd)}"

    def __str__(self) -> str:
        mean, sd = _in_sds(self.mean), _percent(self.sd)
        return (
            f"the mean of {self.mean_of} is expected to be off by about {mean} and the sd of {self.sd_of} by about {sd}"
        )


def _is_boundless(verdict: Verdict) -> bool:
    """Whether the weights have so heavy a tail that its mean is infinite, and much of the weight in it."""
    return verdict.khat >= 1 and verdict.ess_fraction < WELL_FITTED_ESS


def _in_sds(error: float) -> str:
    return f"{max(error, 0.01):.2f} sd" if error < 10 else f"{error:,.0f} sd"


def _percent(error: float) -> str:
    return f"{max(error, 0.01):,.0%}"


def _finding(raw: _Worst, weighted: _Worst) -> str:
    if math.isnan(raw.mean):
        return "so few draws carry all the weight that nothing can be said of the errors"
    if raw.is_small:
        return raw.bound
    if weighted.is_small:
        return f"{weighted.bound}; as the draws are, {raw}"
    return f"{raw}; of the weighted draws, {weighted}"


def _special(verdict: Verdict, weights: ImportanceWeights, errors: Errors) -> Iterator[str]:
    """What is special about these weights, one clause each."""
    lone = weights.unexplained_mass
    if lone > NEGLIGIBLE_MASS:
        where = int(weights.log_ratios.argmax())
        yield (
            f"draw {where} alone has {lone:.0%} of the weight: the guide misses a part of the posterior there, or a density is "
            "wrong; what follows leaves it out"
        )
    if verdict.kind is VerdictKind.GOOD and verdict.khat >= khat_threshold(len(weights)):
        yield "the tail of the weights is heavy, but hardly any weight is in it"
    if verdict.kind is VerdictKind.GOOD and verdict.ess_fraction < LOW_ESS:
        yield "every scalar is right on its own, but perhaps not what depends on many of them"
    if _is_boundless(verdict):
        yield "the tail of the weights is so heavy that there is no bound to what it hides"
    elif verdict.kind is VerdictKind.DOUBTFUL and lone <= NEGLIGIBLE_MASS and not errors.are_seen:
        yield "no error can be seen, but the weights are so uneven that they would hide one; more draws may tell"


def _draws_apart(weights: ImportanceWeights, undetermined: np.ndarray) -> Iterator[str]:
    """What is left out: standard deviations that so many draws do not determine, and draws without density."""
    if len(undetermined):
        more = f" and {len(undetermined) - 1} more" if len(undetermined) > 1 else ""
        yield (
            f"the sd of {undetermined[0]}{more} is left out, since {len(weights):,} draws do not determine it with tails as heavy"
        )
    if weights.num_without_density:
        where = weights.where and f" ({weights.where})"
        yield f"{weights.num_without_density:,} of {len(weights):,} draws have no density{where} and weigh nothing"


def after_search(verdict: Verdict, finding: str, lost_mass: float) -> Verdict:
    """The verdict on a guide once other modes have been looked for.

    Arguments:
        verdict: By the weights alone.
        finding: What the search has found, in a sentence.
        lost_mass: The fraction of the mass of modes that the guide has not drawn; above ``NEGLIGIBLE_MASS`` it is doubtful.

    Example:
        >>> verdict = Verdict(VerdictKind.EXACT, math.nan, 1.0, 1000, "every draw has the same weight")
        >>> print(after_search(verdict, "128 starts found no other mode.", 0.0))
        exact: every draw has the same weight. 128 starts found no other mode.
    """
    if verdict.kind is VerdictKind.UNKNOWN:
        return verdict
    if lost_mass > NEGLIGIBLE_MASS:
        return replace(verdict, kind=VerdictKind.DOUBTFUL, unseen=finding, lost_mass=lost_mass)
    return replace(verdict, unseen=finding[:1].upper() + finding[1:])
