"""Draws brought to the host in blocks: every number at its place, and no buffer written to before it was read."""

import numpy as np
import pytest
import torch

from pyro_flowguides.diagnostics import host


class _Late:
    """A stream whose copies happen when they are waited for, as late as those of a GPU may."""

    def __init__(self):
        self.num_buffers, self.num_open, self.most_open = 0, 0, 0

    def buffer(self, size, dtype):
        self.num_buffers += 1
        return torch.empty(size, dtype=dtype)

    def begin(self, target, source):
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)

        def wait():
            self.num_open -= 1
            target.copy_(source)

        return wait


@pytest.mark.parametrize(
    ("shape", "num_buffers"),
    [((), 1), ((4,), 1), ((5,), 2), ((8,), 2), ((9,), 2), ((7, 3), 2), ((0, 3), 0), ((3, 0), 0)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_blocks_of_four_numbers(shape, num_buffers, dtype):
    value = torch.arange(torch.Size(shape).numel(), dtype=dtype, device="cpu").reshape(shape)
    stream = _Late()
    found = host.fetched(value, stream, block_bytes=32)
    assert found.shape == value.shape and found.dtype == dtype and torch.equal(found, value)
    assert stream.num_buffers == stream.most_open == num_buffers and stream.num_open == 0


def test_rows_that_are_not_in_order():
    value = torch.randn(5, 4, device="cpu").mT
    assert torch.equal(host.fetched(value, _Late(), block_bytes=16), value)


def test_a_tensor_with_a_graph():
    value = torch.ones(3, requires_grad=True) * 2
    assert np.array_equal(host.to_numpy(value), [2.0, 2.0, 2.0])
