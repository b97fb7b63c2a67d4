"""The update of a step: the optimisers against their originals, clipping, the average, and steps that are not finite."""

import functools
import inspect

import pyro.optim.clipped_adam
import pytest
import torch

from pyro_flowguides.compiled.update import Adam, Scalars, Update

NUM_STEPS = 20


def gradients(dtype, size=7):
    generator = torch.Generator(torch.zeros(()).device).manual_seed(4)
    scales = torch.logspace(-3, 2, NUM_STEPS, dtype=dtype)
    return [scale * torch.randn(size, generator=generator, dtype=dtype) for scale in scales]


def start(dtype, size=7):
    return torch.linspace(-1, 1, size, dtype=dtype)


ORIGINALS = {
    "Adam": functools.partial(torch.optim.Adam, lr=0.1, betas=(0.8, 0.95), eps=1e-4),
    "Adam with decay": functools.partial(torch.optim.Adam, lr=0.1, weight_decay=0.3),
    "AdamW": functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.3),
    "AdamW without decay": functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.0),
    "ClippedAdam": functools.partial(
        pyro.optim.clipped_adam.ClippedAdam, lr=0.1, lrd=0.9, clip_norm=0.5, weight_decay=0.1, betas=(0.8, 0.95)
    ),
}


if "decoupled_weight_decay" in inspect.signature(torch.optim.Adam).parameters:
    ORIGINALS["Adam, decoupled"] = functools.partial(
        torch.optim.Adam, lr=0.1, weight_decay=0.3, decoupled_weight_decay=True
    )


@pytest.mark.parametrize("name", ORIGINALS)
def test_optimizers(name, dtype, tolerance):
    theirs = start(dtype).requires_grad_()
    optimizer = ORIGINALS[name]([theirs])
    rule = Adam.like(optimizer)
    update = Update(rule)
    state = update.start([start(dtype)])
    for gradient in gradients(dtype):
        theirs.grad = gradient.clone()
        optimizer.step()
        state, _, finite = update(state, gradient.new_tensor(1.0), [gradient], gradient.new_tensor(0.1))
        assert finite
        torch.testing.assert_close(state.vectors[0][0], theirs.detach(), rtol=tolerance(1e-12), atol=tolerance(1e-12))


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(torch.optim.Adam, lr=0.1, amsgrad=True),
        functools.partial(torch.optim.Adam, lr=0.1, maximize=True),
        functools.partial(torch.optim.Adam, lr=0.1, differentiable=True),
        functools.partial(torch.optim.SGD, lr=0.1),
        functools.partial(pyro.optim.clipped_adam.ClippedAdam, lr=0.1, centered_variance=True),
    ],
)
def test_other_optimizers_stay_outside(make, dtype):
    assert Adam.like(make([start(dtype).requires_grad_()])) is None


def test_several_dtypes_share_one_step(device):
    update = Update(Adam(), clip_norm=1.0)
    vectors = [torch.ones(2, dtype=torch.float32), torch.ones(3, dtype=torch.float64)]
    state = update.start(vectors)
    given = [torch.full((2,), 3.0), torch.full((3,), 4.0, dtype=torch.float64)]
    state, clipped, _ = update(state, torch.tensor(1.0), given, torch.tensor(0.1))
    assert [matrix.dtype for matrix in state.vectors] == [torch.float32, torch.float64]
    norm = sum(float((gradient.double() ** 2).sum()) for gradient in clipped) ** 0.5
    assert norm == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(state.vectors[0][0] < 1, torch.tensor([True, True]))


def test_clipping_by_the_norm(dtype, tolerance):
    update = Update(None, clip_norm=0.7)
    state = update.start([start(dtype)])
    for gradient in gradients(dtype):
        leaf = start(dtype).requires_grad_()
        leaf.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([leaf], 0.7)
        state, (clipped,), _ = update(state, gradient.new_tensor(1.0), [gradient], gradient.new_tensor(0.1))
        torch.testing.assert_close(clipped, leaf.grad, rtol=tolerance(1e-12), atol=0)
        assert float(Scalars(*state.scalars).norm) == pytest.approx(float(norm), rel=tolerance(1e-12))


def test_clipping_by_the_running_norm(dtype):
    """An outlier is scaled down to about twice the norms before, and does not raise the bar for the next one."""
    update = Update(None, clip_factor=2.0)
    state = update.start([start(dtype)])
    gradient = torch.ones(7, dtype=dtype)
    norms = []
    for size in [1.0] * 50 + [1e6, 1e6]:
        state, (clipped,), _ = update(state, gradient.new_tensor(1.0), [size * gradient], gradient.new_tensor(0.1))
        norms.append(float(clipped.norm() / gradient.norm()))
    assert norms[:50] == pytest.approx([1.0] * 50, rel=1e-5)
    assert 2.0 <= norms[50] < 2.1
    assert norms[50] <= norms[51] < 2.1


