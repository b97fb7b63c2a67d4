"""Pictures: what each shows, and the sentence in its place where there is nothing to show."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from report_cases import Y, correlated, draws_of, normal, posterior_with_model

import pyro_flowguides as fg
from pyro_flowguides.diagnostics.posterior import Posterior
from pyro_flowguides.report import gather, page, pictures

pytest.importorskip("matplotlib")

WHOLE = {"z": np.random.default_rng(0).integers(0, 2, size=200)}


def parsed(svg):
    """HTML knows the prefix of links within a picture, XML does not."""
    return ET.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="x" ', 1))


def report_of(values, **options):
    changes = options.pop("draws", {})
    return gather(Posterior([draws_of(values, **changes)]), **options)


@pytest.mark.parametrize("draw", ["marginals", "pairs", "predictive", "weights"])
def test_pictures_are_whole_and_in_the_colors_of_the_page(draw):
    panels = pictures.drawn(getattr(pictures, draw), gather(posterior_with_model()))
    assert panels
    for panel in panels:
        svg = parsed(panel.html)
        assert svg.get("role") == "img"
        assert svg.get("aria-label")
        assert "width" not in svg.attrib
        assert len(list(svg.iter())) > 10
        # Every color is one of the page, but that of bitmaps.
        assert "var(--" in panel.html
        assert "#0102" not in panel.html
        assert "#000000" not in panel.html


def test_the_pair_that_is_correlated_most_comes_first():
    values = {**correlated(), "alone": normal(300, seed=3), "double": 2 * correlated()["a"]}
    first, *_ = pictures.drawn(pictures.pairs, report_of(values))
    # Twice a parameter is that parameter again.
    assert ">b<" in first.html
    assert first.caption.startswith("correlation 0.9")


def test_curves_of_other_posteriors_and_their_legend():
    report = report_of(correlated(), beside={"other": {"b": normal(50)}, "nuts": {"b": normal(50)}}, reference="nuts")
    first, second = pictures.drawn(pictures.marginals, report)
    # What others have, too, comes first.
    assert (first.caption, second.caption) == ("b", "a")
    assert "var(--area)" in first.html and "var(--series-2)" in first.html
    assert "var(--area)" not in second.html and "var(--series-2)" not in second.html
    assert pictures.legend_of_marginals(report) == [
        ("nuts", "var(--area)"),
        ("other", "var(--series-1)"),
        ("draws", "var(--series-2)"),
    ]


def test_names_that_look_like_formulas_or_tags():
    values = {"$a": correlated()["a"], "<b>$": correlated()["b"]}
    for draw in (pictures.marginals, pictures.pairs):
        for panel in pictures.drawn(draw, report_of(values)):
            parsed(panel.html)
            assert "<b>" not in panel.html


@pytest.mark.parametrize(
    ("draw", "report", "sentence"),
    [
        ("marginals", lambda: report_of({"x": np.full(50, np.nan)}), "No parameter has finite draws"),
        ("pairs", lambda: report_of({"x": normal(50)}), "There are no two continuous parameters"),
        ("pairs", lambda: report_of({**WHOLE, "x": normal(200)}), "There are no two continuous parameters"),
        ("pairs", lambda: report_of({"x": normal(50), "y": 2 * normal(50)}), "No two parameters vary each for itself"),
        ("predictive", lambda: report_of(correlated()), "The model observes nothing"),
        (
            "predictive",
            lambda: gather(posterior_with_model(observed={"y": torch.full((4,), torch.nan)})),
            "The observed values and those of the model are not finite",
        ),
        ("training", lambda: report_of(correlated()), "The losses of the training are not at hand"),
        (
            "weights",
            lambda: report_of(correlated(), draws={"weights_error": "the data are subsampled"}),
            "These draws have no importance weights: the data are subsampled.",
        ),
        ("weights", lambda: report_of(correlated(), draws={"noise": 0.0}), "All weights are equal"),
        ("weights", lambda: report_of({"x": normal(5)}), "These draws have no importance weights: PSIS needs at least"),
        ("modes", lambda: report_of(correlated()), "There is one mode"),
    ],
)
def test_a_sentence_where_there_is_nothing_to_draw(draw, report, sentence):
    assert pictures.drawn(getattr(pictures, draw), report()).startswith(sentence)


@pytest.mark.parametrize("error", [ImportError("no"), RuntimeError("too\nbad")])
def test_a_picture_that_fails_leaves_a_sentence(error):
    def draw(report):
        raise error
        yield

    sentence = pictures.drawn(draw, report_of(correlated()))
    assert sentence.startswith(
        "Pictures need matplotlib" if isinstance(error, ImportError) else "This picture could not"
    )
    assert "\n" not in sentence


@pytest.mark.parametrize(
    "values", [WHOLE, {"x": np.full(50, 1.5)}, {"x": np.r_[np.inf, normal(49)], "y": normal(50)}, {"x": normal(3)}]
)
def test_marginals_of_whole_numbers_constants_and_few_draws(values):
    (panel,) = pictures.drawn(pictures.marginals, report_of(values))
    parsed(panel.html)


@pytest.mark.parametrize("observed", [Y[0], Y.bool(), torch.tensor([0, 0, 3, 1]), torch.zeros(4), Y.reshape(2, 2)])
def test_data_of_every_kind(observed):
    posterior = posterior_with_model(observed={"y": observed})
    report = gather(posterior, with_predictive=False)
    object.__setattr__(
        report, "predicted", {"y": np.stack([observed.numpy()] * 20).astype(float) + 0 * normal(20, *observed.shape)}
    )
    (panel,) = pictures.drawn(pictures.predictive, report)
    parsed(panel.html)


def test_the_elbo_of_a_fit():
    report = report_of(correlated())
    object.__setattr__(report, "losses", np.linspace(3.0, 1.0, 50))
    (panel,) = pictures.drawn(pictures.training, report)
    assert panel.is_wide


def test_modes_are_drawn_and_listed():
    centers = torch.tensor([[5.0, 0.0], [-5.0, 0.0]])

    def log_density(x):
        return (torch.tensor([0.7, 0.3]).log() - (x.unsqueeze(-2) - centers).square().sum(-1) / 2).logsumexp(-1)

    modes = fg.find_modes(fg.LogDensity(log_density, 2), seed=0)
    report = report_of({"x": normal(100, 2)}, modes=modes)
    (panel,) = pictures.drawn(pictures.modes, report)
    parsed(panel.html)
    assert ">70%<" in panel.html and ">30%<" in panel.html
    assert "<td>70% ± " in page(report)
