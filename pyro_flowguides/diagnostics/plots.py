"""Plots that ArviZ does not have: matplotlib Axes in, matplotlib Axes out. Needs the extra ``plots``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..distributions import NormalizingFlow
from ..transforms.base import Compose, FlowTransform
from .importance import ImportanceWeights
from .modes import Modes
from .summary import scalars

_NUM_GRID = 200
# The smoothed curve of an ELBO is the mean over this fraction of its steps.
_SMOOTHING = 0.02
MAX_BARS = 50


def plot_elbo(fits: Any, *, log_evidence: float | None = None, ax: Any = None) -> Any:
    """The ELBO of every step, pale, with a smoothed curve, for one fit or several.

    The axis leaves out the first tenth of the steps where those would flatten the rest.

    Arguments:
        fits: A fit, an array of its losses (``fit.losses``), or a mapping of names to these. Losses of skipped steps may be NaN.
        log_evidence: log Z, which no ELBO exceeds but by noise; drawn as a line if given.
        ax: The matplotlib Axes to draw on; made if not given.

    Returns:
        The Axes.

    Raises:
        ImportError: without matplotlib.
        ValueError: if a fit has no finite loss.
    """
    ax = _one_axes(ax)
    shown = []
    for i, (name, fit) in enumerate(_by_name(fits).items()):
        elbo = -np.asarray(getattr(fit, "losses", fit), dtype=np.float64)
        if not np.isfinite(elbo).any():
            raise ValueError(f"plot_elbo: fit '{name}' has no finite loss")
        smooth = smoothed(elbo, max(1, round(_SMOOTHING * len(elbo))))
        ax.plot(elbo, color=f"C{i}", alpha=0.25, linewidth=0.5)
        ax.plot(smooth, color=f"C{i}", label=name)
        shown.append(elbo[len(elbo) // 10 :])
    if log_evidence is not None:
        ax.axhline(log_evidence, color="0.4", linestyle="--", linewidth=1, label="log Z")
        shown.append(np.array([log_evidence]))
    visible = np.concatenate(shown)
    visible = visible[np.isfinite(visible)]
    if visible.size:
        low, high = np.quantile(visible, 0.005), visible.max()
        margin = 0.05 * (high - low) or 1.0
        ax.set_ylim(low - margin, high + margin)
    ax.set_xlabel("step")
    ax.set_ylabel("ELBO")
    ax.legend(frameon=False, fontsize="small")
    return ax


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """The mean over a centred window, shorter at the ends; over what is finite in it, NaN where nothing is."""
    finite = np.isfinite(values)
    kernel = np.ones(window)

    def windowed(summands: np.ndarray) -> np.ndarray:
        # A window may be longer than the values.
        full = np.convolve(summands, kernel)
        start = (window - 1) // 2
        return full[start : start + len(values)]

    with np.errstate(invalid="ignore", divide="ignore"):
        return windowed(np.where(finite, values, 0.0)) / np.round(windowed(finite.astype(np.float64)))


def plot_weights(draws: Any, *, ax: Any = None) -> Any:
    """The upper tail of importance weights, with the Pareto tail that was fitted to it and k-hat, on double logarithmic axes.

    For every weight the fraction of the draws that have a larger one. A straight decay is a power law, and the flatter it is
    the larger is k-hat.

    Arguments:
        draws: :class:`Draws`, a fit, ``draws.weights``, or a mapping of names to these.
        ax: The matplotlib Axes to draw on; made if not given.

    Returns:
        The Axes.

    Raises:
        ImportError: without matplotlib.
        ValueError: if draws have no weights, or all of them are equal, so that there is no tail.
    """
    several = isinstance(draws, Mapping)
    found = {name: _weights_of(source) for name, source in _by_name(draws).items()}
    for name, weights in found.items():
        if weights.are_constant:
            raise ValueError(
                f"plot_weights: all weights of '{name}' are equal, up to rounding: the guide is exact, and there is no tail"
            )
    ax = _one_axes(ax)
    for i, (name, weights) in enumerate(found.items()):
        raw, smooth, above = _upper_tail(weights)
        khat = f"k-hat {weights.khat.value:.2f} ± {weights.khat.se:.2f}"
        pale = {"color": f"C{i}", "alpha": 0.4} if several else {"color": "0.5", "label": "weights"}
        ax.loglog(raw, above, ".", markersize=3, **pale)
        label = f"{name}, {khat}" if several else "Pareto-smoothed"
        ax.loglog(smooth, above, color=f"C{i}" if several else "C1", label=label)
        if not several:
            ax.set_title(khat, fontsize="medium")
    _label_short_log_axis(ax)
    ax.set_xlabel("weight / mean weight")
    ax.set_ylabel("fraction of draws above")
    ax.legend(frameon=False, fontsize="small")
    return ax


def plot_weights_of(draws: Any, labels: Sequence[str], *, axes: Any = None) -> Any:
    """The smoothed weight of every draw against its value of a scalar, one panel per scalar.

    A slope is an error of the mean, a bowl one of the sd, and weights that rise towards an end are a part that the guide misses.

    Arguments:
        draws: :class:`Draws` or a fit.
        labels: The scalars to show, an element of a vector as ``"theta[0]"``.
        axes: An array of at least ``len(labels)`` matplotlib Axes to draw on; made if not given.

    Returns:
        The Axes, a flat array.

    Raises:
        ImportError: without matplotlib.
        TypeError: if the labels are a single string.
        ValueError: if the draws have no weights or no such scalar, or there are not enough Axes.
    """
    if isinstance(labels, str):
        raise TypeError(f"plot_weights_of: labels must be a sequence of labels, got the string '{labels}'")
    draws = getattr(draws, "draws", draws)
    weights, columns = _weights_of(draws), scalars(draws.posterior(), draws.dims, {})
    relative = weights.weights * len(weights)
    panels = _panels(axes, len(labels), "plot_weights_of", "scalars")
    for panel, label in zip(panels, labels, strict=False):
        if label not in columns:
            known = ", ".join(f"'{each}'" for each in list(columns)[:10]) + (", …" if len(columns) > 10 else "")
            raise ValueError(f"plot_weights_of: there are no draws of '{label}'; there are {known}")
        # A draw without density has no place on a logarithmic axis.
        panel.semilogy(columns[label][relative > 0], relative[relative > 0], ".", markersize=2, alpha=0.3)
        panel.axhline(1.0, color="0.4", linewidth=1)
        panel.set_title(label, fontsize="medium")
    panels[0].set_ylabel("weight / mean weight")
    return panels


def _upper_tail(weights: ImportanceWeights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest weights, raw and smoothed, by the mean weight, and the fraction of draws with at least that weight."""
    order = np.argsort(weights.log_ratios)
    smooth = weights.smoothed_log_weights[order]
    # The bodies of raw and smoothed weights differ by normalisation alone.
    raw = weights.log_ratios[order] + np.median(smooth - weights.log_ratios[order])
    num_samples = len(weights)
    above = (num_samples - np.arange(num_samples)) / num_samples
    tail = slice(-min(num_samples // 2, 10 * int(num_samples**0.5)), None)
    relative = np.log(num_samples)
    return np.exp(raw[tail] + relative), np.exp(smooth[tail] + relative), above[tail]


def _by_name(sources: Any) -> Mapping[str, Any]:
    """Sources by name; a single one is called after its guide, if it is a fit."""
    if isinstance(sources, Mapping):
        return sources
    guide = getattr(sources, "guide", None)
    return {"fit" if guide is None else type(guide).__name__: sources}


def _weights_of(source: Any) -> ImportanceWeights:
    """The weights of draws, of the draws of a fit, or those given."""
    return source if isinstance(source, ImportanceWeights) else getattr(source, "draws", source).weights


def plot_flow(
    flow: NormalizingFlow,
    *,
    layers: Sequence[int] | None = None,
    extent: float = 3.5,
    num_grid: int = 150,
    axes: Any = None,
) -> Any:
    r"""The density of a flow in two dimensions, from its base through every layer to the end, a panel each.

    A grid of base points z is pushed forward, and the density of every point after l layers is
    :math:`\log q_0(z) - \sum_{i \le l} \log\left|\det\right|_i`: exact, and without any inverse.

    Arguments:
        flow: The distribution, such as ``guide.get_posterior()``.
        layers: The panels to show: 0 for the base, l for the density after l layers; negative from the end. All by default.
        extent: The grid goes from −extent to extent in both coordinates of z.
        num_grid: Its points along each.
        axes: An array of at least as many matplotlib Axes as there are panels; made if not given.

    Returns:
        The Axes, a flat array.

    Raises:
        ImportError: without matplotlib.
        ValueError: if the flow is not of two dimensions, its log-determinant is a random estimate, a layer does not exist,
            or there are not enough Axes.

    Example:
        >>> import pyro.distributions as dist, pyro_flowguides as fg
        >>> base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
        >>> axes = fg.plot_flow(NormalizingFlow(base, fg.flows.planar(2, num_layers=4)), layers=[0, -1])
        >>> [ax.get_title() for ax in axes.ravel()]
        ['base', '4: Planar']
    """
    if tuple(flow.event_shape) != (2,) or flow.batch_shape:
        raise ValueError(
            f"plot_flow: a flow over vectors of 2 elements is needed, got one of shape {tuple(flow.shape())}"
        )
    if flow.transform.stochastic_log_det:
        raise ValueError(
            "plot_flow: the log-determinant of this flow is a random estimate, and so would its density be"
        )
    parts = list(_parts(flow.transform))
    shown = list(range(len(parts) + 1))
    if layers is not None:
        for layer in layers:
            if not -len(shown) <= layer < len(shown):
                raise ValueError(f"plot_flow: there is no layer {layer}; the flow has {len(parts)}")
        shown = [shown[layer] for layer in layers]
    panels = _panels(axes, len(shown), "plot_flow", "layers")
    with torch.no_grad():
        # From the base's own tensors, for their dtype and device.
        example = flow.base_dist.sample()
        line = torch.linspace(-extent, extent, num_grid, dtype=example.dtype, device=example.device)
        x = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
        log_density = flow.base_dist.log_prob(x)
        steps = [("base", x, log_density)]
        for i, part in enumerate(parts, 1):
            x, log_det = part.forward_and_log_det(x)
            log_density = log_density - log_det
            # In a guide every module is of a Pyro subclass of its own class.
            steps.append((f"{i}: {type(part).__name__.removeprefix('Pyro')}", x, log_density))
    for panel, index in zip(panels, shown, strict=False):
        title, points, logs = steps[index]
        first, second = points.unbind(-1)
        mesh = panel.pcolormesh(
            *(value.cpu().numpy() for value in (first, second, logs.exp())), shading="gouraud", rasterized=True
        )
        # Beyond the grid the density is next to nothing.
        panel.set_facecolor(mesh.get_cmap()(0.0))
        panel.set_title(title, fontsize="medium")
    return panels


def plot_modes(modes: Any, labels: Sequence[str] | None = None, *, ax: Any = None) -> Any:
    """Where the modes are, and the mass of each: an area in the plane of two scalars, or a height over one.

    Modes that the guide has not drawn are red. Of a fit its draws are shown as well.

    Arguments:
        modes: :class:`Modes`, or a fit with ``fit.modes``.
        labels: One scalar or two, an element of a vector as ``"theta[0]"``; by default the two that differ most.
        ax: The matplotlib Axes to draw on; made if not given.

    Returns:
        The Axes.

    Raises:
        ImportError: without matplotlib.
        ValueError: if there are no modes, a scalar is unknown, or the labels are not one or two.
    """
    found: Modes | None = modes if isinstance(modes, Modes) else modes.modes
    if not found:
        raise ValueError("plot_modes: there are no modes to show; were they looked for?")
    named, sds = (
        scalars({name: np.stack([each[name].cpu().numpy() for each in sites]) for name in sites[0]}, {}, {})
        for sites in ([mode.values for mode in found], [mode.sd for mode in found])
    )
    if labels is None:
        labels = sorted(named, key=lambda label: -np.ptp(named[label]))[:2]
        labels = sorted(labels, key=list(named).index)
    unknown = [label for label in labels if label not in named]
    if isinstance(labels, str) or not 1 <= len(labels) <= 2 or unknown:
        raise ValueError(f"plot_modes: labels must be one or two of {', '.join(named)}, got {labels!r}")
    ax = _one_axes(ax)
    colors = ["C3" if mode.is_lost else "C0" for mode in found]
    masses = np.array([mode.mass.value for mode in found])
    x = named[labels[0]]
    if len(labels) == 2:
        if not isinstance(modes, Modes):
            drawn = scalars({name: modes.draws.values[name][:1000].cpu().numpy() for name in found[0].values}, {}, {})
            ax.plot(drawn[labels[0]], drawn[labels[1]], ".", color="0.8", markersize=2, zorder=0)
        y = named[labels[1]]
        ax.scatter(x, y, s=2000 * masses, c=colors, alpha=0.5, linewidths=0)
        # Modes may agree in a scalar up to rounding: what is far is told by their widths.
        x_sd, y_sd = sds[labels[0]], sds[labels[1]]
        ax.update_datalim(
            [*zip(x - 3 * x_sd, y - 3 * y_sd, strict=True), *zip(x + 3 * x_sd, y + 3 * y_sd, strict=True)]
        )
        ax.set_ylabel(labels[1])
    else:
        y = masses
        ax.vlines(x, 0, y, colors=colors, linewidth=3)
        ax.set_ylabel("mass")
    for horizontal, vertical, mass in zip(x, y, masses, strict=True):
        ax.annotate(f"{mass:.0%}", (horizontal, vertical), ha="center", va="center" if len(labels) == 2 else "bottom")
    ax.margins(0.15)
    ax.set_xlabel(labels[0])
    return ax


def _parts(transform: FlowTransform) -> Iterator[FlowTransform]:
    """The layers of a stack of stacks, in the order of sampling."""
    if isinstance(transform, Compose):
        for part in transform.transforms:
            yield from _parts(part)
    else:
        yield transform


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'pyro-flowguides[plots]'") from error
    return plt


def _label_short_log_axis(ax: Any) -> None:
    """Gives a logarithmic x axis of less than two decades round numbers: matplotlib's labels of its minor ticks overlap there."""
    from matplotlib.ticker import MaxNLocator

    low, high = ax.get_xlim()
    if high < 100 * low:
        ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_xticks([], minor=True)


def _one_axes(ax: Any) -> Any:
    plt = _pyplot()
    return plt.subplots(figsize=(5, 3.2), layout="constrained")[1] if ax is None else ax


def _panels(axes: Any, number: int, function: str, of_what: str) -> np.ndarray:
    """The Axes given, or new ones in rows of four, as a flat array; the superfluous ones are hidden."""
    plt = _pyplot()
    if axes is None:
        columns = min(4, number)
        rows = -(-number // columns)
        _, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.6 * rows), layout="constrained", squeeze=False)
    panels = np.asarray(axes).ravel()
    if len(panels) < number:
        raise ValueError(f"{function}: {number} {of_what} need as many Axes, got {len(panels)}")
    for panel in panels[number:]:
        panel.set_visible(False)
    return panels


def plot_marginals(
    posteriors: Mapping[str, Mapping[str, np.ndarray]],
    labels: Sequence[str],
    *,
    reference: str | None = None,
    axes: Any = None,
) -> Any:
    """The marginal densities of several posteriors, one panel per scalar, over each other.

    Of whole numbers these are frequencies, as steps; a scalar that is the same in all draws is a line.

    Arguments:
        posteriors: Name of the posterior, to label of the scalar, to its draws, 1-D, such as :meth:`Draws.to_dataframe`.
        labels: The scalars to show, an element of a vector as ``"theta[0]"``.
        reference: The posterior that the others are compared with: drawn as a grey area behind them.
        axes: An array of at least ``len(labels)`` matplotlib Axes to draw on; made if not given.

    Returns:
        The Axes, a flat array.

    Raises:
        ImportError: without matplotlib.
        TypeError: if the labels are a single string.
        ValueError: if there are not enough Axes, or a posterior has no draws of a scalar.
    """
    from scipy.stats import gaussian_kde

    if isinstance(labels, str):
        raise TypeError(f"plot_marginals: labels must be a sequence of labels, got the string '{labels}'")

    panels = _panels(axes, len(labels), "plot_marginals", "scalars")
    for panel, label in zip(panels, labels, strict=False):
        for name, draws in posteriors.items():
            if label not in draws:
                known = ", ".join(f"'{each}'" for each in list(draws)[:10]) + (", …" if len(list(draws)) > 10 else "")
                raise ValueError(f"plot_marginals: posterior '{name}' has no draws of '{label}'; it has {known}")
        columns = {name: np.asarray(draws[label], dtype=np.float64) for name, draws in posteriors.items()}
        low = min(np.quantile(column, 0.002) for column in columns.values())
        high = max(np.quantile(column, 0.998) for column in columns.values())
        are_whole = all(map(is_whole, columns.values()))
        for name, column in columns.items():
            if are_whole:
                grid, density = _bars(column)
                panel.locator_params(axis="x", nbins=6, integer=True)
                panel.set_xlim(min(map(np.min, columns.values())) - 0.6, max(map(np.max, columns.values())) + 0.6)
            elif np.ptp(column) == 0:
                panel.axvline(column[0], color="0.82" if name == reference else None, label=name)
                continue
            else:
                grid = np.linspace(low, high, _NUM_GRID)
                density = gaussian_kde(column)(grid)
            if name == reference:
                panel.fill_between(grid, density, color="0.82", label=name, zorder=0)
            else:
                panel.plot(grid, density, label=name)
        panel.set_title(label, fontsize="medium")
        panel.set_yticks([])
        panel.spines[["left", "right", "top"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize="small")
    return panels


def is_whole(column: np.ndarray) -> bool:
    """Whether draws are whole numbers, and few enough different ones for a bar each."""
    return len(values := np.unique(column)) <= MAX_BARS and bool((values == np.round(values)).all())


def _bars(column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The outline of a bar for every whole number that occurs: its corners, and their heights."""
    values, counts = np.unique(column, return_counts=True)
    corners = values[:, None] + np.array([-0.4, -0.4, 0.4, 0.4])
    heights = (counts / len(column))[:, None] * np.array([0.0, 1.0, 1.0, 0.0])
    return corners.ravel(), heights.ravel()
