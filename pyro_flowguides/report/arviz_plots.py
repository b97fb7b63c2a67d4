"""Pictures that ArviZ draws, the same in both of its generations: pairs of parameters, and data of the fit beside the data.

This module works on numpy arrays and needs no torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..diagnostics.arviz import Group, arviz_generation, to_tree

# Legible on light and on dark paper. What ArviZ draws in many points or lines is a bitmap, whose colors are fixed.
DRAWS_COLOR = "#5b8def"


def pair_figure(x: np.ndarray, y: np.ndarray, size: tuple[float, float]) -> Any:
    """A matplotlib figure of the draws of two scalars against each other.

    Arguments:
        x: The draws of the first, shape (S,).
        y: The draws of the second, shape (S,).
        size: Width and height in inches.
    """
    tree = to_tree({"posterior": Group({"x": x[None], "y": y[None]})})
    with _quiet() as az:
        if arviz_generation() == 0:
            figure, ax = _new_figure(size)
            style = {"color": DRAWS_COLOR, "alpha": 0.35, "s": 6, "lw": 0}
            az.plot_pair(tree, var_names=["x", "y"], kind="scatter", scatter_kwargs=style, ax=ax)
        else:
            style = {"scatter": {"color": DRAWS_COLOR, "alpha": 0.35, "s": 6}}
            found = az.plot_pair_focus(tree, focus_var="y", var_names=["x"], visuals=style, backend="matplotlib")
            figure = _figure_of(found, size)
    return figure


def predictive_figure(observed: np.ndarray, predicted: np.ndarray, size: tuple[float, float], ink: str) -> Any:
    """A matplotlib figure of the cumulative distribution of the data, and of those of data that a model makes.

    Arguments:
        observed: The data, of any shape.
        predicted: Data of the model, ``(S,) + observed.shape``.
        size: Width and height in inches.
        ink: The color of the data.
    """
    groups = {
        "posterior_predictive": Group({"y": predicted[None]}, {"y": _numbered(observed)}),
        "observed_data": Group({"y": observed}, {"y": _numbered(observed)}, ()),
    }
    tree = to_tree(groups)
    with _quiet() as az:
        if arviz_generation() == 0:
            figure, ax = _new_figure(size)
            az.plot_ppc(
                tree,
                kind="cumulative",
                colors=[DRAWS_COLOR, ink, DRAWS_COLOR],
                alpha=0.25,
                mean=False,
                legend=False,
                random_seed=0,
                ax=ax,
            )
        else:
            style = {
                "predictive_dist": {"color": DRAWS_COLOR, "alpha": 0.25},
                "observed_dist": {"color": ink},
                "title": False,
            }
            found = az.plot_ppc_dist(tree, kind="ecdf", num_samples=len(predicted), visuals=style, backend="matplotlib")
            figure = _figure_of(found, size)
    return figure


def _numbered(observed: np.ndarray) -> list[str]:
    return [f"axis_{index}" for index in range(observed.ndim)]


@contextmanager
def _quiet() -> Iterator[Any]:
    """ArviZ, without its warnings: of its successor, of one chain, and of libraries at odds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz as az

        yield az


def _new_figure(size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    return figure, figure.subplots()


def _figure_of(collection: Any, size: tuple[float, float]) -> Any:
    """The figure of a ``PlotCollection`` of ArviZ 1.x, which pyplot lets go of."""
    import matplotlib.pyplot as plt

    figure = collection.viz["figure"].item()
    plt.close(figure)
    figure.set_size_inches(*size)
    return figure
