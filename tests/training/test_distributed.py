"""Several processes of torchrun train as one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import distributed_cases
import pytest
import torch
from distributed_cases import Y, model, small_flow

import pyro_flowguides as fg
from pyro_flowguides.training.checkpoint import Checkpoint

SCRIPT = Path(distributed_cases.__file__)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def torchrun(script, *arguments, fails=False, limit=600):
    """The output of a script in two processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*TORCHRUN, str(script), *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=limit
    )
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    directory = tmp_path_factory.mktemp("distributed")
    torchrun(SCRIPT, directory)
    return directory


@pytest.fixture(scope="module")
def found(directory):
    return torch.load(directory / "found.pt", weights_only=False)


def assert_same(case, keys):
    """That a case has the same values in both processes."""
    first, second = case
    for key in keys:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["replay", "eager"])
def test_two_processes_with_half_of_the_noise_each_are_one_with_all_of_it(found, backend):
    for case in found["noise_handed_in"]:
        torch.testing.assert_close(case[f"two, {backend}"], case[f"one, {backend}"], rtol=1e-11, atol=1e-11)


def test_parameters_stay_the_same_bit_for_bit(found):
    """After a thousand steps, with some that one process alone would have skipped, and an explosion in one of them."""
    assert_same(found["a_thousand_steps"], ["parameters", "losses", "skipped", "rolled back"])
    first, second = found["a_thousand_steps"]
    assert first["skipped"] == 3 and first["losses"].isnan().sum() == 3
    assert first["rolled back"] == 1
    assert first["captures"] == 1
    assert not torch.equal(first["noise"], second["noise"])


def test_steps_in_chunks_are_those_of_all_particles(found):
    assert_same(found["in_chunks"], ["parameters", "losses"])
    for each in found["in_chunks"]:
        torch.testing.assert_close(each["losses"], each["losses of whole steps"], rtol=1e-8, atol=1e-8)


def test_a_round_is_taken_back_together(found):
    assert_same(found["a_round_taken_back"], ["parameters", "losses", "draws", "log_q"])
    assert len(found["a_round_taken_back"][0]["losses"]) == 250


def test_draws_are_those_of_both_processes(found):
    draws = found["a_round_taken_back"][0]["draws"]
    assert len(draws) == 10_000 == len(draws.unique())


def test_what_a_callback_of_one_process_ends_ends_in_all(found):
    assert_same(found["stopped_by_one"], ["parameters", "losses", "draws"])
    assert len(found["stopped_by_one"][0]["losses"]) == 71


def test_resuming_is_bit_for_bit(found):
    for case in found["resumed"]:
        assert_same((case["whole"], case["again"]), ["parameters", "losses", "draws", "log_q"])
    assert_same([case["whole"] for case in found["resumed"]], ["parameters", "losses"])


def test_resuming_with_another_number_of_processes_says_so(directory):
    options = {"num_steps": 200, "num_particles": 8, "progress": False, "search_modes": False}
    checkpoint = Checkpoint(directory / "whole", resume=True)
    with pytest.warns(UserWarning, match="written by 2 processes and is resumed by 1"):
        fit = fg.fit(model, small_flow(model), Y, seed=3, checkpoint=checkpoint, **options)
    assert len(fit.losses) == 200


def test_batches_are_divided(found):
    """An epoch has every row once; with data of their own the mean of the processes is unbiased."""
    first, second = found["batches_of_data"]
    for epoch in (slice(0, 2), slice(2, 4)):
        rows = torch.cat([*first["taken"][epoch], *second["taken"][epoch]])
        torch.testing.assert_close(rows.sort().values, Y.sort().values, rtol=0, atol=0)
    assert not torch.equal(torch.cat(first["taken"][:2]), torch.cat(first["taken"][2:]))
    torch.testing.assert_close(torch.cat(first["common"]), torch.cat(second["common"]), rtol=0, atol=0)
    assert len(first["common"]) == 4
    # Those of a DistributedSampler are taken as they are.
    torch.testing.assert_close(torch.cat(first["own"]), Y[::2], rtol=0, atol=0)
    for case in (first, second):
        torch.testing.assert_close(case["loss"], torch.zeros_like(case["loss"]), rtol=0, atol=1e-10)
        torch.testing.assert_close(case["gradient"], torch.zeros_like(case["gradient"]), rtol=0, atol=1e-10)


def test_uneven_batches_are_dropped_or_taken_together(found):
    first, second = found["uneven_batches"]
    assert first["left over"]["sizes"] == second["left over"]["sizes"] == [3] * 4
    assert first["shorter"]["sizes"] == [2] * 8
    assert second["shorter"]["sizes"] == [2, 1] * 4
    for case in first:
        assert_same((first[case], second[case]), ["parameters"])


