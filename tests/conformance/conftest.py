"""The conformance suite runs in the dtype of the run, as Pyro's own tests run in double precision."""

import pytest
import torch


@pytest.fixture(autouse=True)
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)
