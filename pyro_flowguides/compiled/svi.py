"""SVI whose step is captured once, as one graph, and then repeated without Python, Pyro or autograd."""

from __future__ import annotations

import functools
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import PyroOptim
from torch import Tensor, nn

from .. import internals
from ..checks import warn
from ..model.sites import site_without_density, unchanged_random_state
from . import backends, capture, rewrite
from .binding import Binding, OptimizerFactory, StepResult, optimizer_factory
from .capture import CaptureError, Parameters
from .guards import Surroundings
from .losses import differentiable_loss
from .rollback import ExplosionDetector
from .snapshot import Buffers, Snapshot
from .update import Scalars

BACKENDS = ("auto", "replay", "inductor", "eager")
# Captured steps are kept for so many kinds of arguments.
MAX_CAPTURES = 8
# After so many that were hardly used before something changed, the step is run eagerly.
MAX_WASTED = 5
# Losses are looked at, errors raised and explosions taken back once in so many steps.
CHECK_EVERY = 50
MAX_SKIPPED = 50
# Compiling takes so many seconds, and so many more for each node; a compiled step saves this part of a replayed one.
COMPILE_SECONDS, COMPILE_SECONDS_PER_NODE, SAVED_PART = 10.0, 0.05, 0.5
# These are rough: compiling has to repay itself so many times over.
PAYBACK = 3.0


@dataclass
class _Captured:
    """One captured step."""

    module: torch.fx.GraphModule
    run: rewrite.Run
    surroundings: Surroundings
    compiled: bool = False
    seconds: list[float] = field(default_factory=list)


