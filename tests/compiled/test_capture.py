"""Captured steps against Pyro's own loss_and_grads: the loss, every gradient, and which parameters have one.

At the initial parameters and at moved ones: a parameter that is left behind as a constant shows in its gradient alone.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import infer, poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, autoguide, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample

import pyro_flowguides as fg
from pyro_flowguides import CompiledSVI
from pyro_flowguides.compiled import capture

# Of TraceMeanField_ELBO for the hidden sites of some guides, and of TraceEnum_ELBO where there is nothing to enumerate.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*mean-field:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*mean field:UserWarning"),
    pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites:UserWarning"),
]

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}


@pytest.fixture(autouse=True)
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


def pyro_loss_and_gradients(elbo, model, guide, *args, **kwargs):
    """What Pyro's own SVI sees: the loss, and the gradient of each parameter that has one, by the parameter's identity."""
    with poutine.trace(param_only=True) as capture:
        loss = elbo.loss_and_grads(model, guide, *args, **kwargs)
    values = [site["value"] for site in capture.trace.nodes.values()]
    # Parameters that a module keeps to itself are not in the store, and bare.
    leaves = [value.unconstrained() if hasattr(value, "unconstrained") else value for value in values]
    leaves = {id(leaf): leaf for leaf in leaves}
    gradients = {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    for leaf in leaves.values():
        leaf.grad = None
    return loss, gradients


def move(leaves, seed=7):
    generator = torch.Generator(leaves[0].device).manual_seed(seed)
    with torch.no_grad():
        for leaf in leaves:
            noise = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype, device=leaf.device)
            leaf.add_(0.5 * noise)


def check(model, guide, elbo=None, *args, reference=None, backend="replay", scale=1, **kwargs):
    """Compares loss and gradients of the captured step with those of an ELBO of Pyro, at two places."""
    elbo = Trace_ELBO() if elbo is None else elbo
    dtype = torch.get_default_dtype()
    svi = CompiledSVI(model, guide, pyro.optim.Adam({"lr": 0.1}), elbo, backend=backend)
    svi.loss_and_gradients(*args, **kwargs)  # The first is Pyro's own, the second is captured, the others are replays.
    for place in ("initial", "moved"):
        if place == "moved":
            move(list(svi.parameters.values()))
        svi.loss_and_gradients(*args, **kwargs)
        assert svi.backend == backend and len(svi.captures) == 1
        pyro.set_rng_seed(3)
        loss, gradients = svi.loss_and_gradients(*args, **kwargs)
        pyro.set_rng_seed(3)
        expected_loss, expected = pyro_loss_and_gradients(reference or elbo, model, guide, *args, **kwargs)
        parameters = svi.parameters
        assert {id(leaf) for leaf in parameters.values()} == set(expected), place
        tolerance = TOLERANCE[dtype] * scale
        assert abs(float(loss) - expected_loss) <= tolerance * (1 + abs(expected_loss)), place
        flat = torch.cat([gradients[name].flatten() for name in parameters])
        expected_flat = torch.cat([expected[id(leaf)].flatten() for leaf in parameters.values()])
        assert bool(expected_flat.isfinite().all())
        assert bool(expected_flat.abs().max() > 0)
        error = float((flat - expected_flat).abs().max() / expected_flat.abs().max())
        assert error <= tolerance, f"{place}: relative error {error}"
        # New noise with every step, where there is noise.
        again, _ = svi.loss_and_gradients(*args, **kwargs)
        pyro.set_rng_seed(3)
        first, _ = svi.loss_and_gradients(*args, **kwargs)
        assert float(first) == float(loss)
    return svi, float(again) != float(first)


# --- guides -----------------------------------------------------------------------------------------------------------


def regression(x, y):
    """Two latent sites, one of them positive, one a vector."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(x.new_tensor(0.0), 0.5))
    mean = (x * weight).sum(-1)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, sigma), obs=y)


