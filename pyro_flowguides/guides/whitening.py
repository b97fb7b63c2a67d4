r"""The Gaussian found before training, from which a flow guide starts.

A flow starts at N(0, I), whatever the posterior. Location, scale and correlations are what it learns most slowly; an affine map
close to those of the posterior leaves only the shape to it. The map is held fixed while the flow trains, and is computed in
float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..model.target import LogProb, Target, value_and_score
from ..transforms.fixed import Scale
from .gaussians import gaussian_elbo
from .many_dimensions import (
    DIAGONAL_BATCH_SIZE,
    MAX_PATH_STEPS,
    NUM_UPDATES,
    best_gaussian_in_many_dimensions,
    diagonal_batch_and_match,
    mode,
)

NUM_PATH_DRAWS = 64
# A trained guide that does not fit is replaced by a Gaussian whose ELBO is higher by more than this gain, in nats.
MIN_GAIN = 1.0
# Where every point is a run of the model: points of one batch and match, steps to the mode, points of an ELBO.
FEW_POINTS, FEW_PATH_STEPS, FEW_ELBO_DRAWS = 960, 50, 64
# Where the scales of the coordinates differ by more, they are made alike before anything else.
MAX_SCALE_RATIO = 1e5
# Up to this size the search is for a full covariance from the start: every update costs D³ and 2D scores. Above, cheaper ones
# come first.
MAX_FULL_RANK_DIM = 200


def batch_and_match(
    log_density: LogProb, loc: Tensor, scale_tril: Tensor, num_updates: int = NUM_UPDATES
) -> tuple[Tensor, Tensor]:
    r"""The Gaussian whose scores match the scores of the target, by closed-form updates without a learning rate.

    Each update draws a batch from the current :math:`N(\mu, \Sigma)`, takes the scores :math:`g` of the target there, and
    solves for the Gaussian that matches them, regularised towards the current one with weight 1/λ:

    .. math::
        \Sigma' U \Sigma' + \Sigma' = V, \qquad
        \mu' = \frac{\mu + \lambda (\Sigma' \bar g + \bar z)}{1 + \lambda},

    with :math:`U = \lambda \mathrm{Cov}(g) + \frac{\lambda}{1+\lambda} \bar g \bar g^\top` and
    :math:`V = \Sigma + \lambda \mathrm{Cov}(z) + \frac{\lambda}{1+\lambda} (\mu - \bar z)(\mu - \bar z)^\top`. Cai et al.
    (2024), *Batch and match: black-box variational inference with a score-based divergence*, arXiv:2402.14758.

    Draws with a non-finite score are left out; where fewer than half remain the covariance is divided by 4 instead, so that a
    start that is too wide recovers. Cost: ``num_updates`` batches of max(32, 2D) gradients and O(D³) each.

    Arguments:
        log_density: The target, in float64.
        loc: The mean to start from, shape (D,), float64.
        scale_tril: The Cholesky factor of the covariance to start from, shape (D, D), float64.
        num_updates: The number of updates.

    Returns:
        The mean and the Cholesky factor of the covariance.
    """
    dim = len(loc)
    batch_size = max(32, 2 * dim)
    identity = torch.eye(dim, dtype=loc.dtype, device=loc.device)
    for update in range(num_updates):
        points = loc + torch.randn(batch_size, dim, dtype=loc.dtype, device=loc.device) @ scale_tril.mT
        scores = value_and_score(log_density, points)[1]
        finite = scores.isfinite().all(-1)
        if 2 * int(finite.sum()) < batch_size:
            scale_tril = scale_tril / 2
            continue
        points, scores = points[finite], scores[finite]
        weight = batch_size * dim / (update + 1)
        shrunk = weight / (1 + weight)
        mean_point, mean_score = points.mean(0), scores.mean(0)
        u = weight * torch.cov(scores.mT, correction=0).reshape(dim, dim) + shrunk * torch.outer(mean_score, mean_score)
        offset = loc - mean_point
        v = (
            scale_tril @ scale_tril.mT
            + weight * torch.cov(points.mT, correction=0).reshape(dim, dim)
            + shrunk * torch.outer(offset, offset)
        )
        # Σ' = 2 L (I + (I + 4 LᵀUL)^½)⁻¹ Lᵀ with V = LLᵀ: symmetric at every step, unlike the square root of I + 4UV.
        factor, failed = torch.linalg.cholesky_ex(v)
        values, vectors = torch.linalg.eigh(identity + 4 * factor.mT @ u @ factor)
        half = factor @ vectors * (2 / (1 + values.clamp(min=1.0).sqrt())).sqrt()
        covariance = half @ half.mT
        new_scale_tril, also_failed = torch.linalg.cholesky_ex(covariance)
        new_loc = (loc + weight * (covariance @ mean_score + mean_point)) / (1 + weight)
        if int(failed) or int(also_failed) or not bool(new_loc.isfinite().all()):
            scale_tril = scale_tril / 2
            continue
        loc, scale_tril = new_loc, new_scale_tril
    return loc, scale_tril


def quasi_newton_path(
    log_density: LogProb, loc: Tensor, scale_tril: Tensor, max_steps: int = MAX_PATH_STEPS
) -> tuple[Tensor, Tensor]:
    r"""The Gaussian of highest ELBO on the path of a quasi-Newton optimiser to the mode.

    Every point x of the path comes with an estimate H of the inverse Hessian, and so with a Gaussian
    :math:`N(x + H \nabla \log p(x), H)`. The best of them lies where the mass is, which the mode itself may miss by far.
    Zhang et al. (2022), *Pathfinder: parallel quasi-Newton variational inference*, arXiv:2108.03782; here with the dense
    BFGS estimate, and with a line search that tries all its step lengths in one batch.

    Cost: per step two batches of the target and O(D²), O(D³) for the factor of H.

    Arguments:
        log_density: The target, in float64.
        loc: Where the path begins, shape (D,), float64.
        scale_tril: The Cholesky factor of the first H, shape (D, D), float64.
        max_steps: The longest path.

    Returns:
        The mean and the Cholesky factor of the covariance; those given, where no point of the path has a finite ELBO.
    """
    best = (loc, scale_tril)
    best_elbo = -math.inf
    point, inverse_hessian = loc, scale_tril @ scale_tril.mT
    value, score = (part[0] for part in value_and_score(log_density, point.unsqueeze(0)))
    # Down to where the score of a sharp likelihood, far from its mode, still takes a step that helps.
    step_lengths = 2.0 ** torch.arange(2, -45, -1, dtype=loc.dtype, device=loc.device)
    for step in range(max_steps):
        direction = inverse_hessian @ score
        points = point + step_lengths.unsqueeze(-1) * direction
        values, scores = value_and_score(log_density, points)
        usable = values.isfinite() & scores.isfinite().all(-1)
        values = torch.where(usable, values, -torch.inf)
        chosen = int(values.argmax())
        # The optimiser has arrived where not even the best step is worth a millionth of a nat.
        if not float(values[chosen]) > float(value) + 1e-6:
            break
        move, change = points[chosen] - point, score - scores[chosen]
        point, value, score = points[chosen], values[chosen], scores[chosen]
        curvature = move @ change
        if float(curvature) > 1e-10 * float(move.norm() * change.norm()):
            if step == 0:
                inverse_hessian = (
                    curvature / (change @ change) * torch.eye(len(loc), dtype=loc.dtype, device=loc.device)
                )
            update = torch.eye(len(loc), dtype=loc.dtype, device=loc.device) - torch.outer(move, change) / curvature
            inverse_hessian = update @ inverse_hessian @ update.mT + torch.outer(move, move) / curvature
        factor, failed = torch.linalg.cholesky_ex(inverse_hessian)
        if not int(failed):
            candidate = (point + inverse_hessian @ score, factor)
            elbo = gaussian_elbo(log_density, *candidate, num_draws=NUM_PATH_DRAWS)
            if elbo > best_elbo:
                best, best_elbo = candidate, elbo
    return best


def best_gaussian(log_density: LogProb, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
    """The Gaussian of highest ELBO among the start, the quasi-Newton path, and batch and match from either.

    Batch and match from the start fails where the posterior is far away or much narrower in some directions; the path fails
    where the mode tells nothing of the mass, as in a funnel. Where one fails the other does not.

    Where the scales of the coordinates differ by more than ``MAX_SCALE_RATIO``, all of this is done in units of them.
    """
    scales = coordinate_scales(log_density, loc)
    if float(scales.max()) > MAX_SCALE_RATIO * float(scales.min()):
        in_units = best_of_matched(lambda z: log_density(z * scales), loc / scales, torch.eye(len(loc)).to(loc))
        found = in_units[0] * scales, scales.unsqueeze(-1) * in_units[1]
        return max([(loc, scale_tril), found], key=lambda gaussian: gaussian_elbo(log_density, *gaussian))
    return best_of_matched(log_density, loc, scale_tril)


def best_of_matched(log_density: LogProb, loc: Tensor, scale_tril: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`best_gaussian`."""
    starts = [(loc, scale_tril), quasi_newton_path(log_density, loc, scale_tril)]
    matched = [batch_and_match(log_density, *start) for start in starts]
    return max([*starts, *matched], key=lambda gaussian: gaussian_elbo(log_density, *gaussian))


