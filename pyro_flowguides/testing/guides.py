"""The contract of a guide as checks, for guides of this library and for those that users write.

Each check takes a guide, its model and the arguments of both, and raises an ``AssertionError`` that names the law, the site and
the difference. :func:`check_guide` runs all of them.
"""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import (
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.elbo import ELBO
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import biject_to

from ..model.call import ModelCall
from ..model.sites import is_subsample, latent_sites, max_plate_nesting, tensor_sites, unchanged_random_state

# The number of values of a loss that are compared, and the number of draws in each, without and with vectorized particles.
NUM_LOSSES = 10
NUM_PARTICLES = {False: 2, True: 20}
LEVELS = (0.1, 0.5, 0.9)


def check_guide(guide: Any, model: Callable, *args: Any, **kwargs: Any) -> None:
    """Checks that a guide is what Pyro and this library take for an autoguide of the model.

    The checks are: its sites, shapes, plates and supports; its densities; gradients to all parameters; names in the parameter
    store; the ELBOs of Pyro, jitted ones included where the guide allows it; medians and quantiles; state dict, copies and
    pickles; ``Predictive``. They run at parameters that are moved at random, because at its start even a guide with a wrong
    log-determinant passes; values and random state are put back afterwards. Takes seconds: most of them for the ELBOs.

    Arguments:
        guide: An autoguide, for example a subclass of :class:`pyro_flowguides.AutoFlow` of your own.
        model: Its model.
        args: The positional arguments of both.
        kwargs: The keyword arguments of both.

    Raises:
        AssertionError: if a law does not hold; it says which, at which site, and by how much.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_flowguides import AutoPlanar
        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(0.0, 1.0))
        >>> check_guide(AutoPlanar(model, num_layers=2), model)
    """
    call = ModelCall.given("check_guide", model, args, kwargs)
    args, kwargs = call.args, dict(call.kwargs)
    with unchanged_random_state():
        guide(*args, **kwargs)
        with moved_parameters(guide):
            for check in GUIDE_CHECKS:
                pyro.set_rng_seed(0)
                check(guide, model, *args, **kwargs)


@contextmanager
def moved_parameters(guide: Any, scale: float = 0.1) -> Iterator[None]:
    """Adds noise to all parameters of a guide, and takes it away in the end."""
    before = [parameter.detach().clone() for parameter in guide.parameters()]
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(guide.parameters(), before, strict=True):
                parameter.copy_(value)


# --- sites and densities -------------------------------------------------------------------------------------------------


def check_sites(guide: Any, model: Callable, *args: Any, **kwargs: Any) -> None:
    """The guide has the latent sites of the model with their shapes, supports, plates and scales, and returns their values."""
    trace, model_trace, result = _trace_pair(guide, model, args, kwargs)
    latents = {name: site for name, site in latent_sites(model_trace) if not site["fn"].support.is_discrete}
    nodes: dict[str, Any] = dict(trace.nodes)
    for name, site in tensor_sites(trace):
        _require(
            name in latents or bool(site["infer"].get("is_auxiliary")),
            f'site "{name}" of the guide is not in the model; mark it with infer={{"is_auxiliary": True}}',
        )
    alone: dict[str, Any] = dict(_run_alone(model, args, kwargs).nodes)
    for name in latents:
        _require(name in nodes, f'latent site "{name}" of the model is not in the guide; sample it there')
        site, expected = nodes[name], latents[name]
        _require(result.get(name) is site["value"], f'the guide must return the value of site "{name}" by its name')
        for what, found, wanted in (
            ("values of shape", site["value"].shape, alone[name]["value"].shape),
            ("an event dimension of", site["fn"].event_dim, expected["fn"].event_dim),
            ("the plates", _plates_of(site), _plates_of(expected)),
            ("the scale", float(site["scale"]), float(expected["scale"])),
        ):
            _require(found == wanted, f'site "{name}" has {what} {found} in the guide and {wanted} in the model')
        inside = expected["fn"].support.check(site["value"])
        _require(
            bool(inside.all()),
            f'{int((~inside).sum())} values of site "{name}" are outside of its support {expected["fn"].support}; map them '
            "there by biject_to(support)",
        )
    replayed: dict[str, Any] = dict(model_trace.nodes)
    for name, site in replayed.items():
        if name in nodes and site["type"] == "sample" and is_subsample(site):
            same = torch.equal(nodes[name]["value"], site["value"])
            _require(
                same, f'plate "{name}" has other indices in the guide than in the model; use the plates of the guide'
            )


def check_densities(guide: Any, model: Callable, *args: Any, **kwargs: Any) -> None:
    """A draw and a copy of it have the same density; the density of a site is the Jacobian of its map to the support."""
    trace, model_trace, _ = _trace_pair(guide, model, args, kwargs)
    trace.compute_log_prob()
    nodes: dict[str, Any] = dict(trace.nodes)
    auxiliary = [site for _, site in tensor_sites(trace) if site["infer"].get("is_auxiliary")]
    for site in auxiliary:
        # A copy: a distribution may remember the point that it has drawn.
        again = site["fn"].log_prob(site["value"].detach().clone())
        drawn = site["fn"].log_prob(site["value"])
        _require_close(
            f'log q of site "{site["name"]}" at its draw and at a copy of it', drawn, again,
            "the log-determinants of the flow and of its inverse do not belong together",
        )  # fmt: skip
    for name, site in latent_sites(model_trace):
        if not auxiliary or name not in nodes or site["fn"].support.is_discrete:
            continue
        transform = biject_to(site["fn"].support)
        value = nodes[name]["value"].detach()
        point = transform.inv(value)
        log_jacobian = transform.log_abs_det_jacobian(point, value)
        event_dims = log_jacobian.dim() - value.dim() + site["fn"].event_dim
        log_jacobian = log_jacobian.sum([*range(-event_dims, 0)]) if event_dims else log_jacobian
        _require_close(
            f'the log-density of site "{name}" and minus log|det| of its map to the support',
            nodes[name]["fn"].log_prob(nodes[name]["value"]), -log_jacobian,
            "sample it from a Delta with this log_density",
        )  # fmt: skip
    with poutine.mask(mask=False):
        masked = poutine.trace(guide).get_trace(*args, **kwargs).log_prob_sum()
    _require(
        float(masked) == 0, f"under poutine.mask(mask=False) the log-density of the guide is {float(masked)}, not 0"
    )


def check_particles(guide: Any, model: Callable, *args: Any, **kwargs: Any) -> None:
    """A plate outside gives every site a dimension of draws on the left, and the draws differ."""
    nesting = max_plate_nesting(_run_alone(model, args, kwargs))
    alone = _run_alone(guide, args, kwargs)
    with pyro.plate("_check_guide_particles", 3, dim=-1 - nesting):
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    for name, site in latent_sites(alone):
        value = trace.nodes[name]["value"]
        expected = 3 * site["value"].numel()
        _require(
            value.numel() == expected and len(value) == 3,
            f'inside a plate of 3 draws site "{name}" has shape {tuple(value.shape)}, and {tuple(site["value"].shape)} alone; '
            "carry batch dimensions on the left through",
        )
        same = bool((value[0] == value[1]).all())
        _require(not same or value.numel() == 0, f'inside a plate of 3 draws all values of site "{name}" are the same')


# --- parameters ----------------------------------------------------------------------------------------------------------


def check_parameters(guide: Any, model: Callable, *args: Any, **kwargs: Any) -> None:
    """Every parameter has one name in Pyro's store, and is a ``param`` site of the guide's trace."""
    with poutine.trace(param_only=True) as capture:
        guide(*args, **kwargs)
    named = dict(guide.named_parameters())
    _require(
        len({id(parameter) for parameter in named.values()}) == len(named), "a parameter of the guide has two names"
    )
    nodes: dict[str, Any] = dict(capture.trace.nodes)
    leaves = {id(site["value"].unconstrained()): name for name, site in nodes.items()}
    local = pyro.settings.get("module_local_params")
    store = dict(pyro.get_param_store().named_parameters())
    for name, parameter in named.items():
        _require(
            id(parameter) in leaves,
            f'parameter "{name}" is no param site of the guide, so that SVI does not train it; make its module a PyroModule '
            "before you attach it",
        )
        held = [known for known, leaf in store.items() if leaf is parameter]
        _require(
            local or held == [leaves[id(parameter)]],
            f'parameter "{name}" has the names {held} in the parameter store; it must have exactly one',
        )


def check_gradients(guide: Any, model: Callable, *args: Any, **kwargs: Any) -> None:
    """The ELBO has a finite gradient for every parameter, which is not zero throughout."""
    guide.zero_grad()
    Trace_ELBO(num_particles=10, max_plate_nesting=max_plate_nesting(_run_alone(model, args, kwargs))).loss_and_grads(
        model, guide, *args, **kwargs
    )
    for name, parameter in guide.named_parameters():
        gradient = parameter.grad
        _require(gradient is not None, f'parameter "{name}" gets no gradient: the draws do not depend on it')
        _require(bool(gradient.isfinite().all()), f'the gradient of parameter "{name}" is not finite')
        _require(bool((gradient != 0).any()), f'the gradient of parameter "{name}" is 0: it would never be trained')
    guide.zero_grad()


# --- losses --------------------------------------------------------------------------------------------------------------


def check_elbos(guide: Any, model: Callable, *args: Any, **kwargs: Any) -> None:
    """All ELBOs of Pyro estimate the same number, particle by particle and, where the model can be, vectorized."""
    alone = _losses(Trace_ELBO, False, guide, model, args, kwargs)
    references = {False: alone}
    if _vectorizes(guide, model, args, kwargs):
        references[True] = _losses(Trace_ELBO, True, guide, model, args, kwargs)
        _require_same_mean(Trace_ELBO, True, references[True], alone)
    for Loss in (TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO):
        for vectorize, expected in references.items():
            _require_same_mean(Loss, vectorize, _losses(Loss, vectorize, guide, model, args, kwargs), expected)


def check_jit_elbos(guide: Any, model: Callable, *args: Any, **kwargs: Any) -> None:
    """So do the jitted ones, unless the guide refuses to be recorded."""
    vectorize = _vectorizes(guide, model, args, kwargs)
    expected = _losses(Trace_ELBO, vectorize, guide, model, args, kwargs)
    for Loss in (JitTrace_ELBO, JitTraceGraph_ELBO, JitTraceEnum_ELBO):
        try:
            found = _losses(Loss, vectorize, guide, model, args, kwargs)
        except NotImplementedError:
            continue
        _require_same_mean(Loss, vectorize, found, expected)


def _losses(
    Loss: type[ELBO], vectorize: bool, guide: Any, model: Callable, args: tuple, kwargs: dict[str, Any]
) -> Tensor:
    """Values of a loss, each with a seed of its own: most ELBOs then use the same draws."""
    options: dict[str, Any] = {"ignore_jit_warnings": True} if Loss.__name__.startswith("Jit") else {}
    nesting = max_plate_nesting(_run_alone(model, args, kwargs))
    options.update(num_particles=NUM_PARTICLES[vectorize], vectorize_particles=vectorize, max_plate_nesting=nesting)
    loss: Any = Loss(strict_enumeration_warning=False, **options)
    values = []
    with warnings.catch_warnings(), torch.no_grad():
        # torch deprecates torch.jit, which Pyro is built on.
        warnings.simplefilter("ignore")
        for seed in range(NUM_LOSSES):
            pyro.set_rng_seed(seed)
            values.append(loss.loss(model, guide, *args, **kwargs))
    return torch.tensor(values, dtype=torch.float64)


def _vectorizes(guide: Any, model: Callable, args: tuple, kwargs: dict[str, Any]) -> bool:
    nesting = max_plate_nesting(_run_alone(model, args, kwargs))
    loss = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=nesting)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss.loss(model, guide, *args, **kwargs)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
        return False
    return True