def regression_data():
    generator = torch.Generator(torch.zeros(()).device).manual_seed(1)
    return torch.randn(6, 2, generator=generator), torch.randn(6, generator=generator)


def hand_written(x, y):
    loc = pyro.param("loc", torch.zeros(2))
    scale = pyro.param("scale", torch.full((2,), 0.3), constraint=constraints.positive)
    probability = pyro.param("share", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
    pyro.sample("weight", dist.Normal(loc, scale * probability).to_event(1))
    pyro.sample(
        "sigma",
        dist.LogNormal(
            pyro.param("sigma_loc", torch.tensor(0.2), constraint=constraints.interval(-1.0, 2.0)),
            pyro.param("sigma_scale", torch.tensor(0.3), constraint=constraints.softplus_positive),
        ),
    )


def guide_list(first, second):
    def make(model):
        guide = autoguide.AutoGuideList(model)
        guide.append(first(poutine.block(model, expose=["weight"])))
        guide.append(second(poutine.block(model, expose=["sigma"])))
        return guide

    return make


def structured(model):
    return autoguide.AutoStructured(
        model,
        conditionals={"weight": "mvn", "sigma": "normal"},
        dependencies={"sigma": {"weight": "linear"}},
    )


GUIDES = {
    "AutoFlow": lambda model: fg.AutoFlow(model, lambda dim: fg.flows.nice(dim, num_layers=2, hidden_dims=[4])),
    "AutoCoupling": lambda model: fg.AutoCoupling(model, num_layers=2, hidden_dims=[4]),
    "AutoMixture": lambda model: fg.AutoMixture(
        model, lambda dim: fg.flows.coupling(dim, num_layers=1, hidden_dims=[4]), num_components=2, gradient="path"
    ),
    "AutoIAF": lambda model: fg.AutoIAF(model, num_layers=2, hidden_dims=[4]),
    "AutoPlanar": lambda model: fg.AutoPlanar(model, num_layers=2),
    "AutoRadial": lambda model: fg.AutoRadial(model, num_layers=2),
    "AutoSylvester": lambda model: fg.AutoSylvester(model, num_layers=2, num_vectors=2),
    "AutoSpline": lambda model: fg.AutoSpline(model, num_layers=2, hidden_dims=[4], num_bins=4),
    "AutoContinuousFlow": lambda model: fg.AutoContinuousFlow(
        model, num_units=4, num_steps=2, kinetic=0.1, jacobian=0.1
    ),
    "AutoContinuousFlow of a network": lambda model: fg.AutoContinuousFlow(
        model, field="network", hidden_dims=[4], num_steps=1, gradient="path"
    ),
    "AutoResidual": lambda model: fg.AutoResidual(model, num_layers=1, hidden_dims=[4]),
    "student_t": lambda model: fg.AutoPlanar(model, num_layers=1, base="student_t"),
    "path": lambda model: fg.AutoCoupling(model, num_layers=2, hidden_dims=[4], gradient="path"),
    "AutoNormal": AutoNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
    "AutoIAFNormal": lambda model: autoguide.AutoIAFNormal(model, hidden_dim=[4], num_transforms=2),
    "AutoDelta": AutoDelta,
    "AutoLaplace": autoguide.AutoLaplaceApproximation,
    "list of normal and delta": guide_list(AutoNormal, AutoDelta),
    "list of flow and normal": guide_list(lambda m: fg.AutoPlanar(m, num_layers=1), AutoNormal),
    "AutoStructured": structured,
    "AutoGaussian": autoguide.AutoGaussian,
    "AutoHierarchicalNormal": lambda model: autoguide.AutoHierarchicalNormalMessenger(model),
    "hand-written": lambda model: hand_written,
}
IN_MODULES = [name for name in GUIDES if name not in ("hand-written", "AutoHierarchicalNormal")]


@pytest.mark.parametrize("name", GUIDES)
def test_guides(name):
    _, random = check(regression, GUIDES[name](regression), None, *regression_data())
    assert random == (name not in ("AutoDelta", "AutoLaplace"))


# One of each way to hold parameters without further ado, and the others for whoever has time.
QUICK_IN_MODULES = ("AutoCoupling", "AutoNormal", "AutoMultivariateNormal", "AutoStructured", "list of flow and normal")


@pytest.mark.parametrize(
    "name", [name if name in QUICK_IN_MODULES else pytest.param(name, marks=pytest.mark.slow) for name in IN_MODULES]
)
def test_guides_with_local_parameters(name):
    with pyro.settings.context(module_local_params=True):
        check(regression, GUIDES[name](regression), None, *regression_data())
        assert not list(pyro.get_param_store().keys())


@pytest.mark.parametrize("name", ["AutoCoupling", "AutoSpline", "AutoSylvester", "AutoNormal"])
def test_guides_in_single_precision(name):
    torch.set_default_dtype(torch.float32)
    check(regression, GUIDES[name](regression), None, *regression_data())


# --- ELBOs ------------------------------------------------------------------------------------------------------------


def looped(kind, **options):
    return kind(num_particles=3, **options)


def vectorized(kind, nesting=1, **options):
    return kind(num_particles=3, vectorize_particles=True, max_plate_nesting=nesting, **options)


ELBOS = {
    "Trace": Trace_ELBO(),
    "Trace, looped": looped(Trace_ELBO),
    "Trace, vectorised": vectorized(Trace_ELBO),
    "mean field": infer.TraceMeanField_ELBO(),
    "mean field, vectorised": vectorized(infer.TraceMeanField_ELBO),
    "graph": infer.TraceGraph_ELBO(),
    "graph, vectorised": vectorized(infer.TraceGraph_ELBO),
    "enum": infer.TraceEnum_ELBO(max_plate_nesting=1),
    "enum, vectorised": vectorized(infer.TraceEnum_ELBO),
    "Renyi": looped(infer.RenyiELBO, alpha=0.5),
    "Renyi, vectorised": vectorized(infer.RenyiELBO, alpha=0.5),
    "Renyi, alpha 2": vectorized(infer.RenyiELBO, alpha=2.0),
}


@pytest.mark.parametrize("name", ELBOS)
@pytest.mark.parametrize("Guide", ["AutoMultivariateNormal", pytest.param("AutoPlanar", marks=pytest.mark.slow)])
def test_elbos(name, Guide):
    check(regression, GUIDES[Guide](regression), ELBOS[name], *regression_data())


@pytest.mark.parametrize(
    ("compiled", "plain"),
    [
        (infer.JitTrace_ELBO, Trace_ELBO),
        (infer.JitTraceMeanField_ELBO, infer.TraceMeanField_ELBO),
        (infer.JitTraceGraph_ELBO, infer.TraceGraph_ELBO),
        (infer.JitTraceEnum_ELBO, infer.TraceEnum_ELBO),
    ],
)
def test_jit_variants(compiled, plain):
    options = {"max_plate_nesting": 1}
    check(regression, AutoNormal(regression), compiled(**options), *regression_data(), reference=plain(**options))


def test_a_function_as_the_loss():
    def loss(model, guide, *args):
        return 2 * Trace_ELBO().differentiable_loss(model, guide, *args)

    class Doubled(Trace_ELBO):
        def loss_and_grads(self, *args):
            value = loss(*args)
            value.backward()
            return float(value.detach())

    check(regression, AutoNormal(regression), loss, *regression_data(), reference=Doubled())


def switch(y):
    with pyro.plate("data", len(y)):
        which = pyro.sample("which", dist.Bernoulli(0.4))
        pyro.sample("y", dist.Normal(2.0 * which, 1.0), obs=y)


def switch_guide(y):
    logit = pyro.param("logit", torch.zeros(len(y)))
    with pyro.plate("data", len(y)):
        pyro.sample("which", dist.Bernoulli(logits=logit))


@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(),
        vectorized(Trace_ELBO),
        infer.TraceGraph_ELBO(),
        vectorized(infer.TraceGraph_ELBO),
        infer.TraceEnum_ELBO(max_plate_nesting=1),
    ],
    ids=lambda elbo: f"{type(elbo).__name__}-{elbo.num_particles}",
)
def test_score_function_gradients(elbo):
    check(switch, switch_guide, elbo, torch.tensor([0.1, 1.7, 2.2]))


