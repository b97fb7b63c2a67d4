"""Trainings of two processes, run by ``torchrun``; the first process saves what the tests look at.

python -m torch.distributed.run --nproc-per-node=2 distributed_cases.py DIRECTORY
"""

import contextlib
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_value
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import pyro_flowguides as fg
from pyro_flowguides import CompiledSVI
from pyro_flowguides.processes import find_processes
from pyro_flowguides.training import loop
from pyro_flowguides.training.division import Division
from pyro_flowguides.training.schedules import Round

Y = torch.tensor([0.3, 0.1, 0.8, 1.2, -0.4, 0.9, 0.2, 0.5], dtype=torch.float64)


def model(y):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0))
    sd = pyro.sample("sd", dist.LogNormal(y.new_zeros(()), 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, sd), obs=y)


def mean_model(y):
    """Of a minibatch of Y."""
    mu = pyro.sample("mu", dist.Normal(Y.new_zeros(()), 5.0))
    with pyro.plate("data", len(Y), subsample_size=len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def at_one_point():
    return AutoDelta(mean_model, init_loc_fn=init_to_value(values={"mu": Y.new_tensor(0.7)}))


def flat(parameters):
    return torch.cat([parameter.detach().reshape(-1) for parameter in parameters])


def adam():
    return pyro.optim.Adam({"lr": 0.01})


def noise_handed_in(processes):
    """Two processes with half of the noise each, and one with all of it."""

    def loss(model, guide, noise):
        loc = pyro.param("loc", torch.zeros(3, dtype=torch.float64))
        scale = pyro.param("scale", torch.ones(3, dtype=torch.float64), constraint=dist.constraints.positive)
        x = loc + scale * noise
        return ((x - 1).pow(4) + x.sin()).sum(-1).mean() - scale.log().sum()

    noise = torch.randn(20, 256, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = {}
    for backend in ("replay", "eager"):
        for name, distributed, mine in [
            ("two", True, noise.chunk(processes.size, 1)[processes.rank]),
            ("one", False, noise),
        ]:
            pyro.clear_param_store()
            svi = CompiledSVI(
                lambda noise: None, lambda noise: None, adam(), loss, backend=backend, distributed=distributed
            )
            losses = [svi.step(each) for each in mine]
            found[f"{name}, {backend}"] = torch.cat([flat(svi.parameters.values()), torch.tensor(losses)])
    return found


def a_thousand_steps(processes):
    """With steps that are not finite, and an explosion, in the second process alone; begun from different parameters."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoNormal(model, init_scale=0.1 + processes.rank)
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)

    def loss(model, guide, y, disturbance):
        return elbo.differentiable_loss(model, guide, y, disturbance) * disturbance

    svi = CompiledSVI(lambda y, _: model(y), lambda y, _: guide(y), adam(), loss)
    one, losses = torch.ones((), dtype=torch.float64), []
    for step in range(1000):
        if processes.rank == 1 and 200 <= step < 203:
            disturbance = one * torch.nan
        elif processes.rank == 1 and 510 <= step < 525:
            disturbance = one * 1e6
        else:
            disturbance = one
        losses.append(svi.step(Y, disturbance))
    return {
        "parameters": flat(svi.parameters.values()),
        "losses": torch.tensor(losses),
        "noise": torch.randn(5),
        "skipped": svi.num_skipped,
        "rolled back": svi.num_rolled_back,
        "captures": len(svi.captures),
    }


def fit_of(**options):
    pyro.clear_param_store()
    return fg.fit(model, fg.AutoCoupling(model), Y, progress=False, search_modes=False, **options)


def result_of(fit):
    return {
        "parameters": flat(fit.guide.parameters()),
        "losses": torch.tensor(fit.losses),
        "draws": fit.draws.values["mu"],
        "log_q": fit.draws.log_q,
        "elbo": fit.elbo.value,
    }


def a_round_taken_back(processes):
    replaced = {
        "got_worse": lambda scores: len(scores) == 2,
        "is_worth_another": lambda scores: True,
        "doubling_rounds": lambda *_, **__: (Round(100, 8), Round(150, 8)),
    }
    with contextlib.ExitStack() as stack:
        for name, replacement in replaced.items():
            stack.enter_context(patch.object(loop, name, replacement))
        return result_of(fit_of(num_particles=8))


def stopped_by_one(processes):
    """A callback of the second process ends the training of both."""
    return result_of(
        fit_of(num_steps=300, num_particles=8, callbacks=[lambda step, _: processes.rank == 1 and step == 70])
    )


def resumed(processes, directory):
    """From a checkpoint after 120 of 200 steps, and without an interruption."""

    class Stop(Exception):
        pass

    def stop(step, loss):
        if step == 119:
            raise Stop

    options = {"num_steps": 200, "num_particles": 8, "seed": 3}
    whole = fit_of(**options, checkpoint=fg.Checkpoint(directory / "whole", every=40))
    with contextlib.suppress(Stop):
        fit_of(**options, checkpoint=fg.Checkpoint(directory / "cut", every=40), callbacks=[stop])
    again = fit_of(**options, checkpoint=fg.Checkpoint(directory / "cut", every=40, resume=True))
    return {"whole": result_of(whole), "again": result_of(again)}


def recorded(processes):
    """``X @ beta`` meets particles."""
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def regression(x, y):
        beta = pyro.sample("beta", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x @ beta, 1.0).to_event(1), obs=y)

    pyro.clear_param_store()
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
    svi = CompiledSVI(regression, AutoNormal(regression), adam(), elbo)
    losses = svi.run(30, x, Y)
    return {"parameters": flat(svi.parameters.values()), "losses": losses}


def restarts_as_a_mixture(processes):
    return result_of(fit_of(num_steps=60, num_particles=8, num_restarts=2, restarts="mixture", seed=0))


def resumed_with_a_sampler(processes, directory):
    """From a checkpoint after 30 of 50 steps, in an epoch that is not the first."""

    class Stop(Exception):
        pass

    def stop(step, loss):
        if step == 34:
            raise Stop

    def fit(path, resume=False, callbacks=()):
        pyro.clear_param_store()
        loader = DataLoader(TensorDataset(Y), batch_size=2, sampler=DistributedSampler(TensorDataset(Y)))
        checkpoint = fg.Checkpoint(directory / path, every=5, resume=resume)
        options = {"num_steps": 50, "seed": 0, "progress": False, "callbacks": callbacks, "checkpoint": checkpoint}
        return fg.fit(mean_model, AutoNormal(mean_model), Y, batches=loader, **options)

    whole = fit("sampled", callbacks=[lambda step, loss: False])
    with contextlib.suppress(Stop):
        fit("sampled and cut", callbacks=[stop])
    again = fit("sampled and cut", resume=True, callbacks=[lambda step, loss: False])
    return {
        name: {"parameters": flat(fit.guide.parameters()), "losses": torch.tensor(fit.losses)}
        for name, fit in {"whole": whole, "again": again}.items()
    }


def batches_of_data(processes):
    """What each process takes of a loader, and the loss over an epoch."""
    division = Division(processes, "data")
    pyro.set_rng_seed(10 + processes.rank)
    loader = DataLoader(TensorDataset(Y), batch_size=2, shuffle=True)
    taken = [batch for _ in range(2) for (batch,) in division.batches(loader)]
    sampler = DistributedSampler(TensorDataset(Y), shuffle=False)
    own = [batch for (batch,) in division.batches(DataLoader(TensorDataset(Y), batch_size=2, sampler=sampler))]
    common = [batch for (batch,) in Division(processes, "particles").batches(loader)]
    pyro.clear_param_store()
    svi = CompiledSVI(mean_model, at_one_point(), adam(), Trace_ELBO())
    svi.snapshot(Y[:2])
    means = [svi.loss_and_gradients(batch) for batch in taken[:2]]
    pyro.clear_param_store()
    alone = CompiledSVI(mean_model, at_one_point(), adam(), Trace_ELBO(), distributed=False)
    alone.snapshot(Y)
    whole = alone.loss_and_gradients(Y)
    return {
        "taken": taken,
        "own": own,
        "common": common,
        "loss": sum(loss for loss, _ in means) / 2 - whole[0],
        "gradient": sum(flat(gradients.values()) for _, gradients in means) / 2 - flat(whole[1].values()),
    }


def a_fit_of_data(processes):
    loader = DataLoader(TensorDataset(Y), batch_size=2, shuffle=True)
    pyro.clear_param_store()
    guide = fg.AutoCoupling(mean_model)
    return result_of(fg.fit(mean_model, guide, Y, batches=loader, num_steps=400, seed=0, progress=False))


def a_density(processes):
    x = torch.randn(600, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fit = fg.fit_density("coupling", x, num_steps=300, patience=1, progress=False)
    return {
        "parameters": flat(fit.density.parameters()),
        "losses": torch.tensor(fit.train_losses),
        "looks": torch.tensor(fit.validation_losses),
        "stopped": fit.stopped_early,
    }


def errors(processes):
    """The messages where the processes do not fit together."""
    found = {}
    for name, call in {
        "seeds": lambda: fit_of(seed=processes.rank, num_steps=10),
        "data": lambda: fg.fit(model, AutoNormal(model), Y[: 4 + processes.rank], num_steps=10, progress=False),
        "parameters": lambda: CompiledSVI(
            model, fg.AutoFlow(model, "planar" if processes.rank else "coupling"), adam(), Trace_ELBO()
        ).step(Y),
        "checkpoint": lambda: fit_of(num_steps=10, checkpoint=fg.Checkpoint("nowhere/at all/file")),
        "batches": lambda: fg.fit(mean_model, AutoNormal(mean_model), Y, batches=[Y], num_steps=10, progress=False),
    }.items():
        pyro.clear_param_store()
        try:
            call()
            found[name] = "none"
        except (ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def main(directory):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    processes = find_processes()
    found = {}
    for case in (
        noise_handed_in,
        a_thousand_steps,
        a_round_taken_back,
        stopped_by_one,
        batches_of_data,
        a_fit_of_data,
        a_density,
        recorded,
        restarts_as_a_mixture,
        errors,
    ):
        found[case.__name__] = processes.gather(case(processes))
    for case in (resumed, resumed_with_a_sampler):
        found[case.__name__] = processes.gather(case(processes, directory))
    if processes.is_first:
        torch.save(found, directory / "found.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
