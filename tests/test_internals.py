"""Each name of torch and Pyro that they do not promise to keep, called once: a version that lacks one fails here, by name.

And the package uses such names in ``internals`` alone.
"""

import ast
import resource
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import conjugate
from pyro import poutine
from pyro.distributions.util import is_identically_zero
from pyro.infer import MCMC, NUTS, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule

import pyro_flowguides
from pyro_flowguides import internals

aten = torch.ops.aten


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_a_tensor_within_vmap_is_one_of_torch_func():
    seen = []
    torch.func.vmap(lambda row: seen.append(internals.is_functorch_tensor(row)) or row)(torch.zeros(2, 3))
    assert seen == [True]
    assert not internals.is_functorch_tensor(torch.zeros(3))


def test_what_runs_within_torch_func_is_noticed():
    seen = []
    torch.func.vmap(lambda row: seen.append(internals.is_in_functorch()) or row)(torch.zeros(2, 3))
    torch.func.vjp(lambda x: seen.append(internals.is_in_functorch()) or x, torch.zeros(2))
    assert seen == [True, True]
    assert not internals.is_in_functorch()


def test_versions_count_writes():
    tensor = torch.zeros(3)
    before = internals.version(tensor)
    tensor[1:].add_(1)
    assert internals.version(tensor) == before + 1


def test_storages_are_those_of_views():
    tensor = torch.zeros(3)
    assert internals.storage_id(tensor) == internals.storage_id(tensor[1:])
    assert internals.storage_id(tensor) != internals.storage_id(tensor.clone())
    sparse = torch.zeros(3).to_sparse()
    assert internals.storage_id(sparse) == internals.storage_id(sparse)


def test_memory_is_watched_and_not_kept():
    tensor = torch.zeros(3)
    view = tensor[1:]
    is_gone = internals.watch_storage(tensor.untyped_storage())
    del tensor
    assert not is_gone()
    del view
    assert is_gone()


def test_a_tensor_marked_as_a_parameter_is_one():
    tensor = torch.zeros(3)
    assert not isinstance(tensor, torch.nn.Parameter)
    internals.mark_as_parameter(tensor)
    assert isinstance(tensor, torch.nn.Parameter)


def test_a_distribution_that_is_masked_as_a_whole():
    assert internals.is_hidden(dist.Normal(0.0, 1.0).mask(False))
    assert not internals.is_hidden(dist.Normal(0.0, 1.0).mask(torch.tensor(False)))


def test_nested_arguments_are_flattened_and_put_together():
    tree = ((1, [2.0, None]), {"name": "x", "other": (3,)})
    leaves, structure = internals.flatten(tree)
    assert leaves == [1, 2.0, None, "x", 3]
    assert internals.unflatten(leaves, structure) == tree
    assert internals.flatten(((1, [2.0]), {}))[1] != structure


# --- operators and graphs ---------------------------------------------------------------------------------------------


def test_what_operators_say_about_themselves():
    assert internals.is_operator(aten.add.Tensor)
    assert not internals.is_operator(torch.add)
    assert internals.is_mutable(aten.add_.Tensor)
    assert not internals.is_mutable(aten.add.Tensor)
    assert internals.returns_view(aten.view.default)
    assert not internals.returns_view(aten.add.Tensor)
    assert internals.written_arguments(aten.add_.Tensor, ("self", "other"), {"alpha": 2}) == ["self"]
    assert internals.written_arguments(aten.add.out, ("self", "other"), {"out": "out"}) == ["out"]
    assert internals.written_arguments(aten.add.Tensor, ("self", "other"), {}) == []


