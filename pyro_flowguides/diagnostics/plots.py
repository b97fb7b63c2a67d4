"""Plots that ArviZ has not: matplotlib Axes in, matplotlib Axes out. Needs the extra ``plots``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_NUM_GRID = 200


def plot_marginals(
    posteriors: Mapping[str, Mapping[str, np.ndarray]],
    labels: Sequence[str],
    *,
    reference: str | None = None,
    axes: Any = None,
) -> Any:
    """The marginal densities of several posteriors, one panel per scalar, over each other.

    Arguments:
        posteriors: Name of the posterior, to label of the scalar, to its draws, 1-D.
        labels: The scalars to show.
        reference: The posterior that the others are compared with: drawn as a grey area behind them.
        axes: An array of at least ``len(labels)`` matplotlib Axes to draw on; made if not given.

    Returns:
        The array of Axes.

    Raises:
        ImportError: without matplotlib.
        ValueError: if there are not enough Axes, or a posterior has no draws of a scalar.
    """
    try:
        import matplotlib.pyplot as plt
        from scipy.stats import gaussian_kde
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'pyro-flowguides[plots]'") from error

    if axes is None:
        columns = min(4, len(labels))
        rows = -(-len(labels) // columns)
        _, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.6 * rows), layout="constrained", squeeze=False)
    panels = np.asarray(axes).ravel()
    if len(panels) < len(labels):
        raise ValueError(f"plot_marginals: {len(labels)} scalars need as many Axes, got {len(panels)}")
    for panel, label in zip(panels, labels, strict=False):
        for name, draws in posteriors.items():
            if label not in draws:
                raise ValueError(f"plot_marginals: posterior '{name}' has no draws of '{label}'")
        low = min(np.quantile(draws[label], 0.002) for draws in posteriors.values())
        high = max(np.quantile(draws[label], 0.998) for draws in posteriors.values())
        grid = np.linspace(low, high, _NUM_GRID)
        for name, draws in posteriors.items():
            density = gaussian_kde(draws[label])(grid)
            if name == reference:
                panel.fill_between(grid, density, color="0.82", label=name, zorder=0)
            else:
                panel.plot(grid, density, label=name)
        panel.set_title(label, fontsize="medium")
        panel.set_yticks([])
        panel.spines[["left", "right", "top"]].set_visible(False)
    for panel in panels[len(labels) :]:
        panel.set_visible(False)
    panels[0].legend(frameon=False, fontsize="small")
    return axes
