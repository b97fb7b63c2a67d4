"""The captured steps of a training: one for each kind of arguments, as long as all that it has seen is as it was."""

from __future__ import annotations

import functools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from ..checks import warn
from ..model.guards import Guards
from ..model.sites import unchanged_random_state
from . import backends, capture, rewrite
from .arguments import Arguments as Arguments
from .arguments import Key as Key
from .capture import CaptureError
from .chunks import Program, example_outputs
from .trained import Trained

# The number of captured steps that are kept.
MAX_CAPTURES = 8
# A captured step that is dropped before it has run this often was wasted; after this many of them capturing ends.
MIN_NUM_RUNS = 50
MAX_WASTED = 5
# The time that compiling takes, and the part of a replayed step that it saves.
COMPILE_SECONDS, COMPILE_SECONDS_PER_NODE, SAVED_PART = 10.0, 0.05, 0.5
# These are rough: compiling has to repay itself this many times over.
PAYBACK = 3.0


@dataclass
class CapturedStep:
    """One captured step.

    Attributes:
        program: The graphs.
        run: Runs them.
        guards: What it has seen apart from its inputs.
        seconds: The times of its first runs, as far as they are known.
        laps: Marks before and after runs of a GPU that nobody has waited for.
        is_settled: Whether the choice between replay and inductor has been made.
        is_compiled: Whether inductor has compiled it.
    """

    program: Program
    run: rewrite.Run
    guards: Guards
    seconds: list[float] = field(default_factory=list)
    laps: list[tuple[Any, Any]] = field(default_factory=list)
    is_settled: bool = False
    is_compiled: bool = False

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The outputs of the step."""
        if self.num_runs == MIN_NUM_RUNS:
            return self.run(*inputs)
        if inputs and inputs[0].is_cuda:
            # What a call takes on the host says nothing of the device.
            marks = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            marks[0].record()
            outputs = self.run(*inputs)
            marks[1].record()
            self.laps.append(marks)
            return outputs
        start = time.perf_counter()
        outputs = self.run(*inputs)
        self.seconds.append(time.perf_counter() - start)
        return outputs

    @property
    def num_runs(self) -> int:
        """The number of runs so far, up to ``MIN_NUM_RUNS``."""
        return len(self.seconds) + len(self.laps)

    def choose_backend(self, backend: str, example: Callable[[], Sequence[Tensor]], steps_left: int) -> None:
        """Moves from replay to inductor, where the user has asked for it, or where it pays.

        Arguments:
            backend: What the user has asked for.
            example: Makes inputs to compile for.
            steps_left: The number of steps that are expected.
        """
        if self.is_settled or backend == "replay" or (backend == "auto" and not self._pays(steps_left)):
            return
        self.is_settled = True
        inputs = example()
        if not backends.has_compiler(inputs[0].device):
            if backend == "inductor":
                warn("CompiledSVI: no compiler was found for inductor; the graph is replayed instead")
            return
        try:
            self.run = self.program.run_by(backends.compile_with_inductor, inputs)
            self.is_compiled = True
        except Exception as error:
            message = " ".join(str(error).split())[:300]
            warn(f"CompiledSVI: inductor failed, the graph is replayed instead: {message}")

    def _pays(self, steps_left: int) -> bool:
        if self.num_runs < MIN_NUM_RUNS:
            return False
        for start, end in self.laps:
            end.synchronize()
            self.seconds.append(start.elapsed_time(end) / 1e3)
        self.laps.clear()
        saved = steps_left * float(np.median(self.seconds)) * SAVED_PART
        return saved >= PAYBACK * (COMPILE_SECONDS + COMPILE_SECONDS_PER_NODE * self.program.num_nodes)


class Captures:
    """A cache of captured steps.

    Attributes:
        varying: Tensors that others write to, found out by their guards: a new graph reads them at every step.
    """

    def __init__(self) -> None:
        self.varying: list[Tensor] = []
        self._steps: OrderedDict[Key, CapturedStep] = OrderedDict()
        self._num_wasted = 0

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def num_compiled(self) -> int:
        """The number of captured steps that inductor has compiled."""
        return sum(step.is_compiled for step in self._steps.values())

    def find(self, key: Key) -> CapturedStep | None:
        """The step that was captured for arguments of this kind; None if there is none, or no longer.

        Raises:
            CaptureError: if captured steps are dropped again and again that have hardly been used.
        """
        step = self._steps.get(key)
        if step is None:
            if len(self._steps) >= MAX_CAPTURES:
                oldest = next(iter(self._steps))
                self._drop(oldest, oldest.difference(key))
            return None
        difference = step.guards.difference()
        if difference is None:
            self._steps.move_to_end(key)
            return step
        self.varying.extend(step.guards.changed_constants())
        self._drop(key, difference)
        return None

    def add(self, key: Key, step: CapturedStep) -> None:
        """Keeps a captured step for arguments of this kind."""
        self._steps[key] = step

    def clear(self) -> None:
        """Drops all of them, since the parameters have changed."""
        self._steps.clear()

    def _drop(self, key: Key, difference: str) -> None:
        if self._steps.pop(key).num_runs >= MIN_NUM_RUNS:
            return
        self._num_wasted += 1
        if self._num_wasted == MAX_WASTED:
            raise CaptureError(
                f"what it depends on keeps changing, each time it has to be captured anew, and now {difference}. Give what "
                "changes to the model as an argument, as a tensor"
            )


def capture_step(
    trained: Trained,
    arguments: Arguments,
    seen: Iterable[Any],
    varying: Sequence[Tensor],
) -> CapturedStep:
    """Captures a step: records it, rewrites the graph, and checks it against the step itself.

    Arguments:
        trained: The loss and its parameters.
        arguments: The arguments of this step.
        seen: Whatever Python values the step is computed from, which the guards look into.
        varying: Tensors that others write to.

    Raises:
        CaptureError: if it cannot be captured; the message says why and where.
    """
    counted = trained.chunks.counted
    with capture.no_waiting():
        capture.check_size(lambda: trained.loss(arguments.args, arguments.kwargs, counted[0][0]))
    example = trained.step_inputs(trained.bound.learning_rate, arguments.tensors)
    constants: list[Tensor] = []

    def recorded(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> GraphModule:
        module = capture.record(function, inputs)
        # Before it is rewritten: some of them are gone when what is computed from them has become a constant.
        constants.extend(rewrite.constants(module, varying))
        rewrite.simplify(module, varying)
        return module

    if len(counted) == 1 and counted[0][0] is None:
        program = Program((recorded(functools.partial(_step, trained, arguments), example),))
    else:
        parts = [
            recorded(functools.partial(_chunk, trained, arguments, size, share), example) for size, share, _ in counted
        ]
        last = recorded(functools.partial(_update, trained), [*example, *example_outputs(parts[0])])
        program = Program((*parts, last), tuple(count for *_, count in counted))
    run = program.run_by(backends.replay, example)
    _check_against_eager(run, trained, arguments)
    return CapturedStep(program, run, Guards((*seen, *arguments.others), constants))


def _gradients(
    trained: Trained, arguments: Arguments, num_particles: int | None, tensors: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients from the inputs of a step."""
    binding = trained.bound
    own, inputs = tensors[: binding.num_tensors], tensors[binding.num_tensors :]
    _, _, values = binding.unpack(own)
    num_prepared = len(trained.inputs or ())
    args, kwargs = arguments.with_tensors(inputs[num_prepared:])
    with trained.given(inputs[:num_prepared]):
        return capture.loss_and_gradients(
            lambda: trained.loss(args, kwargs, num_particles), binding.parameters, values, trained.modules
        )


