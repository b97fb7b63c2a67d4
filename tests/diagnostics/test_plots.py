"""Plots: what is drawn, on given Axes and on new ones."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from draw_cases import scaled_draws

import pyro_flowguides as fg
from pyro_flowguides import transforms as T
from pyro_flowguides.diagnostics.importance import ImportanceWeights
from pyro_flowguides.diagnostics.plots import smoothed

plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_smoothing_is_a_mean_over_a_window():
    values = np.arange(10.0)
    np.testing.assert_allclose(smoothed(values, 3), [0.5, *range(1, 9), 8.5])
    np.testing.assert_array_equal(smoothed(values, 1), values)
    np.testing.assert_allclose(smoothed(values[:3], 50), 1.0)
    values[4] = np.nan
    np.testing.assert_allclose(smoothed(values, 3)[3:6], [2.5, 4, 5.5])
    assert np.isnan(smoothed(np.full(4, np.inf), 1)).all()


def test_plot_elbo():
    steps = np.arange(1000)
    losses = {"flow": 30 + 1e4 * np.exp(-steps / 5), "normal": np.where(steps % 7, 31.0, np.nan)}
    _, ax = plt.subplots()
    assert fg.plot_elbo(losses, log_evidence=-29.5, ax=ax) is ax
    raw, smooth, *_ = ax.get_lines()
    np.testing.assert_allclose(raw.get_ydata(), -losses["flow"])
    np.testing.assert_allclose(smooth.get_ydata(), smoothed(-losses["flow"], 20))
    assert ax.get_legend_handles_labels()[1] == ["flow", "normal", "log Z"]
    # The first steps are far below what is worth seeing, and nothing else is cut.
    low, high = ax.get_ylim()
    assert -40 < low < -31
    assert high > -29.5
    with pytest.raises(ValueError, match="fit 'b' has no finite loss"):
        fg.plot_elbo({"b": np.full(5, np.nan)})


def test_plot_elbo_of_a_fit_or_of_its_losses():
    losses = np.linspace(3.0, 1.0, 50)
    fit = SimpleNamespace(losses=losses, guide=fg.AutoCoupling(lambda: None))
    for source, label in ((fit, "AutoCoupling"), (losses, "fit"), ({"mine": fit}, "mine")):
        raw, smooth = fg.plot_elbo(source).get_lines()
        np.testing.assert_allclose(raw.get_ydata(), -losses)
        assert smooth.get_label() == label


def test_plot_weights():
    x = np.random.default_rng(0).normal(size=4000)
    weights = ImportanceWeights(-0.5 * x**2 / 4, -0.5 * x**2)
    _, ax = plt.subplots()
    assert fg.plot_weights(weights, ax=ax) is ax
    raw, smooth = ax.get_lines()
    # Relative to the mean: smoothed weights have the mean 1, by their sum.
    assert smooth.get_xdata()[-1] == pytest.approx(weights.weights.max() * 4000)
    assert (np.diff(raw.get_ydata()) < 0).all()
    assert raw.get_ydata()[-1] == 1 / 4000
    # Below the fitted tail, 190 draws long, both are the same.
    np.testing.assert_allclose(raw.get_xdata()[:-200], smooth.get_xdata()[:-200])
    assert ax.get_title() == f"k-hat {weights.khat.value:.2f} ± {weights.khat.se:.2f}"
    with pytest.raises(ValueError, match="all weights of 'fit' are equal"):
        fg.plot_weights(ImportanceWeights(np.zeros(50), np.zeros(50)))


def test_plot_weights_of_draws_of_a_fit_and_of_several():
    draws, other = scaled_draws(0.5, 1.5, 2000), scaled_draws(0.2, 1.1, 2000)
    alone = fg.plot_weights(draws)
    for source in (draws.weights, SimpleNamespace(draws=draws, guide=None)):
        ax = fg.plot_weights(source)
        for line, expected in zip(ax.get_lines(), alone.get_lines(), strict=True):
            np.testing.assert_array_equal(line.get_xdata(), expected.get_xdata())
        assert ax.get_title() == alone.get_title()
    ax = fg.plot_weights({"wide": draws, "near": other})
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == [
        f"{name}, k-hat {one.khat:.2f} ± {one.khat.se:.2f}" for name, one in (("wide", draws), ("near", other))
    ]
    np.testing.assert_array_equal(ax.get_lines()[1].get_xdata(), alone.get_lines()[1].get_xdata())
    with pytest.raises(ValueError, match="no importance weights: the draws have been resampled"):
        fg.plot_weights(draws.resample(50))


@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0, 4.0])
def test_the_weights_have_labels_that_do_not_overlap(spread):
    log_ratios = spread * np.random.default_rng(0).normal(size=4000)
    figure, ax = plt.subplots(figsize=(3.3, 3))
    fg.plot_weights(ImportanceWeights(log_ratios, np.zeros(4000)), ax=ax)
    figure.canvas.draw()
    low, high = ax.get_xlim()
    labels = [*ax.get_xticklabels(), *ax.get_xticklabels(minor=True)]
    boxes = [
        label.get_window_extent() for label in labels if label.get_text() and low <= label.get_position()[0] <= high
    ]
    boxes.sort(key=lambda box: box.x0)
    assert len(boxes) >= 2
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))


def test_the_weights_of_scalars():
    draws = scaled_draws(0.5, 1.5, 2000)
    (panel,) = fg.plot_weights_of(SimpleNamespace(draws=draws, guide=None), ["mu"])
    points = panel.get_lines()[0]
    np.testing.assert_array_equal(points.get_xdata(), draws.posterior()["mu"])
    np.testing.assert_allclose(points.get_ydata(), draws.weights.weights * 2000)
    assert panel.get_yscale() == "log" and panel.get_title() == "mu"
    with pytest.raises(ValueError, match="plot_weights_of: there are no draws of 'nu'; there are 'mu'"):
        fg.plot_weights_of(draws, ["nu"])
    with pytest.raises(TypeError, match="labels must be a sequence of labels, got the string 'mu'"):
        fg.plot_weights_of(draws, "mu")
    with pytest.raises(ValueError, match="the draws have been resampled"):
        fg.plot_weights_of(draws.resample(50), ["mu"])


def test_plot_marginals():
    rng = np.random.default_rng(0)
    posteriors = {name: {"a": rng.normal(size=200), "b": rng.normal(size=200)} for name in ("NUTS", "flow", "normal")}
    posteriors["flow"] = pd.DataFrame(posteriors["flow"])
    first, second = fg.plot_marginals(posteriors, ["a", "b"], reference="NUTS")
    assert first.get_title() == "a"
    assert second.get_title() == "b"
    assert [line.get_label() for line in first.get_lines()] == ["flow", "normal"]
    assert len(first.collections) == 1
    _, given = plt.subplots(1, 2)
    assert list(fg.plot_marginals(posteriors, ["a"], axes=given)) == list(given)
    assert not given[1].get_visible()
    with pytest.raises(ValueError, match="plot_marginals: 3 scalars need as many Axes, got 2"):
        fg.plot_marginals(posteriors, ["a", "b", "a"], axes=given)
    with pytest.raises(ValueError, match="posterior 'NUTS' has no draws of 'c'; it has 'a', 'b'"):
        fg.plot_marginals(posteriors, ["c"])
    with pytest.raises(TypeError, match="labels must be a sequence of labels, got the string 'ab'"):
        fg.plot_marginals(posteriors, "ab")


def test_plot_marginals_of_whole_numbers_and_of_constants():
    posteriors = {
        "flow": {"z": np.array([0, 0, 3, 3, 3]), "same": np.full(5, 2.5)},
        "other": {"same": np.arange(5.5)[:5]},
    }
    (panel,) = fg.plot_marginals({"flow": posteriors["flow"]}, ["z"])
    (line,) = panel.get_lines()
    np.testing.assert_allclose(line.get_ydata(), [0, 0.4, 0.4, 0, 0, 0.6, 0.6, 0])
    np.testing.assert_allclose(line.get_xdata()[[1, 2, 5, 6]], [-0.4, 0.4, 2.6, 3.4])
    (panel,) = fg.plot_marginals(posteriors, ["same"])
    assert set(panel.get_lines()[0].get_xdata()) == {2.5}


def flow_of(dim=2):
    base = dist.Normal(torch.zeros(dim), torch.ones(dim)).to_event(1)
    flow = fg.flows.coupling(dim, num_layers=2, hidden_dims=[8])
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return fg.NormalizingFlow(base, T.Compose([flow, T.FixedAffine(torch.ones(dim), 2 * torch.eye(dim))]))


def test_plot_flow_shows_the_density_of_every_layer():
    flow = flow_of()
    panels = fg.plot_flow(flow, num_grid=60, extent=5.0)
    titles = [panel.get_title() for panel in panels if panel.get_visible()]
    assert titles[0] == "base"
    assert titles[-1] == f"{len(titles) - 1}: FixedAffine"
    for panel in panels[: len(titles)]:
        (mesh,) = panel.collections
        points, density = mesh.get_coordinates(), mesh.get_array().reshape(60, 60)
        # The mass of the cells, each a quadrangle with its area by the shoelace formula; 5 sds leave 1e-6 outside.
        a, b, c, d = points[:-1, :-1], points[:-1, 1:], points[1:, 1:], points[1:, :-1]
        diagonals = (c - a), (d - b)
        area = 0.5 * np.abs(diagonals[0][..., 0] * diagonals[1][..., 1] - diagonals[0][..., 1] * diagonals[1][..., 0])
        centre = (density[:-1, :-1] + density[:-1, 1:] + density[1:, 1:] + density[1:, :-1]) / 4
        assert (area * centre).sum() == pytest.approx(1, abs=0.02)
    np.testing.assert_allclose(
        density, flow.log_prob(torch.as_tensor(points)).exp().detach().cpu(), rtol=1e-3, atol=1e-6
    )


def test_plot_flow_that_cannot_be():
    with pytest.raises(ValueError, match=r"vectors of 2 elements is needed, got one of shape \(3,\)"):
        fg.plot_flow(flow_of(3))
    with pytest.raises(ValueError, match="there is no layer 9"):
        fg.plot_flow(flow_of(), layers=[9])
    with pytest.raises(ValueError, match="plot_flow: 2 layers need as many Axes, got 1"):
        fg.plot_flow(flow_of(), layers=[0, -1], axes=plt.subplots()[1])
    base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
    with pytest.raises(ValueError, match="a random estimate, and so would its density be"):
        fg.plot_flow(fg.NormalizingFlow(base, T.Residual(2, log_det="hutchinson")))


@pytest.fixture
def modes():
    centers = torch.tensor([[5.0, 0.0, 1.0], [-5.0, 0.0, 1.0]])

    def log_density(x):
        return (torch.tensor([0.7, 0.3]).log() - (x.unsqueeze(-2) - centers).square().sum(-1) / 2).logsumexp(-1)

    return fg.find_modes(fg.LogDensity(log_density, 3), seed=0)


def test_plot_modes(modes):
    _, ax = plt.subplots()
    assert fg.plot_modes(modes, ["x[0]", "x[2]"], ax=ax) is ax
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x[0]", "x[2]")
    (circles,) = ax.collections
    np.testing.assert_allclose(circles.get_offsets(), [[5, 1], [-5, 1]], atol=0.01)
    first, second = circles.get_sizes()
    assert first / second == pytest.approx(modes[0].mass.value / modes[1].mass.value)
    assert [text.get_text() for text in ax.texts] == ["70%", "30%"]
    # The modes agree in x[2]: their width is in view, and not the rounding of the search.
    low, high = ax.get_ylim()
    assert -4 < low < -1 and 3 < high < 6
    # The scalar that differs is among those that are chosen.
    assert fg.plot_modes(modes).get_xlabel() == "x[0]"
    assert fg.plot_modes(modes, ["x[0]"]).get_ylabel() == "mass"


def test_plot_modes_of_a_fit_with_its_draws(modes):
    values = torch.zeros(50, 3)
    fit = SimpleNamespace(modes=modes, draws=SimpleNamespace(values={"x": values}))
    ax = fg.plot_modes(fit)
    assert len(ax.lines[0].get_xdata()) == 50


def test_errors_of_plot_modes(modes):
    with pytest.raises(ValueError, match="there are no modes to show"):
        fg.plot_modes(SimpleNamespace(modes=None))
    for labels in (["y"], ["x[0]", "x[1]", "x[2]"], "x[0]"):
        with pytest.raises(ValueError, match="labels must be one or two of"):
            fg.plot_modes(modes, labels)