def _require_same_mean(Loss: type[ELBO], vectorize: bool, found: Tensor, expected: Tensor) -> None:
    differences = found - expected
    mean, error = float(differences.mean()), float(differences.std() / len(differences) ** 0.5)
    # Student's t with 9 degrees of freedom exceeds 6 once in 5000 times.
    _require(
        abs(mean) < 6 * error + 1e-4 * (1 + abs(float(expected.mean()))),
        f"{Loss.__name__}(vectorize_particles={vectorize}) differs from Trace_ELBO by {mean:.4g}, with a standard error of "
        f"{error:.2g}; a guide must count each density once, and carry batch dimensions on the left through",
    )


# --- estimates, copies, predictions --------------------------------------------------------------------------------------


def check_estimates(guide: Any, model: Callable, *args: Any, **kwargs: Any) -> None:
    """Median and quantiles have the shapes of the sites, no gradient, and the same values at every call; they are in order."""
    median, again = guide.median(*args, **kwargs), guide.median(*args, **kwargs)
    quantiles = guide.quantiles(LEVELS, *args, **kwargs)
    draw = guide(*args, **kwargs)
    # A support may depend on other latents.
    shapes = {name: site["value"].shape for name, site in latent_sites(_run_alone(model, args, kwargs))}
    whole = {name: median[name] for name, shape in shapes.items() if name in median and median[name].shape == shape}
    at_median = poutine.condition(model, data=whole)
    supports = {
        name: site["fn"].support for name, site in tensor_sites(_run_alone(at_median, args, kwargs)) if name in median
    }
    for name, site in latent_sites(_run_alone(model, args, kwargs)):
        if name not in draw:
            continue
        _require(name in median and name in quantiles, f'median and quantiles lack site "{name}"')
        support, event_dim = supports[name], site["fn"].event_dim
        _require(torch.equal(median[name], again[name]), f'the median of site "{name}" differs from call to call')
        _require(
            quantiles[name].shape == (len(LEVELS), *median[name].shape),
            f'the quantiles of site "{name}" have shape {tuple(quantiles[name].shape)}, not (levels,) + '
            f"{tuple(median[name].shape)}, the shape of the median",
        )
        _require(
            median[name].shape[median[name].dim() - event_dim :] == site["fn"].event_shape,
            f'the median of site "{name}" has shape {tuple(median[name].shape)}, its event shape is {site["fn"].event_shape}',
        )
        _require(bool(support.check(median[name]).all()), f'the median of site "{name}" is outside of its support')
        _require(
            not (median[name].requires_grad or quantiles[name].requires_grad), f'site "{name}": estimates with gradient'
        )
        _require(
            bool((quantiles[name].diff(dim=0) >= 0).all()), f'the quantiles of site "{name}" fall where the levels rise'
        )