def test_a_mode_below_autograd_sees_operators():
    class Seen(internals.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.operators = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.operators.append(function)
            return function(*args, **(kwargs or {}))

    with Seen() as seen:
        torch.zeros(3).exp()
    assert seen.operators == [aten.zeros.default, aten.exp.default]


def test_functions_are_recorded_below_autograd():
    seen = []

    def function(x):
        seen.append(internals.is_recording())
        return (x @ x).double()

    graph = internals.record(function, [torch.ones(2, 2)])
    assert seen == [True]
    assert not internals.is_recording()
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [
        *(aten.mm.default, internals.TO_COPY),
    ]
    assert graph(torch.ones(2, 2)).dtype == torch.float64
    graph = internals.record(lambda x: x @ x[0], [torch.ones(2, 2, 2)])
    assert internals.UNSAFE_VIEW in [node.target for node in graph.graph.nodes]


def test_a_recording_notes_all_shapes_by_one_mode():
    graph = internals.record(lambda x: x.sin().cos().tan(), [torch.ones(2)])
    shapes = [node.meta["val"] for node in graph.graph.nodes if node.op == "call_function"]
    assert [value.shape for value in shapes] == [(2,)] * 3
    assert len({id(value.fake_mode) for value in shapes}) == 1


def test_recordings_are_written_without_writes_in_place_and_in_other_operations():
    def function(x):
        found = torch.zeros_like(x)
        found.add_(x.sin())
        return found

    graph = internals.record_functional(function, [torch.ones(3)], {aten.sin.default: torch.cos})
    operators = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert not any(map(internals.is_mutable, operators))
    assert aten.cos.default in operators
    assert aten.sin.default not in operators


def test_draws_of_a_gamma_and_a_dirichlet_distribution_are_these_operations():
    with pyro.validation_enabled(False):
        graph = internals.record(lambda x: (dist.Gamma(x, 1.0).sample(), dist.Dirichlet(x).sample()), [torch.ones(3)])
    operators = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    assert {internals.STANDARD_GAMMA, internals.SAMPLE_DIRICHLET} <= operators


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of the process as Linux tells it")
def test_a_jit_function_is_the_function_and_leaves_nothing_behind():
    def memory():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 2**20

    function = internals.jit_function(lambda x: [x.sin(), x.sum()], [torch.ones(3)])
    x = torch.randn(3)
    torch.testing.assert_close(list(function(x)), [x.sin(), x.sum()])
    before = memory()
    for _ in range(20):
        # 8 MB each.
        constant = torch.ones(2**21)
        function = internals.jit_function(lambda x, constant=constant: [x * constant.clone()], [torch.ones(())])
        function(torch.ones(()))
    del function, constant
    assert memory() - before < 80


def test_what_runs_without_recording_is_a_constant():
    def function(x):
        with internals.not_recording():
            constant = torch.ones(3).exp()
        return x + constant

    graph = internals.record(function, [torch.zeros(3)])
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [aten.add.Tensor]


def test_vmap_refuses_to_run_row_by_row():
    x = torch.zeros(2, 3)
    batched = torch.func.vmap(lambda row: torch.ops.aten.copy.default(row, row))
    with internals.no_batching_row_by_row(), pytest.raises(RuntimeError, match="copy"):
        batched(x)
    with warnings.catch_warnings():
        # Of the loss of speed, once in a process.
        warnings.simplefilter("ignore")
        assert torch.equal(batched(x), x)


@pytest.mark.slow
def test_graphs_are_compiled():
    if not internals.has_standalone_compile():
        pytest.skip("this torch has no standalone_compile: steps are replayed")
    graph = internals.record(lambda x: (x.exp(),), [torch.ones(3)])
    with torch.no_grad():
        (value,) = internals.standalone_compile(graph, [torch.ones(3)], {"fallback_random": True})(torch.zeros(3))
    assert value.tolist() == [1.0] * 3


def test_whether_there_is_triton():
    assert internals.has_triton() in (True, False)
    if not torch.cuda.is_available():
        assert not internals.has_triton()


# --- Pyro's parameter store -------------------------------------------------------------------------------------------


def test_the_store_hands_out_leaves_and_takes_others_for_a_while():
    value = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
    leaf = internals.stored_leaf("scale")
    assert leaf is value.unconstrained()
    assert internals.stored_leaf("other") is None
    with internals.replaced_in_store({id(leaf): torch.tensor(0.0)}):
        assert pyro.param("scale").item() == 1.0
    assert pyro.param("scale").item() == pytest.approx(2.0)
    assert internals.stored_leaf("scale") is leaf


def test_the_store_with_other_contents_for_a_while():
    pyro.param("outer", torch.tensor(1.0))
    params, constraints = {}, {}
    for _ in range(2):
        with internals.parameter_store(params, constraints):
            assert "outer" not in pyro.get_param_store()
            inner = pyro.param("inner", torch.tensor(2.0), constraint=dist.constraints.positive)
            found, found_constraints = internals.stored_parameters()
            assert list(found) == list(found_constraints) == ["inner"]
            assert found["inner"] is inner.unconstrained()
        assert list(pyro.get_param_store()) == ["outer"]
        assert list(params) == list(constraints) == ["inner"]
    with internals.parameter_store(params, constraints):
        # Which puts new dictionaries in the place of these.
        pyro.clear_param_store()
        pyro.param("new", torch.tensor(3.0))
    assert list(params) == list(constraints) == ["new"]
    assert list(pyro.get_param_store()) == ["outer"]


# --- Pyro's modules ---------------------------------------------------------------------------------------------------


def test_a_module_enters_a_context_around_each_call():
    entered = []

    class Inside:
        def __enter__(self):
            entered.append("in")

        def __exit__(self, *error):
            entered.append("out")

    class Outer(PyroModule):
        def __init__(self):
            super().__init__("outer")
            self.part = PyroModule[torch.nn.Linear](1, 1)

        def forward(self, x):
            entered.append("call")
            return self.part(x)

    module = Outer()
    assert internals.module_name(module) == "outer"
    assert internals.inside_of_module_context(module) is None

    context = Inside()
    internals.set_module_context(module, context)
    assert internals.inside_of_module_context(module) is context
    assert internals.inside_of_module_context(module.part) is context
    module(torch.zeros(1))
    # The parts are called within.
    assert entered == ["in", "call", "out"]
    internals.set_module_context(module, None)
    assert internals.inside_of_module_context(module) is None
    module(torch.zeros(1))
    assert entered[3:] == ["call"]


def test_copies_of_guides_have_their_models():
    y = torch.tensor([0.3, 1.4])
    guide = AutoNormal(conjugate)
    guide(y)
    copied = internals.copy_with_models(guide, {})
    for each in (guide, copied):
        assert each.model is not None
        each(y)
    assert copied is not guide


# --- what Pyro checks on the way --------------------------------------------------------------------------------------


def test_samples_are_not_checked():
    normal = torch.distributions.Normal(0.0, 1.0, validate_args=True)
    with internals.without_checks_of_samples():
        assert normal.log_prob(torch.tensor(torch.nan)).isnan()
    with pytest.raises(ValueError, match="Expected value argument"):
        normal.log_prob(torch.tensor(torch.nan))


def test_elbos_look_at_no_value():
    y = torch.tensor([0.3, 1.4])
    guide = AutoNormal(conjugate)
    guide(y)

    def loss(*values):
        # Trace_ELBO warns of NaN, and makes a float of each log-probability.
        return Trace_ELBO().differentiable_loss(conjugate, guide, y)

    with pyro.validation_enabled(False), internals.without_checks_of_samples():
        with internals.without_checks_of_elbos(), internals.branches_for_tracing():
            graph = internals.record(loss, [])
        assert len(graph.graph.nodes) > 10
        with pytest.raises(RuntimeError, match="_local_scalar_dense"):
            internals.record(loss, [])


def test_pyro_and_nobody_else_takes_the_branches_for_tracing():
    zero = torch.tensor(0)
    # It looks at the value, except while it is traced.
    assert is_identically_zero(zero)
    with internals.branches_for_tracing():
        assert not is_identically_zero(zero)
        assert not torch.jit.is_tracing()
        assert not torch._C._get_tracing_state()
    assert is_identically_zero(zero)


# --- Pyro's ELBOs and MCMC --------------------------------------------------------------------------------------------


def test_the_traces_of_an_elbo():
    y = torch.tensor([0.3, 1.4])
    guide = AutoNormal(conjugate)
    traces = list(internals.elbo_traces(Trace_ELBO(num_particles=3), conjugate, guide, (y,), {}))
    assert len(traces) == 3
    for model_trace, guide_trace in traces:
        assert "log_prob" in model_trace.nodes["y"]
        assert "score_parts" in guide_trace.nodes["mu"]


def test_the_surrogate_of_the_graph_elbo():
    y = torch.tensor([0.3, 1.4])
    guide = AutoNormal(conjugate)
    guide(y)
    pyro.set_rng_seed(0)
    elbo, surrogate = internals.loss_and_surrogate(TraceGraph_ELBO(), conjugate, guide, (y,), {})
    pyro.set_rng_seed(0)
    assert -elbo.item() == pytest.approx(TraceGraph_ELBO().loss(conjugate, guide, y))
    assert surrogate.requires_grad


def test_the_arguments_of_a_run_of_mcmc():
    def model(y, scale=1.0):
        pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), scale), obs=y)

    mcmc = MCMC(NUTS(model), num_samples=2, warmup_steps=2, disable_progbar=True)
    assert not internals.has_run(mcmc)
    mcmc.run(torch.tensor(1.0), scale=2.0)
    assert internals.has_run(mcmc)
    args, kwargs = internals.mcmc_arguments(mcmc)
    assert args == (torch.tensor(1.0),)
    assert kwargs == {"scale": 2.0}


