"""A model that is written for one draw, run for many draws at once: one run is recorded, and the recording is batched."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import biject_to

from .. import internals
from . import plates
from .call import ModelCall
from .enumeration import Enumeration
from .guards import Guards
from .missing import FillMissing
from .recording import batch, check_size, record, repeat
from .sites import SummedTrace, is_subsample, latent_sites, log_prob_per_draw, tensor_sites
from .substitution import Parameters, no_waiting, parameters_in, substituted

# Relative; of the largest number in a value or a gradient.
TOLERANCE = 1e-3

Result = TypeVar("Result")


class BatchedModel:
    """One run of a model, recorded, and batched over draws.

    The values of latent sites, the indices of subsampled plates and the parameters of the model are inputs of the recording;
    everything else, such as the data, is a constant of it, unless ``arguments_vary``. There are two recordings, each made when
    it is asked for: the log joint with its gradient, and what every site holds.

    Arguments:
        call: The model with its arguments.
        prototype: A trace of one run of it.
        given: The names of the latent sites whose values will be given; others are sampled anew.
        enumeration: The discrete latent sites that are summed out, if any; a trace holds draws of them.
        arguments_vary: Whether the tensors among the arguments are inputs too.
        is_recorded: Whether there are recordings. Otherwise every draw is a run of its own.
    """

    def __init__(
        self,
        call: ModelCall,
        prototype: Trace,
        given: Sequence[str],
        *,
        enumeration: Enumeration | None = None,
        arguments_vary: bool = False,
        is_recorded: bool = True,
    ) -> None:
        self.call = call
        self.given = tuple(given)
        self.enumeration = enumeration
        self.arguments_vary = arguments_vary
        self.is_recorded = is_recorded
        self._nodes: dict[str, Any] = dict(prototype.nodes)
        self._plates = {
            name: site for name, site in plates.subsample_sites(prototype).items() if not plates.has_given_indices(site)
        }
        self._begin()

    def at(self, call: ModelCall, prototype: Trace) -> BatchedModel:
        """The same for arguments of another kind, which may vary.

        Arguments:
            call: The model with such arguments.
            prototype: A trace of one run of it.
        """
        enumeration = self.enumeration and Enumeration(prototype, self.enumeration.names)
        return BatchedModel(
            call, prototype, self.given, enumeration=enumeration, arguments_vary=True, is_recorded=self.is_recorded
        )

    def _begin(self) -> None:
        """Looks for what the recordings depend on, and drops those that there are."""
        call = self.call
        with poutine.block(), no_waiting(), torch.no_grad():
            trace = poutine.trace(self._conditioned(self._examples(), call)).get_trace()
        self.parameters: Parameters = parameters_in(trace)
        leaves = internals.flatten((call.args, dict(call.kwargs)))[0]
        tensors = [] if self.arguments_vary else [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._guards = Guards((call.model, *[leaf for leaf in leaves if not isinstance(leaf, Tensor)]), tensors)
        for name in ("_log_joint", "_sites"):
            self.__dict__.pop(name, None)

    def _refresh(self) -> None:
        """Begins anew, where a number or a flag that the model reads is another one than it was."""
        if not internals.is_recording() and self._guards.difference() is not None:
            self._begin()

    # --- what it computes --------------------------------------------------------------------------------------------------

    def log_prob(
        self, values: Mapping[str, Tensor], indices: Mapping[str, Tensor] | None = None, call: ModelCall | None = None
    ) -> Tensor:
        """The log joint density of every draw, with scales and masks, differentiable in values and parameters.

        Arguments:
            values: The values of the given sites, ``(draws,) + shape``.
            indices: The elements that subsampled plates take, by the name of the plate; drawn anew where they are missing.
            call: The model with other arguments of the same kind, where they vary.

        Returns:
            A tensor of shape ``(draws,)``.
        """
        self._refresh()
        for name, leaf in zip(self.parameters.names, self.parameters.leaves, strict=True):
            # Whoever trains finds parameters by these messages.
            _announce(leaf, name=name)
        points = [values[name] for name in self.given]
        # A function of torch sees the parameter, so that whoever records may put another tensor in its place.
        leaves = [leaf.view_as(leaf) for leaf in self.parameters.leaves]
        shared = [*self._indices(indices), *self._arguments(call)]
        with torch.no_grad():
            inputs = [tensor.detach() for tensor in (*points, *leaves)]
            log_prob, gradients = self._log_joint(len(points[0]), *inputs, *shared)
        differentiable = [point for point in points if point.is_floating_point()]
        return _WithGradient.apply(log_prob, len(differentiable), *gradients, *differentiable, *leaves)  # type: ignore[no-any-return,no-untyped-call]

    def trace(self, values: Mapping[str, Tensor], num_draws: int, indices: Mapping[str, Tensor] | None = None) -> Trace:
        """A trace of the model with all draws in it, without gradients: every site has its values, and its log-probabilities.

        Arguments:
            values: As for :meth:`log_prob`.
            num_draws: The number of draws.
            indices: As for :meth:`log_prob`.
        """
        self._refresh()
        taken = self._indices(indices)
        with torch.no_grad():
            inputs = [*[values[name] for name in self.given], *self.parameters.leaves]
            computed = self._sites(num_draws, *[tensor.detach() for tensor in inputs], *taken, *self._arguments(None))
        found = computed["sites"]
        trace = SummedTrace(computed["log_joint"]) if self.enumeration else Trace()
        for name in self.enumeration.without_log_likelihood if self.enumeration else ():
            found[name]["log_likelihood"] = None
        for name, index in zip(self._plates, taken, strict=True):
            found[name] = {"value": index}
        for name, site in self._nodes.items():
            if site["type"] == "sample" and (name in found or is_subsample(site)):
                node = {key: value for key, value in site.items() if not key.endswith(("log_prob", "log_prob_sum"))}
                trace.add_node(name, **{**node, **found.get(name, {})})
        return trace

    def check(self, values: Mapping[str, Tensor]) -> None:
        """Raises ValueError unless log joint and gradient are those of single runs.

        Arguments:
            values: Of two draws or more.
        """
        prototype = Trace()
        prototype.nodes.update(self._nodes)
        summed_out = self.enumeration.names if self.enumeration else ()
        if {name for name, _ in latent_sites(prototype)} != {*self.given, *summed_out}:
            # It is sampled anew in each run.
            return
        leaves = list(self.parameters.leaves)
        indices = {name: site["value"] for name, site in self._plates.items()}
        points = {name: value.detach().requires_grad_(value.is_floating_point()) for name, value in values.items()}
        with torch.enable_grad():
            together = self.log_prob(points, indices)
            of = [points[name] for name in self.given if points[name].is_floating_point()]
            gradients = torch.autograd.grad(together.sum(), of) if of else ()
        for i in range(len(together)):
            own = [*[values[name][i].detach() for name in self.given], *[leaf.detach() for leaf in leaves]]
            with poutine.block():
                alone, expected = self._value_and_gradient(*own, *self._indices(indices), *self._arguments(None))
            pairs = [(together[i], alone), *zip([gradient[i] for gradient in gradients], expected, strict=False)]
            for ours, theirs in pairs:
                scale = TOLERANCE * (1 + theirs.abs().nan_to_num(0, 0, 0).amax()) if theirs.numel() else 0.0
                if not torch.allclose(ours.detach(), theirs, rtol=0.0, atol=float(scale), equal_nan=True):
                    raise ValueError(
                        "its recording has another log-density, or another gradient, than the run of a draw"
                    )

    def prepare(self) -> None:
        """Makes the recording of the log joint, with CaptureError where that cannot be."""
        _ = self._log_joint

    def check_sum(self) -> None:
        """Raises ValueError where the discrete latents cannot be summed out, see :meth:`Enumeration.check`."""
        if self.enumeration:
            indices = {name: site["value"] for name, site in self._plates.items()}
            self.enumeration.check(self._conditioned(self._examples(), self.call, indices))

    # --- recordings --------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _log_joint(self) -> Callable[..., Any]:
        return self._record(self._value_and_gradient)

    @functools.cached_property
    def _sites(self) -> Callable[..., Any]:
        return self._record(self._site_values)

    def _record(self, function: Callable[..., Any]) -> Callable[..., Any]:
        examples = [
            *[value.detach().clone() for value in self._examples()],
            *[leaf.detach().clone() for leaf in self.parameters.leaves],
            *[site["value"].clone() for site in self._plates.values()],
            *[tensor.detach().clone() for tensor in self._arguments(None)],
        ]
        varies = [index < len(self.given) for index in range(len(examples))]
        if not self.is_recorded:
            return repeat(poutine.block(function), varies)
        with poutine.block(), no_waiting(), warnings.catch_warnings():
            # Such as torch's about a look at a tensor with a gradient, which is an error here.
            warnings.simplefilter("ignore")
            check_size(lambda: function(*examples))
            graph = record(function, examples)
        return batch(graph, varies)

    def _value_and_gradient(self, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The log joint of one draw, with its gradient to values and parameters."""
        count = len(self.given) + len(self.parameters.leaves)
        points = [value.detach().requires_grad_(value.is_floating_point()) for value in inputs[:count]]
        log_joint = self.enumeration.log_joint if self.enumeration else _log_joint
        with torch.enable_grad():
            total = self._run([*points, *inputs[count:]], log_joint)
            targets = [point for point in points if point.requires_grad]
            if not total.requires_grad:
                return total, [torch.zeros_like(point) for point in targets]
            gradients = torch.autograd.grad(total, targets, allow_unused=True, materialize_grads=True)
        return total.detach(), list(gradients)

    @torch.no_grad()
    def _site_values(self, *inputs: Tensor) -> dict[str, Any]:
        """What the sites of one draw hold, and the log joint where discrete latents are summed out."""
        marginal = self._run(inputs, self.enumeration.marginal) if self.enumeration else None
        trace = marginal.trace if marginal else self._run(inputs, _traced)
        trace.compute_log_prob()
        found: dict[str, dict[str, Any]] = {}
        for name, site in tensor_sites(trace):
            shape, batch_shape = self._nodes[name]["value"].shape, self._nodes[name]["fn"].batch_shape
            found[name] = {"value": _without_padding(site["value"], shape), "log_prob_sum": site["log_prob_sum"]}
            for key in ("log_prob", "unscaled_log_prob", "mask"):
                if isinstance(site[key], Tensor):
                    found[name][key] = _without_padding(site[key], batch_shape)
            if "mask" in found[name]:
                # A mask for all elements of a draw is not one for the draws.
                mask = found[name]["mask"]
                found[name]["mask"] = mask.expand(torch.broadcast_shapes(mask.shape, batch_shape))
            if name in self.given and not site["fn"].support.is_discrete:
                found[name]["unconstrained"] = biject_to(site["fn"].support).inv(site["value"])
        if marginal is None:
            return {"sites": found}
        for name, log_likelihood in marginal.log_likelihood.items():
            found[name]["log_likelihood"] = log_likelihood
        return {"sites": found, "log_joint": marginal.log_joint}

    def _run(self, inputs: Sequence[Tensor], function: Callable[[Callable], Result]) -> Result:
        """What a function computes from the model with the values of one draw."""
        count = len(self.given), len(self.parameters.leaves), len(self._plates)
        values, rest = inputs[: count[0]], list(inputs[count[0] :])
        leaves, indices, tensors = rest[: count[1]], rest[count[1] : count[1] + count[2]], rest[count[1] + count[2] :]
        call = self.call
        if self.arguments_vary:
            flat, structure = internals.flatten((call.args, dict(call.kwargs)))
            remaining = iter(tensors)
            flat = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in flat]
            call = ModelCall(call.model, *internals.unflatten(flat, structure))
        modules = [
            each for each in {id(m): m for m in (call.model, call.as_written)}.values() if isinstance(each, nn.Module)
        ]
        with ExitStack() as stack:
            stack.enter_context(substituted(self.parameters, leaves, modules))
            stack.enter_context(no_waiting())
            stack.enter_context(internals.branches_for_tracing())
            return function(self._conditioned(values, call, dict(zip(self._plates, indices, strict=True))))

    def _conditioned(
        self, values: Sequence[Tensor], call: ModelCall, indices: Mapping[str, Tensor] | None = None
    ) -> Callable:
        data = {**dict(zip(self.given, values, strict=True)), **(indices or {})}
        return FillMissing()(poutine.condition(call, data=data))

    def _examples(self) -> list[Tensor]:
        return [self._nodes[name]["value"] for name in self.given]

    def _indices(self, given: Mapping[str, Tensor] | None) -> list[Tensor]:
        """The elements that the plates take, drawn as Pyro draws them where they are not given."""
        given = given or {}
        return [
            given[name]
            if name in given
            else torch.randperm(site["fn"].size, device=site["value"].device)[: len(site["value"])]
            for name, site in self._plates.items()
        ]

    def _arguments(self, call: ModelCall | None) -> list[Tensor]:
        if not self.arguments_vary:
            return []
        call = call or self.call
        return [leaf for leaf in internals.flatten((call.args, dict(call.kwargs)))[0] if isinstance(leaf, Tensor)]