def check_copies(guide: Any, model: Callable, *args: Any, **kwargs: Any) -> None:
    """A state dict, a deep copy and a pickle hold all of the guide: the same draws for the same seed, and trainable copies."""
    expected = _seeded(guide, args, kwargs)
    state = {name: value.detach().clone() for name, value in guide.state_dict().items()}
    for how in ("deepcopy", "pickle", "load_state_dict"):
        # In a store of its own: under a common name the copy would take the parameters of the guide.
        with pyro.get_param_store().scope():
            other = pickle.loads(pickle.dumps(guide)) if how == "pickle" else copy.deepcopy(guide)
            _require(
                _has_model(guide), f"the guide has lost its model to a copy by {how}, and cannot be trained any more"
            )
            if how == "load_state_dict":
                for value in other.state_dict().values():
                    value.add_(0.5 if value.is_floating_point() else 0)
                other.load_state_dict(state)
            for name, value in _seeded(other, args, kwargs).items():
                _require_close(
                    f'the draws of site "{name}" from the guide and from a copy by {how}', value, expected[name],
                    "what the guide draws must depend on parameters and buffers alone",
                )  # fmt: skip
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.add_(1.0)
        for name, value in guide.state_dict().items():
            _require(torch.equal(value, state[name]), f'"{name}" of the guide changes with its copy by {how}')


