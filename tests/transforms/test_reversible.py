"""A composition without stored activations: the gradients of a plain one, and bytes that do not grow with the depth."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_flowguides as fg
from pyro_flowguides import flows, internals
from pyro_flowguides import transforms as T
from pyro_flowguides.compiled import backends, capture, rewrite
from pyro_flowguides.testing.law import perturb

# name -> parts(dim, context_dim)
PARTS = {
    "affine couplings": lambda dim, size: [T.AffineCoupling(dim, flip=i % 2 == 1, context_dim=size) for i in range(4)],
    "couplings that keep the same half": lambda dim, size: [T.AffineCoupling(dim, context_dim=size) for _ in range(3)],
    "other couplings": lambda dim, size: [
        T.AdditiveCoupling(dim, mask="checkerboard", context_dim=size),
        T.Inverse(T.SplineCoupling(dim, context_dim=size)),
        T.AffineCoupling(dim, damped=True, context_dim=size),
    ],
    "glow": lambda dim, size: [flows.glow(dim, num_layers=2, hidden_dims=(8,), context_dim=size)],
    "linear": lambda dim, size: [
        T.LowerTriangularAffine(dim, context_dim=size),
        T.Orthogonal(dim, context_dim=size),
        T.FixedAffine(torch.randn(dim), torch.rand(dim) + 0.5),
        T.Householder(dim, context_dim=size),
    ],
    "elementwise": lambda dim, size: [
        T.ElementwiseSpline(dim, context_dim=size),
        T.Radial(dim, context_dim=size),
        T.Sigmoid(dim),
    ],
    "images": lambda dim, size: [
        T.Pixelwise((dim, 1, 1), T.AffineCoupling(dim, context_dim=size)),
        T.ImageCoupling((dim, 1, 1), hidden_channels=4, context_dim=size),
        T.ImageCoupling((1, dim, 1), mask="checkerboard", flip=True, hidden_channels=4, context_dim=size),
        T.InvertibleConvolution((dim, 1, 1), context_dim=size),
        T.Split(dim, T.AffineCoupling(dim - 1, context_dim=size)),
    ],
}


def both(parts, dtype=torch.float64, scale=0.5):
    """The parts with other parameters than at the start, composed in both ways; the parameters are shared."""
    plain = perturb(T.Compose(parts).to(dtype), scale)
    return plain, T.Reversible([plain])


def results_and_gradients(flow, method, point, context):
    """What a method returns, with the gradients of a function of it to all that it depends on."""
    point = point.clone().requires_grad_()
    context = None if context is None else context.clone().requires_grad_()
    arguments = (point, -point.detach(), context) if method == "forward_with_score" else (point, context)
    results = getattr(flow, method)(*arguments)
    wanted = [point, *([] if context is None else [context]), *flow.parameters()]
    gradients = torch.autograd.grad(results[0].sin().sum() + results[1].square().sum(), wanted)
    return [*results, *gradients]


@pytest.mark.parametrize("method", ["forward_and_log_det", "inverse_and_log_det", "forward_with_score"])
@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_gradients_are_those_of_a_plain_composition(parts, context_dim, method):
    plain, reversible = both(parts(5, context_dim))
    point = torch.randn(6, 5, dtype=torch.float64)
    point = torch.sigmoid(point) if "inverse" in method and isinstance(plain.transforms[-1], T.Sigmoid) else point
    context = torch.randn(2, 1, 3, dtype=torch.float64) if context_dim else None
    expected = results_and_gradients(plain, method, point, context)
    for a, b in zip(results_and_gradients(reversible, method, point, context), expected, strict=True):
        assert a.requires_grad == b.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_modules_and_parameters_that_are_used_twice():
    one, two = T.AffineCoupling(4), T.AffineCoupling(4, flip=True)
    two.conditioner.layers[2].weight = one.conditioner.layers[2].weight
    plain, reversible = both([one, two, T.LULinear(4), one])
    z = torch.randn(6, 4, dtype=torch.float64)
    expected = results_and_gradients(plain, "forward_and_log_det", z, None)
    # By backward, too, twice, with another parameter that is held fixed.
    fixed, *trained = reversible.parameters()
    fixed.requires_grad_(False)
    x, log_det = reversible.forward_and_log_det(z)
    loss = x.sin().sum() + log_det.square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert fixed.grad is None
    for parameter, gradient in zip(trained, expected[4:], strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-9, atol=1e-9)


def test_the_parameters_are_those_of_the_forward_pass():
    plain, reversible = both([T.AffineCoupling(4), T.AffineCoupling(4, flip=True)])
    z = torch.randn(6, 4, dtype=torch.float64)
    raw = {name: 0.5 * value.detach() for name, value in reversible.named_parameters()}
    gradients = []
    for flow in (plain, reversible):
        leaves = {name: value.clone().requires_grad_() for name, value in raw.items()}
        x = torch.func.functional_call(flow, {name: 2 * leaf for name, leaf in leaves.items()}, (z,))
        gradients.append(torch.autograd.grad(x.sin().sum(), list(leaves.values())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert all(isinstance(parameter, nn.Parameter) for parameter in reversible.parameters())
    x, _ = reversible.forward_and_log_det(z)
    with torch.no_grad():
        next(reversible.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_within_torch_func_it_is_a_plain_composition():
    plain, reversible = both([T.AffineCoupling(4), T.AffineCoupling(4, flip=True)])
    z = torch.randn(6, 4, dtype=torch.float64)
    expected = torch.func.vmap(torch.func.hessian(lambda z: plain(z).sin().sum()))(z)
    torch.testing.assert_close(torch.func.vmap(torch.func.hessian(lambda z: reversible(z).sin().sum()))(z), expected)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(reversible(z).sin().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- memory ----------------------------------------------------------------------------------------------------------


def deep(num_layers):
    layers = [T.AffineCoupling(64, flip=i % 2 == 1, hidden_dims=(16,), damped=True) for i in range(num_layers)]
    return both(layers, torch.float32, 0.1)


def stored_bytes(flow, method, z):
    """What autograd keeps of a forward pass, apart from parameters and buffers."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [*flow.parameters(), *flow.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = getattr(flow, method)(z)
    assert results[0].requires_grad
    return sum(storage.nbytes() for storage in kept.values())


