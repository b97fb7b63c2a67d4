"""Memory and time of a training step against the depth of a flow, plain and reversible.

The flow is a stack of affine couplings with hidden layers of 64 and 32, for 256 points with D = 64; a step is the loss of a
standard normal target, with the gradients to all parameters. Stored bytes are those that autograd keeps of an eager forward
pass, apart from parameters. In a captured step they are the peak of the tensors that it allocates, without the gradients that
it returns. The sides take turns, and the figures are medians, with the ratio of the two.

    python -m benchmarks.memory --out benchmarks/results/memory.json [--quick]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_flowguides import transforms as T
from pyro_flowguides.compiled import backends, capture, rewrite
from pyro_flowguides.model.substitution import Parameters
from pyro_flowguides.testing.law import perturb

from .common import describe, environment, markdown_table, write_results
from .transforms import peak_memory, time_in_turns

_DEPTHS = (4, 16, 64)
_DIM = 64
_NUM_POINTS = 256
_SIDES: dict[str, Callable[[T.Compose], T.Compose]] = {
    "plain": lambda flow: flow,
    "reversible": lambda flow: T.Reversible([flow]),
}


def make_flow(depth: int) -> T.Compose:
    layers = [T.AffineCoupling(_DIM, flip=index % 2 == 1, hidden_dims=(64, 32)) for index in range(depth)]
    flow: T.Compose = perturb(T.Compose(layers), 0.1)
    return flow


def loss(flow: T.FlowTransform, z: Tensor) -> Tensor:
    x, log_det = flow.forward_and_log_det(z)
    return (x.square().sum(-1) / 2 - log_det).mean()


def stored_bytes(flow: T.FlowTransform, z: Tensor) -> int:
    """What autograd keeps of a forward pass, apart from parameters and buffers; shared memory counts once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [*flow.parameters(), *flow.buffers()]}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = flow.forward_and_log_det(z)
    assert results[0].requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def eager_step(flow: T.FlowTransform, z: Tensor) -> Callable[[], Sequence[Tensor]]:
    parameters = list(flow.parameters())
    return lambda: torch.autograd.grad(loss(flow, z), parameters)


def captured_step(flow: T.FlowTransform, z: Tensor) -> Callable[[], Sequence[Tensor]]:
    """The step as ``CompiledSVI`` replays it."""
    names, leaves = zip(*flow.named_parameters(), strict=True)
    parameters = Parameters(names, leaves)

    def step(z: Tensor, *values: Tensor) -> list[Tensor]:
        return capture.loss_and_gradients(lambda: loss(flow, z), parameters, values, [flow])[1]

    graph = capture.record(step, [z, *leaves])
    rewrite.simplify(graph)
    run = backends.replay(graph, [z, *leaves])
    with torch.no_grad():
        run(z, *leaves)

    def replay() -> Sequence[Tensor]:
        with torch.no_grad():
            return run(z, *leaves)

    return replay


def compare(depth: int, seconds: float) -> list[dict]:
    """The rows of one depth: eager and captured, both sides."""
    torch.manual_seed(0)
    flow, z = make_flow(depth), torch.randn(_NUM_POINTS, _DIM)
    flows = {name: wrap(flow) for name, wrap in _SIDES.items()}
    gradient_bytes = sum(parameter.nbytes for parameter in flow.parameters())
    rows = []
    for kind, make in (("eager", eager_step), ("captured", captured_step)):
        steps = {name: make(side, z) for name, side in flows.items()}
        gradients = [torch.cat([part.flatten() for part in step()]) for step in steps.values()]
        times = time_in_turns(steps, seconds)
        median = {name: statistics.median(values) for name, values in times.items()}
        if kind == "eager":
            held = {name: stored_bytes(side, z) for name, side in flows.items()}
        else:
            held = {name: peak_memory(step) - gradient_bytes for name, step in steps.items()}
        rows.append(
            {
                "step": kind,
                "depth": depth,
                "bytes": held,
                "seconds": median,
                "time_ratio": median["reversible"] / median["plain"],
                "gradient_difference": float((gradients[1] - gradients[0]).norm() / gradients[0].norm()),
            }
        )
    return rows


def to_markdown(results: dict) -> str:
    header = [
        "step",
        "depth",
        "plain, kB",
        "reversible, kB",
        "plain, ms",
        "reversible, ms",
        "ratio of times",
        "gradients differ by",
    ]
    rows = [
        [
            row["step"],
            str(row["depth"]),
            *(f"{row['bytes'][side] / 1e3:,.0f}" for side in _SIDES),
            *(f"{1e3 * row['seconds'][side]:.3g}" for side in _SIDES),
            f"{row['time_ratio']:.2f}",
            f"{row['gradient_difference']:.0e}",
        ]
        for row in results["rows"]
    ]
    parts = [
        "# Memory of a training step against the depth of a flow",
        __doc__.split("\n\n")[1].replace("\n", " "),
        f"{describe(results['environment'])} The last column is the relative difference between the gradients of the two "
        "sides, in float32.",
        markdown_table(header, rows),
    ]
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default="benchmarks/results/memory.json", help="the JSON file to write")
    parser.add_argument("--quick", action="store_true", help="few repetitions, and no depth of 64")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for depth in _DEPTHS[:2] if options.quick else _DEPTHS:
        for row in compare(depth, 0.3 if options.quick else 4.0):
            rows.append(row)
            print(row, flush=True)
    results = {"environment": environment("pyro_flowguides"), "rows": rows}
    write_results(options.out, results, to_markdown(results))


if __name__ == "__main__":
    main()