def _traced(model: Callable) -> Trace:
    return poutine.trace(model).get_trace()


def _log_joint(model: Callable) -> Tensor:
    return log_prob_per_draw(_traced(model), 1)[0]


def _without_padding(value: Tensor, shape: torch.Size) -> Tensor:
    """A tensor without dimensions of size 1 on the left of those that it has in a plain run."""
    return value.reshape(value.shape[max(0, value.dim() - len(shape)) :])


_announce = effectful(lambda leaf: leaf, type="param")


class _WithGradient(torch.autograd.Function):
    """A value for every draw whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, num_values: int, *rest: Tensor) -> Tensor:
        count = len(rest) // 2
        ctx.num_values = num_values
        ctx.save_for_backward(*rest[:count])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (output,) = outputs
        gradients = ctx.saved_tensors
        weighted = [output.reshape(-1, *[1] * (gradient.dim() - 1)) * gradient for gradient in gradients]
        # A parameter is the same for all draws.
        whole = [each if index < ctx.num_values else each.sum(0) for index, each in enumerate(weighted)]
        return (None, None, *[None] * len(gradients), *whole)


def given_names(trace: Trace, guide_trace: Trace) -> list[str]:
    """The latent sites of a model that its guide gives."""
    return [name for name, _ in latent_sites(trace) if name in guide_trace.nodes]