def test_the_running_norm_is_a_mean_at_first_and_then_that_of_about_a_hundred_steps(dtype):
    update = Update(None, clip_factor=10.0)
    state = update.start([start(dtype)])
    one = torch.tensor(1.0, dtype=dtype)
    gradient = torch.ones(7, dtype=dtype) / 7**0.5
    means = []
    for size in [1.0, 2.0, 3.0, *[2.0] * 147, 7.0]:
        state, _, _ = update(state, one, [size * gradient], 0.1 * one)
        means.append(float(Scalars(*state.scalars).norm_mean))
    assert means[:3] == pytest.approx([1.0, 1.5, 2.0], rel=1e-5)
    assert means[-2:] == pytest.approx([2.0, 2.05], rel=1e-5)


@pytest.mark.parametrize(("clip_norm", "expected"), [(0.5, 0.5), (1e3, 2.5)])
def test_the_lower_of_two_bounds_on_the_norm_holds(clip_norm, expected, dtype):
    """Twice the running norm, or the bound that was given."""
    update = Update(None, clip_norm=clip_norm, clip_factor=2.0)
    state = update.start([start(dtype)])
    one = torch.tensor(1.0, dtype=dtype)
    gradient = torch.ones(7, dtype=dtype) / 7**0.5
    for size in (1.0, 1.0, 1.0, 1e4):
        state, (clipped,), _ = update(state, one, [size * gradient], 0.1 * one)
    # The outlier counts as twice the norms before: a quarter of it is in their mean.
    assert float(Scalars(*state.scalars).norm_mean) == pytest.approx(1.25, rel=1e-5)
    assert float(clipped.norm()) == pytest.approx(expected, rel=1e-5)


def test_the_average_is_a_mean_at_first_and_then_forgets(dtype, tolerance):
    decay = 0.9
    update = Update(Adam(), ema_decay=decay)
    state = update.start([start(dtype)])
    expected = None
    for number, gradient in enumerate(gradients(dtype), 1):
        state, _, _ = update(state, gradient.new_tensor(1.0), [gradient], gradient.new_tensor(0.1))
        now = state.vectors[0][0]
        weight = max(1 / number, 1 - decay)
        expected = now if expected is None else expected + weight * (now - expected)
        torch.testing.assert_close(state.vectors[0][-1], expected, rtol=tolerance(1e-12), atol=tolerance(1e-12))


@pytest.mark.parametrize(
    "optimizer", [Adam(), Adam(weight_decay=0.1, decoupled=True), None], ids=["Adam", "AdamW", "none"]
)
@pytest.mark.parametrize("wrong", ["loss", "nan", "inf"])
def test_a_step_that_is_not_finite_changes_nothing(optimizer, wrong, dtype):
    update = Update(optimizer, clip_factor=2.0, ema_decay=0.9)
    state = update.start([start(dtype)])
    one, rate = torch.tensor(1.0, dtype=dtype), torch.tensor(0.1, dtype=dtype)
    for gradient in gradients(dtype)[:3]:
        state, _, _ = update(state, one, [gradient], rate)
    before = Scalars(*state.scalars.tolist())
    gradient = gradients(dtype)[3]
    if wrong != "loss":
        gradient[2] = float(wrong)
    loss = torch.nan * one if wrong == "loss" else one
    for count in (1, 2):
        broken, _, finite = update(state, loss, [gradient], rate)
        assert not finite
        assert torch.equal(broken.vectors[0], state.vectors[0])
        after = Scalars(*broken.scalars.tolist())
        assert (after.step, after.norm_mean) == (before.step, before.norm_mean)
        assert after.num_skipped == count
        state = broken
    state, _, finite = update(state, one, [gradients(dtype)[3]], rate)
    assert finite
    after = Scalars(*state.scalars.tolist())
    assert (after.step, after.num_skipped) == (4, 2)


def test_a_first_step_that_is_not_finite(dtype):
    update = Update(Adam(), clip_factor=2.0, ema_decay=0.9)
    state = update.start([start(dtype)])
    gradient = torch.ones(7, dtype=dtype)
    state, _, _ = update(state, gradient.new_tensor(torch.nan), [gradient], gradient.new_tensor(0.1))
    state, _, finite = update(state, gradient.new_tensor(1.0), [gradient], gradient.new_tensor(0.1))
    assert finite
    torch.testing.assert_close(state.vectors[0][0], start(dtype) - 0.1)
    torch.testing.assert_close(state.vectors[0][-1], state.vectors[0][0])
