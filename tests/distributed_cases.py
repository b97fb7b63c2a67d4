"""Trainings of two processes, run by ``torchrun``; the first process saves what the tests look at.

python -m torch.distributed.run --nproc-per-node=2 distributed_cases.py DIRECTORY
"""

import contextlib
import functools
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_value
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import pyro_flowguides as fg
from pyro_flowguides import CompiledSVI
from pyro_flowguides.diagnostics.mode_finder import search_after_fit
from pyro_flowguides.diagnostics.sampling import draw_traced
from pyro_flowguides.diagnostics.tracer import Tracer
from pyro_flowguides.model import mode_search
from pyro_flowguides.model.call import ModelCall
from pyro_flowguides.processes import alone, find_processes
from pyro_flowguides.training import division, loop
from pyro_flowguides.training.division import Division, check_own_rows
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


def small_flow(model):
    return fg.AutoPlanar(model, num_layers=1)


def fit_of(**options):
    pyro.clear_param_store()
    return fg.fit(model, small_flow(model), Y, progress=False, search_modes=False, **options)


def result_of(fit):
    return {
        "parameters": flat(fit.guide.parameters()),
        "losses": torch.tensor(fit.losses),
        "draws": fit.draws.values["mu"],
        "log_q": fit.draws.log_q,
        "elbo": fit.elbo.value,
        **{f"log-likelihood of {name}": value for name, value in fit.draws.log_likelihood.items()},
    }


