"""Guides that fix the flow: each hands its options to its recipe and to AutoFlow."""

import pytest
import torch
from models import correlated

import pyro_flowguides as fg
from pyro_flowguides import transforms as T

# The layers that each is made of, and options that change them.
NAMED = {
    fg.AutoContinuousFlow: (T.Continuous, {"num_layers": 2, "num_units": 5, "num_steps": 3, "kinetic": 0.1}),
    fg.AutoCoupling: (T.AffineCoupling, {"num_layers": 3, "hidden_dims": (5,)}),
    fg.AutoIAF: (T.AffineAutoregressive, {"num_layers": 2, "hidden_dims": (7,)}),
    fg.AutoPlanar: (T.Planar, {"num_layers": 5}),
    fg.AutoRadial: (T.Radial, {"num_layers": 5}),
    fg.AutoResidual: (T.Residual, {"num_layers": 3, "hidden_dims": (6,), "lipschitz": 0.5, "log_det": "exact"}),
    fg.AutoSpline: (T.SplineCoupling, {"num_layers": 3, "hidden_dims": (5,), "num_bins": 4, "tail_bound": 2.0}),
    fg.AutoSylvester: (T.Sylvester, {"num_layers": 3, "num_vectors": 2, "basis": "householder"}),
}
RECIPES = {
    fg.AutoContinuousFlow: fg.flows.continuous_planar,
    fg.AutoCoupling: fg.flows.coupling,
    fg.AutoIAF: fg.flows.iaf,
    fg.AutoPlanar: fg.flows.planar,
    fg.AutoRadial: fg.flows.radial,
    fg.AutoResidual: fg.flows.residual,
    fg.AutoSpline: fg.flows.spline_coupling,
    fg.AutoSylvester: fg.flows.sylvester,
}


def layers(flow, kind):
    return [module for module in flow.modules() if isinstance(module, kind)]


def shapes(flow):
    return [tuple(parameter.shape) for parameter in flow.parameters()]


@pytest.mark.parametrize("Guide", NAMED)
def test_options_reach_the_recipe(Guide):
    kind, options = NAMED[Guide]
    guide = Guide(correlated, **options).setup()
    flow = guide.flow.transforms[0]
    expected = RECIPES[Guide](3, **options)
    assert len(layers(flow, kind)) == options["num_layers"]
    assert shapes(flow) == shapes(expected)
    ours, theirs = layers(flow, kind)[0], layers(expected, kind)[0]
    assert ours.extra_repr().replace(", damped=True", "") == theirs.extra_repr()


@pytest.mark.parametrize("Guide", NAMED)
def test_defaults_are_those_of_the_recipe(Guide):
    flow = Guide(correlated).setup().flow.transforms[0]
    assert shapes(flow) == shapes(RECIPES[Guide](3))


@pytest.mark.parametrize("Guide", NAMED)
def test_options_of_autoflow(Guide):
    guide = Guide(
        correlated, affine="diagonal", base="student_t", gradient="path", init_scale=0.5, damped=False
    ).setup()
    assert isinstance(guide.flow.transforms[1], T.Affine)
    assert isinstance(guide.base, fg.bases.StudentT)
    assert guide.get_posterior().gradient == "path"
    torch.testing.assert_close(guide.fixed_map.scale, 0.5 * torch.eye(3, dtype=torch.float64))
    assert not any(coupling.damped for coupling in layers(guide.flow, T.Coupling))


@pytest.mark.parametrize(
    ("field", "kind", "options"),
    [("sylvester", T.SylvesterField, {"num_units": 2}), ("network", T.NetworkField, {"hidden_dims": (5,)})],
)
def test_fields_of_a_continuous_flow(field, kind, options):
    guide = fg.AutoContinuousFlow(correlated, field=field, **options).setup()
    assert isinstance(guide.flow.transforms[0].transforms[0].field, kind)
    assert guide.ode_error().log_det < 1e-6
    with pytest.raises(ValueError, match="no continuous flow in this PyroCompose"):
        fg.AutoPlanar(correlated).setup().ode_error()


def test_an_unknown_field_is_an_error():
    with pytest.raises(ValueError, match="field must be one of 'planar', 'sylvester', 'network', got 'radial'"):
        fg.AutoContinuousFlow(correlated, field="radial")
