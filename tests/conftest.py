"""Options and fixtures of the suite: ``pytest --device cuda --dtype float32`` runs it elsewhere."""

import contextlib
import datetime
import os
import zlib

os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pyro
import pytest
import torch

# The same few examples in every run: a failure is then one of the change at hand. ``--hypothesis-profile nightly`` explores,
# with random seeds or that of ``--hypothesis-seed``.
hypothesis.settings.register_profile("fixed", max_examples=10, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("nightly", max_examples=200, deadline=None, print_blob=True)
hypothesis.settings.load_profile("fixed")

# A script for another interpreter, which the search for doctests would run.
collect_ignore = ["diagnostics/other_generation.py"]


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="the device of every tensor in the tests")
    parser.addoption("--dtype", default="float64", choices=["float32", "float64"], help="the dtype of the maths tests")

    parser.addoption(
        "--slow-share",
        type=int,
        default=1,
        metavar="N",
        help="run one of N slow tests, another N-th every day (default: all)",
    )


def pytest_collection_modifyitems(config, items):
    share = config.getoption("--slow-share")
    today = datetime.date.today().toordinal()
    left_out = [
        item for item in items if item.get_closest_marker("slow") and (zlib.crc32(item.nodeid.encode()) + today) % share
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def dtype(request):
    return getattr(torch, request.config.getoption("--dtype"))


@pytest.fixture
def tolerance(dtype):
    """Tolerances are written for float64; in float32 they are those of its rounding."""
    return lambda value: value if dtype == torch.float64 else max(value, 2e-3)


@pytest.fixture(autouse=True)
def clean_state(device):
    """One thread, an empty parameter store and a fixed seed for every test, on the device of the run."""
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    # Not for the CPU: torch.jit.trace and the device context do not go together.
    with torch.device(device) if device.type != "cpu" else contextlib.nullcontext():
        yield
    pyro.clear_param_store()


@pytest.fixture(autouse=True)
def default_dtype(request, dtype):
    """The conformance suite runs in the dtype of the run, as Pyro's own tests run in double precision."""
    before = torch.get_default_dtype()
    if "conformance" in request.path.parts:
        torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)