def coordinate_scales(log_density: LogProb, loc: Tensor) -> Tensor:
    """How far each coordinate can go alone until the slope of log p has changed by as much as matters, to a power of a hundred.

    For a normal law this is the conditional standard deviation: the length t for which t times the change of the slope is 1.
    Cost: 13 batches of a point for each coordinate.
    """
    own = value_and_score(log_density, loc.unsqueeze(0))[1][0]
    # Where no length is far enough, the prior of this coordinate is flat.
    scales = torch.ones_like(loc)
    for exponent in range(12, -13, -2):
        moved = loc + 10.0**exponent * torch.eye(len(loc), dtype=loc.dtype, device=loc.device)
        change = 10.0**exponent * (value_and_score(log_density, moved)[1].diagonal() - own).abs()
        # The shortest length wins; what is not finite is too far away.
        scales = torch.where(change < 1, scales, 10.0**exponent)
    return scales


def best_gaussian_of_few_runs(log_density: LogProb, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`best_gaussian`, where every point is a run of the model: some 2,200 runs, a tenth of a fit's.

    The path is that of L-BFGS, which needs a point or two for each step, and the updates are as many as the points allow.
    """
    dim, full = len(loc), scale.dim() == 2
    match = batch_and_match if full else diagonal_batch_and_match
    num_updates = max(5, FEW_POINTS // (max(32, 2 * dim) if full else DIAGONAL_BATCH_SIZE))
    starts = [(loc, scale), (mode(log_density, loc, max_steps=FEW_PATH_STEPS), scale)]
    matched = [match(log_density, *start, num_updates=num_updates) for start in starts]
    return max([starts[0], *matched], key=lambda found: gaussian_elbo(log_density, found[0], found[1], FEW_ELBO_DRAWS))


Finder = Callable[[LogProb, Tensor, Tensor], tuple[Tensor, Scale]]
# For the covariance as a whole, and above MAX_FULL_RANK_DIM, where the search begins with its diagonal.
METHODS: dict[str, Callable[[LogProb, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "auto": best_gaussian,
    "batch_and_match": batch_and_match,
    "pathfinder": quasi_newton_path,
}
DIAGONAL_METHODS: dict[str, Callable[[LogProb, Tensor, Tensor], tuple[Tensor, Scale]]] = {
    "auto": best_gaussian_in_many_dimensions,
    "batch_and_match": diagonal_batch_and_match,
}


def check_method(method: str, dim: int = 1) -> None:
    """Raises ValueError if the name of a method is unknown, or the method is not for this number of dimensions."""
    if method not in ("init", *METHODS):
        raise ValueError(f"whiten: method must be one of {', '.join(['init', *METHODS])}, got {method!r}")
    if dim > MAX_FULL_RANK_DIM and method not in ("init", *DIAGONAL_METHODS):
        raise ValueError(
            f'whiten: "{method}" is for at most {MAX_FULL_RANK_DIM} latent dimensions, here are {dim}; '
            f"use one of {', '.join(DIAGONAL_METHODS)}"
        )


def whiten(target: Target, start: tuple[Tensor, Tensor], method: str) -> tuple[Tensor, Scale]:
    """A Gaussian near the target by one of the methods.

    Arguments:
        target: The log-density of the model.
        start: The mean to start from, shape (D,), and the Cholesky factor of the covariance, shape (D, D), or, in many
            dimensions, the standard deviations, shape (D,); float64.
        method: ``"auto"``, ``"batch_and_match"`` or ``"pathfinder"``.

    Returns:
        The mean, and the Cholesky factor. From standard deviations: ``"auto"`` finds any kind of scale, the others standard
        deviations.

    Raises:
        ValueError: if the method is unknown, or cannot be used in this number of dimensions.
    """
    check_method(method, len(start[0]))
    methods: Mapping[str, Finder] = METHODS if start[1].dim() == 2 else DIAGONAL_METHODS
    found_by: Finder = methods[method] if target.runs_together or method != "auto" else best_gaussian_of_few_runs
    # What fails at the start already is an error of the model.
    target.log_prob(start[0].expand(2, -1))
    return found_by(without_errors(target.log_prob), *start)


def without_errors(log_density: LogProb) -> LogProb:
    """The same density, NaN at points where it raises: far from the posterior a covariance may have no Cholesky factor."""

    def tried(points: Tensor) -> Tensor:
        try:
            return log_density(points)
        except (RuntimeError, ValueError):
            # One point of a batch is enough for an error.
            if len(points) == 1:
                return points.sum(-1) * torch.nan
            return torch.cat([tried(point) for point in points.split(1)])

    return tried