def test_a_fit_of_divided_data_has_the_posterior_of_all_of_them(found):
    assert_same(found["a_fit_of_data"], ["parameters", "losses", "draws", "elbo"])
    draws = found["a_fit_of_data"][0]["draws"]
    precision = len(Y) + 1 / 25
    # The noise of minibatches leaves an error in the parameters.
    assert abs(draws.mean() - Y.sum() / precision) < 0.15 * precision**-0.5
    assert abs(draws.std() * precision**0.5 - 1) < 0.15


def test_the_gradient_to_latents_of_rows_is_that_of_all_rows(found):
    for case in found["rows_with_latents"]:
        assert len(case["one"]) == 1 + len(Y)
        torch.testing.assert_close(case["two"], case["one"], rtol=1e-12, atol=1e-12)


def test_a_density_is_fitted_by_both(found):
    assert_same(found["a_density"], ["parameters", "losses", "looks"])
    assert found["a_density"][0]["stopped"]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (
            "seeds",
            "ValueError: fit: process 1 and process 0 differ in seed: it is 1 in the one, 0 in the other",
        ),
        (
            "data",
            r"ValueError: fit: process 1 and process 0 differ in the data: it is .*float64 \[5\].*float64 \[4\]",
        ),
        (
            "parameters",
            "ValueError: CompiledSVI: processes . and . have different parameters: '.*' of shape .* in the one",
        ),
        ("rows with latents", "ValueError: fit: latent site 'z' is in plate 'row', whose rows each process has alone"),
        (
            "version",
            "ValueError: fit: process 1 and process 0 differ in version of pyro_flowguides: it is 1.1 in the one, 1.0 in",
        ),
        ("nothing finite", "NonfiniteError: 50 steps in a row had .* up to step 100; in process 0 .*; in process 1 "),
        ("batches", "ValueError: 1 batches are too few for 2 processes"),
    ],
)
def test_processes_that_do_not_fit_together(found, case, expected):
    for messages in found["errors"]:
        assert re.match(expected, messages[case]), messages[case]


def test_rows_of_one_process_that_count_for_all(found):
    for messages in found["errors"]:
        expected = (
            "ValueError: fit: observed site 'y' is in plate 'data' of size 4, and the processes have different data"
        )
        assert messages["rows"].startswith(expected)


def test_an_error_of_the_first_process_ends_the_others(found):
    first, second = (messages["checkpoint"] for messages in found["errors"])
    assert first.startswith("ValueError: fit: the directory of checkpoint")
    assert second.startswith(
        "RuntimeError: process 1 ends with the first one, whose error was ValueError: fit: the directory"
    )


def test_a_model_that_does_not_broadcast_is_recorded(found):
    assert_same(found["recorded"], ["parameters", "losses"])
    assert found["recorded"][0]["losses"].isfinite().all()


def test_restarts_are_joined_alike(found):
    assert_same(found["restarts_as_a_mixture"], ["parameters", "draws", "log_q", "elbo", "log-likelihood of y"])


def test_restarts_of_two_processes_are_those_of_one(found):
    for case in found["restarts_apart"]:
        assert case["two"]["restarts"].shape == (3, 10_000)
        assert_same((case["one"], case["two"]), case["one"])
    assert_same([case["two"] for case in found["restarts_apart"]], found["restarts_apart"][0]["two"])


def test_simulations_of_two_processes_are_those_of_one(found):
    first, second = found["calibrated"]
    for case in (first, second):
        torch.testing.assert_close(case["two"], case["one"], rtol=0, atol=0)
    failed = "RuntimeError: check_calibration: the simulation with seed 4 failed: ValueError: the second process"
    assert second["message"] == failed
    assert first["message"] == f"RuntimeError: process 0 ends with process 1, whose error was {failed}"


def test_two_processes_find_the_modes_of_one(found):
    first, second = found["modes_found"]
    assert first["climbed"] == second["climbed"] == [64] * len(first["climbed"])
    for case in (first, second):
        assert len(case["one"]["values"]) == 2
        for key, expected in case["one"].items():
            torch.testing.assert_close(case["two"][key], expected, rtol=1e-6, atol=1e-6)
    assert_same([case["two"] for case in found["modes_found"]], first["two"])


def test_the_first_draws_of_a_replay_buffer_are_others_in_each_process(found):
    first, second = found["first_fill"]
    assert_same((first, second), ["losses"])
    assert not torch.isclose(first["points"], second["points"]).all(-1)[first["points"].abs().sum(-1) > 0].any()