def test_enumeration_in_the_guide():
    guide = config_enumerate(switch_guide)
    check(switch, guide, infer.TraceEnum_ELBO(max_plate_nesting=1), torch.tensor([0.1, 1.7, 2.2]))


def mixture(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)):
        which = pyro.sample("which", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(locs[which], 1.0), obs=y)


def test_enumeration_in_the_model():
    guide = AutoNormal(poutine.block(mixture, hide=["which"]))
    check(mixture, guide, infer.TraceEnum_ELBO(max_plate_nesting=1), torch.tensor([-1.0, 0.3, 4.0]))


@pytest.mark.slow
def test_enumeration_in_the_model_with_vectorised_particles():
    def vectorised(y):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y)):
            which = pyro.sample("which", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(loc + 3.0 * which, 1.0), obs=y)

    guide = AutoNormal(poutine.block(vectorised, hide=["which"]))
    check(vectorised, guide, vectorized(infer.TraceEnum_ELBO), torch.tensor([-1.0, 0.3, 4.0]))


def hidden_markov(y):
    stay = pyro.sample("stay", dist.Beta(2.0, 1.0))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    state = 0
    for step in pyro.markov(range(len(y))):
        probability = torch.where(torch.as_tensor(state) == 0, stay, 1 - stay)
        state = pyro.sample(f"state_{step}", dist.Bernoulli(1 - probability), infer={"enumerate": "parallel"}).long()
        pyro.sample(f"y_{step}", dist.Normal(loc[state], 1.0), obs=y[step])


