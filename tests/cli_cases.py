"""What the tests of the command line share."""

FAST = ["--num-steps", "5", "--num-particles", "4", "--no-progress", "--no-report"]
MODEL = """
import pyro
import pyro.distributions as dist
import torch
from helper import SCALE

def model(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, SCALE))
    with pyro.plate("data", x.shape[0]):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

def no_latents(x):
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=x[0])

def shapes(x, y):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 7):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

number = 3
"""


def wrong(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    return str(path)
