"""The benchmark of the verdict, on kept draws whose errors are known."""

import numpy as np
import pytest

from benchmarks.verdict import is_right, judge_fit, report


def keep(path, shift, off=0.0):
    """Draws of N(−shift, 1) with the weights of N(0, 1), and a reference that is off by so much."""
    x = np.random.default_rng(0).normal(size=10_000) - shift
    values = np.stack([x + off, np.random.default_rng(1).normal(size=10_000)], -1)
    log_p, log_q = -0.5 * x**2, -0.5 * (x + shift) ** 2
    rest = {"lost_mass": np.nan, "num_reference": 10_000.0, "kurtosis": np.full(2, 3.0)}
    np.savez(path, values=values, names=np.array(["a", "b"]), log_p=log_p, log_q=log_q, **rest)


@pytest.mark.parametrize(
    ("shift", "off", "verdict", "right"),
    [
        (0.05, 0.0, "GOOD", True),
        (0.5, 0.0, "GOOD_ONCE_WEIGHTED", True),
        (0.05, -0.3, "GOOD", False),
        (5.0, 0.0, "DOUBTFUL", True),
    ],
)
def test_a_verdict_is_held_against_the_reference(tmp_path, shift, off, verdict, right):
    keep(tmp_path / "some.normal.0.npz", shift, off)
    record = judge_fit(tmp_path / "some.normal.0.npz")
    assert (record["posterior"], record["guide"], record["seed"], record["verdict"]) == ("some", "normal", 0, verdict)
    assert is_right(record) is right
    found = record["errors"]["raw mean"]
    # Four standard errors of the mean of 10,000 draws.
    assert found["actual"] == pytest.approx(abs(shift - off), abs=0.04)
    if shift < 1:
        assert found["expected"] == pytest.approx(shift, abs=0.05)
        assert found["seen"] == 1 and found["expected_within_2"] == int(right)
    assert "| all | 1 |" in report([record])


def test_a_fit_that_has_failed_is_left_out(tmp_path):
    np.savez(tmp_path / "some.normal.0.npz", error=np.array("ValueError: …"))
    assert judge_fit(tmp_path / "some.normal.0.npz") is None