@pytest.mark.slow
def test_a_hidden_markov_model():
    guide = AutoNormal(poutine.block(hidden_markov, expose=["stay", "loc"]))
    check(hidden_markov, guide, infer.TraceEnum_ELBO(max_plate_nesting=0), torch.tensor([-1.0, 0.3, 4.0, 3.0]))


# --- models -----------------------------------------------------------------------------------------------------------


def nested_plates(y):
    mu = pyro.sample("mu", dist.StudentT(4.0, 0.0, 1.0))
    with pyro.plate("columns", 3, dim=-1):
        column = pyro.sample("column", dist.Normal(mu, 1.0))
        with pyro.plate("rows", 2, dim=-2):
            pyro.sample("y", dist.Normal(column, 0.5), obs=y)


def subsampled(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 6, subsample_size=2) as index:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[index])


def subsampled_local(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 6, subsample_size=2) as index:
        local = pyro.sample("local", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(local, 1.0), obs=y[index])


def subsampled_local_guide(y):
    loc = pyro.param("loc", torch.zeros(()))
    locs = pyro.param("locs", lambda: torch.zeros(6))
    pyro.sample("mu", dist.Normal(loc, 0.3))
    with pyro.plate("data", 6, subsample_size=2) as index:
        pyro.sample("local", dist.Normal(locs[index], 0.3))


def subsample_given(y, index):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 6, subsample=index) as chosen:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[chosen])


def pyro_subsample(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 6, subsample_size=3):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=pyro.subsample(y, event_dim=0))


def scaled_and_masked(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)), poutine.scale(scale=0.3), poutine.mask(mask=y > 0):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def partly_observed(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y, obs_mask=torch.tensor([True, False, True, True, False, True]))


def dirichlet_categorical(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Categorical(weights), obs=(y > 0).long())


def correlations(y):
    scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(3)).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    with pyro.plate("data", 2):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=scale.diag() @ factor), obs=y.reshape(2, 3))


