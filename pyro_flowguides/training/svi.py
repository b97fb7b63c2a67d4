"""SVI whose step is captured once, as one graph, and then repeated without Python, Pyro or autograd."""

from __future__ import annotations

import copy
import functools
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..tracing import site_without_density
from . import capture, graph
from .capture import CaptureError, Parameters, Surroundings
from .losses import differentiable_loss
from .rollback import ExplosionDetector
from .update import Adam, Scalars, State, Update

BACKENDS = ("auto", "replay", "inductor", "eager")
# Captured steps are kept for so many kinds of arguments.
MAX_CAPTURES = 8
# After so many captures that went stale the step is run eagerly.
MAX_STALE = 5
# Losses are looked at, errors raised and explosions taken back once in so many steps.
CHECK_EVERY = 50
MAX_SKIPPED = 50
# Optimisers that treat every number alike, whatever tensor it is in: for them one vector is as good as many tensors.
_ELEMENTWISE = {
    *("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SGD", "ASGD", "RMSprop", "Rprop", "Adagrad", "Adadelta"),
    *("ClippedAdam", "AdagradRMSProp"),
}
# Compiling takes so many seconds, and so many more for each node; a compiled step saves this part of a replayed one.
COMPILE_SECONDS, COMPILE_SECONDS_PER_NODE, SAVED_PART = 10.0, 0.05, 0.5

OptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass
class _Captured:
    """One captured step."""

    module: torch.fx.GraphModule
    run: graph.Run
    surroundings: Surroundings
    compiled: bool = False
    seconds: list[float] = field(default_factory=list)


