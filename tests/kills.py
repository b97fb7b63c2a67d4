"""``kill -9`` at random moments of a fit that writes a checkpoint at every step, until it gets to its end.

``python tests/kills.py NUM_KILLS [SEED]`` prints a line of JSON: how many fits were killed how often, how many kills left a half
written file, and how many of the resumed fits are, bit for bit, the fit without interruption. It exits with status 1 unless all
of them are.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np
import torch

# Before the forks: the first optimiser of a process imports it, which takes seconds.
import torch._dynamo
from fits import Y, scale_only
from models import conjugate

import pyro_flowguides as fg
from pyro_flowguides.training import files

NUM_STEPS = 40


def loader():
    data = torch.utils.data.TensorDataset(torch.tensor(Y))
    return torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)


# Batches, an average, an optimiser outside of the graph, a whitened guide.
CASES = {
    "batches": {"batches": loader(), "num_steps": NUM_STEPS},
    "average": {"ema_decay": 0.9, "num_steps": NUM_STEPS},
    "momentum": {"optim": lambda ps: torch.optim.SGD(ps, lr=1e-3, momentum=0.9), "num_steps": NUM_STEPS},
    "whitened": {"num_steps": NUM_STEPS, "whiten": "batch_and_match"},
}


def train(case, path):
    """The numbers that a fit ends with, as one array."""
    args = () if case == "batches" else (torch.tensor(Y),)
    options = {"num_particles": 2, "seed": 0, "backend": "eager", "progress": False, "whiten": None}
    fit = fg.fit(
        conjugate,
        scale_only(conjugate),
        *args,
        checkpoint=fg.Checkpoint(path, every=1, resume=True),
        **{**options, **CASES[case]},
    )
    values = [value.reshape(-1).double().numpy() for value in fit.guide.state_dict().values()]
    return np.concatenate([fit.losses, *values, [fit.elbo.value, float(torch.rand(())), np.random.random()]])


def child(case, path, result):
    """A process of its own that trains, writes the result, and ends."""
    pid = os.fork()
    if pid == 0:
        # A slow disk, so that many kills come in the middle of a write.
        files.os.fsync = lambda handle: time.sleep(0.01)
        np.save(result, train(case, path))
        os._exit(0)
    return pid


def kill_until_done(case, folder, moments, longest):
    """One fit, killed until it is done; returns the numbers of kills and of half written files, and its result."""
    path, result = folder / "fit.pt", folder / "result.npy"
    kills = halves = 0
    while True:
        before = path.stat().st_mtime_ns if path.exists() else 0
        pid = child(case, path, result)
        # Some die before their first write.
        patience = moments.uniform(0.0, longest) if moments.random() < 0.2 else 60.0
        began = time.monotonic()
        while (path.stat().st_mtime_ns if path.exists() else 0) == before and time.monotonic() - began < patience:
            time.sleep(0.001)
            if result.exists():
                break
        time.sleep(moments.uniform(0.0, longest))
        if os.waitpid(pid, os.WNOHANG)[0] == pid:
            break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
        halves += (folder / ".fit.pt.part").exists()
    litter = [file.name for file in folder.iterdir() if file.name not in ("fit.pt", "result.npy")]
    assert not litter, litter
    return kills, halves, np.load(result)


def main(num_kills, seed=0):
    """Kills until there were enough of them, case by case."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    moments = random.Random(seed)
    found = {"fits": 0, "kills": 0, "half_written": 0, "bit_for_bit": 0}
    expected, seconds = {}, {}
    while found["kills"] < num_kills:
        case = list(CASES)[found["fits"] % len(CASES)]
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            if case not in expected:
                began = time.perf_counter()
                os.waitpid(child(case, folder / "whole.pt", folder / "whole.npy"), 0)
                seconds[case] = time.perf_counter() - began
                expected[case] = np.load(folder / "whole.npy")
                for file in folder.iterdir():
                    file.unlink()
            kills, halves, result = kill_until_done(case, folder, moments, 0.7 * seconds[case])
        found["fits"] += 1
        found["kills"] += kills
        found["half_written"] += halves
        found["bit_for_bit"] += bool(np.array_equal(result, expected[case]))
    print(json.dumps(found))
    return 0 if found["bit_for_bit"] == found["fits"] else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