def counts(y):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    share = pyro.sample("share", dist.Beta(2.0, 3.0))
    total = pyro.deterministic("total", rate * share)
    pyro.factor("prior", -total)
    with pyro.plate("data", len(y)):
        pyro.sample("count", dist.Poisson(total), obs=y.abs().round())
        pyro.sample("sign", dist.Bernoulli(share), obs=(y > 0).to(y.dtype))


def gamma_beta_guide(y):
    pyro.sample(
        "rate",
        dist.Gamma(
            pyro.param("concentration", torch.tensor(2.0), constraint=constraints.positive),
            pyro.param("rate_of_rate", torch.tensor(1.5), constraint=constraints.positive),
        ),
    )
    both = pyro.param("both", torch.tensor([2.0, 3.0]), constraint=constraints.positive)
    pyro.sample("share", dist.Beta(both[0], both[1]))


def dirichlet_guide(y):
    pyro.sample("weights", dist.Dirichlet(pyro.param("concentration", torch.ones(3), constraint=constraints.positive)))


def angles_and_counts(y):
    loc = pyro.sample("loc", dist.VonMises(0.0, 2.0))
    logit = pyro.sample("logit", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("angle", dist.VonMises(loc, 3.0), obs=y)
        pyro.sample("count", dist.NegativeBinomial(3.0, logits=logit), obs=y.abs().round())


def ordered(y):
    cuts = pyro.sample(
        "cuts",
        dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), dist.transforms.OrderedTransform()),
    )
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.OrderedLogistic(slope * y, cuts), obs=(y > 0).long())


