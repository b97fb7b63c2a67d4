"""Kinds of arguments: what makes a new capture, and how its reason is said."""

import pytest
import torch

from pyro_flowguides.compiled.arguments import Arguments

X = torch.zeros(3)


def key(*args, **kwargs):
    return Arguments(args, kwargs).key()


@pytest.mark.parametrize(
    ("now", "difference"),
    [
        (key(X, 1, "a", X), "the number or structure of its arguments is another"),
        (key(X, 1, b="a"), "the number or structure of its arguments is another"),
        (key(torch.zeros(4), 1, "a"), "a tensor argument has shape (4,) and dtype torch.float32"),
        (key(X.double(), 2, "a"), "a tensor argument has shape (3,) and dtype torch.float64"),
        (key(X, 2, "a"), "an argument that is no tensor is 2"),
        (key(X, 1, "b"), "an argument that is no tensor is 'b'"),
        (key(X, 1, object), "an argument that is no tensor is"),
    ],
)
def test_the_first_difference_is_named(now, difference):
    before = key(X, 1, "a")
    assert before != now
    assert before.difference(now).startswith(difference)


def test_the_same_kinds_are_one_key():
    assert key(X, 1, "a") == key(X + 1, 1, "a")
    assert hash(key(X, 1, "a")) == hash(key(X + 1, 1, "a"))
