"""The log-density of a model as a function of the flat vector of its latents."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import warn
from . import plates, supports
from .batched import BatchedModel
from .call import ModelCall
from .data import check_observed
from .enumeration import Enumeration
from .latents import Latents
from .memory import draws_at_once, elements_per_draw
from .missing import FillMissing
from .recording import CaptureError
from .sites import PLATE_NAME, log_prob_per_draw, max_plate_nesting, quiet_trace, unchanged_random_state

# log p at each row of a batch of points, in float64, differentiable.
LogProb = Callable[[Tensor], Tensor]
# What a model raises that does not carry batch dimensions through, or cannot be recorded.
ERRORS_OF_MODELS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError, NotImplementedError)


def value_and_score(log_density: LogProb, points: Tensor) -> tuple[Tensor, Tensor]:
    """log p and its gradient at each row of a batch of points, detached."""
    with torch.enable_grad():
        points = points.detach().requires_grad_()
        value = log_density(points)
        (score,) = torch.autograd.grad(value.sum(), points)
    return value.detach(), score


def draw_by_draw(not_broadcast: BaseException, not_recorded: BaseException) -> str:
    """The warning of a model for which every draw is a run of its own.

    Arguments:
        not_broadcast: Why it does not carry extra batch dimensions.
        not_recorded: Why it cannot be recorded and repeated.
    """
    # Pyro appends a table of all sites to an error within a model.
    reasons = [
        " ".join(str(each).split("Trace Shapes:")[0].split())[:400] or type(each).__name__
        for each in (not_broadcast, not_recorded)
    ]
    return (
        "The model cannot be vectorised over draws, so that every draw is a run of its own, which is slow. It neither carries "
        f"extra batch dimensions on the left of its latents ({reasons[0]}), nor can one run be recorded and repeated for many "
        f"draws ({reasons[1]}). Write torch.where(latent > 0, ..., ...) for an if on a latent, and torch's functions for "
        "float(), .item() and numpy; see docs/how_to/vectorise.md"
    )


class _Block(torch.autograd.Function):
    """log p of a block of points, whose gradient is computed with it."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, log_density: LogProb) -> Tensor:
        value, score = value_and_score(log_density, points)
        ctx.save_for_backward(score)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Any) -> Any:
        (score,) = ctx.saved_tensors
        return outputs[0].unsqueeze(-1) * score, None


