"""The benchmark for a lent GPU: whatever fails or has no time left, the rest is measured and written."""

import time

import pytest
import torch

from benchmarks import gpu

ENVIRONMENT = {
    "processor": "P",
    "cpu_count": 2,
    "torch_threads": 1,
    "dtype": "float32",
    "python": "3",
    "versions": {"torch": "2"},
    "device": "none",
    "float32_matmul_precision": "highest",
}


def test_a_row_that_fails_is_written_with_its_error():
    rows, left_out, written = [], [], []
    part = gpu.Part(time.perf_counter() + 100, left_out, lambda: written.append(len(rows)))

    def fail():
        raise RuntimeError("CUDA out of\nmemory")

    assert not part.is_over({"dim": 1})
    part.add(rows, {"dim": 1}, fail)
    part.add(rows, {"dim": 2}, lambda: {"ms": 3.0})
    assert rows == [{"dim": 1, "error": "RuntimeError: CUDA out of memory"}, {"dim": 2, "ms": 3.0}]
    assert written == [1, 2] and not left_out


def test_rows_without_time_are_listed():
    left_out = []
    part = gpu.Part(time.perf_counter() - 1, left_out, lambda: None)
    assert part.is_over({"dim": 1}) and left_out == [{"dim": 1}]


def test_the_tables():
    steps = [
        {"model": "m", "particles": 16, "device": "cuda", "side": "CUDA graph", "ms": 0.125},
        {"model": "m", "particles": 16, "device": "cpu", "side": "replay", "error": "RuntimeError: no"},
    ]
    fits = [
        {"posterior": "p", "device": "cpu", "error": "ValueError: no"},
        {"posterior": "q", "device": "cpu", "seconds": 1.0, "steps": 5, "verdict": "good"}
        | {"khat": float("nan"), "elbo": -1.0, "elbo_se": 0.1},
    ]
    memory = [{"dim": 4, "particles": 8, "chunk_size": None, "device": "cpu", "predicted_megabytes": 1.5}]
    tests = [
        {"tests": "a.py", "ended": True, "summary": "1 failed, 2 passed", "failed": ["a.py::b"]},
        {"tests": "b.py", "ended": False, "summary": "..", "failed": []},
    ]
    results = {
        "environment": ENVIRONMENT,
        "quick": False,
        "left_out": [{}],
        "tests": tests,
        "steps": steps,
        "fits": fits,
    }
    page = gpu.report(results | {"memory": memory})
    assert "| a.py | 1 failed, 2 passed; failed: a.py::b |" in page and "| b.py | did not end in time |" in page
    assert "| m | 16 | 0.125 | failed |" in page
    assert "| p | cpu | ValueError: no |" in page and "| q | cpu | 1.0 | 5 | -1.000 ± 0.100 |  | good |" in page
    assert "| 4 | 8 | all | 1.5 |  |  |" in page
    assert "nothing of a GPU" in page and "1 rows had no time left" in page


def test_counts_of_the_cox_process_are_those_of_its_grid():
    case = gpu.cox_case(5, torch.device("cpu"))
    assert case.args[0].shape == case.args[1].shape == (5, 5)
    assert torch.equal(case.args[0], gpu.cox_case(5, torch.device("cpu")).args[0])


@pytest.mark.slow
def test_a_step_is_timed_and_its_memory_predicted():
    device = torch.device("cpu")
    row = gpu.milliseconds(gpu.cox_case(3, device), 16, "replay", device, 0.05)
    assert row["ms"] > 0 and row["seconds_until_ready"] > 0
    row = gpu.step_memory(3, None, device, 32)
    assert row["predicted_megabytes"] == pytest.approx(row["eager_megabytes"], rel=0.05)
    # A captured step holds its state and the next one as well, and fewer activations.
    assert row["replayed_megabytes"] > 0