# Hooks of saved tensors do not go together with the vjp of the score, whose memory is counted in captured steps below.
@pytest.mark.parametrize("method", ["forward_and_log_det", "inverse_and_log_det"])
def test_stored_bytes_do_not_grow_with_the_depth(method):
    z = torch.randn(256, 64)
    plain, reversible = zip(
        *[[stored_bytes(flow, method, z) for flow in deep(depth)] for depth in (4, 16, 64)], strict=True
    )
    assert plain[2] > 10 * plain[0]
    assert reversible[2] <= 1.1 * reversible[0]
    # The result alone.
    assert reversible[2] == z.nbytes


def captured(flow, z, method):
    """A step as it is captured: the simplified graph of loss and gradients, and its inputs."""
    names, values = zip(*flow.named_parameters(), strict=True)

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self):
            return getattr(flow, method)(*((z, -z) if method == "forward_with_score" else (z,)))

    def step(z, *values):
        leaves = [value.detach().requires_grad_() for value in values]
        replaced = {f"flow.{name}": leaf for name, leaf in zip(names, leaves, strict=True)}
        x, log_det, *scores = torch.func.functional_call(Step(), replaced, ())
        loss = x.square().sum() - log_det.sum() + sum((score * x).sum() for score in scores)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    graph = capture.record(step, [z, *values])
    rewrite.simplify(graph)
    return graph, [z, *values]


def largest_bytes(graph):
    """The largest number of bytes that a graph holds at one time, apart from its inputs and outputs."""
    nodes = [node for node in graph.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    storages = {node: internals.storage_id(node.meta["val"]) for node in nodes}
    output = next(iter(reversed(graph.graph.nodes)))
    free = {storages[node] for node in nodes if node.op != "call_function" or output in node.users}
    place = {node: index for index, node in enumerate(graph.graph.nodes)}
    sizes, first, last = {}, {}, {}
    for node in nodes:
        storage = storages[node]
        sizes[storage] = 0 if storage in free else node.meta["val"].untyped_storage().nbytes()
        first.setdefault(storage, place[node])
        last[storage] = max(last.get(storage, 0), place[node], *(place[user] for user in node.users), 0)
    held = [0] * (len(place) + 1)
    for storage, size in sizes.items():
        held[first[storage]] += size
        held[last[storage] + 1 if last[storage] + 1 < len(held) else -1] -= size
    largest = total = 0
    for change in held:
        total += change
        largest = max(largest, total)
    return largest


@pytest.mark.parametrize("method", ["forward_and_log_det", "forward_with_score"])
def test_a_captured_step_inverts_instead_of_keeping(method):
    z = torch.randn(256, 64)
    bytes_of = {}
    for depth in (2, 6):
        plain, reversible = deep(depth)
        graph, inputs = captured(plain, z, method)
        bytes_of[depth] = [largest_bytes(graph)]
        expected = graph(*inputs)
        graph, inputs = captured(reversible, z, method)
        bytes_of[depth].append(largest_bytes(graph))
        for a, b in zip(backends.replay(graph, inputs)(*inputs), expected, strict=True):
            a, b = a.detach(), b.detach()
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    assert bytes_of[6][0] > 1.8 * bytes_of[2][0]
    assert bytes_of[6][1] <= 1.1 * bytes_of[2][1]


@pytest.mark.parametrize("gradient", ["total", "path"])
def test_a_guide_trains_as_with_a_plain_composition(gradient):
    def model():
        with pyro.plate("i", 3):
            pyro.sample("x", dist.Normal(torch.ones((), dtype=torch.float64), 2.0))

    losses = []
    for wrap in (lambda flow: flow, lambda flow: T.Reversible([flow])):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = fg.AutoFlow(model, lambda dim, wrap=wrap: wrap(flows.coupling(dim, num_layers=3)), gradient=gradient)
        svi = fg.CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(), backend="replay")
        losses.append(torch.as_tensor(svi.run(5)))
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)


