"""Finding a recipe by its name, and building its flow with a check of what it makes."""

from __future__ import annotations

from collections.abc import Callable

from . import flows
from .transforms import FlowTransform


def find_recipe(owner: str, flow: str | Callable[..., FlowTransform]) -> Callable[..., FlowTransform]:
    """A recipe by its name, or the function itself.

    Arguments:
        owner: The name that errors begin with.
        flow: The name or the function.

    Raises:
        ValueError: if there is no recipe of this name, or it is one for images, which needs their shape.
    """
    if not isinstance(flow, str):
        return flow
    if flow in flows.IMAGE_RECIPES:
        raise ValueError(
            f"{owner}: {flow!r} needs the shape of the image: pass functools.partial(flows.{flow}, shape=(channels, "
            "height, width))"
        )
    if flow not in flows.RECIPES:
        raise ValueError(f"{owner}: unknown flow {flow!r}; known recipes are {', '.join(sorted(flows.RECIPES))}")
    return flows.RECIPES[flow]


def build(owner: str, recipe: Callable[..., FlowTransform], dim: int, context_dim: int = 0) -> FlowTransform:
    """The flow that a recipe makes, once it is sure that it is one of these sizes.

    Arguments:
        owner: The name that errors begin with.
        recipe: The recipe, which is called as ``recipe(dim)``, or as ``recipe(dim, context_dim=context_dim)``.
        dim: The number of coordinates.
        context_dim: The size of the context; 0 for none.

    Raises:
        ValueError: if it makes something else.
    """
    flow = recipe(dim, context_dim=context_dim) if context_dim else recipe(dim)
    if not isinstance(flow, FlowTransform) or flow.dim != dim or flow.context_dim not in (0, context_dim):
        call = f"flow({dim}, context_dim={context_dim})" if context_dim else f"flow({dim})"
        context = f"context_dim = {context_dim}" if context_dim else "no context"
        raise ValueError(f"{owner}: {call} must return a FlowTransform with dim = {dim} and {context}, got {flow!r}")
    return flow
