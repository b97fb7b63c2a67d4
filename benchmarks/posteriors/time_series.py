r"""Hidden Markov models and GARCH, as scans of logarithmic depth instead of loops over time."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .known import flat

# --- hidden Markov models ----------------------------------------------------------------------------------------------


# States are the first dimensions and time is the last. The other order has inner loops over two states, and takes three times as
# long.


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Products of matrices, shapes ``(K, K, …)``."""
    columns, rows = left.unsqueeze(2).unbind(1), right.unsqueeze(1).unbind(0)
    result = columns[0] * rows[0]
    # One after the other, because all at once would need K times the memory of the result.
    for column, row in zip(columns[1:], rows[1:], strict=True):
        result = torch.addcmul(result, column, row)
    return result


def matrix_product(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The product of T matrices of numbers ≥ 0, shape ``(K, K, …, T)``, scaled so that its largest number is 1, and the
    logarithm of the scale: shapes ``(K, K, …)`` and ``(…)``.

    Neighbours are multiplied in pairs, log₂ T times.
    """
    log_scale, level = matrices.new_zeros(()), 0
    while True:
        length = matrices.shape[-1]
        # The product of four matrices whose largest number is 1 does not overflow or vanish before it is scaled again.
        if level % 2 == 0 or length == 1:
            # The value does not depend on the factors, so they need no gradient.
            factor = matrices.detach().amax((0, 1))
            matrices, log_scale = matrices / factor, log_scale + factor.log().sum(-1)
        if length == 1:
            return matrices.squeeze(-1), log_scale
        # Splitting and unbinding have cheaper gradients than slices.
        even, *last = matrices.split([length - 1, 1], -1) if length % 2 else (matrices,)
        product = _multiply(*even.unflatten(-1, (-1, 2)).unbind(-1))
        matrices, level = torch.cat([product, *last], -1) if last else product, level + 1


def forward_log_likelihood(transition: Tensor, log_emission: Tensor) -> Tensor:
    """log p(y) of a hidden Markov chain whose first state has weight 1 everywhere.

    Arguments:
        transition: The probabilities from state to state, shape ``(K, K, …)``.
        log_emission: log p(y_t | state), shape ``(K, …, T)``, T at least 3.
    """
    top = log_emission.detach().amax(0)
    emission = (log_emission - top).exp()
    # The remaining number of steps is even, for the pairs.
    num_first = 2 - emission.shape[-1] % 2
    first, rest = emission.split([num_first, emission.shape[-1] - num_first], -1)
    weight = first[..., 0]
    if num_first == 2:
        weight = (weight.unsqueeze(1) * transition).sum(0) * first[..., 1]
    # Two steps, i → j → k. The matrices of single steps, which would be most of the memory, are never made.
    middle, end = rest.unflatten(-1, (-1, 2)).unbind(-1)
    paths = (transition.unsqueeze(2) * transition.unsqueeze(0)).unsqueeze(-1)
    pairs = torch.zeros_like(end)
    for path, through in zip(paths.unbind(1), middle.unbind(0), strict=True):
        pairs = torch.addcmul(pairs, path, through)
    product, log_scale = matrix_product(pairs * end)
    return (weight.unsqueeze(1) * product).sum((0, 1)).log() + log_scale + top.sum(-1)


def _states_first(values: Tensor) -> Tensor:
    return values.movedim(-1, 0).contiguous()


def _transition(first: Tensor, second: Tensor) -> Tensor:
    """The transition matrix of two states, from the priors of its rows."""
    rows = [pyro.sample(f"theta{i}", dist.Dirichlet(prior)) for i, prior in enumerate((first, second), start=1)]
    return torch.stack([_states_first(row) for row in rows])


def _positive_ordered(name: str, loc: Tensor) -> Tensor:
    """0 < x_1 < x_2 < …, with the density of N(loc, 1), from positive increments; the map has determinant 1."""
    increments = pyro.sample(f"{name}_increments", flat(dist.HalfNormal(torch.ones_like(loc)).to_event(1)))
    values = pyro.deterministic(name, increments.cumsum(-1), event_dim=1)
    pyro.factor(f"{name}_prior", dist.Normal(loc, 1.0).log_prob(values).sum(-1))
    return values


def increment_latents(
    reference: dict[str, Tensor], data: dict[str, Tensor], names: tuple[str, ...]
) -> dict[str, Tensor]:
    """Replace the ordered vectors of the given names by their increments."""
    latents = {name: value for name, value in reference.items() if name not in names}
    for name in names:
        value = reference[name]
        latents[f"{name}_increments"] = value.diff(dim=-1, prepend=torch.zeros_like(value[..., :1]))
    return latents


def gaussian_hmm(y: Tensor) -> None:
    """Two states with emissions N(μ_k, 1), flat rows, μ_1 ~ N(3, 1), μ_2 ~ N(10, 1)."""
    transition = _transition(y.new_ones(2), y.new_ones(2))
    mu = _positive_ordered("mu", y.new_tensor([3.0, 10.0]))
    log_emission = dist.Normal(_states_first(mu).unsqueeze(-1), 1.0).log_prob(y)
    pyro.factor("y", forward_log_likelihood(transition, log_emission))


def exponential_hmm(u: Tensor, v: Tensor, alpha: Tensor) -> None:
    """Two states with emissions u ~ Exp(φ_k) and v ~ Exp(λ_k), rows ~ Dirichlet; φ_k, λ_k ~ N((0, 3)_k, 1)."""
    transition = _transition(alpha[0], alpha[1])
    log_emission = 0.0
    for name, values in (("phi", u), ("lambda", v)):
        rate = _states_first(_positive_ordered(name, u.new_tensor([0.0, 3.0]))).unsqueeze(-1)
        log_emission = log_emission + rate.log() - rate * values
    pyro.factor("uv", forward_log_likelihood(transition, log_emission))


# --- GARCH -------------------------------------------------------------------------------------------------------------


def linear_recursion(inputs: Tensor, decay: Tensor) -> Tensor:
    """h_1 = x_1, h_t = x_t + decay · h_{t−1}, along the last dimension of x, in log₂ T doublings."""
    shift, result, factor = 1, inputs, decay.unsqueeze(-1)
    while shift < inputs.shape[-1]:
        earlier = torch.nn.functional.pad(result[..., :-shift], (shift, 0))
        result, factor, shift = result + factor * earlier, factor * factor, 2 * shift
    return result


def garch11(y: Tensor, sigma1: Tensor) -> None:
    """σ_t² = α0 + α1 (y_{t−1} − μ)² + β1 σ_{t−1}², all four flat, β1 on (0, 1 − α1).

    β1 is 1 − α1 times a fraction in (0, 1), so that no support depends on a latent: guides assume constant supports.
    """
    zero = y.new_zeros(())
    mu = pyro.sample("mu", flat(dist.Normal(zero, 1.0)))
    alpha0 = pyro.sample("alpha0", flat(dist.HalfNormal(zero + 1.0)))
    alpha1 = pyro.sample("alpha1", dist.Uniform(zero, 1.0))
    fraction = pyro.sample("beta1_fraction", dist.Uniform(zero, 1.0))
    beta1 = pyro.deterministic("beta1", (1 - alpha1) * fraction)
    pyro.factor("beta1_jacobian", torch.log1p(-alpha1))
    residual = y - mu.unsqueeze(-1)
    inputs = alpha0.unsqueeze(-1) + alpha1.unsqueeze(-1) * residual[..., :-1].square()
    first = sigma1.square().expand(*inputs.shape[:-1], 1)
    variance = linear_recursion(torch.cat([first, inputs], -1), beta1)
    pyro.sample("y", dist.Normal(mu.unsqueeze(-1), variance.sqrt()).to_event(1), obs=y)


def garch11_latents(reference: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, Tensor]:
    latents = {name: reference[name] for name in ("mu", "alpha0", "alpha1")}
    return {**latents, "beta1_fraction": reference["beta1"] / (1 - reference["alpha1"])}