# --- which parts, and how exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "closed"),
    [
        (T.AffineCoupling(3), True),
        (T.Radial(3), True),
        (T.Planar(3), False),
        (T.Sylvester(3), False),
        (T.Residual(3), False),
        (T.AffineAutoregressive(3), False),
        (T.MixtureCoupling(3), False),
        (T.ElementwiseMixture(3), False),
        (T.Continuous(3, T.PlanarField(3)), False),
        (T.Pixelwise((3, 1, 1), T.Planar(3)), False),
        (T.Split(3, T.Planar(2)), False),
        (T.Inverse(T.Planar(3)), True),
        (T.Inverse(T.Inverse(T.Planar(3))), False),
        (T.Compose([T.Reverse(3), T.Planar(3)]), False),
        (T.Planar(3, context_dim=2).condition(torch.zeros(2)), False),
        (T.ElementwiseSpline(3, context_dim=2).condition(torch.zeros(2)), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_which_inverses_are_closed(part, closed):
    assert part.closed_inverse is closed
    if not closed:
        with pytest.raises(ValueError, match=r"Reversible: part [12], \w+, has no closed inverse"):
            T.Reversible([T.Reverse(3), part])


def test_an_inverse_by_newton_is_not_closed():
    class ForwardAlone(T.FlowTransform):
        def forward_and_log_det(self, z, context=None):
            return z, z.new_zeros(z.shape[:-1])

    assert not ForwardAlone(2).closed_inverse


def test_a_bound_context_is_refused_within_and_taken_outside():
    with pytest.raises(ValueError, match="part 0, Conditioned, holds a context"):
        T.Reversible([T.AffineCoupling(3, context_dim=2).condition(torch.zeros(2))])
    context = torch.randn(2, requires_grad=True)
    bound = T.Reversible([perturb(T.AffineCoupling(3, context_dim=2))]).condition(context)
    bound(torch.randn(4, 3)).sum().backward()
    assert context.grad.any()


class Off(T.FlowTransform):
    """An inverse that is wrong by a given amount."""

    def __init__(self, dim, error):
        super().__init__(dim)
        self.error = error
        self.loc = nn.Parameter(torch.zeros(dim))

    def forward_and_log_det(self, z, context=None):
        return z + self.loc, z.new_zeros(z.shape[:-1])

    def inverse_and_log_det(self, x, context=None):
        return x - self.loc + self.error, x.new_zeros(x.shape[:-1])


@pytest.mark.parametrize("method", ["forward_and_log_det", "inverse_and_log_det"])
def test_a_wrong_inverse_is_found_at_the_first_points(method):
    flow = T.Reversible([T.Reverse(2), T.Affine(2), Off(2, 0.01)])
    z = torch.rand(5, 2)
    torch.testing.assert_close(flow.round_trip_error(z), torch.full((5,), 0.01), rtol=1e-3, atol=0)
    with torch.no_grad():
        getattr(flow, method)(z)
    with pytest.warns(UserWarning, match="error of 0.01, where 0.0003 is allowed.* 0.01, of part 2, Off"):
        getattr(flow, method)(z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(flow, method)(z)
        T.Reversible([Off(2, 1e-6)]).forward_and_log_det(z)


def test_rounding_is_no_larger_than_that_of_a_plain_composition():
    exact, flow = both([T.AffineCoupling(8, flip=i % 2 == 1, hidden_dims=(8,)) for i in range(64)], scale=0.1)
    z = torch.randn(32, 8)
    expected = results_and_gradients(exact, "forward_and_log_det", z.double(), None)
    errors = []
    for other in (exact.float(), flow.float()):
        found = results_and_gradients(other, "forward_and_log_det", z, None)
        errors.append(max(float(((a - b).norm() / b.norm()).detach()) for a, b in zip(found, expected, strict=True)))
    assert errors[1] < 10 * errors[0]
