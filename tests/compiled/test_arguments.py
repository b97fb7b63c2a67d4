"""Kinds of arguments: what makes a new capture, and how its reason is said."""

import collections

import numpy as np
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


def test_another_default_dtype_is_named():
    before, default = key(X), torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        assert before.difference(key(X)) == "the default dtype is torch.float16"
    finally:
        torch.set_default_dtype(default)


def test_objects_are_the_same_by_themselves_alone():
    """Also where they say that they are equal; an array is the same where its values are."""
    one, other = collections.UserDict(), collections.UserDict()
    assert one == other
    assert key(one) == key(one) != key(other)
    assert key(one).difference(key(other)) == "an argument that is no tensor is another UserDict"
    assert key(np.zeros(2)) == key(np.zeros(2)) != key(np.ones(2))
    for first, second in ((1, 1.0), (1, True), (0.0, None), (np.zeros(2), np.zeros((1, 2)))):
        assert key(first) != key(second)


def test_tensors_are_replaced_however_deeply_they_are_nested():
    arguments = Arguments((X, [1, {"a": X + 1}]), {"b": (X + 2, "text")})
    assert [float(each[0]) for each in arguments.tensors] == [0, 1, 2]
    assert arguments.others == [1, "text"]
    args, kwargs = arguments.with_tensors(torch.tensor([[5.0], [6.0], [7.0]]))
    assert (args[0].item(), args[1][0], args[1][1]["a"].item()) == (5, 1, 6)
    assert (kwargs["b"][0].item(), kwargs["b"][1]) == (7, "text")


def test_the_same_kinds_are_one_key():
    assert key(X, 1, "a") == key(X + 1, 1, "a")
    assert hash(key(X, 1, "a")) == hash(key(X + 1, 1, "a"))
