"""Tables with one labelled row per scalar."""

import numpy as np
import pandas as pd
import pytest

from pyro_flowguides.diagnostics.importance import ImportanceWeights
from pyro_flowguides.diagnostics.summary import diagnose, scalars, summarize


def test_summary_has_labels_and_moments():
    rng = np.random.default_rng(0)
    values = {"mu": rng.normal(3, 2, size=1000), "theta": rng.normal(size=(1000, 2, 1))}
    table = summarize(values, {"theta": ["school", "term"]}, {"school": ["a", "b"]}, (0.05, 0.5))
    assert list(table.index) == ["mu", "theta[a, 0]", "theta[b, 0]"]
    assert list(table.columns) == ["mean", "sd", "5%", "50%"]
    assert isinstance(table, pd.DataFrame)
    assert table.loc["mu", "mean"] == values["mu"].mean()
    assert table.loc["theta[b, 0]", "sd"] == pytest.approx(values["theta"][:, 1, 0].std(ddof=1))
    assert table.loc["mu", "5%"] == np.quantile(values["mu"], 0.05)


def test_labels_that_do_not_fit():
    values = {"theta": np.zeros((10, 2))}
    with pytest.raises(ValueError, match="'theta' has 1 dimensions, and 2 names for them: school, term"):
        summarize(values, {"theta": ["school", "term"]}, {}, ())
    with pytest.raises(ValueError, match="dimension 'school' of 'theta' has 2 elements and 3 labels in coords"):
        summarize(values, {"theta": ["school"]}, {"school": ["a", "b", "c"]}, ())


def test_diagnostics_of_a_proposal_that_is_shifted():
    """For p = N(1, 1) and q = N(0, 1), log w = x − 1/2: the weights move the mean by one sd."""
    x = np.random.default_rng(0).normal(size=20_000)
    weights = ImportanceWeights(-0.5 * (x - 1) ** 2, -0.5 * x**2)
    table = diagnose({"x": x, "pair": np.stack([x, -x], -1)}, {}, {}, weights)
    assert list(table.index) == ["x", "pair[0]", "pair[1]"]
    assert table.loc["x", "shift"] == pytest.approx(1.0, abs=0.05)
    assert table.loc["pair[1]", "shift"] == pytest.approx(-table.loc["x", "shift"])
    # The weights have E[w²] = e, and those of the mean are smaller: fewer draws of the posterior do as well.
    assert 1000 < table.loc["x", "ess"] < 20_000 / np.e * 1.2
    assert table.loc["x", "mcse_mean"] == pytest.approx(table.loc["x", "ess"] ** -0.5, rel=0.1)


def test_scalars_are_views_in_row_major_order():
    values = {"a": np.arange(12.0).reshape(2, 2, 3)}
    found = scalars(values, {"a": ["row"]}, {"row": ["u", "v"]})
    assert list(found) == ["a[u, 0]", "a[u, 1]", "a[u, 2]", "a[v, 0]", "a[v, 1]", "a[v, 2]"]
    np.testing.assert_array_equal(found["a[v, 1]"], [4.0, 10.0])


def test_a_scalar_that_is_the_same_in_every_draw_has_a_row():
    x = np.random.default_rng(0).normal(size=1000)
    table = diagnose({"x": x, "zero": np.zeros(1000)}, {}, {}, ImportanceWeights(-0.5 * (x - 1) ** 2, -0.5 * x**2))
    assert table.loc["x"].notna().all()
    assert table.loc["zero", "mcse_mean"] == 0
    assert (table.loc["zero", ["mean_error", "sd_error"]] == 0).all()
