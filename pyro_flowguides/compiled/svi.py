"""SVI whose step is captured once, as one graph, and then repeated without Python, Pyro or autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.infer import ELBO, SVI
from pyro.optim import PyroOptim
from torch import Tensor

from ..checks import warn
from ..model.call import ModelCall
from ..processes import apart, find_processes
from .binding import Binding, OptimizerFactory, optimizer_factory
from .capture import CaptureError
from .captures import Arguments, CapturedStep, Captures, capture_step
from .chunks import Chunks
from .losses import KL, Prepared, PyroELBO, as_function, as_objective
from .lost import has_no_factorization, why_lost
from .options import check_options
from .rollback import Watch
from .snapshot import Snapshot
from .trained import Trained
from .update import NUM_SKIPPED, Scalars

# The number of steps between two looks at the losses, which raise errors and take explosions back.
CHECK_EVERY = 50
MAX_NONFINITE_STEPS = 50


class NonfiniteError(RuntimeError):
    """Too many steps in a row had no finite loss or gradient."""


class CompiledSVI(SVI):
    """Stochastic variational inference with the whole step captured as one graph.

    A drop-in replacement of ``pyro.infer.SVI`` with the same steps: same random numbers, losses and parameters up to rounding.
    The first step is Pyro's; the second runs model, guide, gradient and optimiser under a recorder (about a second); every later
    one repeats the recorded operations. Any Pyro model with a fixed structure, and any guide, can be captured.

    Tensor arguments are inputs of the graph: their values may change from step to step. New shapes, dtypes, devices, other
    arguments that are not tensors, and other values of what model and guide close over (numbers, flags such as ``training``,
    attributes of their objects) make a new capture. Give minibatches as arguments, or draw them by a subsampling plate.
    Where ``Trace_ELBO(vectorize_particles=True)`` meets a model that does not broadcast over particles (``X @ beta``), one run of
    the model is recorded, and the recording is repeated for all particles.
    Models that branch on the values of tensors (``if x > 0``), draw from numpy's or Python's own random numbers, or loop in
    Python for thousands of operations cannot be captured; they run eagerly, with identical results and one warning.

    A step whose loss or gradient is not finite changes nothing and is counted. Every 50 steps the losses are checked: ten in a
    row above the mean of the last good fifty by 20 of their standard deviations are an explosion; the parameters go back to the
    end of the good fifty, and the learning rate is halved for good.

    Arguments:
        model: The model.
        guide: The guide.
        optim: A Pyro optimiser, or a function from a list of parameters to a torch optimiser. Adam, AdamW and ClippedAdam become
            part of the graph. Other optimisers run after it, on one vector of all parameters if they treat all numbers alike,
            else on the parameters; each of their steps waits for the device once.
        loss: An ELBO of Pyro with a differentiable loss, :class:`IWELBO`, an objective such as :class:`KL`, or a function
            ``loss(model, guide, *args, **kwargs)`` that returns a tensor.
        backend: ``"replay"`` repeats the graph operation by operation, and is ready at once. ``"inductor"`` compiles it, which
            takes from ten seconds to a minute, and makes a step two to four times faster. ``"auto"`` begins with replay and
            compiles if the steps left in a :meth:`run` repay it; with several processes it stays with replay. ``"eager"``
            captures nothing.
        schedule: The factor of the learning rate as a function of the number of the step, from 0.
        clip_norm: Scale gradients down to this norm.
        clip_factor: Scale gradients down to this multiple of the running mean of their norm.
        ema_decay: The decay of an exponential moving average of the parameters, see :meth:`use_ema`.
        max_nonfinite_steps: Raise an error after this many consecutive steps that were not finite.
        distributed: Whether gradients are averaged over the processes of ``torch.distributed``, if there are several: see
            docs/how_to/distributed.md. At its first step every process takes the parameters and buffers of the first one, and a
            seed of its own. All processes have to take the same steps.
        chunk_size: The number of particles that a step takes at a time. The gradients of the chunks are added up, and the memory
            is that of one of them. Each chunk has noise of its own; with the same noise the result is that of one pass, up to
            rounding. ``"auto"`` splits where a step is predicted to take more than half of the memory that is free. None takes
            all particles together. For losses that are a mean over particles: Pyro's ``Trace_ELBO``, ``TraceMeanField_ELBO``
            and ``TraceEnum_ELBO``, and :class:`KL`. Subsampled plates draw anew for each chunk, and the weights of an
            ``AutoMixture`` have their baseline from the chunk.

    Attributes:
        num_steps: The number of steps so far, skipped ones included.
        num_rolled_back: The number of explosions that were taken back.
        learning_rate_scale: The factor by which explosions have reduced the learning rate.
        captures: The captured steps, one for each kind of arguments; ``len(svi.captures)`` is their number, and
            ``svi.captures.num_compiled`` the number of those that inductor has compiled.
        backend: As given; ``"eager"`` once a step could not be captured.

    Raises:
        ValueError: if an option is unknown, or ``chunk_size`` is given for a loss that cannot be split; at a step, if there is
            nothing to train.
        TypeError: if ``optim`` is no optimiser, or ``loss`` no loss.
        NotImplementedError: if ``loss`` is an ELBO without a differentiable loss.
        RuntimeError: at a step, after ``max_nonfinite_steps`` consecutive steps that were not finite.

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
        ema_decay: float | None = None,
        max_nonfinite_steps: int = MAX_NONFINITE_STEPS,
        distributed: bool = True,
        chunk_size: int | str | None = None,
    ) -> None:
        check_options(backend, optim, schedule, ema_decay)
        objective = as_objective(loss)
        super().__init__(
            model,
            guide,
            optim if isinstance(optim, PyroOptim) else PyroOptim(optim, {}),
            loss if isinstance(loss, ELBO) else as_function(objective),
        )
        self.objective = objective
        self.backend = backend
        self.schedule = schedule
        self.max_nonfinite_steps = max_nonfinite_steps
        self.captures = captures = Captures()
        self.num_steps = 0
        self.num_rolled_back = 0
        self.learning_rate_scale = 1.0
        self._keeps_ema = ema_decay is not None
        self._watch = watch = Watch(CHECK_EVERY, max_nonfinite_steps)
        self._processes = find_processes() if distributed else None

        def begin_anew() -> None:
            """Drops what belongs to other parameters."""
            captures.clear()
            watch.begin_anew()

        options = {"clip_norm": clip_norm, "clip_factor": clip_factor, "ema_decay": ema_decay}
        make_binding = functools.partial(Binding, optimizer_factory(optim), self.optim, options, self._processes)
        chunks = Chunks(objective, chunk_size)
        self._trained = Trained(model, guide, objective, chunks, self._processes, make_binding, begin_anew)

    # --- steps ---------------------------------------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One step; returns the loss before it."""
        return float(self.compile_step(args, kwargs)())

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
            step = self.compile_step(args, kwargs, num_steps - len(losses))
            losses.extend(step() for _ in range(min(CHECK_EVERY, num_steps - len(losses))))
        return torch.stack(losses)

    def compile_step(self, args: tuple, kwargs: dict[str, Any], steps_left: int = 0) -> Callable[[], Tensor]:
        """A function that takes one step with these arguments, and returns its loss without waiting for it.

        It looks up, or makes, the captured step for these arguments; calling it many times spares the look-up. It is valid as
        long as only the steps themselves change anything: not after other changes to parameters, model or guide.

        Arguments:
            args: The positional arguments of model and guide.
            kwargs: Their keyword arguments.
            steps_left: The number of steps to expect, by which the backend ``"auto"`` decides.
        """
        self._trained.drop_stale()
        if self._processes is not None and not self._trained.is_together:
            self._find_recording(args, kwargs)
            self._trained.begin_together(args, kwargs)
        arguments = Arguments(args, kwargs)
        if self._trained.binding is None:
            return functools.partial(self._first_step, arguments, steps_left)
        return functools.partial(self._take_step, arguments, self._captured(arguments, steps_left))

    def _first_step(self, arguments: Arguments, steps_left: int) -> Tensor:
        """Pyro's own step, so that a guide is set up from the same random numbers; when called again, the captured one."""
        if self._trained.binding is None:
            self._find_recording(arguments.args, arguments.kwargs)
            return self._take_step(arguments, None)
        return self.compile_step(arguments.args, arguments.kwargs, steps_left)()

    def _find_recording(self, args: tuple, kwargs: dict[str, Any]) -> None:
        if isinstance(self.objective, PyroELBO) and self._trained.binding is None:
            self.objective.find_recording(self.model, self.guide, args, kwargs)

    def _take_step(self, arguments: Arguments, captured: CapturedStep | None) -> Tensor:
        self._last_arguments = arguments
        self._trained.prepare(self.num_steps, arguments.args, arguments.kwargs)
        outputs = self._outputs(arguments, captured)
        binding = self._trained.bound
        with torch.inference_mode():
            result = binding.take(outputs)
        self.num_steps += 1
        if binding.adam is None and bool(result.finite):
            binding.step_outside(result.clipped, self._learning_rate_factor(self.num_steps - 1))
        if self._watch.add(result.loss, result.finite):
            self._check()
        return result.loss

    def _outputs(self, arguments: Arguments, captured: CapturedStep | None) -> Sequence[Tensor]:
        """What a step computes; a matrix without a factorisation makes it a step that is not finite."""
        try:
            return self._computed(arguments, captured)
        except RuntimeError as error:
            if self._trained.binding is None or not has_no_factorization(error):
                raise
        binding = self._trained.bound
        with torch.inference_mode():
            state, rate, values = binding.unpack(binding.tensors(self._learning_rate(binding)))
            return binding.pack(state, rate.new_full((), torch.nan), [value * 0 for value in values], rate)

    def _computed(self, arguments: Arguments, captured: CapturedStep | None) -> Sequence[Tensor]:
        """By the captured step, else eagerly."""
        if captured is not None:
            with torch.inference_mode():
                return captured(self._inputs(arguments))
        eager = self._trained.differentiate(arguments.args, arguments.kwargs)
        if self._trained.share_new():
            eager = self._trained.differentiate(arguments.args, arguments.kwargs)
        binding = self._trained.bound
        gradients = eager.gradients_of(binding.parameters)
        with torch.inference_mode():
            state, rate, _ = binding.unpack(binding.tensors(self._learning_rate(binding)))
            return binding.pack(state, eager.loss, gradients, rate)

    def loss_and_gradients(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a step, and the gradient to each unconstrained parameter by its name, without taking the step.

        With several processes these are means, and all of them have to call it.

        Arguments:
            args: The positional arguments of model and guide.
            kwargs: Their keyword arguments.
        """
        self._trained.drop_stale()
        arguments = Arguments(args, kwargs)
        self._trained.prepare(self.num_steps, args, kwargs)
        captured = None if self._trained.binding is None else self._captured(arguments)
        outputs = self._outputs(arguments, captured)
        result = self._trained.bound.read(outputs)
        return result.loss, dict(zip(self.parameters, self._trained.bound.split(result.gradients), strict=True))

    def _learning_rate_factor(self, step: int) -> float:
        return self.learning_rate_scale * (1.0 if self.schedule is None else self.schedule(step))

    def _learning_rate(self, binding: Binding) -> float:
        return binding.learning_rate * self._learning_rate_factor(self.num_steps)

    # --- captured steps ------------------------------------------------------------------------------------------------

    def _captured(self, arguments: Arguments, steps_left: int = 0) -> CapturedStep | None:
        """The captured step for these arguments; None, after one warning, if there can be none."""
        if self.backend == "eager":
            return None
        key = arguments.key()
        try:
            captured = self.captures.find(key)
            if captured is None:
                # Each process captures when it has to.
                with apart():
                    captured = self._capture(arguments)
                self._trained.share_new()
                self.captures.add(key, captured)
        except RuntimeError as error:
            if has_no_factorization(error):
                # At one of the draws of the recording: these steps are eager, and the next ones captured.
                return None
            if not isinstance(error, CaptureError):
                raise
            if isinstance(self.objective, KL) and self.objective.take_recording():
                return self._captured(arguments, steps_left)
            self.backend = "eager"
            warn(
                f"CompiledSVI cannot capture {ModelCall(self.model).name}, and runs it eagerly, many times slower: {error}"
            )
            return None
        self._trained.bound.adopt_moved_values()
        # Compiled steps round in their own way: processes that chose by their own clocks would come apart.
        backend = "replay" if self._processes is not None and self.backend == "auto" else self.backend
        with apart():
            captured.choose_backend(backend, lambda: self._inputs(arguments), steps_left)
        return captured

    def _capture(self, arguments: Arguments) -> CapturedStep:
        # Other arguments may use other parameters.
        with self._trained.find(arguments.args, arguments.kwargs):
            seen = (self.model, self.guide, self.objective)
            return capture_step(self._trained, arguments, seen, self.captures.varying)

    def _inputs(self, arguments: Arguments) -> list[Tensor]:
        return self._trained.step_inputs(self._learning_rate(self._trained.bound), arguments.tensors)

    # --- parameters ----------------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The unconstrained parameters that are trained, by their names in Pyro; none before the first step."""
        binding = self._trained.binding
        return {} if binding is None else dict(zip(binding.parameters.names, binding.parameters.leaves, strict=True))

    def use_ema(self) -> None:
        """Replaces the parameters by their exponential moving average.

        Raises:
            ValueError: if no average was kept.
        """
        if not self._keeps_ema:
            raise ValueError("CompiledSVI: no average of the parameters is kept; give ema_decay=, such as 0.99")
        for vectors in self._trained.bound.state.vectors:
            vectors[0].copy_(vectors[-1])

    @property
    def chunk_size(self) -> int | str | None:
        """The number of particles that are taken at a time; None for all of them, ``"auto"`` before the first step."""
        return self._trained.chunks.size

    # --- the guard -----------------------------------------------------------------------------------------------------

    @property
    def scalars(self) -> Scalars:
        """The running numbers of the guard; waits for the device."""
        return Scalars(*self._trained.bound.state.scalars.tolist()) if self._trained.binding else Scalars()

    @property
    def num_skipped(self) -> int:
        """The number of steps that were skipped because loss or gradient were not finite."""
        return int(self.scalars.num_skipped)

    def _check(self) -> None:
        """Checks the last losses: an error if nothing is finite any more, a rollback if they have exploded."""
        steps = max(self.num_steps - 2 * CHECK_EVERY, 0), self.num_steps - 1
        verdict = self._watch.judge(self._trained.is_comparable(*steps))
        if verdict == "lost":
            reason = why_lost(self.model, self.guide, self._last_arguments.args, self._last_arguments.kwargs)
            if self._processes is not None:
                reasons = self._processes.gather(reason)
                reason = "; ".join(f"in process {rank} {each}" for rank, each in enumerate(reasons))
            raise NonfiniteError(
                f"{self.max_nonfinite_steps} steps in a row had no finite loss or gradient, up to step {self.num_steps}; {reason}"
            )
        if verdict == "good":
            self._watch.good = self.snapshot()
        elif verdict == "exploded":
            assert self._watch.good is not None
            num_skipped = self.scalars.num_skipped
            self.restore(self._watch.good)
            self._trained.bound.state.scalars[NUM_SKIPPED] = num_skipped
            self.num_rolled_back += 1
            self.learning_rate_scale *= 0.5

    # --- what steps change ---------------------------------------------------------------------------------------------

    def snapshot(self, *args: Any, **kwargs: Any) -> Snapshot:
        """Copies of everything that steps change: parameters, optimiser, counters of the guard, buffers of model and guide.

        Arguments:
            args: The positional arguments of model and guide, needed before the first step: they are run once to find the
                parameters.
            kwargs: Their keyword arguments.
        """
        self._trained.ensure(args, kwargs)
        return self._trained.bound.snapshot(self._trained.buffers.copy())

    def restore(self, snapshot: Snapshot, *args: Any, **kwargs: Any) -> None:
        """Goes back to a snapshot, bit for bit. Attributes such as ``num_steps`` stay as they are.

        Arguments:
            snapshot: Of this object, or of another one with the same model, guide and kind of optimiser.
            args: As for :meth:`snapshot`.
            kwargs: As for :meth:`snapshot`.

        Raises:
            ValueError: if the snapshot is of other parameters, of another optimiser, or of other buffers.
        """
        self._trained.ensure(args, kwargs)
        self._trained.restore(snapshot)

    def state_dict(self) -> dict[str, Any]:
        """Everything that training has changed but the random state, as tensors and plain Python values."""
        return {
            "num_steps": self.num_steps,
            "num_rolled_back": self.num_rolled_back,
            "learning_rate_scale": self.learning_rate_scale,
            "chunk_size": self.chunk_size,
            "watch": self._watch.state_dict(),
            "objective": self.objective.state_dict() if isinstance(self.objective, Prepared) else {},
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
        if self.chunk_size == "auto":
            self._trained.chunks.size = state.get("chunk_size", "auto")
        with self._trained.find(args, kwargs):
            pass
        if self._processes is not None:
            self._trained.begin_together(args, kwargs)
        self.restore(Snapshot.from_state_dict(state["now"]))
        self.num_steps, self.num_rolled_back = state["num_steps"], state["num_rolled_back"]
        self.learning_rate_scale = state["learning_rate_scale"]
        self._watch.load_state_dict(state["watch"], self._trained.bound.state.scalars.device)
        if isinstance(self.objective, Prepared):
            self.objective.load_state_dict(state["objective"])