# --- all of them, and nowhere else -------------------------------------------------------------------------------


def test_what_an_enumerated_trace_says_of_its_dimensions():
    def model():
        first = pyro.sample("first", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("second", dist.Bernoulli(0.2 + 0.5 * first), infer={"enumerate": "parallel"})

    nodes = poutine.trace(poutine.enum(model, first_available_dim=-1)).get_trace().nodes
    numbers = [internals.enumeration_id(nodes[name]) for name in ("first", "second")]
    assert len(set(numbers)) == 2
    assert internals.enumeration_ids(nodes["second"]) == {-1: numbers[0], -2: numbers[1]}


def test_the_store_of_the_processes():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        internals.store_of_processes().set("here", "yes")
        assert internals.store_of_processes().get("here") == b"yes"
    finally:
        torch.distributed.destroy_process_group()


def test_each_is_tested_here():
    """The functions, classes and constants of ``internals``."""
    source = Path(__file__).read_text()
    tree = ast.parse(Path(internals.__file__).read_text())
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    names |= {node.targets[0].id for node in tree.body if isinstance(node, ast.Assign)}
    assert [name for name in sorted(names) if not is_private(name) and f"internals.{name}" not in source] == []


PACKAGE = Path(pyro_flowguides.__file__).parent
ALLOWED = {
    # The registries of nn.Module, which every library of modules reads, and no public method writes to.
    *("_parameters", "_buffers"),
    # Documented methods of named tuples, private by their name alone.
    *("_fields", "_replace", "_asdict"),
    # Python's own, for warnings that point at the user's line.
    "_getframe",
}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def names_of_our_own(tree):
    """Functions, classes, attributes and variables that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            # What is set on an object other than self is somebody else's.
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "new"):
                yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def private_names(tree, own):
    """The line and the name of each private import, and of each private attribute of something that is not ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            for name in (*node.module.split("."), *(alias.name for alias in node.names)):
                if is_private(name):
                    yield node.lineno, f"from {node.module} import {name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if any(map(is_private, alias.name.split("."))):
                    yield node.lineno, f"import {alias.name}"
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            receiver = ast.unparse(node.value)
            # What a class overrides, or calls on itself, is its contract with its base class.
            if receiver not in ("self", "cls", "super()") and node.attr not in own | ALLOWED:
                yield node.lineno, f"{receiver}.{node.attr}"


def test_private_names_are_in_internals_alone():
    trees = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    own = {name for tree in trees.values() for name in names_of_our_own(tree)}
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path, tree in trees.items()
        if path.name != "internals.py"
        for line, name in private_names(tree, own)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from torch.utils import _pytree", "from torch.utils import _pytree"),
        ("import torch._inductor.config", "import torch._inductor.config"),
        ("store._params = {}", "store._params"),
        ("tensor._version", "tensor._version"),
        ("self._anything; super()._setup(); torch.__version__; module._parameters", None),
    ],
)
def test_a_private_name_is_found(source, name):
    tree = ast.parse(source)
    assert [found for _, found in private_names(tree, set(names_of_our_own(tree)))] == ([name] if name else [])