def in_chunks(processes):
    """A step in pieces of 32 particles, beside one of all 64."""
    whole, pieces = (fit_of(num_steps=20, num_particles=64, seed=0, chunk_size=size) for size in (None, 32))
    return {
        "parameters": flat(pieces.guide.parameters()),
        "losses": torch.tensor(pieces.losses),
        "losses of whole steps": torch.tensor(whole.losses),
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
    return result_of(fit_of(num_steps=20, num_particles=8, num_restarts=2, restarts="mixture", seed=0))


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
    divided = Division(processes, "data")
    pyro.set_rng_seed(10 + processes.rank)
    loader = DataLoader(TensorDataset(Y), batch_size=2, shuffle=True)
    taken = [batch for _ in range(2) for (batch,) in divided.batches(loader)]
    sampler = DistributedSampler(TensorDataset(Y), shuffle=False)
    own = [batch for (batch,) in divided.batches(DataLoader(TensorDataset(Y), batch_size=2, sampler=sampler))]
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
    return result_of(
        fg.fit(mean_model, AutoNormal(mean_model), Y, batches=loader, num_steps=400, seed=0, progress=False)
    )


def uneven_batches(processes):
    """Of 3, 3 and 1 rows: the last one has no partner. Of 2, 2, 2 and 1: the partners of a step are of different sizes."""
    found = {}
    for name, batch_size in (("left over", 3), ("shorter", 2)):
        pyro.clear_param_store()
        svi = CompiledSVI(mean_model, AutoNormal(mean_model), adam(), Trace_ELBO())
        loader = DataLoader(TensorDataset(Y[:7]), batch_size=batch_size)
        batches = Division(processes, "data").batches(loader)
        taken = [batch for _ in range(4) for (batch,) in batches]
        for batch in taken:
            svi.compile_step((batch,), {})()
        found[name] = {"parameters": flat(svi.parameters.values()), "sizes": [len(batch) for batch in taken]}
    return found


def rows_with_latents(processes):
    """The guide has parameters for all rows, of which each process has a half: the gradients, beside those of one with all."""

    def row_model(rows, y):
        with pyro.plate("row", len(Y), subsample=rows):
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def plate_of(rows, y):
        return pyro.plate("row", len(Y), subsample=rows)

    rows = torch.arange(len(Y))
    found = {}
    for name, distributed, own in [("two", True, rows.chunk(processes.size)[processes.rank]), ("one", False, rows)]:
        pyro.clear_param_store()
        guide = AutoDelta(row_model, create_plates=plate_of, init_loc_fn=init_to_value(values={"z": Y**2}))
        svi = CompiledSVI(row_model, guide, adam(), Trace_ELBO(), distributed=distributed)
        svi.snapshot(rows, Y)
        loss, gradients = svi.loss_and_gradients(own, Y[own])
        found[name] = torch.cat([loss.reshape(1), flat(gradients.values())])
    return found


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
    own = Y.chunk(processes.size)[processes.rank]

    def local_model(y):
        with pyro.plate("row", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def nothing_finite():
        def loss(model, guide):
            return (pyro.param("loc", Y.new_zeros(())) ** 2).sum()

        svi = CompiledSVI(lambda: None, lambda: None, adam(), loss, backend="eager")
        svi.step()
        svi.parameters["loc"].data.fill_(torch.nan if processes.rank else 0.0)
        svi.run(99)

    def other_version():
        with patch.object(division, "version", lambda: f"1.{processes.rank}"):
            fit_of(num_steps=10)

    def warns_of_rows():
        call = ModelCall(model, (own,))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trace = poutine.trace(call).get_trace()
            check_own_rows(Division(processes, "data"), call, AutoNormal(model), trace)
        raise ValueError("; ".join(str(each.message) for each in caught))

    found = {}
    for name, call in {
        "seeds": lambda: fit_of(seed=processes.rank, num_steps=10),
        "data": lambda: fg.fit(model, AutoNormal(model), Y[: 4 + processes.rank], num_steps=10, progress=False),
        "parameters": lambda: CompiledSVI(
            model, fg.AutoFlow(model, "planar" if processes.rank else "coupling"), adam(), Trace_ELBO()
        ).step(Y),
        "checkpoint": lambda: fit_of(num_steps=10, checkpoint=fg.Checkpoint("nowhere/at all/file")),
        "rows with latents": lambda: fg.fit(
            local_model, AutoNormal(local_model), own, distributed="data", progress=False
        ),
        "rows": warns_of_rows,
        "version": other_version,
        "nothing finite": nothing_finite,
        "batches": lambda: fg.fit(mean_model, AutoNormal(mean_model), Y, batches=[Y], num_steps=10, progress=False),
    }.items():
        pyro.clear_param_store()
        try:
            call()
            found[name] = "none"
        except (ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def calibrated(processes):
    """Simulations divided between the processes, beside all of them in one; and one that fails in the second process."""

    def model_factory():
        return functools.partial(mean_model, Y)

    wide = functools.partial(AutoNormal, init_scale=0.5)

    def few_steps(model, guide, seed):
        svi = CompiledSVI(model, guide, adam(), Trace_ELBO(), backend="eager")
        for _ in range(2):
            svi.step()
        return fg.draw(model, guide, num_samples=20, seed=seed)

    def fails(model, guide, seed):
        raise ValueError("the second process")

    def check(infer):
        return fg.check_calibration(model_factory, wide, 20, num_samples=19, infer=infer, seed=3, progress=False)

    with alone():
        one = check(few_steps)
    two = check(few_steps)
    try:
        check(fails if processes.rank == 1 else few_steps)
        message = "none"
    except RuntimeError as error:
        message = f"{type(error).__name__}: {error}"
    return {
        **{name: torch.as_tensor(calibration.ranks["mu"]) for name, calibration in {"one": one, "two": two}.items()},
        "message": message,
    }


def modes_found(processes):
    """Beside a guide that has one of two modes; every process climbs with half of the starts."""
    two = fg.LogDensity(lambda x: torch.logaddexp(-(x - 5).square().sum(-1) / 2, 1 - (x + 5).square().sum(-1) / 2), 2)
    guide = AutoNormal(two, init_loc_fn=init_to_value(values={"x": Y.new_full((2,), 5.0)}))
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    tracer = Tracer(ModelCall(two), guide, differentiable=True)
    draws = draw_traced(tracer, 500)
    found, climbed = {}, []
    climb = mode_search.climb

    def counted(log_density, starts, rounding):
        climbed.append(len(starts))
        return climb(log_density, starts, rounding)

    with patch.object(mode_search, "climb", counted):
        for name, others in {"two": processes, "one": None}.items():
            modes = search_after_fit(tracer, draws, 10, is_flow=False, asked_for=True, seed=0, processes=others)
            found[name] = {
                "values": torch.stack([mode.values["x"] for mode in modes]),
                "masses": torch.tensor([mode.mass.value for mode in modes]),
                "starts": torch.tensor([mode.num_found for mode in modes]),
            }
            if others:
                found["climbed"] = list(climbed)
    return found


def restarts_apart(processes):
    """Three restarts of two processes, beside all of them in one; the model has a parameter of its own."""

    def learning(y):
        loc = pyro.param("loc", y.new_zeros(()))
        mu = pyro.sample("mu", dist.Normal(loc, 5.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def fit():
        pyro.clear_param_store()
        guide = small_flow(learning)
        options = {"num_steps": 20, "num_particles": 4, "num_restarts": 3, "whiten": None, "search_modes": False}
        fit = fg.fit(learning, guide, Y, seed=0, progress=False, **options)
        return {
            **result_of(fit),
            "of the user": flat(guide.parameters()),
            "loc": fit.parameters["loc"],
            "restarts": torch.stack([draws.values["mu"] for draws in fit.restarts]),
            "again": fg.draw(fit.model, fit.guide, Y, num_samples=5, seed=0).values["mu"],
        }

    with alone():
        one = fit()
    return {"one": one, "two": fit()}


def first_fill(processes):
    """Of the replay buffer of annealed draws."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    objective = fg.FlowAnnealedBootstrap(8, buffer_size=64, num_leapfrog_steps=1)
    svi = CompiledSVI(model, small_flow(model), adam(), objective, backend="eager")
    losses = [svi.step(Y) for _ in range(2)]
    return {"points": objective.state_dict()["points"], "losses": torch.tensor(losses)}


def met_late(processes):
    """A parameter that is met in the middle of the training, with another first value in each process."""

    def loss(model, guide, noise, late):
        loc = pyro.param("loc", torch.zeros(3, dtype=torch.float64))
        if late:
            loc = loc + pyro.param("late", torch.full((3,), 1.0 + processes.rank, dtype=torch.float64))
        return (loc + noise - 1).square().sum()

    found = {}
    for backend in ("replay", "eager"):
        pyro.clear_param_store()
        svi = CompiledSVI(lambda *_: None, lambda *_: None, adam(), loss, backend=backend)
        for late in (False, False, True, True, True):
            svi.step(torch.full((3,), 0.1 * processes.rank, dtype=torch.float64), late)
        found[backend] = flat(svi.parameters.values())
    return found


def main(directory):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    processes = find_processes()
    found = {}
    for case in (
        noise_handed_in,
        a_thousand_steps,
        in_chunks,
        a_round_taken_back,
        stopped_by_one,
        batches_of_data,
        uneven_batches,
        a_fit_of_data,
        rows_with_latents,
        a_density,
        recorded,
        restarts_as_a_mixture,
        restarts_apart,
        calibrated,
        modes_found,
        first_fill,
        met_late,
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