class Target:
    r"""log p of unconstrained latents: :math:`\log p(\theta(x), y) + \log|\det \partial \theta / \partial x|`.

    Where data are subsampled, one minibatch is drawn at the start and kept, so that log p is a function; where latents are local
    to the minibatch, it is the mean over minibatches that cover the plate, at the cost of a run of the model for each.

    Arguments:
        call: The model with its arguments.
        latents: Its latents, every site over whole plates (:meth:`Latents.whole`).
        vectorize: Whether the model can be run on many draws at once; otherwise every draw is a run of its own. None to find out:
            by comparing two draws together with each alone, and by recording the model where they differ.
        batched: The recording of the model, to take in its place; all latents are given to it.

    Raises:
        ValueError: if latents are local to a minibatch that is an argument of the model.
    """

    def __init__(
        self, call: ModelCall, latents: Latents, *, vectorize: bool | None = True, batched: BatchedModel | None = None
    ) -> None:
        self.call = call
        self.latents = latents
        with quiet_trace():
            # All of the model: observed sites have plates too.
            trace = poutine.trace(call).get_trace()
        check_observed(trace)
        self._nesting = max_plate_nesting(trace)
        self._minibatches = self._fixed_minibatches(trace)
        # Every latent has a value from here on; one drawn beside it is wasted, and fails where a trial point is wild.
        self._bare = call.without_initial_values
        self.batched = batched or self._summed_out(trace)
        # A recording takes many draws, whether it is one or stands for single runs.
        self.vectorize = bool(vectorize) or self.batched is not None
        if vectorize is None and self.batched is None:
            self._find_out(trace)

    @property
    def runs_together(self) -> bool:
        """Whether many draws take less than a run of the model for each."""
        return self.vectorize and (self.batched is None or self.batched.is_recorded)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p at each row, in float64 whatever the dtype of the model, which runs in its own.

        Rows are taken in blocks, each with its gradient where that is needed, so that the memory is that of a block.

        Arguments:
            x: Points of shape ``(draws, dim)``; the result, of shape ``(draws,)``, is once differentiable in them.
        """
        rows = x.to(self.latents.init_loc.dtype)
        with pyro.validation_enabled(False):
            blocks = rows.split(self._block_size(len(rows)))
            if rows.requires_grad and torch.is_grad_enabled():
                found = [_Block.apply(block, self._log_prob) for block in blocks]  # type: ignore[no-untyped-call]
            else:
                found = [self._log_prob(block) for block in blocks]
            return torch.cat(found).double()

    def _block_size(self, num_rows: int) -> int:
        if not self.vectorize:
            return 1
        # A few rows are what the measure itself takes.
        return num_rows if num_rows <= 3 else draws_at_once(self._elements_per_row)

    @functools.cached_property
    def _elements_per_row(self) -> int:
        start = self.latents.init_loc
        with torch.no_grad(), unchanged_random_state():
            return elements_per_draw(lambda number: self._log_prob(start.expand(number, -1)))

    def constrain(self, x: Tensor) -> dict[str, Tensor]:
        """The values of the latent sites.

        Arguments:
            x: Points of shape ``(draws, dim)``.

        Returns:
            A dict of site name to a tensor of shape ``(draws,) + site shape``, over whole plates.
        """
        x = x.reshape(len(x), *[1] * self.latents.nesting, self.latents.dim)
        latents = supports.at(self.latents, self._bare, x)
        return {site.name: site.without_padding(site.transform(point), 1) for site, point in latents.unpack(x)}

    def _log_prob(self, rows: Tensor) -> Tensor:
        count = len(rows)
        # A recording takes batch dimensions without a plate too.
        nesting = max(self._nesting, self.latents.nesting) if self.batched is not None else self._nesting
        x = rows.reshape(count, *[1] * nesting, self.latents.dim) if self.vectorize else rows.squeeze(0)
        values, log_det = {}, rows.new_zeros(count)
        for site, unconstrained in supports.at(self.latents, self._bare, x).unpack(x):
            value = site.transform(unconstrained)
            log_jacobian = site.log_jacobian(unconstrained, value)
            log_det = log_det + log_jacobian.reshape(count, -1).sum(-1)
            values[site.name] = value if self.batched is None else site.without_padding(value, 1)
        log_p = [self._log_joint(values, indices, count) for indices in self._minibatches]
        return log_det + sum(log_p) / len(log_p)

    def _log_joint(self, values: dict[str, Tensor], indices: dict[str, Tensor], count: int) -> Tensor:
        selected = {
            site.name: plates.select(values[site.name], site.frames, indices, site.event_dim)
            for site in self.latents.sites
        }
        if self.batched is not None:
            return self.batched.log_prob(selected, indices)
        model = FillMissing()(poutine.condition(self._bare, data={**selected, **indices}))
        plate = pyro.plate(PLATE_NAME, count, dim=-1 - self._nesting) if self.vectorize else nullcontext()
        with poutine.block(), plate:
            trace = poutine.trace(model).get_trace()
        return log_prob_per_draw(trace, count)

    def _summed_out(self, trace: Trace) -> BatchedModel | None:
        """The model with its discrete latents summed out, if it has any."""
        names = [site.name for site in self.latents.sites]
        enumeration = Enumeration.of(trace, names)
        if enumeration is None:
            return None
        unrecorded = BatchedModel(self._bare, trace, names, enumeration=enumeration, is_recorded=False)
        unrecorded.check_sum()
        try:
            recorded = BatchedModel(self._bare, trace, names, enumeration=enumeration)
            recorded.prepare()
            return recorded
        except CaptureError:
            return unrecorded

    def _find_out(self, trace: Trace) -> None:
        """Decides how draws are run together, by values and gradients at two points; draw by draw after a warning."""
        points = torch.stack([self.latents.init_loc, self.latents.init_loc + 0.1])
        reasons: list[BaseException] = []
        with warnings.catch_warnings(), unchanged_random_state():
            warnings.simplefilter("ignore")
            alone = value_and_score(self.log_prob, points)
            for is_recorded in (False, True):
                try:
                    names = [site.name for site in self.latents.sites]
                    self.batched = BatchedModel(self._bare, trace, names) if is_recorded else None
                    self.vectorize = True
                    torch.testing.assert_close(
                        value_and_score(self.log_prob, points), alone, rtol=1e-3, atol=1e-3, equal_nan=True
                    )
                    return
                except ERRORS_OF_MODELS as error:
                    reasons.append(error)
        self.vectorize, self.batched = False, None
        warn(draw_by_draw(*reasons))

    def _fixed_minibatches(self, trace: Trace) -> list[dict[str, Tensor]]:
        sites, local = plates.subsample_sites(trace), self.latents.subsampled_plates
        for name, latent in local.items():
            if name in sites and plates.has_given_indices(sites[name]):
                raise ValueError(
                    f"whiten: latent site '{latent}' is inside plate '{name}', of which these arguments of the model hold one "
                    f"minibatch, which tells nothing of the others; call whiten with arguments for the whole plate, or leave "
                    'the map as it is: method="init" (fit: whiten=None)'
                )
        return plates.minibatches(sites, whole=local)
