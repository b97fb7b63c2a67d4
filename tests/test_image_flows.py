"""The recipes for images: multi-scale stacks that start as the identity, with one density for the whole vector."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from transform_cases import perturb

import pyro_flowguides as fg
from pyro_flowguides import flows
from pyro_flowguides import transforms as T

MIXTURE = T.univariate.MixtureOfLogistics(2)
SPLINE = T.univariate.RationalQuadraticSpline(4, 3.0)
CASES = {
    "glow": functools.partial(flows.glow_image, shape=(1, 4, 4)),
    "glow_one_level": functools.partial(flows.glow_image, shape=(2, 2, 4), num_levels=1),
    "glow_spline": functools.partial(flows.glow_image, shape=(1, 4, 4), univariate=SPLINE),
    "glow_mixture": functools.partial(flows.glow_image, shape=(1, 4, 4), univariate=MIXTURE),
    "realnvp": functools.partial(flows.realnvp_image, shape=(1, 4, 4)),
    "realnvp_odd_size": functools.partial(flows.realnvp_image, shape=(1, 3, 5), num_levels=1),
}
every_case = pytest.mark.parametrize("recipe", CASES.values(), ids=CASES)


def _dim(recipe):
    return int(torch.tensor(recipe.keywords["shape"]).prod())


@every_case
@pytest.mark.parametrize("context_dim", [0, 2])
def test_the_start_is_the_identity_with_gradients(recipe, context_dim):
    dim = _dim(recipe)
    flow = recipe(dim, num_steps=2, hidden_channels=4, context_dim=context_dim)
    assert flow.dim == dim and flow.context_dim == context_dim
    z, context = torch.randn(20, dim), torch.randn(20, context_dim) if context_dim else None
    x, log_det = flow.forward_and_log_det(z, context)
    torch.testing.assert_close(x, z, rtol=0, atol=2e-6)
    torch.testing.assert_close(log_det, torch.zeros(20), rtol=0, atol=1e-6 * dim**0.5)
    (x.square().sum() + x.sin().sum() + log_det.sum()).backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("recipe", [CASES["glow"], CASES["realnvp"]], ids=["glow", "realnvp"])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_damped_recipes_start_as_the_identity_and_can_be_undamped(recipe, context_dim):
    torch.manual_seed(0)
    damped = recipe(16, num_steps=2, hidden_channels=4, context_dim=context_dim, damped=True)
    torch.manual_seed(0)
    plain = recipe(16, num_steps=2, hidden_channels=4, context_dim=context_dim)
    couplings = [part for part in damped.modules() if isinstance(part, T.Coupling)]
    assert couplings and all(part.damped for part in couplings)
    z, context = 4 * torch.randn(20, 16), torch.randn(20, context_dim) if context_dim else None
    torch.testing.assert_close(damped.forward_and_log_det(z, context)[0], z, rtol=1e-6, atol=2e-6)
    stored = {name: value for name, value in damped.named_parameters() if ".conditioner." in name}
    torch.testing.assert_close(stored, {name: 8 * plain.get_parameter(name) for name in stored}, rtol=0, atol=0)
    T.undamp(damped)
    torch.testing.assert_close(damped.state_dict(), plain.state_dict(), rtol=0, atol=0)


@every_case
@pytest.mark.parametrize("context_dim", [0, 2])
def test_density_inverse_and_score_are_those_of_the_jacobian(recipe, context_dim):
    dim = _dim(recipe)
    flow = perturb(recipe(dim, num_steps=2, hidden_channels=3, context_dim=context_dim).double(), 0.5)
    z, score = torch.randn(2, dim, dtype=torch.float64), torch.randn(2, dim, dtype=torch.float64)
    if context_dim:
        flow = flow.condition(torch.randn(context_dim, dtype=torch.float64))
    x, log_det, moved = flow.forward_with_score(z, score)
    jacobian = torch.stack([torch.func.jacrev(flow)(row) for row in z]).detach()
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-9, atol=1e-9)
    gradient = torch.func.grad(lambda z: flow.forward_and_log_det(z)[1].sum())(z)
    expected = torch.linalg.solve(jacobian.mT, (score - gradient).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(moved, expected.detach(), rtol=1e-7, atol=1e-7)
    z_back, inverse_log_det = flow.inverse_and_log_det(x)
    torch.testing.assert_close(flow(z_back), x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-6, atol=1e-6)
    assert (jacobian.abs().amax(0) > 0).any(0).all() and (jacobian.abs().amax(0) > 0).any(1).all()


@pytest.mark.parametrize("recipe", [CASES["glow"], CASES["realnvp"]], ids=["glow", "realnvp"])
def test_later_levels_join_coordinates_that_coarser_levels_passed(recipe):
    """The coarsest level sees 16 / 2 coordinates; where they lie in the image is where the identity leaves them."""
    flow = perturb(recipe(16, num_steps=2, hidden_channels=3))
    order, coarse, fine = flow.transforms
    assert isinstance(coarse, T.Split) and coarse.transform.dim == 8 and fine.dim == 16
    z = torch.randn(5, 16)
    ordered = order(z)
    joined = coarse(ordered)
    assert torch.equal(joined[:, 8:], ordered[:, 8:]) and not (joined[:, :8] == ordered[:, :8]).all(0).any()
    # The second half of the channels of 2 × 2 blocks: the lower pixels.
    rows = torch.arange(16.0).reshape(4, 4)
    assert set(order(rows.flatten())[8:].tolist()) == set(rows[1::2].flatten().tolist())


def test_three_levels():
    flow = flows.glow_image(64, shape=(1, 8, 8), num_levels=3, num_steps=1, hidden_channels=4)
    assert [part.transform.dim for part in flow.transforms if isinstance(part, T.Split)] == [16, 32]
    z = torch.randn(3, 64)
    torch.testing.assert_close(flow(z), z, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("recipe", "dim", "options", "message"),
    [
        (flows.glow_image, 15, {"shape": (1, 4, 4)}, r"glow_image: the shape \(1, 4, 4\) has 16 numbers, but dim = 15"),
        (flows.glow_image, 36, {"shape": (1, 6, 6)}, "height and width must be multiples of 4 to be halved 2 times"),
        (
            flows.realnvp_image,
            15,
            {"shape": (1, 3, 5)},
            "must be multiples of 2 to be halved 1 times.*use fewer levels",
        ),
        (flows.glow_image, 16, {"shape": (4, 4)}, r"shape must be \(channels, height, width\), got \(4, 4\)"),
        (flows.glow_image, 16, {"shape": (1, 4, 4), "num_levels": 0}, "num_levels must be at least 1, got 0"),
        (flows.realnvp_image, 16, {"shape": (1, 4, 4), "num_steps": 0}, "num_steps must be at least 1, got 0"),
    ],
)
def test_shapes_that_do_not_fit(recipe, dim, options, message):
    with pytest.raises(ValueError, match=message):
        recipe(dim, **options)


def test_a_name_alone_is_an_error_that_says_what_to_pass():
    with pytest.raises(
        ValueError, match=r"needs the shape of the image: pass functools.partial\(flows.glow_image, shape"
    ):
        fg.AutoFlow(lambda: None, "glow_image")


def _cox_process(counts):
    field = pyro.sample("field", dist.Normal(torch.zeros(4, 4), 1.0).to_event(2))
    pyro.sample("counts", dist.Poisson(field.exp()).to_event(2), obs=counts)


COUNTS = torch.arange(16.0).reshape(4, 4) % 5


def test_a_field_on_a_grid_is_fitted():
    guide = fg.AutoFlow(_cox_process, functools.partial(CASES["glow"], num_steps=1, hidden_channels=4), gradient="path")
    fit = fg.fit(_cox_process, guide, COUNTS, num_steps=30, num_particles=32, seed=0, progress=False)
    # The fields are independent: the mean of each is the root of a scalar problem, here by quadrature.
    grid = torch.linspace(-6, 6, 4001)
    log_density = COUNTS.unsqueeze(-1) * grid - grid.exp() - grid.square() / 2
    weights = (log_density - log_density.amax(-1, keepdim=True)).exp()
    expected = (weights * grid).sum(-1) / weights.sum(-1)
    found = torch.as_tensor(fit.draws.values["field"]).mean(0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.15)


def test_plain_svi_trains_an_image_flow():
    """Damped, as couplings of vectors are, until it is whitened."""
    pyro.set_rng_seed(0)
    guide = fg.AutoFlow(_cox_process, functools.partial(CASES["realnvp"], num_steps=1, hidden_channels=4))
    assert "damped=True" in repr(guide.setup(COUNTS))
    svi = SVI(_cox_process, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO(num_particles=8, vectorize_particles=True))
    losses = [svi.step(COUNTS) for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10])


def _many_fields(counts):
    """One field for every row of counts."""
    with pyro.plate("image", len(counts)):
        field = pyro.sample("field", dist.Normal(counts.new_zeros(4, 4), 1.0).to_event(2))
        pyro.sample("counts", dist.Poisson(field.exp()).to_event(2), obs=counts)


def _encoder():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.Tanh())


@pytest.mark.parametrize("name", ["glow", "realnvp"])
def test_an_encoder_gives_every_datum_an_image_flow_of_its_own(name):
    counts = torch.poisson(torch.full((6, 4, 4), 2.0), generator=torch.Generator().manual_seed(0))
    flow = functools.partial(CASES[name], num_steps=1, hidden_channels=4)
    guide = fg.AmortizedFlow(_many_fields, _encoder(), flow).setup(counts)
    perturb(guide, 0.5)
    posterior = guide.get_posterior(counts)
    z, log_q = posterior.rsample_and_log_prob((3,))
    assert z.shape == (3, 6, 16)
    torch.testing.assert_close(posterior.log_prob(z), log_q, rtol=1e-4, atol=1e-4)
    # Row by row it is the flow of that row's context.
    alone = guide.get_posterior(counts[2:3]).log_prob(z[:, 2:3])
    torch.testing.assert_close(alone, log_q[:, 2:3], rtol=1e-4, atol=1e-4)
    assert (guide.get_posterior(counts[3:4]).log_prob(z[:, 2:3]) - alone).abs().min() > 1e-3
    svi = SVI(_many_fields, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step(counts) for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_an_amortised_image_flow_of_another_size_says_so():
    guide = fg.AmortizedFlow(_many_fields, _encoder(), functools.partial(flows.glow_image, shape=(1, 8, 8)))
    with pytest.raises(ValueError, match=r"the shape \(1, 8, 8\) has 64 numbers, but dim = 16"):
        guide.setup(COUNTS.expand(6, 4, 4))
