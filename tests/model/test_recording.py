"""One run of a model, recorded and batched over draws, against runs of single draws: models as their users write them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from any_models import MODELS, X, Y, without_plates
from pyro import poutine

from pyro_flowguides.model import recording
from pyro_flowguides.model.batched import BatchedModel
from pyro_flowguides.model.call import ModelCall
from pyro_flowguides.model.recording import CaptureError
from pyro_flowguides.model.sites import latent_sites

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-8}


@pytest.fixture(autouse=True)
def without_validation():
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(False):
        yield


@pytest.fixture
def working_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield dtype
    torch.set_default_dtype(before)


def in_dtype(args, dtype):
    return tuple(arg.to(dtype) if arg.is_floating_point() else arg for arg in args)


def draws_of(model, args, number=3):
    """A trace of one run, and draws of its latents from the prior."""
    with torch.no_grad():
        traces = [poutine.trace(model).get_trace(*args) for _ in range(number)]
    names = [name for name, _ in latent_sites(traces[0])]
    return traces[0], {name: torch.stack([trace.nodes[name]["value"] for trace in traces]) for name in names}


def alone(model, args, values, index):
    """A run of one draw by itself, and the gradient of its log joint."""
    points = {name: value[index].clone().requires_grad_(value.is_floating_point()) for name, value in values.items()}
    trace = poutine.trace(poutine.condition(model, data=points)).get_trace(*args)
    log_p = trace.log_prob_sum()
    gradients = torch.autograd.grad(log_p, list(points.values()), allow_unused=True, materialize_grads=True)
    return trace, log_p.detach(), gradients


@pytest.mark.parametrize("name", MODELS)
def test_value_and_gradient_of_many_draws_are_those_of_each(name, working_dtype):
    model, args = MODELS[name]
    args = in_dtype(args, working_dtype)
    if isinstance(model, torch.nn.Module):
        model = type(model)(args[0].shape[-1])
    prototype, values = draws_of(model, args)
    batched = BatchedModel(ModelCall(model, args), prototype, list(values))
    points = {name: value.clone().requires_grad_() for name, value in values.items()}
    log_p = batched.log_prob(points)
    # Each draw has a weight of its own: none may get the gradient of another.
    weights = torch.arange(1.0, 1 + len(log_p))
    gradients = torch.autograd.grad((weights * log_p).sum(), list(points.values()))
    tolerance = TOLERANCE[working_dtype]
    for index in range(len(log_p)):
        _, expected, expected_gradients = alone(model, args, values, index)
        torch.testing.assert_close(log_p[index].detach(), expected, rtol=tolerance, atol=tolerance)
        for gradient, single in zip(gradients, expected_gradients, strict=True):
            scale = float(single.abs().max()) + 1
            torch.testing.assert_close(
                gradient[index], weights[index] * single, rtol=0, atol=10 * tolerance * scale * float(weights[index])
            )


def test_a_trace_of_many_draws_holds_what_the_sites_of_each_hold():
    model, args = MODELS["linear"]
    prototype, values = draws_of(model, args)
    trace = BatchedModel(ModelCall(model, args), prototype, list(values)).trace(values, 3)
    for index in range(3):
        single, _, _ = alone(model, args, values, index)
        single.compute_log_prob()
        torch.testing.assert_close(trace.nodes["mean"]["value"][index], single.nodes["mean"]["value"])
        for name in ("beta", "y"):
            torch.testing.assert_close(trace.nodes[name]["log_prob"][index], single.nodes[name]["log_prob"])


def test_sites_that_are_not_given_are_sampled_for_every_draw():
    model, args = MODELS["linear"]
    prototype, _ = draws_of(model, args)
    trace = BatchedModel(ModelCall(model, args), prototype, []).trace({}, 500)
    beta = trace.nodes["beta"]["value"]
    assert beta.shape == (500, 3)
    assert beta.mean(0).abs().max() < 0.2
    assert (beta.std(0) - 1).abs().max() < 0.2
    torch.testing.assert_close(trace.nodes["mean"]["value"], beta @ X.T)


def test_batch_dimensions_without_a_plate_are_no_obstacle():
    prototype, values = draws_of(without_plates, MODELS["indexing"][1])
    BatchedModel(ModelCall(without_plates, MODELS["indexing"][1]), prototype, list(values)).check(values)


def test_scales_and_masks_count():
    def model(group, y):
        with pyro.plate("group", 4), poutine.scale(scale=3.0):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=group > 0):
            pyro.sample("y", dist.Normal(effect[group], 1.0), obs=y)

    prototype, values = draws_of(model, MODELS["indexing"][1])
    log_p = BatchedModel(ModelCall(model, MODELS["indexing"][1]), prototype, list(values)).log_prob(values)
    expected = torch.stack([alone(model, MODELS["indexing"][1], values, index)[1] for index in range(3)])
    torch.testing.assert_close(log_p, expected)


def test_indices_of_subsampled_plates_are_inputs():
    def model(X, y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(X), subsample_size=5) as chosen:
            pyro.sample("y", dist.Normal(X[chosen] @ beta, 1.0), obs=y[chosen])

    prototype, values = draws_of(model, (X, Y))
    batched = BatchedModel(ModelCall(model, (X, Y)), prototype, list(values))
    for chosen in (torch.arange(5), torch.arange(20, 25)):
        given = poutine.condition(model, data={"data": chosen})
        expected = torch.stack([alone(given, (X, Y), values, index)[1] for index in range(3)])
        torch.testing.assert_close(batched.log_prob(values, {"data": chosen}), expected)
    # Drawn anew where they are not given.
    assert len({float(batched.log_prob(values)[0]) for _ in range(5)}) > 1


def test_arguments_may_vary():
    model, args = MODELS["linear"]
    prototype, values = draws_of(model, args)
    batched = BatchedModel(ModelCall(model, args), prototype, list(values), arguments_vary=True)
    other = ModelCall(model, (args[0] + 1.0, args[1] - 2.0))
    expected = torch.stack([alone(model, other.args, values, index)[1] for index in range(3)])
    torch.testing.assert_close(batched.log_prob(values, call=other), expected)


def test_parameters_are_inputs_and_have_a_gradient():
    def model(y):
        scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3), scale).to_event(1))
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Normal(X @ beta, 1.0), obs=y)

    pyro.clear_param_store()
    prototype, values = draws_of(model, (Y,))
    batched = BatchedModel(ModelCall(model, (Y,)), prototype, list(values))
    leaf = pyro.param("scale").unconstrained()
    for value in (2.0, 0.5):
        with torch.no_grad():
            leaf.fill_(torch.tensor(value).log())
        with poutine.trace(param_only=True) as met:
            log_p = batched.log_prob(values)
        assert list(met.trace.nodes) == ["scale"]
        (gradient,) = torch.autograd.grad(log_p.sum(), leaf)
        expected = sum(
            poutine.trace(poutine.condition(model, data={"beta": each})).get_trace(Y).log_prob_sum()
            for each in values["beta"]
        )
        torch.testing.assert_close(log_p.sum(), expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0])


def test_a_number_that_changes_makes_a_new_recording():
    power = {"value": 1.0}

    def model(y):
        with poutine.scale(scale=power["value"]):
            MODELS["linear"][0](X, y)

    prototype, values = draws_of(model, (Y,))
    batched = BatchedModel(ModelCall(model, (Y,)), prototype, list(values))
    before = batched.log_prob(values)
    power["value"] = 0.5
    torch.testing.assert_close(batched.log_prob(values), 0.5 * before)


def looks_at_a_latent(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    sign = 1.0 if loc > 0 else -1.0
    pyro.sample("y", dist.Normal(sign * loc, 1.0), obs=y)


def reads_a_latent(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = 1.0 + abs(float(loc))
    pyro.sample("y", dist.Normal(loc, scale), obs=y)


@pytest.mark.parametrize("model", [looks_at_a_latent, reads_a_latent])
def test_a_look_at_a_latent_is_an_error_that_quotes_the_line(model):
    prototype, values = draws_of(model, (torch.tensor(0.3),))
    batched = BatchedModel(ModelCall(model, (torch.tensor(0.3),)), prototype, list(values))
    with pytest.raises(CaptureError, match=r"after sample site 'loc', .*test_recording\.py, line \d+: .*loc"):
        batched.log_prob(values)


def test_writing_into_a_tensor_from_outside_is_an_error():
    outside = torch.zeros(2)
    with pytest.raises(CaptureError, match="writes into a tensor from outside"):
        recording.record(lambda x: outside.add_(x), [torch.ones(2)])
    assert outside.tolist() == [0.0, 0.0]


def test_what_depends_on_data_alone_is_no_operation_of_the_recording():
    data = torch.arange(6.0)

    def function(x):
        assert float(data.sum()) == 15.0
        return (data.exp().log().sum() * x).sum()

    graph = recording.record(function, [torch.ones(3)])
    operations = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert len(operations) <= 3
    torch.testing.assert_close(graph(torch.ones(3)), torch.tensor(45.0))


@pytest.mark.parametrize(
    "make",
    [torch.zeros_like, torch.clone, lambda data: data.new_zeros(4), lambda data: torch.full_like(data, 2.0)],
    ids=["zeros_like", "clone", "new_zeros", "full_like"],
)
def test_writes_into_a_tensor_made_like_data_are_taken_out(make):
    data = torch.arange(4.0)

    def function(x):
        found = make(data)
        found[1] = x
        found[2] = found[1] * 2
        return found

    points = torch.tensor([3.0, 5.0])
    together = recording.batch(recording.record(function, [points[0]]), [True])(2, points)
    torch.testing.assert_close(together, torch.stack([function(point) for point in points]))
    assert data.tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("transposed", [False, True])
def test_a_diagonal_written_through_a_view_is_that_of_each_point(transposed):
    matrix = torch.arange(9.0).reshape(3, 3)

    def function(x):
        def value(x):
            found = x * matrix
            if transposed:
                found = found.T.contiguous().T
            # The backward pass of a write into a view copies into strided memory.
            found.diagonal().add_(x)
            return (found @ matrix.T @ found).sum()

        point = x.detach().requires_grad_()
        with torch.enable_grad():
            total = value(point)
            return total.detach(), torch.autograd.grad(total, point)[0]

    points = torch.tensor([2.0, 3.0])
    together = recording.batch(recording.record(function, [points[0]]), [True])(2, points)
    for ours, theirs in zip(together, zip(*map(function, points), strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs))


def test_writes_in_place_are_none_in_the_recording():
    def function(x):
        found = torch.zeros(4)
        found[1:3] = x
        found[found > 1] = 0.0
        return found

    graph = recording.record(function, [torch.tensor([0.5, 2.0])])
    assert not [
        node for node in graph.graph.nodes if getattr(getattr(node.target, "_schema", None), "is_mutable", False)
    ]
    points = torch.tensor([[0.5, 2.0], [3.0, 0.25]])
    together = recording.batch(graph, [True])(2, points)
    torch.testing.assert_close(together, torch.tensor([[0.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.25, 0.0]]))


@pytest.mark.parametrize(
    "distribution",
    [
        dist.Normal(torch.zeros(3), 1.0),
        dist.Uniform(torch.zeros(3), 1.0),
        dist.Exponential(torch.ones(3)),
        dist.Cauchy(torch.zeros(3), 1.0),
        dist.Beta(torch.ones(3), 1.0),
        dist.MultivariateNormal(torch.zeros(3), torch.eye(3)),
        dist.Poisson(torch.full((3,), 50.0)),
        dist.Binomial(1000, torch.full((3,), 0.5)),
        dist.Bernoulli(torch.full((60,), 0.9)),
        dist.Categorical(torch.ones(20, 50)),
        dist.Dirichlet(torch.ones(3)),
        # These clamp their numbers in place.
        dist.Gamma(torch.full((3,), 2.0), 1.0),
        dist.InverseGamma(torch.full((3,), 3.0), 1.0),
        dist.StudentT(torch.full((3,), 4.0), 0.0, 1.0),
    ],
    ids=lambda distribution: type(distribution).__name__,
)
def test_random_numbers_are_other_ones_for_every_point(distribution):
    """And they have the distribution, as far as medians tell."""
    graph = recording.record(lambda x: distribution.sample() + 0 * x, [torch.ones(())])
    drawn = recording.batch(graph, [True])(500, torch.ones(500)).double()
    assert len({tuple(row.tolist()) for row in drawn[:20]}) == 20
    expected = distribution.sample((500,)).double()
    spread = expected.quantile(0.75, 0) - expected.quantile(0.25, 0)
    assert ((drawn.median(0).values - expected.median(0).values).abs() <= 0.4 * spread + 0.01).all()


def test_random_numbers_that_would_be_the_same_for_every_point_are_refused():
    with pytest.raises(CaptureError, match="gives the same to all draws"):
        recording.record(lambda x: torch.empty(3).log_normal_() + x, [torch.ones(3)])