def check_predictive(guide: Any, model: Callable, *args: Any, **kwargs: Any) -> None:
    """``Predictive`` draws every latent site, one draw after the other."""
    draws = Predictive(model, guide=guide, num_samples=3)(*args, **kwargs)
    for name, value in guide(*args, **kwargs).items():
        _require(name in draws, f'Predictive draws no site "{name}"')
        _require(
            draws[name].numel() == 3 * value.numel() and len(draws[name]) == 3,
            f'3 draws by Predictive of site "{name}" have shape {tuple(draws[name].shape)}, not (3,) + {tuple(value.shape)}',
        )


GUIDE_CHECKS: tuple[Callable[..., None], ...] = (
    check_sites,
    check_densities,
    check_particles,
    check_parameters,
    check_gradients,
    check_elbos,
    check_jit_elbos,
    check_estimates,
    check_copies,
    check_predictive,
)


# --- helpers -------------------------------------------------------------------------------------------------------------


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(f"check_guide: {message}")


def _require_close(what: str, found: Tensor, expected: Tensor, advice: str) -> None:
    scale = 1 + float(expected.detach().abs().max()) if expected.numel() else 1.0
    tolerance = (1e-6 if found.dtype == torch.float64 else 2e-3) * scale
    difference = float((found - expected).detach().abs().max()) if found.shape == expected.shape else math.inf
    _require(difference <= tolerance, f"{what} differ by {difference:.3g}; {advice}")


def _run_alone(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Trace:
    with torch.no_grad(), poutine.block():
        return poutine.trace(function).get_trace(*args, **kwargs)


def _trace_pair(
    guide: Any, model: Callable, args: tuple, kwargs: dict[str, Any]
) -> tuple[Trace, Trace, dict[str, Tensor]]:
    with poutine.trace() as capture:
        result = guide(*args, **kwargs)
    replayed = poutine.replay(model, trace=capture.trace)
    return capture.trace, poutine.trace(replayed).get_trace(*args, **kwargs), result


def _has_model(guide: Any) -> bool:
    try:
        return getattr(guide, "model", True) is not None
    except TypeError:
        # Pyro's own guides, after they were copied.
        return False


def _plates_of(site: Any) -> set[tuple[str, int, int]]:
    return {(frame.name, frame.dim, frame.size) for frame in site["cond_indep_stack"]}


def _seeded(guide: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    pyro.set_rng_seed(7)
    with torch.no_grad():
        return guide(*args, **kwargs)
