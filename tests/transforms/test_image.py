"""Transforms of images and several scales: against torch's convolutions, by what passes unchanged, and what errors say."""

import pytest
import torch
from torch.nn.functional import conv2d
from transform_cases import perturb

from pyro_flowguides import transforms as T


def test_the_1x1_convolution_is_that_of_torch(dtype, tolerance):
    convolution = perturb(T.InvertibleConvolution((3, 4, 5)).to(dtype))
    z = torch.randn(7, 3, 4, 5, dtype=dtype)
    x, log_det = convolution.forward_and_log_det(z.flatten(1))
    inner = convolution.transform
    weight = torch.stack([inner(row) - inner(torch.zeros(3, dtype=dtype)) for row in torch.eye(3, dtype=dtype)], -1)
    bias = inner(torch.zeros(3, dtype=dtype))
    expected = conv2d(z, weight[..., None, None], bias)
    torch.testing.assert_close(x.reshape(z.shape), expected, rtol=tolerance(1e-10), atol=tolerance(1e-10))
    whole = 20 * torch.linalg.slogdet(weight).logabsdet
    torch.testing.assert_close(log_det, whole.expand(7), rtol=tolerance(1e-10), atol=tolerance(1e-10))
    # The sign changes with the direction.
    back, inverse_log_det = convolution.inverse_and_log_det(x)
    torch.testing.assert_close(back, z.flatten(1), rtol=tolerance(1e-9), atol=tolerance(1e-9))
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=tolerance(1e-10), atol=tolerance(1e-10))


@pytest.mark.parametrize("mask", ["channel", "checkerboard"])
def test_flipped_masks_are_complementary_and_a_coupling_keeps_its_part(mask):
    shape = (4, 3, 2)
    kept = T.channel_mask(shape) if mask == "channel" else T.checkerboard_mask(shape)
    assert kept.sum() == 12
    z = torch.randn(5, 24)
    for flip in (False, True):
        coupling = perturb(T.ImageCoupling(shape, mask=mask, flip=flip, hidden_channels=4))
        x, _ = coupling.forward_and_log_det(z)
        assert torch.equal((x == z).all(0), kept ^ flip)


def test_masks_at_their_places():
    assert T.channel_mask((2, 1, 2)).tolist() == [True, True, False, False]
    assert T.channel_mask((3, 1, 1)).tolist() == [True, False, False]
    assert T.checkerboard_mask((2, 2, 3)).int().tolist() == 2 * [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("mask", ["channel", "checkerboard"])
def test_a_shift_of_the_image_shifts_what_the_network_says(mask):
    """Away from the edges: the place of a number in the vector is that of its pixel."""
    shape = (2, 10, 12)
    coupling = perturb(T.ImageCoupling(shape, mask=mask, hidden_channels=4).double())
    z = torch.zeros(shape, dtype=torch.float64)
    z[:, 4:6, 4:6] = torch.randn(2, 2, 2)
    rolled = z.roll((2, 2), (1, 2))
    x, y = coupling(torch.stack([z, rolled]).flatten(1)).reshape(2, *shape)
    torch.testing.assert_close(x.roll((2, 2), (1, 2))[:, 4:8, 4:10], y[:, 4:8, 4:10], rtol=0, atol=1e-12)
    assert (x - coupling(torch.zeros(240, dtype=torch.float64)).reshape(shape)).abs().max() > 1e-2


def test_squeeze_makes_channels_of_blocks():
    squeeze, z = T.Squeeze((2, 4, 6)), torch.randn(3, 2, 4, 6)
    assert squeeze.squeezed_shape == (8, 2, 3)
    # torch's name for it.
    expected = torch.nn.functional.pixel_unshuffle(z, 2)
    assert torch.equal(squeeze(z.flatten(1)).reshape(3, 8, 2, 3), expected)
    assert torch.equal(T.Unsqueeze((2, 4, 6))(squeeze(z.flatten(1))), z.flatten(1))


def test_what_a_split_passes_is_unchanged_and_without_effect():
    split = perturb(T.Split(6, T.AffineCoupling(4)))
    z, score = torch.randn(5, 6), torch.randn(5, 6)
    x, log_det, moved = split.forward_with_score(z, score)
    assert torch.equal(x[:, 4:], z[:, 4:]) and torch.equal(moved[:, 4:], score[:, 4:])
    changed = torch.cat([z[:, :4], z[:, 4:] + 1], -1)
    again, log_det_again = split.forward_and_log_det(changed)
    assert torch.equal(again[:, :4], x[:, :4]) and torch.equal(log_det_again, log_det)


def test_act_norm_of_channels_is_set_from_draws():
    norm = T.ImageActNorm((2, 3, 4))
    draws = (torch.randn(50, 2, 12) * torch.tensor([[[3.0], [0.5]]]) + torch.tensor([[[5.0], [-1.0]]])).flatten(1)
    norm.initialize(draws)
    standard = norm(draws).detach().reshape(50, 2, 12)
    torch.testing.assert_close(standard.mean((0, 2)), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(standard.transpose(0, 1).flatten(1).std(-1), torch.ones(2), rtol=0, atol=1e-5)


def test_a_network_of_ones_own():
    class Sum(torch.nn.Module):
        def forward(self, inputs):
            return inputs.sum(-1, keepdim=True).expand(*inputs.shape[:-1], 2)

    coupling = T.Coupling(4, T.univariate.Shift(), conditioner=Sum())
    torch.testing.assert_close(coupling(torch.tensor([1.0, 2.0, 3.0, 4.0])), torch.tensor([1.0, 2.0, 6.0, 7.0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: T.Squeeze((1, 3, 4)), r"Squeeze: height and width must be even, got shape \(1, 3, 4\)"),
        (lambda: T.Unsqueeze((1, 4, 3)), r"Unsqueeze: height and width must be even"),
        (lambda: T.Split(2, T.Reverse(3)), "Split: the transform has dim = 3, more than dim = 2"),
        (
            lambda: T.Pixelwise((2, 3, 3), T.Reverse(3)),
            "Pixelwise: the transform has dim = 3, but the image 2 channels",
        ),
        (lambda: T.ImageCoupling((4, 4)), r"ImageCoupling: shape must be \(channels, height, width\)"),
        (lambda: T.ImageCoupling((2, 4, 4), mask="rows"), 'mask must be "channel" or "checkerboard", got \'rows\''),
        (lambda: T.ImageCoupling((1, 4, 4)), r"a channel mask cannot part an image of shape \(1, 4, 4\) in two"),
        (lambda: T.ImageCoupling((4, 1, 1), mask="checkerboard"), "a checkerboard mask cannot part"),
        (lambda: T.ImageCoupling((2, 2, 2), hidden_channels=0), "numbers of channels at least 1"),
        (lambda: T.ImageActNorm((2, 3, 3)).initialize(torch.randn(5, 4)), r"expected draws of shape \(…, 18\)"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