class Bayesian(PyroModule):
    """PyroSample, PyroParam and nn.Parameter in one module."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[torch.nn.Linear](1, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))
        self.sigma = PyroParam(torch.tensor(0.7), constraint=constraints.positive)
        self.shift = torch.nn.Parameter(torch.tensor(0.1))

    def forward(self, y):
        mean = self.linear(y.unsqueeze(-1)).squeeze(-1) + self.shift
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, self.sigma), obs=y)


def autoencoder(network=None):
    torch.manual_seed(5)
    encoder = network or torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    decoder = torch.nn.Linear(1, 3)

    def model(y):
        pyro.module("decoder", decoder)
        y = y.reshape(2, 3)
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(decoder(z), 1.0).to_event(1), obs=y)

    def guide(y):
        pyro.module("encoder", encoder)
        y = y.reshape(2, 3)
        with pyro.plate("data", 2):
            loc, scale = encoder(y).split(1, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    return model, guide


def with_batch_norm():
    network = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    )
    return autoencoder(network.to(torch.get_default_dtype()))


def with_lstm():
    torch.manual_seed(5)
    lstm = torch.nn.LSTM(1, 2, batch_first=True)

    def model(y):
        pyro.module("lstm", lstm)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        hidden, _ = lstm(y.reshape(1, -1, 1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu + hidden.sum(-1).squeeze(0), 1.0), obs=y)

    return model, AutoNormal(model)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        # Not the derivative, so that one which is taken from the forward pass would show.
        return gradient * (3 * x**2 + 1)


def with_custom_function():
    leaf = torch.nn.Parameter(torch.tensor(0.4))

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        shift = Cube.apply(pyro.param("shift", leaf)) + Cube.apply(mu)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(shift, 1.0), obs=y)

    return model, AutoNormal(model)


def with_a_buffer():
    calls = torch.zeros(())

    def model(y):
        calls.add_(1)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("count", 0.0 * calls * mu)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    return model, AutoNormal(model)


def with_closure_data():
    data = torch.tensor([0.2, 0.5, 1.0])

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(mu, data.exp()), obs=data)

    return model, AutoNormal(model)


def chain(y):
    state = pyro.sample("start", dist.Normal(0.0, 1.0))
    for step in pyro.markov(range(3)):
        state = pyro.sample(f"state_{step}", dist.Normal(0.9 * state, 1.0))
        pyro.sample(f"y_{step}", dist.Normal(state, 1.0), obs=y[step])


def reparameterised():
    model = poutine.reparam(nested_plates, config={"column": LocScaleReparam(None)})
    return model, AutoNormal(model)


def model_parameters(y):
    sigma = pyro.param("sigma", torch.tensor(0.5), constraint=constraints.positive)
    weights = pyro.param("weights", torch.ones(3) / 3, constraint=constraints.simplex)
    factor = pyro.param("factor", torch.eye(2), constraint=constraints.lower_cholesky)
    mu = pyro.sample("mu", dist.MultivariateNormal(torch.zeros(2), scale_tril=factor))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu.sum() * weights[0] + weights[2], sigma), obs=y)


def auto(model):
    return lambda: (model, AutoNormal(model))


MODELS = {
    "nested plates": lambda: (nested_plates, AutoNormal(nested_plates)),
    "subsampled": auto(subsampled),
    "subsampled, local": lambda: (subsampled_local, subsampled_local_guide),
    "pyro.subsample": auto(pyro_subsample),
    "scale and mask": auto(scaled_and_masked),
    "obs_mask": auto(partly_observed),
    "Dirichlet and Categorical": auto(dirichlet_categorical),
    "Dirichlet guide": lambda: (dirichlet_categorical, dirichlet_guide),
    "LKJ and HalfCauchy": auto(correlations),
    "counts": auto(counts),
    "Gamma and Beta guide": lambda: (counts, gamma_beta_guide),
    "VonMises and NegativeBinomial": auto(angles_and_counts),
    "ordered": auto(ordered),
    "PyroModule": lambda: (lambda module: (module, AutoNormal(module)))(Bayesian()),
    "autoencoder": autoencoder,
    "BatchNorm": with_batch_norm,
    "LSTM": with_lstm,
    "autograd.Function": with_custom_function,
    "buffer": with_a_buffer,
    "closure data": with_closure_data,
    "markov": auto(chain),
    "LocScaleReparam": reparameterised,
    "parameters of the model": auto(model_parameters),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    y = torch.tensor([0.3, -0.2, 1.1, 0.6, -1.4, 2.3])
    model, guide = MODELS[name]()
    args = (y.reshape(2, 3),) if name in ("nested plates", "LocScaleReparam") else (y,)
    _, random = check(model, guide, None, *args)
    assert random


def test_a_subsample_as_an_argument():
    y = torch.tensor([0.3, -0.2, 1.1, 0.6, -1.4, 2.3])
    svi, _ = check(subsample_given, AutoNormal(subsample_given), None, y, torch.tensor([0, 3]))
    pyro.set_rng_seed(0)
    first, _ = svi.loss_and_gradients(y, torch.tensor([1, 5]))
    pyro.set_rng_seed(0)
    expected = Trace_ELBO().loss(subsample_given, svi.guide, y, torch.tensor([1, 5]))
    assert float(first) == pytest.approx(expected, rel=1e-5)
    assert len(svi.captures) == 1


def test_subsamples_are_new_at_every_step():
    y = torch.arange(6.0)
    svi = CompiledSVI(subsampled, AutoDelta(subsampled), pyro.optim.Adam({"lr": 0.0}), Trace_ELBO(), backend="replay")
    losses = svi.run(20, y)
    assert len(set(losses.tolist())) > 5


def test_what_a_run_writes_is_put_back_but_for_what_it_made():
    outside, made = torch.zeros(2), []
    norm, x = torch.nn.BatchNorm1d(2), torch.randn(5, 2)
    before = {name: value.clone() for name, value in norm.state_dict().items()}

    def run():
        made.append(torch.zeros(2))
        made[0].add_(1)
        outside.add_(1)
        norm(x)

    with capture.without_side_effects(run):
        assert not torch.equal(norm.running_mean, before["running_mean"])
        outside.add_(1)
    assert torch.equal(outside, torch.zeros(2))
    assert torch.equal(made[0], torch.ones(2))
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]), name