def _step(trained: Trained, arguments: Arguments, *tensors: Tensor) -> Sequence[Tensor]:
    """A whole step."""
    state, rate, _ = trained.bound.unpack(tensors)
    return trained.bound.pack(state, *_gradients(trained, arguments, None, tensors), rate)


def _chunk(
    trained: Trained, arguments: Arguments, num_particles: int | None, share: float, *tensors: Tensor
) -> Sequence[Tensor]:
    """What a chunk of particles adds to the loss and to the gradient, one vector for each dtype."""
    loss, gradients = _gradients(trained, arguments, num_particles, tensors)
    return [share * part for part in (loss, *trained.bound.join(gradients))]


def _update(trained: Trained, *tensors: Tensor) -> Sequence[Tensor]:
    """What is left of a step when loss and gradient, which come last, are there."""
    binding = trained.bound
    loss, *vectors = tensors[-1 - len(binding.dtypes) :]
    state, rate, _ = binding.unpack(tensors)
    return binding.pack(state, loss, binding.split(vectors), rate)


def _check_against_eager(run: rewrite.Run, trained: Trained, arguments: Arguments) -> None:
    """Raises CaptureError unless loss and gradients are those of the step itself, here and at moved parameters."""
    binding = trained.bound
    before = [vectors.clone() for vectors in binding.state.vectors]
    try:
        for move in (0.0, capture.CHECK_STEP):
            for vectors in binding.state.vectors:
                vectors[0].add_(move * torch.randn_like(vectors[0]))
            random_state = torch.random.get_rng_state()
            with unchanged_random_state(), torch.inference_mode():
                result = binding.read(run(*trained.step_inputs(0.0, arguments.tensors)))
            torch.random.set_rng_state(random_state)
            with capture.no_waiting():
                eager = trained.gradients(arguments.args, arguments.kwargs)
            expected = eager.gradients_of(binding.parameters)
            difference = capture.compare((result.loss, result.gradients), (eager.loss, expected))
            if difference:
                raise CaptureError(
                    f"its {difference} is not that of the captured step under the same random numbers; it depends on more than "
                    "tensors and torch's random numbers (numpy's or Python's own, a counter), or a parameter reaches it by a "
                    "way that cannot be followed"
                )
    finally:
        for vectors, values in zip(binding.state.vectors, before, strict=True):
            vectors.copy_(values)
