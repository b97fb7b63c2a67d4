"""What the verdict says of weights and draws whose errors are known. Numpy alone."""

import math

import numpy as np
import pytest

from pyro_flowguides.diagnostics.importance import ImportanceWeights
from pyro_flowguides.diagnostics.verdicts import Verdict, VerdictKind, after_search, judge


def case(name):
    """Draws of scalars, and the logarithms of their weights."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 10_000))
    if name.startswith("normal"):
        mean, sd = map(float, name.split()[1:])
        return x, (x[0] ** 2 - ((x[0] - mean) / sd) ** 2) / 2
    if name == "heavy tail without weight":
        return x, 0.002 * rng.standard_t(1.5, size=10_000).clip(max=1000)
    if name == "heavy tail with weight":
        return x, np.log(1 + 0.002 * rng.pareto(1 / 1.2, size=10_000))
    if name == "one stray draw":
        x = rng.normal(size=(2, 100_000))
        ratios = 0.1 * x[0]
        ratios[7] = math.log(50_000)
        return x, ratios
    if name == "few effective draws":
        return x, 1.3 * rng.normal(size=10_000)
    if name == "very few effective draws":
        return x, 2.5 * rng.normal(size=10_000)
    if name == "no effective draw":
        return x, 100 * rng.normal(size=10_000)
    if name == "constant":
        return x, np.zeros(10_000)
    if name == "too few":
        return x[:, :60], 0.1 * x[0, :60]
    if name == "heavy posterior":
        x[1] = rng.standard_t(2.2, size=10_000)
        return x, 0.05 * x[0]
    if name == "without density":
        ratios = 0.05 * x[0]
        ratios[:3] = [np.nan, -np.inf, np.nan]
        return x, ratios
    return x, np.full(10_000, -np.inf)


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("normal 0.05 1", "GOOD", "no mean is expected to be off by more than 0.05 sd and no sd by more than"),
        ("normal 0 0.95", "GOOD", "no sd by more than 5%"),
        ("normal 0.3 1", "GOOD_ONCE_WEIGHTED", "as the draws are, the mean of x[0] is expected to be off by about 0.3"),
        ("normal 0 0.7", "GOOD_ONCE_WEIGHTED", "and the sd of x[0] by about 4"),
        ("normal 0 3", "DOUBTFUL", "the sd of x[0] by about"),
        ("normal 4 1", "DOUBTFUL", "of the weighted draws, the mean of x["),
        ("heavy tail without weight", "GOOD", "the tail of the weights is heavy, but hardly any weight is in it"),
        ("heavy tail with weight", "DOUBTFUL", "so heavy that there is no bound to what it hides"),
        ("one stray draw", "DOUBTFUL", "draw 7 alone has 33% of the weight: the guide misses a part of the posterior"),
        (
            "few effective draws",
            "GOOD",
            "every scalar is right on its own, but perhaps not what depends on many of them",
        ),
        ("very few effective draws", "DOUBTFUL", "no error can be seen, but the weights are so uneven"),
        ("no effective draw", "DOUBTFUL", "so few draws carry all the weight that nothing can be said of the errors"),
        ("constant", "EXACT", "every draw has the same weight, up to rounding"),
        ("too few", "UNKNOWN", "60 draws are too few to tell an error of 0.1 sd; draw at least 100"),
        ("heavy posterior", "GOOD", "the sd of x[1] is left out, since 10,000 draws do not determine it"),
        ("without density", "GOOD", "3 of 10,000 draws have no density (site 'a' of the model) and weigh nothing"),
        ("none with a density", "UNKNOWN", "no draw has a density (site 'a' of the model)"),
    ],
)
def test_verdicts(name, kind, said):
    x, ratios = case(name)
    weights = ImportanceWeights(ratios, np.zeros(len(ratios)), "site 'a' of the model")
    verdict = judge({f"x[{i}]": column for i, column in enumerate(x)}, weights)
    assert verdict.kind.name == kind
    assert said in verdict.reason
    # The sentence is the kind's own, with the reason and what is known of modes put into it.
    assert str(verdict) == verdict.kind.value.format(reason=verdict.reason, unseen=verdict.unseen)
    assert verdict.num_draws == len(ratios)
    if kind in ("GOOD", "GOOD_ONCE_WEIGHTED"):
        errors = [verdict.mean_error, verdict.sd_error]
        weighted = [verdict.weighted_mean_error, verdict.weighted_sd_error]
        assert (max(errors) <= 0.1) is (kind == "GOOD")
        assert max(errors if kind == "GOOD" else weighted) <= 0.1
        assert f"k-hat is {verdict.khat:.2f} and" in verdict.reason
    elif kind != "DOUBTFUL":
        assert math.isnan(verdict.mean_error)


def test_a_model_without_scalars_has_a_verdict():
    ratios = 0.1 * np.random.default_rng(0).normal(size=1000)
    assert judge({}, ImportanceWeights(ratios, np.zeros(1000))).kind is VerdictKind.GOOD


def test_weights_that_cannot_be_smoothed_give_their_reason():
    weights = ImportanceWeights(np.arange(10.0), np.zeros(10))
    verdict = judge({"x": np.zeros(10)}, weights)
    assert str(verdict) == f"unknown: {weights.error}."
    assert verdict.khat_meaning.endswith(f"is unknown: {weights.error}.")
    assert after_search(verdict, "nothing", 0.5) is verdict


@pytest.mark.parametrize(
    ("khat", "meaning"),
    [
        (math.nan, "cannot be estimated where p / q is the same at every draw."),
        (-0.2, "At -0.20, weights would be reliable from about 10 draws on; there are 10,000."),
        (0.5, "At 0.50, weights would be reliable from about 100 draws on; there are 10,000."),
        (0.95, "At 0.95, weights would be reliable from 10^20 draws on; there are 10,000."),
        (1.0, "From 1 on, as here, no number of draws makes the weights reliable."),
    ],
)
def test_what_khat_means(khat, meaning):
    assert Verdict(VerdictKind.DOUBTFUL, khat, 0.5, 10_000, "…").khat_meaning.endswith(meaning)