@pytest.mark.parametrize("backend", ["replay", "eager"])
def test_a_parameter_that_is_met_late_is_that_of_the_first_process(found, backend):
    assert_same(found["met_late"], [backend])
    late = found["met_late"][0][backend][3:]
    # Three steps of Adam from 1.
    assert ((late - 1).abs() < 0.031).all()


def test_resuming_with_a_sampler_of_its_own_is_bit_for_bit(found):
    """Each process has another sampler than the first one, which wrote the checkpoint; a new epoch has a new order."""
    for case in found["resumed_with_a_sampler"]:
        assert_same((case["whole"], case["again"]), ["parameters", "losses"])


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_and_the_checkpoint_is_whole(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        f"""
import os, sys, torch
sys.path.insert(0, {str(SCRIPT.parent)!r})
torch.set_default_dtype(torch.float64)
from distributed_cases import fit_of
import pyro_flowguides as fg
rank, resume = int(os.environ["RANK"]), len(sys.argv) > 1
def die(step, loss):
    if rank == 1 and step == 130 and not resume:
        os._exit(9)
checkpoint = fg.Checkpoint({str(tmp_path / "state")!r}, every=50, resume=resume)
fit = fit_of(num_steps=200, num_particles=8, seed=3, checkpoint=checkpoint, callbacks=[die])
print(f"process {{rank}} took {{len(fit.losses)}} steps")
"""
    )
    torchrun(script, fails=True, limit=200)
    content = Checkpoint(tmp_path / "state", resume=True).load()
    assert len(content["training"]["losses"]) == 100 and len(content["training"]["states"]) == 2
    output = torchrun(script, "resume")
    assert "process 0 took 200 steps" in output and "process 1 took 200 steps" in output


@pytest.mark.slow
def test_a_parameter_that_one_process_alone_meets_ends_all(tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(
        f"""
import sys, pyro, torch
sys.path.insert(0, {str(SCRIPT.parent)!r})
from distributed_cases import adam
from pyro_flowguides import CompiledSVI, processes
processes.MEETING_SECONDS = 2
rank = processes.find_processes().rank
def loss(model, guide, late):
    loc = pyro.param("loc", torch.zeros(3))
    return (loc + (pyro.param("late", torch.ones(3)) if late else 0)).square().sum()
svi = CompiledSVI(lambda _: None, lambda _: None, adam(), loss)
for step in range(20):
    svi.step(step >= 5 and rank == 1)
"""
    )
    output = torchrun(script, fails=True, limit=120)
    assert "process 1 has met new parameters ('late') in the middle of the training, and within 2 s not all" in output


@pytest.mark.slow
def test_twenty_thousand_rows_in_two_halves_have_the_exact_posterior(tmp_path):
    """Draws weighed on all rows, beside the mean and the covariance of a linear regression."""
    script = tmp_path / "regression.py"
    script.write_text(
        f"""
import os, pyro, torch
import pyro.distributions as dist
import pyro_flowguides as fg
from torch.utils.data import DataLoader, TensorDataset
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x = torch.randn(20_000, 3)
y = x @ torch.tensor([1.0, -1.0, 0.5]) + torch.randn(20_000)
def model(x, y):
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(3), 2.0).to_event(1))
    with pyro.plate("row", 20_000, subsample_size=len(y)):
        pyro.sample("y", dist.Normal((x * beta.unsqueeze(-2)).sum(-1), 1.0), obs=y)
loader = DataLoader(TensorDataset(x, y), batch_size=1000, shuffle=True)
# Whitened by all rows; a training that counted half of them would leave that.
guide = fg.AutoPlanar(model, num_layers=1)
guide.whiten(x, y)
options = dict(batches=loader, whiten=None, num_steps=300, num_particles=4, seed=1, progress=False)
fit = fg.fit(model, guide, x[:300], y[:300], **options)
if os.environ["RANK"] == "0":
    draws = fg.draw(model, fit.guide, x, y, num_samples=2000, seed=2)
    found = dict(mean=draws.mean()["beta"], sd=draws.sd()["beta"], ess=draws.ess.value, x=x, y=y)
    torch.save(found, {str(tmp_path / "found.pt")!r})
"""
    )
    torchrun(script)
    found = torch.load(tmp_path / "found.pt", weights_only=False)
    covariance = (found["x"].mT @ found["x"] + torch.eye(3) / 4).inverse()
    mean, sd = covariance @ (found["x"].mT @ found["y"]), covariance.diagonal().sqrt()
    assert found["ess"] > 300
    distance = (torch.as_tensor(found["mean"]) - mean) / sd * found["ess"] ** 0.5
    assert (distance.abs() < 4).all(), distance
    torch.testing.assert_close(torch.as_tensor(found["sd"]), sd, rtol=4 / (2 * found["ess"]) ** 0.5, atol=0)
