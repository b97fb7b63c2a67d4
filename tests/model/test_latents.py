"""The layout of the latents: the flat vector, the sites, and their plates."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from models import kitchen_sink
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_value
from torch.distributions import biject_to

from pyro_flowguides.model.latents import Latents
from pyro_flowguides.model.sites import latent_sites


def trace_of(model, *args):
    with torch.no_grad():
        return poutine.trace(model).get_trace(*args)


def subsampled():
    rows = pyro.plate("rows", 5, subsample_size=2, dim=-2)
    columns = pyro.plate("columns", 4, subsample_size=3, dim=-1)
    pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with rows:
        pyro.sample("row", dist.Dirichlet(torch.ones(3)))
        with columns:
            pyro.sample("cell", dist.LKJCholesky(3, torch.tensor(1.0)))


def groups(num_data, size=3):
    """A data plate at dimension −1 with an inner plate to its left, which is in the vector."""
    with pyro.plate("data", num_data, dim=-1):
        pyro.sample("a", dist.LogNormal(torch.zeros(()), 1.0))
        with pyro.plate("times", 2, dim=-2):
            pyro.sample("pair", dist.Normal(torch.zeros(size), 1.0).to_event(1))


def test_whole_is_the_concatenation_of_the_sites():
    """Every number of every site, in the order of the trace."""
    trace = trace_of(kitchen_sink)
    latents = Latents.whole(trace, "test")
    expected = {name: biject_to(site["fn"].support).inv(site["value"]) for name, site in latent_sites(trace)}
    assert [site.name for site in latents.sites] == list(expected)
    torch.testing.assert_close(
        latents.init_loc, torch.cat([expected[site.name].reshape(-1) for site in latents.sites]), rtol=0, atol=0
    )
    assert latents.dim == len(latents.init_loc)
    for site, value in latents.unpack(latents.init_loc):
        torch.testing.assert_close(value, expected[site.name], rtol=0, atol=0)
        torch.testing.assert_close(site.transform(value), trace.nodes[site.name]["value"])
    assert latents.nesting == 2
    assert not latents.subsampled_plates


@pytest.mark.parametrize("batch_shape", [(7, 1, 1), (7, 1, 1, 1), (5, 7, 1, 1)], ids=str)
def test_batches_are_unpacked_like_single_vectors(batch_shape):
    latents = Latents.whole(trace_of(kitchen_sink), "test")
    x = torch.randn(*batch_shape, latents.dim)
    rows = x.reshape(-1, latents.dim)
    together = list(latents.unpack(x))
    for index, row in enumerate(rows):
        for (_, value), (_, alone) in zip(together, latents.unpack(row), strict=True):
            batch = value.reshape(len(rows), *value.shape[len(batch_shape) - latents.nesting :])
            torch.testing.assert_close(batch[index].reshape(alone.shape), alone, rtol=0, atol=0)


def test_leading_leaves_out_the_dimensions_of_other_plates():
    latents = Latents.whole(trace_of(kitchen_sink), "test")
    x = torch.randn(7, 1, 1, latents.dim)
    for (site, kept), (_, value) in zip(latents.unpack(x), latents.unpack(x, leading=1), strict=True):
        assert site.transform(value).shape == (7, *site.shape)
        torch.testing.assert_close(value, kept.reshape(value.shape), rtol=0, atol=0)


def test_whole_covers_subsampled_plates():
    trace = trace_of(subsampled)
    latents = Latents.whole(trace, "test")
    shapes = {site.name: tuple(site.shape) for site in latents.sites}
    assert shapes == {"scale": (), "row": (5, 1, 3), "cell": (5, 4, 3, 3)}
    # A simplex of 3 has 2 free numbers, a Cholesky factor of 3 has 3.
    assert latents.dim == 1 + 5 * 2 + 5 * 4 * 3
    assert latents.subsampled_plates == {"rows": "cell", "columns": "cell"}
    # The values of the minibatch, repeated.
    values = {site.name: site.transform(value) for site, value in latents.unpack(latents.init_loc)}
    torch.testing.assert_close(values["row"][2:4], values["row"][:2])
    torch.testing.assert_close(values["row"], trace.nodes["row"]["value"])


def test_batch_dimensions_without_a_plate_are_part_of_the_vector():
    def model():
        with pyro.plate("rows", 3, dim=-2):
            pyro.sample("x", dist.Normal(torch.zeros(3, 2), 1.0))

    latents = Latents.whole(trace_of(model), "test")
    assert latents.dim == 6
    ((site, value),) = latents.unpack(torch.arange(6.0))
    torch.testing.assert_close(value, torch.arange(6.0).reshape(3, 2), rtol=0, atol=0)


@pytest.mark.parametrize("num_data", [1, 4])
def test_one_datum_holds_what_belongs_to_it(num_data):
    latents = Latents.of_one_datum(trace_of(groups, num_data), "test")
    assert latents.dim == 1 + 2 * 3
    assert latents.data_plates == {-1: "data"}
    assert (latents.data_nesting, latents.nesting) == (1, 2)
    x = torch.arange(float(num_data * 7)).reshape(1, num_data, 7)
    values = {site.name: value for site, value in latents.unpack(x, leading=0)}
    assert {name: tuple(value.shape) for name, value in values.items()} == {"a": (num_data,), "pair": (2, num_data, 3)}
    for n in range(num_data):
        assert values["a"][n] == x[0, n, 0]
        torch.testing.assert_close(values["pair"][:, n].reshape(-1), x[0, n, 1:], rtol=0, atol=0)


def test_the_start_is_averaged_over_the_data():
    trace = trace_of(groups, 4)
    latents = Latents.of_one_datum(trace, "test")
    expected = [trace.nodes["a"]["value"].log().mean().reshape(1), trace.nodes["pair"]["value"].mean(1).reshape(-1)]
    torch.testing.assert_close(latents.init_loc, torch.cat(expected))


def test_layouts_are_equal_whatever_the_number_of_data():
    four, five, other = (Latents.of_one_datum(trace_of(groups, *sizes), "test") for sizes in ((4,), (5,), (4, 2)))
    assert four == five != other
    assert other.describe() == "'a' of shape () in ['data'], 'pair' of shape (2, 2) in ['times', 'data']"


def test_plates_of_other_traces_of_the_same_model():
    latents = Latents.whole(trace_of(subsampled), "test")

    def smaller():
        rows = pyro.plate("rows", 5, subsample_size=1, dim=-2)
        columns = pyro.plate("columns", 4, dim=-1)
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with rows:
            pyro.sample("row", dist.Dirichlet(torch.ones(3)))
            with columns:
                pyro.sample("cell", dist.LKJCholesky(3, torch.tensor(1.0)))

    frames = latents.frames_in(trace_of(smaller), "test")
    assert {name: frame.size for name, frame in frames.items()} == {"rows": 1, "columns": 4}
    with pytest.raises(ValueError, match="test: latent site 'scale' was in the model at set-up"):
        latents.frames_in(trace_of(poutine.block(smaller, hide=["scale"])), "test")


def test_errors_name_site_and_plate():
    def two_devices():
        pyro.sample("here", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("there", dist.Normal(torch.zeros((), device="meta"), 1.0, validate_args=False))

    def far():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="guide: .* site 'here' is .* and site 'there' is .* on meta"):
        Latents.whole(trace_of(two_devices), "guide")
    with pytest.raises(ValueError, match="guide: init_loc_fn gives site 'x' a value that is not finite"):
        Latents.whole(trace_of(InitMessenger(init_to_value(values={"x": torch.tensor(math.inf)}))(far)), "guide")
    with pytest.raises(ValueError, match="guide: latent site 'x' is not in a plate"):
        Latents.of_one_datum(trace_of(far), "guide")