class CompiledSVI(SVI):
    """Stochastic variational inference with the whole step captured as one graph.

    Stands where ``pyro.infer.SVI`` stands, with the same steps: the same random numbers, losses and parameters up to rounding.
    The first step runs model, guide, gradient and optimiser once under a recorder (about a second); every further one repeats
    the recorded operations. Any Pyro model with a fixed structure, and any guide, can be captured.

    What a step sees may change: the values of tensor arguments are inputs of the graph. New shapes, dtypes, devices, other
    arguments that are not tensors, and other values of what model and guide close over (numbers, flags such as ``training``,
    attributes of their objects) make a new capture. Minibatches belong into the arguments, or come from a subsampling plate.
    What cannot be captured, with one warning that says why and where, is run eagerly, with the same results: a model that looks
    at values (``if x > 0``), draws from numpy or Python's own random numbers, or loops in Python for thousands of operations.

    A step whose loss or gradient is not finite changes nothing and is counted. Once in 50 steps the losses are looked at: ten in
    a row that are above the mean of the last good fifty by 20 of their standard deviations take the parameters back to where
    those ended, halve the learning rate for good, and are counted.

    Arguments:
        model: The model.
        guide: The guide.
        optim: A Pyro optimiser, or a function from a list of parameters to a torch optimiser. Adam, AdamW and ClippedAdam go
            into the graph. Others run after it, on one vector that holds all parameters if they treat all numbers alike, and
            as they are otherwise; each of their steps waits for the device once.
        loss: Any ELBO of Pyro with a differentiable loss, :class:`IWELBO`, or a function ``loss(model, guide, *args,
            **kwargs)`` that returns a tensor.
        backend: ``"replay"`` repeats the graph operation by operation, and is ready at once. ``"inductor"`` compiles it, which
            takes from ten seconds to a minute, and makes a step two to four times faster. ``"auto"`` begins with replay and
            compiles when the steps that are left of a :meth:`run` repay it. ``"eager"`` captures nothing.
        schedule: The factor of the learning rate as a function of the number of the step, from 0.
        clip_norm: Scale gradients down to this norm.
        clip_factor: Scale gradients down to this multiple of the running mean of their norm.
        average: The decay of an exponential moving average of the parameters, see :meth:`use_average`.
        max_skipped: So many skipped steps in a row are an error.

    Attributes:
        num_steps: The number of steps so far, skipped ones included.
        num_rolled_back: How many times the training exploded and was taken back.
        learning_rate_scale: What the learning rate has been scaled down to by that.

    Raises:
        ValueError: if an option is unknown; at a step, if nothing can be trained.
        TypeError: if ``optim`` is no optimiser.
        RuntimeError: at a step, if ``max_skipped`` steps in a row were not finite.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        >>> losses = svi.run(200, torch.tensor([0.3, 0.1, 0.8]))
        >>> losses.shape
        torch.Size([200])
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: PyroOptim | OptimizerFactory,
        loss: Any,
        *,
        backend: str = "auto",
        schedule: Callable[[int], float] | None = None,
        clip_norm: float | None = None,
        clip_factor: float | None = None,
        average: float | None = None,
        max_skipped: int = MAX_SKIPPED,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"CompiledSVI: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        if not callable(optim):
            raise TypeError(
                f"CompiledSVI: optim must be a Pyro optimiser or a function from parameters to a torch optimiser, got {optim!r}"
            )
        if average is not None and not 0 < average < 1:
            raise ValueError(f"CompiledSVI: average must be between 0 and 1, got {average}")
        is_pyro = isinstance(optim, PyroOptim)
        super().__init__(model, guide, optim if is_pyro else PyroOptim(optim, {}), loss)
        self.elbo = loss
        self.backend = backend
        self.schedule = schedule
        self.max_skipped = max_skipped
        self._make_optimizer = _factory(optim)
        self._options = {"clip_norm": clip_norm, "clip_factor": clip_factor, "average": average}
        self._modules = [function for function in (model, guide) if isinstance(function, nn.Module)]
        self._binding: _Binding | None = None
        self._captures: OrderedDict[Any, _Captured | None] = OrderedDict()
        self._varying: list[Tensor] = []
        self._num_stale = 0
        self.num_steps = 0
        self.num_rolled_back = 0
        self.learning_rate_scale = 1.0
        self._recent: list[Tensor] = []
        self._detector = ExplosionDetector()
        self._good: dict[str, Any] = {}

    # --- steps ---------------------------------------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One step; returns the loss before it."""
        return float(self.advance(*args, **kwargs))

    def run(self, num_steps: int, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Many steps with the same arguments, waiting for the device once in 50.

        Arguments:
            num_steps: The number of steps.
            args: The positional arguments of model and guide.
            kwargs: Their keyword arguments.

        Returns:
            The losses, shape ``(num_steps,)``.
        """
        losses: list[Tensor] = []
        while len(losses) < num_steps:
            step = self.prepare(args, kwargs, num_steps - len(losses))
            losses.extend(step() for _ in range(min(CHECK_EVERY, num_steps - len(losses))))
        return torch.stack(losses)

    def advance(self, *args: Any, **kwargs: Any) -> Tensor:
        """One step without waiting for its loss, which is returned as a tensor."""
        return self.prepare(args, kwargs)()

    def prepare(self, args: tuple, kwargs: dict[str, Any], steps_left: int = 0) -> Callable[[], Tensor]:
        """What makes a step with these arguments, captured if it has to be.

        It holds as long as nothing is changed but by the steps themselves.

        Arguments:
            args: The positional arguments of model and guide.
            kwargs: Their keyword arguments.
            steps_left: How many steps are to be expected, for the backend ``"auto"``.
        """
        if self._binding is not None and not capture.still_in_place(self._binding.parameters):
            self._forget()
        self._last_arguments = args, kwargs
        leaves, spec = pytree.tree_flatten((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = (spec, *map(_describe, leaves))
        captured = self._captures.get(key, _MISSING)
        if captured is _MISSING or (isinstance(captured, _Captured) and self._is_stale(captured)):
            captured = self._captures[key] = self._capture(leaves, spec)
            if len(self._captures) > MAX_CAPTURES:
                self._captures.popitem(last=False)
        else:
            self._captures.move_to_end(key)
            self._bound().follow()
        if captured is None:
            return functools.partial(self._eager_step, args, kwargs)
        assert isinstance(captured, _Captured)
        self._choose_backend(captured, inputs, steps_left)
        return functools.partial(self._captured_step, captured, inputs)

    def _captured_step(self, captured: _Captured, inputs: Sequence[Tensor]) -> Tensor:
        binding = self._bound()
        start = time.perf_counter()
        with torch.inference_mode():
            result = binding.take(captured.run(*binding.tensors(self._learning_rate()), *inputs))
        if len(captured.seconds) < CHECK_EVERY:
            captured.seconds.append(time.perf_counter() - start)
        return self._finish(result)

    def _eager_step(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        with capture.no_waiting():
            value, parameters = capture.find_parameters(lambda: self._loss(args, kwargs))
        trained, gradients = capture.with_gradient(value, parameters)
        self._bind(trained)
        binding = self._bound()
        by_id = {id(leaf): gradient for leaf, gradient in zip(trained.leaves, gradients, strict=True)}
        gradients = [by_id.get(id(leaf), torch.zeros_like(leaf)) for leaf in binding.parameters.leaves]
        with torch.inference_mode():
            state, rate, _ = binding.unpack(binding.tensors(self._learning_rate()))
            result = binding.take(binding.pack(state, value.detach(), gradients, rate))
        return self._finish(result)

    def _finish(self, result: _StepResult) -> Tensor:
        self.num_steps += 1
        binding = self._bound()
        if binding.adam is None and bool(result.finite):
            binding.step_outside(result.clipped, self._learning_rate_factor(self.num_steps - 1))
        self._recent.append(result.loss)
        if len(self._recent) == min(CHECK_EVERY, self.max_skipped):
            self._check()
        return result.loss

    def _check(self) -> None:
        """Looks at the last losses: an error if nothing is finite any more, a rollback if they have exploded."""
        losses = torch.stack(self._recent).tolist()
        self._recent.clear()
        skipped = int(self.scalars.num_skipped_in_a_row)
        if skipped >= self.max_skipped:
            raise RuntimeError(
                f"{skipped} steps in a row had no finite loss or gradient, up to step {self.num_steps}; "
                + (self._first_site_without_density() or "every site's log-probability is finite, its gradient is not")
            )
        verdict = self._detector.judge(losses)
        if verdict == "good":
            self._good = self._bound().snapshot()
        elif verdict == "exploded":
            self._bound().restore(self._good)
            self.num_rolled_back += 1
            self.learning_rate_scale *= 0.5

    @torch.no_grad()
    def _first_site_without_density(self) -> str | None:
        args, kwargs = self._last_arguments
        with capture.no_waiting(), poutine.block():
            guide_trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(self.model, trace=guide_trace)).get_trace(*args, **kwargs)
            return site_without_density(guide_trace, model_trace)

    # --- what training has come to -------------------------------------------------------------------------------------

    @property
    def scalars(self) -> Scalars:
        """The running numbers of the guard; waits for the device."""
        return Scalars(*self._bound().state.scalars.tolist()) if self._binding else Scalars()

    @property
    def num_skipped(self) -> int:
        """How many steps were skipped because loss or gradient were not finite."""
        return int(self.scalars.num_skipped)

    def use_average(self) -> None:
        """Puts the exponential moving average of the parameters in their place.

        Raises:
            ValueError: if no average was kept.
        """
        if self._options["average"] is None:
            raise ValueError("CompiledSVI: no average is kept; give average=, such as 0.99")
        for vectors in self._bound().state.vectors:
            vectors[0].copy_(vectors[-1])

    def state_dict(self) -> dict[str, Any]:
        """Everything that training has changed but the random state: parameters, moments, counters."""
        return {
            "num_steps": self.num_steps,
            "num_rolled_back": self.num_rolled_back,
            "learning_rate_scale": self.learning_rate_scale,
            "recent": [float(loss) for loss in self._recent],
            "bound": self._detector.bound,
            "num_bad_in_a_row": self._detector.num_bad_in_a_row,
            "good": self._good,
            "now": self._bound().snapshot(),
            "parameters": self._bound().parameters.shapes(),
        }

    def load_state_dict(self, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Continues from a :meth:`state_dict`.

        Arguments:
            state: The state.
            args: The positional arguments of model and guide, which are run once to find the parameters.
            kwargs: Their keyword arguments.

        Raises:
            ValueError: if the state is of other parameters.
        """
        with capture.unchanged_random_state():
            self._find_and_bind(args, kwargs)
        ours, theirs = self._bound().parameters.shapes(), state["parameters"]
        if ours != theirs:
            name = min(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
            raise ValueError(
                f"the state is of another model, guide or set of arguments: parameter '{name}' has shape "
                f"{theirs.get(name, 'none')} there and {ours.get(name, 'none')} here"
            )
        self._bound().restore(state["now"])
        self.num_steps, self.num_rolled_back = state["num_steps"], state["num_rolled_back"]
        self.learning_rate_scale = state["learning_rate_scale"]
        self._good = state["good"]
        self._recent = [self._bound().state.scalars.new_tensor(loss) for loss in state["recent"]]
        self._detector.bound = state["bound"]
        self._detector.num_bad_in_a_row = state["num_bad_in_a_row"]

    # --- parameters ----------------------------------------------------------------------------------------------------

    def _loss(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        return differentiable_loss(self.elbo, self.model, self.guide, args, kwargs)

    def _bound(self) -> _Binding:
        assert self._binding is not None
        return self._binding

    def _bind(self, parameters: Parameters) -> None:
        """Makes sure that these parameters are trained."""
        if self._binding is not None:
            if {id(leaf) for leaf in parameters.leaves} <= self._binding.ids:
                self._binding.follow()
                return
            # A graph is one of the parameters that were known when it was captured.
            self._captures.clear()
            parameters = self._binding.parameters.union(parameters)
        self._binding = _Binding(parameters, self._make_optimizer, self.optim, self._options, self._binding)

    def _forget(self) -> None:
        self._binding = None
        self._captures.clear()

    def _find_and_bind(self, args: tuple, kwargs: dict[str, Any]) -> None:
        value, parameters = capture.find_parameters(lambda: self._loss(args, kwargs))
        trained, _ = capture.with_gradient(value, parameters)
        if not trained.leaves:
            raise ValueError(
                "CompiledSVI: the loss has no gradient to any parameter: model and guide have none, or none that it depends on"
            )
        self._bind(trained)

    def _learning_rate_factor(self, step: int) -> float:
        return self.learning_rate_scale * (1.0 if self.schedule is None else self.schedule(step))

    def _learning_rate(self) -> float:
        return self._bound().learning_rate * self._learning_rate_factor(self.num_steps)

    # --- capturing -----------------------------------------------------------------------------------------------------

    def _capture(self, leaves: Sequence[Any], spec: pytree.TreeSpec) -> _Captured | None:
        """The captured step, or None, after a warning, if it cannot be captured."""
        with capture.unchanged_random_state():
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            # The first time with Pyro's checks as the user has set them.
            self._find_and_bind(args, kwargs)
            if self.backend == "eager":
                return None
            try:
                return self._capture_checked(leaves, spec)
            except CaptureError as error:
                warnings.warn(
                    f"CompiledSVI runs {_name(self.model)} eagerly, many times slower than a captured step, because it cannot be "
                    f"captured: {error}",
                    stacklevel=5,
                )
                return None

    def _capture_checked(self, leaves: Sequence[Any], spec: pytree.TreeSpec) -> _Captured:
        binding = self._bound()
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        with capture.no_waiting(), torch.no_grad():
            capture.check_size(lambda: self._loss(args, kwargs))
        places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def step(*tensors: Tensor) -> Sequence[Tensor]:
            own, inputs = tensors[: binding.num_tensors], tensors[binding.num_tensors :]
            state, learning_rate, values = binding.unpack(own)
            given = list(leaves)
            for place, tensor in zip(places, inputs, strict=True):
                given[place] = tensor
            args, kwargs = pytree.tree_unflatten(given, spec)
            loss, gradients = capture.loss_and_gradients(
                lambda: self._loss(args, kwargs), binding.parameters, values, self._modules
            )
            return binding.pack(state, loss, gradients, learning_rate)

        inputs = [leaves[place] for place in places]
        example = [*binding.tensors(self._learning_rate()), *inputs]
        module = capture.record(step, example)
        constants = graph.constants(module, self._varying)
        graph.simplify(module, self._varying)
        run = graph.replay(module, example)
        self._check_against_eager(run, args, kwargs, inputs)
        return _Captured(module, run, Surroundings((self.model, self.guide, self.elbo), constants))

    def _is_stale(self, captured: _Captured) -> bool:
        """Whether something that a captured step has baked in is not what it was."""
        difference = captured.surroundings.difference()
        if difference is None:
            return False
        # From now on these are read at every step.
        self._varying.extend(captured.surroundings.changed_constants())
        self._num_stale += 1
        if self._num_stale == MAX_STALE:
            self.backend = "eager"
            warnings.warn(
                f"CompiledSVI runs {_name(self.model)} eagerly from now on, many times slower than a captured step, because "
                f"what it sees has changed {MAX_STALE} times, and each time it was captured anew: {difference}. Give it to the "
                "model as an argument, as a tensor",
                stacklevel=5,
            )
        return True

    def _check_against_eager(self, run: graph.Run, args: tuple, kwargs: dict[str, Any], inputs: list[Tensor]) -> None:
        """Raises CaptureError unless loss and gradients are those of the step itself, here and at moved parameters."""
        binding = self._bound()
        before = [vectors.clone() for vectors in binding.state.vectors]
        try:
            for move in (0.0, capture.CHECK_STEP):
                for vectors in binding.state.vectors:
                    vectors[0].add_(move * torch.randn_like(vectors[0]))
                random_state = torch.random.get_rng_state()
                with capture.unchanged_random_state(), torch.inference_mode():
                    result = binding.read(run(*binding.tensors(0.0), *inputs))
                torch.random.set_rng_state(random_state)
                with capture.no_waiting():
                    value, parameters = capture.find_parameters(lambda: self._loss(args, kwargs))
                trained, gradients = capture.with_gradient(value, parameters)
                if {id(leaf) for leaf in trained.leaves} != binding.ids:
                    raise CaptureError("the parameters that have a gradient change from step to step")
                by_id = {id(leaf): gradient for leaf, gradient in zip(trained.leaves, gradients, strict=True)}
                expected = [by_id[id(leaf)] for leaf in binding.parameters.leaves]
                difference = capture.compare((result.loss, result.gradients), (value.detach(), expected))
                if difference:
                    raise CaptureError(
                        f"its {difference} is not that of the captured step under the same random numbers; it depends on more "
                        "than tensors and torch's random numbers (numpy's or Python's own, a counter)"
                    )
        finally:
            for vectors, values in zip(binding.state.vectors, before, strict=True):
                vectors.copy_(values)

    def _choose_backend(self, captured: _Captured, inputs: list[Tensor], steps_left: int) -> None:
        """Moves a captured step from replay to inductor, where that is asked for or pays."""
        if captured.compiled or self.backend not in ("auto", "inductor"):
            return
        if self.backend == "auto":
            if len(captured.seconds) < CHECK_EVERY:
                return
            seconds = float(np.median(captured.seconds))
            cost = COMPILE_SECONDS + COMPILE_SECONDS_PER_NODE * len(captured.module.graph.nodes)
            if steps_left * seconds * SAVED_PART < cost:
                return
        captured.compiled = True
        example = [*self._bound().tensors(self._learning_rate()), *inputs]
        if not graph.has_compiler(example[0].device):
            if self.backend == "inductor":
                warnings.warn(
                    "CompiledSVI: no compiler was found for inductor; the graph is replayed instead", stacklevel=5
                )
            return
        try:
            captured.run = graph.compile_with_inductor(captured.module, example)
        except Exception as error:
            message = " ".join(str(error).split())[:300]
            warnings.warn(f"CompiledSVI: inductor failed, the graph is replayed instead: {message}", stacklevel=5)


_MISSING = object()


class _StepResult(NamedTuple):
    """What a step leaves apart from its state."""

    loss: Tensor
    finite: Tensor
    gradients: Sequence[Tensor]
    clipped: Sequence[Tensor]


class _Binding:
    """Parameters as views of one vector for each dtype, with the state of their training."""

    def __init__(
        self,
        parameters: Parameters,
        make_optimizer: OptimizerFactory | None,
        pyro_optim: PyroOptim,
        options: dict[str, Any],
        previous: _Binding | None,
    ) -> None:
        devices = {str(leaf.device) for leaf in parameters.leaves}
        if len(devices) > 1:
            raise ValueError(
                f"CompiledSVI: the parameters are on several devices ({', '.join(sorted(devices))}); use pyro.infer.SVI, or put "
                "them on one"
            )
        self.parameters = parameters
        self.ids = {id(leaf) for leaf in parameters.leaves}
        self.dtypes = list(dict.fromkeys(leaf.dtype for leaf in parameters.leaves))
        self.members = [
            [index for index, leaf in enumerate(parameters.leaves) if leaf.dtype == dtype] for dtype in self.dtypes
        ]
        self.shapes = [leaf.shape for leaf in parameters.leaves]
        self.sizes = [[self.shapes[index].numel() for index in members] for members in self.members]
        flat = self.join([leaf.detach() for leaf in parameters.leaves])
        self._choose_optimizer(make_optimizer, pyro_optim, flat)
        self.update = Update(self.adam, **options)
        self.state = self.update.start(flat)
        self.num_states = len(self.dtypes) + 1
        # The state, the learning rate, and the parameters.
        self.num_tensors = self.num_states + 1 + len(self.shapes)
        if previous is not None:
            self._inherit(previous)
        self._point()

    def _choose_optimizer(
        self, make_optimizer: OptimizerFactory | None, pyro_optim: PyroOptim, flat: Sequence[Tensor]
    ) -> None:
        """Adam goes into the graph; anything else stays outside, on the vectors if it can."""
        self.adam: Adam | None = None
        self.outside: torch.optim.Optimizer | PyroOptim | None = pyro_optim
        self.on_vectors = False
        self.learning_rate = 1.0
        if make_optimizer is None:
            return
        self.vector_leaves = [vector.clone().requires_grad_() for vector in flat]
        optimizer = make_optimizer(self.vector_leaves)
        if len(optimizer.param_groups) == 1:
            self.learning_rate = float(optimizer.param_groups[0]["lr"])
            self.adam = Adam.like(optimizer)
            self.on_vectors = type(optimizer).__name__ in _ELEMENTWISE
        self.outside = None
        if self.adam is None:
            self.outside = optimizer if self.on_vectors else make_optimizer(list(self.parameters.leaves))
            self.base_rates = [group["lr"] for group in self.outside.param_groups]

    # --- views ---------------------------------------------------------------------------------------------------------

    def split(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """The parameters, as views of the first rows."""
        values: list[Tensor] = [matrices[0]] * len(self.shapes)
        for members, sizes, matrix in zip(self.members, self.sizes, matrices, strict=True):
            for index, part in zip(members, matrix[0].split(sizes), strict=True):
                values[index] = part.view(self.shapes[index])
        return values

    def join(self, values: Sequence[Tensor]) -> list[Tensor]:
        """One vector for each dtype."""
        return [torch.cat([values[index].reshape(-1) for index in members]) for members in self.members]

    def _point(self) -> None:
        """Makes the parameters views of the vectors."""
        self.values = self.split(self.state.vectors)
        for leaf, view in zip(self.parameters.leaves, self.values, strict=True):
            leaf.data = view
        self._pointers = [leaf.data_ptr() for leaf in self.parameters.leaves]

    def follow(self) -> None:
        """Takes over parameters that have been given other memory, by ``to`` for example."""
        if [leaf.data_ptr() for leaf in self.parameters.leaves] == self._pointers:
            return
        with torch.no_grad():
            for view, leaf in zip(self.values, self.parameters.leaves, strict=True):
                view.copy_(leaf)
        self._point()

    def _inherit(self, previous: _Binding) -> None:
        """Takes over what was kept for parameters that were there before."""
        places = {id(leaf): index for index, leaf in enumerate(previous.parameters.leaves)}
        for row in range(1, len(self.state.vectors[0])):
            sources = previous.split([matrix[row:] for matrix in previous.state.vectors])
            targets = self.split([matrix[row:] for matrix in self.state.vectors])
            for leaf, target in zip(self.parameters.leaves, targets, strict=True):
                if id(leaf) in places:
                    target.copy_(sources[places[id(leaf)]])
        self.state = self.state._replace(scalars=previous.state.scalars)

    def snapshot(self) -> dict[str, Any]:
        """The state, as a copy."""
        return {
            "vectors": [vectors.clone() for vectors in self.state.vectors],
            "scalars": self.state.scalars.clone(),
            "outside": self._outside_state(),
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Goes back to a snapshot."""
        with torch.no_grad():
            for vectors, saved in zip(self.state.vectors, snapshot["vectors"], strict=True):
                vectors.copy_(saved)
        self.state = State(self.state.vectors, snapshot["scalars"].to(self.state.scalars).clone())
        if isinstance(self.outside, PyroOptim):
            self.outside.set_state(snapshot["outside"])
            # The state is taken over by the next optimisers that are made.
            self.outside.optim_objs.clear()
        elif self.outside is not None:
            self.outside.load_state_dict(copy.deepcopy(snapshot["outside"]))

    # --- a step --------------------------------------------------------------------------------------------------------

    def tensors(self, learning_rate: float) -> list[Tensor]:
        """The inputs of a step that are not arguments of the model."""
        scalars = self.state.scalars
        return [*self.state.vectors, scalars, scalars.new_full((), learning_rate), *self.values]

    def unpack(self, tensors: Sequence[Tensor]) -> tuple[State, Tensor, Sequence[Tensor]]:
        """The state, the learning rate and the parameters from the inputs of a step."""
        state = State(tuple(tensors[: self.num_states - 1]), tensors[self.num_states - 1])
        return state, tensors[self.num_states], tensors[self.num_states + 1 : self.num_tensors]

    def pack(
        self, state: State, loss: Tensor, gradients: Sequence[Tensor], learning_rate: Tensor
    ) -> tuple[Tensor, ...]:
        """The outputs of a step."""
        joined = self.join(gradients)
        state, clipped, finite = self.update(state, loss, joined, learning_rate)
        # The loss as a tensor of its own: it may be a view of something else.
        outputs = (*state.vectors, state.scalars, loss.clone(), finite, *joined)
        return outputs if self.adam else (*outputs, *clipped)

    def read(self, outputs: Sequence[Tensor]) -> _StepResult:
        """What the outputs of a step hold apart from the state."""
        loss, finite, *gradients = outputs[self.num_states :]
        count = len(self.dtypes)
        return _StepResult(loss, finite, gradients[:count], gradients[count:])

    def take(self, outputs: Sequence[Tensor]) -> _StepResult:
        """Makes the outputs of a step the state."""
        for vectors, new in zip(self.state.vectors, outputs, strict=False):
            vectors.copy_(new)
        self.state = State(self.state.vectors, outputs[self.num_states - 1])
        return self.read(outputs)

    # --- an optimiser outside of the graph -----------------------------------------------------------------------------

    def step_outside(self, gradients: Sequence[Tensor], factor: float) -> None:
        """One step of the optimiser that is not in the graph.

        Arguments:
            gradients: One vector for each dtype.
            factor: Of the learning rate; an optimiser of Pyro has schedulers of its own.
        """
        leaves = self.vector_leaves if self.on_vectors else self.parameters.leaves
        parts = gradients if self.on_vectors else self.split([gradient.unsqueeze(0) for gradient in gradients])
        for leaf, gradient in zip(leaves, parts, strict=True):
            # Optimisers write to it, which a tensor of inference mode would not have.
            leaf.grad = gradient.clone()
        if isinstance(self.outside, PyroOptim):
            self.outside(list(leaves))
        elif self.outside is not None:
            for leaf, vectors in zip(leaves if self.on_vectors else (), self.state.vectors, strict=False):
                leaf.data = vectors[0]
            for group, rate in zip(self.outside.param_groups, self.base_rates, strict=True):
                group["lr"] = rate * factor
            self.outside.step()
        for leaf in leaves:
            leaf.grad = None

    def _outside_state(self) -> Any:
        if isinstance(self.outside, PyroOptim):
            return copy.deepcopy(self.outside.get_state())
        return None if self.outside is None else copy.deepcopy(self.outside.state_dict())


def _factory(optim: PyroOptim | OptimizerFactory) -> OptimizerFactory | None:
    """A function from parameters to a torch optimiser; None if only Pyro knows how to make it."""
    if not isinstance(optim, PyroOptim):
        return optim
    plain = type(optim) is PyroOptim and isinstance(optim.pt_optim_args, dict) and not optim.pt_clip_args
    if not plain or not isinstance(optim.pt_optim_constructor, type):
        return None
    options: Any = optim.pt_optim_args
    return functools.partial(optim.pt_optim_constructor, **options)


def _describe(leaf: Any) -> Any:
    """What has to be the same for a captured step to be valid."""
    if isinstance(leaf, Tensor):
        return "tensor", leaf.shape, leaf.dtype, leaf.device, leaf.stride(), leaf.requires_grad
    if isinstance(leaf, np.ndarray):
        return "array", leaf.shape, leaf.dtype.str, leaf.tobytes()
    if isinstance(leaf, (int, float, complex, str, bytes, torch.dtype, torch.device, type(None))):
        return type(leaf), leaf
    return "object", _Identity(leaf)


class _Identity:
    """Equal to itself alone; keeps the object, so that nothing else gets its id."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _name(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)
