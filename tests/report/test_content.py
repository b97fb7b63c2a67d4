"""What a report is made of: which scalars, which errors, which data, which facts."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from report_cases import Y, correlated, draws_of, normal, posterior_with_model

import pyro_flowguides as fg
from pyro_flowguides.diagnostics.posterior import Posterior, posterior_from_tree
from pyro_flowguides.report import gather


def test_the_table_has_estimates_and_expected_errors():
    report = gather(Posterior([draws_of(correlated())]))
    assert list(report.table.index) == ["a", "b"]
    assert list(report.table.columns) == ["mean", "sd", "5%", "50%", "95%", "khat", "mean_error", "sd_error"]
    column = correlated()["a"]
    np.testing.assert_allclose(report.table.loc["a", ["mean", "50%"]].astype(float), [column.mean(), np.median(column)])


def test_weighted_estimates_where_the_verdict_is_good_for_these_alone():
    x = normal(4000)
    # Of a normal with mean 0.3, by draws of the standard normal.
    draws = draws_of({"x": x}, log_p=torch.as_tensor(-0.5 * (x - 0.3) ** 2), log_q=torch.as_tensor(-0.5 * x**2))
    report = gather(Posterior([draws]))
    assert report.is_weighted
    assert report.table.loc["x", "mean"] == pytest.approx(0.3, abs=5 * 4000**-0.5)
    assert report.table.loc["x", "mean_error"] < 0.1


def test_no_errors_of_what_the_verdict_is_not_on():
    values = {"z": (normal(200) > 2.5).astype(float), "x": normal(200, seed=1)}
    table = gather(Posterior([draws_of(values, summed_out=("z",))])).table
    columns = ["khat", "mean_error", "sd_error"]
    assert table.loc["z", columns].isna().all() and table.loc["z", ["mean", "sd"]].notna().all()
    assert table.loc["x", ["khat", "mean_error"]].notna().all()
    # 200 draws do not determine an sd with such tails.
    heavy = np.r_[normal(199), 300.0]
    assert np.isnan(gather(Posterior([draws_of({"x": heavy})])).table.loc["x", "sd_error"])


def test_of_many_scalars_those_with_the_largest_errors():
    x = normal(200, 60)
    weights = torch.as_tensor(0.5 * x[:, 50])
    report = gather(Posterior([draws_of({"x": x}, log_p=weights)]))
    assert len(report.table) == 30
    assert report.table.index[0] == "x[50]"
    # What has no error comes after what has one.
    labels = {"z": (x > 0).astype(float), "a": normal(200)}
    assert list(gather(Posterior([draws_of(labels, summed_out=("z",))])).table.index) == [
        "a",
        *(f"z[{i}]" for i in range(29)),
    ]
    without = gather(Posterior([draws_of({"x": x}, weights_error="the data are subsampled")]))
    assert list(without.table.index) == [f"x[{i}]" for i in range(30)]
    assert "khat" not in without.table.columns


def test_data_of_the_model_leave_the_random_state_alone():
    posterior, state = posterior_with_model(), torch.get_rng_state()
    report = gather(posterior)
    assert torch.equal(torch.get_rng_state(), state)
    assert report.predicted["y"].shape == (100, 4)
    np.testing.assert_array_equal(report.predicted["y"], gather(posterior).predicted["y"])
    # y is a plus a standard normal.
    first = report.predicted["y"].mean(1) - correlated()["a"][np.linspace(0, 299, 100).astype(int)]
    assert abs(first.mean()) < 5 * (1 / 400) ** 0.5


@pytest.mark.parametrize(
    ("posterior", "sentence"),
    [
        (Posterior([draws_of(correlated())]), "The model observes nothing"),
        (Posterior([draws_of(correlated(), observed={"y": Y})]), "Neither the model nor data that it has made"),
        (posterior_with_model(minibatch_size=10), "The data are subsampled"),
        (
            dataclasses.replace(
                posterior_with_model(), call=dataclasses.replace(posterior_with_model().call, args=(1, 2))
            ),
            "The model cannot make data at these draws: TypeError",
        ),
    ],
)
def test_why_there_are_no_data_of_the_model(posterior, sentence):
    report = gather(posterior)
    assert report.predicted == {}
    assert report.unpredicted.startswith(sentence)


def test_sites_of_a_loop_over_data_are_one():
    observed = {f"y_{i}": Y[i] for i in range(4)}
    assert gather(Posterior([draws_of(correlated(), observed=observed)])).observed["y"].shape == (4,)


def test_facts():
    attrs = {"vectorization": "recorded", "guide": "AutoIAF", "made_by": "fit(model)", "interrupted": 1}
    posterior = dataclasses.replace(posterior_with_model(summed_out=("z",)), attrs=attrs, seconds=1.25)
    report = gather(posterior, facts={"More": "than that"})
    assert (report.model, report.guide, report.again) == ("model", "AutoIAF", "fit(model)")
    assert report.facts["The model was run"].startswith("recorded once")
    assert report.facts["Discrete sites summed out"].startswith("z; ")
    assert report.facts["Observations"] == "y: 4"
    assert report.facts["Unconstrained parameters"] == "2"
    assert "Interrupted" in report.facts
    assert report.facts["More"] == "than that"
    assert "Steps of training" not in report.facts
    assert report.versions["torch"] == torch.__version__


def test_a_reference_must_be_beside_it():
    posterior = Posterior([draws_of(correlated())])
    with pytest.raises(ValueError, match="the reference 'nuts' is not among flow"):
        gather(posterior, beside={"flow": correlated()}, reference="nuts")
    report = gather(posterior, beside={"nuts": correlated(), "flow": draws_of(correlated())}, reference="nuts")
    np.testing.assert_array_equal(report.beside["flow"]["a"], correlated()["a"])


def test_a_file_has_what_its_report_needs():
    pytest.importorskip("arviz")
    attrs = {"vectorization": "broadcast", "guide": "AutoIAF", "made_by": "fit(model)"}
    posterior = dataclasses.replace(posterior_with_model(summed_out=("b",)), attrs=attrs)

    class Source:
        def to_posterior(self, num_samples):
            return posterior

    tree = fg.to_arviz(Source(), prior=False)
    report = gather(posterior_from_tree(tree))
    assert (report.model, report.guide, report.again) == ("model", "AutoIAF", "fit(model)")
    assert report.draws.summed_out == ("b",)
    assert report.predicted["y"].shape == (100, 4)
    assert report.verdict.kind is posterior.verdict.kind
    assert math.isclose(report.verdict.khat, posterior.verdict.khat)
    assert report.versions["python"]
    assert report.facts["The model was run"].startswith("for all draws at once")