class CompiledSVI(SVI):
    """Stochastic variational inference with the whole step captured as one graph.

    Stands where ``pyro.infer.SVI`` stands, with the same steps: the same random numbers, losses and parameters up to rounding.
    The first step is Pyro's; the second runs model, guide, gradient and optimiser under a recorder (about a second); every
    further one repeats the recorded operations. Any Pyro model with a fixed structure, and any guide, can be captured.

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
        self._make_optimizer = optimizer_factory(optim)
        if schedule is not None and self._make_optimizer is None:
            raise ValueError(
                "CompiledSVI: a Pyro optimiser with arguments for each parameter, or with clipping, takes no schedule; use "
                "Pyro's own, such as pyro.optim.ExponentialLR"
            )
        super().__init__(model, guide, optim if is_pyro else PyroOptim(optim, {}), loss)
        self.elbo = loss
        self.backend = backend
        self.schedule = schedule
        self.max_skipped = max_skipped
        self._options = {"clip_norm": clip_norm, "clip_factor": clip_factor, "average": average}
        self._modules = [function for function in (model, guide) if isinstance(function, nn.Module)]
        self._binding: Binding | None = None
        self._captures: OrderedDict[Any, _Captured] = OrderedDict()
        self._varying: list[Tensor] = []
        self._num_wasted = 0
        self.num_steps = 0
        self.num_rolled_back = 0
        self.learning_rate_scale = 1.0
        # Losses that have not been looked at, and whether their steps were finite.
        self._recent: list[tuple[Tensor, Tensor]] = []
        self._num_skipped_in_a_row = 0
        self._detector = ExplosionDetector()
        self._good: Snapshot | None = None
        self._buffers = Buffers(model, guide)

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

    def loss_and_gradients(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a step, and the gradient to each unconstrained parameter by its name, without taking the step.

        Arguments:
            args: The positional arguments of model and guide.
            kwargs: Their keyword arguments.
        """
        outputs = self._prepare(args, kwargs)()
        binding = self._bound()
        result = binding.read(outputs)
        return result.loss, dict(zip(binding.parameters.names, binding.split(result.gradients), strict=True))

    def prepare(self, args: tuple, kwargs: dict[str, Any], steps_left: int = 0) -> Callable[[], Tensor]:
        """What makes a step with these arguments, captured if it has to be.

        It holds as long as nothing is changed but by the steps themselves.

        Arguments:
            args: The positional arguments of model and guide.
            kwargs: Their keyword arguments.
            steps_left: How many steps are to be expected, for the backend ``"auto"``.
        """
        return functools.partial(self._step, self._prepare(args, kwargs, steps_left))

    def _prepare(self, args: tuple, kwargs: dict[str, Any], steps_left: int = 0) -> Callable[[], Sequence[Tensor]]:
        """What computes the outputs of a step."""
        self._last_arguments = args, kwargs
        if self._binding is not None and not self._binding.in_place():
            self._forget()
        if self._binding is None:
            return self._begin(args, kwargs, steps_left)
        leaves, spec = internals.flatten((args, kwargs))
        captured = None if self.backend == "eager" else self._find_capture(leaves, spec)
        if captured is None:
            return functools.partial(self._eager_outputs, args, kwargs)
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._bound().follow()
        self._choose_backend(captured, inputs, steps_left)
        return functools.partial(self._captured_outputs, captured, inputs)

    def _begin(self, args: tuple, kwargs: dict[str, Any], steps_left: int) -> Callable[[], Sequence[Tensor]]:
        """The first step as Pyro takes it, so that a guide is set up from the same random numbers; then captured ones."""
        compute: Callable[[], Sequence[Tensor]] | None = None

        def outputs() -> Sequence[Tensor]:
            nonlocal compute
            if self._binding is None:
                return self._eager_outputs(args, kwargs)
            if compute is None:
                compute = self._prepare(args, kwargs, steps_left)
            return compute()

        return outputs

    def _step(self, compute: Callable[[], Sequence[Tensor]]) -> Tensor:
        outputs = compute()
        with torch.inference_mode():
            result = self._bound().take(outputs)
        return self._finish(result)

    def _captured_outputs(self, captured: _Captured, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        start = time.perf_counter()
        with torch.inference_mode():
            outputs = captured.run(*self._bound().tensors(self._learning_rate()), *inputs)
        if len(captured.seconds) < CHECK_EVERY:
            captured.seconds.append(time.perf_counter() - start)
        return outputs

    def _eager_outputs(self, args: tuple, kwargs: dict[str, Any]) -> Sequence[Tensor]:
        # The first time with Pyro's checks as the user has set them.
        with capture.no_waiting() if self._binding is not None else nullcontext():
            value, parameters = capture.find_parameters(lambda: self._loss(args, kwargs))
        trained, gradients = capture.with_gradient(value, parameters)
        self._bind(trained)
        binding = self._bound()
        by_id = {id(leaf): gradient for leaf, gradient in zip(trained.leaves, gradients, strict=True)}
        gradients = [by_id.get(id(leaf), torch.zeros_like(leaf)) for leaf in binding.parameters.leaves]
        with torch.inference_mode():
            state, rate, _ = binding.unpack(binding.tensors(self._learning_rate()))
            return binding.pack(state, value.detach(), gradients, rate)

    def _finish(self, result: StepResult) -> Tensor:
        self.num_steps += 1
        binding = self._bound()
        if binding.adam is None and bool(result.finite):
            binding.step_outside(result.clipped, self._learning_rate_factor(self.num_steps - 1))
        self._recent.append((result.loss, result.finite))
        if len(self._recent) == min(CHECK_EVERY, self.max_skipped):
            self._check()
        return result.loss

    def _check(self) -> None:
        """Looks at the last losses: an error if nothing is finite any more, a rollback if they have exploded."""
        losses, finite = (torch.stack(each).tolist() for each in zip(*self._recent, strict=True))
        self._recent.clear()
        for each in finite:
            self._num_skipped_in_a_row = 0 if each else self._num_skipped_in_a_row + 1
            if self._num_skipped_in_a_row == self.max_skipped:
                raise RuntimeError(
                    f"{self.max_skipped} steps in a row had no finite loss or gradient, up to step {self.num_steps}; "
                    + (
                        self._first_site_without_density()
                        or "every site's log-probability is finite, its gradient is not"
                    )
                )
        verdict = self._detector.judge(losses)
        if verdict == "good":
            self._good = self.snapshot()
        elif verdict == "exploded":
            assert self._good is not None
            num_skipped = self._bound().state.scalars[_NUM_SKIPPED]
            self.restore(self._good)
            self._bound().state.scalars[_NUM_SKIPPED] = num_skipped
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

    # --- what steps change ---------------------------------------------------------------------------------------------

    def snapshot(self, *args: Any, **kwargs: Any) -> Snapshot:
        """Copies of everything that steps change: parameters, optimiser, guard, buffers of model and guide.

        Arguments:
            args: The positional arguments of model and guide, needed before the first step: they are run once to find the
                parameters.
            kwargs: Their keyword arguments.
        """
        self._find_parameters(args, kwargs)
        return self._bound().snapshot(self._buffers.copy())

    def restore(self, snapshot: Snapshot, *args: Any, **kwargs: Any) -> None:
        """Goes back to a snapshot, bit for bit; the counters of the steps stay as they are.

        Arguments:
            snapshot: Of this object, or of another one with the same model, guide and optimiser.
            args: As for :meth:`snapshot`.
            kwargs: As for :meth:`snapshot`.

        Raises:
            ValueError: if the snapshot is of other parameters, of another optimiser, or of other buffers.
        """
        self._find_parameters(args, kwargs)
        self._check_same_parameters(snapshot)
        names = tuple(snapshot.rows)
        if names != self._bound().parameters.names:
            # The state of an optimiser outside of the graph is one for the parameters in their order.
            self._captures.clear()
            self._set_parameters(self._bound().parameters.in_order(names))
        self._buffers.restore(snapshot.buffers)
        self._bound().restore(snapshot)

    def _find_parameters(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Runs model and guide once, without a trace of it, unless the parameters are known."""
        if self._binding is not None and not self._binding.in_place():
            self._forget()
        if self._binding is None:
            with capture.without_side_effects(lambda: self._find_and_bind(args, kwargs)):
                pass

    def _check_same_parameters(self, snapshot: Snapshot) -> None:
        binding = self._bound()
        ours = dict(zip(binding.parameters.names, binding.rows(binding.state.vectors), strict=True))
        for name in sorted({*ours, *snapshot.rows}):
            there, here = (list(rows[name].shape[1:]) if name in rows else "none" for rows in (snapshot.rows, ours))
            if there != here:
                raise ValueError(
                    f"the state is of another model, guide or set of arguments: parameter '{name}' has shape {there} there and "
                    f"{here} here"
                )
            if len(snapshot.rows[name]) != len(ours[name]):
                raise ValueError("the state is of another optimiser, or one of both keeps an average of the parameters")

    def state_dict(self) -> dict[str, Any]:
        """Everything that training has changed but the random state, as tensors and plain Python values."""
        return {
            "num_steps": self.num_steps,
            "num_rolled_back": self.num_rolled_back,
            "learning_rate_scale": self.learning_rate_scale,
            "recent": [(float(loss), bool(finite)) for loss, finite in self._recent],
            "num_skipped_in_a_row": self._num_skipped_in_a_row,
            "detector": self._detector.state_dict(),
            "good": None if self._good is None else self._good.state_dict(),
            "now": self.snapshot().state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Continues from a :meth:`state_dict`.

        Arguments:
            state: The state.
            args: The positional arguments of model and guide, which are run once to find the parameters.
            kwargs: Their keyword arguments.

        Raises:
            ValueError: if the state is of other parameters, of another optimiser, or of other buffers.
        """
        with capture.without_side_effects(lambda: self._find_and_bind(args, kwargs)):
            pass
        self.restore(Snapshot.from_state_dict(state["now"]))
        self.num_steps, self.num_rolled_back = state["num_steps"], state["num_rolled_back"]
        self.learning_rate_scale = state["learning_rate_scale"]
        self._good = None if state["good"] is None else Snapshot.from_state_dict(state["good"])
        device = self._bound().state.scalars.device
        self._recent = [
            (torch.tensor(loss, device=device), torch.tensor(finite, device=device)) for loss, finite in state["recent"]
        ]
        self._num_skipped_in_a_row = state["num_skipped_in_a_row"]
        self._detector.load_state_dict(state["detector"])

    # --- parameters ----------------------------------------------------------------------------------------------------

    def _loss(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        return differentiable_loss(self.elbo, self.model, self.guide, args, kwargs)

    def _bound(self) -> Binding:
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
        elif not parameters.leaves:
            raise ValueError(
                "CompiledSVI: the loss has no gradient to any parameter: model and guide have none, or none that it depends on"
            )
        self._set_parameters(parameters)

    def _set_parameters(self, parameters: Parameters) -> None:
        self._binding = Binding(parameters, self._make_optimizer, self.optim, self._options, self._binding)
        self._good, self._detector = None, ExplosionDetector()

    def _forget(self) -> None:
        self._binding = None
        self._captures.clear()

    def _find_and_bind(self, args: tuple, kwargs: dict[str, Any]) -> None:
        with capture.no_waiting():
            value, parameters = capture.find_parameters(lambda: self._loss(args, kwargs))
        self._bind(capture.with_gradient(value, parameters)[0])

    def _learning_rate_factor(self, step: int) -> float:
        return self.learning_rate_scale * (1.0 if self.schedule is None else self.schedule(step))

    def _learning_rate(self) -> float:
        return self._bound().learning_rate * self._learning_rate_factor(self.num_steps)

    # --- capturing -----------------------------------------------------------------------------------------------------

    def _find_capture(self, leaves: Sequence[Any], spec: Any) -> _Captured | None:
        """The step that was captured for arguments of this kind, or is now; None, after a warning, if it cannot be."""
        key = (spec, torch.get_default_dtype(), *map(_describe, leaves))
        captured = self._captures.get(key)
        if captured is not None and (difference := captured.surroundings.difference()) is not None:
            # From now on these are read at every step.
            self._varying.extend(captured.surroundings.changed_constants())
            self._discard(key, difference)
        elif captured is not None:
            self._captures.move_to_end(key)
            return captured
        elif len(self._captures) >= MAX_CAPTURES:
            oldest = next(iter(self._captures))
            self._discard(oldest, _difference(oldest, key))
        return None if self.backend == "eager" else self._capture(key, leaves, spec)

    def _discard(self, key: Any, difference: str) -> None:
        """Drops a captured step; if it happens again and again that one has hardly been used, that is the end of it."""
        if len(self._captures.pop(key).seconds) >= CHECK_EVERY:
            return
        self._num_wasted += 1
        if self._num_wasted == MAX_WASTED:
            self._run_eagerly(
                f"what it depends on keeps changing, each time it has to be captured anew, and now {difference}. Give what "
                "changes to the model as an argument, as a tensor"
            )

    def _run_eagerly(self, reason: str) -> None:
        self.backend = "eager"
        warn(f"CompiledSVI runs {_name(self.model)} eagerly, many times slower than a captured step, because {reason}")

    def _capture(self, key: Any, leaves: Sequence[Any], spec: Any) -> _Captured | None:
        """The captured step, or None, after a warning, if it cannot be captured."""
        try:
            args, kwargs = internals.unflatten(leaves, spec)
            with capture.without_side_effects(lambda: self._find_and_bind(args, kwargs)):
                module, run, constants = self._record(leaves, spec)
        except CaptureError as error:
            self._run_eagerly(f"it cannot be captured: {error}")
            return None
        others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        surroundings = Surroundings((self.model, self.guide, self.elbo, *others), constants)
        captured = self._captures[key] = _Captured(module, run, surroundings)
        return captured

    def _record(self, leaves: Sequence[Any], spec: Any) -> tuple[torch.fx.GraphModule, rewrite.Run, list[Tensor]]:
        """The graph of a step, checked, what runs it, and the tensors that it takes for constant."""
        args, kwargs = internals.unflatten(leaves, spec)
        binding = self._bound()
        with capture.no_waiting():
            capture.check_size(lambda: self._loss(args, kwargs))
        places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

        def step(*tensors: Tensor) -> Sequence[Tensor]:
            own, inputs = tensors[: binding.num_tensors], tensors[binding.num_tensors :]
            state, learning_rate, values = binding.unpack(own)
            given = list(leaves)
            for place, tensor in zip(places, inputs, strict=True):
                given[place] = tensor
            args, kwargs = internals.unflatten(given, spec)
            loss, gradients = capture.loss_and_gradients(
                lambda: self._loss(args, kwargs), binding.parameters, values, self._modules
            )
            return binding.pack(state, loss, gradients, learning_rate)

        inputs = [leaves[place] for place in places]
        example = [*binding.tensors(self._learning_rate()), *inputs]
        module = capture.record(step, example)
        # Some of them are gone when what is computed from them is a constant, too.
        constants = rewrite.constants(module, self._varying)
        rewrite.simplify(module, self._varying)
        run = backends.replay(module, example)
        self._check_against_eager(run, args, kwargs, inputs)
        return module, run, constants

    def _check_against_eager(self, run: rewrite.Run, args: tuple, kwargs: dict[str, Any], inputs: list[Tensor]) -> None:
        """Raises CaptureError unless loss and gradients are those of the step itself, here and at moved parameters."""
        binding = self._bound()
        before = [vectors.clone() for vectors in binding.state.vectors]
        try:
            for move in (0.0, capture.CHECK_STEP):
                for vectors in binding.state.vectors:
                    vectors[0].add_(move * torch.randn_like(vectors[0]))
                random_state = torch.random.get_rng_state()
                with unchanged_random_state(), torch.inference_mode():
                    result = binding.read(run(*binding.tensors(0.0), *inputs))
                torch.random.set_rng_state(random_state)
                with capture.no_waiting():
                    value, parameters = capture.find_parameters(lambda: self._loss(args, kwargs))
                trained, gradients = capture.with_gradient(value, parameters)
                by_id = {id(leaf): gradient for leaf, gradient in zip(trained.leaves, gradients, strict=True)}
                expected = [by_id.get(id(leaf), torch.zeros_like(leaf)) for leaf in binding.parameters.leaves]
                difference = capture.compare((result.loss, result.gradients), (value.detach(), expected))
                if difference:
                    raise CaptureError(
                        f"its {difference} is not that of the captured step under the same random numbers; it depends on more "
                        "than tensors and torch's random numbers (numpy's or Python's own, a counter), or a parameter reaches it "
                        "by a way that cannot be followed"
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
            if steps_left * seconds * SAVED_PART < PAYBACK * cost:
                return
        captured.compiled = True
        example = [*self._bound().tensors(self._learning_rate()), *inputs]
        if not backends.has_compiler(example[0].device):
            if self.backend == "inductor":
                warn("CompiledSVI: no compiler was found for inductor; the graph is replayed instead")
            return
        try:
            captured.run = backends.compile_with_inductor(captured.module, example)
        except Exception as error:
            message = " ".join(str(error).split())[:300]
            warn(f"CompiledSVI: inductor failed, the graph is replayed instead: {message}")


# What a rollback does not take back.
_NUM_SKIPPED = Scalars._fields.index("num_skipped")


def _describe(leaf: Any) -> Any:
    """What has to be the same for a captured step to be valid."""
    if isinstance(leaf, Tensor):
        return "tensor", leaf.shape, leaf.dtype, leaf.device, leaf.stride(), leaf.requires_grad
    if isinstance(leaf, np.ndarray):
        return "array", leaf.shape, leaf.dtype.str, leaf.tobytes()
    if isinstance(leaf, (int, float, complex, str, bytes, torch.dtype, torch.device, type(None))):
        return type(leaf), leaf
    return "object", _Identity(leaf)


def _difference(old: tuple[Any, ...], new: tuple[Any, ...]) -> str:
    """The first difference between the descriptions of two sets of arguments."""
    if old[0] != new[0]:
        return "the number or structure of its arguments is another"
    for before, now in zip(old[1:], new[1:], strict=True):
        if before != now:
            what, *rest = now if isinstance(now, tuple) else (now,)
            if what == "tensor":
                return f"a tensor argument has shape {tuple(rest[0])} and dtype {rest[1]}"
            return f"an argument that is no tensor is {rest[0]!r}" if rest else f"the default dtype is {what}"
    raise AssertionError("the descriptions are equal")


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
